"""Documents as examples: one row each, with the domain and the place that it comes from; and the probes that they shall help."""

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from data_handler.config import DataConfig, SourceConfig
from data_handler.encoding import encode
from data_handler.errors import UserError
from data_handler.packing import IGNORED
from data_handler.sources import documents
from data_handler.split import content_digest, is_heldout

HELDOUT = "heldout"
SUFFIXES = {".txt": "text", ".md": "text", ".rst": "text", ".jsonl": "jsonl", ".jsonl.gz": "jsonl", ".parquet": "parquet"}
SHOWN = 200


@dataclass(frozen=True)
class ExampleSet:
    """Examples of a causal language model.

    Attributes:
        tensors: `input_ids` and `labels` (-100 = no loss), int64 [n, T], padded on the right.
        group: index into `names`, int64 [n]: the domain, or the probe set.
        names: the groups' names.
        document: each example's number among its source's documents, in the source's order.
        texts: the first characters of each.
    """

    tensors: dict[str, Tensor]
    group: Tensor
    names: tuple[str, ...]
    document: list[int]
    texts: list[str]

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.texts)

    def tokens(self) -> Tensor:
        """Return how many tokens of each are predicted, int64 [n]."""
        return (self.tensors["labels"] != IGNORED).sum(1)


def training_examples(data: DataConfig, tokenizer: PreTrainedTokenizerBase, limit: int) -> ExampleSet:
    """Return up to `limit` documents of every source that training sees; the first `sequence_length` tokens of each.

    Which documents is decided by a hash of their content: a fixed sample. A `hub` source gives its first ones, since it is never
    listed.

    Raises:
        UserError: if a source cannot be read or has no document.
    """
    found = []
    for source in data.sources:
        kept = ((i, text) for i, text in enumerate(documents(source)) if not is_heldout(text, data.heldout_share))
        found.append(list(_sample(kept, limit, source)))
    return _example_set(found, [source.name for source in data.sources], tokenizer, data.sequence_length, "source")


def probe_examples(
    where: str, data: DataConfig, tokenizer: PreTrainedTokenizerBase, limit: int, text_column: str = "text"
) -> ExampleSet:
    """Return the texts that training shall help, a group for each file.

    Args:
        where: a file or a folder of `.jsonl`, `.jsonl.gz`, `.parquet`, `.txt`, `.md` and `.rst` files, or "heldout": the
            documents that the data configuration holds out, a group for each of its sources.
        data: for the row length and "heldout".
        tokenizer: the model's.
        limit: texts a group.
        text_column: where a record keeps its text.

    Raises:
        UserError: if there is no such file, or none with text.
    """
    if where == HELDOUT:
        if data.heldout_share == 0:
            raise UserError(
                "probes=heldout needs held-out documents and data.heldout_share is 0: set it above 0, or give probes=FILE"
            )
        found = []
        for source in data.sources:
            kept = ((i, text) for i, text in enumerate(documents(source)) if is_heldout(text, data.heldout_share))
            found.append(list(_sample(kept, limit, source)))
        return _example_set(found, [source.name for source in data.sources], tokenizer, data.sequence_length, "held-out source")
    sources = list(_probe_sources(Path(where).expanduser(), text_column))
    found = [list(_sample(enumerate(documents(source)), limit, source)) for source in sources]
    return _example_set(found, [source.name for source in sources], tokenizer, data.sequence_length, "probe file")


def _probe_sources(path: Path, text_column: str) -> Iterator[SourceConfig]:
    if not path.exists():
        raise UserError(f"probes={path} does not exist: give a file or folder of .jsonl or .txt files, or probes=heldout")
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    used: dict[str, int] = {}
    for file in files:
        suffix = next((s for s in sorted(SUFFIXES, key=len, reverse=True) if file.name.lower().endswith(s)), None)
        if suffix is None:
            continue
        stem = file.name[: -len(suffix)] or file.name
        used[stem] = used.get(stem, 0) + 1
        name = stem if used[stem] == 1 else f"{stem}-{used[stem]}"
        column = "text" if SUFFIXES[suffix] == "text" else text_column
        yield SourceConfig(name=name, kind=SUFFIXES[suffix], path=str(file), text_column=column)
    if not used:
        raise UserError(f"probes={path} is or holds no {', '.join(SUFFIXES)} file: give some")


def _sample(texts: Iterable[tuple[int, str]], limit: int, source: SourceConfig) -> Iterable[tuple[int, str]]:
    if source.kind == "hub":
        return islice(texts, limit)
    return sorted(heapq.nsmallest(limit, texts, key=lambda item: content_digest(item[1])))


def _example_set(
    found: Sequence[list[tuple[int, str]]], names: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int, what: str
) -> ExampleSet:
    rows: list[Tensor] = []
    groups, numbers, texts = [], [], []
    for group, (name, chosen) in enumerate(zip(names, found, strict=True)):
        before = len(rows)
        for number, text in chosen:
            encoded = next(encode([text], tokenizer), None)
            if encoded is None or len(encoded) < 2:
                continue  # nothing to predict
            rows.append(torch.from_numpy(encoded[:length].astype("int64")))
            groups.append(group)
            numbers.append(number)
            texts.append(" ".join(text[: 2 * SHOWN].split())[:SHOWN])
        if len(rows) == before:
            raise UserError(f"{what} {name} has no document of two tokens or more on this side of the split: give it text")
    padding = int(next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None))
    widest = max(map(len, rows))
    ids = torch.full((len(rows), widest), padding)
    labels = torch.full((len(rows), widest), IGNORED)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        labels[i, 1 : len(row)] = row[1:]
    return ExampleSet({"input_ids": ids, "labels": labels}, torch.tensor(groups), tuple(names), numbers, texts)
