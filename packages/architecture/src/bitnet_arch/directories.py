"""Model directories are written as a whole: filled beside their place, then renamed; what is no model is never replaced."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from bitnet_arch.configs import read_config
from bitnet_arch.errors import UserError

MODEL_SUFFIXES = frozenset({".json", ".safetensors", ".jinja", ".txt", ".model"})
"""What a model directory is made of; one that holds anything else is never replaced."""

CARD_FILE = "README.md"
CARD_MARK = "<!-- generated from the files beside it: edits are lost when it is written again -->"
"""By which a card that `bitnet_arch.hub` wrote is told from one that people wrote."""


def write_directory(directory: Path | str, fill: Callable[[Path], None]) -> None:
    """Create or replace `directory` as a whole: `fill` writes into a sibling that takes the name when complete.

    Raises:
        UserError: if writing fails, for example on a full disk; what was there before is still there.
    """
    directory = Path(directory)
    check_replaceable(directory)
    directory = directory.resolve() if directory.is_symlink() else directory  # what a link points to is replaced, not the link
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    except OSError as error:
        raise UserError(f"cannot write beside {directory}: {error.strerror}") from None
    try:
        fill(temporary)
        for file in temporary.iterdir():
            file.chmod(0o644)
        temporary.chmod(0o755)
        if directory.exists():
            previous = temporary.with_name(temporary.name + ".previous")
            os.replace(directory, previous)
            try:
                os.replace(temporary, directory)
            except BaseException:
                os.replace(previous, directory)
                raise
            shutil.rmtree(previous)
        else:
            os.replace(temporary, directory)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"writing {directory} failed ({reason}): free some space or choose another output") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_replaceable(directory: Path) -> None:
    """Refuse a path that `write_directory` would not replace.

    Raises:
        UserError: if it holds anything but a model.
    """
    if directory.exists() and (not directory.is_dir() or _is_foreign(directory)):
        raise UserError(f"{directory} exists and is not a model directory: move it away or choose another output")


def _is_foreign(directory: Path) -> bool:
    """Whether a directory holds something that is not a model: it must not be replaced."""
    if not any(directory.iterdir()):
        return False
    try:
        read_config(directory)
    except UserError:
        return True
    return any(entry.is_dir() or not _is_ours(entry) for entry in directory.iterdir())


def _is_ours(file: Path) -> bool:
    if file.name == CARD_FILE:
        return CARD_MARK in file.read_text(encoding="utf-8", errors="replace")
    return file.suffix in MODEL_SUFFIXES
