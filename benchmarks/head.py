"""Heads of 8, 6 and 4 bits: every instruction set's product with float32 activations beside ggml's, which quantises them.

uv run python benchmarks/head.py --json head.json
uv run python benchmarks/head.py --rounds 3 --rows 4096      # a quick look

"read" is a loop that reads ternary matrices of about as many bytes; "share" is a contender's bytes a second as a part of that, the
median over rounds. A matrix is larger than the caches, so that each product reads it from memory. "error" is the largest difference
from a product of the dequantised weights with the unquantised activations, which is what training's head computes, over the largest
result. ggml's build on PyPI knows AVX2 only. One thread, timed by its own clock.

Bar: error at most 1e-5, whatever the type and the instruction set.
"""

from collections.abc import Callable
from statistics import median
from time import thread_time
from typing import Any

import bitnet_kernels
import ggml
import numpy as np
from bitnet_kernels import BLOCK_TYPES, BlockMatrix, timing
from gemv import copies, isas
from report import bar, finish, interleaved, median_ratio, parser

COLUMNS = 2560
"""2B4T's width."""


def measure(kind: str, rows: int, tokens: int, rounds: int) -> tuple[list[dict[str, Any]], float]:
    """Time one type; return a line a contender, and ours' largest error."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((rows, COLUMNS), dtype=np.float32) * np.float32(0.02)
    x = rng.standard_normal((tokens, COLUMNS), dtype=np.float32)
    x[:, 7] *= 50  # trained models' activations have such features
    theirs = ggml.Products(kind.upper(), weights, x, 1, 1)
    head = BlockMatrix(theirs.data(), kind, COLUMNS)
    some = rng.integers(0, rows, 200)
    exact = x.astype(np.float64) @ head.lookup(some).astype(np.float64).T
    _, ternary = copies(rows, COLUMNS, max(1, head.nbytes // (rows * COLUMNS // 4)))
    read = sum(matrix.nbytes for matrix in ternary)
    results: dict[str, Any] = {}

    def product(isa: str) -> None:
        bitnet_kernels.use_isa(isa)
        results[isa] = head.matmul(x)

    contenders: dict[str, Callable[[], object]] = {"read": lambda: timing.read_seconds(ternary)}
    for isa in isas():
        contenders[isa] = lambda isa=isa: product(isa)
    contenders["ggml"] = theirs.run
    seconds = interleaved(contenders, rounds, thread_time)
    results["ggml"] = theirs.result()
    lines = []
    for name, times in seconds.items():
        nbytes = read if name == "read" else head.nbytes
        share = median_ratio(seconds["read"], times) * nbytes / read
        line = {"type": kind, "tokens": tokens, "what": name, "ms": median(times) * 1e3, "GB/s": nbytes / median(times) / 1e9}
        error = float(np.abs(results[name][:, some] - exact).max() / np.abs(exact).max()) if name in results else ""
        lines.append(line | {"share": share, "error": error})
    return lines, max(line["error"] for line in lines if line["what"] in isas())


def main() -> None:
    """Run it."""
    arguments = parser("Products of 8-, 6- and 4-bit matrices with float32 activations, against read bandwidth and ggml.")
    arguments.add_argument("--rows", type=int, default=32768, help="rows of the matrix")
    arguments.add_argument("--tokens", type=int, nargs="+", default=[1, 8])
    args = arguments.parse_args()
    bitnet_kernels.set_threads(1)
    lines, worst = [], 0.0
    for tokens in args.tokens:
        for kind in BLOCK_TYPES:
            more, error = measure(kind, args.rows, tokens, args.rounds)
            lines += more
            worst = max(worst, error)
    bars = [{**bar("largest error", worst, "<=", 1e-5), "value": worst}]
    finish(f"head {args.rows}x{COLUMNS}", lines, bars, ["bitnet-kernels", ggml.PACKAGE, "numpy"], args.json)


if __name__ == "__main__":
    main()
