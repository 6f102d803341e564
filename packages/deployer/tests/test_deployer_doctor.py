"""What the doctor finds, in folders and environments made for it."""

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from wf_deployer import doctor
from wf_deployer.cli import main
from wf_deployer.doctor import Check, is_healthy, satisfies
from wf_deployer.locate import Package
from wf_deployer.report import print_table

FIELDS = {"name", "group", "required", "ok", "found", "remedy"}


def check(**changes) -> Check:
    return Check(**({"name": "x", "group": "package", "required": True, "ok": True, "found": "1", "remedy": "get x"} | changes))


def test_json_says_what_is_there_and_exits_by_it(capfd):
    code = main(["doctor", "--json"])
    said = json.loads(capfd.readouterr().out)
    assert set(said) == {"ok", "checks"}
    assert all(set(entry) == FIELDS for entry in said["checks"])
    names = [entry["name"] for entry in said["checks"]]
    assert len(names) == len(set(names))
    assert {
        "python",
        "uv",
        "git",
        "accelerator",
        "wandb key",
        "extern/BitNet",
        "wf-deployer",
        "typer",
        "torch",
        "xllamacpp",
    } <= set(names)
    assert any(name.startswith("sglang") for name in names)
    assert any(name.startswith("skypilot") for name in names)
    assert "model hub" not in names
    assert said["ok"] == all(entry["ok"] for entry in said["checks"] if entry["required"])
    assert code == (0 if said["ok"] else 1)
    assert all(entry["ok"] or entry["remedy"] for entry in said["checks"])


@pytest.mark.parametrize(
    ("checks", "code"),
    [([check()], 0), ([check(), check(ok=False, required=False)], 0), ([check(ok=False)], 1)],
    ids=["all-there", "optional-missing", "required-missing"],
)
def test_only_what_is_required_decides_the_exit_code(checks, code, monkeypatch, capfd):
    monkeypatch.setattr("wf_deployer.cli.diagnose", lambda network: checks)
    assert main(["doctor"]) == code
    out = capfd.readouterr().out
    assert ("get x" in out) == any(not entry.ok for entry in checks)
    assert ("Missing and required: x" in out) == (code == 1)


def test_the_table_shows_brackets_as_they_are(capfd):
    print_table([check(found="[bold]1[/bold]", name="[red]")])
    out = capfd.readouterr().out
    assert "[bold]1[/bold]" in out
    assert "[red]" in out


@pytest.mark.parametrize(
    ("installed", "specifier", "holds"),
    [
        ("2.13.0", ">=2.13", True),
        ("2.13.0+cpu", ">=2.13", True),
        ("2.9.1", ">=2.13", False),
        ("5.12.1", "<6,>=5.12", True),
        ("6.0", "<6,>=5.12", False),
        ("2026.10.11549", ">=2026.10.11549", True),
        ("1.3", "==1.3.0", True),
        ("1.3.1", "==1.3.0", False),
        ("1.0", "", True),
        ("1.0", "~=1.0", True),
    ],
)
def test_satisfies(installed, specifier, holds):
    assert satisfies(installed, specifier) is holds


def distribution(folder: Path, name: str, version: str, *requirements: str) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {text}" for text in requirements)]
    (info / "METADATA").write_text("\n".join(lines) + "\n")


def test_dependencies_come_from_metadata_without_extras_and_with_versions(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    distribution(tmp_path, "owner-a", "1", "dep_one<3,>=2", "dep-two>=1; extra == 'more'", "bitnet-arch", "gone[x]>=1", "torch>=1")
    distribution(tmp_path, "dep-one", "1.5")
    found = {entry.name: entry for entry in doctor.check_dependencies(["owner-a", "absent-owner"])}
    assert not found["dep-one"].ok
    assert found["dep-one"].found == "1.5, but <3,>=2 is needed"
    assert found["gone"].found == "not installed"
    assert found["gone"].remedy == "uv sync --all-packages"
    assert "dep-two" not in found
    assert "bitnet-arch" not in found
    distribution(tmp_path, "owner-b", "1", "dep-three>=2")
    distribution(tmp_path, "dep-three", "2.0")
    assert {entry.name: entry.ok for entry in doctor.check_dependencies(["owner-b"])}["dep-three"]


def test_a_package_must_be_installed_importable_and_startable(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    package = Package(distribution="toy-pack", module="toy_pack")
    assert doctor.check_package(package).found == "not installed"
    distribution(tmp_path, "toy-pack", "3.1")
    assert "cannot be imported" in doctor.check_package(package).found
    (tmp_path / "toy_pack").mkdir()
    assert "cannot be imported" in doctor.check_package(package).found, "a bare folder is no package"
    (tmp_path / "toy_pack" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    assert doctor.check_package(package).found == "3.1, without its command"
    (tmp_path / "toy_pack" / "__main__.py").touch()
    assert doctor.check_package(package) == check(name="toy-pack", found="3.1", remedy="uv sync --all-packages")


@pytest.mark.parametrize(
    ("files", "ok", "named"),
    [
        ({}, False, "CPU"),
        ({"dev/nvidia0": "", "dev/nvidiactl": ""}, True, "nvidia0"),
        (
            {"dev/nvidiactl": "", "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Kernel Module  550.54.15  Tue"},
            True,
            "550.54.15",
        ),
        ({"dev/kfd": ""}, True, "AMD"),
    ],
    ids=["none", "card", "driver", "amd"],
)
def test_an_accelerator_is_a_device_or_a_driver(files, ok, named, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = doctor.check_accelerator(tmp_path)
    assert found.ok is ok
    assert named in found.found


def test_a_wandb_key_is_reported_and_never_shown(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert not doctor.check_wandb_key().ok
    (tmp_path / "netrc").write_text("machine example.org login user password hunter2\n")
    assert not doctor.check_wandb_key().ok
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password hunter2\n")
    assert doctor.check_wandb_key().ok
    (tmp_path / "netrc").write_text("machine broken [\n")
    assert not doctor.check_wandb_key().ok
    monkeypatch.setenv("WANDB_API_KEY", "hunter3")
    assert doctor.check_wandb_key().ok
    main(["doctor", "--json"])
    assert "hunter" not in capfd.readouterr().out


def test_the_submodule_counts_when_it_holds_something(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "packages" / "training").mkdir(parents=True)
    (tmp_path / "packages" / "training" / "pyproject.toml").touch()
    (tmp_path / "uv.lock").touch()
    (tmp_path / "extern" / "BitNet").mkdir(parents=True)
    assert not doctor.check_submodule().ok
    assert doctor.check_submodule().remedy == "git submodule update --init extern/BitNet"
    (tmp_path / "extern" / "BitNet" / "README.md").touch()
    assert doctor.check_submodule().ok


def test_a_tool_must_be_there_and_answer(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.check_tool("tool", "get it").found == "not on the PATH"
    (tmp_path / "tool").write_text("#!/bin/sh\necho tool 9.9\n")
    (tmp_path / "tool").chmod(0o755)
    assert doctor.check_tool("tool", "get it") == check(
        name="tool", group="machine", required=False, found="tool 9.9", remedy="get it"
    )
    (tmp_path / "tool").write_text("#!/bin/sh\nexit 3\n")
    assert not doctor.check_tool("tool", "get it").ok


def test_disks_look_where_results_and_models_go(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "not" / "yet"))
    here, cache = doctor.check_disks()
    assert str(tmp_path) in here.found
    assert str(tmp_path / "not" / "yet" / "hub") in cache.found
    assert "GiB free" in cache.found


class _Hub(BaseHTTPRequestHandler):
    answer = 200
    asked: list[str]

    def do_HEAD(self):
        type(self).asked.append(self.path)
        self.send_response(self.answer)
        self.end_headers()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(monkeypatch):
    _Hub.asked, _Hub.answer = [], 200
    server = HTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield _Hub
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_hub_is_asked_only_with_network(hub, capfd):
    main(["doctor", "--json"])
    assert hub.asked == []
    capfd.readouterr()
    main(["doctor", "--json", "--network"])
    assert len(hub.asked) == 1
    (found,) = [entry for entry in json.loads(capfd.readouterr().out)["checks"] if entry["name"] == "model hub"]
    assert found["ok"]
    assert not found["required"]


def test_a_hub_that_refuses_answers_and_one_that_is_ill_or_gone_does_not(hub, monkeypatch):
    hub.answer = 403
    assert doctor.check_hub().ok
    hub.answer = 503
    assert not doctor.check_hub().ok
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in doctor.check_hub().found
    monkeypatch.setenv("HF_ENDPOINT", "file:///etc/passwd")
    assert "no http address" in doctor.check_hub().found


def test_health_of_nothing_and_from_a_deleted_folder(tmp_path):
    assert is_healthy([])
    leave = "import os, sys; os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone')"
    script = f"{leave}; from wf_deployer.cli import main; sys.exit(main(['doctor']))"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert "Traceback" not in done.stderr
    assert done.returncode in (0, 1)
    assert "disk (here)" in done.stdout
