"""Language models for lm-eval: a model directory through PyTorch, a GGUF file through llama.cpp.

Both score a text in the same windows, so their figures differ only by what the engines compute.
"""

import http.client
import json
import secrets
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from bitnet_arch import UserError, load_model, load_tokenizer
from bitnet_arch.diffusion import diffusion_of
from bitnet_arch.gguf import read_gguf
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm  # type: ignore[import-untyped]

DEFAULT_CONTEXT = 1024
MAX_BATCH = 16
LOGITS_BUDGET = 1 << 26  # float32 logits of a batch, a quarter of a gibibyte
FORCED = 1e9  # a logit bias that no logit outweighs
BOS_KEY, EOS_KEY = "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id"

TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]


class RollingMixin:
    """Rolling log-likelihood in one pass over the windows of all texts, with one progress bar."""

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each request's text, in nats."""
        lm: Any = self
        windows: list[TokenRequest] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            pairs = get_rolling_token_windows(
                # Without the begin token that some tokenizers add: the window starts with the prefix token as it is.
                token_list=lm.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=lm.prefix_token_id,
                max_seq_len=lm.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, pairs):
                windows.append((None, context, continuation))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (likelihood, _) in zip(owners, lm._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm), strict=True):
            totals[owner] += likelihood
        return totals


class DirectoryLM(RollingMixin, HFLM):  # type: ignore[misc]
    """A model directory, with this project's own layers.

    Args:
        directory: master, packed or float.
        context: tokens of a window.

    Raises:
        UserError: if the directory cannot be loaded, holds a diffusion model, or the context is out of range.
    """

    def __init__(self, directory: Path, context: int | None) -> None:
        model, tokenizer = load_model(directory), load_tokenizer(directory)
        config = model.config
        if diffusion_of(config) is not None:
            raise UserError(
                f"{directory} is a diffusion model, whose likelihood is known only up to a bound, and tasks compare likelihoods: "
                "evaluate the model that it was made from"
            )
        length = choose_context(context, config.max_position_embeddings)
        batch = max(1, min(MAX_BATCH, LOGITS_BUDGET // (length * config.vocab_size)))
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise UserError(f"the tokenizer of {directory} names neither a begin nor an end of text: name one as its eos_token")
        if torch.cuda.is_available():
            torch.nn.Module.to(model, "cuda")
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch, max_length=length)


class LlamaCppLM(RollingMixin, TemplateLM):  # type: ignore[misc]
    """A GGUF file in llama.cpp.

    The log-probability of a token is what the engine reports for it when a logit bias forces it to be drawn: biases act on the
    sampler only, reported probabilities come from the model's own logits. One request a token; the engine keeps the prefix.

    Args:
        file: of the types that this project exports.
        context: tokens of a window.

    Raises:
        UserError: if the file is damaged or of other types, the engine is missing, or the context is out of range.
    """

    def __init__(self, file: Path, context: int | None) -> None:
        super().__init__()
        metadata = read_gguf(file).metadata
        trained = metadata.get(f"{metadata.get('general.architecture')}.context_length")
        if not isinstance(trained, int):
            raise UserError(f"{file} names no context length: export it again")
        self.max_length = choose_context(context, trained)
        prefix = metadata.get(BOS_KEY, metadata.get(EOS_KEY))
        if not isinstance(prefix, int):
            raise UserError(f"{file} names neither a begin nor an end of text token: export it again")
        self._prefix, self._vocabulary = prefix, len(metadata.get("tokenizer.ggml.tokens", ()))
        self._key = secrets.token_hex(16)
        self._server = _start(file, self.max_length + 1, self._key)
        self._address: str = self._server.listening_address.removeprefix("http://")

    @property
    def eot_token_id(self) -> int:
        """The token that texts begin after, as in `HFLM`: begin of text, else end of text."""
        return self._prefix

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **ignored: Any) -> list[int]:
        """Tokenise as the engine does."""
        body = {"content": string, "add_special": add_special_tokens is not False, "parse_special": True}
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        with closing(http.client.HTTPConnection(self._address)) as connection:
            connection.request("POST", "/tokenize", json.dumps(body), headers)
            tokens: list[int] = json.load(connection.getresponse())["tokens"]
        return tokens

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenRequest], disable_tqdm: bool = False, **ignored: Any
    ) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool]] = []
        total = sum(len(continuation) for _, _, continuation in requests)
        with tqdm(total=total, desc="Scoring tokens", disable=disable_tqdm) as bar:
            for _, context, continuation in requests:
                # The oldest tokens go, as everywhere in lm-eval.
                ids = (context + continuation)[-(self.max_length + 1) :]
                likelihood, greedy = 0.0, True
                for i in range(len(ids) - len(continuation), len(ids)):
                    token_likelihood, likeliest = self._score(ids[:i], ids[i])
                    likelihood, greedy = likelihood + token_likelihood, greedy and likeliest == ids[i]
                    bar.update()
                results.append((likelihood, greedy))
        return results

    def _score(self, context: list[int], token: int) -> tuple[float, int]:
        """Return the log-probability of a token after a context, and the likeliest token there."""
        entry = self._force(context, token, 1)
        if entry is None:
            # No probabilities come with a token that is a part of a character: force a whole one and look ours up.
            entry = self._force(context, self.tok_encode("a", add_special_tokens=False)[0], self._vocabulary)
            assert entry is not None
            listed = {item["id"]: item["logprob"] for item in entry["top_logprobs"]}
            return float(listed[token]), int(entry["top_logprobs"][0]["id"])
        if entry["id"] != token:
            raise RuntimeError(f"llama.cpp drew token {entry['id']} where {token} was forced")
        return float(entry["logprob"]), int(entry["top_logprobs"][0]["id"])

    def _force(self, context: list[int], token: int, listed: int) -> dict[str, Any] | None:
        """Return what the engine says of a forced token and the `listed` likeliest ones; None for a part of a character."""
        request = {"prompt": context, "max_tokens": 1, "temperature": -1.0, "cache_prompt": True}
        answer = self._server.handle_completions(request | {"logprobs": listed, "logit_bias": [[token, FORCED]]})
        if "error" in answer:
            raise RuntimeError(f"llama.cpp failed: {answer['error'].get('message', answer['error'])}")
        logprobs = answer["choices"][0]["logprobs"]
        return None if logprobs is None else dict(logprobs["content"][0])

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Refuse: only log-likelihoods are taken from this engine.

        Raises:
            UserError: always.
        """
        names = ", ".join(sorted({str(request.task_name) for request in requests}))
        raise UserError(f"{names} generates text, which is evaluated on a model directory only: give the directory")


def choose_context(asked: int | None, trained: int) -> int:
    """Return the tokens of a window: what was asked, else at most 1024.

    One position less than the model knows, for llama.cpp keeps one for the token that it predicts.

    Raises:
        UserError: if more was asked than the model knows, or fewer than 2.
    """
    most = trained - 1
    if asked is None:
        return min(DEFAULT_CONTEXT, most)
    if not 2 <= asked <= most:
        raise UserError(f"--context is {asked}: the model takes from 2 to {most}")
    return asked


def _start(file: Path, context: int, key: str) -> Any:
    try:
        import xllamacpp
    except ImportError:
        raise UserError("a GGUF file runs in llama.cpp, which is missing: install xllamacpp") from None
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.verbosity = context, 1, 0
    params.fit_params, params.ui, params.cors_origins = False, False, ""
    # The engine listens on loopback even when it is called in process; a random key keeps others out.
    params.api_keys = [key]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    try:
        return xllamacpp.Server(params)
    except RuntimeError:
        raise UserError(f"llama.cpp could not load {file}: it is damaged or of an architecture that it does not know") from None
