"""The export beside a run: its process, how it ends, and what of it a run is told. A made-up app stands for the real one."""

import atexit
import gc
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from bitnet_arch import ConversionConfig, convert_model, save_master
from bitnet_arch.testing import tiny_llama, tiny_tokenizer
from wrinklefree import exporting
from wrinklefree.cli import main
from wrinklefree.exporting import Exporter, WaitingExporter

APP = "made_up_app"
LAST = """
import os, signal, sys, time
from pathlib import Path
out = Path(sys.argv[sys.argv.index("--out") + 1])
print("seen by nobody")
match sys.argv[2]:
    case "refused":
        print("error: no room", file=sys.stderr)
        sys.exit(2)
    case "failed":
        print("error: out.gguf was not written: engine.mean_kl is 0.3", file=sys.stderr)
        sys.exit(1)
    case "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    case "slow":
        try:
            out.write_text("begun")
            time.sleep(600)
        except KeyboardInterrupt:
            out.write_text("tidied")
    case model:
        from bitnet_arch.gguf import export_gguf
        export_gguf(model, out)
        out.with_name("out.gguf.parity.json").write_text('{"status": "proven", "reason": ""}')
"""


@pytest.fixture(autouse=True)
def app(tmp_path, monkeypatch):
    folder = tmp_path / "apps" / APP
    folder.mkdir(parents=True)
    for name, content in (("__init__", ""), ("cli", ""), ("__main__", LAST)):
        (folder / f"{name}.py").write_text(content)
    monkeypatch.syspath_prepend(folder.parent)
    monkeypatch.setenv("PYTHONPATH", str(folder.parent))
    monkeypatch.setattr(exporting, "APP", APP)
    monkeypatch.setattr(exporting, "LOOK_SECONDS", 0.05)


forked = pytest.mark.skipif(sys.platform != "linux", reason="the copy is made on Linux alone")
both = pytest.mark.parametrize("kind", [Exporter, pytest.param(WaitingExporter, marks=forked)])


def awaited(condition):
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ended(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"  # nobody may be there to bury it
    except FileNotFoundError:
        return True


@both
@pytest.mark.parametrize(
    ("case", "status", "note"),
    [
        ("refused", "refused", "no room"),
        ("failed", "failed", "engine.mean_kl is 0.3"),
        ("dies", "failed", f"export ended with code {-signal.SIGKILL}"),
    ],
)
def test_an_export_that_ends_badly_takes_nothing_along(kind, case, status, note, tmp_path, capfd):
    with kind() as exporter:
        exporter.start(Path(case), tmp_path / "out.gguf")
        assert exporter.result() == {"status": status, "note": note, "runs": False}
    assert "seen by nobody" not in capfd.readouterr().out


@forked
def test_the_copy_exports_what_there_is_when_it_is_told_to(tmp_path):
    with WaitingExporter() as exporter:
        save_master(convert_model(tiny_llama(), ConversionConfig(gain="one")), tmp_path / "model", tiny_tokenizer())
        exporter.start(tmp_path / "model", tmp_path / "out.gguf")
        assert exporter.result() == {"status": "proven", "note": "see out.gguf.parity.json", "runs": True}
    assert (tmp_path / "out.gguf").stat().st_size > 1000


@both
def test_an_export_is_broken_off_with_its_block_and_tidies_up(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "GRACE_SECONDS", (0.0, 240.0))
    out = tmp_path / "out.gguf"

    def breaks_off():
        with kind() as exporter:
            exporter.start(Path("slow"), out)
            awaited(lambda: out.is_file() and out.read_text() == "begun")
            raise RuntimeError("the sample failed")

    with pytest.raises(RuntimeError, match="the sample failed"):
        breaks_off()
    assert out.read_text() == "tidied"


@forked
def test_a_copy_that_is_never_told_to_ends_with_the_block():
    with WaitingExporter() as exporter:
        copy = exporter._copy
        os.kill(copy.pid, signal.SIGINT)  # as Ctrl-C does, by which a run goes on to its next checkpoint
        copy.join(0.2)
        assert copy.is_alive()
    assert copy.exitcode == 0


def hold(connection, also):
    exporter = WaitingExporter()
    if also:  # as a loader's worker does
        other = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
        other.start()
        connection.send(other.pid)
    connection.send(exporter._copy.pid)
    time.sleep(600)


@forked
@pytest.mark.parametrize("also", [False, True])
def test_a_run_that_is_killed_leaves_no_copy(also):
    context = multiprocessing.get_context("fork")
    mine, its = context.Pipe()
    process = context.Process(target=hold, args=(its, also))
    process.start()
    other, copy = mine.recv() if also else None, mine.recv()
    try:
        assert not ended(copy)
        process.kill()
        process.join()
        awaited(lambda: ended(copy))
    finally:
        if other is not None:
            assert not ended(other)
            os.kill(other, signal.SIGKILL)


@pytest.mark.parametrize("command", [True, False])
def test_a_copy_is_made_by_the_command_and_not_by_a_call_in_a_process_that_may_have_computed(command, monkeypatch, capsys):
    class Made(WaitingExporter):
        def __init__(self):
            raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "WaitingExporter", Made)
    monkeypatch.setattr(Made, "possible", staticmethod(lambda: True))
    frozen = []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(True))
    monkeypatch.setattr(atexit, "register", lambda _: None)
    mistaken = ["model=tiny", "resume=/nowhere/step-1.ckpt"]
    monkeypatch.setattr(sys, "argv", ["train_lightning.py", *mistaken])
    assert main(None if command else mistaken) == (75 if command else 2)
    assert frozen == ([True] if command else [])


def test_no_copy_is_made_where_it_could_not_work(monkeypatch):
    assert WaitingExporter.possible() == (sys.platform == "linux")
    with monkeypatch.context() as patch:
        patch.setattr(exporting.torch.cuda, "is_initialized", lambda: True)
        assert not WaitingExporter.possible()
    monkeypatch.setattr(exporting, "APP", "an_app_that_is_not_installed")
    assert not WaitingExporter.possible()
