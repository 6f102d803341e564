"""A low-rank correction as the model that is trained."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from bitnet_arch.lrc.model import LRCConfig, adapter_parameters, add_lrc, check_model_rank, start_lrc
from torch import Tensor
from transformers import PreTrainedModel

from wrinklefree.mapping import require


@dataclass(frozen=True, kw_only=True, slots=True)
class CorrectionConfig:
    """A low-rank correction of ternary layers, which is then trained (`bitnet_arch.lrc`).

    Attributes:
        rank: a whole number, at most the smallest ternary matrix's smaller side, or a share of each layer's smaller side as a
            number below 1.
        start: "solved" rounds the weights and solves for the adapters on calibration text, layer by layer, in turn; "random" rounds
            them by absmean, and starts from a correction that is zero.
        quantizer: what rounds, of "solved"; see `bitnet_arch.ptq`.
        alternations: how often weights are rounded and adapters solved for, of "solved".
        calibration_rows: rows of 512 tokens, of "solved"; None 16.
        dtype: what adapters are stored in.
    """

    rank: int | float
    start: Literal["solved", "random"] = "solved"
    quantizer: Literal["gptq", "absmean", "least_squares"] | None = None
    alternations: int | None = None
    calibration_rows: int | None = None
    dtype: Literal["float16", "int8"] = "float16"

    def __post_init__(self) -> None:
        for name in ("quantizer", "alternations", "calibration_rows"):
            require(
                self.start == "solved" or getattr(self, name) is None,
                f"model.lrc.{name} has no effect with start=random, which solves nothing: leave it out",
            )
        require(self.rows > 0, f"model.lrc.calibration_rows must be positive, not {self.calibration_rows}")
        require(
            self.alternations is None or self.alternations > 0, f"model.lrc.alternations must be positive, not {self.alternations}"
        )
        require(
            0 < self.rank < 1 or (self.rank >= 1 and float(self.rank).is_integer()),
            f"model.lrc.rank must be a whole number of at least 1, or a share between 0 and 1, not {self.rank}",
        )
        self.settings()

    @property
    def rows(self) -> int:
        """How many rows the corrections are solved on."""
        return 16 if self.calibration_rows is None else self.calibration_rows

    def settings(self) -> LRCConfig:
        """Return the solver's own configuration."""
        steps = 1 if self.alternations is None else self.alternations
        return LRCConfig(rank=self.rank, dtype=self.dtype, quantizer=self.quantizer or "gptq", steps=steps)

    def check(self, model: PreTrainedModel) -> None:
        """Refuse a rank that a model's matrices cannot have; looks at sizes alone.

        Raises:
            bitnet_arch.UserError: naming the layer, its size and the rank.
        """
        check_model_rank(model, self.rank)

    def build(self, model: PreTrainedModel, calibration: Iterable[Tensor], seed: int) -> PreTrainedModel:
        """Correct a float model, which must not be used afterwards; only the adapters are left to be trained.

        Args:
            model: as `bitnet_arch.lrc.model.add_lrc` takes it.
            calibration: token ids, of "solved".
            seed: of the adapters, of "random"; other random numbers of the process stay as they are.

        Raises:
            bitnet_arch.UserError: for a rank above a matrix's, or a model that cannot be corrected.
        """
        if self.start == "solved":
            corrected = add_lrc(model, calibration, self.settings())
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                corrected = start_lrc(model, self.rank, self.dtype)
        corrected.requires_grad_(False)
        for parameter in adapter_parameters(corrected):
            parameter.requires_grad_(True)
        return corrected
