"""Every preset as the command that a person types, its Python kept from the network.

The guard is in Python's `socket`: what Python code opens, and the processes of Python that it starts. What native code opens is not
held by it; the machine may have a network.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from wrinklefree.cli import group_choices

ROOT = Path(__file__).parents[2]
REFUSED = "this test lets no Python code leave the machine"
# Imported by every Python process at its start. wandb's own service is reached through a socket of this machine.
GUARD = f"""
import socket

def guarded(inner):
    def connect(self, address):
        if self.family != socket.AF_UNIX and str(address[0]) not in ("127.0.0.1", "::1", "localhost"):
            raise OSError("{REFUSED}")
        return inner(self, address)
    return connect

def refused(host, *arguments, inner=socket.getaddrinfo, **options):
    if host not in (None, "", "127.0.0.1", "::1", "localhost", b"localhost"):
        raise OSError("{REFUSED}")
    return inner(host, *arguments, **options)

socket.socket.connect, socket.socket.connect_ex = guarded(socket.socket.connect), guarded(socket.socket.connect_ex)
socket.getaddrinfo = refused
"""


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """An environment in which Python's `socket` reaches no other machine; its data cache is filled by the first run."""
    folder = tmp_path_factory.mktemp("offline")
    (folder / "sitecustomize.py").write_text(GUARD)
    kept = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "WANDB_API_KEY", "WANDB_MODE")}
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    return kept | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "WF_CACHE": str(folder / "cache")}


def test_the_guard_lets_no_python_code_out(offline):
    code = "import urllib.request; urllib.request.urlopen('http://192.0.2.1/')"
    done = subprocess.run([sys.executable, "-c", code], env=offline, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert REFUSED in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("preset", group_choices()["training"])
def test_a_presets_whole_command_finishes_offline(preset, offline, tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "train_lightning.py"), "model=tiny", f"training={preset}"]
    command += ["training.max_steps=3", "training.threads=1", f"output_dir={tmp_path / 'run'}"]
    done = subprocess.run(command, env=offline, capture_output=True, text=True, cwd=tmp_path, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert REFUSED not in done.stderr
    directory = tmp_path / "run"
    summary = json.loads((directory / "summary.json").read_text())
    report = json.loads((directory / "model.gguf.parity.json").read_text())
    assert summary["gguf"]["status"] == report["status"] in ("proven", "unproven")
    assert (directory / "model.gguf").stat().st_size > 1_000_000
    assert (directory / "loss.png").is_file()
    assert len((directory / "metrics.jsonl").read_text().splitlines()) == 3
    assert ("a float model of this shape, made on the spot in 3 steps" in done.stderr) == (summary["teacher"] is not None)
    assert f"gguf:   {directory / 'model.gguf'} ({report['status']}" in done.stdout
