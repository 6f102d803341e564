"""The job that `wf train` starts: a process here, or the training script in a cloud."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from wf_deployer.errors import UserError
from wf_deployer.locate import TRAINING_SCRIPT, find_repository, is_repository
from wf_deployer.run import module_command
from wf_deployer.spec import Job, Mount, Resources


@dataclass(frozen=True, kw_only=True, slots=True)
class CloudOptions:
    """What `wf train` was told about a cloud job, as typed; each field is the option of that name."""

    accelerators: str | None = None
    instance_type: str | None = None
    cpus: str | None = None
    memory: str | None = None
    disk_size: int | None = None
    region: str | None = None
    spot: bool = False
    name: str | None = None
    mount: tuple[str, ...] = ()
    secret: tuple[str, ...] = ()
    no_wandb: bool = False
    workdir: str | None = None


def train_job(overrides: Sequence[str], cloud: str, options: CloudOptions) -> Job:
    """Build the job that trains with these Hydra overrides.

    Raises:
        UserError: if an override is malformed, a cloud's option is given for a local run, or there is no repository to send.
    """
    words = check_overrides(overrides)
    if cloud == "local":
        for field in fields(options):
            if getattr(options, field.name) not in (None, False, ()):
                option = "--" + field.name.replace("_", "-")
                raise UserError(f"{option} has no effect on a local run: add --cloud NAME, or leave it out")
        return Job(command=module_command("wrinklefree", *words))
    secrets = [*([] if options.no_wandb else ["WANDB_API_KEY"]), *options.secret]
    return Job(
        command=("uv", "run", "python", TRAINING_SCRIPT, *words),
        resources=Resources(
            cloud=cloud,
            region=options.region,
            accelerators=options.accelerators,
            instance_type=options.instance_type,
            cpus=options.cpus,
            memory=options.memory,
            disk_size=options.disk_size,
            spot=options.spot,
        ),
        secrets=tuple(dict.fromkeys(secrets)),
        mounts=tuple(Mount.parse(text) for text in options.mount),
        workdir=_repository(options.workdir),
        name="wf-train" if options.name is None else options.name,
    )


def check_overrides(words: Sequence[str]) -> tuple[str, ...]:
    """Refuse a word that Hydra cannot take; once one of the trainer's own options is there, any word may be that option's value.

    Raises:
        UserError: naming the word.
    """
    if not any(word.startswith("-") for word in words):
        for word in words:
            if "=" not in word and not word.startswith("~"):
                raise UserError(f"override {word!r} is not KEY=VALUE: write for example training.max_steps=100")
    return tuple(words)


def _repository(workdir: str | None) -> Path:
    if workdir is None:
        found = find_repository()
        if found is None:
            raise UserError("no WrinkleFree repository at or above this folder: go into one, or give --workdir DIR")
        return found
    folder = Path(os.path.abspath(Path(workdir).expanduser()))  # noqa: PTH100 (drops "..", keeps symbolic links)
    if not is_repository(folder):
        raise UserError(f"workdir {workdir} is no WrinkleFree repository: give the folder that holds uv.lock and packages/")
    return folder
