"""One estimate from start to end: checkpoints, gradients, scores of every example for every probe group. Positive = helps."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_handler.errors import UserError
from data_handler.influence.datainf import Damping, damping_factor, datainf_scores
from data_handler.influence.distillation import jvp_embeddings, kernel_ridge, landmark_rows, landmark_scores
from data_handler.influence.exact import exact_scores
from data_handler.influence.gradients import Collection, Examples, Gradients, PerSampleGradients, Transform, group_means
from data_handler.influence.layers import select_parameters
from data_handler.influence.less import BETA1, BETA2, AdamMoments, best_subtask, less_scores
from data_handler.influence.objectives import Objective, next_token_loss
from data_handler.influence.projection import ProjectionKind, make_projector
from data_handler.influence.tracin import tracin_scores
from data_handler.influence.warmup import adam_warmup

WARMUP = ("warmup_steps", "warmup_checkpoints", "warmup_learning_rate")
DISTILLATION = ("landmarks", "embedding_blocks", "tangents")
USED: dict[str, tuple[str, ...]] = {
    "tracin": (),
    "less": WARMUP,
    "datainf": ("damping",),
    "exact": ("damping",),
    "distillation": DISTILLATION,
}
"""Each method, and which of the optional settings act on it."""

MANY_CHECKPOINTS = ("tracin", "less")


@dataclass(frozen=True, kw_only=True, slots=True)
class InfluenceConfig:
    """How influence is estimated. A setting that the method would ignore must stay None, and then has the method's default.

    Attributes:
        method: "tracin", "less", "datainf", "distillation" or "exact".
        layers: whose gradients count: patterns over parameter names, or last:N for the last N blocks.
        projection: "hadamard", "rademacher" or "none"; the default is hadamard, and none for exact.
        projection_dimension: numbers that are kept: of all layers together, or of each for datainf and exact. Default 4096.
        memory_mib: bound on one chunk's gradients and activations.
        spill: a folder that holds the training gradients instead of memory.
        damping: datainf, exact: "spectral" (default), "reference" or a multiple of E‖g‖².
        warmup_steps: less: Adam steps before the gradients, where no checkpoint brings moments along. Default 20.
        warmup_checkpoints: less: how many of its states are used. Default 1.
        warmup_learning_rate: less: default 1e-4.
        landmarks: distillation: examples with exact influence. Default: a tenth, at least 32 and at most 4096.
        embedding_blocks: distillation: blocks that are run for the embeddings. Default 4.
        tangents: distillation: random directions. Default 2.
        seed: of projections, landmarks, tangents and the warm-up's order.

    Raises:
        UserError: for a value that cannot be meant, or a setting without effect.
    """

    method: str = "datainf"
    layers: tuple[str, ...] = ("last:2",)
    projection: ProjectionKind | None = None
    projection_dimension: int | None = None
    memory_mib: int = 1024
    spill: str | None = None
    damping: Damping | None = None
    warmup_steps: int | None = None
    warmup_checkpoints: int | None = None
    warmup_learning_rate: float | None = None
    landmarks: int | None = None
    embedding_blocks: int | None = None
    tangents: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in USED:
            raise UserError(f"method must be one of {', '.join(USED)}, not {self.method!r}")
        for name in (*WARMUP, *DISTILLATION, "damping"):
            if getattr(self, name) is not None and name not in USED[self.method]:
                users = [method for method, used in USED.items() if name in used]
                raise UserError(f"{name} has no effect with method={self.method}: leave it out, or use {' or '.join(users)}")
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name == "seed":
                if value < 0:
                    raise UserError(f"seed must be at least 0, not {value}")
            elif isinstance(value, int | float) and not (0 < value < math.inf):
                raise UserError(f"{item.name} must be above 0, not {value}")
        if self.projection_dimension is not None and self.kind == "none":
            raise UserError("projection_dimension has no effect without a projection: leave it out, or set projection")
        make_projector(self.kind, 1, self.dimension)
        if isinstance(self.damping, str) and self.damping not in ("reference", "spectral"):
            raise UserError(f"damping must be reference, spectral or a number above 0, not {self.damping!r}")

    @property
    def kind(self) -> ProjectionKind:
        """The projection, defaults applied."""
        return self.projection or ("none" if self.method == "exact" else "hadamard")

    @property
    def dimension(self) -> int:
        """The projection's dimension, defaults applied."""
        return self.projection_dimension or 4096

    def collection(self, spilled: str | None = None) -> Collection:
        """Return how gradients are collected; `spilled` names the file in the folder `spill`, if there is one."""
        return Collection(
            memory_mib=self.memory_mib,
            projection=self.kind,
            projection_dimension=self.dimension,
            per_layer=self.method in ("datainf", "exact"),
            seed=self.seed,
            spill=Path(self.spill) / spilled if self.spill and spilled else None,
        )


@dataclass(frozen=True)
class Checkpoint:
    """A state of the model to take gradients at.

    Attributes:
        model: in evaluation mode. Checkpoints may come from a generator that loads the next one's weights into the same module.
        rate: the learning rate there; only its share of all of them matters.
        moments: Adam's moments of the selected parameters, if they are known.
    """

    model: nn.Module
    rate: float = 1.0
    moments: AdamMoments | None = None


@dataclass(frozen=True)
class Estimate:
    """What `estimate` found.

    Attributes:
        scores: float32 [n, t], every example's for every probe group. Positive = helps.
        overall: float32 [n]: the mean over probe groups; for LESS the largest, as its paper has it.
        losses: float32 [n], at the last checkpoint.
        variants: further overall scores by name: DataInf's at its other default.
        facts: what a report should say, by name.
    """

    scores: Tensor
    overall: Tensor
    losses: Tensor
    variants: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def estimate(
    checkpoints: Iterable[Checkpoint],
    train: Examples,
    probes: Examples,
    groups: Tensor,
    count: int,
    config: InfluenceConfig,
    objective: Objective = next_token_loss,
) -> Estimate:
    """Score every training example for every probe group.

    Args:
        checkpoints: at least one; only TracIn and LESS take several.
        train: tensors of n examples.
        probes: tensors of m probes.
        groups: each probe's group, int64 [m] in [0, count).
        count: groups.
        config: method and settings.
        objective: an example's loss. Influence distillation also needs a Hugging Face decoder, for its embeddings.

    Raises:
        UserError: for settings that do not fit the model or the data.
    """
    total: Tensor | None = None
    rates, seen, losses = 0.0, 0, torch.empty(0)
    variants: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    for checkpoint in checkpoints:
        seen += 1
        if seen > 1 and config.method not in MANY_CHECKPOINTS:
            raise UserError(f"method={config.method} takes one checkpoint: leave out checkpoints, or use tracin or less")
        work = _Work(checkpoint, train, probes, groups, count, config, objective, seen)
        for scores, rate in METHODS[config.method](work):
            total = scores if total is None else total + scores
            rates += rate
        losses = work.source.losses(train, memory_mib=config.memory_mib)
        variants, facts = work.variants, work.facts
    if total is None:
        raise UserError("there is no checkpoint to take gradients at: give at least one")
    if config.method == "less":
        total = total / rates
    facts["checkpoints"] = seen
    return Estimate(total, _overall(total, config), losses, {k: _overall(v, config) for k, v in variants.items()}, facts)


def _overall(scores: Tensor, config: InfluenceConfig) -> Tensor:
    return best_subtask(scores) if config.method == "less" else scores.mean(1)


class _Work:
    """One checkpoint's part of an estimate."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        train: Examples,
        probes: Examples,
        groups: Tensor,
        count: int,
        config: InfluenceConfig,
        objective: Objective,
        number: int,
    ) -> None:
        self.checkpoint, self.train, self.probes, self.config = checkpoint, train, probes, config
        self.groups, self.count, self.objective, self.number = groups, count, objective, number
        self.source = self.at(None)
        self.variants: dict[str, Tensor] = {}
        self.facts: dict[str, Any] = {"parameters": sum(self.source.sizes), "layers": list(self.source.names)}

    def at(self, parameters: Mapping[str, Tensor] | None) -> PerSampleGradients:
        """Return the source of gradients at the checkpoint, or with other values of its parameters."""
        return PerSampleGradients(self.checkpoint.model, self.objective, self.config.layers, parameters)

    def gradients(self, source: PerSampleGradients, transform: Transform | None = None, suffix: str = "") -> Gradients:
        """Return the training examples' gradients."""
        how = self.config.collection(f"gradients-{self.number}{suffix}.npy")
        found = source.collect(self.train, how, transform=transform, title=f"gradients, checkpoint {self.number}")
        self.facts["kept"] = found.values.shape[1]
        return found

    def probe_gradients(self, source: PerSampleGradients) -> Gradients:
        """Return the probes' gradients, never spilled."""
        return source.collect(self.probes, self.config.collection(), title=f"probes, checkpoint {self.number}")

    def targets(self) -> Tensor:
        """Return each probe group's mean gradient."""
        return group_means(self.probe_gradients(self.source).values, self.groups, self.count)


Scored = Iterable[tuple[Tensor, float]]
"""Scores [n, t], and the rates that are in them."""


def _tracin(work: _Work) -> Scored:
    rate = work.checkpoint.rate
    yield tracin_scores(work.gradients(work.source), work.targets(), rate), rate


def _less(work: _Work) -> Scored:
    config, moments = work.config, work.checkpoint.moments
    if moments is not None:
        given = [name for name in WARMUP if getattr(config, name) is not None]
        if given:
            raise UserError(f"{given[0]} has no effect, since the checkpoint brings Adam's moments: leave it out")
        yield _less_at(work, work.source, moments, work.checkpoint.rate)
        return
    steps = config.warmup_steps or 20
    states = adam_warmup(
        work.source,
        work.train,
        steps=steps,
        checkpoints=config.warmup_checkpoints or 1,
        learning_rate=config.warmup_learning_rate or 1e-4,
        micro_batch=1 if config.memory_mib < 256 else 8,
        seed=config.seed,
    )
    for i, state in enumerate(states):
        yield _less_at(work, work.at(state.parameters), state.moments, work.checkpoint.rate * state.rate, f"-{i + 1}")
    work.facts["warm-up"] = f"{steps} Adam steps of the selected layers"


def _less_at(work: _Work, source: PerSampleGradients, moments: AdamMoments, rate: float, suffix: str = "") -> tuple[Tensor, float]:
    train = work.gradients(source, moments.direction, suffix)
    return less_scores(train, work.probe_gradients(source), work.groups, work.count, rate), rate


def _datainf(work: _Work) -> Scored:
    train, targets = work.gradients(work.source), work.targets()
    chosen = work.config.damping or "spectral"
    for name in ("reference", "spectral"):
        if name != chosen:
            work.variants[name] = datainf_scores(train, targets, name)
    work.facts["damping"] = chosen
    factors = [damping_factor(chosen, layer) for layer in train.layers]
    work.facts["damping as a multiple of E‖g‖²"] = f"{min(factors):.2g} to {max(factors):.2g}"
    yield datainf_scores(train, targets, chosen), 1.0


def _exact(work: _Work) -> Scored:
    chosen = work.config.damping or "spectral"
    work.facts["damping"] = chosen
    yield exact_scores(work.gradients(work.source), work.targets(), chosen), 1.0


def _distillation(work: _Work) -> Scored:
    config, moments = work.config, work.checkpoint.moments
    count = len(next(iter(work.train.values())))
    landmarks = landmark_rows(count, config.landmarks or min(count, 4096, max(32, count // 10)), config.seed)
    chosen = {name: value[landmarks] for name, value in work.train.items()}
    train = work.source.collect(
        chosen,
        config.collection("gradients-landmarks.npy"),
        transform=moments.precondition if moments else None,
        title="landmarks",
    )
    work.facts |= {"kept": train.values.shape[1], "landmarks": len(landmarks), "preconditioned": moments is not None}
    embeddings = jvp_embeddings(
        work.source,
        work.train,
        blocks=config.embedding_blocks or 4,
        tangents=config.tangents or 2,
        seed=config.seed,
        memory_mib=config.memory_mib,
    )
    yield kernel_ridge(embeddings, landmarks, landmark_scores(train, work.targets())), 1.0


METHODS: dict[str, Callable[[_Work], Scored]] = {
    "tracin": _tracin,
    "less": _less,
    "datainf": _datainf,
    "exact": _exact,
    "distillation": _distillation,
}


def joined_moments(
    model: nn.Module,
    layers: tuple[str, ...],
    state: Mapping[str, Mapping[str, Tensor]],
    betas: tuple[float, float] = (BETA1, BETA2),
) -> AdamMoments:
    """Return an optimiser's moments of the selected parameters.

    Args:
        model: the model.
        layers: see `select_parameters`.
        state: by parameter name, what `torch.optim.Adam` keeps: `exp_avg`, `exp_avg_sq`, `step`.
        betas: the optimiser's.

    Raises:
        UserError: if a selected parameter has none.
    """
    names = list(select_parameters(model, layers))
    for name in names:
        if not {"exp_avg", "exp_avg_sq"} <= state.get(name, {}).keys():
            raise UserError(f"the checkpoint has no Adam moments of {name}: choose other layers, or another checkpoint")
    first, second = (torch.cat([state[name][key].flatten().float() for name in names]) for key in ("exp_avg", "exp_avg_sq"))
    return AdamMoments(first, second, *betas, step=int(state[names[0]].get("step", torch.tensor(1))))
