"""`export`: a model directory as a GGUF file that has been run and compared before it takes its name."""

import argparse
import json
import os
import pydoc_data.topics
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from bitnet_arch import UserError, load_tokenizer, open_weights
from bitnet_arch.gguf import ARCHITECTURES, EMBEDDING_TYPES, MATRIX_TYPES, annotate_gguf, choose_architecture, export_gguf
from bitnet_arch.gguf.architectures import OURS
from bitnet_arch.parity import (
    EngineInfo,
    ParityBounds,
    ParityError,
    ParityReport,
    has_native_engine,
    native_engine,
    no_engine,
    run_gate,
    tensor_types,
)
from bitnet_arch.parity.engines import NATIVE
from bitnet_arch.weights import WeightReader
from numpy.typing import NDArray

from wrinklefree_inference.llamacpp import NAME, EngineError, LlamaCpp

KINDS = ("auto", *MATRIX_TYPES)
ENGINES = ("auto", "llama.cpp", "native")
NO_KERNELS = "bitnet-kernels, whose engine runs such files, is not installed"
SMALL_MODEL = 20_000_000
SMALL_POSITIONS, LARGE_POSITIONS = 1000, 64
"""Positions that a proof takes of a model of fewer than `SMALL_MODEL` parameters, and of a larger one."""
MAX_WINDOW = 128
"""Tokens a context has at most: the gate restarts it this often."""

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, in all)."""

EXAMPLES = """examples:
  python -m wrinklefree_inference export my-ternary --out my-ternary.gguf
  python -m wrinklefree_inference export my-ternary --out small.gguf --type tq1_0 --embedding q6_k
  python -m wrinklefree_inference export my-qwen3 --out my-qwen3.gguf --architecture qwen3
  python -m wrinklefree_inference export my-ternary --out for-bitnet-cpp.gguf --type i2_s
  python -m wrinklefree_inference export my-lrc-model --out own.gguf --architecture wrinklefree

The native engine runs every file, on all positions. The architectures bitnet, llama, qwen2, qwen3 and gemma3 with any --type but
i2_s are run by llama.cpp, too, on 100 positions or a few more; without it they are not proven. --engine llama.cpp or native leaves
the other one out; llama.cpp alone runs all positions, which takes longer. --embedding q8_0, q6_k and q4_1 change the model a
little; the report says by how much.

A missed bound ends with exit code 1 and leaves no new file. FILE.parity.json holds every figure and its bound.
"""


def export_proven(
    directory: Path | str,
    out: Path | str,
    kind: str = "auto",
    positions: int | None = None,
    progress: Progress | None = None,
    *,
    architecture: str = "auto",
    embedding: str = "f16",
    engine: str = "auto",
) -> ParityReport:
    """Export a model directory to GGUF, prove the file with the engines that run it, and only then give it its name.

    The report is written beside it as `OUT.parity.json` and, in short, into the file's metadata. What stood under the name before
    stays if anything fails.

    Args:
        directory: master or packed model directory with a tokenizer.
        out: the file to write.
        kind: type of the ternary matrices, see `bitnet_arch.gguf.export_gguf`.
        positions: next-token distributions to compare; by default 1,000, or 64 from 20 million parameters on. Fewer give a report
            with status "unproven".
        progress: told of the stages.
        architecture: "auto" or what the file must be; see `export_gguf`.
        embedding: type of embeddings and head; see `export_gguf`.
        engine: what runs the file: "llama.cpp", "native", or "auto", each that can. llama.cpp, a request a position, then runs the
            first windows alone.

    Returns:
        A report with status "proven", or "unproven" with the reason: no engine ran the file, or not llama.cpp although it could;
        too few positions; or rounding noise that would hide errors.

    Raises:
        ParityError: if the file does not compute what was trained.
        UserError: for a mistake in the arguments or the directory, or a full disk.
    """
    report_progress = progress or (lambda *_: None)
    with open_weights(directory) as reader:
        check_engine(engine, choose_architecture(reader, architecture), kind)
        needed = default_positions(reader)
        windows = probe_windows(reader, needed if positions is None else positions)
    bounds = ParityBounds(min_positions=needed)
    check_output(Path(directory), Path(out))
    with _staging(Path(out)) as (stage, publish):
        file = stage / "model.gguf"
        _write(directory, file, Path(out), kind, architecture, embedding, report_progress)
        report = _prove(directory, file, windows, bounds, report_progress, engine)
        if report.status == "failed":
            raise ParityError(replace(report, reason=f"{Path(out).name} was not written: {report.reason}"))
        publish(file, _dated(report))
    return _dated(report)


def export_unproven(
    directory: Path | str,
    out: Path | str,
    kind: str = "auto",
    reason: str = "the gate was skipped on request",
    progress: Progress | None = None,
    *,
    architecture: str = "auto",
    embedding: str = "f16",
) -> ParityReport:
    """Export a model directory to GGUF without running it; the report says so, in the sidecar and in the file.

    Args:
        directory: as in `export_proven`.
        out: as in `export_proven`.
        kind: as in `export_proven`.
        reason: why nothing was proven.
        progress: told of the stages.
        architecture: as in `export_proven`.
        embedding: as in `export_proven`.

    Raises:
        UserError: for a mistake in the arguments or the directory, or a full disk.
    """
    report_progress = progress or (lambda *_: None)
    check_output(Path(directory), Path(out))
    with _staging(Path(out)) as (stage, publish):
        file = stage / "model.gguf"
        _write(directory, file, Path(out), kind, architecture, embedding, report_progress)
        report = _dated(ParityReport(status="unproven", reason=reason, types=tensor_types(file)))
        publish(file, report)
    return report


def _write(directory: Path | str, file: Path, out: Path, kind: str, architecture: str, embedding: str, progress: Progress) -> None:
    def on_tensor(done: int, of: int) -> None:
        progress("writing", done, of)

    try:
        export_gguf(directory, file, kind, on_tensor, architecture=architecture, embedding=embedding)
    except UserError as error:
        raise UserError(str(error).replace(str(file), str(out))) from None


def check_output(directory: Path, out: Path) -> None:
    """Refuse to write over what is no GGUF file, or into the model directory itself.

    Raises:
        UserError: naming what would be lost.
    """
    if out.resolve().parent == directory.resolve():
        raise UserError(f"{out} lies in the model directory itself: write the file beside it")
    if out.is_file() and out.stat().st_size:
        with out.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise UserError(f"{out} exists and is no GGUF file: choose another name")


def check_engine(engine: str, architecture: str, kind: str) -> None:
    """Refuse an engine that does not run a file, before it is written.

    Args:
        engine: as in `export_proven`.
        architecture: what the file will be.
        kind: type of its matrices.

    Raises:
        UserError: for an engine that is unknown, not installed, or does not run it.
    """
    if engine not in ENGINES:
        raise UserError(f"unknown engine {engine!r}: choose {', '.join(ENGINES)}")
    if engine == "native" and not has_native_engine():
        raise UserError("the native engine is not installed: install bitnet-kernels or leave --engine out")
    if engine == "llama.cpp" and (architecture == OURS or kind == "i2_s"):
        what = "I2_S" if kind == "i2_s" else f"the architecture {architecture!r}"
        raise UserError(f"llama.cpp does not run {what}, so that --engine llama.cpp proves nothing: leave --engine out")


def default_positions(reader: WeightReader) -> int:
    """Return how many positions a proof of this model takes."""
    parameters = sum(int(np.prod(reader.shape(name))) for name in reader.keys())  # noqa: SIM118
    return SMALL_POSITIONS if parameters < SMALL_MODEL else LARGE_POSITIONS


def probe_windows(reader: WeightReader, positions: int) -> list[list[int]]:
    """Cut the installed Python's documentation into token windows with `positions` or a few more positions in all.

    Every window has the same length, at most 128 positions and the token that follows the last.

    Raises:
        UserError: if the text gives too few tokens, or tokens that the model does not have.
    """
    if positions < 1:
        raise UserError(f"--positions must be at least 1, not {positions}")
    limit = min(MAX_WINDOW, int(reader.model_config.max_position_embeddings) - 2)
    if limit < 1:
        raise UserError(f"{reader.directory} has a context of only {limit + 2} tokens, too short to probe: export with --unproven")
    count = -(-positions // limit)
    length = -(-positions // count)
    needed = count * (length + 1)
    topics = pydoc_data.topics.topics
    text = "\n".join(topics[key] for key in sorted(topics))
    tokenizer = load_tokenizer(reader.directory)
    # Tokenising all of it takes seconds; 16 characters a token are more than enough for any but a broken tokenizer.
    ids: list[int] = tokenizer(text[: 16 * needed], add_special_tokens=False).input_ids
    if len(ids) < needed:
        raise UserError(
            f"the tokenizer of {reader.directory} makes only {len(ids)} tokens of the probe text, and {needed} are needed: "
            "ask for fewer --positions or export with --unproven"
        )
    ids = ids[:needed]
    if max(ids) >= reader.model_config.vocab_size:
        raise UserError(
            f"the tokenizer of {reader.directory} makes tokens that the model does not have: save the right one with it"
        )
    return [ids[start : start + length + 1] for start in range(0, needed, length + 1)]


def _prove(
    directory: Path | str, file: Path, windows: list[list[int]], bounds: ParityBounds, progress: Progress, engine: str
) -> ParityReport:
    """Run the gate with the engines that run a file; one that refuses it, or stops, is a missed proof."""
    runs = no_engine(file) is None
    native, foreign = engine != "llama.cpp" and has_native_engine(), engine != "native" and runs
    asked = _foreign_windows(windows, bounds) if native else len(windows)
    total, done = asked * (len(windows[0]) - 1), 0

    def on_position() -> None:
        nonlocal done
        done += 1
        progress("engine", done, total)

    def on_stage(stage: str, at: int, of: int) -> None:
        if stage != "engine" or not foreign:
            progress(stage, at, of)

    engines: list[EngineInfo] = []
    with ExitStack() as stack:
        try:
            if foreign:
                started = stack.enter_context(LlamaCpp(file, context=2 * MAX_WINDOW, on_position=on_position))
                engines.append(EngineInfo(started.logprobs, NAME, started.version, started.tokenize, windows=asked))
            if native:
                engines.insert(0, _open_native(file, len(windows[0]), runs))
            report = run_gate(directory, file, engines, windows, bounds, on_stage)
        except EngineError as error:
            return ParityReport(status="failed", reason=str(error), engine=error.engine, types=tensor_types(file))
    if not engines and report.status == "unproven":
        return replace(report, reason=f"{NO_KERNELS}, and {report.reason}")
    return report


def _foreign_windows(windows: list[list[int]], bounds: ParityBounds) -> int:
    """Return how many windows llama.cpp runs beside the native engine."""
    return min(len(windows), -(-min(bounds.min_foreign, bounds.min_positions) // (len(windows[0]) - 1)))


def _open_native(file: Path, context: int, replaceable: bool) -> EngineInfo:
    """Open a file in the native engine, whose errors become those of an engine.

    Args:
        file: the file.
        context: the longest window.
        replaceable: whether llama.cpp runs the file, too.

    Raises:
        EngineError: if the native engine does not run it; so does the returned engine's `run` if it stops.
    """
    advice = "; --engine llama.cpp leaves that out" if replaceable else ""

    def trouble(what: str, error: Exception, advice: str) -> EngineError:
        why = str(error).removeprefix(f"{file}: ") or "there is not enough memory"
        return EngineError(f"the native engine {what} ({why}){advice}", NATIVE)

    def run(ids: list[int]) -> NDArray[np.float64]:
        try:
            return opened.run(ids)
        except ValueError as error:  # such as what is not finite, with which llama.cpp does no better
            raise trouble("stopped", error, "") from None
        except MemoryError as error:
            raise trouble("stopped", error, advice) from None

    try:
        opened = native_engine(file, context)
    except (ValueError, MemoryError) as error:
        raise trouble("does not run it", error, advice) from None
    return replace(opened, run=run)


def _dated(report: ParityReport) -> ParityReport:
    date = datetime.now(UTC).date().isoformat()
    return replace(report, details={"date": date} | report.details)


@contextmanager
def _staging(out: Path) -> Iterator[tuple[Path, Callable[[Path, ParityReport], None]]]:
    """Give a private folder beside `out` and a function that moves a finished file from it to `out`, with its sidecar."""
    if out.is_dir():
        raise UserError(f"{out} is a directory: give the name of a file to write")
    stage: Path | None = None

    def publish(file: Path, report: ParityReport) -> None:
        assert stage is not None
        annotated, sidecar = stage / "annotated.gguf", stage / "parity.json"
        annotate_gguf(file, annotated, report.metadata())
        sidecar.write_text(json.dumps(report.to_json(), indent=2, allow_nan=False) + "\n")
        final = out.with_name(f"{out.name}.parity.json")
        # A sidecar never stands beside a file that it does not describe.
        final.unlink(missing_ok=True)
        os.replace(annotated, out)
        os.replace(sidecar, final)

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        yield stage, publish
    except OSError as error:
        raise UserError(f"writing {out} failed ({error.strerror or error}): free some space or choose another output") from None
    finally:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)


def add_parser(subparsers: Any) -> None:
    """Add `export` to a command line; its `run` default takes the parsed namespace."""
    parser = subparsers.add_parser(
        "export",
        help="write a model directory as a proven GGUF file",
        description="Write a model directory as GGUF, run the file in each engine that can, and compare it with what was trained.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", type=Path, help="a master or packed model directory")
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    parser.add_argument("--type", default="auto", choices=KINDS, help="of the ternary matrices (auto: exact for each width)")
    parser.add_argument(
        "--architecture",
        default="auto",
        choices=ARCHITECTURES,
        help="of the file (auto: what llama.cpp runs, if that holds the model, else wrinklefree)",
    )
    parser.add_argument("--embedding", default="f16", choices=EMBEDDING_TYPES, help="type of embeddings and head (default f16)")
    parser.add_argument("--positions", type=int, help="distributions to compare (1000; 64 from 20 million parameters on)")
    parser.add_argument(
        "--engine", default="auto", choices=ENGINES, help="what runs the file (auto: the native engine, and llama.cpp if it can)"
    )
    parser.add_argument("--unproven", action="store_true", help="skip the gate; the file is labelled unproven")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return 0, or 1 if the file was refused.

    Raises:
        UserError: for a mistake in the arguments or the directory.
    """
    if arguments.unproven and arguments.positions is not None:
        raise UserError("--positions has no effect with --unproven: leave one of them out")
    if arguments.unproven and arguments.engine != "auto":
        raise UserError("--engine has no effect with --unproven: leave one of them out")
    source, out, kind = arguments.directory, arguments.out, arguments.type
    form = {"architecture": arguments.architecture, "embedding": arguments.embedding}
    with _progress_bar() as progress:
        try:
            if arguments.unproven:
                report = export_unproven(source, out, kind, progress=progress, **form)
            else:
                report = export_proven(source, out, kind, arguments.positions, progress, engine=arguments.engine, **form)
        except ParityError as error:
            if arguments.json:
                print(json.dumps(error.report.to_json()))
            print(f"error: {error}", file=sys.stderr)
            return 1
    if arguments.json:
        print(json.dumps({"out": str(arguments.out), "bytes": arguments.out.stat().st_size} | report.to_json()))
    else:
        _print_report(arguments.out, report)
    return 0


def _print_report(out: Path, report: ParityReport) -> None:
    size = out.stat().st_size
    print(f"wrote {out} ({size:,} bytes, {report.status}{': ' + report.reason if report.reason else ''})")
    for kind, names in tensors_by_type(report.types).items():
        print(f"  {kind:<6} {', '.join(names)}")
    if report.engine:
        positions = report.details.get("engine_positions", report.positions)
        print(f"compared on {positions} positions with {report.engine} {report.engine_version}:")
    for check in report.checks:
        value = "-" if check.value is None else f"{check.value:.3g}"
        verdict = {True: "holds", False: "missed", None: "undecided"}[check.holds]
        print(f"  {check.name:<26} {value:>10} {check.op} {check.bound:<10.3g} {verdict}")


def tensors_by_type(types: dict[str, str]) -> dict[str, list[str]]:
    """Return what became what: type name to tensor names, alike ones of several blocks as one, such as `blk.*.attn_q (30)`.

    Args:
        types: tensor name to type name.
    """
    counted: dict[str, Counter[str]] = {}
    for name, kind in types.items():
        short = re.sub(r"^blk\.\d+\.", "blk.*.", name.removesuffix(".weight"))
        counted.setdefault(kind, Counter())[short] += 1
    return {
        kind: [f"{name} ({count})" if "*" in name else name for name, count in names.items()] for kind, names in counted.items()
    }


@contextmanager
def _progress_bar() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<8}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = RichProgress(*columns, console=console, transient=True)
    tasks: dict[str, Any] = {}

    def show(stage: str, done: int, of: int) -> None:
        if stage not in tasks:
            tasks[stage] = bar.add_task(stage, total=of)
        bar.update(tasks[stage], completed=done, total=of)

    with bar if console.is_terminal else nullcontext():
        yield show
