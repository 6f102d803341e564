"""Real child processes: exit codes, signals, terminals, and one real conversion."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from wf_deployer import Job, UserError
from wf_deployer.backends.local import run_local
from wf_deployer.cli import main

# Stands before the installed package on the path; says when it is ready, counts what it hears for a while, and ends as told.
CHILD = textwrap.dedent("""
    import os, signal, sys, time
    from pathlib import Path

    settings = dict(word.split("=", 1) for word in sys.argv[1:])
    if "exit" in settings:
        print(os.getcwd())
        sys.exit(int(settings["exit"]))
    if "die" in settings:
        if int(settings["die"]) != signal.SIGKILL:
            signal.signal(int(settings["die"]), signal.SIG_DFL)
        os.kill(os.getpid(), int(settings["die"]))
    heard = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: heard.append(signal.Signals(number).name))
    ready = Path(settings["ready"])
    ready.with_suffix(".part").write_text(str(os.getpid()))
    ready.with_suffix(".part").rename(ready)
    give_up = time.monotonic() + 60
    while not heard and time.monotonic() < give_up:
        time.sleep(0.01)
    Path(settings["heard"] + ".first").touch()
    until = time.monotonic() + 1.0
    while time.monotonic() < until:
        time.sleep(0.01)
    Path(settings["heard"]).write_text(" ".join(heard))
    sys.exit(75)
""")


@pytest.fixture
def environment(tmp_path):
    package = tmp_path / "path" / "wrinklefree"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(CHILD)
    path = os.pathsep.join(filter(None, [str(tmp_path / "path"), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path}


# The runner may have been started with interrupts ignored, and children inherit that.
LISTENING = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from wf_deployer.cli import main
sys.exit(main())
"""


def wf(*arguments: str) -> list[str]:
    return [sys.executable, "-c", LISTENING, *arguments]


@contextmanager
def started(command: list[str], **options: Any) -> Iterator[subprocess.Popen]:
    """A process in a session of its own, which a test that fails does not wait for."""
    with subprocess.Popen(command, start_new_session=True, **options) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def asleep(process: subprocess.Popen, heard: Path) -> Iterator[None]:
    """Keep wf stopped while a signal is sent, so that what the child hears by itself does not merge with what wf forwards."""
    os.kill(process.pid, signal.SIGSTOP)
    yield
    give_up = time.monotonic() + 0.3
    while not heard.with_name("heard.first").exists() and time.monotonic() < give_up:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGCONT)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    give_up = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, "wf ended before its child was ready"
        assert time.monotonic() < give_up, "the child never became ready"
        time.sleep(0.01)


@pytest.mark.parametrize("code", [0, 1, 2, 7, 75])
def test_run_local_passes_the_exit_code_through(code):
    assert run_local(Job(command=(sys.executable, "-c", f"import sys; sys.exit({code})"))) == code


def test_run_local_runs_in_the_workdir_with_our_output(tmp_path, capfd):
    command = (sys.executable, "-c", "import os, sys; print(os.getcwd()); print('complaint', file=sys.stderr)")
    assert run_local(Job(command=command, workdir=tmp_path)) == 0
    out, err = capfd.readouterr()
    assert Path(out.strip()).samefile(tmp_path)
    assert err == "complaint\n"


def test_a_command_that_cannot_start_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match="cannot be started"):
        run_local(Job(command=(str(tmp_path / "absent"),)))


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    run_local(Job(command=(sys.executable, "-c", "")))
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("code", [0, 3, 75])
def test_wf_ends_with_its_childs_code(code, environment, tmp_path):
    done = subprocess.run(wf("train", f"exit={code}"), env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert Path(done.stdout.strip()).samefile(tmp_path)


@pytest.mark.parametrize(
    ("number", "code", "named"),
    [
        (signal.SIGINT, 75, "SIGINT"),
        (signal.SIGTERM, 75, "SIGTERM"),
        (signal.SIGKILL, 1, "out of memory"),
        (signal.SIGABRT, 1, "SIGABRT"),
    ],
)
def test_a_child_killed_by_a_signal_is_named(number, code, named, environment):
    done = subprocess.run(wf("train", f"die={int(number)}"), env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert named in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["to-wf", "to-its-group"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["int", "term"])
def test_a_signal_reaches_the_child_once(number, send, environment, tmp_path):
    ready, heard = tmp_path / "ready", tmp_path / "heard"
    command = wf("train", f"ready={ready}", f"heard={heard}")
    with started(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        wait_for(ready, process)
        with asleep(process, heard):
            send(process.pid, number)
        _, err = process.communicate(timeout=60)
    assert heard.read_text() == number.name
    assert process.returncode == 75
    assert err == ""


def test_ctrl_c_on_a_terminal_reaches_the_child_once(environment, tmp_path):
    ready, heard = tmp_path / "ready", tmp_path / "heard"
    leader, follower = os.openpty()
    # A session leader without a terminal takes the first one that it opens as its own.
    take = (
        f"import os, sys; os.open({os.ttyname(follower)!r}, os.O_RDWR); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    command = [sys.executable, "-c", take, *wf("train", f"ready={ready}", f"heard={heard}")[1:]]
    streams = {"stdin": follower, "stdout": follower, "stderr": follower}
    with started(command, env=environment, **streams) as process:
        os.close(follower)
        wait_for(ready, process)
        assert os.getpgid(int(ready.read_text())) == process.pid, "before a terminal the child shares wf's group"
        with asleep(process, heard):
            os.write(leader, b"\x03")
        assert process.wait(timeout=60) == 75
    os.close(leader)
    assert heard.read_text() == "SIGINT"


def test_an_interrupted_doctor_ends_with_75(monkeypatch, capfd):
    def interrupt(network):
        raise KeyboardInterrupt

    monkeypatch.setattr("wf_deployer.cli.diagnose", interrupt)
    assert main(["doctor"]) == 75
    assert capfd.readouterr().err.startswith("interrupted")


@pytest.mark.slow
def test_convert_for_real(tmp_path, capfd):
    testing = pytest.importorskip("bitnet_arch.testing")
    source, out, text = tmp_path / "llama", tmp_path / "ternary", tmp_path / "sample.txt"
    testing.tiny_llama().save_pretrained(source)
    testing.tiny_tokenizer().save_pretrained(source)
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    assert main(["convert", str(source), "--out", str(out), "--calibration", str(text), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["form"] == "master"
    assert json.loads((out / "config.json").read_text())["model_type"] == "bitnet"
