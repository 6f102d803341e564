"""The decoder runtime on models of real shapes with random ternary weights, held against bandwidth, the integer peak and llama.cpp.

uv run python benchmarks/decode.py --json decode.json
uv run python benchmarks/decode.py --quick --shapes smollm2-135m      # a look: one thread, no curves, no other engine

Weights are random, so that texts mean nothing and times mean what those of a real model do. All of a table is measured in turns,
round by round, and a column "of limit" is the median over rounds of a ratio inside one round.

* The limit of decoding is reading once a token as many bytes as its weights have, by a loop that only reads, as often as tokens are
  decoded, so that caches help both alike; of two threads, by two at once, each half.
* The limit of a prompt is the integer dot product of the widest registers. A processor with tiles (AMX) may pass it.
* One thread is timed by its own clock, which stands while a neighbour has the processor. Two threads, llama.cpp, and what
  llama.cpp is compared with are timed by the wall's.
* llama.cpp (xllamacpp, an AVX2 build) runs the same file: TQ2_0, but Q2_0 where rows are no multiple of 256. Its server also
  samples, which ours does not.
* Tokens are decoded at a context of 64, eight a round, also of each sequence of a batch; the curve over context says what more
  costs. Keys and values are kept in f16.
* `--rank R` adds a low-rank correction to every matrix, which llama.cpp does not run.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from time import perf_counter, thread_time
from typing import Any

import bitnet_kernels
import gguf
import numpy as np
from bitnet_arch.gguf.floats import encode_float
from bitnet_arch.gguf.types import TYPES
from bitnet_kernels import Engine, TernaryMatrix, timing
from report import bar, finish, interleaved, median_ratio, parser

SHAPES: dict[str, dict[str, Any]] = {
    "2b4t": {"width": 2560, "layers": 30, "heads": 20, "kv": 5, "ffn": 6912, "vocabulary": 128256, "head": "q6_k"},
    "smollm2-135m": {"width": 576, "layers": 30, "heads": 9, "kv": 3, "ffn": 1536, "vocabulary": 49152, "head": "q8_0"},
}
"""Embeddings of 576 columns cannot be Q6_K, whose blocks are 256: they are Q8_0."""

PROMPTS = {"2b4t": 128, "smollm2-135m": 512}
BATCHES, CONTEXTS, SHORT = (2, 4, 8, 16, 32), (64, 256, 512, 1000), 64
DECODED, DOTS = 8, 4_000_000
READ_COLUMNS, READ_ROWS = 4096, 1 << 16
"""Of a matrix that is read: 64 MiB at most."""
FORCED = {"avx512": "AVX-512", "avx2": "AVX2"}
PEER_PROMPT, PEER_GOPS = 446, 428e9
"""Tokens a second of the best other engine on SmolLM2's prompt of 512, and the integer peak of the run that measured it."""


def write_model(path: Path, shape: dict[str, Any], rank: int = 0) -> tuple[int, int]:
    """Write a `bitnet` file of random weights, with a low-rank correction a `wrinklefree` one of that family.

    Returns:
        How many bytes a token's products read, and how many ternary weights there are.
    """
    rng = np.random.default_rng(0)
    width, kv = shape["width"], shape["width"] // shape["heads"] * shape["kv"]
    architecture = "wrinklefree" if rank else "bitnet"
    writer = gguf.GGUFWriter(path, architecture)
    if rank:
        writer.add_string("wrinklefree.family", "bitnet")
        writer.add_uint32("wrinklefree.lrc.rank", rank)
    keys = {"context_length": 1024, "embedding_length": width, "block_count": shape["layers"], "feed_forward_length": shape["ffn"]}
    keys |= {"attention.head_count": shape["heads"], "attention.head_count_kv": shape["kv"]}
    for key, value in keys.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    # A vocabulary that nobody reads, without which llama.cpp loads no model.
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"<{token}>" for token in range(shape["vocabulary"])])
    writer.add_token_types([1] * shape["vocabulary"])
    writer.add_token_merges(["< 0"])
    writer.add_eos_token_id(0)
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
            for adapter, features in zip("uv", matrices[name] if rank else (), strict=False):
                numbers = (rng.standard_normal((features, rank), dtype=np.float32) / 100).astype(np.float16)
                writer.add_tensor(f"blk.{layer}.{name}.lrc_{adapter}", numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    weights = shape["layers"] * sum(rows * columns for rows, columns in matrices.values())
    adapters = shape["layers"] * sum(2 * rank * sum(size) for size in matrices.values())
    return weights // 4 + adapters + encoded.nbytes, weights


def ternary(rng: np.random.Generator, rows: int, columns: int) -> tuple[np.ndarray, None, int]:
    """Return what `GGUFWriter.add_tensor` takes of a random matrix: TQ2_0, or Q2_0 where rows are too narrow for it.

    The type is a number, because gguf-py has no name for Q2_0.
    """
    kind = "q2_0" if columns % 256 else "tq2_0"
    codes = rng.integers(-1, 2, (rows, columns), dtype=np.int8)
    return TYPES[kind].encode(codes, np.float16(0.02)), None, TYPES[kind].ggml_id


def to_read(nbytes: int) -> list[TernaryMatrix]:
    """Return matrices of so many bytes together."""
    left, matrices, scale = nbytes * 4 // READ_COLUMNS, [], np.ones(1, np.float32)
    while left > 0:
        matrices.append(TernaryMatrix(np.zeros((min(left, READ_ROWS), READ_COLUMNS), np.int8), scale))
        left -= READ_ROWS
    return matrices


OPENED = """
import sys, time
from pathlib import Path
import bitnet_kernels
def rss():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) * 1024
bitnet_kernels.set_threads(int(sys.argv[2]))
before, wall, own = rss(), time.perf_counter(), time.process_time()
engine = bitnet_kernels.Engine(sys.argv[1], cache="f16")
print(time.perf_counter() - wall, time.process_time() - own, rss() - before)
"""


def opening(file: Path, threads: int) -> list[float]:
    """Open a file in a process of its own; return wall and processor seconds, and the bytes that it then holds more than before."""
    done = subprocess.run([sys.executable, "-c", OPENED, file, str(threads)], capture_output=True, text=True, check=True)
    return [float(value) for value in done.stdout.split()]


class Peer:
    """The same file in llama.cpp."""

    def __init__(self, file: Path, threads: int) -> None:
        """Load it."""
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel = str(file), 1024, 1
        params.fit_params, params.ui, params.verbosity = False, False, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        self._server = xllamacpp.Server(params)

    def seconds(self, prompt: list[int], decoded: int) -> tuple[float, float]:
        """Return the seconds that its timings say a prompt took, and a decoded token."""
        options = {"ignore_eos": True, "cache_prompt": False, "temperature": -1.0}
        answer = self._server.handle_completions({"prompt": prompt, "n_predict": decoded, **options})
        timings = (json.loads(answer) if isinstance(answer, str | bytes) else answer)["timings"]
        return timings["prompt_ms"] / 1e3, timings["predicted_per_token_ms"] / 1e3


class Ours:
    """An engine, and what is timed of it."""

    def __init__(self, file: Path, isa: str, length: int) -> None:
        """Open the file and fill its slots."""
        bitnet_kernels.use_isa(isa)
        self._engine = Engine(file, slots=max(BATCHES) + 2 + len(CONTEXTS), cache="f16")
        self.tokens = np.random.default_rng(1).integers(1, self._engine.vocabulary, max(length, CONTEXTS[-1])).tolist()
        self._length = length
        self._engine.step({0: self.tokens[: CONTEXTS[-1]]}, rows="none")
        for slot in range(1, max(BATCHES) + 1):
            self._engine.copy(0, slot, SHORT)
        self._contexts = {context: max(BATCHES) + 1 + i for i, context in enumerate(CONTEXTS)}
        for context, slot in self._contexts.items():
            self._engine.copy(0, slot, context)

    def prompt(self) -> None:
        """Read the prompt into the last slot and compute the logits behind it."""
        slot = self._engine.slots - 1
        self._engine.truncate(slot, 0)
        self._engine.step({slot: self.tokens[: self._length]})

    def decode(self, context: int = SHORT) -> None:
        """Decode at a context that grows from `context` on."""
        slot = self._contexts[context]
        self._engine.truncate(slot, context)
        for token in range(DECODED):
            self._engine.step({slot: [token]})

    def batch(self, size: int) -> None:
        """Decode as many tokens of each of so many sequences."""
        for slot in range(1, size + 1):
            self._engine.truncate(slot, SHORT)
        for token in range(DECODED):
            self._engine.step({slot: [token] for slot in range(1, size + 1)})


def measure(name: str, file: Path, threads: int, options: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Time one shape on so many threads."""
    nbytes, weights = write_model(file, SHAPES[name], options.rank)
    length, wall = PROMPTS[name], threads > 1
    bitnet_kernels.set_threads(threads)
    best = bitnet_kernels.isa()
    engines = {best: Ours(file, best, length)}
    forced = {} if options.quick else {isa: FORCED[isa] for isa in FORCED if isa != best and isa in bitnet_kernels.available_isas()}
    engines |= {isa: Ours(file, isa, length) for isa in forced}
    bitnet_kernels.use_isa(best)
    ours = engines[best]
    peer = None if options.quick or options.rank else Peer(file, threads)
    reading = [to_read(nbytes // threads) for _ in range(threads)]
    others = ThreadPoolExecutor(threads)

    def on_all(call: Callable[[int], object]) -> Callable[[], object]:
        return lambda: call(0) if threads == 1 else list(others.map(call, range(threads)))

    said: list[tuple[float, float]] = []  # prompt and token, seconds, as llama.cpp says
    walls: dict[str, list[float]] = {"prompt": [], "decode": []}

    def compared(what: str, call: Callable[[], object]) -> None:
        start = perf_counter()
        call()
        walls[what].append(perf_counter() - start)

    contenders: dict[str, Callable[[], object]] = {
        "read": on_all(lambda thread: timing.read_seconds(reading[thread], DECODED)),
        "peak": on_all(lambda _: timing.dot_seconds(DOTS)),
        "prompt": lambda: compared("prompt", ours.prompt),
        "decode": lambda: compared("decode", ours.decode),
    }
    if peer is not None:
        contenders["llama.cpp"] = lambda: said.append(peer.seconds(ours.tokens[:length], DECODED))
    for isa in forced:
        contenders |= {f"prompt {isa}": engines[isa].prompt, f"decode {isa}": engines[isa].decode}
    sizes = (16,) if options.quick or wall else BATCHES
    contenders |= {f"batch {size}": lambda size=size: ours.batch(size) for size in sizes}
    if not options.quick and not wall:
        contenders |= {f"context {context}": lambda context=context: ours.decode(context) for context in CONTEXTS}
    seconds = interleaved(contenders, options.rounds, perf_counter if wall else thread_time)
    # Seconds that reading a token's weights takes, and that the prompt's products take, at the limits of each round.
    read_bytes = sum(matrix.nbytes for matrices in reading for matrix in matrices)
    read = [taken / DECODED * nbytes / read_bytes for taken in seconds["read"]]
    operations = threads * timing.dot_seconds(DOTS)[1]
    peak = [2 * weights * length / (operations / taken) for taken in seconds["peak"]]
    one = [taken / DECODED for taken in seconds["decode"]]
    shares = {"decode": median_ratio(read, one), "prompt": median_ratio(peak, seconds["prompt"])}

    rows: list[dict[str, Any]] = []

    def row(what: str, value: float, unit: str, of_limit: float | None = None, of_peer: float | None = None) -> None:
        line = {"shape": name, "rank": options.rank, "threads": threads, "what": what, "value": round(value, 4), "unit": unit}
        rows.append(line | {"of limit": of_limit and round(of_limit, 4), "times llama.cpp": of_peer and round(of_peer, 3)})

    beside: dict[str, float | None] = {"prompt": None, "decode": None}
    row("limit: reading the weights", 1 / median(read), "tokens/s")
    row("limit: integer products", median(operations / taken for taken in seconds["peak"]) / 1e9, "GOP/s")
    if peer is not None:
        beside = {
            "prompt": median_ratio([said_of[0] for said_of in said], walls["prompt"]),
            "decode": median_ratio([said_of[1] for said_of in said], [taken / DECODED for taken in walls["decode"]]),
        }
        row(f"llama.cpp (AVX2 build), prompt of {length}", length / median(said_of[0] for said_of in said), "tokens/s")
        row("llama.cpp (AVX2 build), decode", 1 / median(said_of[1] for said_of in said), "tokens/s")
    row(f"prompt of {length}", length / median(seconds["prompt"]), "tokens/s", shares["prompt"], beside["prompt"])
    row(f"time to first token, prompt of {length}", median(seconds["prompt"]), "s")
    row("decode", 1 / median(one), "tokens/s", shares["decode"], beside["decode"])
    for isa, label in forced.items():
        taken = seconds[f"prompt {isa}"]
        row(f"{label} forced, prompt of {length}", length / median(taken), "tokens/s", median_ratio(peak, taken))
        taken = [value / DECODED for value in seconds[f"decode {isa}"]]
        row(f"{label} forced, decode", 1 / median(taken), "tokens/s", median_ratio(read, taken))
    for size in sizes:
        row(f"decode, batch of {size}", size * DECODED / median(seconds[f"batch {size}"]), "tokens/s")
    gain = 16 * median_ratio(seconds["decode"], seconds["batch 16"])
    row("batch of 16 over batch of 1", gain, "times")
    for context in () if options.quick or wall else CONTEXTS:
        row(f"decode, context of {context}", DECODED / median(seconds[f"context {context}"]), "tokens/s")
    opened = [opening(file, threads) for _ in range(max(1, options.rounds))]
    row("open, wall", median(taken[0] for taken in opened), "s")
    row("open, processor", median(taken[1] for taken in opened), "s")
    held = median(taken[2] for taken in opened) / file.stat().st_size
    row("memory after opening, of the file's size", held, "times")

    bars = []
    if options.rank:  # they are of files without one
        return rows, bars
    if name == "2b4t":
        bars.append(bar(f"{name}: decode, share of bandwidth, threads {threads}", shares["decode"], ">=", 0.75 if wall else 0.85))
    if name == "2b4t" and not wall:
        bars.append(bar(f"{name}: prompt, share of the integer peak", shares["prompt"], ">=", 0.8))
        bars.append(bar(f"{name}: open, s", median(taken[0] for taken in opened), "<=", 1))
        bars.append(bar(f"{name}: memory after opening, of the file's size", held, "<=", 1.1))
    if name == "smollm2-135m" and not wall:
        bars.append(bar(f"{name}: decode, share of bandwidth", shares["decode"], ">=", 0.65))
        wanted = 1.5 * PEER_PROMPT * median(operations / taken for taken in seconds["peak"]) / PEER_GOPS
        bars.append(bar(f"{name}: prompt of {length}, tokens/s", length / median(seconds["prompt"]), ">=", round(wanted, 1)))
        bars.append(bar(f"{name}: batch of 16 over batch of 1", gain, ">=", 6))
    return rows, bars


def main() -> None:
    """Run the benchmark."""
    arguments = parser(__doc__ or "")
    arguments.set_defaults(threads=2)
    arguments.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="which models")
    arguments.add_argument("--quick", action="store_true", help="one thread, no curves, no other engine")
    arguments.add_argument("--rank", type=int, default=0, help="of a low-rank correction; 0 is none")
    options = arguments.parse_args()
    if options.threads not in (1, 2):
        arguments.error("--threads: the bars are of one thread and of two: 1 or 2 is wanted, and 2 measures both")
    narrowest = min(SHAPES[name]["width"] // SHAPES[name]["heads"] * SHAPES[name]["kv"] for name in options.shapes)
    if not 0 <= options.rank <= narrowest:
        arguments.error(f"--rank: from 0 to {narrowest}, the narrowest matrix's side, is wanted")
    if options.rounds < 1:
        arguments.error("--rounds: at least 1 is wanted")
    rows, bars = [], []
    for name in options.shapes:
        for threads in range(1, 2 if options.quick else options.threads + 1):
            with tempfile.TemporaryDirectory() as folder:
                more_rows, more_bars = measure(name, Path(folder) / f"{name}.gguf", threads, options)
            rows, bars = rows + more_rows, bars + more_bars
    finish(f"decoding, {bitnet_kernels.isa()}", rows, bars, ("bitnet-kernels", "numpy", "xllamacpp"), options.json)


if __name__ == "__main__":
    main()
