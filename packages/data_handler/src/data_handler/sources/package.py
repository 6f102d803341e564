"""Text files that an installed distribution ships."""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from data_handler.config import SourceConfig
from data_handler.errors import UserError
from data_handler.sources.files import cut_text, read_text


def package_documents(source: SourceConfig) -> Iterator[str]:
    """Yield a distribution's text files, sorted by path, long ones in several documents.

    The path is `DISTRIBUTION:GLOB`; the glob is matched against the paths that the distribution lists, relative to
    `site-packages`, and its `*` also crosses folders. Nothing of the package is imported or run.
    """
    package, _, pattern = str(source.path).partition(":")
    try:
        listed = files(package) or []
    except PackageNotFoundError:
        raise UserError(
            f"source {source.name}: the package {package} is not installed: install it (pip install {package})"
        ) from None
    paths = {str(entry): Path(str(entry.locate())) for entry in listed if fnmatchcase(entry.as_posix(), pattern)}
    chosen = [paths[name] for name in sorted(paths) if paths[name].is_file()]
    if not chosen:
        raise UserError(f"source {source.name}: the package {package} lists no file that matches {pattern!r}: correct the glob")
    for path in chosen:
        yield from cut_text(read_text(path, source))
