"""Text to packed batches: tokens/s cold and from cache beside HF datasets and litdata, memory, and what resuming costs by position.

uv run --with litdata python benchmarks/data_pipeline.py --json data_pipeline.json

Every contender reads the same JSON lines (the standard library's code and documentation), tokenises them with SmolLM2's tokenizer
on one thread (ours reads and writes beside it on another), and feeds batches of 8 x 1024 tokens through one worker process: cold,
one epoch into an empty cache and out again; cached, four epochs. The clock stops at the last batch. Ours keeps attention inside
documents and fills five fields (labels, positions, documents and domain beside the ids); HF `datasets` (map, then group-and-chunk,
the recipe of its language-model example) and `litdata` (`optimize`, `TokensLoader`) concatenate documents and give `input_ids`.
"""

import gc
import gzip
import json
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one thread for everyone
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from bitnet_arch import load_tokenizer, resolve_pretrained
from data_handler import BatchLoader, DataConfig, PackedStream, SourceConfig, documents, load_config
from data_handler.corpus import Corpus, Part
from data_handler.packing import Store
from data_handler.sources import Reader, Record, open_source
from report import bar, finish, interleaved, median_ratio, parser
from torch.utils.data import DataLoader

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
LENGTH, ROWS, EPOCHS = 1024, 8, 4
NEAR, FAR = 1_000, 10_000_000
LONG_RUN, SAMPLES = 10_000_000, 10
PIECE, GROUP_ROWS, SHARD_GROUPS = 200, 8192, 30
"""Characters of a document, documents of a row group, and row groups of the shard that is entered late."""
SHARDS = (
    ("JSONL", "jsonl", "a.jsonl", True),
    ("Parquet", "parquet", "a.parquet", True),
    ("hub Parquet", "hub", "train.parquet", True),
    ("hub JSONL", "hub", "train.jsonl", False),
    ("gzip JSONL", "jsonl", "a.jsonl.gz", False),
    ("zstd JSONL", "jsonl", "a.jsonl.zst", False),
)
"""Label, kind, file, and whether a position is entered without reading what lies before it."""


class Work:
    """The text, the tokenizer, and a folder for caches."""

    def __init__(self, folder: Path, megabytes: float) -> None:
        self.folder = folder
        source = resolve_pretrained(SMOLLM2)
        self.tokenizer = load_tokenizer(source.path)
        texts = self._texts(int(megabytes * 1e6))
        self.text = folder / "text.jsonl"
        self.text.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        self.tokens = sum(len(ids) + 1 for ids in self.tokenizer(texts, add_special_tokens=False).input_ids)
        self.documents = len(texts)

    def _texts(self, characters: int) -> list[str]:
        """Return documents of both domains in turn."""
        taken: list[str] = []
        for pair in zip(*(documents(source) for source in load_config("demo").sources), strict=False):
            taken += pair
            characters -= sum(map(len, pair))
            if characters <= 0:
                break
        return taken

    def cache(self, name: str, fresh: bool) -> Path:
        """Return a contender's cache folder, emptied if it shall be fresh."""
        path = self.folder / name
        if fresh:
            shutil.rmtree(path, ignore_errors=True)
        path.mkdir(exist_ok=True)
        return path


def ours(work: Work, fresh: bool) -> Iterator[int]:
    """Tokenise into the cache if there is none, and draw the epochs; yield the tokens of each batch."""
    source = SourceConfig(name="text", kind="jsonl", path=str(work.text))
    cache = str(work.cache("ours", fresh))
    config = DataConfig(sources=(source,), sequence_length=LENGTH, heldout_share=0, cache_dir=cache)
    loader = BatchLoader(PackedStream(config, work.tokenizer), rows_per_step=ROWS, num_workers=1)
    seen = 0
    for batch in loader:
        tokens = int((batch["document_ids"] > 0).sum())
        yield tokens
        seen += tokens
        if seen >= work.tokens * (1 if fresh else EPOCHS):
            return


def hf_datasets(work: Work, fresh: bool) -> Iterator[int]:
    """Tokenise by `map`, concatenate and chunk by a second `map` (both cached), and draw the epochs."""
    import datasets

    tokenizer, end = work.tokenizer, work.tokenizer.eos_token_id

    def tokenise(rows: dict[str, list[str]]) -> dict[str, Any]:
        found = tokenizer(rows["text"], add_special_tokens=False, return_attention_mask=False)
        return {"input_ids": [[*ids, end] for ids in found["input_ids"]]}

    def chunk(rows: dict[str, list[list[int]]]) -> dict[str, Any]:
        flat = [token for ids in rows["input_ids"] for token in ids]
        whole = len(flat) // LENGTH * LENGTH
        return {"input_ids": [flat[i : i + LENGTH] for i in range(0, whole, LENGTH)]}

    cache = work.cache("hf", fresh)
    data = datasets.load_dataset("json", data_files=str(work.text), split="train", cache_dir=str(cache))
    data = data.map(tokenise, batched=True, remove_columns=data.column_names, cache_file_name=str(cache / "tokens.arrow"))
    data = data.map(chunk, batched=True, cache_file_name=str(cache / "chunks.arrow")).with_format("torch")
    yield from _drain(DataLoader(data, batch_size=ROWS, shuffle=True, num_workers=1, persistent_workers=True), fresh)


class _Tokenise:
    """litdata's map function: a file of lines to arrays of tokens; a class, as it is pickled."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, path: str) -> Iterator[torch.Tensor]:
        """Yield each document's tokens, in batches of a thousand documents through the tokenizer."""
        with Path(path).open() as file:
            while texts := [json.loads(line)["text"] for line in islice(file, 1000)]:
                found = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)
                for ids in found["input_ids"]:
                    yield torch.tensor([*ids, self.tokenizer.eos_token_id], dtype=torch.int32)


def litdata(work: Work, fresh: bool) -> Iterator[int]:
    """Optimise into chunks, if there are none, and draw the epochs."""
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader, optimize

    cache = work.cache("litdata", fresh)
    if fresh:
        optimize(
            fn=_Tokenise(work.tokenizer),
            inputs=[str(work.text)],
            output_dir=str(cache / "chunks"),
            chunk_bytes="64MB",
            num_workers=1,
            item_loader=TokensLoader(),
            verbose=False,
            start_method="fork",
        )
    data = StreamingDataset(str(cache / "chunks"), item_loader=TokensLoader(block_size=LENGTH), shuffle=True)
    yield from _drain(StreamingDataLoader(data, batch_size=ROWS, num_workers=1, persistent_workers=True), fresh)


def _drain(batches: Any, fresh: bool) -> Iterator[int]:
    for _ in range(1 if fresh else EPOCHS):
        for batch in batches:
            ids = batch["input_ids"] if isinstance(batch, dict) else batch
            yield ids.numel()


CONTENDERS = {"data_handler": ours, "datasets map + group-and-chunk": hf_datasets, "litdata": litdata}


def installed() -> dict[str, Callable[[Work, bool], Iterator[int]]]:
    """Return the contenders that can be imported."""
    try:
        import litdata as _  # noqa: F401
    except ImportError:
        return {name: run for name, run in CONTENDERS.items() if name != "litdata"}
    return dict(CONTENDERS)


def throughput(work: Work, rounds: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return rows and bars: every contender cold, then from its cache, interleaved."""
    rows, bars = [], []
    for phase, fresh in (("cold", True), ("cached", False)):
        seen: dict[str, int] = {}
        clocks: dict[str, list[tuple[float, float]]] = {name: [] for name in installed()}

        def timed(name: str, run: Callable[[Work, bool], Iterator[int]], fresh: bool, seen: Any, clocks: Any) -> Callable[[], None]:
            def measured() -> None:
                start, processor = time.perf_counter(), _processor_seconds()
                last, total = start, 0
                for tokens in run(work, fresh):
                    # To the last batch: how long a library waits for its workers to end is no throughput.
                    last, total = time.perf_counter(), total + tokens
                gc.collect()  # some loaders hold themselves; a worker counts as used time only once it has ended
                seen[name] = total
                clocks[name].append((last - start, _processor_seconds() - processor))

            return measured

        interleaved({name: timed(name, run, fresh, seen, clocks) for name, run in installed().items()}, rounds)
        wall, counted = ({name: [pair[i] for pair in times[1:]] for name, times in clocks.items()} for i in (0, 1))
        for unit, seconds in (("tokens/s", wall), ("tokens/s of one processor", counted)):
            for name in seconds:
                rows.append({"what": f"{phase}: {name}", "value": seen[name] / statistics.median(seconds[name]), "unit": unit})
                if name == "data_handler":
                    continue
                # By token, as the others drop the rest that fills no row.
                per_token = {n: [t / seen[n] for t in seconds[n]] for n in (name, "data_handler")}
                ratio = median_ratio(per_token[name], per_token["data_handler"])
                bars.append(bar(f"{phase}: {unit}, ours / {name}", ratio, ">=", 1.0))
    return rows, bars


def _processor_seconds() -> float:
    """Return the processor time of this process and of its children that have ended, which neighbours hardly change."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(part.ru_utime + part.ru_stime for part in used)


def memory(work: Work) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Draw ten million tokens, cached and streamed; return the growth of this process's own memory after the first tenth."""
    rows, bars = [], []
    for name, streaming in (("cached", False), ("streamed", True)):
        source = SourceConfig(name="text", kind="jsonl", path=str(work.text), streaming=streaming)
        config = DataConfig(sources=(source,), sequence_length=LENGTH, heldout_share=0, cache_dir=str(work.cache("ours", False)))
        seen, marks = 0, []
        for batch in BatchLoader(PackedStream(config, work.tokenizer), rows_per_step=ROWS):
            seen += int((batch["document_ids"] > 0).sum())
            if seen >= LONG_RUN * (1 + len(marks)) // SAMPLES:
                gc.collect()
                marks.append(_anonymous())
                if seen >= LONG_RUN:
                    break
        growth = (max(marks[1:]) - marks[0]) / 2**20
        rows.append({"what": f"memory over 10M tokens, {name}: growth after the first 1M", "value": growth, "unit": "MiB"})
        bars.append(bar(f"{name}: MiB grown from 1M to 10M tokens", growth, "<=", 16.0))
    return rows, bars


def _anonymous() -> int:
    """Return the bytes of this process that no file backs."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024


def resuming(work: Work, rounds: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the time from a state to the first batch, at two positions in twelve million made-up documents of 16 tokens."""
    count, size = 12_000_000, 16
    tokens = np.broadcast_to(np.uint16(5), count * size)
    corpus = Corpus([Part(Store(tokens), np.arange(count + 1) * size, np.arange(count, dtype=np.uint64))])
    source = SourceConfig(name="made up", kind="jsonl", path=str(work.text))
    config = DataConfig(sources=(source,), sequence_length=size * 8, heldout_share=0)  # eight documents a row

    def loader() -> BatchLoader:
        stream = PackedStream(config, work.tokenizer)
        stream._corpora["made up"] = (corpus, "")
        return BatchLoader(stream, rows_per_step=ROWS)

    states = {}
    for position in (NEAR, FAR):
        start = loader()
        start.load_state_dict({"rows": position // 8 // ROWS * ROWS})  # without lanes: planned from the beginning
        next(iter(start))
        states[position] = start.state_dict()

    def resume(position: int) -> Callable[[], None]:
        def run() -> None:
            again = loader()
            again.load_state_dict(states[position])
            next(iter(again))

        return run

    seconds = interleaved({str(position): resume(position) for position in states}, rounds)
    rows = [
        {"what": f"resume at sample {position:,}", "value": 1e3 * statistics.median(seconds[str(position)]), "unit": "ms"}
        for position in states
    ]
    rows += [{"what": f"state at sample {p:,}", "value": len(json.dumps(state)), "unit": "bytes"} for p, state in states.items()]
    ratio = median_ratio(seconds[str(FAR)], seconds[str(NEAR)])
    return rows, [bar(f"resume time, sample {FAR:,} / sample {NEAR:,}", ratio, "<=", 1.5)]


def entering(work: Work, rounds: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the time from a position in a shard to the next record: early and late in a file of short documents."""
    with work.text.open() as file:
        whole = "".join(json.loads(line)["text"] for line in file)
    each = [whole[start : start + PIECE] for start in range(0, len(whole), PIECE)]
    texts = [f"{i} {each[i % len(each)]}" for i in range(SHARD_GROUPS * GROUP_ROWS)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    table = pyarrow.table({"text": texts})
    rows, bars = [], []
    for label, kind, name, indexed in SHARDS:
        folder = work.folder / label.replace(" ", "-")
        folder.mkdir()
        path = folder / name
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(table, path, row_group_size=GROUP_ROWS)
        else:
            packed = {".gz": gzip.compress, ".zst": partial(pyarrow.compress, codec="zstd", asbytes=True)}.get(path.suffix, bytes)
            path.write_bytes(packed(lines))
        place = {"dataset": str(folder)} if kind == "hub" else {"path": str(path)}
        reader = open_source(SourceConfig(name=label, kind=kind, **place))
        places = [at for at, _ in reader.read(0)]
        wanted = {"early": places[NEAR], "late": places[NEAR - GROUP_ROWS]}  # equally deep in a row group
        runs = {where: partial(next, _Fresh(reader, at)) for where, at in wanted.items()}
        seconds = interleaved(runs, 5 * rounds)
        rows += [{"what": f"enter {label}, {w}", "value": 1e3 * statistics.median(seconds[w]), "unit": "ms"} for w in wanted]
        ratio = median_ratio(seconds["late"], seconds["early"])
        if indexed:
            bars.append(bar(f"time to enter {label}, late / early", ratio, "<=", 1.5))
        else:
            rate = len(lines) / 1e6 / statistics.median(seconds["late"])
            rows.append({"what": f"enter {label}, late: content passed over", "value": rate, "unit": "MB/s"})
    return rows, bars


class _Fresh:
    """An iterator whose every item is the first record of a new reading."""

    def __init__(self, reader: Reader, start: int) -> None:
        self.reader, self.start = reader, start

    def __next__(self) -> Record:
        with closing(self.reader.read(0, self.start)) as found:  # type: ignore[type-var]
            return next(found)[1]


def packing(work: Work) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the share of positions used over an epoch, packed and one document a row."""
    rows, bars = [], []
    for packed in (True, False):
        source = SourceConfig(name="text", kind="jsonl", path=str(work.text))
        cache = str(work.cache("ours", False))
        config = DataConfig(sources=(source,), sequence_length=LENGTH, heldout_share=0, packing=packed, cache_dir=cache)
        stream = PackedStream(config, work.tokenizer)
        stream.open()
        lane, used, made = stream.lane(0, stream.weights()), 0, 0
        while used < work.tokens:
            used, made = used + lane.next()[1].used, made + 1
        share = used / (made * LENGTH)
        rows.append({"what": f"positions used, {'packed' if packed else 'one document a row'}", "value": share, "unit": "share"})
        if packed:
            bars.append(bar("positions used", share, ">=", 0.98))
    return rows, bars


def main() -> None:
    """Run the benchmark."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--megabytes", type=float, default=4.0, help="text, in millions of characters")
    arguments.set_defaults(rounds=3)
    chosen = arguments.parse_args()
    torch.set_num_threads(chosen.threads)
    with tempfile.TemporaryDirectory() as folder:
        work = Work(Path(folder), chosen.megabytes)
        parts = [memory(work)]  # first: what others leave to reuse would hide growth
        parts += [throughput(work, chosen.rounds), packing(work), resuming(work, chosen.rounds)]
        parts.append(entering(work, chosen.rounds))
    rows = [row for part in parts for row in part[0]]
    bars = [line for part in parts for line in part[1]]
    title = f"{work.tokens:,} tokens of {work.documents:,} documents, rows of {LENGTH}"
    finish(title, rows, bars, ("torch", "transformers", "tokenizers", "datasets", "litdata", "data-handler"), chosen.json)


if __name__ == "__main__":
    main()
