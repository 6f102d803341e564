"""What an estimate of influence leaves for people: a short Markdown report and a plot, beside the Parquet file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from data_handler.influence import (
    DomainScore,
    Estimate,
    ExampleSet,
    InfluenceConfig,
    domain_scores,
    rank_correlation,
    write_table,
)

SHOWN = 10
TEXT = 90


def write_report(
    folder: Path, found: Estimate, train: ExampleSet, probes: Sequence[str], how: InfluenceConfig, settings: Mapping[str, Any]
) -> None:
    """Write `influence.parquet`, `influence.png` and `report.md` into a folder.

    Args:
        folder: an existing one.
        found: the estimate.
        train: the examples.
        probes: names of the probe groups.
        how: method and settings.
        settings: what else the report should say, by name.
    """
    domains = domain_scores(found, train.group, train.names)
    write_table(folder / "influence.parquet", found, train, probes)
    plot_domains(folder / "influence.png", domains, found, train, how.method)
    (folder / "report.md").write_text(report(found, train, domains, probes, how, settings), encoding="utf-8")


def report(
    found: Estimate,
    train: ExampleSet,
    domains: Sequence[DomainScore],
    probes: Sequence[str],
    how: InfluenceConfig,
    settings: Mapping[str, Any],
) -> str:
    """Return the Markdown text."""
    facts = {**settings, "method": how.method, **found.facts}
    layers = facts.pop("layers", [])
    facts["layers"] = f"{len(layers)} parameters named {', '.join(how.layers)}"
    facts["projection"] = how.kind if facts.get("kept") != facts.get("parameters") else "none"
    lines = [
        "# Influence",
        "",
        "Positive = training on it helps the probes. Scores are estimates: docs/influence.md says how good.",
        "",
    ]
    lines += [f"* {name}: {_shown(value)}" for name, value in facts.items() if value not in (None, [], "")]
    lines.append(f"* rank correlation of the scores with the loss: {rank_correlation(found.overall, found.losses):.2f}")
    for name, variant in found.variants.items():
        lines.append(f"* rank correlation with damping={name}: {rank_correlation(found.overall, variant):.2f}")
    several = list(probes) if len(probes) > 1 else []
    lines += ["", "## Domains", "", _row(["domain", "examples", "mean score", "standard error", "positive", "loss", *several])]
    lines.append(_row(["---"] * (6 + len(several))))
    for domain in domains:
        groups = [f"{value:.3g}" for value in domain.groups] if several else []
        scores = [f"{domain.mean:.3g}", f"{domain.error:.2g}", f"{domain.positive:.0%}", f"{domain.loss:.2f}"]
        lines.append(_row([domain.name, str(domain.examples), *scores, *groups]))
    lines += ["", "![scores by domain](influence.png)", "", "## Examples", ""]
    order = torch.argsort(found.overall, descending=True, stable=True).tolist()
    shown = min(SHOWN, len(order) // 2)
    for title, rows in (("most helpful", order[:shown]), ("least helpful", order[::-1][:shown])):
        lines += [f"### {title}", "", _row(["score", "domain", "document", "loss", "text"]), _row(["---"] * 5)]
        for i in rows:
            text = train.texts[i][:TEXT].replace("|", "\\|").replace("`", "'")
            place = [train.names[train.group[i]], str(train.document[i]), f"{float(found.losses[i]):.2f}"]
            lines.append(_row([f"{float(found.overall[i]):.3g}", *place, f"`{text}`"]))
        lines.append("")
    return "\n".join(lines)


def plot_domains(out: Path, domains: Sequence[DomainScore], found: Estimate, train: ExampleSet, method: str) -> None:
    """Draw every domain's scores as a box, and its mean with the standard error."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 1.2 + 0.5 * len(domains)))
    names = list(train.names)
    scores = [found.overall[train.group == names.index(domain.name)].numpy() for domain in domains]
    places = list(range(len(domains), 0, -1))
    axes.boxplot(scores, positions=places, orientation="horizontal", widths=0.5, showfliers=False, whis=(5, 95))
    means, errors = [domain.mean for domain in domains], [domain.error for domain in domains]
    axes.errorbar(means, places, xerr=errors, fmt="o", color="tab:orange", capsize=4, label="mean, standard error")
    axes.set_yticks(places, [domain.name for domain in domains])
    axes.axvline(0, color="grey", lw=1)
    axes.set(xlabel=f"{method} score (positive = helps; box: quartiles, whiskers: 5 to 95%)")
    axes.legend(loc="best")
    figure.savefig(out, dpi=120, bbox_inches="tight")
    plt.close(figure)


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
