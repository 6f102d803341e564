"""What a command's DIR|FILE argument is, and llama.cpp's engine on it."""

import errno
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from bitnet_arch import UserError, open_weights
from bitnet_arch.gguf import choose_architecture
from bitnet_arch.gguf.architectures import OURS
from bitnet_arch.pretrained import cache_directory

MODEL_FILES = ("*.json", "*.safetensors", "*.jinja")
GGUF_MAGIC = b"GGUF"
PROMPT_CACHE_MIB = 256
EXPORT_REVISION = 5
"""Raised whenever a file or its proof would come out differently, so that no file of an older exporter is taken from the cache."""


@dataclass(frozen=True)
class ModelPath:
    """A model that exists: a directory with `config.json`, or a file that begins like GGUF."""

    path: Path
    kind: Literal["directory", "gguf"]

    @property
    def name(self) -> str:
        """A short name without the folders above it, which are nobody else's business."""
        resolved = self.path.resolve()
        return resolved.stem if self.kind == "gguf" else resolved.name


def resolve_model(path: Path | str) -> ModelPath:
    """Say what a path holds.

    Raises:
        UserError: if there is nothing, or neither a model directory nor a GGUF file.
    """
    if path == "":
        raise UserError("the model's path is empty: give a model directory or a .gguf file")
    try:
        path = Path(path).expanduser()
        if path.is_dir():
            if not (path / "config.json").is_file():
                raise UserError(f"{path} is not a model directory: it has no config.json")
            return ModelPath(path, "directory")
        if not path.is_file():
            raise UserError(f"{path} does not exist: give a model directory or a .gguf file")
        with path.open("rb") as file:
            magic = file.read(len(GGUF_MAGIC))
    except OSError as error:
        shown = path if error.errno != errno.ENAMETOOLONG else f"{str(path)[:60]}..."
        raise UserError(f"{shown} cannot be read ({error.strerror}): check its name and permissions") from None
    except RuntimeError:  # of "~": a user that there is not
        raise UserError(f"{path} begins with no user's home: write the whole path") from None
    if magic != GGUF_MAGIC:
        raise UserError(f"{path} is not a GGUF file: export one with `python -m wrinklefree_inference export DIR --out FILE`")
    return ModelPath(path, "gguf")


def directory_digest(directory: Path) -> str:
    """Return the SHA-256 (hex) of a model directory's files and of the exporter's revision."""
    digest = hashlib.sha256(f"{EXPORT_REVISION} {version('bitnet-arch')} {version('wrinklefree-inference')}\n".encode())
    files = sorted({file for pattern in MODEL_FILES for file in directory.glob(pattern) if file.is_file()})
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def exported(directory: Path, say: Callable[[str], None]) -> Path:
    """Return a GGUF file of a model directory that passed the export's gate: from the user's cache, else exported there.

    The cache is keyed by the content of the directory's files, so a file in it can never belong to another state of the model.

    Args:
        directory: a master or packed model directory.
        say: called with one line at each stage of an export, and if the gate could not decide.

    Raises:
        ParityError: if the file does not compute what was trained.
        UserError: if the directory is not ternary or cannot be exported.
    """
    with open_weights(directory) as reader:
        if reader.form == "float":
            raise UserError(f"{directory} is not ternary: convert it with `python -m bitnet_arch convert {directory} --out DIR`")
        if choose_architecture(reader) == OURS:
            raise UserError(f"{directory} is a model that llama.cpp cannot compute, and only llama.cpp serves: use `generate`")
    out = cache_directory() / "gguf" / directory_digest(directory)[:32] / "model.gguf"
    if not out.is_file() or _verdict(out) is None:
        from wrinklefree_inference.export import export_proven

        say(f"exporting {directory} to {out}")
        stages: set[str] = set()

        def on_progress(stage: str, done: int, of: int) -> None:
            if stage not in stages:
                stages.add(stage)
                say(f"  {stage}")

        export_proven(directory, out, kind="auto", progress=on_progress)
    status, reason = _verdict(out) or ("without a report", "")
    if status != "proven":
        say(f"note: the exported file is {status}: {reason}")
    return out


def _verdict(file: Path) -> tuple[str, str] | None:
    """Return (status, reason) of a file's parity report, or None if there is no readable one."""
    try:
        report = json.loads(file.with_name(f"{file.name}.parity.json").read_text())
        return str(report["status"]), str(report.get("reason", ""))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How llama.cpp's server is started.

    Attributes:
        host: address to listen on.
        port: 0 takes a free one.
        context: tokens that one request may use, prompt included; the engine caps it at what the model was trained for.
        parallel: requests that are decoded at once; more of them wait.
        alias: the model's name in answers.
        keys: API keys, any of which a request must carry; none: no key is asked for.
        verbose: the engine logs to stderr.
    """

    host: str = "127.0.0.1"
    port: int = 0
    context: int = 4096
    parallel: int = 1
    alias: str = "model"
    keys: Sequence[str] = ()
    verbose: bool = False


def start_engine(file: Path, options: EngineOptions) -> Any:
    """Load a GGUF file into llama.cpp's server (`xllamacpp.Server`), which stops when the object is deleted.

    Raises:
        UserError: if the engine cannot load the file or listen.
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.hostnames, params.port = [options.host], options.port
    params.n_ctx, params.n_parallel = options.context * options.parallel, options.parallel
    params.model_alias, params.api_keys = {options.alias}, list(options.keys)
    params.verbosity = 3 if options.verbose else 0
    # No page of another site may talk to a local server, and nothing but the API is served.
    params.cors_origins, params.ui, params.endpoint_slots = "", False, False
    # The context is what was asked for, never what happens to fit.
    params.fit_params = False
    params.cache_ram_mib = PROMPT_CACHE_MIB
    # Between pings a stream sleeps, and a stop waits for it: the default of 30 s would be the time that Ctrl-C takes.
    params.sse_ping_interval = 1
    if threads := os.environ.get("OMP_NUM_THREADS", ""):
        if not threads.isdecimal() or int(threads) < 1:
            raise UserError(f"OMP_NUM_THREADS is {threads!r}: set it to a number of threads or unset it")
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
    try:
        return xllamacpp.Server(params)
    except RuntimeError:
        raise UserError(
            f"llama.cpp could not load {file}: it is damaged or of an architecture that it does not know; export it again"
        ) from None
