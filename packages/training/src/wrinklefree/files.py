"""Files that are whole under their final name or not there, and one sentence when the disk is full."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bitnet_arch import UserError


@contextmanager
def writing(path: Path, key: str = "output_dir") -> Iterator[None]:
    """Turn a failure to write `path` into a `UserError` that names it, and the setting that it follows from."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        elsewhere = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS)
        remedy = f"choose another {key}" if elsewhere else f"free some space, or choose another {key},"
        raise UserError(f"writing {path} failed ({reason}): {remedy} and run again") from None


@contextmanager
def complete(path: Path) -> Iterator[Path]:
    """Give a temporary path (of the same suffix) whose file takes the name `path` when the block ends without an error.

    Raises:
        UserError: if writing fails; what stood under the name is still there.
    """
    temporary = path.with_name(f".{path.stem}.partial{path.suffix}")
    with writing(path):
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with complete(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")
