"""A teacher that is known by its likeliest tokens alone, document by document: from a server, or from a cache on disk.

Attention never leaves a document, so a teacher's answer to a piece of one is the same in whatever row it is packed: what is asked
for and kept is a piece's, found by its tokens. A second epoch packs the same pieces into other rows, and asks nothing anew.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from wrinklefree.losses.divergence import top_log_probabilities
from wrinklefree.losses.pieces import piece_rows
from wrinklefree.teachers.base import Lesson, Shape
from wrinklefree.teachers.cache import DiskCache
from wrinklefree.teachers.local import LocalTeacher
from wrinklefree.views import Batch, Needs


class Top(NamedTuple):
    """The k likeliest tokens that follow each position of a piece.

    Attributes:
        log_probabilities: float32 `[n, k]`, largest first; -inf where nothing is known.
        tokens: int64 `[n, k]`.
    """

    log_probabilities: Tensor
    tokens: Tensor


class TopSource(Protocol):
    """Answers pieces of documents."""

    @property
    def note(self) -> str:
        """Return one line on what it is."""
        ...

    @property
    def digest(self) -> str:
        """Return what changes with its weights."""
        ...

    def tops(self, pieces: Sequence[Tensor]) -> list[Top]:
        """Return the likeliest tokens at every position of some pieces, int64 `[n]` each."""
        ...


class LocalSource:
    """A local teacher, asked for its likeliest tokens."""

    def __init__(self, teacher: LocalTeacher, top_k: int, temperature: float) -> None:
        """Take k tokens of a teacher's distributions at a temperature."""
        self.teacher, self.top_k, self.temperature = teacher, top_k, temperature
        self.note = teacher.note

    @property
    def digest(self) -> str:
        """Return the teacher's."""
        return self.teacher.digest

    @torch.no_grad()
    def tops(self, pieces: Sequence[Tensor]) -> list[Top]:
        """Answer all pieces in one forward pass."""
        ids = pad_sequence(list(pieces), batch_first=True)
        at = torch.arange(ids.shape[1], device=ids.device)
        real = at < torch.tensor([len(piece) for piece in pieces], device=ids.device)[:, None]
        batch = {"input_ids": ids, "position_ids": at * real, "document_ids": real.to(torch.int64)}
        targets = self.teacher.lesson(batch, Needs(logits=True)).targets
        assert targets is not None
        assert self.teacher.shape is not None
        positions = real.flatten().nonzero()[:, 0]
        parts = [
            top_log_probabilities(targets.full(positions[part]), self.top_k, self.temperature)[:2]
            for part in piece_rows(len(positions), self.teacher.shape.vocabulary)
        ]
        values, tokens = (torch.cat(side) for side in zip(*parts, strict=True))
        sizes = [len(piece) for piece in pieces]
        return [Top(v, t) for v, t in zip(values.split(sizes), tokens.split(sizes), strict=True)]


class TopTargets:
    """Likeliest tokens of all positions of a batch."""

    def __init__(self, log_probabilities: Tensor, tokens: Tensor) -> None:
        """Keep `[B * T, k]` of each."""
        self._log_probabilities, self._tokens = log_probabilities, tokens

    def full(self, positions: Tensor) -> Tensor:
        """Refuse: whoever needs whole distributions must not be given this teacher."""
        raise AssertionError("a teacher known by its likeliest tokens has no whole distributions")

    def top(self, positions: Tensor, top_k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the k likeliest tokens at some positions; the temperature is the one they were asked for at.

        The mass of all others is kept nowhere, since a server does not say it: `top_k_divergence` takes what is left of 1.
        """
        assert top_k <= self._tokens.shape[1]
        return self._log_probabilities[positions, :top_k], self._tokens[positions, :top_k], None


class TopTeacher:
    """A teacher that answers pieces of documents with their likeliest tokens, and asks for none twice if it has a cache."""

    def __init__(self, source: TopSource, top_k: int, cache: DiskCache | None = None) -> None:
        """Take answers of k tokens from a source, and from a cache what that has."""
        self.source, self.top_k, self.cache = source, top_k, cache
        self.shape: Shape | None = None

    @property
    def note(self) -> str:
        """Return one line on what it is."""
        return f"{self.source.note}, its {self.top_k} likeliest tokens"

    @property
    def digest(self) -> str:
        """Return the source's."""
        return self.source.digest

    @torch.no_grad()
    def lesson(self, batch: Batch, needs: Needs) -> Lesson:
        """Return the likeliest tokens at every position; nothing else can be asked for."""
        assert not needs.hidden
        assert not needs.qkv
        ids = batch["input_ids"].flatten()
        spans = piece_spans(batch["document_ids"])
        pieces = [ids[start:end] for start, end in spans]  # where the batch is: a local teacher runs there
        known: dict[int, Top] = {}
        if self.cache is not None:
            host = ids.cpu()
            keys = [host[start:end] for start, end in spans]
            known = {i: Top(*found) for i, key in enumerate(keys) if (found := self.cache.get(key)) is not None}
        missing = [i for i in range(len(pieces)) if i not in known]
        for i, top in zip(missing, self.source.tops([pieces[i] for i in missing]) if missing else [], strict=True):
            known[i] = top
            if self.cache is not None:
                self.cache.put(keys[i], top.log_probabilities.cpu(), top.tokens.cpu())
        values = torch.full((len(ids), self.top_k), -torch.inf, device=ids.device)
        tokens = torch.zeros((len(ids), self.top_k), dtype=torch.int64, device=ids.device)
        for i, (start, end) in enumerate(spans):
            values[start:end] = known[i].log_probabilities.to(ids.device)
            tokens[start:end] = known[i].tokens.to(ids.device)
        return Lesson(targets=TopTargets(values, tokens))

    def close(self) -> None:
        """Write what the cache has not written yet."""
        if self.cache is not None:
            self.cache.flush()


def piece_spans(document_ids: Tensor) -> list[tuple[int, int]]:
    """Return (start, end) of every document's stretch of a batch's positions, counted row by row; padding is none.

    Args:
        document_ids: int64 `[B, T]`, 0 = padding.
    """
    spans = []
    for row, documents in enumerate(document_ids.tolist()):
        first = row * len(documents)
        start = 0
        for at in range(1, len(documents) + 1):
            if at == len(documents) or documents[at] != documents[start]:
                if documents[start] > 0:
                    spans.append((first + start, first + at))
                start = at
    return spans
