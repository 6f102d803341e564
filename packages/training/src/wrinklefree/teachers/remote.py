"""A teacher behind an HTTP server: the likeliest tokens of prompts, in vLLM's and SGLang's dialects.

Neither server was at hand where this was written: the dialects follow their documentation and are tested against a server of our
own.
"""

import hashlib
import http.client
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import torch
from bitnet_arch import UserError
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from wrinklefree.teachers.tops import Top

Entry = tuple[float, int, str | None]
"""Log-probability, token, and its text if the server says it."""

Answer = tuple[int, str, bytes]
"""Status, its name, and the body."""
PIECE = 1 << 16
"""Bytes of an answer that are read at a time."""


class Dialect(NamedTuple):
    """How a server is asked for the likeliest tokens of a prompt, and where its answer has them.

    Attributes:
        path: behind the server's address.
        request: maps (model, token ids, k) to the body.
        entries: maps the answer to what it says of the token at each position, None where it says nothing (the first).
        remedy: what to do about too few log-probabilities.
    """

    path: str
    request: Callable[[str, list[int], int], dict[str, Any]]
    entries: Callable[[Any], list[list[Entry] | None]]
    remedy: str


def _vllm_request(model: str, ids: list[int], top_k: int) -> dict[str, Any]:
    return {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": top_k}


def _vllm_entries(answer: Any) -> list[list[Entry] | None]:
    return [
        None if place is None else [(float(v["logprob"]), int(token), v.get("decoded_token")) for token, v in place.items()]
        for place in answer["choices"][0]["prompt_logprobs"]
    ]


def _sglang_request(model: str, ids: list[int], top_k: int) -> dict[str, Any]:
    del model  # a server of SGLang has one
    return {
        "input_ids": ids,
        "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": top_k,
        "return_text_in_logprobs": True,
    }


def _sglang_entries(answer: Any) -> list[list[Entry] | None]:
    return [
        None if not place else [(float(value), int(token), text) for value, token, text in place]
        for place in answer["meta_info"]["input_top_logprobs"]
    ]


DIALECTS = {
    "vllm": Dialect("/v1/completions", _vllm_request, _vllm_entries, "start it with --max-logprobs of at least as many"),
    "sglang": Dialect("/generate", _sglang_request, _sglang_entries, "ask for fewer by the objective's top_k"),
}


PROBE = (
    "The quick brown fox jumps over 13 lazy dogs. Water boils at 100 degrees Celsius, and the capital of France is Paris. Once "
    "upon a time there was a king who had three daughters; the youngest of them said: def add(a, b): return a + b"
)
"""What a server is asked first: long enough that the noise of single log-probabilities averages out."""
PROBE_STEP = 0.02
"""Nats to which the means over the probe are rounded: well above that noise, well below what tells models apart."""
LEAST = -1e4
"""Nats below which log-probabilities count as this in the digest."""
SLACK = 1e-3
"""Nats by which rounding may raise a log-probability above 0."""
SUM_SLACK = 1e-2
"""What rounding, to bfloat16 for example, may add to the sum of probabilities."""


class RemoteSource:
    """Asks a server, several pieces at a time, and again where it fails for a while.

    Attributes:
        note: one line on what it is.
        digest: of the name, the dialect, and the means over `PROBE` of the largest and the least log-probability of an answer, in
            steps of `PROBE_STEP`, which another model under the same name hardly shares. A server's values differ a little from
            machine to machine, and its likeliest tokens do where two are close: neither is in it by itself. Nor is the address,
            since the same model may move.
    """

    def __init__(
        self,
        url: str,
        model: str,
        dialect: str,
        top_k: int,
        tokenizer: PreTrainedTokenizerFast,
        *,
        timeout: float,
        retries: int,
        concurrency: int,
        key: str | None = None,
    ) -> None:
        """Ask the server for the first time, so that a mistake is found before training.

        Args:
            url: for example http://localhost:8000.
            model: the name it is served under.
            dialect: a key of `DIALECTS`.
            top_k: tokens of an answer.
            tokenizer: the student's, which the server's has to agree with.
            timeout: seconds that an answer may take, from the first byte of the request to the last of it.
            retries: how often a request is repeated that failed or took too long, after 1, 2, 4 ... times `pause` seconds.
            concurrency: requests at a time.
            key: sent as a bearer token.

        Raises:
            UserError: if the server is down, refuses, answers something else, or has another tokenizer.
        """
        self.url, self.model, self.dialect, self.top_k = url.rstrip("/"), model, DIALECTS[dialect], top_k
        self.timeout, self.retries, self.concurrency, self._key = timeout, retries, concurrency, key
        self.pause = 0.5
        self.note = f"{model} at {self.url} ({dialect})"
        self._vocabulary = len(tokenizer)
        means = self._probe(tokenizer)
        self.digest = hashlib.sha256(f"{model} {dialect} {means}".encode()).hexdigest()[:16]

    def tops(self, pieces: Sequence[Tensor]) -> list[Top]:
        """Return the likeliest tokens that follow each position of some pieces; of what follows the last one, nothing is known.

        Raises:
            UserError: if the server fails for good, or answers with too little.
        """
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(self._top, pieces))

    def _top(self, piece: Tensor) -> Top:
        values = torch.full((len(piece), self.top_k), -torch.inf)
        tokens = torch.zeros((len(piece), self.top_k), dtype=torch.int64)
        # The entry at a position is of the token that stands there: what the position before predicts.
        for at, found in enumerate(self._ask(piece.tolist())):
            best = found[: self.top_k]
            values[at] = torch.tensor([entry[0] for entry in best])
            tokens[at] = torch.tensor([entry[1] for entry in best])
        return Top(values, tokens)

    def _ask(self, ids: list[int]) -> list[list[Entry]]:
        """Return what the server says of each token but the first, likeliest first: `top_k` entries or more that make sense."""
        answer = self._post(self.dialect.request(self.model, ids, self.top_k))
        try:
            entries = self.dialect.entries(answer)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError):
            entries = []
        if len(entries) != len(ids):
            raise UserError(
                f"the teacher at {self.url} answered without the log-probabilities of the prompt's {len(ids)} tokens: choose the "
                f"teacher.kind of the server ({', '.join(DIALECTS)}) and a server that gives them"
            )
        places = [sorted(place or [], reverse=True, key=lambda entry: entry[0]) for place in entries[1:]]
        for at, place in enumerate(places, 1):
            if (nonsense := _nonsense(place, self._vocabulary)) is not None:
                raise UserError(
                    f"the teacher at {self.url} answered with {nonsense} at position {at}, which is no distribution of the model's "
                    f"{self._vocabulary} tokens: see to the server, and choose a teacher of the model's own family"
                )
            if len(place) < self.top_k:
                raise UserError(
                    f"the teacher at {self.url} gave {len(place)} log-probabilities a token, and the objective needs {self.top_k}: "
                    f"{self.dialect.remedy}"
                )
        return places

    def _post(self, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        address = self.url + self.dialect.path
        reason = ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.pause * 2 ** (attempt - 1))
            request = urllib.request.Request(address, json.dumps(body).encode(), headers)
            try:
                status, reason, content = _within(self.timeout, partial(_answer, request, self.timeout))
            except TimeoutError:
                reason = f"no answer in {self.timeout:g} s"
                continue
            except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
                cause = getattr(error, "reason", error)
                reason = f"no answer in {self.timeout:g} s" if isinstance(cause, TimeoutError) else str(cause)
                continue
            except ValueError as error:  # before anything was sent: asking again would not help
                raise UserError(f"teacher.url={self.url} is no address that can be asked ({error}): mend it") from None
            if status >= 400:
                reason = f"{status} {reason}"
                if status < 500 and status not in (408, 429):  # asking again would not help
                    said = content[:300].decode(errors="replace").strip().replace("\n", " ")
                    raise UserError(f"the teacher at {address} refused a request ({reason}: {said}): see to its settings")
                continue
            try:
                return json.loads(content)
            except (ValueError, RecursionError):
                reason = "its answer is no JSON"
        tries = f"{self.retries + 1} tries" if self.retries else "1 try"
        raise UserError(
            f"the teacher at {address} gave no answer in {tries} ({reason}): start it, or raise "
            "teacher.timeout_s or teacher.retries"
        )

    def _probe(self, tokenizer: PreTrainedTokenizerFast) -> list[int]:
        """Compare what the server calls some tokens with what they are here; return what the digest is of, in `PROBE_STEP`s."""
        ids = tokenizer(PROBE, add_special_tokens=False).input_ids
        differing = None
        most, least = [], []
        for place in self._ask(ids):
            # A mean of what is impossible would be no number.
            most.append(max(place[0][0], LEAST))
            least.append(max(place[self.top_k - 1][0], LEAST))
            for _, token, text in place:
                # A token that is no whole character has no text that could be compared.
                mine = str(tokenizer.decode([token]))
                if text is not None and "\ufffd" not in text + mine and text.strip() != mine.strip():
                    differing = differing or (token, text, mine)
        if differing is not None:
            token, text, mine = differing
            raise UserError(
                f"the teacher at {self.url} has another tokenizer than the model (token {token} is {text!r} there and {mine!r} "
                "here), and their distributions are of different tokens: choose a teacher of the model's own family"
            )
        return [round(sum(values) / max(1, len(values)) / PROBE_STEP) for values in (most, least)]


def _nonsense(place: list[Entry], vocabulary: int) -> str | None:
    """Return what of an answer no distribution of so many tokens can have, if anything."""
    for value, token, text in place:
        if not 0 <= token < vocabulary:
            return f"token {token}"
        if not value <= SLACK:  # NaN, too
            return f"the log-probability {value:g} of token {token}"
        if text is not None and not isinstance(text, str):
            return f"a text of token {token} that is none ({text!r})"
    if len({token for _, token, _ in place}) < len(place):
        return "the same token twice"
    total = sum(math.exp(value) for value, _, _ in place)
    return f"probabilities that sum to {total:.3f}" if total > 1 + SUM_SLACK else None


def _within(seconds: float, work: Callable[[], Answer]) -> Answer:
    """Do something in a thread of its own, and wait for it so long and no longer.

    A socket's timeout is of single operations, so that a server that sends a byte now and then is never out of time. A thread
    that was not waited for is left to itself, and does not keep the process from ending.

    Raises:
        TimeoutError: if it takes longer.
    """
    done: Future[Answer] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # whatever it is belongs to who waits
            done.set_exception(error)

    Thread(target=run, daemon=True).start()
    return done.result(seconds)


def _answer(request: urllib.request.Request, seconds: float) -> Answer:
    """Return a server's answer, whatever its status; of one that sends and sends, no more is read once its time is up."""
    end = time.monotonic() + seconds
    try:
        response = urllib.request.urlopen(request, timeout=seconds)
    except urllib.error.HTTPError as error:
        response = error
    with response:
        pieces = []
        while piece := response.read1(PIECE):
            if time.monotonic() > end:
                raise TimeoutError
            pieces.append(piece)
        return int(response.status), str(response.reason), b"".join(pieces)


def read_key(path: str | None) -> str | None:
    """Return the key in a file.

    Raises:
        UserError: if there is none, or it is none that a header of HTTP can carry.
    """
    if path is None:
        return None
    try:
        key = Path(path).expanduser().read_bytes().strip().decode("latin-1")
    except OSError as error:
        raise UserError(f"teacher.api_key_file={path} cannot be read ({error.strerror}): name a file with the key") from None
    if not key:
        raise UserError(f"teacher.api_key_file={path} is empty: name a file with the key")
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"teacher.api_key_file={path} holds more than one line of printable ASCII: name a file with the key alone")
    return key
