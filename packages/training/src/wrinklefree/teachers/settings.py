"""Which teacher a run has."""

from dataclasses import dataclass
from typing import Literal

from wrinklefree.mapping import require


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig:
    """The teacher that objectives compare with; it is loaded only if one of a weight above 0 does.

    Attributes:
        model: a model directory or hub id. None takes the float model that the run's was converted from; a model that starts from
            random weights (`model=tiny`) has none, so one of its shape is trained on the run's text first and both begin with it:
            a stand-in, and the run says so.
        made_steps: how many steps that takes; None as many as the run's.
        dtype: what it is kept and run in.
        device: where it runs, for example "cpu" or "cuda:1"; None where the model is.
        offload: keep its weights in main memory between batches; they move to its device, and back, in every step.
        compiled: run it through `torch.compile`; for distributions alone.
    """

    model: str | None = None
    made_steps: int | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str | None = None
    offload: bool = False
    compiled: bool = False

    def __post_init__(self) -> None:
        require(self.model is None or bool(self.model.strip()), "teacher.model is empty: name a model, or null for the original")
        require(self.made_steps is None or self.made_steps > 0, f"teacher.made_steps must be positive, not {self.made_steps}")
        require(
            self.made_steps is None or self.model is None,
            "teacher.made_steps has no effect beside teacher.model, which is taken as it is: leave one out",
        )
        require(not (self.offload and self.device == "cpu"), "teacher.offload has no effect on device cpu: leave it out")
