"""What an autoregressive teacher says about one token, given everything around it: targets for a diffusion student.

The concrete score of a text x for replacing its token i by v is p(x with v at i) / p(x); normalised over v it is the conditional
q_i(v) = p(x_i = v | the others). Target Concrete Score distillation (TCSM, arXiv 2504.16431) trains the student's p(x_i | masked x)
towards q_i: by the tower property its mean over what is masked is the true posterior, and its variance is below that of the token
itself. "The others" end where the student's block ends: a block model never sees what comes later, and the same holds there.

Four estimators, dearest first:

* `exact`: V forwards a position; for tests.
* `topk`: the causal distribution's K likeliest tokens, each scored by how well the next W tokens follow it.
* `gradient`: one forward and a backward a block: what follows is taken to first order in the embedding of token i.
* `causal`: q_i = p(x_i | the tokens before). **Biased** wherever the student sees anything to the right of i: a baseline.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from bitnet_arch.attention import attention_argument, head_logits, hidden_states
from data_handler import document_attention_mask
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from wrinklefree.diffusion.loss import token_nll

Batch = dict[str, Tensor]
ROWS, POSITIONS = 256, 1024
"""Rows of a teacher's forward, and positions of one that scores candidates: what bounds its memory."""


@dataclass(frozen=True)
class Target:
    """Distributions of N tokens, each on K tokens of the vocabulary and one bucket of all others.

    Attributes:
        ids: int64 `[N, K]`, different ones; the token itself is among them.
        log_q: float32 `[N, K]`.
        log_tail: float32 `[N]`; -inf where K tokens are all.
    """

    ids: Tensor
    log_q: Tensor
    log_tail: Tensor

    def dense(self, vocabulary: int) -> Tensor:
        """Return probabilities `[N, vocabulary]`, the bucket spread evenly over the tokens outside."""
        rest = vocabulary - self.ids.shape[1]
        tail = (self.log_tail.exp() / rest)[:, None] if rest else torch.zeros_like(self.log_q[:, :1])
        return tail.expand(-1, vocabulary).scatter(1, self.ids, self.log_q.exp())


class Teacher:
    """A frozen autoregressive model on one batch.

    Attributes:
        batch: `input_ids`, `position_ids`, `document_ids`, int64 `[B, T]`.
        rows: of the wanted tokens, int64 `[N]`.
        columns: of the wanted tokens, int64 `[N]`, none of them a document's first.
        ends: where what counts as "the others" ends: the index after the last, int64 `[N]`.
    """

    def __init__(self, model: PreTrainedModel, batch: Batch, wanted: Tensor, ends: Tensor, forbidden: int | None = None) -> None:
        """Look at a batch.

        Args:
            model: in evaluation mode.
            batch: as above.
            wanted: bool `[B, T]`.
            ends: int64 `[B, T]`.
            forbidden: a token that the teacher's vocabulary has and no text (a mask token).
        """
        self.model, self.batch, self.forbidden = model, batch, forbidden
        self.rows, self.columns = wanted.nonzero(as_tuple=True)
        self.ends = ends[self.rows, self.columns]

    def log_probabilities(self, hidden: Tensor) -> Tensor:
        """Return float32 `[..., V]` of what the head reads."""
        logits = head_logits(self.model, hidden).float()
        if self.forbidden is not None and self.forbidden < logits.shape[-1]:
            logits[..., self.forbidden] = -torch.inf
        return logits.log_softmax(-1)

    def states(self, ids: Tensor | None = None, rows: Tensor | None = None, **inputs: object) -> Tensor:
        """Return hidden states `[R, T, hidden]` of whole rows, attention causal and inside documents.

        Args:
            ids: int64 `[R, T]`, the batch's own if None and no other input is given.
            rows: which row of the batch each is, int64 `[R]`; all of them in order if None.
            inputs: of the decoder, in place of `ids`.
        """
        documents, at = self.batch["document_ids"], self.batch["position_ids"]
        if rows is not None:
            documents, at = documents[rows], at[rows]
        inputs |= {"input_ids": self.batch["input_ids"] if ids is None else ids} if "inputs_embeds" not in inputs else {}
        mask = attention_argument(self.model, document_attention_mask(documents)[:, 0], at, at)
        return hidden_states(self.model, attention_mask=mask, position_ids=at, **{"use_cache": False} | inputs)

    def chunks(self, size: int, one_row: bool = False) -> Iterator[slice]:
        """Yield the wanted tokens in slices of at most `size`, at least 1; with `one_row`, none goes over the end of a row."""
        size, start = max(1, size), 0
        for count in torch.bincount(self.rows).tolist() if one_row else [len(self.rows)]:
            for first in range(start, start + count, size):
                yield slice(first, min(first + size, start + count))
            start += count


@torch.no_grad()
def exact_target(teacher: Teacher) -> Target:
    """Return q_i on the whole vocabulary, by scoring the text with every token in its place: V forwards of a row a token."""
    ids, vocabulary = teacher.batch["input_ids"], teacher.model.config.vocab_size
    every = torch.arange(vocabulary, device=ids.device)
    found = []
    for part in teacher.chunks(ROWS // vocabulary):
        rows, columns, ends = (x[part].repeat_interleave(vocabulary) for x in (teacher.rows, teacher.columns, teacher.ends))
        texts = ids[rows].scatter(1, columns[:, None], every.repeat(len(rows) // vocabulary)[:, None])
        log_p = teacher.log_probabilities(teacher.states(texts, rows)[:, :-1]).gather(2, texts[:, 1:, None])[:, :, 0]
        at = torch.arange(1, texts.shape[1], device=ids.device)
        counts = (at >= columns[:, None]) & (at < ends[:, None])
        found.append(torch.where(counts, log_p, 0.0).sum(1).view(-1, vocabulary))
    return _on_all(torch.cat(found))


@torch.no_grad()
def causal_target(teacher: Teacher, k: int) -> Target:
    """Return the K likeliest tokens of p(x_i | the tokens before), biased as the module says, and their mass."""
    ids, log_q, log_tail = _candidates(teacher, teacher.states(), k)
    return Target(ids, log_q, log_tail)


@torch.no_grad()
def topk_target(teacher: Teacher, k: int, window: int | None = None) -> Target:
    """Return q_i on the K likeliest tokens of the causal distribution and x_i, scored by what follows.

    log q_i(v) = log p(v | before) + the sum of log p(x_j | before j, v at i) over the W tokens after i, normalised. The tokens
    outside are not scored: they are taken to explain what follows as the worst of the K does. One forward computes the keys of the
    text; every candidate then costs W + 1 positions.

    Args:
        teacher: on a batch.
        k: K, at most the vocabulary, at least 2.
        window: W, or None for all tokens that count.
    """
    cache = DynamicCache()
    ids, log_own, log_tail = _candidates(teacher, teacher.states(past_key_values=cache, use_cache=True), k)
    reach = int((teacher.ends - teacher.columns).max()) - 1 if len(ids) else 0
    reach = reach if window is None else min(reach, window)
    if reach <= 0:
        return Target(ids, log_own, log_tail)
    branches = teacher.chunks(POSITIONS // (k * (reach + 1)), one_row=True)
    futures = torch.cat([_futures(teacher, cache, ids[part], part, reach) for part in branches])
    scores = torch.cat([log_own + futures, (log_tail + futures.min(1).values)[:, None]], dim=1).log_softmax(1)
    return Target(ids, scores[:, :-1], scores[:, -1])


def gradient_target(teacher: Teacher, k: int) -> Target:
    """Return q_i on its K likeliest tokens and x_i, from the gradient of the text's likelihood in the embedding of token i.

    log q_i(v) is log p(v | before), exact, plus ⟨∂ log p(what follows) / ∂ e(x_i), e(v) - e(x_i)⟩, of first order, normalised over
    the vocabulary.
    """
    batch, model = teacher.batch, teacher.model
    ids = batch["input_ids"]
    table = model.get_input_embeddings()
    with torch.enable_grad():
        inputs = table(ids).detach().requires_grad_()
        states = teacher.states(inputs_embeds=inputs)
        log_p = -token_nll(model, states[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), teacher.forbidden).view(len(ids), -1)
        slopes = _slopes(teacher, inputs, log_p)
    found = []
    with torch.no_grad():
        vectors = table(torch.arange(model.config.vocab_size, device=ids.device))
        for part in teacher.chunks(ROWS):
            rows, columns = teacher.rows[part], teacher.columns[part]
            slope = slopes[part]
            later = slope @ vectors.T - (slope * vectors[ids[rows, columns]]).sum(1, keepdim=True)
            own = teacher.log_probabilities(states[rows, columns - 1])
            found.append(_top((own + later.float()).log_softmax(1), ids[rows, columns], k))
    return Target(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _slopes(teacher: Teacher, inputs: Tensor, log_p: Tensor) -> Tensor:
    """Return the gradient of log p(what follows i, up to its end) in the embedding of i, `[N, hidden]`, for every wanted token."""
    at = torch.arange(1, log_p.shape[1] + 1, device=log_p.device)
    slopes = torch.zeros(len(teacher.rows), inputs.shape[-1], dtype=inputs.dtype, device=inputs.device)
    # Tokens that end at the same place in their rows share a backward pass, whichever documents they are of.
    for end in teacher.ends.unique().tolist():
        mine = teacher.ends == end
        likelihood = torch.where(at < end, log_p, 0.0).sum()
        (gradient,) = torch.autograd.grad(likelihood, inputs, retain_graph=True)
        slopes[mine] = gradient[teacher.rows[mine], teacher.columns[mine]]
    return slopes


def _candidates(teacher: Teacher, states: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the K likeliest tokens of every wanted place and x_i, their causal log-probabilities and that of the others."""
    ids, found = teacher.batch["input_ids"], []
    for part in teacher.chunks(ROWS):
        rows, columns = teacher.rows[part], teacher.columns[part]
        found.append(_top(teacher.log_probabilities(states[rows, columns - 1]), ids[rows, columns], k))
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))  # type: ignore[return-value]


def _top(log_q: Tensor, own: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the K likeliest tokens of distributions `[N, V]`, `own` in the last one's place if it is not among them."""
    ids = log_q.topk(k, dim=1).indices
    ids[:, -1] = torch.where((ids == own[:, None]).any(1), ids[:, -1], own)
    others = log_q.scatter(1, ids, -torch.inf).logsumexp(1)
    return ids, log_q.gather(1, ids), others


def _futures(teacher: Teacher, cache: DynamicCache, candidates: Tensor, part: slice, reach: int) -> Tensor:
    """Return how likely what follows is after each candidate, float32 `[n, K]`, in nats.

    One forward of one row: every candidate with its W tokens is a branch, which sees the row before it and itself alone. So the
    keys of the row are there once, whatever the number of branches.

    Args:
        teacher: on a batch.
        cache: keys and values of the batch's own rows.
        candidates: of tokens of one row, int64 `[n, K]`.
        part: which of the wanted tokens they are for.
        reach: W, how many tokens after i count at most.
    """
    batch, k, device = teacher.batch, candidates.shape[1], candidates.device
    row = int(teacher.rows[part][0])
    ids, positions, documents = (batch[name][row] for name in ("input_ids", "position_ids", "document_ids"))
    columns, ends = (x[part].repeat_interleave(k) for x in (teacher.columns, teacher.ends))
    steps, places = torch.arange(reach + 1, device=device), torch.arange(len(ids), device=device)
    texts = ids[(columns[:, None] + steps).clamp(max=len(ids) - 1)]  # beyond the row: read again, and not counted
    texts[:, 0] = candidates.flatten()
    own = (positions[columns][:, None] + steps).flatten()
    branch, step = torch.arange(len(columns), device=device).repeat_interleave(reach + 1), steps.repeat(len(columns))
    before = (documents[columns][:, None] == documents) & (places < columns[:, None])
    inside = (branch[:, None] == branch) & (step[:, None] >= step)
    allowed = torch.cat([before[branch], inside], dim=1)[None]
    prefix = DynamicCache()
    for index, layer in enumerate(cache.layers):
        assert isinstance(layer, DynamicLayer)
        assert layer.keys is not None
        assert layer.values is not None
        prefix.update(layer.keys[row : row + 1], layer.values[row : row + 1], index)
    states = hidden_states(
        teacher.model,
        input_ids=texts.view(1, -1),
        attention_mask=attention_argument(teacher.model, allowed, own[None], torch.cat([positions, own])[None]),
        position_ids=own[None],
        past_key_values=prefix,
        use_cache=True,
    ).view(*texts.shape, -1)
    nll = token_nll(teacher.model, states[:, :-1].flatten(0, 1), texts[:, 1:].flatten(), teacher.forbidden)
    counts = columns[:, None] + steps[1:] < ends[:, None]
    return -torch.where(counts, nll.view(len(columns), reach), 0.0).sum(1).view(-1, k)


def _on_all(scores: Tensor) -> Target:
    count, vocabulary = scores.shape
    ids = torch.arange(vocabulary, device=scores.device).expand(count, -1)
    return Target(ids, scores.log_softmax(1), scores.new_full((count,), -torch.inf))


ESTIMATORS: dict[str, Callable[[Teacher, int, int | None], Target]] = {
    "exact": lambda teacher, k, window: exact_target(teacher),
    "topk": topk_target,
    "gradient": lambda teacher, k, window: gradient_target(teacher, k),
    "causal": lambda teacher, k, window: causal_target(teacher, k),
}
"""Maps an estimator's name to what makes a target of a teacher, K and W."""
