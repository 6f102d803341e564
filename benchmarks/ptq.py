"""Post-training ternary without gradients on SmolLM2-135M: what each method and granularity costs in held-out loss.

uv run python benchmarks/ptq.py --json ptq.json

Calibration and held-out tokens are those of docs/experiments.md: 4x512 each of Python's documentation topics.
"""

import copy
import math
import pydoc_data.topics
import time
from collections.abc import Callable

import torch
from bitnet_arch import BitLinear, ConversionConfig, convert_model, load_float_model, load_tokenizer, resolve_pretrained
from bitnet_arch.families import quantized_names
from bitnet_arch.ptq.model import quantize_model
from bitnet_arch.quant import GROUP, fake_quant_activation
from report import bar, finish, parser
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
METHODS = (
    ("absmean", "tensor"),
    ("least_squares", "tensor"),
    ("gptq", "tensor"),
    ("gptq_act_order", "tensor"),
    ("absmean", "group128"),
    ("gptq", "row"),
    ("gptq", "group128"),
    ("gptq_act_order", "group128"),
)


class Subject:
    """The float model, its tokens, and what a contender is measured by.

    Attributes:
        note: where the weights come from; part of every title, because a 4-bit copy is not the original.
        calibration: int64 `[4, 512]`.
        heldout: int64 `[4, 512]`.
        original: the float model.
    """

    def __init__(self, name: str = SMOLLM2) -> None:
        source = resolve_pretrained(name)
        topics = pydoc_data.topics.topics
        ids = torch.tensor(load_tokenizer(source.path)("\n".join(topics[key] for key in sorted(topics))).input_ids)
        self.note = source.note
        self.calibration, self.heldout = ids[:2048].view(4, 512), ids[40_000:42_048].view(4, 512)
        self.original = load_float_model(source)
        self.names = quantized_names(self.original)

    def fresh(self) -> PreTrainedModel:
        """Return a copy of the float model."""
        return copy.deepcopy(self.original)

    @torch.no_grad()
    def nll(self, model: PreTrainedModel) -> float:
        """Return the held-out loss in nats a token."""
        logits = model(input_ids=self.heldout, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), self.heldout[:, 1:].flatten()).item()

    @torch.no_grad()
    def layer_error(self, model: PreTrainedModel) -> float:
        """Return the median over layers of ‖y - y'‖² / ‖y‖², both layers fed the float model's held-out inputs."""
        errors: list[float] = []

        def compare(layer: nn.Module) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            return lambda _, inputs, y: errors.append(float((layer.forward(inputs[0]) - y).square().sum() / y.square().sum()))

        hooks = [self.original.get_submodule(name).register_forward_hook(compare(model.get_submodule(name))) for name in self.names]
        self.original(input_ids=self.heldout[:2], use_cache=False)
        for hook in hooks:
            hook.remove()
        return sorted(errors)[len(errors) // 2]

    def row(self, name: str, model: PreTrainedModel, bits: float, stored: float, seconds: float) -> dict[str, object]:
        """Return a contender's line of the table."""
        nll = self.nll(model)
        return {
            "what": name,
            "bits/weight": bits,
            "as stored": stored,
            "layer error": self.layer_error(model),
            "NLL": nll,
            "perplexity": math.exp(nll),
            "seconds": seconds,
        }

    def ternary_bits(self, granularity: str) -> tuple[float, float]:
        """Return bits a weight of codes and float32 scales: with log2(3) a code, and with 2 as packed."""
        weights = scales = 0
        for name in self.names:
            rows, columns = self.original.get_submodule(name).weight.shape  # type: ignore[misc]
            weights += rows * columns
            scales += {"tensor": 1, "row": rows, "group128": rows * -(-columns // GROUP)}[granularity]
        return math.log2(3) + 32 * scales / weights, 2 + 32 * scales / weights


class RoundToNearest(nn.Module):
    """A linear layer with weights rounded to a few bits, one absmax scale for `group` neighbours, and 8-bit activations."""

    def __init__(self, linear: nn.Linear, bits: int, group: int) -> None:
        super().__init__()
        levels = 2 ** (bits - 1) - 1
        parts = []
        for part in linear.weight.detach().split(group, dim=1):
            scale = (part.abs().amax(dim=1, keepdim=True) / levels).half().float().clamp(min=1e-8)
            parts.append((part / scale).round().clamp(-levels - 1, levels) * scale)
        self.weight, self.bias = torch.cat(parts, dim=1), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in]` to `[..., out]`."""
        return F.linear(fake_quant_activation(x), self.weight, self.bias)


def round_to_nearest(subject: Subject, bits: int, group: int) -> tuple[PreTrainedModel, float]:
    """Return the model with every ternary candidate rounded to `bits`, and its bits a weight with float16 scales."""
    model = subject.fresh()
    weights = scales = 0
    for name in subject.names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        assert not isinstance(linear, BitLinear)
        weights += linear.weight.numel()
        scales += linear.out_features * -(-linear.in_features // group)
        model.set_submodule(name, RoundToNearest(linear, bits, group))
    return model, bits + 16 * scales / weights


def main() -> None:
    """Run the benchmark."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--only", nargs="*", metavar="METHOD/GRANULARITY", help="a subset, such as gptq/tensor")
    chosen = arguments.parse_args()
    torch.set_num_threads(chosen.threads)
    subject = Subject()
    rows = [subject.row("float", subject.original, 32.0, 32.0, 0.0)]
    wanted = [pair for pair in METHODS if not chosen.only or "/".join(pair) in chosen.only]
    for method, granularity in track(wanted, "methods", console=Console(stderr=True), transient=True):
        start = time.perf_counter()
        model = convert_model(subject.fresh(), ConversionConfig(norm="none", granularity=granularity))
        model = quantize_model(model, method, None if method == "absmean" else [subject.calibration])
        seconds = time.perf_counter() - start
        rows.append(subject.row(f"{method}/{granularity}", model, *subject.ternary_bits(granularity), seconds))
    found = {str(row["what"]): float(row["NLL"]) for row in rows}  # type: ignore[arg-type]
    bars = []
    if "gptq/tensor" in found and "absmean/tensor" in found:
        bars.append(bar("NLL: gptq / absmean, one scale a matrix", found["gptq/tensor"] / found["absmean/tensor"], "<=", 0.9))
    finish(f"post-training ternary, {subject.note}", rows, bars, ("torch", "transformers", "bitnet-arch"), chosen.json)


if __name__ == "__main__":
    main()
