"""Proxies: small runs of the configured model on its data, one domain beside the other, as mixture methods want them."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from bitnet_arch import UserError, lambda_schedule, set_lambda
from data_handler import DataConfig, PackedStream, collate
from data_handler.mixture import StepResult
from torch import Tensor
from transformers import PreTrainedModel

from wrinklefree.config import RunConfig, TrainingConfig
from wrinklefree.evaluation import INFLUENCE_ROWS, first_order_influence, mean_loss
from wrinklefree.models import build_start
from wrinklefree.module import Batch, model_logits
from wrinklefree.objective import IGNORED, domain_means, domain_sums
from wrinklefree.optim import build_optimizer, parameter_groups
from wrinklefree.schedules import learning_rate_share

Rows = list[Batch]


class DomainRows:
    """The rows of one domain, read once and kept, so that every proxy reads the same ones from the start."""

    def __init__(self, stream: PackedStream) -> None:
        self._rows: Iterator[Batch] = iter(stream.rows())
        self._kept: Rows = []

    def take(self, start: int, count: int) -> Rows:
        """Return rows [start, start + count)."""
        while len(self._kept) < start + count:
            self._kept.append(next(self._rows))
        return self._kept[start : start + count]


class Corpus:
    """The training and held-out rows of every domain.

    Attributes:
        domains: their names.
        train: [K].
        heldout: [K], at most `heldout_tokens` / K tokens each.
        fingerprint: of what decides the training rows, [K].
    """

    def __init__(self, data: DataConfig, tokenizer: Any, seed: int) -> None:
        self.domains = tuple(source.name for source in data.sources)
        self.tokens_per_row = data.sequence_length
        # One source each: a domain's rows must not depend on the others' weights.
        share = max(2, data.heldout_tokens // len(data.sources))
        alone = [replace(data, sources=(replace(s, weight=1.0),), heldout_tokens=share) for s in data.sources]
        streams = [PackedStream(one, tokenizer, seed=seed) for one in alone]
        self.train = [DomainRows(stream) for stream in streams]
        self.heldout = [list(PackedStream(one, tokenizer, split="heldout").rows()) for one in alone]
        self.fingerprint = [stream.fingerprint() for stream in streams]


class LanguageLearner:
    """A language model as a `data_handler.mixture.Learner`.

    Attributes:
        domains: the corpus's.
        trained_tokens: positions trained on, padding included.
        measured_tokens: positions measured.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        corpus: Corpus,
        training: TrainingConfig,
        *,
        target: Sequence[float],
        quantized: bool = False,
        reference: "LanguageLearner | None" = None,
    ) -> None:
        """Prepare a run of `training.max_steps` steps; the model is trained in place.

        Args:
            model: with `BitLinear` layers.
            corpus: rows by domain.
            training: rates, schedules and seed.
            target: [K], weights of the domains in the probes of `influence`.
            quantized: whether lambda follows its schedule or stays 0.
            reference: what the excess loss is measured against.
        """
        self.model, self.corpus, self.training, self.quantized = model.train(), corpus, training, quantized
        self.domains, self.reference, self.target = corpus.domains, reference, target
        self.trained_tokens = self.measured_tokens = 0
        self.optimizer = build_optimizer(parameter_groups(model, training), training)
        self._done, self._next = 0, [0] * len(corpus.domains)
        set_lambda(model, self._lambda())

    def step(self, rows: Sequence[int], token_weights: Sequence[float] | None, *, excess: bool) -> StepResult:
        """Take one optimiser step (`Learner.step`)."""
        parts = [source.take(start, n) for source, start, n in zip(self.corpus.train, self._next, rows, strict=True)]
        self._next = [start + n for start, n in zip(self._next, rows, strict=True)]
        batch = collate([row for part in parts for row in part])
        owner = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(rows))
        training = self.training
        set_lambda(self.model, self._lambda())
        share = learning_rate_share(training.schedule, self._done, training.max_steps, training.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = training.learning_rate * share * group["rate_share"]
        losses, counts = token_losses(self.model, batch)
        weights = torch.ones(len(owner)) if token_weights is None else torch.tensor(token_weights, dtype=torch.float32)[owner]
        loss = (losses.sum(dim=1) * weights).sum() / (counts * weights).sum()
        if not torch.isfinite(loss):
            raise UserError(
                f"the loss is not finite at step {self._done + 1}: lower training.learning_rate ({training.learning_rate:g})"
            )
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), training.grad_clip or float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._done += 1
        self.trained_tokens += batch["input_ids"].numel()
        return StepResult(
            losses=_by_domain(losses.detach(), counts, owner, len(rows)),
            tokens=[int(counts[owner == k].sum()) for k in range(len(rows))],
            excess=self._excess(batch, losses.detach(), counts, owner) if excess else None,
        )

    def validate(self) -> list[float]:
        """Return the mean held-out loss of each domain, in the model's current lambda, nats a token."""
        return [self._mean_loss(rows) for rows in self.corpus.heldout]

    def influence(self) -> list[list[float]]:
        """Return <training gradient of a domain, held-out gradient of a target domain>, first order as TracIn has it, [K][P]."""
        read_next = zip(self.corpus.train, self._next, strict=True)
        train = [source.take(start, INFLUENCE_ROWS) for source, start in read_next]
        probes = [rows for rows, t in zip(self.corpus.heldout, self.target, strict=True) if t]
        self._count([*train, *probes])
        return first_order_influence(self.model, train, probes)

    def _lambda(self) -> float:
        training = self.training
        return lambda_schedule(training.lambda_schedule, self._done, training.lambda_warmup_steps) if self.quantized else 0.0

    @torch.no_grad()
    def _excess(self, batch: Batch, losses: Tensor, counts: Tensor, owner: Tensor) -> list[float]:
        if self.reference is None:
            raise ValueError("the excess loss needs a reference")
        known, _ = token_losses(self.reference.model, batch)
        self.measured_tokens += batch["input_ids"].numel()
        return _by_domain((losses - known).clamp(min=0), counts, owner, len(self.domains))

    def _mean_loss(self, rows: Rows) -> float:
        self._count([rows])
        return mean_loss(self.model, rows)

    def _count(self, groups: Sequence[Rows]) -> None:
        self.measured_tokens += sum(len(rows) for rows in groups) * self.corpus.tokens_per_row


def token_losses(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of every position, float32 [B, T - 1] (0 where none is scored), and how many are, int64 [B]."""
    targets = batch["labels"][:, 1:]
    logits = model_logits(model, batch)[:, :-1].float()
    losses = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
    return losses, (targets != IGNORED).sum(dim=1)


def _by_domain(losses: Tensor, counts: Tensor, owner: Tensor, domains: int) -> list[float]:
    return domain_means(domain_sums(losses.sum(dim=1), owner, domains), domain_sums(counts, owner, domains))


class LearnerFactory:
    """Makes proxies of a configuration: the same weights and rows for each."""

    def __init__(self, config: RunConfig, *, target: Sequence[float], quantized: bool) -> None:
        start = build_start(config)
        self.config, self.target, self.quantized = config, target, quantized
        self.corpus = Corpus(config.data, start.tokenizer, config.training.seed)
        self._model, self._weights = start.model, {k: v.clone() for k, v in start.model.state_dict().items()}

    def __call__(self, seed: int, *, reference: LanguageLearner | None = None) -> LanguageLearner:
        """Return a learner; a reference keeps its own model. All start from the configuration's weights, whatever the seed."""
        model = copy.deepcopy(self._model)
        model.load_state_dict(self._weights)
        return LanguageLearner(
            model, self.corpus, self.config.training, target=self.target, quantized=self.quantized, reference=reference
        )
