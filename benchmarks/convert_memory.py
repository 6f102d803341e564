"""What it takes to bring a model from directory to directory, or to a file: peak memory above the imports, time beside copying.

uv run python benchmarks/convert_memory.py --json convert_memory.json
uv run python benchmarks/convert_memory.py --models 3B --cases "master, gain 1" "export packed"      # 13 GB of disk

SmolLM2-135M comes from the hub or from an installed package, the others are random, of Llama-3.2's shapes in bfloat16, made on disk
tensor by tensor and deleted afterwards. Each case runs in a process of its own. Its memory is the process's largest resident set
(VmHWM) less what was resident after the imports. "Copying" reads the bytes of the source's weights and writes as many as the result
has, in pieces of 32 MiB, in the same process and before the case: both find the source in the page cache if it fits.

What a case may hold above the Python baseline: 300 MiB and the largest tensor where nothing is calibrated, else embedding, one
block in float32 and activations. The methods that solve a layer hold a block's covariances besides, and in float64 several matrices
of the size of the layer or of its covariance: these are shown and not judged. The gate, run with an engine that knows nothing, says
nothing of the file.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bitnet_arch import ConversionConfig, open_weights, resolve_pretrained
from bitnet_arch.checkpoint import skeleton
from bitnet_arch.gguf import export_gguf
from bitnet_arch.lrc.directory import lrc_directory
from bitnet_arch.lrc.model import LRCConfig
from bitnet_arch.parity import EngineInfo, run_gate
from bitnet_arch.ptq.directory import quantize_directory
from bitnet_arch.shards import PIECE, ShardWriter, TensorSpec, row_pieces
from bitnet_arch.stream import convert_directory
from bitnet_arch.testing import tiny_tokenizer
from report import bar, finish, parser
from rich.console import Console
from rich.progress import track
from transformers import LlamaConfig

MIB = 2**20
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
SHAPES: dict[str, dict[str, int]] = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "head_dim": 64},
    "3B": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24, "head_dim": 128},
}
SHAPES |= {f"{name}, 2 blocks": SHAPES[name] | {"num_hidden_layers": 2} for name in ("1B", "3B")}

CASES: dict[str, dict[str, Any]] = {
    "master, gain 1": {"run": "convert", "gain": "one"},
    "packed, gain 1": {"run": "convert", "gain": "one", "packed": True},
    "packed, calibrated": {"run": "convert", "gain": "calibrated", "packed": True, "holds": "block"},
    "packed, least squares on data": {"run": "quantize", "method": "least_squares", "packed": True, "holds": None},
    "packed, gptq": {"run": "quantize", "method": "gptq", "packed": True, "holds": None},
    "packed, LRC of rank 16 for absmean": {"run": "lrc", "packed": True, "holds": None},
    "export master": {"run": "export", "from": "master, gain 1"},
    "export packed": {"run": "export", "from": "packed, gain 1"},
    "gate without an engine": {"run": "gate", "from": "packed, gain 1", "holds": "block"},
}
"""What is run on what: a source directory, or what another case makes of it. "holds" says what else than the largest tensor may be
in memory (None: no bar)."""

ALLOWED = 300
"""MiB above what is named."""


def random_model(name: str, folder: Path) -> Path:
    """Write a random bfloat16 Llama, never holding more than a piece of a tensor; return its directory."""
    config = LlamaConfig(**SHAPES[name], num_key_value_heads=8, vocab_size=128_256, tie_word_embeddings=True, rms_norm_eps=1e-5)
    folder.mkdir()
    tiny_tokenizer(config.vocab_size).save_pretrained(str(folder))
    (folder / "config.json").write_text(json.dumps(config.to_dict() | {"architectures": ["LlamaForCausalLM"]}, default=str))
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    hidden, ffn = config.hidden_size, config.intermediate_size
    block = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (config.vocab_size, hidden)}
    for i in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{i}.{part}": shape for part, shape in block.items()}
    shapes["model.norm"] = (hidden,)
    specs = {f"{part}.weight": TensorSpec(torch.bfloat16, shape) for part, shape in shapes.items()}
    generator = torch.Generator().manual_seed(0)
    with ShardWriter(folder, specs) as writer:
        for part, spec in specs.items():
            if len(spec.shape) == 1:
                writer.write(part, torch.ones(spec.shape, dtype=spec.dtype))
                continue
            for rows in row_pieces(spec):
                shape = (rows.stop - rows.start, spec.shape[1])
                writer.write(part, (0.02 * torch.randn(shape, generator=generator)).to(spec.dtype))
    return folder


def status(key: str) -> float:
    """Return a line of this process's /proc/self/status, MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


def weight_bytes(directory: Path) -> int:
    """Return the size of a directory's weights."""
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def copy_bytes(source: Path, target: Path, size: int) -> float:
    """Read a directory's weights and write `size` bytes; return the seconds."""
    start = time.perf_counter()
    buffer = bytearray(PIECE)
    for file in sorted(source.glob("*.safetensors")):
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass
    with target.open("wb", buffering=0) as opened:
        while size > 0:
            size -= opened.write(memoryview(buffer)[: min(size, PIECE)])
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


def child(source: Path, out: Path, case: str, tokens: int, threads: int, size: int) -> None:
    """Run one case and print its figures as JSON.

    Args:
        source: what the case runs on: a directory.
        out: where to write.
        case: a key of `CASES`.
        tokens: calibration tokens, in rows of at most 512.
        threads: CPU threads.
        size: bytes to write when copying; 0 for a case that writes nothing.
    """
    torch.set_num_threads(threads)
    baseline = status("VmRSS")
    copying = copy_bytes(source, out.with_name("copy"), size)
    options = CASES[case]
    rows = list(torch.randint(0, 40_000, (1, tokens), generator=torch.Generator().manual_seed(0)).split(512, dim=1))
    packed = bool(options.get("packed"))
    start = time.perf_counter()
    if options["run"] == "convert":
        config = ConversionConfig(gain=options["gain"])
        convert_directory(source, out, config, rows if config.calibrates else None, packed=packed)
    elif options["run"] == "quantize":
        quantize_directory(source, out, options["method"], rows, packed=packed)
    elif options["run"] == "lrc":
        lrc_directory(source, out, LRCConfig(rank=16, quantizer="keep", decomposition="randomized"), rows, packed=packed)
    elif options["run"] == "export":
        export_gguf(source, out)
    else:
        gate(source, out, tokens)
    seconds = time.perf_counter() - start
    print(json.dumps({"MiB": status("VmHWM") - baseline, "s": seconds, "copying s": copying}))


def gate(directory: Path, file: Path, tokens: int) -> None:
    """Run the parity gate on two short windows with an engine that finds every token equally likely."""
    with open_weights(directory) as reader:
        vocabulary = reader.model_config.vocab_size

    def engine(ids: list[int]) -> np.ndarray[Any, np.dtype[np.float64]]:
        return np.full((len(ids), vocabulary), -np.log(vocabulary))

    half = max(2, min(tokens, 64) // 2)
    run_gate(
        directory, file, EngineInfo(engine, "none", "0", tokenize=lambda text: []), [list(range(half)), list(range(half, 2 * half))]
    )


def limits(source: Path, tokens: int) -> tuple[float, float, float]:
    """Return a source's largest tensor, what calibration may hold beside 300 MiB (both MiB), and its parameters in billions."""
    with open_weights(source) as reader:
        names = reader.keys()
        specs = {name: reader.spec(name) for name in names}
        config = skeleton(reader).config
    parameters = {name: spec.nbytes // spec.dtype.itemsize for name, spec in specs.items()}
    block = sum(size for name, size in parameters.items() if name.startswith("model.layers.0."))
    embedding = specs["model.embed_tokens.weight"].nbytes
    row = min(tokens, 512)
    activations = 4 * (tokens * config.hidden_size + row * (4 * config.hidden_size + 3 * config.intermediate_size))
    largest = max(spec.nbytes for spec in specs.values())
    return largest / MIB, (embedding + 4 * block + activations) / MIB, sum(parameters.values()) / 1e9


def prepare(case: str, source: Path, folder: Path) -> Path:
    """Return what a case runs on; made once."""
    before = CASES[case].get("from")
    if before is None:
        return source
    made: Path = folder / before.replace(", ", "-").replace(" ", "-")
    if not made.exists():
        options = CASES[before]
        convert_directory(source, made, ConversionConfig(gain=options["gain"]), packed=bool(options.get("packed")))
    return made


def measure(name: str, case: str, source: Path, folder: Path, arguments: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run one case, `arguments.rounds` times, and return its row (medians) and bar."""
    options = CASES[case]
    run_on, out = prepare(case, source, folder), folder / "out"
    packed = bool(options.get("packed"))
    with open_weights(source) as reader:
        names = reader.keys()
        sizes = {n: (reader.shape(n), n.endswith("_proj.weight")) for n in names}
    if options["run"] == "gate":
        size = 0
        export_gguf(run_on, out)
    elif options["run"] == "export":  # codes in TQ2_0 or Q2_0, about 2.1 bits a weight, and f16
        size = round(sum(torch.Size(shape).numel() * (0.26 if matrix else 2) for shape, matrix in sizes.values()))
    else:  # codes are a quarter byte a weight, everything else four bytes
        size = round(sum(torch.Size(shape).numel() * (0.25 if packed and matrix else 4) for shape, matrix in sizes.values()))
    runs, written = [], 0
    for _ in range(arguments.rounds):
        command = [sys.executable, __file__, "--child", str(run_on), str(out), case]
        command += [str(arguments.tokens), str(arguments.threads), str(size)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
        if out.is_dir():
            written = weight_bytes(out)
            shutil.rmtree(out)
        elif options["run"] == "export":
            written = out.stat().st_size
            out.unlink()
    out.unlink(missing_ok=True)
    found = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    largest = limits(run_on, arguments.tokens)[0]
    _, calibrating, billions = limits(source, arguments.tokens)  # a packed directory has bytes, not parameters
    row = {
        "model": name,
        "case": case,
        "peak MiB": max(run["MiB"] for run in runs),
        "largest tensor MiB": largest,
        "s / 1e9 parameters": found["s"] / billions,
        "copying s / 1e9": found["copying s"] / billions,
        "x copying": statistics.median(run["s"] / run["copying s"] for run in runs),
        "read MiB": weight_bytes(run_on) / MIB,
        "written MiB": written / MIB,
    }
    holds = options.get("holds", "tensor")
    if holds is None:
        return row, []
    held = calibrating if holds == "block" else largest
    return row, [bar(f"{name}, {case}: peak MiB", row["peak MiB"], "<=", round(held + ALLOWED))]


def main() -> None:
    """Run the benchmark."""
    if sys.argv[1:2] == ["--child"]:
        source, out, case, tokens, threads, size = sys.argv[2:]
        child(Path(source), Path(out), case, int(tokens), int(threads), int(size))
        return
    options = parser(__doc__.splitlines()[0])
    options.set_defaults(rounds=1)
    options.add_argument("--models", nargs="+", choices=["smollm2", *SHAPES], default=["smollm2", "1B, 2 blocks"], help="on what")
    options.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="what to run")
    options.add_argument("--tokens", type=int, default=512, help="calibration tokens")
    options.add_argument("--folder", type=Path, help="where models are made and written (default: the system's temporary folder)")
    arguments = options.parse_args()
    rows: list[dict[str, Any]] = []
    bars: list[dict[str, Any]] = []
    for model in arguments.models:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
            folder = Path(temporary)
            if model == "smollm2":
                found = resolve_pretrained(SMOLLM2)
                name, source = found.note, found.path
            else:
                name, source = f"random Llama, {model}, bfloat16", random_model(model, folder / "source")
            for case in track(arguments.cases, name, console=Console(stderr=True), transient=True):
                row, judged = measure(name, case, source, folder, arguments)
                rows.append(row)
                bars += judged
    finish("from directory to directory, and to a file", rows, bars, ("torch", "transformers", "bitnet-arch"), arguments.json)


if __name__ == "__main__":
    main()
