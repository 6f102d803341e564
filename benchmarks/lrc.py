"""Low-rank correction of ternary weights on SmolLM2-135M: held-out loss against total bits, beside plain rounding to 4 bits.

uv run python benchmarks/lrc.py --json lrc.json
uv run python benchmarks/lrc.py --ranks 16 64 --dtypes int8      # a part of it; a rank takes three to five minutes

Bits are those of codes (log2(3), or 2 as packed), float32 scales and adapters, over the weights of the decoder's linear layers.
"""

import time

import torch
from bitnet_arch.lrc.adapters import adapter_bits, layer_rank
from bitnet_arch.lrc.model import LRCConfig, add_lrc
from bitnet_arch.ptq.model import quantize_model
from ptq import Subject, round_to_nearest
from report import bar, finish, parser
from rich.console import Console
from rich.progress import track

BASELINES = ((4, 64), (4, 128), (3, 64), (2, 64))
"""Bits and group of plain rounding."""


def correction_bits(subject: Subject, rank: int, dtype: str) -> float:
    """Return what adapters of a rank cost in bits a weight, over all layers."""
    bits = weights = 0.0
    for name in subject.names:
        rows, columns = subject.original.get_submodule(name).weight.shape  # type: ignore[misc]
        weights += rows * columns
        bits += rows * columns * adapter_bits(layer_rank(rank, columns, rows), columns, rows, dtype)  # type: ignore[arg-type]
    return bits / weights


def main() -> None:
    """Run the benchmark."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--ranks", nargs="*", type=int, default=[16, 32, 64, 128, 192], help="ranks to solve for")
    arguments.add_argument("--dtypes", nargs="*", default=["float16", "int8"], help="what adapters are stored in")
    arguments.add_argument("--quantizer", default="gptq", help="what rounds the ternary weights")
    arguments.add_argument("--steps", type=int, default=1, help="alternations")
    chosen = arguments.parse_args()
    torch.set_num_threads(chosen.threads)
    subject = Subject()
    rows = [subject.row("float", subject.original, 32.0, 32.0, 0.0)]
    for bits, group in BASELINES:
        start = time.perf_counter()
        model, total = round_to_nearest(subject, bits, group)
        rows.append(subject.row(f"{bits}-bit rounding, group {group}", model, total, total, time.perf_counter() - start))
    start = time.perf_counter()
    rows_of_tokens = None if chosen.quantizer == "absmean" else [subject.calibration]
    model = quantize_model(subject.fresh(), chosen.quantizer, rows_of_tokens)
    code, stored = subject.ternary_bits("tensor")
    rows.append(subject.row(f"ternary, {chosen.quantizer}", model, code, stored, time.perf_counter() - start))
    for rank in track(chosen.ranks, "ranks", console=Console(stderr=True), transient=True):
        for dtype in chosen.dtypes:
            start = time.perf_counter()
            config = LRCConfig(rank=rank, dtype=dtype, quantizer=chosen.quantizer, steps=chosen.steps)
            model = add_lrc(subject.fresh(), [subject.calibration], config)
            seconds, more = time.perf_counter() - start, correction_bits(subject, rank, dtype)
            rows.append(subject.row(f"LRC, rank {rank}, {dtype}", model, code + more, stored + more, seconds))
    bars = []
    four = next(row for row in rows if row["what"] == "4-bit rounding, group 64")
    beaten = [row for row in rows if str(row["what"]).startswith("LRC") and row["bits/weight"] <= four["bits/weight"]]  # type: ignore[operator]
    if beaten:
        best = min(float(row["NLL"]) for row in beaten)  # type: ignore[arg-type]
        bars.append(
            bar("NLL: best LRC of at most the bits of 4-bit rounding / 4-bit rounding", best / float(four["NLL"]), "<=", 1.0)
        )  # type: ignore[arg-type]
    finish(f"low-rank correction, {subject.note}", rows, bars, ("torch", "transformers", "bitnet-arch"), chosen.json)


if __name__ == "__main__":
    main()
