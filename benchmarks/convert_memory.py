"""What converting a model from directory to directory takes: peak memory above the imports, and time beside copying the bytes.

uv run python benchmarks/convert_memory.py --json convert_memory.json

SmolLM2-135M comes from the hub or from an installed package, the others are random, of Llama-3.2's shapes in bfloat16, made on disk
tensor by tensor and deleted afterwards. Each conversion runs in a process of its own. Its memory is the process's largest resident
set (VmHWM) less what was resident after the imports. "Copying" reads the bytes of the source's weights and writes as many as the
result has, in pieces of 32 MiB, in the same process and before the conversion: both find the source in the page cache if it fits.
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

import torch
from bitnet_arch import ConversionConfig, open_weights, resolve_pretrained
from bitnet_arch.checkpoint import skeleton
from bitnet_arch.shards import PIECE, ShardWriter, TensorSpec, row_pieces
from bitnet_arch.stream import convert_directory
from report import bar, finish, parser
from transformers import LlamaConfig

MIB = 2**20
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
SHAPES: dict[str, dict[str, int]] = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "head_dim": 64},
    "3B": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24, "head_dim": 128},
}
CASES: dict[str, dict[str, Any]] = {
    "master, gain 1": {"gain": "one", "packed": False},
    "packed, gain 1": {"gain": "one", "packed": True},
    "packed, calibrated": {"gain": "calibrated", "packed": True},
}
ALLOWED = 300
"""MiB above the largest tensor, or above embedding, one block and activations where the conversion calibrates."""


def random_model(name: str, folder: Path) -> Path:
    """Write a random bfloat16 Llama, never holding more than a piece of a tensor; return its directory."""
    config = LlamaConfig(**SHAPES[name], num_key_value_heads=8, vocab_size=128_256, tie_word_embeddings=True, rms_norm_eps=1e-5)
    folder.mkdir()
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
    """Run one conversion and print its figures as JSON.

    Args:
        source: the float directory.
        out: where to write.
        case: a key of `CASES`.
        tokens: calibration tokens, in rows of at most 512.
        threads: CPU threads.
        size: bytes to write when copying.
    """
    torch.set_num_threads(threads)
    baseline = status("VmRSS")
    copying = copy_bytes(source, out.with_name("copy"), size)
    options = CASES[case]
    rows = list(torch.randint(0, 40_000, (1, tokens), generator=torch.Generator().manual_seed(0)).split(512, dim=1))
    start = time.perf_counter()
    convert_directory(source, out, ConversionConfig(gain=options["gain"]), rows, packed=options["packed"])
    seconds = time.perf_counter() - start
    print(json.dumps({"MiB": status("VmHWM") - baseline, "s": seconds, "copying s": copying}))


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


def measure(name: str, case: str, source: Path, folder: Path, arguments: Any) -> dict[str, Any]:
    """Run one case, `arguments.rounds` times, and return its row (medians)."""
    packed = CASES[case]["packed"]
    with open_weights(source) as reader:
        names = reader.keys()
        sizes = {n: (reader.shape(n), n.endswith("_proj.weight")) for n in names}
    # Codes are a quarter byte a weight, everything else four bytes.
    size = round(sum(torch.Size(shape).numel() * (0.25 if packed and matrix else 4) for shape, matrix in sizes.values()))
    runs = []
    for _ in range(arguments.rounds):
        command = [sys.executable, __file__, "--child", str(source), str(folder / "out"), case]
        command += [str(arguments.tokens), str(arguments.threads), str(size)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
        written = weight_bytes(folder / "out")
        shutil.rmtree(folder / "out")
    found = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    billions = limits(source, arguments.tokens)[2]
    return {
        "model": name,
        "conversion": case,
        "peak MiB": max(run["MiB"] for run in runs),
        "s / 1e9 parameters": found["s"] / billions,
        "copying s / 1e9": found["copying s"] / billions,
        "x copying": statistics.median(run["s"] / run["copying s"] for run in runs),
        "read MiB": weight_bytes(source) / MIB,
        "written MiB": written / MIB,
    }


def main() -> None:
    """Run the benchmark."""
    if sys.argv[1:2] == ["--child"]:
        source, out, case, tokens, threads, size = sys.argv[2:]
        child(Path(source), Path(out), case, int(tokens), int(threads), int(size))
        return
    options = parser(__doc__.splitlines()[0])
    options.set_defaults(rounds=1)
    options.add_argument("--models", nargs="+", choices=["smollm2", *SHAPES], default=["smollm2", "3B"], help="what to convert")
    options.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="how to convert")
    options.add_argument("--tokens", type=int, default=512, help="calibration tokens")
    options.add_argument("--folder", type=Path, help="where models are made and written (default: the system's temporary folder)")
    arguments = options.parse_args()
    rows, bars = [], []
    for model in arguments.models:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
            folder = Path(temporary)
            if model == "smollm2":
                found = resolve_pretrained(SMOLLM2)
                name, source = found.note, found.path
            else:
                name, source = f"random Llama, {model}, bfloat16", random_model(model, folder / "source")
            largest, calibrating, _ = limits(source, arguments.tokens)
            for case in arguments.cases:
                rows.append(measure(name, case, source, folder, arguments))
                held = calibrating if CASES[case]["gain"] == "calibrated" else largest
                bars.append(bar(f"{model}, {case}: peak MiB", rows[-1]["peak MiB"], "<=", round(held + ALLOWED)))
    finish("conversion from directory to directory", rows, bars, ("torch", "transformers", "bitnet-arch"), arguments.json)


if __name__ == "__main__":
    main()
