"""The SkyPilot task: read by SkyPilot itself, and its scripts run through bash with a recording `uv`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from wf_deployer import CLOUDS, Job, Mount, Resources, UserError, render_skypilot
from wf_deployer.cli import main

ROOT = Path(__file__).resolve().parents[3]

HOSTILE = [
    "a=$(touch pwned)",
    "a=`touch pwned`",
    "a='; touch pwned; '",
    'a="$HOME"',
    "a=x && touch pwned",
    "a=*",
    "a=\\",
    "a=line\nbreak",
    "a= leading and trailing ",
    "a=tab\there\x1b[31m",
    "a=µ…💡",
    "a={b:1,c:[1,2]}",
    "a=#comment: yes",
    "~a",
    "a=",
]

# Reads tasks in the real SkyPilot and says what it understood. It runs in a process of its own, with a scratch HOME.
READ_TASKS = """
import json, sys
import sky
said = {}
for path in sys.argv[1:]:
    task = sky.Task.from_yaml(path)
    (resources,) = task.resources
    said[path] = {
        "name": task.name, "workdir": task.workdir, "setup": task.setup, "run": task.run,
        "cloud": str(resources.cloud).lower(), "region": resources.region, "accelerators": resources.accelerators,
        "instance_type": resources.instance_type, "cpus": resources.cpus, "memory": resources.memory,
        "disk_size": resources.disk_size, "use_spot": resources.use_spot, "job_recovery": resources.job_recovery,
        "file_mounts": task.file_mounts,
        "storage_mounts": {where: [storage.source, storage.mode.value] for where, storage in task.storage_mounts.items()},
        "envs": task.envs, "inline_secrets": sorted(task.secrets),
        "managed_secrets": [ref.name for ref in task.managed_secret_refs],
    }
print("\\n" + json.dumps(said))
"""

# SkyPilot looks an instance type up in a catalogue, which it would download.
CATALOGUE = """\
InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,GpuInfo,Price,SpotPrice,Region,AvailabilityZone,Arch,LocalDiskType,NVMeSupported,LocalDiskSizeGB,LocalDiskCount
g6.xlarge,L4,1.0,4.0,16.0,,0.8,0.3,us-east-1,us-east-1a,x86_64,,,,
"""


def printed(capfd, *arguments: str) -> str:
    assert main(["train", *arguments, "--dry-run"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    return out


def read_with_skypilot(tmp_path: Path, tasks: dict[str, str]) -> dict[str, dict]:
    home = tmp_path / "home"
    (home / ".sky" / "catalogs" / "v8" / "aws").mkdir(parents=True)
    (home / ".sky" / "catalogs" / "v8" / "aws" / "vms.csv").write_text(CATALOGUE)
    paths = {}
    for name, text in tasks.items():
        paths[name] = tmp_path / f"{name}.yaml"
        paths[name].write_text(text)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "SKY", "WANDB"))}
    environment |= {"HOME": str(home), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    command = [sys.executable, "-c", READ_TASKS, *map(str, paths.values())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    return {name: said[str(path)] for name, path in paths.items()}


def test_skypilot_understands_what_was_asked(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "the-key-itself")
    local = tmp_path / "data.txt"
    local.write_text("x")
    tasks = {cloud: printed(capfd, "a=1", "--cloud", cloud, "--accelerators", "L4:1") for cloud in CLOUDS}
    tasks["plain"] = printed(capfd, "--cloud", "aws", "--no-wandb")
    tasks["full"] = printed(
        capfd,
        *["model=tiny", *HOSTILE, "--cloud", "aws", "--region", "us-east-1", "--accelerators", "A100:8"],
        *["--cpus", "8+", "--memory", "32+", "--disk-size", "300", "--spot", "--name", "my-run", "--secret", "HF_TOKEN"],
        *["--mount", "/out=s3://bucket/runs", "--mount", f"/data/a.txt={local}"],
    )
    tasks["instance"] = printed(capfd, "--cloud", "aws", "--instance-type", "g6.xlarge")
    assert "the-key-itself" not in "".join(tasks.values())

    said = read_with_skypilot(tmp_path, tasks)
    for cloud in CLOUDS:
        assert said[cloud]["cloud"] == cloud
        assert said[cloud]["accelerators"] == {"L4": 1}
        assert said[cloud]["job_recovery"]["recover_on_exit_codes"] == [75]
        assert said[cloud]["workdir"] == str(ROOT)
        assert said[cloud]["run"].splitlines()[-1] == "uv run python scripts/train_lightning.py a=1"
        assert said[cloud]["setup"].splitlines()[-1] == "uv sync --all-packages --locked"
        assert said[cloud]["managed_secrets"] == ["WANDB_API_KEY"]
        assert (said[cloud]["envs"], said[cloud]["inline_secrets"]) == ({}, [])
        assert (said[cloud]["file_mounts"], said[cloud]["storage_mounts"]) in (({}, {}), (None, {}))
    full, plain = said["full"], said["plain"]
    assert full["run"] == yaml.safe_load(tasks["full"])["run"]
    assert (full["region"], full["accelerators"], full["cpus"], full["memory"]) == ("us-east-1", {"A100": 8}, "8+", "32+")
    assert (full["disk_size"], full["use_spot"], full["name"]) == (300, True, "my-run")
    assert full["managed_secrets"] == ["WANDB_API_KEY", "HF_TOKEN"]
    assert full["storage_mounts"] == {"/out": ["s3://bucket/runs", "MOUNT_CACHED"]}
    assert full["file_mounts"] == {"/data/a.txt": str(local)}
    assert (plain["region"], plain["accelerators"], plain["use_spot"], plain["name"]) == (None, None, False, "wf-train")
    assert plain["managed_secrets"] == []
    assert said["instance"]["instance_type"] == "g6.xlarge"


def sandbox(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A bin folder that holds only a `uv` that records its arguments, and the environment to run with it."""
    programs = tmp_path / "bin"
    programs.mkdir()
    record = f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n"
    (programs / "uv").write_text(record)
    (programs / "uv").chmod(0o755)
    return programs, {"PATH": str(programs), "HOME": str(tmp_path / "home")}


def bash(script: str, environment: dict[str, str], cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(["/bin/bash", "-c", script], env=environment, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("override", HOSTILE, ids=range(len(HOSTILE)))
def test_an_override_arrives_as_it_was_typed(override, tmp_path, capfd):
    task = yaml.safe_load(printed(capfd, override, "--cloud", "aws"))
    _, environment = sandbox(tmp_path)
    done = bash(task["run"], environment, tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["run", "python", "scripts/train_lightning.py", override]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin"], "something ran that should have been text"


def test_the_scripts_quoting_is_what_protects(tmp_path):
    """Control: the same word without quotes does run."""
    _, environment = sandbox(tmp_path)
    bash("uv run a=$(echo >pwned)", environment, tmp_path)
    assert (tmp_path / "pwned").exists()


def test_the_scripts_pass_a_failure_on(tmp_path, capfd):
    task = yaml.safe_load(printed(capfd, "--cloud", "gcp"))
    programs, environment = sandbox(tmp_path)
    (programs / "uv").write_text("#!/bin/bash\nexit 75\n")
    assert bash(task["run"], environment, tmp_path).returncode == 75
    assert bash(task["setup"], environment, tmp_path).returncode == 75


def test_setup_uses_the_uv_that_is_there_and_installs_one_if_not(tmp_path, capfd):
    setup = yaml.safe_load(printed(capfd, "--cloud", "gcp"))["setup"]
    programs, environment = sandbox(tmp_path)
    done = bash(setup, environment, tmp_path)  # no curl is there to be called
    assert json.loads(done.stdout) == ["sync", "--all-packages", "--locked"], done.stderr

    target = tmp_path / "home" / ".local" / "bin"
    stored = tmp_path / "uv-to-install"
    (programs / "uv").rename(stored)
    (programs / "sh").symlink_to("/bin/sh")
    (programs / "curl").write_text(f"#!/bin/bash\necho '/bin/mkdir -p {target} && /bin/cp {stored} {target}/uv'\n")
    (programs / "curl").chmod(0o755)
    done = bash(setup, environment, tmp_path)
    assert json.loads(done.stdout) == ["sync", "--all-packages", "--locked"], done.stderr

    (target / "uv").unlink()
    (programs / "curl").write_text("#!/bin/bash\nexit 22\n")
    assert bash(setup, environment, tmp_path).returncode == 22


def test_the_header_says_how_to_launch_and_warns_without_a_bucket(capfd):
    without = printed(capfd, "--cloud", "aws")
    assert "sky jobs launch task.yaml --secret WANDB_API_KEY" in without
    assert "--mount" in without
    assert "--mount" not in printed(capfd, "--cloud", "aws", "--mount", "/out=s3://b")


def test_the_workdir_is_the_repository_from_below_and_as_given(capfd, monkeypatch):
    monkeypatch.chdir(ROOT / "packages" / "deployer")
    assert yaml.safe_load(printed(capfd, "--cloud", "aws"))["workdir"] == str(ROOT)
    assert yaml.safe_load(printed(capfd, "--cloud", "aws", "--workdir", "../.."))["workdir"] == str(ROOT)


def test_what_cannot_be_rendered_is_refused():
    with pytest.raises(UserError, match="name a cloud"):
        render_skypilot(Job(command=("true",)))
    with pytest.raises(UserError, match="workdir"):
        render_skypilot(Job(command=("true",), resources=Resources(cloud="aws")))
    with pytest.raises(UserError, match="UTF-8"):
        render_skypilot(Job(command=("a=\udcff",), resources=Resources(cloud="aws"), workdir=ROOT))
    with pytest.raises(UserError, match="this machine"):
        Resources(spot=True)


def test_bucket_and_local_mounts_are_told_apart(tmp_path):
    assert Mount.parse("/out=gs://b").is_bucket
    mount = Mount.parse(f"/in={tmp_path}")
    assert not mount.is_bucket
    assert mount.source == str(tmp_path)
