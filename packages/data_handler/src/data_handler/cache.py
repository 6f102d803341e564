"""Finite sources, tokenised once: memory-mapped parts on disk, each complete or not there.

A part holds consecutive small shards of a source, or one large one. Its folder is named by a digest of how the source is read, the
tokenizer, and the shards' names, sizes and times of change, so that a changed file gives another part and the rest are kept.
"""

import fcntl
import json
import os
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm  # type: ignore[import-untyped]

from data_handler.config import SourceConfig
from data_handler.corpus import Corpus, Part
from data_handler.encoding import BATCH_CHARACTERS, BATCH_DOCUMENTS, Encoder
from data_handler.errors import UserError
from data_handler.packing import Store
from data_handler.sources import Reader, Record, Shard, open_source
from data_handler.split import content_digest

VERSION = 1
PART_BYTES = 1 << 20
"""Consecutive shards share a part up to this size."""
SHOW_PROGRESS_AFTER = 3.0
FILES = {"tokens": None, "offsets": np.int64, "digests": np.uint64, "loss": np.bool_}


def cache_directory(configured: str | None) -> Path:
    """Return the folder for tokenised sources: the configured one, `$WF_CACHE/data`, or `wrinklefree/data` in the user's cache."""
    if configured:
        return Path(configured).expanduser()
    if override := os.environ.get("WF_CACHE"):
        return Path(override) / "data"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wrinklefree" / "data"


def tokenised(source: SourceConfig, encoder: Encoder, directory: Path) -> tuple[Corpus, str]:
    """Return a finite source's documents as tokens, from the cache where it has them, and a digest of every token.

    Raises:
        UserError: if the source cannot be read (what was read before stays, and is not read again), or the cache not be written.
    """
    reader = open_source(source)
    shards = reader.shards()
    how = repr((VERSION, replace(source, name="-", weight=1.0), encoder.digest, np.dtype(encoder.dtype).name))
    parts, digests = [], []
    with tqdm(desc=f"tokenising {source.name}", unit=" tokens", unit_scale=True, **QUIET) as bar:
        for group in _groups(shards):
            builder = _Builder(source, reader, shards, group, encoder, directory, how, bar)
            part, digest = builder.opened() or builder.built()
            parts.append(part)
            digests.append(digest)
    return Corpus(parts), blake2b("".join(digests).encode(), digest_size=16).hexdigest()


QUIET = {"delay": SHOW_PROGRESS_AFTER, "disable": None, "leave": False}


class _Builder:
    """One part: found in the cache, or made.

    If a shard cannot be read to its end, what was read is kept beside the cache under a name without sizes and times, with the
    position and a digest of the shard up to there. Once the shard is mended, reading goes on at that position, if the shard still
    begins as it did.
    """

    def __init__(
        self,
        source: SourceConfig,
        reader: Reader,
        shards: Sequence[Shard],
        group: range,
        encoder: Encoder,
        directory: Path,
        how: str,
        bar: Any,
    ) -> None:
        self.source, self.reader, self.shards, self.group = source, reader, shards, group
        self.encoder, self.bar = encoder, bar
        self._thread: ThreadPoolExecutor
        self._ahead: Future[list[Store]] | None = None
        self._digests: deque[list[int]] = deque()
        self._lost = False
        self.dtypes = {**FILES, "tokens": encoder.dtype}
        if not source.messages_column:
            del self.dtypes["loss"]
        names = [shards[i].name for i in group]
        self.final = directory / _digest(how, [shards[i].stamp for i in group])
        self.partial = directory / f"{_digest(how, names)}.partial"

    def opened(self) -> tuple[Part, str] | None:
        """Return the part if the cache has it whole."""
        try:
            meta = json.loads((self.final / "meta.json").read_text())
            columns = {name: _mapped(self.final / name, dtype, meta["sizes"][name]) for name, dtype in self.dtypes.items()}
        except (OSError, ValueError, KeyError):
            return None
        return Part(Store(columns["tokens"], columns.get("loss")), columns["offsets"], columns["digests"]), meta["digest"]

    def built(self) -> tuple[Part, str]:
        """Read and tokenise the part's shards, or wait for another process that does."""
        try:
            self.final.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.partial.with_suffix(".lock")):
                found = self.opened()
                if found is None:
                    self._write()
                    found = self.opened()
        except OSError as error:
            raise UserError(
                f"source {self.source.name}: its tokens cannot be kept in {self.final.parent} ({error.strerror or error}): free "
                "some space, or set cache_dir or WF_CACHE to another folder"
            ) from None
        assert found is not None
        return found

    def _write(self) -> None:
        first, position = self._kept()
        with _Writer(self.partial, self.dtypes) as writer, ThreadPoolExecutor(1) as self._thread:
            for number in range(first, len(self.group)):
                shard = self.group[number]
                start, position = position, 0
                batch: list[Record] = []
                characters, behind = 0, start
                try:
                    for at, record in self.reader.read(shard, start):
                        batch.append(record)
                        characters, behind = characters + len(record.text), at
                        if characters >= BATCH_CHARACTERS or len(batch) == BATCH_DOCUMENTS:
                            self._add(writer, batch)
                            batch, characters = [], 0
                except UserError:
                    if not self._lost:
                        self._add(writer, batch)
                        self._add(writer, [])
                        self._keep(number, behind)
                    raise
                self._add(writer, batch)
            self._add(writer, [])
        sizes = {name: (self.partial / name).stat().st_size // np.dtype(dtype).itemsize for name, dtype in self.dtypes.items()}
        meta = {"version": VERSION, "source": self.source.name, "sizes": sizes, "digest": self._content_digest()}
        (self.partial / "kept.json").unlink(missing_ok=True)
        (self.partial / "meta.json").write_text(json.dumps(meta))
        shutil.rmtree(self.final, ignore_errors=True)  # a damaged one
        os.replace(self.partial, self.final)

    def _add(self, writer: "_Writer", batch: list[Record]) -> None:
        """Start to tokenise a batch, beside reading the next, and write the one before; an empty one waits for the last."""
        before, self._ahead = self._ahead, None
        if batch:
            self._ahead = self._thread.submit(self.encoder.encode, batch, f"source {self.source.name}")
            self._digests.append([content_digest(record.text) for record in batch])
        if before is not None:
            self._lost = True  # until it is written
            stores = before.result()
            self._lost = False
            writer.add(stores, self._digests.popleft())
            self.bar.update(sum(len(store.tokens) for store in stores))

    def _keep(self, number: int, position: int) -> None:
        """Note how far reading came."""
        stamps = [self.shards[i].stamp for i in self.group[:number]]
        prefix = self._prefix(number, position)
        (self.partial / "kept.json").write_text(json.dumps([stamps, position, prefix]))

    def _kept(self) -> tuple[int, int]:
        """Return (number of the shard in the part, position) to go on from; (0, 0) after clearing what cannot be gone on with."""
        try:
            stamps, position, prefix = json.loads((self.partial / "kept.json").read_text())
            number = len(stamps)
            same = stamps == [self.shards[i].stamp for i in self.group[:number]]
            if same and prefix is not None and self._prefix(number, position) == prefix:
                return number, position
        except (OSError, ValueError, UserError, IndexError):
            pass
        shutil.rmtree(self.partial, ignore_errors=True)
        return 0, 0

    def _prefix(self, number: int, position: int) -> str | None:
        """Return what tells whether a shard still begins as it did; of one that nothing was read of, that needs no look."""
        return self.reader.prefix(self.group[number], position) if position else ""

    def _content_digest(self) -> str:
        digest = blake2b(digest_size=16)
        for name in sorted(self.dtypes.keys() - {"digests"}):
            with (self.partial / name).open("rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
        return digest.hexdigest()


class _Writer:
    """Appends documents to the files of a part."""

    def __init__(self, folder: Path, dtypes: dict[str, Any]) -> None:
        folder.mkdir(exist_ok=True)
        self.dtypes = dtypes
        self.files = {name: (folder / name).open("ab") for name in dtypes}
        tokens = self.files["tokens"].tell() // np.dtype(dtypes["tokens"]).itemsize
        self.end = tokens
        if not self.files["offsets"].tell():
            self.files["offsets"].write(np.zeros(1, np.int64).tobytes())

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.files.values():
            file.close()

    def add(self, stores: list[Store], digests: list[int]) -> None:
        """Append documents."""
        if not stores:
            return
        ends = self.end + np.cumsum([len(store.tokens) for store in stores])
        self.end = int(ends[-1])
        columns: dict[str, Any] = {
            "tokens": np.concatenate([store.tokens for store in stores]),
            "offsets": ends,
            "digests": np.array(digests, np.uint64),
        }
        if "loss" in self.files:
            columns["loss"] = np.concatenate([store.loss for store in stores if store.loss is not None])
        for name, values in columns.items():
            self.files[name].write(values.astype(self.dtypes[name]).tobytes())


def _mapped(path: Path, dtype: Any, size: int) -> Any:
    """Return a file as an array; the plain ndarray class, whose slices cost a fifth of np.memmap's.

    Raises:
        ValueError: if it has another size.
    """
    if path.stat().st_size != size * np.dtype(dtype).itemsize:
        raise ValueError(f"{path} is damaged")
    return np.memmap(path, dtype, "r").view(np.ndarray) if size else np.empty(0, dtype)


def _groups(shards: Sequence[Shard]) -> Iterator[range]:
    """Yield ranges of consecutive shards that share a part."""
    start, size = 0, 0
    for number, shard in enumerate(shards):
        size += shard.size
        if size >= PART_BYTES or number == len(shards) - 1:
            yield range(start, number + 1)
            start, size = number + 1, 0


def _digest(*parts: object) -> str:
    return blake2b(repr(parts).encode(), digest_size=16).hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other processes from making the same part."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
