"""What a job is: a command, where it runs, and what it needs there. Plain data, checked when built."""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath

from wf_deployer.errors import UserError

CLOUDS = ("aws", "gcp", "nebius", "runpod", "kubernetes")
BUCKETS = ("s3://", "gs://", "r2://", "nebius://")

_ACCELERATOR = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(:[0-9]+(\.[0-9]+)?)?")
_AMOUNT = re.compile(r"[0-9]+(\.[0-9]+)?\+?")
_WORD = re.compile(r"[^\s\x00-\x1f]+")
_NAME = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """The machine a job asks for.

    Attributes:
        cloud: `local`, or one of `CLOUDS`.
        region: a region of the cloud, or a Kubernetes context.
        accelerators: `NAME` or `NAME:COUNT`, as SkyPilot names them.
        instance_type: the cloud's own name of a machine.
        cpus: virtual cores, `8` or (at least) `8+`.
        memory: GiB, `32` or (at least) `32+`.
        disk_size: GiB.
        spot: whether a machine that can be taken away is welcome.

    Raises:
        UserError: if a value is malformed, or asks something of a cloud that it does not have.
    """

    cloud: str = "local"
    region: str | None = None
    accelerators: str | None = None
    instance_type: str | None = None
    cpus: str | None = None
    memory: str | None = None
    disk_size: int | None = None
    spot: bool = False

    def __post_init__(self) -> None:
        if self.cloud != "local" and self.cloud not in CLOUDS:
            raise UserError(f"cloud {self.cloud!r} is unknown: use local, {', '.join(CLOUDS)}")
        _require(_ACCELERATOR, self.accelerators, "accelerators", "use NAME or NAME:COUNT, for example L4:1")
        _require(_AMOUNT, self.cpus, "cpus", "use a number of cores such as 8, or 8+ for at least 8")
        _require(_AMOUNT, self.memory, "memory", "use GiB such as 32, or 32+ for at least 32")
        _require(_WORD, self.region, "region", "use the cloud's own name, for example us-east-1")
        _require(_WORD, self.instance_type, "instance type", "use the cloud's own name, for example g6.xlarge")
        if self.disk_size is not None and self.disk_size < 1:
            raise UserError(f"disk size {self.disk_size} is not positive: give GiB, for example 256")
        if self.cloud == "kubernetes" and self.instance_type is not None:
            raise UserError("kubernetes has no instance types: use --accelerators, --cpus and --memory instead of --instance-type")
        if self.cloud == "local" and any(getattr(self, item.name) != item.default for item in fields(self)):
            raise UserError("a local job takes this machine as it is: name a cloud, or leave the resources out")


@dataclass(frozen=True, kw_only=True, slots=True)
class Mount:
    """Something that a cloud job finds at a path: a local file or folder that is copied there, or a bucket.

    A bucket (a URI that starts with one of `BUCKETS`) is mounted for reading and writing and outlives the machine.

    Raises:
        UserError: if `path` is not absolute or `source` is empty.
    """

    path: str
    source: str

    def __post_init__(self) -> None:
        if not PurePosixPath(self.path).is_absolute() or not self.source:
            raise UserError(f"mount {self.path}={self.source} is malformed: use /PATH=SOURCE, for example /outputs=s3://my-bucket")

    @property
    def is_bucket(self) -> bool:
        """Whether the source is a bucket."""
        return self.source.startswith(BUCKETS)

    @classmethod
    def parse(cls, text: str) -> "Mount":
        """Read `/PATH=SOURCE`.

        Raises:
            UserError: if it is not of that form, or a local source does not exist.
        """
        path, _, source = text.partition("=")
        mount = cls(path=path, source=source)
        if mount.is_bucket:
            return mount
        if "://" in source:
            raise UserError(f"mount source {source} is no bucket that is known: use {', '.join(BUCKETS)} or a local path")
        if not Path(source).expanduser().exists():
            raise UserError(f"mount source {source} does not exist: give a local path or a bucket such as s3://my-bucket")
        return cls(path=path, source=str(Path(source).expanduser().absolute()))


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A command and what it needs; rendered to a local process or to a SkyPilot task.

    Attributes:
        command: the argv, at least the program.
        resources: where it runs.
        secrets: names of environment variables that are taken from the user's environment at launch. Never values.
        mounts: what a cloud job finds at which path.
        workdir: the folder the command runs in (a cloud job's copy of it); the current one if `None`.
        name: what the job is called in a cloud.

    Raises:
        UserError: if a name is malformed.
    """

    command: tuple[str, ...]
    resources: Resources = field(default_factory=Resources)
    secrets: tuple[str, ...] = ()
    mounts: tuple[Mount, ...] = ()
    workdir: Path | None = None
    name: str = "wf-job"

    def __post_init__(self) -> None:
        assert self.command, "a job needs a program"
        _require(_NAME, self.name, "name", "use lower-case letters, digits and dashes, beginning with a letter")
        for secret in self.secrets:
            if "=" in secret:  # the rest may be the secret itself: do not repeat it
                raise UserError(
                    f"secret {secret.partition('=')[0]} was given with a value: give its name only, it is read at launch"
                )
            _require(_ENV_NAME, secret, "secret", "use an environment variable's name, for example HF_TOKEN")
        paths = [mount.path for mount in self.mounts]
        for path in paths:
            if paths.count(path) > 1:
                raise UserError(f"mount path {path} is given twice: give each path once")


def _require(pattern: re.Pattern[str], value: str | None, what: str, remedy: str) -> None:
    if value is not None and not pattern.fullmatch(value):
        raise UserError(f"{what} {value!r} is malformed: {remedy}")
