"""Group `distributed`: how many processes, and on what."""

from dataclasses import dataclass
from typing import Literal

from wrinklefree.mapping import require


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
        require(self.devices > 0, f"distributed.devices must be positive, not {self.devices}")
        require(self.strategy == "ddp" or self.devices == 1, "distributed.devices needs distributed=ddp")
