"""Which teacher a run has."""

from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from wrinklefree.mapping import require

MOST_RETRIES = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig:
    """The teacher that objectives compare with; it is loaded only if one of a weight above 0 does.

    Attributes:
        kind: "local", or how a server is spoken to: "vllm" or "sglang". A server gives the likeliest tokens at temperature 1.
        model: a model directory or hub id; of a server, the name that it is served under. None takes the float model that the
            run's was converted from; a model that starts from random weights (`model=tiny`) has none, so one of its shape is
            trained on the run's text first and both begin with it: a stand-in, and the run says so.
        made_steps: how many steps that takes; None as many as the run's.
        dtype: what a local one is kept and run in.
        device: where it runs, for example "cpu" or "cuda:1"; None where the model is.
        offload: keep its weights in main memory between batches; they move to its device, and back, in every step.
        compiled: run it through `torch.compile`; for distributions alone.
        cache_dir: keep its likeliest tokens there, and ask for none of them again; objectives must be of kind logits with a top_k.
        url: of a server, for example http://localhost:8000.
        timeout_s: seconds that a server's answer may take as a whole, however it comes; None 60.
        retries: how often a failed request is repeated, at most 10 times; None 3.
        concurrency: requests at a time; None 8.
        api_key_file: a file with the key of a server.
    """

    kind: Literal["local", "vllm", "sglang"] = "local"
    model: str | None = None
    made_steps: int | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str | None = None
    offload: bool = False
    compiled: bool = False
    cache_dir: str | None = None
    url: str | None = None
    timeout_s: float | None = None
    retries: int | None = None
    concurrency: int | None = None
    api_key_file: str | None = None

    def __post_init__(self) -> None:
        for name in ("url", "timeout_s", "retries", "concurrency", "api_key_file"):
            require(
                self.kind != "local" or getattr(self, name) is None,
                f"teacher.{name} belongs to a server and has no effect on kind local: leave it out, or set teacher.kind",
            )
        for name, default in (
            ("made_steps", None),
            ("dtype", "float32"),
            ("device", None),
            ("offload", False),
            ("compiled", False),
        ):
            require(
                self.kind == "local" or getattr(self, name) == default,
                f"teacher.{name} has no effect on a server, which has its own: leave it out",
            )
        for name in ("url", "model"):
            require(self.kind == "local" or bool(getattr(self, name)), f"teacher.kind={self.kind} needs teacher.{name}: give it")
        require(
            self.url is None or self.url.startswith(("http://", "https://")),
            f"teacher.url must begin with http:// or https://, not {self.url!r}",
        )
        require(
            self.url is None or _names_a_host(self.url),
            f"teacher.url names no host, or a port that is no number: give it as http://HOST:PORT, not {self.url!r}",
        )
        for name, least in (("timeout_s", 0.001), ("retries", 0), ("concurrency", 1)):
            value = getattr(self, name)
            require(value is None or value >= least, f"teacher.{name} must be at least {least}, not {value}")
        # The wait before a try doubles: before the last of 10 it is over 4 minutes, of 20 three days.
        require((self.retries or 0) <= MOST_RETRIES, f"teacher.retries must be at most {MOST_RETRIES}, not {self.retries}")
        # What a socket can wait for ends somewhere, and infinity is beyond it.
        require((self.timeout_s or 0) <= 1e6, f"teacher.timeout_s must be at most 1e6 seconds, not {self.timeout_s}")
        require(self.model is None or bool(self.model.strip()), "teacher.model is empty: name a model, or null for the original")
        require(self.made_steps is None or self.made_steps > 0, f"teacher.made_steps must be positive, not {self.made_steps}")
        require(
            self.made_steps is None or self.model is None,
            "teacher.made_steps has no effect beside teacher.model, which is taken as it is: leave one out",
        )
        require(not (self.offload and self.device == "cpu"), "teacher.offload has no effect on device cpu: leave it out")

    @property
    def tops_only(self) -> bool:
        """Whether it is known by its likeliest tokens alone."""
        return self.kind != "local" or self.cache_dir is not None


def _names_a_host(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:  # of a port that is no number or too large, or brackets that do not close
        return False
