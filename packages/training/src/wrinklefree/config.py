"""The configuration groups as frozen dataclasses; Hydra is only the surface that fills them.

Types and keys are checked by pydantic, so that a wrong one ends in a sentence that names it; values are checked here.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from bitnet_arch import ConversionConfig
from bitnet_arch.bitlinear import LAMBDA_SCHEDULES
from bitnet_arch.diffusion import DiffusionForm
from data_handler import DataConfig
from data_handler.mixture import CONTROLLERS, Controller, OnlineDataMixing, parse_mixture
from data_handler.mixture.settings import option_names

from wrinklefree.correction import CorrectionConfig
from wrinklefree.curriculum import CurriculumConfig, ever_above_zero, fitted
from wrinklefree.mapping import from_mapping
from wrinklefree.mapping import require as _require
from wrinklefree.objectives import LogitsDivergence, ObjectiveSettings, parse_objectives
from wrinklefree.objectives.diffusion import MaskedDiffusion
from wrinklefree.objectives.settings import AUTO, diffusion_form, reference_of
from wrinklefree.schedules import LEARNING_RATE_SCHEDULES
from wrinklefree.teachers.settings import TeacherConfig

__all__ = ["DistributedConfig", "MixtureConfig", "ModelConfig", "RunConfig", "ShapeConfig", "TrainingConfig", "from_mapping"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ShapeConfig:
    """Shape of a model that starts from random weights; the names are `transformers.LlamaConfig`'s."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            _require(isinstance(value, bool) or value > 0, f"model.shape.{item.name} must be positive, not {value}")
        heads, kv = self.num_attention_heads, self.num_key_value_heads
        _require(
            self.hidden_size % heads == 0, f"model.shape.hidden_size {self.hidden_size} must be a multiple of the {heads} heads"
        )
        _require(
            self.hidden_size // heads % 2 == 0,
            f"model.shape gives heads of {self.hidden_size // heads}, and rotary positions need an even number: change "
            "hidden_size or num_attention_heads",
        )
        _require(heads % kv == 0, f"model.shape.num_attention_heads {heads} must be a multiple of num_key_value_heads {kv}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which model is trained.

    Attributes:
        name: used in the run directory's name.
        pretrained: a model directory or hub id to convert; None starts from random weights of `shape`.
        shape: given exactly when `pretrained` is not.
        norm, gain, softness, granularity, rotation: how it is converted, see `bitnet_arch.ConversionConfig`; None takes its
            default, and gain 1 on random weights. A directory that is ternary already (master form) is trained as it is; of these,
            it takes what it is anyway.
        lrc: give a float model a low-rank correction (docs/objectives.md), and train nothing but that.
    """

    name: str
    pretrained: str | None = None
    shape: ShapeConfig | None = None
    norm: Literal["subln", "none", "allnorm", "bitlinear"] | None = None
    gain: Literal["calibrated", "one"] | None = None
    softness: float | None = None
    granularity: Literal["tensor", "row", "group128"] | None = None
    rotation: bool | None = None
    lrc: CorrectionConfig | None = None

    def __post_init__(self) -> None:
        for name in ("norm", "gain", "softness", "granularity", "rotation"):
            _require(
                self.lrc is None or getattr(self, name) is None or (name, getattr(self, name)) == ("norm", "none"),
                f"model.{name} has no effect with model.lrc, which starts from the float model without norms: leave it out",
            )
        _require((self.pretrained is None) != (self.shape is None), "give exactly one of model.pretrained and model.shape")
        _require(
            self.shape is None or self.gain != "calibrated",
            "model.gain=calibrated has nothing to calibrate on random weights: leave it out",
        )
        for name in ("gain", "softness"):
            given = getattr(self, name) is not None
            _require(not (given and self.norm == "none"), f"model.{name} has no effect with model.norm=none: leave it out")
        _require(
            self.softness is None or (self.shape is None and self.gain != "one"),
            "model.softness has no effect where no gain is calibrated: leave it out",
        )
        self.conversion()

    def conversion(self) -> ConversionConfig:
        """Return the conversion's own configuration."""
        gain = self.gain or ("calibrated" if self.shape is None or self.norm == "none" else "one")
        default = ConversionConfig()
        softness = default.softness if self.softness is None else self.softness
        return ConversionConfig(
            norm=self.norm or default.norm,
            gain=gain,
            softness=softness,
            granularity=self.granularity or default.granularity,
            rotation=default.rotation if self.rotation is None else self.rotation,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """How it is trained.

    Attributes:
        max_steps: optimiser steps.
        rows_per_step: rows of `data.sequence_length` tokens in one optimiser step, over all processes.
        micro_batch_rows: rows in one forward and backward; smaller needs less memory and changes no result. None: all at once.
        learning_rate: peak rate of the ternary arm.
        learning_rate_fp: peak rate of the unquantised arm; None takes `learning_rate`.
        relative_learning_rate: scale a ternary matrix's rate by its mean |W| over the median matrix's, at most 1. A ternary layer
            sees W only through W / mean |W|, and softened SubLN makes some producers a hundred times smaller than others.
        weight_decay: of matrices; norms, biases and embeddings have none.
        betas: of AdamW.
        warmup_share: share of the run in which the rate rises linearly.
        schedule: "cosine", "linear", "wsd" (constant, then a linear decay over the last fifth) or "constant".
        grad_clip: largest norm of the gradient; 0 clips nothing.
        lambda_schedule: how the quantisation strength rises to 1: "linear", "cosine" or "sigmoid"; "constant" is 1 from the start.
        lambda_warmup_share: share of the run in which it rises.
        seed: of weights, data order and sampling.
        precision: "32-true" or "bf16-mixed".
        eval_every: steps between held-out evaluations; 0 evaluates at the end only.
        checkpoint_every: steps between checkpoints; one is also written at the end and when interrupted.
        keep_checkpoints: how many of the newest are kept.
        compare_fp: measure the unquantised model too: as it is when a float model was converted, otherwise (random or ternary
            weights) trained on the same tokens.
        trainable: "all", or "gains": those of norms alone (stage 1 of BitDistill, before the weights are ternary).
        gradient_norms_every: steps between measurements of each objective's gradient norm, the first step included; 0 measures
            none. One costs a forward and a backward pass for every objective, and changes no result but that of weights that
            are `auto`, which follow it.
        activation_checkpointing: keep each block's input alone for the backward pass, and compute the block once more there: less
            memory, more time, the same bits.
        wandb: "auto" (online with a key, else offline), "offline" or "off".
        data_workers: processes that make a process's batches ahead; 0 makes them between steps. Changes no batch.
        threads: CPU threads; None leaves PyTorch's choice. Recorded, and restored on resume.
    """

    max_steps: int
    rows_per_step: int
    learning_rate: float
    micro_batch_rows: int | None = None
    learning_rate_fp: float | None = None
    relative_learning_rate: bool = False
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_share: float = 0.0
    schedule: str = "cosine"
    grad_clip: float = 1.0
    lambda_schedule: str = "constant"
    lambda_warmup_share: float = 0.0
    seed: int = 0
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    eval_every: int = 0
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    compare_fp: bool = True
    trainable: Literal["all", "gains"] = "all"
    gradient_norms_every: int = 0
    activation_checkpointing: bool = False
    wandb: Literal["auto", "offline", "off"] = "auto"
    data_workers: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_steps", "rows_per_step", "checkpoint_every", "keep_checkpoints", "learning_rate"):
            _require(0 < getattr(self, name) < float("inf"), f"training.{name} must be positive, not {getattr(self, name)}")
        for name in ("micro_batch_rows", "learning_rate_fp", "threads"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"training.{name} must be positive or null, not {value}")
        for name in ("weight_decay", "grad_clip", "eval_every", "data_workers", "seed", "gradient_norms_every"):
            _require(getattr(self, name) >= 0, f"training.{name} must not be negative, and is {getattr(self, name)}")
        for name in ("warmup_share", "lambda_warmup_share"):
            _require(0 <= getattr(self, name) < 1, f"training.{name} must lie in [0, 1), not {getattr(self, name)}")
        for name, known in (("schedule", LEARNING_RATE_SCHEDULES), ("lambda_schedule", LAMBDA_SCHEDULES)):
            _require(
                getattr(self, name) in known, f"training.{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}"
            )
        _require(all(0 <= beta < 1 for beta in self.betas), f"training.betas must lie in [0, 1), not {list(self.betas)}")
        share = self.lambda_warmup_share
        _require(
            (self.lambda_schedule == "constant") == (share == 0),
            f"training.lambda_schedule={self.lambda_schedule} with lambda_warmup_share={share} has no effect: "
            "give a rising schedule its share, or a constant one none",
        )
        _require(self.learning_rate_fp is None or self.compare_fp, "training.learning_rate_fp has no effect without compare_fp")
        _require(self.seed < 2**63, f"training.seed must be below 2**63, and is {self.seed}")
        _require(
            share == 0 or 1 <= self.lambda_warmup_steps < self.max_steps,
            f"training.lambda_warmup_share={share} is {self.lambda_warmup_steps} of {self.max_steps} steps: lambda must rise, and "
            "reach 1 before the last step",
        )

    @property
    def warmup_steps(self) -> int:
        """Steps of the learning rate's warm-up."""
        return round(self.warmup_share * self.max_steps)

    @property
    def lambda_warmup_steps(self) -> int:
        """Steps of lambda's warm-up."""
        return round(self.lambda_warmup_share * self.max_steps)


@dataclass(frozen=True, kw_only=True, slots=True)
class DistributedConfig:
    """Where it runs.

    Attributes:
        strategy: "single" (one process) or "ddp" (one process a device, gradients averaged; NCCL is not run on a GPU yet).
        accelerator: "auto", "cpu" or "cuda".
        devices: processes; 1 for "single".
    """

    strategy: Literal["single", "ddp"] = "single"
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    devices: int = 1

    def __post_init__(self) -> None:
        _require(self.devices > 0, f"distributed.devices must be positive, not {self.devices}")
        _require(self.strategy == "ddp" or self.devices == 1, "distributed.devices needs distributed=ddp")


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureConfig:
    """How the sources' shares of the tokens move while training (docs/mixture.md).

    Attributes:
        method: "none" (the data's weights throughout), or a method of `data_handler.mixture` that acts in a run.
        options: of the method's class. Where it takes `weights` to start from and none are given, it starts from the data's.
        probes: of method influence, the sources whose held-out rows are to be helped; None is all of them.
    """

    method: str = "none"
    options: dict[str, Any] = field(default_factory=dict)
    probes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        known = [name for name in CONTROLLERS if name != "doremi"]
        _require(
            self.method != "doremi",
            "mixture.method=doremi needs a reference run: scripts/mixture.py doremi finds weights before training",
        )
        _require(
            self.method == "none" or self.method in known,
            f"mixture.method must be none or one of {', '.join(known)}, not {self.method!r}",
        )
        _require(self.method != "none" or not self.options, "mixture.options has no effect with mixture=none: choose a method")
        _require(self.probes is None or self.method == "influence", f"mixture.probes has no effect on {self.method}: leave it out")
        _require(self.probes is None or bool(self.probes), "mixture.probes is empty: name a source, or leave it out for all")
        if self.method != "none":
            parse_mixture({"method": self.method, "options": self.options})

    def controller(self, data: DataConfig) -> Controller:
        """Return the controller of a run on these sources; there is none for method "none".

        Raises:
            UserError: for an option's value that cannot be meant with them.
        """
        options = dict(self.options)
        if "weights" in option_names(self.method):
            options.setdefault("weights", [source.weight for source in data.sources])
        return parse_mixture({"method": self.method, "options": options}).controller([source.name for source in data.sources])

    def check(self, data: DataConfig, steps: int) -> None:
        """Refuse what cannot be meant with these sources and steps.

        Raises:
            UserError: naming it.
        """
        if self.method == "none":
            return
        names = [source.name for source in data.sources]
        _require(
            len(names) > 1,
            f"mixture.method={self.method} needs at least two sources, and the data has only {names[0]}: add one to "
            "data.sources, or leave it out (mixture=none)",
        )
        for name in self.probes or ():
            _require(name in names, f"mixture.probes names {name!r}, which is no source: use {', '.join(names)}")
        controller = self.controller(data)
        needs_heldout = self.method in ("aioli", "influence")
        _require(
            not needs_heldout or data.heldout_share > 0,
            f"mixture.method={self.method} measures held-out rows, and data.heldout_share is 0: set it above 0, for example 0.05",
        )
        if isinstance(controller, OnlineDataMixing):
            first = controller.warmup // controller.every * controller.every + controller.every
            _require(
                first < steps,
                f"the mixture would first change after step {first} (mixture.options.every={controller.every}), and the run has "
                f"{steps}: lower every or warmup, or raise training.max_steps",
            )


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
        _require(bool(self.output_dir.strip()), "output_dir is empty: name a folder")
        shape, length = self.model.shape, self.data.sequence_length
        _require(
            shape is None or length <= shape.max_position_embeddings,
            f"data.sequence_length={length} is longer than the model's context (model.shape.max_position_embeddings): change one",
        )
        _require(bool(self.sample_prompt), "sample_prompt is empty, and a model continues at least one character: give some")
        rows, processes = self.training.rows_per_step, self.distributed.devices
        _require(rows % processes == 0, f"training.rows_per_step={rows} must be a multiple of the {processes} processes")
        self.mixture.check(self.data, self.training.max_steps)
        self._check_objectives()
        self._check_curriculum()

    def _check_objectives(self) -> None:
        settings = self.objective_settings()
        taught = any(item.objective.uses_teacher for item in settings.values())
        _require(
            self.mixture.method == "none" or reference_of(settings) is not None,
            f"mixture.method={self.mixture.method} looks at the cross-entropy of the sources: give objectives.ce a weight",
        )
        _require(
            not self.teacher.compiled or not any(i.objective.uses_teacher and i.objective.way != "rows" for i in settings.values()),
            "teacher.compiled serves distributions alone, and an objective asks for the teacher's layers: leave it out",
        )
        for name, item in settings.items():
            _require(
                item.weight != AUTO or reference_of(settings) is not None,
                f"objectives.{name}.weight=auto matches its gradient to that of the cross-entropy, whose factor the curriculum "
                "never raises above 0: raise it in a phase, or give a number",
            )
        self._check_tops(settings)
        self._check_teacher(taught)
        _require(
            not self.teacher.offload or not any(i.objective.way == "own" and i.objective.uses_teacher for i in settings.values()),
            "teacher.offload serves one forward pass a batch, and an objective runs the teacher more often: leave it out",
        )
        _require(
            self.diffusion is None or not self.training.compare_fp,
            "training.compare_fp compares likelihoods, and a diffusion model's is known only up to a bound: set it to false",
        )
        lrc = self.model.lrc is not None
        _require(
            not lrc or self.training.trainable == "all",
            "training.trainable has no effect with model.lrc, of which the adapters alone are trained: leave it out",
        )
        _require(
            not lrc or all(phase.lambda_value in (None, 1.0) for phase in self.curriculum.phases),
            "model.lrc freezes weights that are ternary, and lambda stays 1: leave lambda_value out of the curriculum",
        )

    def _check_teacher(self, taught: bool) -> None:
        """Refuse settings of a teacher that there is not; those beside an objective of weight 0 wait for it."""
        waits = any(item.get("weight") == 0 for item in self.objectives.values())
        _require(
            self.teacher.made_steps is None or self.makes_original or (waits and self.model.shape is not None),
            "teacher.made_steps has no effect where no model is made on the spot, which takes random weights (model.shape) and an "
            "objective with a teacher: leave it out",
        )
        for item in fields(TeacherConfig):
            _require(
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
            _require(
                isinstance(objective, LogitsDivergence) and objective.top_k is not None,
                f"{what} knows the teacher's likeliest tokens alone: objectives.{name} must be of kind logits, with a top_k",
            )
            assert isinstance(objective, LogitsDivergence)
            _require(
                not remote or objective.temperature == 1.0,
                f"{what} gives probabilities at temperature 1: set objectives.{name}.temperature=1",
            )
            _require(
                not remote or objective.scope == "scored",
                f"{what} says nothing of what follows a document's last token: set objectives.{name}.scope=scored",
            )
        _require(
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
        _require(
            count <= steps,
            f"curriculum.phases has {count} phases, and the run {steps} step{'s' * (steps > 1)}: each takes at least one, so leave "
            "phases out, or raise training.max_steps",
        )
        for i, phase in enumerate(self.curriculum.phases):
            where = f"curriculum.phases.{i}"
            for name in phase.objectives:
                _require(
                    name in self.objectives,
                    f"{where}.objectives names {name!r}, and the objectives are {', '.join(self.objectives)}",
                )
            _require(
                begin < total,
                f"{where} would begin at {begin:g}, and the run ends at {total:g}: lower the phases' until, or raise max_steps",
            )
            begin = phase.until
            if phase.data is not None:
                _require(
                    self.mixture.method == "none", f"{where}.data and mixture.method both set the sources' shares: leave one out"
                )
                _require(
                    set(phase.data) == set(names)
                    and all(v > 0 for v in phase.data.values())
                    and abs(sum(phase.data.values()) - 1) < 1e-6,
                    f"{where}.data must give every source a share above 0, summing to 1: the sources are {', '.join(names)}",
                )

        stays = self.training.lambda_schedule == "constant"
        _require(
            not self.curriculum.phases or not all(phase.repeats_the_run(lambda_stays=stays) for phase in self.curriculum.phases),
            "curriculum.phases has no effect, since all of its factors are 1: change one, or leave it out",
        )

    def objective_settings(self) -> dict[str, ObjectiveSettings]:
        """Return the objectives that count at any time of the run."""
        found = parse_objectives(self.objectives)
        active = {n: s for n, s in found.items() if s.active and ever_above_zero(self.curriculum, n)}
        for name, item in active.items():
            if isinstance(item.objective, MaskedDiffusion) and item.objective.seed is None:
                active[name] = replace(item, objective=replace(item.objective, seed=self.training.seed))
        _require(bool(active), "no objective ever has a weight above 0: raise one in objectives, or in the curriculum's phases")
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
    def curriculum_total(self) -> float:
        """The whole run in the unit of the curriculum's `until`."""
        tokens = self.training.max_steps * self.training.rows_per_step * self.data.sequence_length
        return float(tokens) if self.curriculum.by == "tokens" else 1.0

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
