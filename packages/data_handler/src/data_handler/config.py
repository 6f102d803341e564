"""What a data set is made of: validated dataclasses, and the YAML files that fill them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from data_handler.errors import UserError

SHUFFLE_BUFFER = 1000
COLUMN_FIELDS = ("text_column", "text_columns", "separator", "messages_column")
USED_FIELDS: dict[str, tuple[str, ...]] = {
    "stdlib_code": (),
    "stdlib_prose": (),
    "text": ("path", "streaming"),
    "jsonl": ("path", "streaming", *COLUMN_FIELDS),
    "parquet": ("path", "streaming", *COLUMN_FIELDS),
    "hub": ("dataset", "subset", "split", *COLUMN_FIELDS),
    "package": ("path", "streaming"),
}
"""Each kind of source, and which of the optional fields act on it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """One domain: where its documents come from and how much of the training tokens it supplies.

    Attributes:
        name: the domain's name, unique in a configuration.
        kind: a key of `USED_FIELDS`.
        path: a file, folder or glob (text, jsonl, parquet), relative to the working directory; for `package`,
            `DISTRIBUTION:GLOB`, the glob being matched against the paths the installed distribution lists.
        dataset: a hub id or a local folder (hub).
        subset: the hub data set's configuration name.
        split: the hub data set's split.
        text_column: the field or column that holds the text (jsonl, parquet, hub).
        text_columns: several of them, joined by `separator` in this order, instead of `text_column`.
        separator: what stands between several columns' texts.
        messages_column: the column that holds conversations, lists of messages with `role` and `content`, instead of text; the
            tokenizer's chat template lays them out, and only what the assistant says is learnt.
        streaming: read and tokenise while training instead of tokenising everything once, into a cache, before it; a `hub` source
            always does.
        shuffle_buffer: documents of a streamed source that are shuffled among each other, 1 keeps their order; None takes 1000.
        weight: share of the tokens, relative to the other sources' weights.

    Raises:
        UserError: for a value that cannot be meant, or a field that this kind would ignore.
    """

    name: str
    kind: str
    path: str | None = None
    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    text_column: str = "text"
    text_columns: tuple[str, ...] = ()
    separator: str = "\n\n"
    messages_column: str | None = None
    streaming: bool = False
    shuffle_buffer: int | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        _require(isinstance(self.name, str) and self.name.strip(), f"a source's name must be a non-empty string, not {self.name!r}")
        where = f"source {self.name}"
        _require(
            isinstance(self.kind, str) and self.kind in USED_FIELDS,
            f"{where}: kind must be one of {', '.join(USED_FIELDS)}, not {self.kind!r}",
        )
        if isinstance(self.text_columns, list):
            object.__setattr__(self, "text_columns", tuple(self.text_columns))
        needed = {"hub": "dataset", "stdlib_code": None, "stdlib_prose": None}.get(self.kind, "path")
        defaults = {"path": None, "dataset": None, "subset": None, "split": "train", "text_column": "text", "messages_column": None}
        for field, default in defaults.items():
            value = getattr(self, field)
            if field == needed or default is not None or value is not None:
                _require(isinstance(value, str) and value, f"{where}: {field} must be a non-empty string, not {value!r}")
        others: dict[str, object] = {"text_columns": (), "separator": "\n\n", "streaming": False}
        for field, usual in {**defaults, **others}.items():
            _require(
                getattr(self, field) == usual or field in USED_FIELDS[self.kind],
                f"{where}: {field} has no effect on kind {self.kind}, remove it",
            )
        self._check_columns(where)
        _require(isinstance(self.streaming, bool), f"{where}: streaming must be true or false, not {self.streaming!r}")
        if self.shuffle_buffer is not None:
            _require(self.streamed, f"{where}: shuffle_buffer has no effect without streaming, remove it")
            _require(
                _is_int(self.shuffle_buffer) and self.shuffle_buffer >= 1,
                f"{where}: shuffle_buffer must be a whole number of at least 1, not {self.shuffle_buffer!r}",
            )
        if self.kind == "package":
            left, _, right = str(self.path).partition(":")
            _require(left and right, f"{where}: path must be DISTRIBUTION:GLOB for kind package, not {self.path!r}")
        _require(_is_number(self.weight) and self.weight > 0, f"{where}: weight must be a number above 0, not {self.weight!r}")

    def _check_columns(self, where: str) -> None:
        names = self.text_columns
        _require(
            isinstance(names, tuple) and all(isinstance(name, str) and name for name in names),
            f"{where}: text_columns must be a list of column names, not {names!r}",
        )
        _require(isinstance(self.separator, str), f"{where}: separator must be a string, not {self.separator!r}")
        _require(len(set(names)) == len(names), f"{where}: text_columns names a column twice: {', '.join(names)}")
        chosen = [
            field
            for field, default in (("text_column", "text"), ("text_columns", ()), ("messages_column", None))
            if getattr(self, field) != default
        ]
        _require(len(chosen) < 2, f"{where}: {' and '.join(chosen)} exclude each other, keep one")
        _require(
            len(names) > 1 or self.separator == "\n\n",
            f"{where}: separator has no effect without several text_columns, remove it",
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are read."""
        return (self.messages_column,) if self.messages_column else self.text_columns or (self.text_column,)

    @property
    def streamed(self) -> bool:
        """Whether the source is read while training, not tokenised before it."""
        return self.kind == "hub" or self.streaming


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """A mixture of sources and how its rows are made.

    Attributes:
        sources: the domains; a row's `domain` is an index into them.
        sequence_length: tokens a row.
        heldout_share: share of the documents, by hash of content, that training never sees.
        heldout_tokens: how many held-out tokens are evaluated at most, divided among the sources by weight.
        packing: several documents a row; otherwise one document a row, padded.
        packing_buffer: rows open at a time while packing.
        lanes: into how many parts each source is dealt; row k of the stream comes from lane k % lanes. A process and its workers
            read and tokenise only their own lanes of a streamed source, if `rows_per_step` is a multiple of `lanes`; the order
            depends on this number, and on no number of processes or workers.
        cache_dir: where finite sources are kept tokenised; None takes `$WF_CACHE/data`, else the user's cache folder.

    Raises:
        UserError: for a value that cannot be meant.
    """

    sources: tuple[SourceConfig, ...]
    sequence_length: int = 128
    heldout_share: float = 0.05
    heldout_tokens: int = 16384
    packing: bool = True
    packing_buffer: int = 64
    lanes: int = 1
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.sources, list):
            object.__setattr__(self, "sources", tuple(self.sources))
        _require(
            isinstance(self.sources, tuple) and self.sources and all(isinstance(s, SourceConfig) for s in self.sources),
            "sources must be a non-empty list of sources",
        )
        names = [source.name for source in self.sources]
        for name in names:
            _require(names.count(name) == 1, f"sources: the name {name} is used twice, give each source its own")
        _require(
            _is_int(self.sequence_length) and self.sequence_length >= 2,
            f"sequence_length must be a whole number of at least 2, not {self.sequence_length!r}",
        )
        _require(
            _is_number(self.heldout_share) and 0 <= self.heldout_share < 1,
            f"heldout_share must be at least 0 and below 1, not {self.heldout_share!r}",
        )
        _require(
            _is_int(self.heldout_tokens) and self.heldout_tokens >= 2,
            f"heldout_tokens must be a whole number of at least 2, not {self.heldout_tokens!r}",
        )
        _require(isinstance(self.packing, bool), f"packing must be true or false, not {self.packing!r}")
        _require(
            _is_int(self.packing_buffer) and self.packing_buffer >= 1,
            f"packing_buffer must be a whole number of at least 1, not {self.packing_buffer!r}",
        )
        _require(
            self.packing or self.packing_buffer == 64,
            "packing_buffer has no effect without packing: remove it or set packing to true",
        )
        _require(_is_int(self.lanes) and self.lanes >= 1, f"lanes must be a whole number of at least 1, not {self.lanes!r}")
        _require(
            self.cache_dir is None or (isinstance(self.cache_dir, str) and self.cache_dir.strip()),
            f"cache_dir must be a folder, not {self.cache_dir!r}",
        )


def parse_config(raw: Mapping[str, Any]) -> DataConfig:
    """Build a `DataConfig` from plain mappings and lists, as a YAML file or a resolved Hydra group gives them.

    Raises:
        UserError: naming an unknown key (and those that exist), a missing one, or a value that cannot be meant.
    """
    values = _known(raw, DataConfig, "the data configuration")
    sources = values.get("sources")
    if not isinstance(sources, list | tuple):
        raise UserError("the data configuration needs `sources`: a list of sources, each with a name and a kind")
    parsed = []
    for number, source in enumerate(sources, 1):
        entry = _known(source, SourceConfig, f"source {number}")
        for key in ("name", "kind"):
            _require(key in entry, f"source {number} has no {key}: add one")
        parsed.append(SourceConfig(**entry))
    return DataConfig(**{**values, "sources": tuple(parsed)})


def load_config(name_or_path: str) -> DataConfig:
    """Read a configuration by name (`demo`) or from a YAML file (`my/data.yaml`).

    Raises:
        UserError: if there is no such configuration, or its contents are wrong.
    """
    path = Path(name_or_path).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        available = config_names()
        if name_or_path not in available:
            raise UserError(
                f"there is no data configuration {name_or_path!r}: use {', '.join(available)}, or the path of a .yaml file"
            )
        path = config_directory() / f"{name_or_path}.yaml"
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the data configuration {path} cannot be read ({error}): check the path") from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the data configuration {path} is not valid YAML ({reason}): mend it") from None
    if not isinstance(raw, dict):
        raise UserError(f"the data configuration {path} must be a mapping with `sources`")
    return parse_config(raw)


def config_directory() -> Path:
    """Return the folder of the packaged YAML files: beside the code in a wheel, in the member's root in the tree."""
    packaged = Path(__file__).parent / "configs" / "data"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "configs" / "data"


def config_names() -> list[str]:
    """Return the names that `load_config` knows, sorted."""
    return sorted(path.stem for path in config_directory().glob("*.yaml"))


def _known(raw: object, kind: type, where: str) -> dict[str, Any]:
    if not isinstance(raw, Mapping):
        raise UserError(f"{where} must be a mapping of options, not {raw!r}")
    names = [field.name for field in fields(kind)]
    for key in raw:
        _require(key in names, f"{where} has an unknown key {key!r}: the keys are {', '.join(names)}")
    return dict(raw)


def _require(condition: object, message: str) -> None:
    if not condition:
        raise UserError(message)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
