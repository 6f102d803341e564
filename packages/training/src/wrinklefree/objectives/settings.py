"""The objectives of a configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from bitnet_arch import UserError
from bitnet_arch.diffusion import DiffusionForm

from wrinklefree.mapping import from_mapping, require
from wrinklefree.objectives.base import Objective, naming
from wrinklefree.objectives.diffusion import MaskedDiffusion, TargetScores
from wrinklefree.objectives.layerwise import Layerwise
from wrinklefree.objectives.relations import Relations
from wrinklefree.objectives.tokens import CrossEntropy, LogitsDivergence

KINDS: dict[str, type[Any]] = {
    "ce": CrossEntropy,
    "logits": LogitsDivergence,
    "relations": Relations,
    "layerwise": Layerwise,
    "dlm": MaskedDiffusion,
    "tcs": TargetScores,
}
"""Maps an objective's kind to its class, whose fields are its options."""

AUTO = "auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveSettings:
    """An objective of a run.

    Attributes:
        objective: what is computed.
        weight: what it is multiplied by; "auto" gives its gradient the norm of the cross-entropy's.
    """

    objective: Objective
    weight: float | Literal["auto"]

    @property
    def active(self) -> bool:
        """Whether it can ever count."""
        return self.weight != 0


def parse_objectives(values: Mapping[str, Any]) -> dict[str, ObjectiveSettings]:
    """Build a run's objectives.

    Args:
        values: name to `weight` (1 by default), `kind` (by default the name) and the options of the kind's class.

    Raises:
        UserError: naming what is wrong.
    """
    found = {name: _parse(name, options) for name, options in values.items()}
    require(any(s.active for s in found.values()), "objectives has none of a weight above 0: name one, for example ce")
    if any(s.weight == AUTO for s in found.values()):
        require(
            reference_of(found) is not None,
            "weight=auto matches its gradient to that of the cross-entropy, and there is none with a weight: add ce",
        )
    return found


def reference_of(objectives: Mapping[str, ObjectiveSettings]) -> str | None:
    """Return the cross-entropy that weights of "auto" are matched to."""
    for name, settings in objectives.items():
        if isinstance(settings.objective, CrossEntropy) and settings.weight != AUTO and settings.active:
            return name
    return None


def diffusion_form(objectives: Mapping[str, ObjectiveSettings]) -> DiffusionForm | None:
    """Return how the model will diffuse, its mask token numbered 0; None if no objective makes it.

    Raises:
        UserError: if two of them ask for different blocks or shifts.
    """
    forms = {name: s.objective.form for name, s in objectives.items() if isinstance(s.objective, MaskedDiffusion)}
    require(
        len(set(forms.values())) < 2,
        f"the objectives {', '.join(forms)} ask for different diffusion models: give them the same method and block_size",
    )
    return next(iter(forms.values()), None)


def _parse(name: str, options: Any) -> ObjectiveSettings:
    where = f"objectives.{name}"
    require(isinstance(options, Mapping), f"{where} must be a mapping with a weight, for example {{weight: 1.0}}, not {options!r}")
    require("/" not in name, f"{where} must have a name without '/', which separates an objective from its parts in the metrics")
    rest = dict(options)
    kind, weight = rest.pop("kind", name), rest.pop("weight", 1.0)
    if kind not in KINDS:
        raise UserError(f"{where}: kind must be one of {', '.join(KINDS)}, not {kind!r}")
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    require(
        weight == AUTO or (number and 0 <= weight < float("inf")),
        f"{where}.weight must be a number of at least 0 or auto, not {weight!r}",
    )
    with naming(name):
        objective = from_mapping(KINDS[kind], rest, where)
    return ObjectiveSettings(objective=objective, weight="auto" if weight == AUTO else float(weight))
