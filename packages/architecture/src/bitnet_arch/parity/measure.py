"""Comparisons of next-token distributions as pure functions."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LogProbs = NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """How far distributions q are from p over some positions.

    Attributes:
        positions: how many.
        mean_kl: mean of KL(p || q), in nats; rounding can make it slightly negative.
        max_kl: its largest value.
        top1: share of positions with the same most likely token.
        flip_margin: largest gap, in nats, between p's two most likely tokens where the most likely tokens differ; 0 if none do.
        perplexity_ratio: q's perplexity of the text divided by p's.
        perplexity_error: standard error of the ratio's logarithm: how far chance moves it on so few positions.
    """

    positions: int
    mean_kl: float
    max_kl: float
    top1: float
    flip_margin: float
    perplexity_ratio: float
    perplexity_error: float

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return asdict(self)


def compare(p: LogProbs, q: LogProbs, targets: NDArray[np.int64]) -> NDArray[np.float64]:
    """Compare two sets of distributions position by position.

    Args:
        p: log-probabilities `[positions, vocabulary]`.
        q: likewise.
        targets: the tokens that follow, `[positions]`.

    Returns:
        `[positions, 5]`: KL(p || q), whether the most likely tokens agree, p's top-2 margin, and the negative log-likelihoods of
        the targets under p and q. `summarize` makes a `Comparison` of one or more of these.
    """
    rows = np.arange(len(targets))
    kl = (np.exp(p) * (p - q)).sum(axis=-1)
    top = np.partition(p, -2, axis=-1)[:, -2:]
    agree = p.argmax(axis=-1) == q.argmax(axis=-1)
    return np.stack([kl, agree.astype(np.float64), top[:, 1] - top[:, 0], -p[rows, targets], -q[rows, targets]], axis=1)


def summarize(parts: Iterable[NDArray[np.float64]]) -> Comparison:
    """Summarise what `compare` returned for one or more windows."""
    rows = np.concatenate(list(parts))
    kl, agree, margin, nll_p, nll_q = rows.T
    flipped = agree == 0
    return Comparison(
        positions=len(rows),
        mean_kl=float(kl.mean()),
        max_kl=float(kl.max()),
        top1=float(agree.mean()),
        flip_margin=float(margin[flipped].max()) if flipped.any() else 0.0,
        perplexity_ratio=float(np.exp(nll_q.mean() - nll_p.mean())),
        perplexity_error=float((nll_q - nll_p).std() / np.sqrt(len(rows))),
    )
