"""Group `mixture`: what moves the sources' shares while a run trains."""

from dataclasses import dataclass, field
from typing import Any

from data_handler import DataConfig
from data_handler.mixture import CONTROLLERS, Controller, OnlineDataMixing, parse_mixture
from data_handler.mixture.settings import option_names

from wrinklefree.mapping import require


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
        require(
            self.method != "doremi",
            "mixture.method=doremi needs a reference run: scripts/mixture.py doremi finds weights before training",
        )
        require(
            self.method == "none" or self.method in known,
            f"mixture.method must be none or one of {', '.join(known)}, not {self.method!r}",
        )
        require(self.method != "none" or not self.options, "mixture.options has no effect with mixture=none: choose a method")
        require(self.probes is None or self.method == "influence", f"mixture.probes has no effect on {self.method}: leave it out")
        require(self.probes is None or bool(self.probes), "mixture.probes is empty: name a source, or leave it out for all")
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
        require(
            len(names) > 1,
            f"mixture.method={self.method} needs at least two sources, and the data has only {names[0]}: add one to "
            "data.sources, or leave it out (mixture=none)",
        )
        for name in self.probes or ():
            require(name in names, f"mixture.probes names {name!r}, which is no source: use {', '.join(names)}")
        controller = self.controller(data)
        needs_heldout = self.method in ("aioli", "influence")
        require(
            not needs_heldout or data.heldout_share > 0,
            f"mixture.method={self.method} measures held-out rows, and data.heldout_share is 0: set it above 0, for example 0.05",
        )
        if isinstance(controller, OnlineDataMixing):
            first = controller.warmup // controller.every * controller.every + controller.every
            require(
                first < steps,
                f"the mixture would first change after step {first} (mixture.options.every={controller.every}), and the run has "
                f"{steps}: lower every or warmup, or raise training.max_steps",
            )
