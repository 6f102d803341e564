"""Statistics of results, as pure functions."""

import math
from collections.abc import Sequence
from typing import Any


def ratio_stderr(totals: Sequence[tuple[float, int]]) -> float | None:
    """Return the standard error of sum(x) / sum(n), the documents being the sample (delta method).

    Args:
        totals: (x, n) for each document; at least two, or there is no error to estimate (None).
    """
    count, weight = len(totals), sum(n for _, n in totals)
    if count < 2 or weight == 0:
        return None
    ratio = sum(x for x, _ in totals) / weight
    squares = sum((x - ratio * n) ** 2 for x, n in totals)
    return math.sqrt(squares * count / (count - 1)) / weight


def rate_summary(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return token perplexity and bits per byte, with standard errors, of samples of the perplexity task.

    Args:
        samples: each with `token_perplexity` (log-likelihood in nats, tokens) and `bits_per_byte` (the same, bytes).
    """
    tokens = [sample["token_perplexity"] for sample in samples]
    byte_counts = [sample["bits_per_byte"] for sample in samples]
    nats, token_count, byte_count = -sum(x for x, _ in tokens), sum(n for _, n in tokens), sum(n for _, n in byte_counts)
    perplexity = math.exp(nats / token_count)
    token_error, byte_error = ratio_stderr(tokens), ratio_stderr(byte_counts)
    return {
        "n": len(samples),
        "tokens": token_count,
        "bytes": byte_count,
        "token_perplexity": perplexity,
        "token_perplexity_stderr": None if token_error is None else perplexity * token_error,
        "bits_per_byte": nats / byte_count / math.log(2),
        "bits_per_byte_stderr": None if byte_error is None else byte_error / math.log(2),
    }


def majority_share(labels: Sequence[int]) -> float:
    """Return the accuracy of always answering the commonest label."""
    return max(labels.count(label) for label in set(labels)) / len(labels)
