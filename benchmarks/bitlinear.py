"""What a ternary layer costs in torch: ours in each of its forms beside a textbook layer's and stock transformers' AutoBitLinear's.

uv run python benchmarks/bitlinear.py --json bitlinear.json
uv run python benchmarks/bitlinear.py --shapes "SmolLM2-135M up" --tokens 1 --dtypes float32      # a part of it

"plain" is `F.linear` with a float weight, which no layer that multiplies floats can beat: its GFLOP/s and GB/s are the roofline,
and "x plain" is how far from it a layer is. "kept" is inside `bitnet_arch.bitlinear.constant_weights`, where a weight is quantised
once: the round that is not counted does that. The stock layer compiles its quantisers (torch.compile), the textbook layer is eager.
Bars: what one trains with (forward + backward) and what one runs (forward), each not slower than either.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from bitnet_arch import BitLinear, PackedBitLinear
from bitnet_arch.bitlinear import constant_weights
from report import bar, finish, interleaved, median_ratio, parser
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.bitnet import AutoBitLinear

SHAPES = {
    "SmolLM2-135M q": (576, 576),
    "SmolLM2-135M up": (576, 1536),
    "SmolLM2-135M down": (1536, 576),
    "Llama 1B q": (2048, 2048),
    "Llama 1B up": (2048, 8192),
    "Llama 1B down": (8192, 2048),
}
"""Name to (in_features, out_features)."""

TOLERANCE = 1.05
"""What counts as not slower: interleaved ratios on a shared machine move by a few per cent."""


class Textbook(nn.Linear):
    """BitNet b1.58 as its training tips have it: weight and activations quantised in every call, straight-through."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in_features]` to `[..., out_features]`."""
        w = self.weight
        scale = 1.0 / w.abs().mean().clamp(min=1e-5)
        wq = (w * scale).round().clamp(-1, 1) / scale
        activation_scale = 127.0 / x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5)
        xq = (x * activation_scale).round().clamp(-128, 127) / activation_scale
        return F.linear(x + (xq - x).detach(), w + (wq - w).detach(), self.bias)


def layers(features: int, out: int) -> dict[str, nn.Module]:
    """Return the contenders, which share one weight where they have a float one."""
    torch.manual_seed(0)
    plain = nn.Linear(features, out, bias=False)
    textbook, stock = Textbook(features, out, bias=False), AutoBitLinear(features, out, bias=False, online_quant=True)
    textbook.weight = stock.weight = plain.weight
    ours = BitLinear.from_linear(plain)
    return {
        "plain": plain,
        "textbook": textbook,
        "stock": stock,
        "ours": ours,
        "ours, kept": BitLinear.from_linear(plain),
        "ours, packed": PackedBitLinear.from_bitlinear(ours),
    }


def runner(layer: nn.Module, x: Tensor, dtype: torch.dtype, calls: int, backward: bool) -> Callable[[], None]:
    """Return what is timed: `calls` forwards without gradients, or forwards and backwards to weight and input."""

    def autocast() -> Any:
        return nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype)

    def forward() -> None:
        with torch.no_grad(), autocast():
            for _ in range(calls):
                layer(x)

    def both() -> None:
        for _ in range(calls):
            x.grad = None
            layer.zero_grad(set_to_none=True)
            with autocast():
                y = layer(x)
            y.float().square().mean().backward()

    return both if backward else forward


def measure(shape: str, tokens: int, dtype: torch.dtype, backward: bool, rounds: int) -> tuple[list[dict[str, Any]], list[Any]]:
    """Time the contenders on one case; return its rows and bars."""
    features, out = SHAPES[shape]
    found = layers(features, out)
    if backward:
        del found["ours, packed"]  # its weight has no gradient
    x = torch.randn(tokens, features, requires_grad=backward)
    flop = 2 * features * out * tokens * (3 if backward else 1)
    calls = max(1, round(2e8 / (flop + 40 * features * out)))
    contenders = {name: runner(layer, x, dtype, calls, backward) for name, layer in found.items()}
    with constant_weights(found["ours, kept"]):
        seconds = interleaved(contenders, rounds)
    what = "forward + backward" if backward else "forward"
    name = f"{shape}, {tokens} tokens, {str(dtype).removeprefix('torch.')}, {what}"
    compared = ("ours", "ours, kept") if backward else ("ours, kept", "ours, packed")  # what one trains with, and what one runs
    rows = []
    for contender, times in seconds.items():
        median = sorted(times)[len(times) // 2] / calls
        row = {"case": name, "layer": contender, "ms": 1e3 * median}
        for other in ("plain", "textbook", "stock"):
            row[f"x {other}"] = median_ratio(times, seconds[other])
        row["GFLOP/s"] = flop / median / 1e9
        row["weight GB/s"] = 4 * features * out / median / 1e9
        rows.append(row)
    ratios = {(a, b): median_ratio(seconds[a], seconds[b]) for a in compared for b in ("textbook", "stock")}
    return rows, [bar(f"{name}: {a} / {b}", ratio, "<=", TOLERANCE) for (a, b), ratio in ratios.items()]


def main() -> None:
    """Run the benchmark."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES), help="layers")
    options.add_argument("--tokens", nargs="+", type=int, default=[1, 512], help="rows of the input")
    dtypes = ["float32", "bfloat16"]
    options.add_argument("--dtypes", nargs="+", choices=dtypes, default=dtypes, help="autocast to")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    rows, bars = [], []
    for shape in arguments.shapes:
        for tokens in arguments.tokens:
            for dtype in arguments.dtypes:
                for backward in (False, True):
                    more = measure(shape, tokens, getattr(torch, dtype), backward, arguments.rounds)
                    rows += more[0]
                    bars += more[1]
    finish("ternary layers", rows, bars, ("torch", "transformers", "bitnet-arch"), arguments.json)


if __name__ == "__main__":
    main()
