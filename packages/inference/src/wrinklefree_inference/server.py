"""`serve`: an OpenAI-compatible server (llama.cpp's own) on a GGUF file or a model directory."""

import argparse
import errno
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bitnet_arch import UserError
from bitnet_arch.parity import ParityError

from wrinklefree_inference.models import EngineOptions, exported, resolve_model, start_engine

KEY_VARIABLE = "WF_API_KEY"
EXAMPLES = """endpoints: /v1/models, /v1/completions, /v1/chat/completions (all with streaming), /health

examples:
  python -m wrinklefree_inference serve run/model.gguf --port 8080
  curl http://127.0.0.1:8080/v1/completions -d '{"prompt": "Once", "max_tokens": 20}'
"""


def add_parser(subparsers: Any) -> None:
    """Add `serve` to a command line; its `run` default takes the parsed namespace."""
    parser = subparsers.add_parser(
        "serve",
        help="answer over an OpenAI-compatible API",
        description="Serve a GGUF file, or a model directory by exporting and proving it first (kept in the user's cache).",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="a .gguf file or a model directory")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8080, help="port to listen on; 0 takes a free one (8080)")
    parser.add_argument("--alias", help="the model's name in answers (default: the file's or directory's name)")
    parser.add_argument("--context", type=int, default=4096, help="tokens one request may use, at most what the model knows (4096)")
    parser.add_argument("--parallel", type=int, default=2, help="requests decoded at once (2); more of them wait")
    parser.add_argument("--api-key-file", type=Path, help=f"a file with one API key a line (or set {KEY_VARIABLE})")
    parser.add_argument("--verbose", action="store_true", help="show the engine's log on stderr")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM; return 0, or 1 if the export of a directory was refused.

    Raises:
        UserError: for a mistake in the arguments or the model, or an address that is taken.
    """
    for name, least, value in (("port", 0, arguments.port), ("context", 8, arguments.context), ("parallel", 1, arguments.parallel)):
        if value < least:
            raise UserError(f"--{name} is {value}: give at least {least}")
    model = resolve_model(arguments.model)
    keys = api_keys(arguments.api_key_file)
    check_address(arguments.host, arguments.port)
    try:
        file = model.path if model.kind == "gguf" else exported(model.path, _say)
    except ParityError as error:
        _say(f"error: {error}")
        return 1
    options = EngineOptions(
        host=arguments.host,
        port=arguments.port,
        context=arguments.context,
        parallel=arguments.parallel,
        alias=arguments.alias or model.name,
        keys=keys,
        verbose=arguments.verbose,
    )
    with stop_signal() as stop:
        try:
            server = start_engine(file, options)
        except UserError:
            check_address(options.host, options.port)  # taken in the meantime: that is the truer reason
            raise
        if not keys and not _is_loopback(arguments.host):
            _say(f"warning: anyone who reaches {arguments.host} may use this server; set {KEY_VARIABLE}")
        print(f"serving {options.alias} at {server.listening_address}/v1 (Ctrl-C stops)", flush=True)
        stop.wait()
        print("stopping", flush=True)
        del server  # closes the connections and frees the port
    return 0


@contextmanager
def stop_signal() -> Iterator[threading.Event]:
    """Yield an event that SIGINT and SIGTERM set, instead of what they did before."""
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def api_keys(file: Path | None) -> list[str]:
    """Return the API keys of a file, else of the environment, else none.

    Raises:
        UserError: if the file cannot be read or holds none.
    """
    if file is None:
        return [key] if (key := os.environ.get(KEY_VARIABLE, "").strip()) else []
    try:
        keys = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the API key file {file} cannot be read ({type(error).__name__}): check the path") from None
    if not keys:
        raise UserError(f"the API key file {file} is empty: write one key a line")
    return keys


def check_address(host: str, port: int) -> None:
    """Bind and release an address: the engine says only that it failed, not why.

    Raises:
        UserError: if the host is unknown or not this machine's, or the port is taken, reserved or no port.
    """
    if port > 65535:
        raise UserError(f"port {port} does not exist: give one up to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError):
        raise UserError(f"the host {host!r} cannot be resolved: give an address of this machine, such as 127.0.0.1") from None
    with socket.socket(family, kind, protocol) as probe:
        # As servers do: connections of an earlier server that linger do not hold the port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            probe.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise UserError(f"port {port} on {host} is in use: choose another with --port, or 0 for a free one") from None
            if error.errno == errno.EACCES:
                raise UserError(f"port {port} on {host} is reserved: choose one from 1024 up with --port") from None
            raise UserError(f"{host} is not an address of this machine: choose another with --host") from None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _is_loopback(host: str) -> bool:
    return host in {"localhost", "::1"} or host.startswith("127.")
