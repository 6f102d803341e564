"""Mixture methods by name, and the options that a configuration may give them."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_handler.errors import UserError
from data_handler.mixture.aioli import Aioli
from data_handler.mixture.controller import Controller, Static, Stratified
from data_handler.mixture.doremi import DoReMi
from data_handler.mixture.influence import InfluenceWeighted
from data_handler.mixture.odm import OnlineDataMixing

CONTROLLERS: dict[str, type[Controller]] = {
    kind.method: kind for kind in (Stratified, Static, InfluenceWeighted, OnlineDataMixing, DoReMi, Aioli)
}
"""Every method that acts in a run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureConfig:
    """A method and its options, as a Hydra group or a YAML file gives them.

    Attributes:
        method: a key of `CONTROLLERS`.
        options: keyword arguments of its class; what has one number a domain may be a mapping by name.

    Raises:
        UserError: for an unknown method or option.
    """

    method: str = Stratified.method
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in CONTROLLERS:
            raise UserError(f"the mixture's method must be one of {', '.join(CONTROLLERS)}, not {self.method!r}")
        known = option_names(self.method)
        for name in self.options:
            if name not in known:
                takes = f"its options are {', '.join(known)}" if known else "it has no options"
                raise UserError(f"the mixture's method {self.method} has no option {name!r}: {takes}")
        if missing := [name for name in required_options(self.method) if name not in self.options]:
            raise UserError(f"the mixture's method {self.method} needs the option {missing[0]}: give it")

    def controller(self, domains: Sequence[str]) -> Controller:
        """Build the controller of a run over these domains.

        Raises:
            UserError: for an option's value that cannot be meant.
        """
        try:
            return CONTROLLERS[self.method](domains, **self.options)
        except TypeError as error:
            raise UserError(f"an option of the mixture's method {self.method} has the wrong type ({error}): change it") from None


def parse_mixture(raw: Mapping[str, Any]) -> MixtureConfig:
    """Build a `MixtureConfig` from `{method: ..., options: {...}}`.

    Raises:
        UserError: naming what is wrong.
    """
    for key in raw:
        if key not in ("method", "options"):
            raise UserError(f"the mixture has an unknown key {key!r}: the keys are method, options")
    options = raw.get("options") or {}
    if not isinstance(options, Mapping):
        raise UserError(f"the mixture's options must be a mapping, not {options!r}")
    return MixtureConfig(method=raw.get("method", Stratified.method), options=dict(options))


def option_names(method: str) -> list[str]:
    """Return the options of a method."""
    return [name for name, _ in _options(method)]


def required_options(method: str) -> list[str]:
    """Return those that have no default."""
    return [name for name, parameter in _options(method) if parameter.default is inspect.Parameter.empty]


def _options(method: str) -> list[tuple[str, inspect.Parameter]]:
    parameters = inspect.signature(CONTROLLERS[method]).parameters
    return [(name, p) for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY]
