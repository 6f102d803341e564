"""Text files that an installed distribution ships."""

from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from data_handler.errors import UserError
from data_handler.sources.files import TextReader


class PackageReader(TextReader):
    """A distribution's text files, sorted by path, long ones in several documents; a position counts characters.

    The path is `DISTRIBUTION:GLOB`; the glob is matched against the paths that the distribution lists, relative to
    `site-packages`, and its `*` also crosses folders. Nothing of the package is imported or run.
    """

    def paths(self) -> list[Path]:
        """Return the files that match, sorted by listed path.

        Raises:
            UserError: if the package is not installed, or lists no such file.
        """
        if self._paths is None:
            self._paths = self._listed()
        return self._paths

    def _listed(self) -> list[Path]:
        package, _, pattern = str(self.source.path).partition(":")
        where = f"source {self.source.name}: the package {package}"
        try:
            listed = files(package) or []
        except PackageNotFoundError:
            raise UserError(f"{where} is not installed: install it (pip install {package})") from None
        paths = {str(entry): Path(str(entry.locate())) for entry in listed if fnmatchcase(entry.as_posix(), pattern)}
        chosen = [paths[name] for name in sorted(paths) if paths[name].is_file()]
        if not chosen:
            raise UserError(f"{where} lists no file that matches {pattern!r}: correct the glob")
        return chosen
