"""A job as a SkyPilot task. Pure: a `Job` in, YAML text out."""

import shlex
from typing import Any

import yaml

from wf_deployer.errors import UserError
from wf_deployer.spec import Job

RESUMABLE = 75
"""The exit code of a run that was interrupted and can go on."""

# An image may lack uv; its installer puts it in ~/.local/bin, which a non-login shell does not search.
_PRELUDE = """\
set -euo pipefail
export PATH="$HOME/.local/bin:$PATH"
"""

_SETUP = (
    _PRELUDE
    + """\
command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
uv sync --all-packages --locked
"""
)


class _Dumper(yaml.SafeDumper):
    """Writes text of several lines as a block, so that scripts stay readable."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)


def render_skypilot(job: Job) -> str:
    """Render a job as the text of a SkyPilot task file.

    The command's words are quoted for bash, so that each arrives as it is. Exit code 75 makes a managed job (`sky jobs
    launch`) start again. Secrets appear by name, without a value.

    Raises:
        UserError: if the job is local, has no `workdir`, or a word of its command is not text.
    """
    if job.resources.cloud == "local":
        raise UserError("a local job has no SkyPilot task: name a cloud")
    if job.workdir is None:
        raise UserError("a cloud job needs a workdir: give the repository's folder")
    for word in job.command:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise UserError(f"argument {word!r} is not UTF-8 text: a task file cannot hold it") from None
    return _header(job) + yaml.dump(_task(job), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)


def _task(job: Job) -> dict[str, Any]:
    task: dict[str, Any] = {
        "name": job.name,
        "resources": _resources(job),
        "workdir": str(job.workdir),
    }
    if job.mounts:
        # Checkpoints are renamed into place, which only the cached mount does as a local disk does.
        task["file_mounts"] = {
            mount.path: {"source": mount.source, "mode": "MOUNT_CACHED"} if mount.is_bucket else mount.source
            for mount in job.mounts
        }
    if job.secrets:
        task["secrets"] = dict.fromkeys(job.secrets)
    task["setup"] = _SETUP
    task["run"] = _PRELUDE + shlex.join(job.command) + "\n"
    return task


def _resources(job: Job) -> dict[str, Any]:
    wanted = job.resources
    resources: dict[str, Any] = {"infra": wanted.cloud if wanted.region is None else f"{wanted.cloud}/{wanted.region}"}
    for key in ("accelerators", "instance_type", "cpus", "memory", "disk_size"):
        value = getattr(wanted, key)
        if value is not None:
            resources[key] = value
    if wanted.spot:
        resources["use_spot"] = True
    resources["job_recovery"] = {"recover_on_exit_codes": [RESUMABLE]}
    return resources


def _header(job: Job) -> str:
    secrets = "".join(f" --secret {name}" for name in job.secrets)
    lines = [
        f"Save this as task.yaml, then: sky jobs launch task.yaml{secrets}",
        f"That starts again after a preemption or exit code {RESUMABLE}; `sky launch` runs it once, on a machine that you stop.",
    ]
    if not any(mount.is_bucket for mount in job.mounts):
        lines.append("Nothing that the job writes outlives its machine: mount a bucket (--mount) and write there to keep it.")
    return "".join(f"# {line}\n" for line in lines)
