"""Influence distillation: exact influence of a few landmarks, spread to all examples over cheap embeddings.

Nikdan et al., arXiv 2505.19051. Deviations: only the first-order term is computed (no Hessian-vector products), examples are
ranked by it and not weighted by the quadratic programme, and tangents cover the parameters of the blocks that are run.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp
from torch.nn import functional as F

from data_handler.errors import UserError
from data_handler.influence.gradients import MIB, Examples, Gradients, PerSampleGradients, math_attention
from data_handler.influence.layers import block_list
from data_handler.influence.objectives import causal_mask
from data_handler.influence.projection import make_projector
from data_handler.mixing import permutation
from data_handler.packing import IGNORED

RIDGE = 1e-2
BLOCKS = 4


def landmark_rows(count: int, landmarks: int, seed: int = 0) -> Tensor:
    """Return which examples are landmarks: `landmarks` of `count` at random, sorted, int64 [landmarks].

    Raises:
        UserError: if there are not as many examples.
    """
    if not 1 <= landmarks <= count:
        raise UserError(f"landmarks must be from 1 to the {count} examples, not {landmarks}")
    return torch.from_numpy(permutation(count, "landmarks", seed)[:landmarks].copy()).sort().values


def landmark_scores(train: Gradients, targets: Tensor) -> Tensor:
    """Return p_i = ⟨a ⊙ g_i / ‖a ⊙ g_i‖, v⟩ with v scaled to length 1, [n, t]. Positive = helps.

    Args:
        train: gradients, preconditioned by `AdamMoments.precondition` where the optimiser is Adam.
        targets: mean gradient of each target, float32 [t, d], not preconditioned.
    """
    norms = train.squared_norms().sum(1, keepdim=True).sqrt()
    return train.times(F.normalize(targets, dim=1)) / norms.clamp(min=1e-12)


def jvp_embeddings(
    source: PerSampleGradients,
    examples: Examples,
    *,
    blocks: int = BLOCKS,
    tangents: int = 2,
    dimension: int = 4096,
    seed: int = 0,
    memory_mib: int = 1024,
) -> Tensor:
    """Return how each example's hidden state moves along random directions of the first blocks' parameters.

    Forward mode through the first blocks only, at the last position that has a token to predict: no backward pass, and the rest
    of the model is not run. An example's embedding does not depend on its neighbours in the batch.

    Args:
        source: a Hugging Face decoder.
        examples: `input_ids` and `labels`, int64 [n, T].
        blocks: how many blocks are run; all of a model that has fewer.
        tangents: random directions, whose results are joined.
        dimension: numbers an example after a Rademacher projection; fewer are kept as they are.
        seed: of directions and projection.
        memory_mib: bound on the hidden states and attention scores of a batch, roughly.

    Returns:
        float32 [n, min(dimension, tangents · hidden size)].
    """
    stack, length = block_list(source.model)
    blocks = min(blocks, length)
    prefixes = tuple(f"{stack}.{i}." for i in range(blocks))
    moved = {name: source.state[name] for name, _ in source.model.named_parameters() if name.startswith(prefixes)}
    generator = torch.Generator().manual_seed(seed)
    directions = [{name: torch.randn(p.shape, generator=generator).to(p) for name, p in moved.items()} for _ in range(tangents)]
    device = source.device
    found = []
    with _Stop(source.model.get_submodule(f"{stack}.{blocks - 1}")), math_attention(), torch.no_grad():
        first = examples["input_ids"][:1].to(device)
        # A value and its tangent; what a backward pass would save bounds what a forward one holds.
        each = 2 * source.saved_bytes(lambda parameters: _until(source, parameters, first), moved)
        step = max(1, memory_mib * MIB // max(1, each))
        for start in range(0, len(examples["labels"]), step):
            ids, labels = (examples[key][start : start + step].to(device) for key in ("input_ids", "labels"))
            where = _last_scored(labels)

            def hidden(parameters: dict[str, Tensor], ids: Tensor = ids, where: Tensor = where) -> Tensor:
                return _until(source, parameters, ids)[torch.arange(len(ids), device=device), where]

            found.append(torch.cat([jvp(hidden, (moved,), (direction,))[1].float().cpu() for direction in directions], 1))
    embeddings = torch.cat(found)
    return make_projector("rademacher", embeddings.shape[1], dimension, seed)(embeddings)


def kernel_ridge(embeddings: Tensor, landmarks: Tensor, values: Tensor, ridge: float = RIDGE) -> Tensor:
    """Spread the landmarks' values: p = K_{N,L} (K_{LL} + δI)⁻¹ p_L with an RBF kernel.

    Args:
        embeddings: [n, e].
        landmarks: int64 [l], rows of them.
        values: [l, t].
        ridge: δ as a multiple of K_LL's mean diagonal.

    The kernel's width is the median distance between landmarks; values are centred first, so that an example far from every
    landmark gets their mean (deviation: the paper's formula pulls it to zero, which would rank it by its strangeness).

    Returns:
        float32 [n, t].
    """
    anchors = embeddings[landmarks].double()
    squared = torch.cdist(anchors, anchors).square()
    off = squared[~torch.eye(len(anchors), dtype=torch.bool)]
    width = float(off.median()) if len(off) else 1.0
    width = width if width > 0 else 1.0
    kernel = torch.exp(-squared / (2 * width))
    kernel.diagonal().add_(ridge * float(kernel.diagonal().mean()))
    centre = values.double().mean(0)
    weights = torch.linalg.solve(kernel, values.double() - centre)
    rows = [torch.exp(-torch.cdist(part.double(), anchors).square() / (2 * width)) @ weights for part in embeddings.split(1024)]
    return (torch.cat(rows) + centre).float()


class _Reached(Exception):  # noqa: N818  (no error: it carries a result out of the model)
    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class _Stop:
    """Ends a forward pass after a block, as long as the context lasts."""

    def __init__(self, block: nn.Module) -> None:
        self._block = block

    def __enter__(self) -> None:
        def reached(_: nn.Module, __: Any, output: Any) -> None:
            raise _Reached(output[0] if isinstance(output, tuple) else output)

        self._handle = self._block.register_forward_hook(reached)

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


def _until(source: PerSampleGradients, parameters: dict[str, Tensor], ids: Tensor) -> Tensor:
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    mask = causal_mask(ids.shape[1], ids.device)
    try:
        source.bound(parameters)(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    except _Reached as result:
        return result.hidden
    raise AssertionError("the model ended before its block")


def _last_scored(labels: Tensor) -> Tensor:
    """Return the position before the last label (0 if there is none), int64 [n]."""
    scored = labels != IGNORED
    last = labels.shape[1] - 1 - scored.flip(1).long().argmax(1)
    return torch.where(scored.any(1), last - 1, 0).clamp(min=0)
