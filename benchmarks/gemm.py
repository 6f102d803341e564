"""Products with many tokens: every instruction set's kernel beside ggml's, held against the peak of the integer dot product.

uv run python benchmarks/gemm.py --json gemm.json
uv run python benchmarks/gemm.py --rounds 5 --tokens 8 128 --megabytes 64      # a quick look

The peak is what `vpdpbusd` of the widest registers reaches in chains that do not wait for each other, measured in the same
rounds; "share" is a contender's operations a second as a part of it, the median over rounds. On a processor with tiles (AMX)
their peak, and kernels that use them, are shares above 1 of the same. Every call takes the next matrix of a set that no cache
holds. Kernels get quantised activations; ggml's products are nodes of a graph on one thread, and its build on PyPI knows AVX2
only. The thread is timed by its own clock, which stands while a neighbour has the processor.

Bar: 80% of the peak with 128 tokens and one thread.
"""

from collections.abc import Callable
from statistics import median
from time import thread_time
from typing import Any

import bitnet_kernels
import ggml
import numpy as np
from bitnet_kernels import timing
from gemv import DRAM, copies, isas, slices
from report import bar, finish, interleaved, parser

DOTS = 4_000_000
"""Instructions a round of the peak: about half a millisecond."""

TILES = 100_000
"""The same of tiles."""

BAR_TOKENS = 128


def measure(tokens: int, megabytes: int, rounds: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Time one number of tokens."""
    rows, columns = DRAM
    count = max(2, -(-megabytes * 10**6 // (rows * columns // 4)))
    codes, matrices = copies(rows, columns, count)
    x = np.random.default_rng(1).standard_normal((tokens, columns), dtype=np.float32)
    one = slices(matrices, 1)
    theirs = ggml.Products("TQ2_0", codes, x, count, count)
    contenders: dict[str, Callable[[], object]] = {"peak": lambda: timing.dot_seconds(DOTS)}
    tiles = timing.tile_seconds(TILES)[1]
    if tiles:
        contenders["peak of tiles"] = lambda: timing.tile_seconds(TILES)
    for isa in isas():
        contenders[isa] = lambda isa=isa: timing.kernel_seconds(one(), isa, x)
    contenders["ggml TQ2_0"] = theirs.run
    seconds = interleaved(contenders, rounds, thread_time)
    product = 2 * rows * columns * tokens
    operations = dict.fromkeys(seconds, product) | {"peak": timing.dot_seconds(DOTS)[1], "peak of tiles": tiles}
    lines, shares = [], {}
    for name, times in seconds.items():
        speeds = [operations[name] / taken for taken in times]
        peaks = [operations["peak"] / taken for taken in seconds["peak"]]
        shares[name] = median(speed / peak for speed, peak in zip(speeds, peaks, strict=True))
        each = median(times) / (1 if name.startswith("peak") else tokens) * 1e6
        lines.append({"tokens": tokens, "what": name, "us a token": each, "GOP/s": median(speeds) / 1e9, "share": shares[name]})
    if tokens != BAR_TOKENS:
        return lines, []
    # The best set, and, where that is tiles, the one whose instruction the peak is.
    best = [name for name in ("avx512", bitnet_kernels.isa()) if name in shares]
    return lines, [bar(f"share of peak, {isa}, {tokens} tokens", shares[isa], ">=", 0.8) for isa in dict.fromkeys(best)]


def main() -> None:
    """Run it."""
    arguments = parser("Ternary matrix times many tokens, against the integer peak and ggml.")
    arguments.add_argument("--megabytes", type=int, default=540, help="weights that the products rotate over")
    arguments.add_argument("--tokens", type=int, nargs="+", default=[2, 4, 8, 16, 32, BAR_TOKENS, 512])
    arguments.set_defaults(rounds=15)
    args = arguments.parse_args()
    if timing.dot_seconds(1)[1] == 0:
        raise SystemExit(
            "this processor has no integer dot product that the benchmark knows: there is no peak to hold a product against"
        )
    lines, bars = [], []
    for tokens in args.tokens:
        more = measure(tokens, args.megabytes, args.rounds)
        lines += more[0]
        bars += more[1]
    finish(f"gemm {DRAM[0]}x{DRAM[1]}", lines, bars, ["bitnet-kernels", ggml.PACKAGE, "numpy"], args.json)


if __name__ == "__main__":
    main()
