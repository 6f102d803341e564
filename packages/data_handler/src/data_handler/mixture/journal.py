"""Results kept one a line, so that a sweep that was stopped goes on with the runs that are missing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_handler.errors import UserError


class Journal:
    """Results of named computations in a JSON Lines file.

    The first line is the identity of what is computed: a file of something else is refused, not mixed in. A line that a
    crash cut short is dropped. Without a path nothing is kept.
    """

    def __init__(self, path: Path | None, identity: dict[str, Any]) -> None:
        """Open or begin a journal.

        Raises:
            UserError: if the file is of another identity, or cannot be read or written.
        """
        self.path = path
        self._results: dict[str, Any] = {}
        own = json.loads(json.dumps(identity))
        if path is None:
            return
        try:
            lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
            whole = lines[:-1]  # what follows the last line break is the rest of an interrupted write
            if whole and json.loads(whole[0]) != own:
                raise UserError(f"{path} keeps the results of other settings: give another path, or remove it")
            for line in whole[1:]:
                name, value = json.loads(line)
                self._results[name] = value
            path.parent.mkdir(parents=True, exist_ok=True)
            content = [json.dumps(own), *(json.dumps([name, value]) for name, value in self._results.items())]
            path.write_text("".join(f"{line}\n" for line in content), encoding="utf-8")
        except (OSError, json.JSONDecodeError) as error:
            raise UserError(f"the journal {path} cannot be used ({error}): give another path, or remove it") from None

    def __contains__(self, name: str) -> bool:
        return name in self._results

    def get(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return a kept result, or compute and keep it (JSON values; the same before and after a restart)."""
        if name not in self._results:
            line = json.dumps([name, compute()])
            if self.path is not None:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
            self._results[name] = json.loads(line)[1]
        return self._results[name]
