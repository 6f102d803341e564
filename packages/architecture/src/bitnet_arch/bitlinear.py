"""`BitLinear`: a linear layer that is ternary in its forward pass and float in its parameters; `BitLinearLRC`: with adapters.

The quantisation strength lambda is a buffer of each layer: it travels with the model through `state_dict`, `deepcopy`,
DDP and checkpoints, and no process-wide switch exists.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitnet_arch.errors import UserError
from bitnet_arch.hadamard import rotate
from bitnet_arch.kept import KeptWeight, keepable
from bitnet_arch.lrc.adapters import AdapterDtype, check_adapters, correction, random_adapters
from bitnet_arch.norm import SubLN
from bitnet_arch.quant import Granularity, _straight_through, fake_quant_activation, fake_quant_weight

LAMBDA_KEY = "quant_lambda"
"""Name of the strength buffer in a layer's state dict; model directories never contain it."""


class BitLinear(nn.Linear):
    """Linear layer with ternary weights and 8-bit activations, quantised on the fly.

    Computes `F.linear(x + λ·(Qa(x) - x), W + λ·(Qw(W) - W), bias)`: Qw is the absmean ternary quantiser, Qa the per-token absmax
    int8 quantiser, and both differences are constants to the gradient (straight-through). λ = 1 is BitNet b1.58, λ = 0 is
    `nn.Linear`; values between are the warm-up of HF1BitLLM. A norm and a rotation of the input come before all that, whatever λ.

    Attributes:
        weight: float master weight `[out_features, in_features]`; of a rotated layer, in the rotated basis.
        quant_lambda: 0-dim float32 buffer, the quantisation strength; set it with `set_lambda`.
        granularity: how many weights share a scale.
        in_norm: RMSNorm of the input, or None.
        rotation: whether the input is rotated by `bitnet_arch.hadamard.rotate` before it is quantised.
    """

    quant_lambda: Tensor
    in_norm: SubLN | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        granularity: Granularity = "tensor",
        in_norm: SubLN | None = None,
        rotation: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.granularity: Granularity = granularity
        self.in_norm = in_norm
        self.rotation = rotation
        self.register_buffer(LAMBDA_KEY, torch.ones((), device=device))
        self._strength = 1.0
        self._kept: KeptWeight | None = None  # while `constant_weights` is open

    def __getstate__(self) -> dict[str, Any]:
        """Return what is copied and pickled: without what `constant_weights` keeps."""
        return self.__dict__ | {"_kept": None}

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        granularity: Granularity = "tensor",
        in_norm: SubLN | None = None,
        rotation: bool = False,
    ) -> "BitLinear":
        """Wrap an `nn.Linear`: the parameters are shared, not copied; a weight for a rotated layer must be rotated already."""
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            device="meta",
            granularity=granularity,
            in_norm=in_norm,
            rotation=rotation,
        )
        layer.weight = linear.weight
        layer.bias = linear.bias
        layer.quant_lambda = torch.ones((), device=linear.weight.device)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in_features]` to `[..., out_features]` in x's dtype."""
        return self.product(self.prepare(x), self.weight)

    def prepare(self, x: Tensor) -> Tensor:
        """Return what the activation quantiser rounds: the input after its norm and rotation, if the layer has any."""
        if self.in_norm is not None:
            x = self.in_norm(x)
        return rotate(x) if self.rotation else x

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Multiply a prepared input by a master weight, both quantised as far as λ says."""
        if self._strength == 0.0:
            return F.linear(x, weight, self.bias)
        xq, wq = fake_quant_activation(x), self._fake_quant(weight)
        if self._strength != 1.0:
            xq, wq = torch.lerp(x, xq, self._strength), torch.lerp(weight, wq, self._strength)
        return F.linear(xq, wq, self.bias)

    def _fake_quant(self, weight: Tensor) -> Tensor:
        """Quantise the layer's weight, which may come detached; see `constant_weights` for when that happens once only."""
        # What is compiled computes everything anew: guards on pointers and versions would compile it anew, too.
        if torch.compiler.is_compiling() or self._kept is None or not keepable(self.weight):
            return fake_quant_weight(weight, self.granularity)
        if torch.is_grad_enabled() and weight.requires_grad:
            return _straight_through(weight, self._kept.get(self.weight, self.granularity, weight.dtype))
        dtype, device = weight.dtype, weight.device.type
        if self._strength == 1.0 and dtype == torch.float32 and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)  # what F.linear would round it to, in every call
        return self._kept.get(self.weight, self.granularity, dtype)

    def set_strength(self, value: float) -> None:
        """Set λ to a value in [0, 1]."""
        self.quant_lambda.fill_(value)
        self._strength = float(value)

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.quant_lambda.is_meta:
            # The forward branches on a Python float: reading the buffer there would synchronise a GPU in every layer.
            self._strength = float(self.quant_lambda)


class BitLinearLRC(BitLinear):
    """A `BitLinear` with a low-rank correction: `y = Ŵ Qa(x) + U Vᵀ x` (LRC, Scetbon & Hensman, arXiv 2412.07902).

    The correction reads the input *before* it is quantised, and after the layer's norm and rotation: there the float weight and
    its covariances live, too, so that one solver serves every form of layer. It is part of what λ fades in: λ = 0 stays
    `nn.Linear`.

    The base is frozen: only the adapters (and the bias) get gradients, unless `train_base` is set. Adapters are float parameters
    that are rounded in the forward pass to what storing them keeps, straight through for the gradient.

    Attributes:
        lrc_u: U, `[out_features, rank]`.
        lrc_v: V, `[in_features, rank]`.
        lrc_dtype: what the adapters are stored in.
        train_base: whether the master weight gets its gradient.
    """

    lrc_u: nn.Parameter
    lrc_v: nn.Parameter

    def __init__(self, base: BitLinear, u: Tensor, v: Tensor, lrc_dtype: AdapterDtype = "float16") -> None:
        """Take over a layer's parameters and norm, which are shared, and add adapters.

        Args:
            base: the layer to correct.
            u: U, `[out_features, rank]`, floating point.
            v: V, `[in_features, rank]`, floating point.
            lrc_dtype: "float16" or "int8".

        Raises:
            UserError: for adapters that do not fit, or U = V = 0, which no training could move.
        """
        check_adapters(u, v, base.in_features, base.out_features)
        super().__init__(
            base.in_features,
            base.out_features,
            base.bias is not None,
            device="meta",
            granularity=base.granularity,
            in_norm=base.in_norm,
            rotation=base.rotation,
        )
        self.weight, self.bias = base.weight, base.bias
        self.quant_lambda, self._strength = base.quant_lambda, base._strength
        self.lrc_u, self.lrc_v = nn.Parameter(u.contiguous()), nn.Parameter(v.contiguous())
        self.lrc_dtype: AdapterDtype = lrc_dtype
        self.train_base = False
        self.train(base.training)

    @classmethod
    def random(cls, base: BitLinear, rank: int, lrc_dtype: AdapterDtype = "float16") -> "BitLinearLRC":
        """Add adapters that change nothing yet: U = 0, V ~ N(0, 1 / in). Training them starts with U alone."""
        weight = base.weight
        return cls(base, *random_adapters(rank, base.in_features, base.out_features, weight.device, weight.dtype), lrc_dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in_features]` to `[..., out_features]` in x's dtype."""
        x = self.prepare(x)
        y = self.product(x, self.weight if self.train_base else self.weight.detach())
        if self._strength == 0.0:
            return y
        return y + self._strength * correction(x, self.lrc_u, self.lrc_v, self.lrc_dtype)


def bitlinear_layers(model: nn.Module) -> Iterator[tuple[str, BitLinear]]:
    """Yield `(name, layer)` of every `BitLinear` in `model`."""
    for name, module in model.named_modules():
        if isinstance(module, BitLinear):
            yield name, module


@contextmanager
def constant_weights(model: nn.Module) -> Iterator[None]:
    """Quantise each weight once while the context is open: for generation, evaluation, and the micro-batches of one step.

    Without it every forward quantises anew, because torch does not count every change of a weight: old optimisers and the merging
    of adapters (`weight.data += delta`) leave version and address as they were, and a layer that trusted these would go on with
    weights that are gone, silently. With it the caller vouches for that, and is checked:

    * in-place operations, `load_state_dict`, `.to()` and assignments (`p.data = q`) are noticed, and the weight is quantised anew;
    * writes through `.data` are found when the context is left, by quantising once more.

    Results are bit for bit what they are without, gradients too. It takes the memory of one more copy of each weight (two under
    autocast). Layers whose weight is sharded (FSDP) or swapped (`torch.func`), and everything that is compiled, quantise as ever.
    A context inside another one's has no effect of its own.

    Args:
        model: the model as a whole, wrappers included.

    Raises:
        UserError: on leaving, if a weight was written to through `.data` and the outputs since then are wrong.
    """
    layers = {} if _is_sharded(model) else {n: m for n, m in bitlinear_layers(model) if m._kept is None and keepable(m.weight)}
    for layer in layers.values():
        layer._kept = KeptWeight()
    try:
        yield
        for name, layer in layers.items():
            if layer._kept is not None and keepable(layer.weight) and layer._kept.stale(layer.weight, layer.granularity):
                raise UserError(
                    f"{name}.weight was changed through .data (or another way that torch does not count) while constant_weights "
                    "was open, and what was computed since then is wrong: change weights outside of it"
                )
    finally:
        for layer in layers.values():
            layer._kept = None


def _is_sharded(model: nn.Module) -> bool:
    """Whether FSDP gathers weights into memory whose contents change without any sign."""
    names = {kind.__name__ for module in model.modules() for kind in type(module).__mro__}
    return bool(names & {"FSDPModule", "FullyShardedDataParallel"})


def set_lambda(model: nn.Module, value: float) -> None:
    """Set the quantisation strength of every `BitLinear` in `model`.

    Raises:
        UserError: if `value` is not in [0, 1].
    """
    if not 0.0 <= value <= 1.0:
        raise UserError(f"lambda must lie in [0, 1], not {value}")
    for _, layer in bitlinear_layers(model):
        layer.set_strength(value)


def get_lambda(model: nn.Module) -> float:
    """Return the smallest quantisation strength among the model's `BitLinear` layers (1.0 if it has none).

    Of a layer whose buffer was changed around `set_lambda`, both the buffer and what the forward uses count.
    """
    return min((min(float(layer.quant_lambda), layer._strength) for _, layer in bitlinear_layers(model)), default=1.0)


def _sigmoid(progress: float) -> float:
    steepness = 10.0
    low, high = _logistic(-0.5 * steepness), _logistic(0.5 * steepness)
    return (_logistic(steepness * (progress - 0.5)) - low) / (high - low)


def _logistic(z: float) -> float:
    return 1.0 / (1.0 + math.exp(-z))


LAMBDA_SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: progress,
    "cosine": lambda progress: 0.5 * (1.0 - math.cos(math.pi * progress)),
    "sigmoid": _sigmoid,
}
"""Maps warm-up progress in [0, 1] to λ. The sigmoid is rescaled to start at 0 and end at 1 exactly, and is less steep
(k = 10) than HF1BitLLM's (k = 100), which is a step in all but name."""


def lambda_schedule(kind: str, step: int, warmup_steps: int) -> float:
    """Return λ at `step` of a warm-up that ends after `warmup_steps` steps.

    Args:
        kind: "constant" (always 1), "linear", "cosine" or "sigmoid".
        step: optimiser steps taken so far.
        warmup_steps: length of the warm-up; 0 means λ = 1 from the start.

    Raises:
        UserError: for an unknown kind.
    """
    if kind not in LAMBDA_SCHEDULES:
        raise UserError(f"unknown lambda schedule {kind!r}: choose one of {', '.join(LAMBDA_SCHEDULES)}")
    if warmup_steps <= 0 or step >= warmup_steps:
        return 1.0
    return LAMBDA_SCHEDULES[kind](max(step, 0) / warmup_steps)
