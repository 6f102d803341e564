"""What ternary training costs: a step of our BitLinear beside a plain linear layer's and stock transformers' AutoBitLinear's.

uv run python benchmarks/train_step.py --json train_step.json
"""

from collections.abc import Callable

import torch
from bitnet_arch import BitLinear
from report import bar, finish, interleaved, median_ratio, parser
from torch import nn
from transformers.integrations.bitnet import AutoBitLinear

SHAPES = {"tiny ffn": (256, 768, 2048), "SmolLM2-135M ffn": (576, 1536, 1024), "1B-class ffn": (2048, 5632, 256)}
"""Name to (in_features, out_features, tokens)."""


def stepper(layer: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    """Return one forward and backward as training does it: gradients of the weight and of the input."""

    def step() -> None:
        x.grad = None
        layer.zero_grad(set_to_none=True)
        layer(x).square().mean().backward()

    return step


def main() -> None:
    """Run the benchmark."""
    arguments = parser(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(arguments.threads)
    rows, bars = [], []
    for name, (features, out, tokens) in SHAPES.items():
        torch.manual_seed(0)
        x = torch.randn(tokens, features, requires_grad=True)
        plain = nn.Linear(features, out, bias=False)
        stock = AutoBitLinear(features, out, bias=False, online_quant=True)
        contenders = {
            "nn.Linear": stepper(plain, x),
            "bitnet_arch.BitLinear": stepper(BitLinear.from_linear(plain), x),
            "transformers AutoBitLinear": stepper(stock, x),
        }
        seconds = interleaved(contenders, arguments.rounds)
        for contender, times in seconds.items():
            ratio = median_ratio(times, seconds["nn.Linear"])
            rows.append({"shape": name, "layer": contender, "ms (median)": 1e3 * sorted(times)[len(times) // 2], "x plain": ratio})
        ours = seconds["bitnet_arch.BitLinear"]
        bars.append(bar(f"{name}: ours / plain", median_ratio(ours, seconds["nn.Linear"]), "<=", 1.8))
        bars.append(bar(f"{name}: ours / stock", median_ratio(ours, seconds["transformers AutoBitLinear"]), "<=", 1.05))
    finish("forward + backward", rows, bars, ("torch", "transformers", "bitnet-arch"), arguments.json)


if __name__ == "__main__":
    main()
