"""A whole run: its groups, and what they must not be together."""

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any

from bitnet_arch.diffusion import DiffusionForm
from data_handler import DataConfig

from wrinklefree.config.distributed import DistributedConfig
from wrinklefree.config.mixture import MixtureConfig
from wrinklefree.config.model import ModelConfig
from wrinklefree.config.training import TrainingConfig
from wrinklefree.curriculum import CurriculumConfig, ever_above_zero, fitted, phase_steps, point_at
from wrinklefree.mapping import require
from wrinklefree.objectives import LogitsDivergence, ObjectiveSettings, parse_objectives
from wrinklefree.objectives.diffusion import MaskedDiffusion
from wrinklefree.objectives.settings import AUTO, diffusion_form, reference_of
from wrinklefree.objectives.tokens import CrossEntropy
from wrinklefree.teachers.settings import TeacherConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """A whole run.

    Attributes:
        objectives: what is minimised: name to a weight, a kind and its options, see `wrinklefree.objectives`.
        teacher: what objectives compare with, where they compare.
        curriculum: how weights, rate, lambda and sources move in phases.
        mixture: how the shares of the data's sources move; not at all by default.
        output_dir: the run directory.
        resume: "auto" continues from the newest checkpoint in `output_dir`, "none" refuses to, a path names a checkpoint.
        sample_prompt: the text that the trained model continues at the end.
    """

    model: ModelConfig
    training: TrainingConfig
    data: DataConfig
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    objectives: dict[str, Any] = field(default_factory=lambda: {"ce": {"weight": 1.0}})
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    output_dir: str
    resume: str = "auto"
    sample_prompt: str = "The "

    def __post_init__(self) -> None:
        require(bool(self.output_dir.strip()), "output_dir is empty: name a folder")
        shape, length = self.model.shape, self.data.sequence_length
        require(
            shape is None or length <= shape.max_position_embeddings,
            f"data.sequence_length={length} is longer than the model's context (model.shape.max_position_embeddings): change one",
        )
        require(bool(self.sample_prompt), "sample_prompt is empty, and a model continues at least one character: give some")
        rows, processes = self.training.rows_per_step, self.distributed.devices
        require(rows % processes == 0, f"training.rows_per_step={rows} must be a multiple of the {processes} processes")
        self.mixture.check(self.data, self.training.max_steps)
        self._check_objectives()
        self._check_curriculum()

    def _check_objectives(self) -> None:
        settings = self.objective_settings()
        taught = any(item.objective.uses_teacher for item in settings.values())
        require(
            self.mixture.method == "none" or reference_of(settings) is not None,
            f"mixture.method={self.mixture.method} looks at the cross-entropy of the sources: give objectives.ce a weight",
        )
        require(
            not self.teacher.compiled or not any(i.objective.uses_teacher and i.objective.way != "rows" for i in settings.values()),
            "teacher.compiled serves distributions alone, and an objective asks for the teacher's layers: leave it out",
        )
        for name, item in settings.items():
            require(
                item.weight != AUTO or reference_of(settings) is not None,
                f"objectives.{name}.weight=auto matches its gradient to that of the cross-entropy, whose factor the curriculum "
                "never raises above 0: raise it in a phase, or give a number",
            )
            block = getattr(item.objective, "block_size", None)
            require(
                block is None or block <= self.data.sequence_length,
                f"objectives.{name}.block_size={block} is longer than a row (data.sequence_length={self.data.sequence_length}), "
                "which would be one block: lower it, or take method mdlm, which has none",
            )
        self._check_tops(settings)
        self._check_teacher(taught)
        require(
            not self.teacher.offload or not any(i.objective.way == "own" and i.objective.uses_teacher for i in settings.values()),
            "teacher.offload serves one forward pass a batch, and an objective runs the teacher more often: leave it out",
        )
        require(
            self.diffusion is None or not self.training.compare_fp,
            "training.compare_fp compares likelihoods, and a diffusion model's is known only up to a bound: set it to false",
        )
        lrc = self.model.lrc is not None
        require(
            not lrc or self.training.trainable == "all",
            "training.trainable has no effect with model.lrc, of which the adapters alone are trained: leave it out",
        )
        require(
            not lrc or all(phase.lambda_value in (None, 1.0) for phase in self.curriculum.phases),
            "model.lrc freezes weights that are ternary, and lambda stays 1: leave lambda_value out of the curriculum",
        )

    def _check_teacher(self, taught: bool) -> None:
        """Refuse settings of a teacher that there is not; those beside an objective of weight 0 wait for it."""
        waits = any(item.get("weight") == 0 for item in self.objectives.values())
        require(
            self.teacher.made_steps is None or self.makes_original or (waits and self.model.shape is not None),
            "teacher.made_steps has no effect where no model is made on the spot, which takes random weights (model.shape) and an "
            "objective with a teacher: leave it out",
        )
        for item in fields(TeacherConfig):
            require(
                taught or waits or item.name == "made_steps" or getattr(self.teacher, item.name) == item.default,
                f"teacher.{item.name} has no effect: none of the objectives compares with a teacher (logits, relations, "
                "layerwise and tcs do)",
            )

    def _check_tops(self, settings: dict[str, ObjectiveSettings]) -> None:
        """Refuse objectives that a teacher cannot serve that is known by its likeliest tokens alone."""
        if not self.teacher.tops_only:
            return
        remote = self.teacher.kind != "local"
        what = f"teacher.kind={self.teacher.kind}" if remote else "teacher.cache_dir"
        for name, item in settings.items():
            if not item.objective.uses_teacher:
                continue
            objective = item.objective
            require(
                isinstance(objective, LogitsDivergence) and objective.top_k is not None,
                f"{what} knows the teacher's likeliest tokens alone: objectives.{name} must be of kind logits, with a top_k",
            )
            assert isinstance(objective, LogitsDivergence)
            require(
                not remote or objective.temperature == 1.0,
                f"{what} gives probabilities at temperature 1: set objectives.{name}.temperature=1",
            )
            require(
                not remote or objective.scope == "scored",
                f"{what} says nothing of what follows a document's last token: set objectives.{name}.scope=scored",
            )
        require(
            len({objective.temperature for objective in _divergences(settings)}) < 2,
            f"{what} keeps distributions at one temperature: give all objectives of kind logits the same",
        )

    def tops(self) -> tuple[int, float] | None:
        """Return how many of a teacher's likeliest tokens are needed, and at which temperature; None if whole distributions are."""
        found = _divergences(self.objective_settings()) if self.teacher.tops_only else []
        return (max(o.top_k or 0 for o in found), found[0].temperature) if found else None

    def _check_curriculum(self) -> None:
        total = self.curriculum_total
        names = [source.name for source in self.data.sources]
        begin, steps, count = 0.0, self.training.max_steps, len(self.curriculum.phases)
        require(
            count <= steps,
            f"curriculum.phases has {count} phases, and the run {steps} step{'s' * (steps > 1)}: each takes at least one, so leave "
            "phases out, or raise training.max_steps",
        )
        for i, phase in enumerate(self.curriculum.phases):
            where = f"curriculum.phases.{i}"
            for name in phase.objectives:
                require(
                    name in self.objectives,
                    f"{where}.objectives names {name!r}, and the objectives are {', '.join(self.objectives)}",
                )
            require(
                begin < total,
                f"{where} would begin at {begin:g}, and the run ends at {total:g}: lower the phases' until, or raise max_steps",
            )
            begin = phase.until
            if phase.data is not None:
                require(
                    self.mixture.method == "none", f"{where}.data and mixture.method both set the sources' shares: leave one out"
                )
                require(
                    set(phase.data) == set(names)
                    and all(v > 0 for v in phase.data.values())
                    and abs(sum(phase.data.values()) - 1) < 1e-6,
                    f"{where}.data must give every source a share above 0, summing to 1: the sources are {', '.join(names)}",
                )

        stays = self.training.lambda_schedule == "constant"
        require(
            not self.curriculum.phases or not all(phase.repeats_the_run(lambda_stays=stays) for phase in self.curriculum.phases),
            "curriculum.phases has no effect, since all of its factors are 1: change one, or leave it out",
        )
        self._check_steps()

    def _check_steps(self) -> None:
        """Refuse a step at which no objective counts, or a mixture has no cross-entropy to look at.

        A phase's first step tells: a factor that has left 0 there, or goes on to leave it, is above 0 in all of the phase's others.
        """
        settings, steps, total = self.objective_settings(), self.training.max_steps, self.curriculum_total
        phases, first = self.fitted_curriculum, 0
        for phase, count in enumerate(phase_steps(self.curriculum, total, steps)):
            if count:
                factors = point_at(phases, first / steps, total).objectives
                counting = [item.objective for name, item in settings.items() if factors.get(name, 1.0)]
                place = f"of curriculum.phases.{phase}" if phase < len(phases.phases) else "behind curriculum.phases"
                where = f"at step {first + 1}, the first {place},"
                require(bool(counting), f"{where} every objective has weight 0, and nothing is learnt: begin it with one above 0")
                require(
                    self.mixture.method == "none" or any(isinstance(objective, CrossEntropy) for objective in counting),
                    f"{where} the cross-entropy has weight 0, and mixture.method={self.mixture.method} looks at it: begin it "
                    "with a weight above 0",
                )
            first += count

    def objective_settings(self) -> dict[str, ObjectiveSettings]:
        """Return the objectives that count at any time of the run."""
        found = parse_objectives(self.objectives)
        active = {n: s for n, s in found.items() if s.active and ever_above_zero(self.curriculum, n)}
        for name, item in active.items():
            if isinstance(item.objective, MaskedDiffusion) and item.objective.seed is None:
                active[name] = replace(item, objective=replace(item.objective, seed=self.training.seed))
        require(bool(active), "no objective ever has a weight above 0: raise one in objectives, or in the curriculum's phases")
        return active

    @property
    def diffusion(self) -> DiffusionForm | None:
        """How the model will diffuse, its mask token numbered 0, which it does not have yet; None if no objective makes it."""
        return diffusion_form(self.objective_settings())

    @property
    def own_lambda(self) -> bool:
        """Whether something other than `training.lambda_schedule` decides lambda: a curriculum, or weights that are frozen."""
        return self.model.lrc is not None or any(phase.lambda_value is not None for phase in self.curriculum.phases)

    @property
    def tokens(self) -> int:
        """Tokens in the rows of the whole run, padding included."""
        return self.training.max_steps * self.training.rows_per_step * self.data.sequence_length

    @property
    def heldout_data(self) -> DataConfig:
        """The data as evaluations look at them: with as many held-out tokens as `training.eval_share` allows."""
        share, wanted = self.training.eval_share, self.data.heldout_tokens
        return (
            self.data if share is None else replace(self.data, heldout_tokens=max(2, min(wanted, math.ceil(share * self.tokens))))
        )

    @property
    def curriculum_total(self) -> float:
        """The whole run in the unit of the curriculum's `until`."""
        return float(self.tokens) if self.curriculum.by == "tokens" else 1.0

    @property
    def fitted_curriculum(self) -> CurriculumConfig:
        """The curriculum with a step at least in every phase, see `wrinklefree.curriculum.fitted`."""
        return fitted(self.curriculum, self.curriculum_total, self.training.max_steps)

    @property
    def needs_teacher(self) -> bool:
        """Whether an objective that counts compares with a teacher."""
        return any(settings.objective.uses_teacher for settings in self.objective_settings().values())

    @property
    def makes_original(self) -> bool:
        """Whether a float model is made on the spot, because something needs one and there is none."""
        needed = self.model.lrc is not None or (self.needs_teacher and self.teacher.model is None and self.teacher.kind == "local")
        return self.model.shape is not None and needed


def _divergences(settings: dict[str, ObjectiveSettings]) -> list[LogitsDivergence]:
    return [item.objective for item in settings.values() if isinstance(item.objective, LogitsDivergence)]
