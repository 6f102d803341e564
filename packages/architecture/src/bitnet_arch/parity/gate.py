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
* **proven**: an engine ran the file, on enough positions, and every figure lies within its bound. Only the activation ratios
  and the margins of changed choices (`MAY_STAY_OPEN`, which says why) may be undecided; the reason then names them.
* **unproven**: anything else, with the reason: no engine runs the file, too few positions, or a figure that rounding explains and a
  wrong weight type would explain, too (undecided).

Quantised embeddings (Q8_0, Q6_K, Q4_1) change the model by choice. The engine is then compared with training's forward *with the
file's embeddings*, and what the embeddings themselves cost is measured and told in the reason. Beyond `perplexity_cap` the file is
unproven.

The report names the digests of the file's tensors and of the directory's weights, so that it proves these and no others
(`bitnet_arch.parity.proof`).

A file that llama.cpp does not run (`wrinklefree`, or I2_S) is compared as far as that goes without one: bytes, the tokenizer that
`tokenizer_from_gguf` rebuilds, layers, and the packed model.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bitnet_arch.checkpoint import load_tokenizer
from bitnet_arch.errors import UserError
from bitnet_arch.families import family_of
from bitnet_arch.gguf.architectures import OURS, written_architecture
from bitnet_arch.gguf.floats import EMBEDDING_TYPES, TYPE_NAMES
from bitnet_arch.gguf.plan import EMBEDDINGS
from bitnet_arch.gguf.reader import GgufFile, read_gguf
from bitnet_arch.gguf.tokenizer import tokenizer_from_gguf
from bitnet_arch.gguf.types import BF16, BY_ID, F16, I2_S
from bitnet_arch.gguf.verify import file_differences, plans_as_written
from bitnet_arch.memory import return_memory
from bitnet_arch.parity.activations import CODES
from bitnet_arch.parity.forwards import FORWARDS, PERTURBATIONS, TRAINING, Forward
from bitnet_arch.parity.layerwise import LayerDifference
from bitnet_arch.parity.measure import Comparison, compare, summarize
from bitnet_arch.parity.proof import source_digest, tensors_digest
from bitnet_arch.parity.report import MAY_STAY_OPEN, Check, ParityBounds, ParityReport, at_most, widened
from bitnet_arch.parity.stream import LayerStream
from bitnet_arch.parity.tokens import Tokenize, tokenizer_check
from bitnet_arch.weights import WeightReader, open_weights

Engine = Callable[[list[int]], NDArray[np.float64]]
"""Maps token ids to log-probabilities of the next token, float64 `[len(ids), vocabulary]`: row i has seen ids 0..i."""

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, in all)."""

CONTROL = "control: Q4_0"
PAIRS = {
    "floor: float64": ("training", "training in float64"),
    **{f"floor: perturbed {seed}": ("training", f"training perturbed {seed}") for seed in range(PERTURBATIONS)},
    "activation quantisation off": ("training", "training without activation quantisation"),
    "packed against training": ("training", "packed"),
    "emulation against training": ("training", "emulated"),
    "floor: f16 rounding": ("emulated", "emulated with float32 cache"),
    "emulation without activation quantisation": ("emulated", "emulated without activation quantisation"),
    CONTROL: ("emulated", "emulated with Q4_0"),
    "engine against emulation": ("emulated", "engine"),
    "engine against emulation without activation quantisation": ("emulated without activation quantisation", "engine"),
    "engine against training": ("training", "engine"),
}
STORED = "training with the file's embeddings"
EMBEDDING_PAIRS = {
    "embeddings against training": ("training", STORED),
    "emulation against training": (STORED, "emulated"),
    "engine against training": (STORED, "engine"),
}
"""What is compared, too or instead, when embeddings are quantised."""

FLOORS = [name for name in PAIRS if name.startswith("floor: ") and PAIRS[name][0] == "training"]
MAX_LOGPROBS = 1 << 19
"""Log-probabilities of one forward that are held at a time."""

NEGLIGIBLE_KL = 1e-12
"""Below this a distance is a rounding error of the logarithms, and no denominator."""


@dataclass(frozen=True)
class EngineInfo:
    """An engine and what it is called in reports.

    Attributes:
        run: computes distributions.
        name: the engine's name.
        version: its version.
        tokenize: how it cuts text, as the file tells it to.
    """

    run: Engine
    name: str
    version: str
    tokenize: Tokenize


@dataclass
class _Measured:
    """What a run found.

    Attributes:
        differences: tensors and keys in which the file differs from its source.
        layers: packed layers against fake-quantised ones.
        tokenizer: the comparison of tokens.
        by_engine: whether an engine took part.
        comparisons: distances between forwards, by name.
    """

    differences: list[str]
    layers: LayerDifference
    tokenizer: Check
    by_engine: bool
    comparisons: dict[str, Comparison] = field(default_factory=dict)


def no_engine(gguf_path: Path | str) -> str | None:
    """Return in a clause why llama.cpp, the engine that the gate compares with, does not run a file; None if it does."""
    file = read_gguf(gguf_path)
    if file.metadata.get("general.architecture") == OURS:
        return f"llama.cpp does not run the architecture {OURS!r}, which holds what its own cannot"
    if any(info.ggml_id == I2_S for info in file.tensors.values()):
        return "llama.cpp does not run I2_S, which bitnet.cpp and the native engine load"
    return None


def run_gate(
    directory: Path | str,
    gguf_path: Path | str,
    engine: EngineInfo | None,
    windows: list[list[int]],
    bounds: ParityBounds | None = None,
    progress: Progress | None = None,
    forwards: dict[str, Forward] | None = None,
) -> ParityReport:
    """Compare a file, run by an engine, with the model directory it was made from.

    Args:
        directory: the model directory (master or packed).
        gguf_path: the file.
        engine: an engine that has loaded the file; None if none runs it, and then the status is at best "unproven".
        windows: token ids, all of one length of at least 2, no two alike; each is a context of its own, and its last token is
            only a target.
        bounds: what to decide by.
        progress: told of the stages.
        forwards: replaces `FORWARDS`, for independent controls.

    Raises:
        UserError: if the windows are empty, uneven or alike, the directory or file cannot be read, or an engine is given for a
            file that cannot be emulated.
    """
    bounds, report_progress = bounds or ParityBounds(), progress or (lambda *_: None)
    if not windows or len({len(window) for window in windows}) != 1 or len(windows[0]) < 2:
        raise UserError("the parity gate needs token windows of one length of at least 2")
    if len({tuple(window) for window in windows}) != len(windows):
        raise UserError("the parity gate counts positions, and a token window that is given twice shows nothing new: give others")
    if engine is not None and (why := no_engine(gguf_path)) is not None:
        raise UserError(f"{gguf_path} cannot be compared with an engine: {why}")
    with open_weights(directory) as reader:
        report_progress("bytes", 0, 1)
        written = read_gguf(gguf_path)
        differences = file_differences(reader, gguf_path)
        digests = {"tensors_sha256": tensors_digest(written), "source_sha256": source_digest(reader)}
        return_memory()
        report_progress("bytes", 1, 1)
        tokenizer = _tokenizer_check(engine, reader, gguf_path)
        pairs = PAIRS | (EMBEDDING_PAIRS if engine is not None and quantised_embeddings(written) else {})
        forwards = {n: f for n, f in (forwards or FORWARDS).items() if n in TRAINING or (engine is not None and n in _names(pairs))}
        ids = torch.tensor(windows)
        stream = LayerStream(reader, stored_types(reader, written), ids[:, :-1], forwards)
        layers = stream.run(bounds.code_edge, lambda done, of: report_progress("layers", done, of))
        measured = _Measured(differences, layers, tokenizer, engine is not None)
        measured.comparisons = _compare(stream, engine, pairs, ids, report_progress)
        details = digests | {"context": ids.shape[1] - 1}
        sliding = getattr(reader.model_config, "sliding_window", None) or 0
        if sliding >= ids.shape[1] - 1:
            details["not_reached"] = f"no context is longer than the sliding window of {sliding}"
    return _report(written, engine, measured, bounds, ids[:, 1:].numel(), details)


def _names(pairs: dict[str, tuple[str, str]]) -> set[str]:
    return {name for pair in pairs.values() for name in pair}


def _compare(
    stream: LayerStream, engine: EngineInfo | None, pairs: dict[str, tuple[str, str]], ids: torch.Tensor, progress: Progress
) -> dict[str, Comparison]:
    """Return the distances between forwards, and to the engine, that a finished stream allows."""
    known = {*stream.forwards} | ({"engine"} if engine is not None else set())
    parts: dict[str, list[NDArray[np.float64]]] = {name: [] for name, (p, q) in pairs.items() if p in known and q in known}
    vocabulary = int(stream.reader.model_config.vocab_size)
    for index, window in enumerate(ids):
        progress("engine", index, len(ids))
        rows_of = None if engine is None else _engine_rows(engine, window[:-1].tolist(), vocabulary)
        targets = window[1:].numpy()
        step = max(1, MAX_LOGPROBS // vocabulary)
        for start in range(0, len(targets), step):
            rows = slice(start, start + step)
            found = stream.logprobs(stream.forwards, index, rows)
            if rows_of is not None:
                found["engine"] = rows_of[rows]
            for name in parts:
                p, q = pairs[name]
                parts[name].append(compare(found[p], found[q], targets[rows]))
    progress("engine", len(ids), len(ids))
    return {name: summarize(rows) for name, rows in parts.items()}


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


def _tokenizer_check(engine: EngineInfo | None, reader: WeightReader, gguf_path: Path | str) -> Check:
    tokenizer = load_tokenizer(reader.directory)

    def expected(text: str) -> list[int]:
        return list(tokenizer(text).input_ids)

    if engine is not None:
        return tokenizer_check(expected, engine.tokenize)
    try:
        rebuilt = tokenizer_from_gguf(gguf_path)
    except UserError as error:
        return at_most("tokenizer", 1, 0, str(error))
    return tokenizer_check(expected, lambda text: list(rebuilt(text).input_ids))


def _engine_rows(engine: EngineInfo, ids: list[int], vocabulary: int) -> NDArray[np.float64]:
    rows = engine.run(ids)
    expected = (len(ids), vocabulary)
    if rows.shape != expected:
        raise ValueError(f"{engine.name} returned distributions of shape {rows.shape}, not {expected}")
    return rows


def tensor_types(gguf_path: Path | str) -> dict[str, str]:
    """Return a file's tensor names and type names."""
    return {name: TYPE_NAMES[info.ggml_id] for name, info in read_gguf(gguf_path).tensors.items()}


def _report(
    written: GgufFile,
    engine: EngineInfo | None,
    measured: _Measured,
    bounds: ParityBounds,
    positions: int,
    details: dict[str, Any],
) -> ParityReport:
    found, matrices = measured.comparisons, {i.ggml_id for n, i in written.tensors.items() if n not in EMBEDDINGS}
    heads = {info.ggml_id for name, info in written.tensors.items() if name in EMBEDDINGS}
    checks = [
        *_byte_and_layer_checks(measured, bounds),
        measured.tokenizer,
        *_end_to_end_checks(found, bounds),
    ]
    if engine is not None:
        checks += _engine_checks(found, bounds, bool((matrices | heads) & CODES), bool(matrices & set(BY_ID)))
        checks += _training_checks(found, bounds)
    details = details | {"worst_layer": measured.layers.worst, "layers": measured.layers.layers}
    if measured.differences:
        details["differences"] = measured.differences
    report = ParityReport(
        status="proven",
        reason="",
        engine=engine.name if engine else "",
        engine_version=engine.version if engine else "",
        positions=positions,
        types={name: TYPE_NAMES[info.ggml_id] for name, info in written.tensors.items()},
        checks=checks,
        measurements={name: comparison.to_json() for name, comparison in found.items()},
        details=details,
    )
    return _with_status(report, written, measured, bounds)


def _with_status(report: ParityReport, written: GgufFile, measured: _Measured, bounds: ParityBounds) -> ParityReport:
    """Decide the status by the rule in this module's docstring."""
    missed = [check for check in report.checks if check.holds is False]
    undecided = report.undecided_checks()
    blocking = [name for name in undecided if name not in MAY_STAY_OPEN]
    if missed:
        reason = _describe(missed[0], measured)
        if len(missed) > 1:
            reason += f" (and {len(missed) - 1} more: {', '.join(check.name for check in missed[1:])})"
        return replace(report, status="failed", reason=reason)
    if not report.engine:
        why = no_engine(written.path) or "no engine ran the file"
        return replace(report, status="unproven", reason=f"{why}: bytes, tokens, layers and the packed model were compared")
    if report.positions < bounds.min_positions:
        reason = f"only {report.positions} positions were compared, and a proof needs {bounds.min_positions}"
        return replace(report, status="unproven", reason=reason)
    if blocking:
        names = " and ".join(blocking)
        reason = f"rounding alone moves this model about as far as a wrong weight type would, so {names} cannot be decided"
        return replace(report, status="unproven", reason=reason)
    reasons = []
    if "not_reached" in report.details:
        reasons.append(str(report.details["not_reached"]))
    if undecided:
        reasons.append(f"rounding moves this model too far to decide {' and '.join(undecided)}")
    if cost := measured.comparisons.get("embeddings against training"):
        types = " and ".join(quantised_embeddings(written))
        reasons.append(f"{types} embeddings alone change perplexity by {100 * (cost.perplexity_ratio - 1):+.2g}%")
        if not abs(cost.perplexity_ratio - 1) <= bounds.perplexity_cap:
            return replace(report, status="unproven", reason=reasons[-1])
    return replace(report, reason="; ".join(reasons))


def _describe(check: Check, measured: _Measured) -> str:
    if check.name == "bytes":
        return f"the file differs from its source in {', '.join(measured.differences[:3])}" + (
            f" and {len(measured.differences) - 3} more" if len(measured.differences) > 3 else ""
        )
    if check.name == "tokenizer":
        who = "engine" if measured.by_engine else "file"
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


def _end_to_end_checks(found: dict[str, Comparison], bounds: ParityBounds) -> list[Check]:
    packed, off = found["packed against training"], found["activation quantisation off"].mean_kl
    floor = max(found[name].mean_kl for name in FLOORS)
    margin = max(found[name].flip_margin for name in FLOORS)
    ratio = at_most("packed.activation_ratio", packed.mean_kl / max(off, NEGLIGIBLE_KL), bounds.end_to_end_off)
    control, factor = found.get(CONTROL), bounds.floor_factor
    mean_cap, margin_cap = _cap(control, bounds, "mean_kl"), _cap(control, bounds, "flip_margin")
    default, note = factor * bounds.single_flip * off, f"floor {floor:.3g}"
    return [
        widened("packed.mean_kl", packed.mean_kl, "<=", default, factor * floor, mean_cap, note),
        _judged(ratio, off, floor, bounds, "whether packed layers quantise activations"),
        widened("packed.greedy_margin", packed.flip_margin, "<=", bounds.greedy_margin, factor * margin, margin_cap),
    ]


def _cap(control: Comparison | None, bounds: ParityBounds, figure: str) -> float | None:
    """Return what a bound on a figure of a `Comparison` may widen to: a part of what Q4_0 in place of ternary makes of it."""
    return None if control is None else bounds.resolution * float(getattr(control, figure))


def _engine_checks(found: dict[str, Comparison], bounds: ParityBounds, codes: bool, ternary: bool) -> list[Check]:
    """Compare the engine with its emulation.

    Args:
        found: distances.
        bounds: what to decide by.
        codes: whether the engine rounds any input to codes.
        ternary: whether any matrix has a ternary type.
    """
    engine, floor, control = found["engine against emulation"], found["floor: f16 rounding"], found[CONTROL]
    mean, largest, top1 = (
        (bounds.ternary_mean_kl, bounds.ternary_max_kl, bounds.ternary_top1)
        if codes
        else (bounds.f16_mean_kl, bounds.f16_max_kl, bounds.f16_top1)
    )
    note, factor = f"floor {floor.mean_kl:.3g}", bounds.floor_factor
    checks = [
        widened("engine.mean_kl", abs(engine.mean_kl), "<=", mean, factor * floor.mean_kl, _cap(control, bounds, "mean_kl"), note),
        widened("engine.max_kl", engine.max_kl, "<=", largest, factor * floor.max_kl, _cap(control, bounds, "max_kl"), note),
        widened("engine.top1", engine.top1, ">=", top1, _explained_top1(floor, factor), _top1_cap(control, bounds), note),
    ]
    if ternary:
        off = found["engine against emulation without activation quantisation"].mean_kl
        # Measured twice, so that neither an emulation nor an engine that quantises nothing can call the effect too small to see.
        effect = max(off, found["emulation without activation quantisation"].mean_kl)
        ratio = at_most("engine.activation_ratio", engine.mean_kl / max(off, NEGLIGIBLE_KL), bounds.activation_ratio)
        noise = max(floor.mean_kl, bounds.code_noise)
        checks.append(_judged(ratio, effect, noise, bounds, "whether the engine quantises activations"))
    return checks


def _explained_top1(noise: Comparison, factor: float) -> float:
    """Return what share of equal choices rounding explains: on few positions, one tie is more than the default allows."""
    return 1 - max(factor * (1 - noise.top1), 1 / noise.positions)


def _top1_cap(control: Comparison, bounds: ParityBounds) -> float:
    return 1 - bounds.resolution * (1 - control.top1)


def _judged(ratio: Check, effect: float, floor: float, bounds: ParityBounds, question: str) -> Check:
    """Return a check of a distance as a fraction of `effect`, undecided where rounding (`floor`) alone may reach its bound."""
    if effect * ratio.bound < bounds.decidable * floor:
        why = f"rounding moves this model too far for its logits to tell {question}"
        return Check(ratio.name, ratio.value, ratio.op, ratio.bound, None, why)
    return ratio


def _training_checks(found: dict[str, Comparison], bounds: ParityBounds) -> list[Check]:
    engine, control = found["engine against training"], found[CONTROL]

    def noise(figure: Callable[[Comparison], float]) -> float:
        # The engine rounds activations by blocks, training by tokens: what that difference costs in torch is expected here.
        rounding = bounds.floor_factor * max(figure(found[name]) for name in FLOORS)
        return max(rounding, bounds.handling_factor * figure(found["emulation against training"]))

    def at_most_widened(name: str, figure: str, default: float, note: str = "") -> Check:
        value, explained = abs(float(getattr(engine, figure))), noise(lambda c: float(getattr(c, figure)))
        return widened(f"training.{name}", value, "<=", default, explained, _cap(control, bounds, figure), note)

    off = abs(engine.perplexity_ratio - 1)
    top1 = 1 - max(noise(lambda c: 1 - c.top1), 1 / engine.positions)
    return [
        at_most_widened("mean_kl", "mean_kl", bounds.training_mean_kl),
        at_most_widened("max_kl", "max_kl", bounds.training_max_kl),
        widened("training.top1", engine.top1, ">=", bounds.training_top1, top1, _top1_cap(control, bounds)),
        at_most_widened("flip_margin", "flip_margin", bounds.sure_margin, "top-2 margin where the engine chose another token"),
        widened(
            "training.perplexity", off, "<=", bounds.perplexity, noise(lambda c: abs(c.perplexity_ratio - 1)), bounds.perplexity_cap
        ),
    ]
