"""SubLN calibration: how to insert a norm into a pretrained model without destroying it.

An RMSNorm before `o_proj` and `down_proj` (norm placement B, BitNet b1.58 2B4T) drops each token's magnitude. With gain 1 a
pretrained model is destroyed. Two numbers a norm, measured on a few calibration tokens, keep most of it:

* the gain, so that the median token passes unchanged;
* a *softening*: `x · rsqrt(mean(x²) + ε) · g` is nearly linear while mean(x²) is far below ε, and a norm where it is far above.
  Stock architectures share one tiny ε among all norms. Scaling a norm's input by c is the same as dividing ε by c², and
  `v_proj` and `up_proj` can absorb c: the layers are ternary up to a scale, so their codes do not change at all. Where c would
  have to be extremely small (the sites that carry massive activations), the residual stream is scaled up by a power of two a
  and the shared ε by a², which changes nothing else: embeddings times a, final norm (tied head) divided by a.

Figures are in docs/experiments.md.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bitnet_arch.quant import EPS

MIN_MEAN_WEIGHT = 16 * EPS
"""A producer's mean |W| is never scaled below this: the absmean scale is clamped at 1e-5, and f16 has its subnormals below 6e-5."""

MAX_RESIDUAL_SCALE_LOG2 = 6
"""The residual stream is scaled by at most 2^6, so that half-precision embeddings keep their range."""


@dataclass(frozen=True)
class NormSite:
    """One place where SubLN goes.

    Attributes:
        producer: the linear layer whose output scales the norm's input (`v_proj`, `up_proj`).
        norm: the inserted norm's name.
        consumer: the linear layer behind the norm (`o_proj`, `down_proj`).
    """

    producer: str
    norm: str
    consumer: str


@dataclass(frozen=True)
class InputStatistics:
    """What calibration measured of a layer's input, over tokens: median and maximum of its mean square."""

    median: float
    maximum: float


@dataclass(frozen=True)
class NormStatistics:
    """What calibration measured at one site, over tokens.

    Attributes:
        median: median of the mean square of the norm's future input.
        maximum: its largest value.
        producer_weight: mean |W| of the producer.
    """

    median: float
    maximum: float
    producer_weight: float


@dataclass(frozen=True)
class NormInsertion:
    """How to insert one norm.

    Attributes:
        gain: the norm's initial weight, the same for every channel.
        input_scale: factor (at most 1) to multiply the producer's weight by.
    """

    gain: float = 1.0
    input_scale: float = 1.0


@dataclass
class _MeanSquareRecorder:
    values: list[Tensor] = field(default_factory=list)

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.values.append(inputs[0].detach().float().pow(2).mean(dim=-1).flatten())


@torch.no_grad()
def measure_inputs(model: nn.Module, layers: Iterable[str], calibration: Iterable[Tensor]) -> dict[str, InputStatistics]:
    """Measure what goes into layers of the unmodified model.

    Args:
        model: the float model before conversion, in evaluation mode.
        layers: dotted names.
        calibration: token ids, each int64 `[batch, time]`; a few thousand tokens suffice.

    Returns:
        Layer name to statistics.
    """
    with recording(model, layers) as found:
        for ids in calibration:
            model(input_ids=ids, use_cache=False)
    return found


@contextmanager
def recording(model: nn.Module, layers: Iterable[str]) -> Iterator[dict[str, InputStatistics]]:
    """Record what goes into layers while the model runs.

    Args:
        model: the model, or a part of it.
        layers: dotted names in it.

    Yields:
        Layer name to statistics over all tokens seen, filled in when the block ends.
    """
    recorders = {name: _MeanSquareRecorder() for name in layers}
    handles = [model.get_submodule(name).register_forward_pre_hook(recorder) for name, recorder in recorders.items()]
    found: dict[str, InputStatistics] = {}
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    for name, recorder in recorders.items():
        mean_square = torch.cat(recorder.values)
        found[name] = InputStatistics(float(mean_square.median()), float(mean_square.max()))


def soften(statistics: InputStatistics, norm_eps: float, softness: float) -> tuple[float, float]:
    """Decide gain and epsilon of a norm that has an epsilon of its own.

    Args:
        statistics: of the layer's input.
        norm_eps: smallest epsilon.
        softness: epsilon as a multiple of the largest mean square seen; 0 gives a plain norm.

    Returns:
        `(gain, eps)`: the median token passes unchanged.
    """
    eps = max(softness * statistics.maximum, norm_eps)
    return math.sqrt(statistics.median + eps), eps


def plan_insertions(
    statistics: dict[str, NormStatistics], norm_eps: float, softness: float
) -> tuple[dict[str, NormInsertion], float]:
    """Decide gains and scales.

    Args:
        statistics: by norm name.
        norm_eps: the model's ε.
        softness: the effective ε as a multiple of the largest mean square seen at a site; 0 gives plain norms.

    Returns:
        Norm name to insertion, and the residual scale a (a power of two, at least 1): the converted model's ε is
        `norm_eps · a²`.
    """
    targets = {name: max(softness * s.maximum, norm_eps) for name, s in statistics.items()}
    wanted = [
        MIN_MEAN_WEIGHT / max(s.producer_weight, EPS) / math.sqrt(norm_eps / targets[name])
        for name, s in statistics.items()
        if targets[name] > norm_eps
    ]
    residual_scale = 2.0 ** min(math.ceil(math.log2(max([1.0, *wanted]))), MAX_RESIDUAL_SCALE_LOG2)
    eps = norm_eps * residual_scale**2
    insertions = {}
    for name, s in statistics.items():
        floor = MIN_MEAN_WEIGHT / max(s.producer_weight, EPS)
        scale = 1.0 if targets[name] <= eps else min(1.0, max(math.sqrt(eps / targets[name]), floor))
        insertions[name] = NormInsertion(residual_scale * math.sqrt(s.median + eps / scale**2), scale)
    return insertions, residual_scale
