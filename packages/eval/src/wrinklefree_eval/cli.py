"""Command line: `python -m wrinklefree_eval DIR|FILE --tasks NAMES`."""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

DESCRIPTION = """Evaluate a model directory (PyTorch) or a GGUF file (llama.cpp) with lm-eval.

tasks:
  perplexity   held-out Python library code and prose: token perplexity and bits per byte
  sst2_local   film reviews, fresh or rotten: a local stand-in for SST-2, not SST-2 itself
  NAME         any task of lm-eval; most need the Hugging Face hub
"""

EXAMPLES = """examples:
  python -m wrinklefree_eval run/model --tasks perplexity,sst2_local --out run/eval
  python -m wrinklefree_eval run/model.gguf --tasks perplexity --limit 20 --json
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code (0 done, 1 failed, 2 the user's mistake, 75 interrupted)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = _parser().parse_args(argv)
    # Imported after parsing: they bring PyTorch, and --help should not wait for it.
    from bitnet_arch import UserError
    from data_handler import UserError as DataError

    try:
        _run(arguments, shlex.join(["python", "-m", "wrinklefree_eval", *argv]))
    except (UserError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: no results were written; run the command again", file=sys.stderr)
        return 75
    return 0


def _run(arguments: argparse.Namespace, command: str) -> None:
    from wrinklefree_eval.evaluate import evaluate
    from wrinklefree_eval.report import prepare_directory, write_report

    if arguments.out is not None:
        prepare_directory(arguments.out)
    names = [name.strip() for name in arguments.tasks.split(",") if name.strip()]
    result = evaluate(arguments.model, names, limit=arguments.limit, context=arguments.context, command=command)
    if arguments.out is not None:
        paths = write_report(result, arguments.out)
        print(f"wrote {' and '.join(map(str, paths))}", file=sys.stderr)
    try:
        print(json.dumps(result.to_json(), ensure_ascii=False) if arguments.json else result.to_markdown(), flush=True)
    except BrokenPipeError:
        # The reader (such as `head`) has enough; Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="wrinklefree_eval",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="a model directory or a .gguf file")
    parser.add_argument("--tasks", default="perplexity,sst2_local", help="names, separated by commas (perplexity,sst2_local)")
    parser.add_argument("--out", type=Path, help="a directory for results.json and card.md")
    parser.add_argument("--limit", type=int, help="evaluate only the first N examples of each task")
    parser.add_argument("--context", type=int, help="tokens of a window, at most what the model knows (1024)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the card")
    return parser
