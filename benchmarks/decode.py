"""The decoder runtime on models of real shapes with random ternary weights, held against bandwidth and the integer peak.

uv run python benchmarks/decode.py --json decode.json
uv run python benchmarks/decode.py --rounds 1 --shapes smollm2-135m      # a quick look

Weights are random, so that texts mean nothing and times mean what those of a real model do. The limit of decoding is reading the
weights once a token: "share" is that time, measured in the same rounds by a loop that only reads, over the token's. The limit of a
prompt is the integer dot product of the widest registers. One thread is timed by its own clock, which stands while a neighbour has
the processor. Not here yet: other engines, two threads, and curves over context length.
"""

import resource
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter, thread_time
from typing import Any

import bitnet_kernels
import gguf
import numpy as np
from bitnet_arch.gguf.floats import encode_float
from bitnet_arch.gguf.types import TYPES
from bitnet_kernels import Engine, TernaryMatrix, _native
from report import bar, finish, interleaved, median_ratio, parser

SHAPES: dict[str, dict[str, int | str]] = {
    "2b4t": {"width": 2560, "layers": 30, "heads": 20, "kv": 5, "ffn": 6912, "vocabulary": 128256, "head": "q6_k"},
    "smollm2-135m": {"width": 576, "layers": 30, "heads": 9, "kv": 3, "ffn": 1536, "vocabulary": 49152, "head": "q8_0"},
}
"""Embeddings of 576 columns cannot be Q6_K, whose blocks are 256: they are Q8_0."""

BARS = {"2b4t": (0.85, 0.8, 128), "smollm2-135m": (0.65, None, 512)}
"""Share of bandwidth while decoding, share of the peak over a prompt, and its tokens."""

DECODED, DOTS, READ_ROWS = 16, 4_000_000, 1 << 16


def write_model(path: Path, shape: dict[str, Any]) -> tuple[int, int]:
    """Write a `bitnet` file of random weights; return how many bytes a token's products read, and how many ternary weights."""
    rng = np.random.default_rng(0)
    width, kv = shape["width"], shape["width"] // shape["heads"] * shape["kv"]
    writer = gguf.GGUFWriter(path, "bitnet")
    keys = {"context_length": 1024, "embedding_length": width, "block_count": shape["layers"], "feed_forward_length": shape["ffn"]}
    keys |= {"attention.head_count": shape["heads"], "attention.head_count_kv": shape["kv"]}
    for key, value in keys.items():
        writer.add_uint32(f"bitnet.{key}", value)
    writer.add_float32("bitnet.attention.layer_norm_rms_epsilon", 1e-5)
    table = rng.standard_normal((4096, width), dtype=np.float32)
    kind = {"q6_k": gguf.GGMLQuantizationType.Q6_K, "q8_0": gguf.GGMLQuantizationType.Q8_0}[shape["head"]]
    encoded = np.resize(encode_float(table, int(kind)), (shape["vocabulary"], encode_float(table[:1], int(kind)).shape[1]))
    writer.add_tensor("token_embd.weight", encoded, raw_dtype=kind)
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    matrices = {"attn_q": (width, width), "attn_k": (kv, width), "attn_v": (kv, width), "attn_output": (width, width)}
    matrices |= {"ffn_gate": (shape["ffn"], width), "ffn_up": (shape["ffn"], width), "ffn_down": (width, shape["ffn"])}
    data = {name: (ternary(rng, *size), size[1]) for name, size in matrices.items()}
    for layer in range(shape["layers"]):
        for norm in ("attn_norm", "attn_sub_norm", "ffn_norm", "ffn_sub_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(shape["ffn"] if norm == "ffn_sub_norm" else width, np.float32))
        for name, (values, _) in data.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", *values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    weights = shape["layers"] * sum(rows * columns for rows, columns in matrices.values())
    return weights // 4 + encoded.nbytes, weights


def ternary(rng: np.random.Generator, rows: int, columns: int) -> tuple[np.ndarray, None, gguf.GGMLQuantizationType]:
    """Return what `GGUFWriter.add_tensor` takes of a random matrix: TQ2_0, or F16 where rows are too narrow for it."""
    codes = rng.integers(-1, 2, (rows, columns), dtype=np.int8)
    if columns % 256:
        return codes.astype(np.float16) * np.float16(0.02), None, gguf.GGMLQuantizationType.F16
    return TYPES["tq2_0"].encode(codes, np.float16(0.02)), None, gguf.GGMLQuantizationType.TQ2_0


def measure(name: str, folder: Path, rounds: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Time one shape."""
    nbytes, weights = write_model(folder / f"{name}.gguf", SHAPES[name])
    decode_bar, prompt_bar, length = BARS[name]
    Engine(folder / f"{name}.gguf")  # now the file is in the page cache
    start = perf_counter()
    engine = Engine(folder / f"{name}.gguf", slots=17, cache="f16")
    opened = perf_counter() - start
    prompt = np.random.default_rng(1).integers(0, engine.vocabulary, length).tolist()
    reading = [TernaryMatrix(np.zeros((READ_ROWS, 4096), np.int8), np.ones(1, np.float32))._matrix]  # 64 MiB

    def prefill() -> None:
        engine.truncate(0, 0)
        engine.step({0: prompt})

    def decode() -> None:
        engine.truncate(0, length)
        for token in range(DECODED):
            engine.step({0: [token]})

    def batch() -> None:
        for slot in range(1, 17):
            engine.truncate(slot, length)
        engine.step({slot: [slot] for slot in range(1, 17)})

    prefill()
    for slot in range(1, 17):
        engine.copy(0, slot, length)

    contenders: dict[str, Callable[[], object]] = {
        "read": lambda: _native.time_read(reading, 1),
        "peak": lambda: _native.time_dot(DOTS),
    }
    contenders |= {"prompt": prefill, "decode": decode, "batch": batch}
    seconds = interleaved(contenders, rounds, thread_time)
    read = [nbytes / (reading[0].nbytes / taken) for taken in seconds["read"]]  # seconds that reading a token's weights takes
    peak = [2 * weights * length / (_native.time_dot(DOTS)[1] / taken) for taken in seconds["peak"]]
    one = [taken / DECODED for taken in seconds["decode"]]
    decode_share, prompt_share = median_ratio(read, one), median_ratio(peak, seconds["prompt"])
    gain = median_ratio([16 * taken for taken in one], seconds["batch"])
    rows = [
        {
            "shape": name,
            "what": f"prompt of {length}, tokens/s",
            "value": length / median(seconds["prompt"]),
            "share": prompt_share,
        },
        {"shape": name, "what": "decode, tokens/s", "value": 1 / median(one), "share": decode_share},
        {"shape": name, "what": "batch of 16, tokens/s", "value": 16 / median(seconds["batch"]), "share": gain},
        {"shape": name, "what": "open, s", "value": opened, "share": float("nan")},
        {
            "shape": name,
            "what": "peak RSS so far, MB",
            "value": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
            "share": 0.0,
        },
    ]
    bars = [bar(f"{name}: decode, share of bandwidth", decode_share, ">=", decode_bar)]
    if prompt_bar is not None:
        bars.append(bar(f"{name}: prompt, share of the integer peak", prompt_share, ">=", prompt_bar))
    if name == "smollm2-135m":
        bars.append(bar(f"{name}: batch of 16 over batch of 1", gain, ">=", 6))
    if name == "2b4t":
        bars.append(bar(f"{name}: open, s", opened, "<=", 1))
    return rows, bars


def main() -> None:
    """Run the benchmark."""
    arguments = parser(__doc__ or "")
    arguments.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="which models")
    options = arguments.parse_args()
    if options.threads != 1:
        arguments.error("--threads: the limits are one thread's, and the time is the calling thread's: 1 is wanted")
    bitnet_kernels.set_threads(1)
    rows, bars = [], []
    for name in options.shapes:
        with tempfile.TemporaryDirectory() as folder:
            more_rows, more_bars = measure(name, Path(folder), options.rounds)
        rows, bars = rows + more_rows, bars + more_bars
    finish(f"decoding, {bitnet_kernels.isa()}", rows, bars, ("bitnet-kernels", "numpy"), options.json)


if __name__ == "__main__":
    main()
