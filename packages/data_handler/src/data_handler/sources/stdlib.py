"""The text that every Python has: the standard library's code and its documentation, as two disjoint domains.

A module's docstrings belong to the prose alone: they are cut out of the code, and paragraphs that repeat are dropped
from the prose. Otherwise the code of the training part would hold the very sentences that the held-out prose asks for.
"""

import ast
import importlib.util
import inspect
import os
import platform
import re
import sysconfig
import tokenize
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from typing import Generic, TypeVar

from data_handler.config import SourceConfig
from data_handler.errors import UserError
from data_handler.sources.files import ends_early
from data_handler.sources.reader import Record, Shard

LEFT_OUT = frozenset(
    {
        *("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload"),
        *("encodings", "pydoc_data"),  # generated tables; the topics, which are the prose
        *("idlelib", "turtledemo", "ensurepip", "lib2to3", "distutils"),  # applications, and what later Pythons lack
    }
)
"""Folders of the standard library that are neither code to learn from nor in every Python."""

Scope = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
T = TypeVar("T")


class _Kept(Generic[T]):
    """An iterable that keeps what it has made: parsing the library takes seconds, and a few documents are often enough."""

    def __init__(self, make: Callable[[], Iterator[T]]) -> None:
        self._make = make
        self._made: list[T] = []
        self._rest: Iterator[T] | None = None

    def __iter__(self) -> Iterator[T]:
        number = 0
        while True:
            if number == len(self._made):
                try:
                    self._made.append(self._next())
                except StopIteration:
                    return
            yield self._made[number]
            number += 1

    def _next(self) -> T:
        if self._rest is None:
            self._rest = islice(self._make(), len(self._made), None)
        try:
            return next(self._rest)
        except StopIteration:
            raise
        except BaseException:  # a generator that has failed would look as if it had come to its end
            self._rest = None
            raise


class _StdlibReader(ABC):
    """One shard; a position counts documents."""

    def __init__(self, source: SourceConfig) -> None:
        self.source = source

    @abstractmethod
    def texts(self) -> Iterator[str]:
        """Yield all documents."""

    def shards(self) -> Sequence[Shard]:
        """Return the standard library as one shard; its stamp is that of the files it is made from."""
        return [Shard(f"the standard library of Python {platform.python_version()}", 1, _stamp())]

    def read(self, shard: int, start: int = 0) -> Iterator[tuple[int, Record]]:
        """Yield the documents (see `Reader.read`)."""
        del shard
        number = 0
        for number, text in enumerate(self.texts(), 1):
            if number > start and text.strip():
                yield number, Record(text)
        if number < start:
            raise ends_early(self.source, "the standard library", number, start, "documents")

    def prefix(self, shard: int, position: int) -> str | None:
        """Return None: nothing is known of a part of a shard."""
        del shard, position
        return None


class CodeReader(_StdlibReader):
    """The standard library's modules, one a document, without docstrings; sorted by path."""

    def texts(self) -> Iterator[str]:
        """Yield the modules."""
        return (code for code, _ in _modules())


class ProseReader(_StdlibReader):
    """Python's reference topics, then each module's docstrings joined; no paragraph occurs twice."""

    def texts(self) -> Iterator[str]:
        """Yield topics and docstrings."""
        return iter(_prose())


def split_docstrings(source: str) -> tuple[str, list[str]]:
    """Split a module into code without docstrings, which still parses, and its docstrings in order, unindented.

    Raises:
        SyntaxError: if the source is not Python of this version.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # of invalid escapes, which are the library's affair
        tree = ast.parse(source)
    found = sorted(_docstring_nodes(tree), key=lambda pair: pair[1].lineno)
    lines: list[str | None] = [*source.split("\n")]
    for scope, node in found:
        _blank(lines, node, alone=len(scope.body) == 1 and not isinstance(scope, ast.Module))
    texts = [inspect.cleandoc(str(ast.literal_eval(node.value))) for _, node in found]
    return "\n".join(line for line in lines if line is not None).lstrip("\n"), texts


def unique_paragraphs(documents: Iterable[str]) -> Iterator[str]:
    """Yield documents without the paragraphs that occurred before, in this document or an earlier one.

    Paragraphs are divided by blank lines and compared with their white space collapsed, so that indentation and line
    breaks do not hide a repetition. A document that has nothing left is left out.
    """
    seen: set[str] = set()
    for document in documents:
        kept = []
        for paragraph in paragraphs(document):
            key = " ".join(paragraph.split())
            if key not in seen:
                seen.add(key)
                kept.append(paragraph)
        if kept:
            yield "\n\n".join(kept)


def paragraphs(text: str) -> list[str]:
    """Return the non-empty paragraphs of a text, divided by blank lines."""
    return [p.rstrip() for p in re.split(r"\n[^\S\n]*(?:\n[^\S\n]*)*\n", text) if p.strip()]


def _split_modules() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield (code, docstrings) of every module."""
    empty = True
    for path in _sources():
        try:
            with tokenize.open(path) as file:
                code, docstrings = split_docstrings(file.read())
        except (SyntaxError, UnicodeDecodeError):  # a template or a sample, not a module
            continue
        empty = False
        yield code, tuple(docstrings)
    if empty:
        root = sysconfig.get_paths()["stdlib"]
        raise UserError(f"this Python has no library sources in {root}: install them, or use another data configuration")


@lru_cache(maxsize=1)
def _modules() -> Iterable[tuple[str, tuple[str, ...]]]:
    """Return (code, docstrings) of every module; kept, because both domains and both splits ask for it."""
    return _Kept(_split_modules)


@lru_cache(maxsize=1)
def _sources() -> tuple[Path, ...]:
    """Return the library's files that are neither tests nor tables, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, folders, files in os.walk(root):
        # Not walked: site-packages alone may hold a hundred times the library. _sysconfigdata describes one machine's build;
        # config-* holds its makefiles.
        top = Path(folder) == root
        folders[:] = [name for name in folders if name not in LEFT_OUT and not (top and name.startswith("config-"))]
        found += [Path(folder, name) for name in files if name.endswith(".py") and not (top and name.startswith("_sysconfigdata"))]
    return tuple(sorted(found))


@lru_cache(maxsize=1)
def _stamp() -> str:
    """Return what changes when a file of the library does."""
    digest = blake2b(platform.python_version().encode(), digest_size=16)
    for path in _sources():
        status = path.stat()
        digest.update(f"{path}:{status.st_size}:{status.st_mtime_ns}".encode())
    return digest.hexdigest()


def _made_prose() -> Iterator[str]:
    if importlib.util.find_spec("pydoc_data") is None:
        raise UserError("this Python lacks pydoc_data: install its full standard library, or use another data configuration")
    from pydoc_data.topics import topics  # half a megabyte, wanted by this source only

    joined = ("\n\n".join(docstrings) for _, docstrings in _modules())
    return unique_paragraphs(chain((topics[key] for key in sorted(topics)), joined))


@lru_cache(maxsize=1)
def _prose() -> Iterable[str]:
    return _Kept(_made_prose)


def _docstring_nodes(tree: ast.Module) -> Iterator[tuple[Scope, ast.Expr]]:
    """Yield scopes with their docstring statement; only statements are walked, as no expression holds one."""
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, Scope) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
                yield node, first
        stack.extend(
            child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case)
        )


def _blank(lines: list[str | None], node: ast.Expr, alone: bool) -> None:
    """Take a docstring's lines out of `lines`; where code shares them or nothing else is left, `pass` stands in."""
    start, end = node.lineno - 1, (node.end_lineno or node.lineno) - 1
    first, last = lines[start], lines[end]
    assert first is not None
    assert last is not None
    before = first.encode()[: node.col_offset].decode()  # ast counts bytes
    after = last.encode()[node.end_col_offset :].decode()
    lines[start : end + 1] = [None] * (end - start + 1)
    if alone or before.strip() or after.strip():
        lines[start] = f"{before}pass{after}"
