"""Random numbers of a row, a function of the seed and the row's place in the data alone.

Neither the number of processes nor how a step is cut into micro-batches changes what is masked in a row.
"""

import numpy as np
import torch
from torch import Tensor


def row_draws(seed: int, sample_index: Tensor, length: int, streams: int = 2) -> Tensor:
    """Return uniform numbers in [0, 1) for rows.

    Args:
        seed: not negative.
        sample_index: int64 `[B]`, each row's place in the data.
        length: T.
        streams: S, how many independent numbers a position needs.

    Returns:
        float32 `[S, B, T]`, on the device of `sample_index`. A row's numbers depend on seed, index, T and S only.
    """
    rows = [np.random.default_rng([seed, index]).random((streams, length), dtype=np.float32) for index in sample_index.tolist()]
    return torch.from_numpy(np.stack(rows, axis=1)).to(sample_index.device)


def mask_probability(levels: Tensor, epsilon: float) -> Tensor:
    """Return p = (1 - ε)·t + ε for noise levels t in [0, 1): the linear schedule of LLaDA, of the same shape."""
    return (1 - epsilon) * levels + epsilon
