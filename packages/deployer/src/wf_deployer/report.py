"""Shows the doctor's findings: as JSON for programs, as a table for people."""

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from wf_deployer.doctor import Check, is_healthy


def print_json(checks: Sequence[Check]) -> None:
    """Print `{"ok": bool, "checks": [{"name", "group", "required", "ok", "found", "remedy"}, ...]}`."""
    print(json.dumps({"ok": is_healthy(checks), "checks": [asdict(check) for check in checks]}, indent=2))


def print_table(checks: Sequence[Check]) -> None:
    """Print a table of what was found, and one line that sums it up."""
    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    table.add_column("what", overflow="fold")
    table.add_column("found", overflow="fold")
    table.add_column("how to get it", overflow="fold")
    group = None
    for check in checks:
        if group is not None and check.group != group:
            table.add_row()
        group = check.group
        mark, style = ("ok", "green") if check.ok else ("MISSING", "bold red") if check.required else ("no", "yellow")
        # Text, not str: a path or a version may hold what rich reads as markup.
        table.add_row(Text(mark, style), Text(check.name), Text(check.found), Text("" if check.ok else check.remedy))
    console.print(table)
    missing = [check.name for check in checks if check.required and not check.ok]
    if missing:
        console.print(Text(f"\nMissing and required: {', '.join(missing)}.", "bold red"))
    else:
        console.print(Text("\nAll that is required is here.", "green"))
