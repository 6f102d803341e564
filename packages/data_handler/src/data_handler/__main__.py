"""Command line of the library: `python -m data_handler stats CONFIG`."""

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from data_handler.cache import SHOW_PROGRESS_AFTER
from data_handler.config import DataConfig, SourceConfig, config_names, load_config
from data_handler.encoding import Encoder
from data_handler.errors import UserError
from data_handler.sources import records
from data_handler.split import is_heldout

HUB_DOCUMENTS = 1000

EXAMPLES = """examples:
  python -m data_handler stats demo
  python -m data_handler stats my-data.yaml --tokenizer my-model --json
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code (0 done, 1 failed, 2 the user's mistake, 75 interrupted)."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written; run the command again", file=sys.stderr)
        return 75
    return 0


def source_statistics(source: SourceConfig, config: DataConfig, tokenizer: Any = None, limit: int | None = None) -> dict[str, Any]:
    """Count a source's documents, characters and, given a tokenizer, tokens, and how many of each are held out.

    Args:
        source: one of the configuration's sources.
        config: for its held-out share.
        tokenizer: a Hugging Face tokenizer, or None.
        limit: stop after this many documents; `complete` then says whether there were more.

    Raises:
        UserError: if the source cannot be read or is empty.
    """
    counts = dict.fromkeys(("documents", "characters", "tokens", "heldout_documents", "heldout_characters", "heldout_tokens"), 0)
    encoder = Encoder(tokenizer) if tokenizer else None
    found = records(source)
    shown = tqdm(islice(found, limit), desc=source.name, delay=SHOW_PROGRESS_AFTER, disable=None, leave=False)
    for record in shown:
        tokens = len(encoder.encode([record], f"source {source.name}")[0].tokens) if encoder else 0
        for part in ("", "heldout_") if is_heldout(record.text, config.heldout_share) else ("",):
            counts[f"{part}documents"] += 1
            counts[f"{part}characters"] += len(record.text)
            counts[f"{part}tokens"] += tokens
    if not counts["documents"]:
        raise UserError(f"source {source.name} is empty: give it at least one document with text")
    if not tokenizer:
        del counts["tokens"], counts["heldout_tokens"]
    return {"domain": source.name, "kind": source.kind, "weight": source.weight, **counts, "complete": next(found, None) is None}


def _stats(arguments: argparse.Namespace) -> None:
    if arguments.limit is not None and arguments.limit < 1:
        raise UserError(f"--limit must be at least 1, not {arguments.limit}")
    config = load_config(arguments.config)
    tokenizer = _tokenizer(arguments.tokenizer) if arguments.tokenizer else None
    rows = []
    for source in config.sources:
        limit = arguments.limit or (HUB_DOCUMENTS if source.kind == "hub" else None)
        rows.append(source_statistics(source, config, tokenizer, limit))
    if arguments.json:
        print(json.dumps({"config": arguments.config, "heldout_share": config.heldout_share, "domains": rows}))
        return
    columns = [name for name in rows[0] if name not in ("kind", "weight", "complete")]
    table = [columns, *([f"{row[c]:,}" if isinstance(row[c], int) else row[c] for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    for line in table:
        print("  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]))
    for row in rows:
        if not row["complete"]:
            print(f"{row['domain']}: only the first {row['documents']:,} documents were counted (--limit)")


def _tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer  # only where it is asked for

    if not directory.is_dir():
        raise UserError(f"--tokenizer {directory} is not a directory: give a model directory with tokenizer files")
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--tokenizer {directory} holds no tokenizer ({reason}): give a model directory with one") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="data_handler", description="Look at training data.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    stats = commands.add_parser(
        "stats",
        help="count documents, characters and tokens of every domain",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    stats.add_argument("config", help=f"{', '.join(config_names())}, or a .yaml file")
    stats.add_argument("--tokenizer", type=Path, help="a model directory, to count tokens with")
    stats.add_argument("--limit", type=int, help=f"documents a domain at most (default: all; {HUB_DOCUMENTS:,} from the hub)")
    stats.add_argument("--json", action="store_true", help="print as JSON")
    stats.set_defaults(run=_stats)
    return parser


if __name__ == "__main__":
    sys.exit(main())
