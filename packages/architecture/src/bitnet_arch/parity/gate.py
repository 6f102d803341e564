"""The parity gate: is a GGUF file, as an engine runs it, what was trained?

Points, in the order in which they run: the file's bytes and metadata against its source; the engine's tokens against the
directory's tokenizer; packed layers against fake-quantised ones on identical inputs; the packed model end to end; the engine
against a torch emulation of its own activation handling; the engine against training's own forward.

Fixed bounds on distributions fail right models: an int8 code at a rounding edge turns a difference in the last place into
one in the last code, and deep or outlier-ridden models amplify that. So the same run measures how far rounding alone moves this
model, and a bound widens to `floor_factor` times that (against training also to `handling_factor` times what the engine's
rounding by blocks costs in torch). No bound widens beyond its cap: `resolution` of what Q4_0 in place of ternary does to the same
figure of the same model, or `perplexity_cap`. All floors and caps come from the model directory, so that a wrong file or engine
cannot widen its own bounds.

What the status says:

* **failed**: a figure lies beyond its bound and beyond what rounding explains.
* **proven**: engines ran the file, on enough positions, and every figure lies within its bound. Only the activation ratios
  and the margins of changed choices (`MAY_STAY_OPEN`, which says why) may be undecided; the reason then names them.
* **unproven**: anything else, with the reason: no engine ran the file, or not the one that this project did not write although it
  could; too few positions; a diffusion model, whose attention in both directions no engine is compared in; or a figure that
  rounding explains and a wrong weight type would explain, too (undecided).

Quantised embeddings (Q8_0, Q6_K, Q4_1) change the model by choice. The engine is then compared with training's forward *with the
file's embeddings*, and what the embeddings themselves cost is measured and told in the reason. Beyond `perplexity_cap` the file is
unproven.

The report names the digests of the file's tensors and of the directory's weights, so that it proves these and no others
(`bitnet_arch.parity.proof`).

Two kinds of engine can take part, each by its own bounds (`bitnet_arch.parity.checks`). llama.cpp rounds activations by blocks and
keeps keys and values in f16: it is compared with a torch emulation of that, and with training. The native engine computes
training's own forward of the file's values: it is compared with that, and its bounds are those of packed layers. A file that
llama.cpp runs (stock architectures) is proven by llama.cpp, on fewer positions (`ParityBounds.min_foreign`) where the native engine
ran all of them; one that it does not run (`wrinklefree`, or I2_S) is proven by the native engine together with the comparison of
bytes, by a reader of its own. Without an engine a file is compared as far as that goes: bytes, the tokenizer that
`tokenizer_from_gguf` rebuilds, layers, and the packed model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bitnet_arch.checkpoint import load_tokenizer
from bitnet_arch.diffusion import diffusion_of
from bitnet_arch.errors import UserError
from bitnet_arch.families import family_of
from bitnet_arch.gguf.architectures import written_architecture
from bitnet_arch.gguf.floats import EMBEDDING_TYPES, TYPE_NAMES
from bitnet_arch.gguf.plan import EMBEDDINGS
from bitnet_arch.gguf.reader import GgufFile, read_gguf
from bitnet_arch.gguf.types import BF16, BY_ID, F16
from bitnet_arch.gguf.verify import file_differences, plans_as_written
from bitnet_arch.memory import return_memory
from bitnet_arch.parity.activations import CODES
from bitnet_arch.parity.checks import PAIRS, ROLES, Found, Pairs, end_to_end_checks, engine_checks, native_checks
from bitnet_arch.parity.engines import EngineInfo, no_engine, tokenizer_of
from bitnet_arch.parity.forwards import FORWARDS, TRAINING, Forward
from bitnet_arch.parity.layerwise import LayerDifference
from bitnet_arch.parity.measure import compare, summarize
from bitnet_arch.parity.proof import source_digest, tensors_digest
from bitnet_arch.parity.report import MAY_STAY_OPEN, Check, ParityBounds, ParityReport, at_most
from bitnet_arch.parity.stream import LayerStream
from bitnet_arch.parity.tokens import tokenizer_check
from bitnet_arch.weights import WeightReader, open_weights

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, in all)."""

MAX_LOGPROBS = 1 << 19
"""Log-probabilities of one forward that are held at a time."""


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What an engine did.

    Attributes:
        engine: the engine.
        positions: distributions that it gave.
        pairs: what is compared because of it.
        found: distances, on its positions.
    """

    engine: EngineInfo
    positions: int
    pairs: Pairs
    found: Found = field(default_factory=dict)


@dataclass
class _Measured:
    """What a run found.

    Attributes:
        differences: tensors and keys in which the file differs from its source.
        layers: packed layers against fake-quantised ones.
        tokenizers: the comparisons of tokens.
        runs: of the engines that took part.
        found: distances between forwards that need no engine, on all positions.
    """

    differences: list[str]
    layers: LayerDifference
    tokenizers: list[Check]
    runs: list[_Run]
    found: Found = field(default_factory=dict)


def run_gate(
    directory: Path | str,
    gguf_path: Path | str,
    engines: EngineInfo | Sequence[EngineInfo] | None,
    windows: list[list[int]],
    bounds: ParityBounds | None = None,
    progress: Progress | None = None,
    forwards: dict[str, Forward] | None = None,
) -> ParityReport:
    """Compare a file, run by engines, with the model directory it was made from.

    Args:
        directory: the model directory (master or packed).
        gguf_path: the file.
        engines: an engine that has loaded the file, or one of each handling of activations; None if none runs it, and then the
            status is at best "unproven".
        windows: token ids, all of one length of at least 2, no two alike; each is a context of its own, and its last token is
            only a target.
        bounds: what to decide by.
        progress: told of the stages.
        forwards: replaces `FORWARDS`, for independent controls.

    Raises:
        UserError: if the windows are empty, uneven or alike, the directory or file cannot be read, or llama.cpp is given for a
            file that it does not run.
    """
    bounds, report_progress = bounds or ParityBounds(), progress or (lambda *_: None)
    if not windows or len({len(window) for window in windows}) != 1 or len(windows[0]) < 2:
        raise UserError("the parity gate needs token windows of one length of at least 2")
    if len({tuple(window) for window in windows}) != len(windows):
        raise UserError("the parity gate counts positions, and a token window that is given twice shows nothing new: give others")
    given = [engines] if isinstance(engines, EngineInfo) else list(engines or ())
    if len({engine.handling for engine in given}) != len(given):
        raise UserError("the parity gate compares one engine of each handling of activations: give one of them at a time")
    written = read_gguf(gguf_path)
    if any(engine.handling == "llama.cpp" for engine in given) and (why := no_engine(written)) is not None:
        raise UserError(f"{gguf_path} cannot be compared with an engine: {why}")
    with open_weights(directory) as reader:
        report_progress("bytes", 0, 1)
        differences = file_differences(reader, gguf_path)
        digests = {"tensors_sha256": tensors_digest(written), "source_sha256": source_digest(reader)}
        return_memory()
        report_progress("bytes", 1, 1)
        tokenizers = _tokenizer_checks(given, reader, written)
        ids, embeddings = torch.tensor(windows), bool(quantised_embeddings(written))
        runs = [_run_of(engine, ids[:, 1:], embeddings) for engine in given]
        wanted = dict.fromkeys(TRAINING, len(ids))
        for run in runs:
            asked = len(ids) if run.engine.windows is None else min(len(ids), run.engine.windows)
            wanted |= {n: max(asked, wanted.get(n, 0)) for pair in run.pairs.values() for n in pair}
        forwards = {name: forward for name, forward in (forwards or FORWARDS).items() if name in wanted}
        only = {name: wanted[name] for name in forwards}
        stream = LayerStream(reader, stored_types(reader, written), ids[:, :-1], forwards, only)
        layers = stream.run(bounds.code_edge, lambda done, of: report_progress("layers", done, of))
        measured = _Measured(differences, layers, tokenizers, runs)
        _compare(stream, measured, ids, report_progress)
        details = digests | {"context": ids.shape[1] - 1}
        sliding = getattr(reader.model_config, "sliding_window", None) or 0
        if sliding >= ids.shape[1] - 1:
            details["not_reached"] = f"no context is longer than the sliding window of {sliding}"
        if diffusion_of(reader.model_config) is not None:
            details["not_compared"] = "attention in both directions, which diffusion decodes with, was not compared"
    return _report(written, measured, bounds, ids[:, 1:].numel(), details)


def _run_of(engine: EngineInfo, targets: torch.Tensor, embeddings: bool) -> _Run:
    """Return an engine's run before it: its positions, and what will be compared.

    Args:
        engine: the engine.
        targets: int64 `[windows, time]`.
        embeddings: whether the file's embeddings are quantised.
    """
    roles = ROLES[engine.handling]
    pairs = roles.with_embeddings() if embeddings else roles.pairs
    return _Run(engine=engine, positions=targets[: engine.windows].numel(), pairs=pairs)


def _compare(stream: LayerStream, measured: _Measured, ids: torch.Tensor, progress: Progress) -> None:
    """Measure the distances between forwards, and to the engines, that a finished stream allows."""
    parts: dict[str, list[NDArray[np.float64]]] = {}
    vocabulary = int(stream.reader.model_config.vocab_size)
    step = max(1, MAX_LOGPROBS // vocabulary)
    for index, window in enumerate(ids):
        progress("engine", index, len(ids))
        asked = [run for run in measured.runs if run.engine.windows is None or index < run.engine.windows]
        by_engine = {ROLES[r.engine.handling].column: _engine_rows(r.engine, window[:-1].tolist(), vocabulary) for r in asked}
        pairs = PAIRS | {name: pair for run in asked for name, pair in run.pairs.items()}
        known = {*stream.forwards, *by_engine}
        pairs = {name: pair for name, pair in pairs.items() if known.issuperset(pair)}
        names = {name for pair in pairs.values() for name in pair} - by_engine.keys()
        targets = window[1:].numpy()
        for start in range(0, len(targets), step):
            rows = slice(start, start + step)
            found = stream.logprobs(names, index, rows) | {name: values[rows] for name, values in by_engine.items()}
            for name, (p, q) in pairs.items():
                parts.setdefault(name, []).append(compare(found[p], found[q], targets[rows]))
    progress("engine", len(ids), len(ids))
    joined = {name: np.concatenate(rows) for name, rows in parts.items()}
    measured.found |= {name: summarize([rows]) for name, rows in joined.items()}
    for run in measured.runs:
        run.found.update({n: summarize([joined[n][: run.positions]]) for n in PAIRS | run.pairs if n in joined})


def stored_types(reader: WeightReader, written: GgufFile) -> dict[str, int]:
    """Return the ggml type that a file gives each matrix, the embedding and the head, by their names in the directory.

    What the file lacks or has in a type that is never written, which the comparison of bytes tells, counts as F16.
    """
    plans = plans_as_written(reader, written, written_architecture(reader, written.metadata.get("general.architecture")))
    family = family_of(reader.model_config)
    types = {plan.source: plan.ggml_id for plan in plans if plan.part in ("ternary", "codes")}
    return types | {p.source: p.ggml_id for p in plans if p.source in (f"{family.embedding}.weight", f"{family.head}.weight")}


def quantised_embeddings(written: GgufFile) -> list[str]:
    """Return the names of the types of a file's embedding and head that are coarser than 16 bits."""
    found = {written.tensors[name].ggml_id for name in EMBEDDINGS if name in written.tensors}
    return sorted(TYPE_NAMES[kind] for kind in found if kind in EMBEDDING_TYPES.values() and kind not in (F16, BF16))


def _tokenizer_checks(engines: list[EngineInfo], reader: WeightReader, written: GgufFile) -> list[Check]:
    """Compare what cuts text for each engine, and without one what would, with the directory's tokenizer."""
    tokenizer = load_tokenizer(reader.directory)

    def expected(text: str) -> list[int]:
        return list(tokenizer(text).input_ids)

    checks = [tokenizer_check(expected, engine.tokenize) for engine in engines if engine.tokenize is not None]
    if checks and all(engine.tokenize is not None for engine in engines):
        return checks
    try:
        rebuilt = tokenizer_check(expected, tokenizer_of(written))
    except UserError as error:
        rebuilt = at_most("tokenizer", 1, 0, str(error))
    # Beside an engine's own tokenizer, what the file's metadata describe is a second one.
    return [*checks, replace(rebuilt, name="native.tokenizer")] if checks else [rebuilt]


def _engine_rows(engine: EngineInfo, ids: list[int], vocabulary: int) -> NDArray[np.float64]:
    rows = engine.run(ids)
    expected = (len(ids), vocabulary)
    if rows.shape != expected:
        raise ValueError(f"{engine.name} returned distributions of shape {rows.shape}, not {expected}")
    return rows


def tensor_types(gguf_path: Path | str) -> dict[str, str]:
    """Return a file's tensor names and type names."""
    return {name: TYPE_NAMES[info.ggml_id] for name, info in read_gguf(gguf_path).tensors.items()}


def _report(written: GgufFile, measured: _Measured, bounds: ParityBounds, positions: int, details: dict[str, Any]) -> ParityReport:
    matrices = {info.ggml_id for name, info in written.tensors.items() if name not in EMBEDDINGS}
    heads = {info.ggml_id for name, info in written.tensors.items() if name in EMBEDDINGS}
    checks = [*_byte_and_layer_checks(measured, bounds), *measured.tokenizers, *end_to_end_checks(measured.found, bounds)]
    for run in measured.runs:
        if run.engine.handling == "training":
            checks += native_checks(run.found, bounds)
        else:
            checks += engine_checks(run.found, bounds, bool((matrices | heads) & CODES), bool(matrices & set(BY_ID)))
    details = details | {"worst_layer": measured.layers.worst, "layers": measured.layers.layers}
    if measured.differences:
        details["differences"] = measured.differences
    if len(measured.runs) > 1:
        details["engine_positions"] = " and ".join(str(run.positions) for run in measured.runs)
    report = ParityReport(
        status="proven",
        reason="",
        engine=" and ".join(run.engine.name for run in measured.runs),
        engine_version=" and ".join(run.engine.version for run in measured.runs),
        positions=max((run.positions for run in measured.runs), default=positions),
        types={name: TYPE_NAMES[info.ggml_id] for name, info in written.tensors.items()},
        checks=checks,
        measurements={name: comparison.to_json() for name, comparison in measured.found.items()},
        details=details,
    )
    return _with_status(report, written, measured, bounds)


def _with_status(report: ParityReport, written: GgufFile, measured: _Measured, bounds: ParityBounds) -> ParityReport:
    """Decide the status by the rule in this module's docstring."""
    missed = [check for check in report.checks if check.holds is False]
    undecided = report.undecided_checks()
    if missed:
        reason = _describe(missed[0], measured)
        if len(missed) > 1:
            reason += f" (and {len(missed) - 1} more: {', '.join(check.name for check in missed[1:])})"
        return replace(report, status="failed", reason=reason)
    if reason := _why_no_proof(report, written, measured, bounds):
        return replace(report, status="unproven", reason=reason)
    reasons = []
    if "not_reached" in report.details:
        reasons.append(str(report.details["not_reached"]))
    if undecided:
        reasons.append(f"rounding moves this model too far to decide {' and '.join(undecided)}")
    if cost := measured.found.get("embeddings against training"):
        types = " and ".join(quantised_embeddings(written))
        reasons.append(f"{types} embeddings alone change perplexity by {100 * (cost.perplexity_ratio - 1):+.2g}%")
        if not abs(cost.perplexity_ratio - 1) <= bounds.perplexity_cap:
            return replace(report, status="unproven", reason=reasons[-1])
    return replace(report, reason="; ".join(reasons))


def _why_no_proof(report: ParityReport, written: GgufFile, measured: _Measured, bounds: ParityBounds) -> str:
    """Return why a report without a missed bound is no proof, embeddings aside; empty if it is one."""
    why = no_engine(written)
    if not measured.runs:
        return f"{why or 'no engine ran the file'}: bytes, tokens, layers and the packed model were compared"
    if report.positions < bounds.min_positions:
        return f"only {report.positions} positions were compared, and a proof needs {bounds.min_positions}"
    if "not_compared" in report.details:
        return str(report.details["not_compared"])
    foreign = [run.positions for run in measured.runs if run.engine.handling == "llama.cpp"]
    needed = min(bounds.min_foreign, bounds.min_positions)
    if why is None and not foreign:
        return "llama.cpp could run the file and has not, and this project's own engine alone is no proof of it"
    if foreign and max(foreign) < needed:
        return f"llama.cpp ran only {max(foreign)} positions, and a proof needs {needed} of it"
    if blocking := [name for name in report.undecided_checks() if name not in MAY_STAY_OPEN]:
        names = " and ".join(blocking)
        return f"rounding alone moves this model about as far as a wrong weight type would, so {names} cannot be decided"
    return ""


def _describe(check: Check, measured: _Measured) -> str:
    if check.name == "bytes":
        return f"the file differs from its source in {', '.join(measured.differences[:3])}" + (
            f" and {len(measured.differences) - 3} more" if len(measured.differences) > 3 else ""
        )
    if check.name in ("tokenizer", "native.tokenizer"):
        own = any(run.engine.tokenize is not None for run in measured.runs)
        who = "engine" if own and check.name == "tokenizer" else "file"
        return f"the {who} cuts text into other tokens than the model's tokenizer, {check.note}"
    side = "above" if check.op == "<=" else "below"
    value = "not a number" if check.value is None else f"{check.value:.3g}, {side} its bound {check.bound:.3g}"
    return f"{check.name} is {value}"


def _byte_and_layer_checks(measured: _Measured, bounds: ParityBounds) -> list[Check]:
    return [
        at_most("bytes", len(measured.differences), 0, "tensors and keys that differ from the source"),
        at_most("layers.wrong_codes", measured.layers.wrong_codes, 0, "activation codes away from a rounding edge"),
        at_most("layers.output_error", measured.layers.output_error, bounds.layer_output, "as a fraction of the largest output"),
    ]
