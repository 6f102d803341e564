"""Products with one token: every instruction set's kernel beside ggml's, held against the bandwidth of reading the same memory.

uv run python benchmarks/gemv.py --json gemv.json
uv run python benchmarks/gemv.py --rounds 5 --megabytes 64      # a quick look

"read" is a loop that does nothing but read the same matrices; "share" is a contender's speed in bytes of its weights a second as a
part of that, the median over rounds that are interleaved. From DRAM, every call takes the next matrices of a set that no cache
holds. In the cache, one matrix is used again and again. Kernels get quantised activations; "product" quantises them itself, as a
model does. ggml's products are nodes of a graph on one thread, and its build on PyPI knows AVX2 only. One thread is timed by its
own clock, which stands while a neighbour has the processor. Two threads: ours are the package's pool, a product after the other;
reading is two threads with a half each. Both go by the wall's clock and need an idle machine.

Bars: 90% of the bandwidth from DRAM and 60% in the second-level cache with one thread, 85% from DRAM with two, and with AVX2
forced, 1.3 times as fast as ggml's TQ2_0.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from statistics import median
from time import thread_time
from typing import Any

import bitnet_kernels
import ggml
import numpy as np
from bitnet_kernels import TernaryMatrix, timing
from report import bar, finish, interleaved, median_ratio, parser

DRAM = (6912, 2560)
"""2B4T's up projection: rows, columns."""

CACHE = ((576, 576), (1536, 576), (576, 1536))
"""SmolLM2-135M's."""

A_CALL = 12
"""Matrices a call, so that it is long enough to be timed from here."""

Rows = list[dict[str, Any]]


def copies(rows: int, columns: int, count: int) -> tuple[np.ndarray, list[TernaryMatrix]]:
    """Return random codes and packed matrices of them, in memory of their own."""
    codes = np.random.default_rng(0).integers(-1, 2, (rows, columns), dtype=np.int8)
    return codes, [TernaryMatrix(codes, np.array([0.02], np.float32)) for _ in range(count)]


def slices(matrices: list[TernaryMatrix], size: int) -> Callable[[], list[TernaryMatrix]]:
    """Return a function that returns the next `size` of the matrices, over and over: whoever asks, nobody finds a warm one."""
    parts = cycle([matrices[i : i + size] for i in range(0, len(matrices) - size + 1, size)])
    return lambda: next(parts)


def table(shape: str, seconds: dict[str, list[float]], nbytes: dict[str, int], products: int, base: str) -> Rows:
    """Return one line a contender: microseconds a product, bytes a second, share of the base's speed."""
    rows = []
    for name, times in seconds.items():
        share = median_ratio(seconds[base], times) * nbytes.get(name, nbytes[base]) / nbytes[base]
        speed = nbytes.get(name, nbytes[base]) * products / median(times) / 1e9
        rows.append({"shape": shape, "what": name, "us": median(times) / products * 1e6, "GB/s": speed, "share": share})
    return rows


def isas() -> list[str]:
    """Return the instruction sets that are worth timing."""
    return [name for name in bitnet_kernels.available_isas() if name != "scalar"]


def from_memory(megabytes: int, rounds: int) -> tuple[Rows, Rows]:
    """Time one thread and two on matrices that lie in memory."""
    rows, columns = DRAM
    count = max(2 * A_CALL, -(-megabytes * 10**6 // (rows * columns // 4)) // A_CALL * A_CALL + A_CALL)
    codes, matrices = copies(rows, columns, count)
    x = np.random.default_rng(1).standard_normal((1, columns), dtype=np.float32)
    some = slices(matrices, A_CALL)
    theirs = ggml.Products("TQ2_0", codes, x, count, count // A_CALL)
    contenders: dict[str, Callable[[], object]] = {"read": lambda: timing.read_seconds(some())}
    for isa in isas():
        contenders[isa] = lambda isa=isa: timing.kernel_seconds(some(), isa, x)
    contenders["product"] = lambda: timing.product_seconds(some(), x)
    contenders["ggml TQ2_0"] = theirs.run
    bitnet_kernels.set_threads(1)
    seconds = interleaved(contenders, rounds, thread_time)
    nbytes = {"read": matrices[0].nbytes, "ggml TQ2_0": theirs.nbytes}
    lines = table(f"{rows}x{columns} DRAM", seconds, nbytes, A_CALL, "read")
    best = bitnet_kernels.isa()
    bars = [bar(f"share of read bandwidth, {best}, DRAM", median_ratio(seconds["read"], seconds[best]), ">=", 0.9)]
    if "avx2" in seconds:
        bars.append(bar("ggml TQ2_0 / avx2, time", median_ratio(seconds["ggml TQ2_0"], seconds["avx2"]), ">=", 1.3))

    half = slices(matrices, count // 2)
    bitnet_kernels.set_threads(2)
    with ThreadPoolExecutor(2) as pool:

        def read() -> None:
            part = half()
            list(pool.map(timing.read_seconds, (part[::2], part[1::2])))

        both = interleaved({"read": read, "product": lambda: timing.product_seconds(half(), x)}, rounds)
    bitnet_kernels.set_threads(1)
    lines += table(f"{rows}x{columns} DRAM, 2 threads", both, nbytes, count // 2, "read")
    bars.append(bar("share of read bandwidth, 2 threads, DRAM", median_ratio(both["read"], both["product"]), ">=", 0.85))
    return lines, bars


def from_cache(rounds: int) -> tuple[Rows, Rows]:
    """Time one thread on one matrix that stays in the second-level cache."""
    lines, bars, best = [], [], bitnet_kernels.isa()
    for rows, columns in CACHE:
        codes, matrices = copies(rows, columns, 1)
        x = np.random.default_rng(1).standard_normal((1, columns), dtype=np.float32)
        repeats = 40_000_000 // codes.size
        contenders: dict[str, Callable[[], object]] = {"read": lambda m=matrices, n=repeats: timing.read_seconds(m, n)}
        for isa in isas():
            contenders[isa] = lambda m=matrices, isa=isa, x=x, n=repeats: timing.kernel_seconds(m, isa, x, n)
        contenders["product"] = lambda m=matrices, x=x, n=repeats: timing.product_seconds(m, x, n)
        seconds = interleaved(contenders, rounds, thread_time)
        lines += table(f"{rows}x{columns} cache", seconds, {"read": matrices[0].nbytes}, repeats, "read")
        share = median_ratio(seconds["read"], seconds[best])
        bars.append(bar(f"share of read bandwidth, {best}, {rows}x{columns} in cache", share, ">=", 0.6))
    return lines, bars


def main() -> None:
    """Run it."""
    arguments = parser("Ternary matrix times vector, against read bandwidth and ggml.")
    arguments.add_argument("--megabytes", type=int, default=540, help="weights that the products from memory rotate over")
    arguments.set_defaults(rounds=61)
    args = arguments.parse_args()
    cache, cache_bars = from_cache(args.rounds)
    memory, memory_bars = from_memory(args.megabytes, args.rounds)
    finish("gemv", memory + cache, memory_bars + cache_bars, ["bitnet-kernels", ggml.PACKAGE, "numpy"], args.json)


if __name__ == "__main__":
    main()
