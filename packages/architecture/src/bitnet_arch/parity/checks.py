"""What the gate compares, and what it makes of the figures: measured distances in, judged checks out."""

from collections.abc import Callable
from dataclasses import dataclass

from bitnet_arch.parity.engines import Handling
from bitnet_arch.parity.forwards import PERTURBATIONS, STORED
from bitnet_arch.parity.measure import Comparison
from bitnet_arch.parity.report import Check, ParityBounds, at_most, widened

Pairs = dict[str, tuple[str, str]]
"""Maps the name of a comparison to the two forwards, or the forward and the engine, that it is of."""

PAIRS: Pairs = {
    "floor: float64": ("training", "training in float64"),
    **{f"floor: perturbed {seed}": ("training", f"training perturbed {seed}") for seed in range(PERTURBATIONS)},
    "activation quantisation off": ("training", "training without activation quantisation"),
    "packed against training": ("training", "packed"),
}
"""What is compared in any case."""

FLOORS = [name for name in PAIRS if name.startswith("floor: ")]

(WITH_EMBEDDINGS,) = STORED


@dataclass(frozen=True, kw_only=True)
class Roles:
    """The names of what an engine of one handling is compared with.

    Attributes:
        column: what the engine is called in pairs.
        pairs: what is compared because of it.
        same: of `pairs`, the engine against the torch forward that handles activations as it does.
        training: the engine against training's own forward.
        handling: training against that torch forward.
        off: that torch forward against itself without activation quantisation.
        engine_off: the engine against the latter.
        control: the same torch forward with Q4_0 in place of ternary.
    """

    column: str
    pairs: Pairs
    same: str
    training: str
    handling: str
    off: str
    engine_off: str
    control: str

    def with_embeddings(self) -> Pairs:
        """Return `pairs` for a file whose embeddings are quantised: the engine is compared with training's forward with those."""
        changed = {name: (WITH_EMBEDDINGS, self.pairs[name][1]) for name in (self.training, self.handling)}
        return self.pairs | changed | {"embeddings against training": ("training", WITH_EMBEDDINGS)}


def _roles(column: str, forward: str, noun: str, *, against: str, control: str, more: Pairs) -> Roles:
    """Return the roles of an engine.

    Args:
        column: as in `Roles`.
        forward: the torch forward that handles activations as the engine does.
        noun: what that is called where it is compared.
        against: what it is called where the engine is compared with it.
        control: as in `Roles`.
        more: comparisons that only this engine has.
    """
    unrounded = "without activation quantisation"
    same, training = f"{column} against {against}", f"{column} against training"
    handling, off, engine_off = f"{noun} against training", f"{noun} {unrounded}", f"{same} {unrounded}"
    pairs = {
        handling: ("training", forward),
        **more,
        off: (forward, f"{forward} {unrounded}"),
        control: (forward, f"{forward} with Q4_0"),
        same: (forward, column),
        engine_off: (f"{forward} {unrounded}", column),
        training: ("training", column),
    }
    return Roles(
        column=column,
        pairs=pairs,
        same=same,
        training=training,
        handling=handling,
        off=off,
        engine_off=engine_off,
        control=control,
    )


ROLES: dict[Handling, Roles] = {
    "llama.cpp": _roles(
        "engine",
        "emulated",
        "emulation",
        against="emulation",
        control="control: Q4_0",
        more={"floor: f16 rounding": ("emulated", "emulated with float32 cache")},
    ),
    "training": _roles("native", "file", "file", against="the file", control="control: Q4_0 in the file", more={}),
}
"""What an engine is compared with, by how it handles activations."""

Found = dict[str, Comparison]
"""Distances by the name of their pair."""

NEGLIGIBLE_KL = 1e-12
"""Below this a distance is a rounding error of the logarithms, and no denominator."""


def end_to_end_checks(found: Found, bounds: ParityBounds) -> list[Check]:
    """Compare the packed model with training's forward."""
    packed, off = found["packed against training"], found["activation quantisation off"].mean_kl
    control = next((found[roles.control] for roles in reversed(ROLES.values()) if roles.control in found), None)
    floor = _worst(found, "mean_kl")
    ratio = at_most("packed.activation_ratio", packed.mean_kl / max(off, NEGLIGIBLE_KL), bounds.end_to_end_off)
    mean_cap, margin_cap = _cap(control, bounds, "mean_kl"), _cap(control, bounds, "flip_margin")
    default, factor, note = bounds.floor_factor * bounds.single_flip * off, bounds.floor_factor, f"floor {floor:.3g}"
    margin = factor * _worst(found, "flip_margin")
    return [
        widened("packed.mean_kl", packed.mean_kl, "<=", default, factor * floor, mean_cap, note),
        _judged(ratio, off, floor, bounds, "whether packed layers quantise activations"),
        widened("packed.greedy_margin", packed.flip_margin, "<=", bounds.greedy_margin, margin, margin_cap),
    ]


def engine_checks(found: Found, bounds: ParityBounds, codes: bool, ternary: bool) -> list[Check]:
    """Compare an engine of llama.cpp's handling with its emulation and with training.

    Args:
        found: distances.
        bounds: what to decide by.
        codes: whether the engine rounds any input to codes.
        ternary: whether any matrix has a ternary type.
    """
    roles = ROLES["llama.cpp"]
    engine, floor, control = found[roles.same], found["floor: f16 rounding"], found[roles.control]
    mean, largest, top1 = (
        (bounds.ternary_mean_kl, bounds.ternary_max_kl, bounds.ternary_top1)
        if codes
        else (bounds.f16_mean_kl, bounds.f16_max_kl, bounds.f16_top1)
    )
    note, factor = f"floor {floor.mean_kl:.3g}", bounds.floor_factor
    checks = [
        widened("engine.mean_kl", abs(engine.mean_kl), "<=", mean, factor * floor.mean_kl, _cap(control, bounds, "mean_kl"), note),
        widened("engine.max_kl", engine.max_kl, "<=", largest, factor * floor.max_kl, _cap(control, bounds, "max_kl"), note),
        widened("engine.top1", engine.top1, ">=", top1, _explained_top1(floor, factor), _top1_cap(control, bounds), note),
    ]
    if ternary:
        checks.append(_engine_ratio(found, roles, "engine", bounds.activation_ratio, max(floor.mean_kl, bounds.code_noise), bounds))
    defaults = {
        "mean_kl": bounds.training_mean_kl,
        "max_kl": bounds.training_max_kl,
        "top1": bounds.training_top1,
        "flip_margin": bounds.sure_margin,
        "perplexity": bounds.perplexity,
    }
    return checks + _training_checks(found, roles, "training.", defaults, bounds)


def native_checks(found: Found, bounds: ParityBounds) -> list[Check]:
    """Compare an engine that handles activations as training does with a forward of the file's values, and with training.

    The bounds are those of packed layers: such an engine differs from torch by the order of float32 sums alone. Measured on the
    families and forms of tests/test_parity_families.py: mean KL from 5e-14 to 1.2e-8, where dropping activation quantisation costs
    2e-8 to 1.8e-6 (docs/parity.md). One position may be as far off as the worst is without activation quantisation: a code
    fell on the other side.
    """
    roles = ROLES["training"]
    engine, off, control = found[roles.same], found[roles.off], found[roles.control]
    floor, factor = _worst(found, "mean_kl"), bounds.floor_factor
    default = factor * bounds.single_flip * off.mean_kl
    margin = factor * _worst(found, "flip_margin")
    mean_cap, max_cap, margin_cap = (_cap(control, bounds, figure) for figure in ("mean_kl", "max_kl", "flip_margin"))
    note = f"floor {floor:.3g}"
    checks = [
        widened("native.mean_kl", abs(engine.mean_kl), "<=", default, factor * floor, mean_cap, note),
        widened("native.max_kl", engine.max_kl, "<=", off.max_kl, factor * _worst(found, "max_kl"), max_cap),
        widened("native.greedy_margin", engine.flip_margin, "<=", bounds.greedy_margin, margin, margin_cap),
        _engine_ratio(found, roles, "native", bounds.end_to_end_off, floor, bounds),
    ]
    defaults = {
        "mean_kl": default,
        "max_kl": off.max_kl,
        "flip_margin": bounds.greedy_margin,
        "perplexity": bounds.exact_perplexity,
    }
    return checks + _training_checks(found, roles, "native.training_", defaults, bounds)


def _engine_ratio(found: Found, roles: Roles, prefix: str, bound: float, floor: float, bounds: ParityBounds) -> Check:
    """Return the check that an engine is nearer to a forward that rounds activations than to one that does not."""
    off = found[roles.engine_off].mean_kl
    # Measured twice, so that neither an emulation nor an engine that quantises nothing can call the effect too small to see.
    effect = max(off, found[roles.off].mean_kl)
    ratio = at_most(f"{prefix}.activation_ratio", found[roles.same].mean_kl / max(off, NEGLIGIBLE_KL), bound)
    return _judged(ratio, effect, floor, bounds, "whether the engine quantises activations")


def _training_checks(found: Found, roles: Roles, prefix: str, defaults: dict[str, float], bounds: ParityBounds) -> list[Check]:
    """Compare an engine with training's own forward.

    Args:
        found: distances.
        roles: the engine's.
        prefix: what the checks' names begin with.
        defaults: bounds of a model that rounding does not move, by figure; without "top1" margins say enough.
        bounds: the others.
    """
    engine, control = found[roles.training], found[roles.control]

    def noise(figure: Callable[[Comparison], float]) -> float:
        # What the engine's handling of activations and the file's rounding of values cost in torch is expected of it.
        rounding = bounds.floor_factor * max(figure(found[name]) for name in FLOORS)
        return max(rounding, bounds.handling_factor * figure(found[roles.handling]))

    def at_most_widened(figure: str, note: str = "") -> Check:
        value, explained = abs(float(getattr(engine, figure))), noise(lambda c: float(getattr(c, figure)))
        return widened(f"{prefix}{figure}", value, "<=", defaults[figure], explained, _cap(control, bounds, figure), note)

    off = abs(engine.perplexity_ratio - 1)
    # What rounding moves up in one place and down in another cancels by chance, in the engine and in its emulation apart.
    chance = bounds.floor_factor * max(found[name].perplexity_error for name in (*FLOORS, roles.handling))
    off_noise = max(noise(lambda c: abs(c.perplexity_ratio - 1)), chance)
    checks = [
        at_most_widened("mean_kl"),
        at_most_widened("max_kl"),
        at_most_widened("flip_margin", "top-2 margin where the engine chose another token"),
        widened(f"{prefix}perplexity", off, "<=", defaults["perplexity"], off_noise, bounds.perplexity_cap),
    ]
    if "top1" in defaults:
        top1 = 1 - max(noise(lambda c: 1 - c.top1), 1 / engine.positions)
        checks.insert(2, widened(f"{prefix}top1", engine.top1, ">=", defaults["top1"], top1, _top1_cap(control, bounds)))
    return checks


def _worst(found: Found, figure: str) -> float:
    """Return how far rounding alone moves a figure."""
    return max(float(getattr(found[name], figure)) for name in FLOORS)


def _cap(control: Comparison | None, bounds: ParityBounds, figure: str) -> float | None:
    """Return what a bound on a figure of a `Comparison` may widen to: a part of what Q4_0 in place of ternary makes of it."""
    return None if control is None else bounds.resolution * float(getattr(control, figure))


def _explained_top1(noise: Comparison, factor: float) -> float:
    """Return what share of equal choices rounding explains: on few positions, one tie is more than the default allows."""
    return 1 - max(factor * (1 - noise.top1), 1 / noise.positions)


def _top1_cap(control: Comparison, bounds: ParityBounds) -> float:
    return 1 - bounds.resolution * (1 - control.top1)


def _judged(ratio: Check, effect: float, floor: float, bounds: ParityBounds, question: str) -> Check:
    """Return a check of a distance as a fraction of `effect`, undecided where rounding (`floor`) alone may reach its bound."""
    if effect * ratio.bound < bounds.decidable * floor:
        why = f"rounding moves this model too far for its logits to tell {question}"
        return Check(ratio.name, ratio.value, ratio.op, ratio.bound, None, why)
    return ratio
