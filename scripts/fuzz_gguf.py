"""Fuzz the GGUF reader and importer with atheris: anything but a `UserError` is a finding, and its input is kept as `crash-*`.

    uv pip install atheris
    uv run python -c "from bitnet_arch.gguf.fuzz import write_corpus; write_corpus('corpus')"
    uv run python scripts/fuzz_gguf.py corpus -max_total_time=900 -max_len=65536 -rss_limit_mb=4096

Without atheris it mutates the corpus at random: `uv run python scripts/fuzz_gguf.py corpus SECONDS [SEED]`.
"""

import sys
from pathlib import Path

from bitnet_arch.gguf.fuzz import fuzz_random, try_bytes


def main() -> None:
    """Run what is installed."""
    try:
        import atheris
    except ImportError:
        corpus, seconds, seed = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0
        print(fuzz_random(corpus, seconds, seed))
        return
    atheris.instrument_all()
    atheris.Setup(sys.argv, try_bytes)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
