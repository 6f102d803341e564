"""Low-rank correction of ternary weights on SmolLM2-135M: held-out loss against total bits, beside other ways to spend them.

The others are plain rounding to 4, 3 and 2 bits, and salient columns: instead of adapters, as many bits go into the input columns
that matter most, which stay in float16 (`--salient` leaves the adapters out).

uv run python benchmarks/lrc.py --json lrc.json
uv run python benchmarks/lrc.py --ranks 16 64 --dtypes int8      # a part of it; a rank takes three to five minutes

Bits are those of codes (log2(3), or 2 as packed), float32 scales and adapters, over the weights of the decoder's linear layers.
"""

import math
import time

import torch
from bitnet_arch import set_lambda
from bitnet_arch.lrc.adapters import adapter_bits, layer_rank
from bitnet_arch.lrc.covariance import Block, run_blocks
from bitnet_arch.lrc.model import LRCConfig, add_lrc
from bitnet_arch.ptq.model import as_converted, quantize_model
from bitnet_arch.ptq.quantizers import dequantize, gptq
from bitnet_arch.quant import fake_quant_activation
from ptq import Subject, round_to_nearest
from report import bar, finish, parser
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

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


class SalientColumns(nn.Module):
    """A ternary layer of which some input columns are float16, and read the input unquantised.

    With S the columns kept, Q the others and H the covariance of the inputs, the best W_S for given Ŵ_Q is
    `W_S + (W_Q - Ŵ_Q) H_QS H_SS⁻¹`; Ŵ_Q is therefore rounded in the metric `H_QQ - H_QS H_SS⁻¹ H_SQ` that this leaves.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, hessian: Tensor, share: float) -> None:
        super().__init__()
        count = max(1, round(share * weight.shape[1]))
        importance = hessian.diagonal() * weight.double().square().sum(dim=0)
        self.kept = importance.argsort(descending=True)[:count].sort().values
        rest = torch.ones(weight.shape[1], dtype=torch.bool)
        rest[self.kept] = False
        self.rest, self.bias = rest.nonzero().flatten(), bias
        across = torch.linalg.solve(hessian[self.kept][:, self.kept], hessian[self.kept][:, self.rest])
        metric = hessian[self.rest][:, self.rest] - hessian[self.rest][:, self.kept] @ across
        other = weight[:, self.rest].double()
        ternary = dequantize(*gptq(other, (metric + metric.T) / 2, "tensor"))
        self.ternary = ternary.float()
        self.exact = (weight[:, self.kept].double() + (other - ternary) @ across.T).half().float()

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in]` to `[..., out]`."""
        return F.linear(x[..., self.kept], self.exact, self.bias) + F.linear(fake_quant_activation(x[..., self.rest]), self.ternary)


@torch.no_grad()
def salient(subject: Subject, share: float) -> PreTrainedModel:
    """Return the model with a share of every layer's columns in float16, block by block."""
    model = as_converted(subject.fresh())

    def visit(block: Block) -> None:
        set_lambda(block.module, 0.0)
        names = [name for name in subject.names if name.startswith(block.prefix)]
        for name, found in block.hessians(names, 0.01).items():
            layer = model.get_submodule(name)
            model.set_submodule(name, SalientColumns(layer.weight, layer.bias, found.syy, share))  # type: ignore[arg-type]

    run_blocks(model, [subject.calibration], visit)
    return model


def main() -> None:
    """Run the benchmark."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--ranks", nargs="*", type=int, default=[16, 32, 64, 128, 192], help="ranks to solve for")
    arguments.add_argument("--dtypes", nargs="*", default=["float16", "int8"], help="what adapters are stored in")
    arguments.add_argument("--quantizer", default="gptq", help="what rounds the ternary weights")
    arguments.add_argument("--salient", action="store_true", help="no adapters, only salient columns of as many bits")
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
        start, more = time.perf_counter(), correction_bits(subject, rank, "float16")
        share = more / (16 - math.log2(3))
        model = salient(subject, share)
        name = f"{share:.1%} salient columns, as rank {rank}"
        rows.append(subject.row(name, model, code + more, stored + more, time.perf_counter() - start))
        for dtype in () if chosen.salient else chosen.dtypes:
            start = time.perf_counter()
            config = LRCConfig(rank=rank, dtype=dtype, quantizer=chosen.quantizer, steps=chosen.steps)
            model = add_lrc(subject.fresh(), [subject.calibration], config)
            seconds, more = time.perf_counter() - start, correction_bits(subject, rank, dtype)
            rows.append(subject.row(f"LRC, rank {rank}, {dtype}", model, code + more, stored + more, seconds))
    bars = []
    nll = {str(row["what"]): float(row["NLL"]) for row in rows}  # type: ignore[arg-type]
    corrected = [value for name, value in nll.items() if name.startswith("LRC")]
    if corrected:
        bars.append(bar("NLL: best LRC / ternary alone", min(corrected) / nll[f"ternary, {chosen.quantizer}"], "<=", 0.7))
    finish(f"low-rank correction, {subject.note}", rows, bars, ("torch", "transformers", "bitnet-arch"), chosen.json)


if __name__ == "__main__":
    main()
