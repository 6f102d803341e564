"""The parity gate: is a GGUF file, as an engine runs it, what was trained?

Points, in the order in which they run: the file's bytes and metadata against its source; the engine's tokens against the
directory's tokenizer; packed layers against fake-quantised ones on identical inputs; the packed model end to end; the engine
against a torch emulation of its own activation handling; the engine against training's own forward.

Fixed bounds on distributions fail right models: an int8 code at a rounding edge turns a difference in the last place into
one in the last code, and deep or outlier-ridden models amplify that. So the same run measures how far rounding alone moves this
model, and a bound widens to `floor_factor` times that (against training also to `handling_factor` times what the engine's
rounding by blocks costs in torch). `engine.mean_kl` never widens beyond `resolution` of what Q4_0 in place of ternary would cost:
there the report says unproven. The bounds against training have no such cap: on a model that rounding alone moves far they can be
wide, and the report shows how wide. A check that such noise leaves open is undecided, and the report names it. All floors come from
the model directory, so that a wrong file or engine cannot widen its own bounds.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bitnet_arch.checkpoint import WeightReader, load_tokenizer, open_weights
from bitnet_arch.errors import UserError
from bitnet_arch.gguf.floats import TYPE_NAMES
from bitnet_arch.gguf.plan import check_architecture
from bitnet_arch.gguf.reader import read_gguf
from bitnet_arch.gguf.types import BY_ID
from bitnet_arch.gguf.verify import file_differences
from bitnet_arch.parity.forwards import FORWARDS, PERTURBATIONS, Forward
from bitnet_arch.parity.layerwise import LayerDifference
from bitnet_arch.parity.measure import Comparison, compare, summarize
from bitnet_arch.parity.report import Check, ParityBounds, ParityReport, at_least, at_most
from bitnet_arch.parity.stream import LayerStream
from bitnet_arch.parity.tokens import Tokenize, tokenizer_check

Engine = Callable[[list[int]], NDArray[np.float64]]
"""Maps token ids to log-probabilities of the next token, float64 `[len(ids), vocabulary]`: row i has seen ids 0..i."""

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, in all)."""

PAIRS = {
    "floor: float64": ("training", "training in float64"),
    **{f"floor: perturbed {seed}": ("training", f"training perturbed {seed}") for seed in range(PERTURBATIONS)},
    "activation quantisation off": ("training", "training without activation quantisation"),
    "packed against training": ("training", "packed"),
    "emulation against training": ("training", "emulated"),
    "floor: f16 rounding": ("emulated", "emulated with float32 cache"),
    "emulation without activation quantisation": ("emulated", "emulated without activation quantisation"),
    "control: Q4_0": ("emulated", "emulated with Q4_0"),
    "engine against emulation": ("emulated", "engine"),
    "engine against emulation without activation quantisation": ("emulated without activation quantisation", "engine"),
    "engine against training": ("training", "engine"),
}
FLOORS = [name for name in PAIRS if name.startswith("floor: ") and PAIRS[name][0] == "training"]
MAX_LOGPROBS = 1 << 21
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
        tokenize: how it cuts text, as the file tells it to; without, that is not compared.
    """

    run: Engine
    name: str
    version: str
    tokenize: Tokenize | None = None


@dataclass
class _Measured:
    differences: list[str]
    layers: LayerDifference
    tokenizer: Check | None
    comparisons: dict[str, Comparison] = field(default_factory=dict)


def run_gate(
    directory: Path | str,
    gguf_path: Path | str,
    engine: EngineInfo,
    windows: list[list[int]],
    bounds: ParityBounds | None = None,
    progress: Progress | None = None,
    forwards: dict[str, Forward] | None = None,
) -> ParityReport:
    """Compare a file, run by an engine, with the model directory it was made from.

    Args:
        directory: the model directory (master or packed).
        gguf_path: the file.
        engine: an engine that has loaded the file.
        windows: token ids, all of one length of at least 2; each is a context of its own, and its last token is only a target.
        bounds: what to decide by.
        progress: told of the stages.
        forwards: replaces `FORWARDS`, for independent controls.

    Raises:
        UserError: if the windows are empty or uneven, or the directory or file cannot be read.
    """
    bounds, report_progress = bounds or ParityBounds(), progress or (lambda *_: None)
    if not windows or len({len(window) for window in windows}) != 1 or len(windows[0]) < 2:
        raise UserError("the parity gate needs token windows of one length of at least 2")
    with open_weights(directory) as reader:
        check_architecture(reader)
        report_progress("bytes", 0, 1)
        differences = file_differences(reader, gguf_path)
        report_progress("bytes", 1, 1)
        tokenizer = _tokenizer_check(engine, reader)
        ids = torch.tensor(windows)
        stream = LayerStream(reader, gguf_path, ids[:, :-1], forwards or FORWARDS)
        layers = stream.run(bounds.code_edge, lambda done, of: report_progress("layers", done, of))
        measured = _Measured(differences, layers, tokenizer)
        parts: dict[str, list[NDArray[np.float64]]] = {name: [] for name in PAIRS}
        for index, window in enumerate(windows):
            report_progress("engine", index, len(windows))
            engine_rows, targets = _engine_rows(engine, window[:-1], reader), ids[index, 1:].numpy()
            step = max(1, MAX_LOGPROBS // engine_rows.shape[1])
            for start in range(0, len(targets), step):
                rows = slice(start, start + step)
                found = {name: stream.logprobs(name, index, rows) for name in stream.forwards} | {"engine": engine_rows[rows]}
                for name, (p, q) in PAIRS.items():
                    parts[name].append(compare(found[p], found[q], targets[rows]))
        report_progress("engine", len(windows), len(windows))
        measured.comparisons = {name: summarize(rows) for name, rows in parts.items()}
    return _report(gguf_path, engine, measured, bounds)


def _tokenizer_check(engine: EngineInfo, reader: WeightReader) -> Check | None:
    if engine.tokenize is None:
        return None
    tokenizer = load_tokenizer(reader.directory)
    return tokenizer_check(lambda text: list(tokenizer(text).input_ids), engine.tokenize)


def _engine_rows(engine: EngineInfo, ids: list[int], reader: WeightReader) -> NDArray[np.float64]:
    rows = engine.run(ids)
    expected = (len(ids), reader.model_config.vocab_size)
    if rows.shape != expected:
        raise ValueError(f"{engine.name} returned distributions of shape {rows.shape}, not {expected}")
    return rows


def tensor_types(gguf_path: Path | str) -> dict[str, str]:
    """Return a file's tensor names and type names."""
    return {name: TYPE_NAMES[info.ggml_id] for name, info in read_gguf(gguf_path).tensors.items()}


def _report(gguf_path: Path | str, engine: EngineInfo, measured: _Measured, bounds: ParityBounds) -> ParityReport:
    types = tensor_types(gguf_path)
    ternary = any(kind in {k.name for k in BY_ID.values()} for kind in types.values())
    positions = measured.comparisons["engine against training"].positions
    checks = [
        *_byte_and_layer_checks(measured, bounds),
        *([measured.tokenizer] if measured.tokenizer else []),
        *_end_to_end_checks(measured.comparisons, bounds),
        *_engine_checks(measured.comparisons, bounds, ternary),
        *_training_checks(measured.comparisons, bounds),
    ]
    details: dict[str, Any] = {"worst_layer": measured.layers.worst, "layers": measured.layers.layers}
    if measured.differences:
        details["differences"] = measured.differences
    report = ParityReport(
        status="proven",
        reason="",
        engine=engine.name,
        engine_version=engine.version,
        positions=positions,
        types=types,
        checks=checks,
        measurements={name: comparison.to_json() for name, comparison in measured.comparisons.items()},
        details=details,
    )
    return _with_status(report, measured, bounds)


def _with_status(report: ParityReport, measured: _Measured, bounds: ParityBounds) -> ParityReport:
    missed = [check for check in report.checks if check.holds is False and check.name != "resolution"]
    status, reason = report.status, ""
    if missed:
        status, reason = "failed", _describe(missed[0], measured)
        if len(missed) > 1:
            reason += f" (and {len(missed) - 1} more: {', '.join(check.name for check in missed[1:])})"
    elif "resolution" in report.failed_checks():
        status = "unproven"
        reason = "rounding alone moves this model about as far as a wrong weight type would, so logits cannot prove it"
    elif report.positions < bounds.min_positions:
        status = "unproven"
        reason = f"only {report.positions} positions were compared, and a proof needs {bounds.min_positions}"
    elif undecided := report.undecided_checks():
        reason = f"rounding moves this model too far to decide {' and '.join(undecided)}"
    return ParityReport(**{**{f: getattr(report, f) for f in report.__dataclass_fields__}, "status": status, "reason": reason})


def _describe(check: Check, measured: _Measured) -> str:
    if check.name == "bytes":
        return f"the file differs from its source in {', '.join(measured.differences[:3])}" + (
            f" and {len(measured.differences) - 3} more" if len(measured.differences) > 3 else ""
        )
    if check.name == "tokenizer":
        return f"the engine cuts text into other tokens than the model's tokenizer, {check.note}"
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
    return [
        at_most("packed.mean_kl", packed.mean_kl, bounds.floor_factor * max(floor, bounds.single_flip * off), f"floor {floor:.3g}"),
        _judged(ratio, off, floor, bounds, "whether packed layers quantise activations"),
        at_most("packed.greedy_margin", packed.flip_margin, max(bounds.greedy_margin, bounds.floor_factor * margin)),
    ]


def _engine_checks(found: dict[str, Comparison], bounds: ParityBounds, ternary: bool) -> list[Check]:
    engine, floor, control = found["engine against emulation"], found["floor: f16 rounding"], found["control: Q4_0"]
    default = (
        (bounds.ternary_mean_kl, bounds.ternary_max_kl, bounds.ternary_top1)
        if ternary
        else (bounds.f16_mean_kl, bounds.f16_max_kl, bounds.f16_top1)
    )
    mean_bound = max(default[0], bounds.floor_factor * floor.mean_kl)
    note = f"floor {floor.mean_kl:.3g}"
    checks = [
        at_most("engine.mean_kl", abs(engine.mean_kl), mean_bound, note),
        at_most("engine.max_kl", engine.max_kl, max(default[1], bounds.floor_factor * floor.max_kl), note),
        at_least("engine.top1", engine.top1, min(default[2], 1 - bounds.floor_factor * (1 - floor.top1)), note),
    ]
    if mean_bound > default[0]:
        note = "engine.mean_kl's widened bound against what Q4_0 in place of ternary costs"
        checks.append(at_most("resolution", mean_bound, bounds.resolution * control.mean_kl, note))
    if ternary:
        off = found["engine against emulation without activation quantisation"].mean_kl
        # Measured twice, so that neither an emulation nor an engine that quantises nothing can call the effect too small to see.
        effect = max(off, found["emulation without activation quantisation"].mean_kl)
        ratio = at_most("engine.activation_ratio", engine.mean_kl / max(off, NEGLIGIBLE_KL), bounds.activation_ratio)
        checks.append(_judged(ratio, effect, floor.mean_kl, bounds, "whether the engine quantises activations"))
    return checks


def _judged(ratio: Check, effect: float, floor: float, bounds: ParityBounds, question: str) -> Check:
    """Return a check of a distance as a fraction of `effect`, undecided where rounding (`floor`) alone may reach its bound."""
    if effect * ratio.bound < bounds.decidable * floor:
        why = f"rounding moves this model too far for its logits to tell {question}"
        return Check(ratio.name, ratio.value, ratio.op, ratio.bound, None, why)
    return ratio


def _training_checks(found: dict[str, Comparison], bounds: ParityBounds) -> list[Check]:
    engine = found["engine against training"]

    def widest(figure: Callable[[Comparison], float]) -> float:
        # The engine rounds activations by blocks, training by tokens: what that difference costs in torch is expected here.
        rounding = bounds.floor_factor * max(figure(found[name]) for name in FLOORS)
        return max(rounding, bounds.handling_factor * figure(found["emulation against training"]))

    mean_bound = max(bounds.training_mean_kl, widest(lambda c: c.mean_kl))
    max_bound = max(bounds.training_max_kl, widest(lambda c: c.max_kl))
    top1_bound = min(bounds.training_top1, 1 - widest(lambda c: 1 - c.top1))
    margin_bound = max(bounds.sure_margin, widest(lambda c: c.flip_margin))
    ratio_bound = max(bounds.perplexity, widest(lambda c: abs(c.perplexity_ratio - 1)))
    return [
        at_most("training.mean_kl", abs(engine.mean_kl), mean_bound),
        at_most("training.max_kl", engine.max_kl, max_bound),
        at_least("training.top1", engine.top1, top1_bound),
        at_most("training.flip_margin", engine.flip_margin, margin_bound, "top-2 margin where the engine chose another token"),
        at_most("training.perplexity", abs(engine.perplexity_ratio - 1), ratio_bound),
    ]
