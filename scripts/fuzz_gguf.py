"""Fuzz what reads other people's files: GGUF files, or with --weights the safetensors of model directories.

    uv run python scripts/fuzz_gguf.py corpus --seconds 60                            # mutations at random
    uv run --with atheris python scripts/fuzz_gguf.py corpus --seconds 900 --atheris  # guided by coverage (libFuzzer)
    uv run python scripts/fuzz_gguf.py corpus --seconds 60 --weights

Anything but success or a `UserError` is a finding: the run stops, and the input stays in the corpus folder (`crash.bin`, `crash`,
or with atheris `crash-*`). The folder is filled when it has nothing to begin with. What follows `--` is handed to libFuzzer.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path


def main() -> None:
    """Run what is asked for."""
    words = sys.argv[1:]
    words, more = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path, help="folder of files to begin with; made if it is missing")
    parser.add_argument("--seconds", type=float, default=60, help="how long (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations (%(default)s)")
    parser.add_argument("--weights", action="store_true", help="model directories instead of GGUF files")
    parser.add_argument("--atheris", action="store_true", help="guided by coverage; needs atheris")
    arguments = parser.parse_args(words)
    if more and not arguments.atheris:
        parser.error("options of libFuzzer have no effect without --atheris")
    if arguments.atheris:
        run_atheris(arguments, more)
        return
    from bitnet_arch.fuzz_weights import fuzz_directories
    from bitnet_arch.gguf.fuzz import fuzz_random

    fill(arguments.corpus, arguments.weights)
    fuzz = fuzz_directories if arguments.weights else fuzz_random
    refused = fuzz(arguments.corpus, arguments.seconds, arguments.seed)
    print(f"{sum(refused.values())} files, no finding; refused by: {refused}")


def fill(corpus: Path, weights: bool) -> None:
    """Write what to begin with, unless it is there."""
    from bitnet_arch.fuzz_weights import write_directories
    from bitnet_arch.gguf.fuzz import write_corpus

    corpus.mkdir(parents=True, exist_ok=True)
    if not any(corpus.glob("*/model.safetensors" if weights else "*.gguf")):
        (write_directories if weights else write_corpus)(corpus)


def run_atheris(arguments: argparse.Namespace, more: list[str]) -> None:
    """Hand over to libFuzzer, which ends the process."""
    try:
        import atheris  # type: ignore[import-untyped]
    except ImportError:
        sys.exit("error: atheris is not installed: uv run --with atheris python scripts/fuzz_gguf.py ...")
    with atheris.instrument_imports(include=["bitnet_arch"]):  # torch and transformers would only be slower
        import bitnet_arch.fuzz_weights
        import bitnet_arch.gguf.fuzz
    fill(arguments.corpus, arguments.weights)
    corpus: Path = arguments.corpus

    def run(data: bytes) -> None:
        bitnet_arch.gguf.fuzz.try_bytes(data)

    if arguments.weights:
        corpus, run = directory_inputs(arguments.corpus, bitnet_arch.fuzz_weights.try_weights)
    largest = max(file.stat().st_size for file in corpus.iterdir())
    options = [f"-max_total_time={arguments.seconds:.0f}", f"-max_len={2 * largest}", f"-seed={arguments.seed + 1}"]
    atheris.Setup([sys.argv[0], str(corpus), *options, "-rss_limit_mb=8192", f"-artifact_prefix={arguments.corpus}/", *more], run)
    atheris.Fuzz()


def directory_inputs(corpus: Path, try_weights: Callable[[Path, bytes], str]) -> tuple[Path, Callable[[bytes], None]]:
    """Return a folder with the directories' weights, and what tries bytes: the first one names a directory."""
    directories = [path for path in sorted(corpus.iterdir()) if (path / "model.safetensors").is_file()]
    inputs = corpus / "inputs"
    inputs.mkdir(exist_ok=True)
    for number, path in enumerate(directories):
        file = inputs / path.name
        if not file.exists():
            file.write_bytes(bytes([number]) + (path / "model.safetensors").read_bytes())

    def run(data: bytes) -> None:
        if data:
            try_weights(directories[data[0] % len(directories)], data[1:])

    return inputs, run


if __name__ == "__main__":
    main()
