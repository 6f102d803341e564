"""The `export` command of wrinklefree-inference, run beside a training that imports no app."""

import importlib
import importlib.util
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any, Self

import torch
from bitnet_arch import UserError
from bitnet_arch.gguf import export_gguf
from bitnet_arch.parity import no_engine

from wrinklefree.files import write_json

APP = "wrinklefree_inference"
LOOK_SECONDS = 5.0
"""How often a process that waits looks whether the one that it waits for is still there."""
GRACE_SECONDS = 1.0, 10.0
"""What an export that is broken off has until it is interrupted, and then to take its temporary files away."""
RUN = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module({app!r}, run_name="__main__", alter_sys=True)
"""
"""`python -m`, but for a SIGINT that this process ignores, as a job in the background of a shell does, and would hand on."""


class Exporter:
    """Writes a GGUF file with its parity report, in a process of its own: an engine that dies there does not take the run along.

    Use as a context manager: an export that has not ended is broken off at the end of the block.
    """

    def __init__(self) -> None:
        self._out = Path()
        self._written: dict[str, Any] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        # On a terminal the command's own progress bar and error are shown as they come.
        self._log: IO[bytes] | None = None if sys.stderr.isatty() else tempfile.TemporaryFile()  # noqa: SIM115

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        if self._log is not None:
            self._log.close()

    def start(self, model_directory: Path, out: Path) -> None:
        """Begin the export. Where the command is not installed the file is written now, and labelled unproven.

        Args:
            model_directory: what to export.
            out: the file to write.
        """
        self._out = out
        if importlib.util.find_spec(APP) is None:
            self._written = _without_engine(model_directory, out)
        else:
            self._launch(["export", str(model_directory), "--out", str(out)])

    def result(self) -> dict[str, Any]:
        """Wait for what was started.

        Returns:
            `{"status": "proven" | "unproven" | "failed" | "refused", "note": one sentence, "runs": whether llama.cpp runs it}`.
        """
        if self._written is not None:
            return self._written
        code, sidecar = self._join(None), _sidecar(self._out)
        if code == 0:
            report = json.loads(sidecar.read_text())
            note = report["reason"] or f"see {sidecar.name}"
            return {"status": report["status"], "note": note, "runs": no_engine(self._out) is None}
        note = self._last_line() or f"export ended with code {code}"
        note = note.removeprefix("error: ").removeprefix(f"{self._out.name} was not written: ")
        return {"status": "refused" if code == 2 else "failed", "note": note, "runs": False}

    def _last_line(self) -> str:
        if self._log is None:
            return ""
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""

    def _launch(self, arguments: list[str]) -> None:
        command = [sys.executable, "-c", RUN.format(app=APP), *arguments]
        nothing = subprocess.DEVNULL
        self._process = subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=self._log)

    def _join(self, timeout: float | None) -> int | None:
        """Wait for the process; return its exit code, negative for a signal, or None if it goes on."""
        assert self._process is not None
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def _stop(self) -> None:
        if self._process is not None:
            _end(self._process.pid, self._join)


class WaitingExporter(Exporter):
    """An exporter whose process is there from the start: a copy of this one (a fork), which waits for `start`.

    Its imports take longer than the proof of a small model, and nearly all of them are this process's own: the copy shares them,
    and costs little more memory than what this process changes of them. It ends with this process, however that ends.

    It has to be made before anything is computed: threads, such as torch's, are not copied, and the copy would wait for them.
    """

    def __init__(self) -> None:
        super().__init__()
        context = multiprocessing.get_context("fork")
        received, self._orders = context.Pipe(duplex=False)
        log = None if self._log is None else self._log.fileno()
        self._copy = context.Process(target=_wait_and_run, args=(received, self._orders, log, os.getpid()), daemon=True)
        self._copy.start()
        received.close()

    @staticmethod
    def possible() -> bool:
        """Whether a copy can be made of this process, in which nothing has been computed, and would have something to do."""
        # Other systems' own libraries do not survive a fork, nor does an accelerator's driver once it runs.
        return sys.platform == "linux" and not torch.cuda.is_initialized() and importlib.util.find_spec(APP) is not None

    def _launch(self, arguments: list[str]) -> None:
        self._orders.send(arguments)

    def _join(self, timeout: float | None) -> int | None:
        self._copy.join(timeout)
        return self._copy.exitcode

    def _stop(self) -> None:
        self._orders.close()  # a copy that still waits ends by that
        assert self._copy.pid is not None
        _end(self._copy.pid, self._join)


def _end(process: int, join: Callable[[float | None], int | None]) -> None:
    """Wait for a process that is about to end; interrupt it and kill it if it does not."""
    # Not at once: a Ctrl-C on a terminal has reached it already, and a second one would keep it from tidying up.
    for number, grace in zip((signal.SIGINT, signal.SIGKILL), GRACE_SECONDS, strict=True):
        if join(grace) is not None:
            return
        os.kill(process, number)
    join(None)


def _wait_and_run(received: Connection, orders: Connection, log: int | None, parent: int) -> None:
    """Run the command with the arguments that are received, as the program of this process, or end if none come.

    Args:
        received: where arguments come from.
        orders: its other end, which is the parent's: as long as anybody has it open, its end is not seen.
        log: what takes stderr, a file descriptor; None leaves it.
        parent: the process that this one is copied from.
    """
    orders.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which may train on to its next checkpoint
    nothing = os.open(os.devnull, os.O_RDWR)
    for own, given in ((0, nothing), (1, nothing), (2, log)):
        if given is not None:
            os.dup2(given, own)
    # Whatever this process's own streams are: a notebook's, say.
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    importlib.import_module(f"{APP}.cli")
    while not received.poll(LOOK_SECONDS):
        if os.getppid() != parent:  # another copy of it, such as a loader's worker, may still have `orders` open
            return
    try:
        sys.argv = [APP, *received.recv()]
    except EOFError:
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    runpy.run_module(APP, run_name="__main__", alter_sys=True)


def _without_engine(model_directory: Path, out: Path) -> dict[str, Any]:
    note = "wrinklefree-inference is not installed, so no engine has run this file"
    try:
        export_gguf(model_directory, out)
    except UserError as error:
        return {"status": "refused", "note": str(error), "runs": False}
    write_json(_sidecar(out), {"status": "unproven", "reason": note})
    return {"status": "unproven", "note": note, "runs": no_engine(out) is None}


def _sidecar(out: Path) -> Path:
    return out.with_name(out.name + ".parity.json")
