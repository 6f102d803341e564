"""Runs a job as a process here: its output is ours, signals reach it once, and its exit code is passed on."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from wf_deployer.errors import UserError
from wf_deployer.render import RESUMABLE
from wf_deployer.spec import Job

_FORWARDED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
_FROM_TERMINAL = ("SIGINT", "SIGQUIT", "SIGHUP")


class _Relay:
    """Passes signals on to a child; keeps those that come before it is there."""

    def __init__(self, withheld: frozenset[int]) -> None:
        self._withheld = withheld
        self._early: list[int] = []
        self._child: subprocess.Popen[bytes] | None = None

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        if self._child is None:
            self._early.append(number)
        elif number not in self._withheld:
            self._child.send_signal(number)

    def attach(self, child: subprocess.Popen[bytes]) -> None:
        """Pass on to this child from now on, beginning with what came early."""
        self._child = child
        for number in self._early:
            child.send_signal(number)


def run_local(job: Job) -> int:
    """Run a job's command and wait for it; return the exit code to end with.

    In front of a terminal the child shares our process group, so the terminal itself sends it Ctrl-C and Ctrl-Z; elsewhere
    it has its own group and we forward. Either way it hears each signal once.

    Returns:
        The child's exit code. A child killed by SIGINT or SIGTERM gives 75, by another signal 1; stderr says so.

    Raises:
        UserError: if the command cannot be started.
    """
    terminal = _in_front_of_terminal()
    relay = _Relay(frozenset(_numbers(_FROM_TERMINAL)) if terminal else frozenset())
    sys.stdout.flush()
    sys.stderr.flush()
    with _handling(relay):
        try:
            child = subprocess.Popen(job.command, cwd=job.workdir, process_group=None if terminal else 0)
        except OSError as error:
            raise UserError(
                f"{job.command[0]} cannot be started ({error.strerror or error}): check the path and what is installed"
            ) from None
        relay.attach(child)
        returncode = child.wait()
    return exit_code(returncode)


def exit_code(returncode: int) -> int:
    """Map a child's return code (negative: killed by that signal) to an exit code, and say on stderr what killed it."""
    if returncode >= 0:
        return returncode
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = f"signal {-returncode}"
    if name in ("SIGINT", "SIGTERM"):
        print(f"interrupted: {name} ended the command before it could say where it stood; run it again", file=sys.stderr)
        return RESUMABLE
    hint = " (often: out of memory)" if name == "SIGKILL" else ""
    print(f"error: the command was killed by {name}{hint}", file=sys.stderr)
    return 1


def _in_front_of_terminal() -> bool:
    """Whether our process group is the one that the controlling terminal sends Ctrl-C to."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)


def _numbers(names: tuple[str, ...]) -> list[int]:
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


@contextmanager
def _handling(relay: _Relay) -> Iterator[None]:
    """Hand signals to the relay for a while. What the caller ignores stays ignored, and the child inherits that."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread can hear signals
        yield
        return
    wanted = [number for number in _numbers(_FORWARDED) if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    # A Python function, not SIG_IGN: an ignored signal would stay ignored in the child.
    previous = {number: signal.signal(number, relay) for number in wanted}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
