"""What the parity gate decides by, and what it reports."""

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

Status = Literal["proven", "unproven", "failed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ParityBounds:
    """The gate's bounds. Those on distributions widen with the rounding noise that the same run measures, up to caps: see `gate`.

    Attributes:
        code_edge: distance from a rounding edge within which an activation code may fall on either side.
        layer_output: a layer's output error as a fraction of its largest output.
        floor_factor: multiple of the floor, or of a perplexity's standard error, up to which a difference counts as rounding.
        handling_factor: multiple of the distance from training to the emulation, both in torch, that the engine may show.
        end_to_end_off: packed against training, as a fraction of what dropping activation quantisation costs.
        single_flip: the floor is never taken lower than this fraction of the same cost: on few positions one rounded code decides.
        greedy_margin: top-2 margin, in nats, below which packed and training may choose different tokens.
        f16_mean_kl, f16_max_kl, f16_top1: the engine against its emulation, when every matrix and the head is F16 or BF16.
        ternary_mean_kl, ternary_max_kl, ternary_top1: likewise, when the engine rounds some matrix's or the head's input to codes.
        training_mean_kl, training_max_kl, training_top1: the engine against training's own forward.
        sure_margin: top-2 margin, in nats, from which on the engine must choose training's token.
        perplexity: largest |ratio - 1| of perplexities against training.
        exact_perplexity: likewise, of an engine that computes training's own forward.
        activation_ratio: the engine's distance from its emulation as a fraction of its distance from one without activation
            quantisation.
        decidable: that fraction and `end_to_end_off` are judged only where they leave this multiple of the floor, which is what a
            right engine or packed model may differ by (`floor_factor`); else they are reported as undecided.
        code_noise: the floor of that judgement on an engine is never taken lower than this mean KL, in nats: right emulations of
            engines that round to codes were seen to differ by 4e-8 to 1.8e-7 (`bitnet_arch.parity.activations`), because any
            last place may move an activation across a code's edge. A model that is hardly trained shows no larger effect.
        resolution: bounds on KL, on the share of equal choices and on margins widen up to this fraction of what Q4_0 in place of
            ternary costs.
        perplexity_cap: what the bound on |ratio - 1| of perplexities widens to: there Q4_0 can look right by chance.
        min_positions: positions that a proof needs.
        min_foreign: positions that llama.cpp must run for a proof of a file that it can run, where the native engine ran
            `min_positions`: on 120 every wrong file of `tests` that distributions can tell from the right one is caught.
    """

    code_edge: float = 1e-4
    layer_output: float = 1e-5
    floor_factor: float = 3.0
    handling_factor: float = 1.5
    end_to_end_off: float = 0.2
    single_flip: float = 0.02
    greedy_margin: float = 0.01
    f16_mean_kl: float = 1e-5
    f16_max_kl: float = 1e-4
    f16_top1: float = 0.995
    ternary_mean_kl: float = 1e-4
    ternary_max_kl: float = 1e-2
    ternary_top1: float = 0.98
    training_mean_kl: float = 5e-4
    training_max_kl: float = 1e-2
    training_top1: float = 0.98
    sure_margin: float = 0.2
    perplexity: float = 0.002
    exact_perplexity: float = 0.001
    activation_ratio: float = 0.5
    decidable: float = 3.0
    code_noise: float = 1e-7
    resolution: float = 0.5
    perplexity_cap: float = 0.05
    min_positions: int = 1000
    min_foreign: int = 100


@dataclass(frozen=True)
class Check:
    """One figure and its bound.

    Attributes:
        name: what was checked.
        value: the figure, or None if it was not a number.
        op: "<=" or ">=".
        bound: what it must not cross.
        holds: whether it does not; None where this model's rounding noise cannot decide it.
        note: why the bound is not the default one, or what the figure means.
    """

    name: str
    value: float | None
    op: Literal["<=", ">="]
    bound: float
    holds: bool | None
    note: str = ""


def at_most(name: str, value: float, bound: float, note: str = "") -> Check:
    """Return a check that `value <= bound`; what is not a finite number never holds."""
    return _check(name, float(value), "<=", float(bound), float(value) <= float(bound), note)


def at_least(name: str, value: float, bound: float, note: str = "") -> Check:
    """Return a check that `value >= bound`; what is not a finite number never holds."""
    return _check(name, float(value), ">=", float(bound), float(value) >= float(bound), note)


def widened(
    name: str, value: float, op: Literal["<=", ">="], default: float, noise: float, cap: float | None, note: str = ""
) -> Check:
    """Return a check of a figure whose bound widens from a default with what rounding explains, up to a cap.

    Up to the bound it holds (a cap narrower than the default has no effect). Beyond what rounding explains it is missed. Between a
    bound that was capped and what rounding explains it is undecided: there the figure is noise, or a wrong weight type.

    Args:
        name: the check.
        value: the figure.
        op: on which side of its bound it must lie.
        default: the bound of a model that rounding does not move.
        noise: how far rounding may move this one.
        cap: how wide the bound may become, None for any.
        note: what is said in any case.
    """
    wider, narrower, make = (max, min, at_most) if op == "<=" else (min, max, at_least)
    explained = wider(default, noise)
    bound = explained if cap is None else narrower(explained, wider(default, cap))
    check = make(name, value, bound, note)
    if check.holds:
        return check
    missed = make(name, value, explained, note)
    if not missed.holds:
        return missed
    why = f"rounding explains figures up to {explained:.3g} here, and a wrong weight type those from {bound:.3g} on"
    return replace(check, holds=None, note=f"{note}; {why}" if note else why)


def _check(name: str, value: float, op: Literal["<=", ">="], bound: float, within: bool, note: str) -> Check:
    finite = math.isfinite(value)
    # A bound that is not a number compares as false, and so does not hold.
    return Check(name, value if finite else None, op, bound if math.isfinite(bound) else 0.0, finite and within, note)


MAY_STAY_OPEN = (
    *("packed.activation_ratio", "engine.activation_ratio", "native.activation_ratio"),
    *("packed.greedy_margin", "native.greedy_margin", "training.flip_margin", "native.training_flip_margin"),
)
"""Checks that a proven file may leave undecided, because others answer what they ask.

The ratios ask whether activations are quantised at all: of packed layers, the codes on identical inputs say so (`layers.*`); of an
engine, it says nothing of the file. The margins are the largest of the few positions where two forwards choose another token; what
sets a wrong weight type apart is the mean KL of the same two forwards, which may not stay open. A margin beyond what rounding
explains is missed all the same."""


@dataclass(frozen=True)
class ParityReport:
    """What was compared and how it went.

    Attributes:
        status: "proven" (engines ran the file on enough positions, among them llama.cpp if it can, no bound is missed, and all
            are decided but, at most, those of `MAY_STAY_OPEN`), "unproven" (see `reason`) or "failed" (a bound is missed).
        reason: one sentence; when proven, empty, or what stayed undecided and what quantised embeddings cost.
        engine: the engine's name, or both engines' with "and" between them; empty if none ran.
        engine_version: its version, or both.
        positions: how many next-token distributions were compared, by the engine that gave most; `details["engine_positions"]` has
            both.
        types: tensor name to type name in the file.
        checks: every figure with its bound.
        measurements: the comparisons behind them, by name.
        details: further facts for people (tensors that differ, the date).
    """

    status: Status
    reason: str
    engine: str = ""
    engine_version: str = ""
    positions: int = 0
    types: dict[str, str] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    measurements: dict[str, dict[str, Any]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def failed_checks(self) -> list[str]:
        """Return the names of checks that do not hold."""
        return [check.name for check in self.checks if check.holds is False]

    def undecided_checks(self) -> list[str]:
        """Return the names of checks that this model's rounding noise leaves open."""
        return [check.name for check in self.checks if check.holds is None]

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return asdict(self)

    def metadata(self) -> dict[str, str | int | float | bool]:
        """Return what a GGUF file says about its proof, as `wrinklefree.parity.*` keys."""
        values: dict[str, str | int | float | bool] = {"status": self.status, "positions": self.positions}
        if self.reason:
            values["reason"] = self.reason
        if self.engine:
            values |= {"engine": self.engine, "engine_version": self.engine_version}
        values |= {
            key: self.details[key] for key in ("date", "tensors_sha256", "context", "engine_positions") if key in self.details
        }
        for check in self.checks:
            if check.value is not None and check.holds is not None:
                values |= {f"{check.name}.value": float(check.value), f"{check.name}.bound": check.bound}
        if undecided := self.undecided_checks():
            values["undecided"] = ", ".join(undecided)
        return {f"wrinklefree.parity.{key}": value for key, value in values.items()}


class ParityError(RuntimeError):
    """A file that does not compute what was trained. The message is one sentence; `report` holds the figures."""

    def __init__(self, report: ParityReport) -> None:
        super().__init__(report.reason)
        self.report = report
