"""Masked views of a batch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from wrinklefree.diffusion.mask import block_numbers
from wrinklefree.diffusion.noise import mask_probability, row_draws
from wrinklefree.diffusion.settings import DiffusionSettings
from wrinklefree.objective import IGNORED


@dataclass(frozen=True)
class Views:
    """V views (1, or 2 that complement each other) of the B rows of a batch: first all rows of one, then all of the other.

    Attributes:
        input_ids: with masks, int64 `[V B, T]`.
        masked: where a token is masked, and to be predicted, bool `[V B, T]`.
        weights: of a masked token's loss, float32 `[V B, T]`.
        blocks: int64 `[B, T]`, see `block_numbers`.
        count: V.
    """

    input_ids: Tensor
    masked: Tensor
    weights: Tensor
    blocks: Tensor
    count: int


def maskable(labels: Tensor) -> Tensor:
    """Return which tokens of a batch may be masked, bool `[B, T]`: those that have a label, so that prompts stay readable."""
    return labels != IGNORED


def make_views(batch: dict[str, Tensor], settings: DiffusionSettings) -> Views:
    """Mask a batch.

    Noise levels t are uniform, one for every block; each token of a block is masked with probability (1 - ε)·t + ε.

    Args:
        batch: `input_ids`, `labels`, `position_ids`, `document_ids`, int64 `[B, T]`, and `sample_index`, int64 `[B]`.
        settings: how.
    """
    ids = batch["input_ids"]
    blocks = block_numbers(batch["position_ids"], batch["document_ids"], settings.block_size)
    levels, uniform = row_draws(settings.seed, batch["sample_index"], ids.shape[1])
    probability = mask_probability(levels.gather(1, blocks), settings.epsilon)
    allowed = maskable(batch["labels"])
    drawn = uniform < probability
    masks = [drawn & allowed, ~drawn & allowed] if settings.complementary else [drawn & allowed]
    weights = probability.reciprocal() if settings.weighting == "inverse" else torch.ones_like(probability)
    return Views(
        torch.cat([ids.masked_fill(mask, settings.mask_token_id) for mask in masks]),
        torch.cat(masks),
        weights.repeat(len(masks), 1),
        blocks,
        len(masks),
    )
