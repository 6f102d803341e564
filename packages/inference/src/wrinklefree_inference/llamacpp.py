"""llama.cpp as an engine for the parity gate: full next-token distributions of a GGUF file.

The engine runs in a process of its own on a loopback port, so that a file that makes it abort cannot take the exporter along, and
ends with the object or with this process, whichever comes first. It imports this module, so nothing slow may be imported here.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

NAME = "llama.cpp (xllamacpp)"
_READY = "listening on "
_TIMEOUT = 600
MAX_EXCESS = 1e-2
"""How far from 0 the logarithm of a distribution's sum may be, see `normalized`."""
IN_FLIGHT = 2
"""Requests at a time: the engine computes one after the other and writes one's 4,096 and more entries beside the next."""
SMALL_FILE = 50_000_000
"""Bytes below which the engine takes one thread: waiting for a second one costs more than it brings."""
# An environment's proxy must not see what goes to the loopback interface.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class EngineError(RuntimeError):
    """An engine did not load a file, or stopped answering; the message is one sentence.

    Attributes:
        engine: the engine's name.
    """

    def __init__(self, message: str, engine: str = NAME) -> None:
        super().__init__(message)
        self.engine = engine


class LlamaCpp:
    """One loaded GGUF file; use as a context manager.

    Attributes:
        path: the file.
        version: the engine's version.
    """

    def __init__(self, path: Path | str, context: int = 256, on_position: Callable[[], None] | None = None) -> None:
        """Start the engine.

        Args:
            path: the file to load.
            context: longest prompt in tokens, with room for one more.
            on_position: called after each distribution.

        Raises:
            EngineError: if the engine cannot load the file.
        """
        self.path = Path(path)
        self.version = version("xllamacpp")
        self._on_position = on_position or (lambda: None)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `close`)
        command = [sys.executable, "-m", __name__, str(path), str(context)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, start_new_session=True
        )
        try:
            self._address = self._await_address()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "LlamaCpp":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop the engine; does nothing when it has stopped."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                stream.close()

    def logprobs(self, ids: list[int]) -> NDArray[np.float64]:
        """Return the log-probabilities of the next token after each prefix of `ids`.

        One request a position; a prefix's keys and values are reused by the next one, as in generation.

        Args:
            ids: token ids, fewer than the context.

        Returns:
            float64 `[len(ids), vocabulary]`.

        Raises:
            EngineError: if the engine stops or answers without a full distribution.
        """
        vocabulary, plain = self._vocabulary(), self._plain_token()
        rows = np.empty((len(ids), vocabulary))
        prefixes = (ids[: i + 1] for i in range(len(ids)))
        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            try:
                for i, row in enumerate(pool.map(lambda prefix: self._distribution(prefix, vocabulary, plain), prefixes)):
                    rows[i] = row
                    self._on_position()
            finally:
                pool.shutdown(cancel_futures=True)
        return rows

    def _distribution(self, prefix: list[int], vocabulary: int, plain: int) -> NDArray[np.float64]:
        request = {
            "prompt": prefix,
            "n_predict": 1,
            "n_probs": vocabulary,
            "temperature": -1.0,
            "cache_prompt": True,
            "logit_bias": [[plain, 1e4]],
        }
        answer, position = self._ask("/completion", request), len(prefix) - 1
        try:
            entries = answer["completion_probabilities"][0]["top_logprobs"]
        except (KeyError, IndexError, TypeError):
            raise EngineError(f"llama.cpp answered without a distribution at position {position}") from None
        row = np.full(vocabulary, -np.inf)
        for entry in entries:
            row[entry["id"]] = entry["logprob"]
        return normalized(row, position)

    def tokenize(self, text: str) -> list[int]:
        """Return a text's tokens by the file's tokenizer, with what the file puts around texts, as a prompt is read.

        Raises:
            EngineError: if the engine stops or answers without tokens.
        """
        answer = self._ask("/tokenize", {"content": text, "add_special": True, "parse_special": True})
        try:
            return [int(token) for token in answer["tokens"]]
        except (KeyError, TypeError, ValueError):
            raise EngineError("llama.cpp cannot tokenise text with the file's tokenizer") from None

    def _vocabulary(self) -> int:
        models = self._ask("/v1/models")
        try:
            return int(models["data"][0]["meta"]["n_vocab"])
        except (KeyError, IndexError, TypeError, ValueError):
            raise EngineError("llama.cpp does not say how many tokens the file has") from None

    def _plain_token(self) -> int:
        """Return a token that ends no text and no line, to be generated whatever the distribution, which stays as it is.

        The server holds back the distribution behind some tokens, such as the beginning of a character.
        """
        answer = self._ask("/tokenize", {"content": "a"})
        try:
            return int(answer["tokens"][-1])
        except (KeyError, IndexError, TypeError, ValueError):
            raise EngineError("llama.cpp cannot tokenise the letter a with the file's tokenizer") from None

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._address + path, data, {"Content-Type": "application/json"})
        try:
            with _OPENER.open(request, timeout=_TIMEOUT) as reply:
                return _parse(reply.read())
        except urllib.error.HTTPError as error:
            raise EngineError(f"llama.cpp refused a request ({error.code} {error.reason})") from None
        except (OSError, ValueError) as error:
            why = "it has stopped" if self._process.poll() is not None else str(error)
            raise EngineError(f"llama.cpp does not answer ({why})") from None

    def _await_address(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            text = line.decode(errors="replace").strip()
            if text.startswith(_READY):
                return text.removeprefix(_READY)
        raise EngineError(f"llama.cpp could not load {self.path} ({self._last_words()})")

    def _last_words(self) -> str:
        self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit code {self._process.returncode}"


def _parse(text: bytes) -> Any:
    # Thousands of small dicts an answer make the collector walk all of torch's objects again and again: it triples the time.
    enabled = gc.isenabled()
    gc.disable()
    try:
        return orjson.loads(text)
    finally:
        if enabled:
            gc.enable()


def normalized(row: NDArray[np.float64], position: int) -> NDArray[np.float64]:
    """Return log-probabilities whose probabilities sum to 1.

    The server's softmax sums in float32: its probabilities add up to 1 within some 2e-6 for 512 tokens and 2e-4 for 49,152,
    which is more than the distances that the gate measures.

    Raises:
        EngineError: if they are farther from a distribution than that explains, or a token is missing.
    """
    excess = float(np.log(np.exp(row).sum()))
    if not (np.isfinite(row).all() and abs(excess) < MAX_EXCESS):
        raise EngineError(f"llama.cpp returned no full distribution at position {position}")
    return row - excess


def _is_small(path: Path) -> bool:
    return path.is_file() and path.stat().st_size < SMALL_FILE


def main(argv: list[str]) -> int:
    """Serve a file until standard input ends: the engine's process. Arguments: the file and the context."""
    import xllamacpp

    path, context = argv
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel = int(context), 1
    params.fit_params, params.ui, params.verbosity = False, False, 0
    threads = os.environ.get("OMP_NUM_THREADS", "")
    count = int(threads) if threads.isdecimal() else int(_is_small(Path(path)))
    if count > 0:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = count
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    print(_READY + server.listening_address, flush=True)
    sys.stdin.buffer.read()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
