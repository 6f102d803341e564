"""From scores to a table of examples and one of domains."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import torch
from torch import Tensor

from data_handler.errors import UserError
from data_handler.influence.estimate import Estimate
from data_handler.influence.examples import ExampleSet


@dataclass(frozen=True)
class DomainScore:
    """A domain's influence.

    Attributes:
        name: the domain.
        examples: how many were scored.
        mean: their mean score.
        error: the mean's standard error; 0 for one example.
        positive: share of them with a score above 0.
        groups: mean score for each probe group.
        loss: their mean loss.
    """

    name: str
    examples: int
    mean: float
    error: float
    positive: float
    groups: tuple[float, ...]
    loss: float


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Return Spearman's correlation of two vectors: Pearson's of their ranks, ties sharing the mean one; nan for a constant."""
    ranks = []
    for values in (a, b):
        _, inverse, counts = values.double().flatten().unique(return_inverse=True, return_counts=True)
        ranks.append((counts.cumsum(0) - (counts - 1) / 2)[inverse])
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def domain_scores(found: Estimate, domain: Tensor, names: Sequence[str]) -> list[DomainScore]:
    """Return the domains with their scores, best first.

    Args:
        found: the estimate of n examples.
        domain: each example's, int64 [n].
        names: by index.
    """
    domains = []
    for index, name in enumerate(names):
        rows = domain == index
        scores = found.overall[rows]
        if not len(scores):
            continue
        error = float(scores.std() / len(scores) ** 0.5) if len(scores) > 1 else 0.0
        domains.append(
            DomainScore(
                name=name,
                examples=len(scores),
                mean=float(scores.mean()),
                error=error,
                positive=float((scores > 0).float().mean()),
                groups=tuple(found.scores[rows].mean(0).tolist()),
                loss=float(found.losses[rows].mean()),
            )
        )
    return sorted(domains, key=lambda domain: domain.mean, reverse=True)


def write_table(path: Path, found: Estimate, examples: ExampleSet, probes: Sequence[str]) -> None:
    """Write every example as a row of a Parquet file, best first: rank, domain, document, tokens, loss, scores, text.

    `score` is the overall score and `score:PROBE` that of a probe group; `score@reference` is another variant's. The file gets
    its name when complete.

    Raises:
        UserError: if it cannot be written.
    """
    order = torch.argsort(found.overall, descending=True, stable=True)
    pick = order.tolist()
    columns: dict[str, Any] = {
        "rank": list(range(1, len(pick) + 1)),
        "domain": [examples.names[examples.group[i]] for i in pick],
        "document": [examples.document[i] for i in pick],
        "tokens": examples.tokens()[order].numpy(),
        "loss": found.losses[order].numpy(),
        "score": found.overall[order].numpy(),
    }
    columns |= {f"score@{name}": scores[order].numpy() for name, scores in found.variants.items()}
    if len(probes) > 1:
        columns |= {f"score:{name}": found.scores[order, i].numpy() for i, name in enumerate(probes)}
    columns["text"] = [examples.texts[i] for i in pick]
    temporary = path.with_name(f".{path.name}.partial")
    try:
        pq.write_table(pa.table(columns), temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"writing {path} failed ({error.strerror or error}): free some space or choose another output") from None
    finally:
        temporary.unlink(missing_ok=True)
