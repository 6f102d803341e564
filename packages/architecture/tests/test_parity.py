"""The parity gate's parts, and the gate itself with engines made of torch."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from bitnet_arch import BitLinear, PackedBitLinear, UserError, load_model, open_weights, pack_model, save_master, save_packed
from bitnet_arch.gguf import annotate_gguf, export_gguf, file_differences, read_gguf
from bitnet_arch.parity import (
    FORWARDS,
    Comparison,
    EngineInfo,
    ParityBounds,
    ParityReport,
    compare,
    compare_linear,
    differing_lines,
    emulated_model,
    run_gate,
    summarize,
    tokenizer_check,
)
from bitnet_arch.parity.activations import round_q8_0, round_q8_k
from bitnet_arch.parity.checks import FLOORS, ROLES, end_to_end_checks, engine_checks
from bitnet_arch.parity.gate import _Measured, _Run, _with_status, stored_types
from bitnet_arch.parity.layerwise import LayerDifference
from bitnet_arch.parity.proof import proof_status, source_digest
from bitnet_arch.parity.report import at_least, at_most, widened
from bitnet_arch.parity.stream import LayerStream
from bitnet_arch.parity.tokens import LINES
from bitnet_arch.testing import tiny_bitnet, tiny_tokenizer, train_tiny
from torch import nn

LENGTH = 48


@pytest.fixture(scope="module")
def model():
    return train_tiny(tiny_bitnet(hidden=64, ffn=128, kv_heads=2), steps=60)


@pytest.fixture(scope="module")
def master(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("parity") / "m"
    save_master(model, path, tiny_tokenizer())
    return path


@pytest.fixture(scope="module")
def file(master):
    export_gguf(master, master.parent / "auto.gguf")
    return master.parent / "auto.gguf"


@pytest.fixture(scope="module")
def windows():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, 300, (2, LENGTH + 1), generator=generator).tolist()


def tokenize(text):
    return list(tiny_tokenizer()(text).input_ids)


def torch_engine(model):
    @torch.no_grad()
    def run(ids):
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1).numpy()

    return EngineInfo(run, "torch", "0", tokenize)


def bounds(**more):
    """Bounds for an engine that is torch itself, and whose codes lie where the emulation's do."""
    return ParityBounds(**{"min_positions": 2 * LENGTH, "code_noise": 0.0} | more)


def gate(master, file, engine, windows, **options):
    return run_gate(master, file, engine, windows, bounds(), **options)


# ---- activations, element by element as the C code of ggml does it


def q8_k_by_hand(block):
    extreme = max(block, key=abs)
    if extreme == 0:
        return np.zeros_like(block)
    inverse = np.float32(-127) / extreme
    return np.array([min(127, np.rint(inverse * v)) for v in block], np.float32) * (np.float32(1) / inverse)


def q8_0_by_hand(block):
    largest = np.abs(block).max()
    if largest == 0:
        return np.zeros_like(block)
    inverse = np.float32(127) / largest
    return np.rint(block * inverse).astype(np.float32) * np.float32(np.float16(largest / np.float32(127)))


@pytest.mark.parametrize(("rounding", "by_hand", "block"), [(round_q8_k, q8_k_by_hand, 256), (round_q8_0, q8_0_by_hand, 32)])
def test_activation_rounding_is_ggmls(rounding, by_hand, block):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 2 * block)).astype(np.float32) * np.array([[1e-3], [1.0], [40.0]], np.float32)
    x[1, :block] = 0
    expected = np.concatenate([np.concatenate([by_hand(row[:block]), by_hand(row[block:])])[None] for row in x])
    assert np.array_equal(rounding(torch.from_numpy(x)).numpy(), expected)
    assert not np.array_equal(expected, x)


# ---- measurements and bounds


def test_compare_measures_what_it_says():
    p = np.log([[0.7, 0.2, 0.1], [0.5, 0.4, 0.1]])
    q = np.log([[0.6, 0.3, 0.1], [0.4, 0.5, 0.1]])
    found = summarize([compare(p, q, np.array([0, 1]))])
    kl = [0.7 * np.log(0.7 / 0.6) + 0.2 * np.log(0.2 / 0.3), 0.5 * np.log(0.5 / 0.4) + 0.4 * np.log(0.4 / 0.5)]
    assert found.positions == 2
    assert found.mean_kl == pytest.approx(np.mean(kl))
    assert found.max_kl == pytest.approx(max(kl))
    assert found.top1 == 0.5
    assert found.flip_margin == pytest.approx(np.log(0.5 / 0.4))
    assert found.perplexity_ratio == pytest.approx(np.sqrt((0.7 * 0.4) / (0.6 * 0.5)))
    assert found.perplexity_error == pytest.approx(abs(np.log(0.7 / 0.6) - np.log(0.4 / 0.5)) / 2 / np.sqrt(2))
    assert summarize([compare(p, p, np.array([0, 1]))]).flip_margin == 0.0


def test_what_is_not_a_number_never_holds():
    for value in (float("nan"), float("inf"), np.float64("nan")):
        assert at_most("x", value, 1.0).holds is False
        assert at_least("x", -value, 1.0).holds is False
    # numpy's own booleans are not Python's: `holds is False` would overlook them.
    assert at_most("x", np.float64(2.0), np.float64(1.0)).holds is False
    assert at_most("x", np.float64(1.0), 1.0).holds is True
    json.dumps(ParityReport("failed", "x", checks=[at_most("x", np.float64("inf"), 1.0)]).to_json(), allow_nan=False)


def layers(seed=0):
    torch.manual_seed(seed)
    layer = BitLinear(96, 32, bias=False)
    return layer, torch.randn(40, 96)


def test_a_packed_layer_equals_the_fake_quantised_one():
    layer, x = layers()
    found = compare_linear("l", x, layer, PackedBitLinear.from_bitlinear(layer), 1e-4)
    assert found.wrong_codes == 0
    assert found.output_error < 1e-6


def test_a_layer_that_does_not_quantise_its_input_is_seen():
    layer, x = layers()
    plain = nn.Linear(96, 32, bias=False)
    plain.weight.data = PackedBitLinear.from_bitlinear(layer).codes().float() * float(layer.weight.detach().abs().mean())
    assert compare_linear("l", x, layer, plain, 1e-4).output_error > 1e-3


def test_a_layer_whose_output_is_not_a_number_is_the_worst():
    layer, x = layers()
    good = compare_linear("good", x, layer, PackedBitLinear.from_bitlinear(layer), 1e-4)
    broken = PackedBitLinear.from_bitlinear(layer)
    broken.weight_scale.fill_(float("nan"))
    bad = compare_linear("bad", x, layer, broken, 1e-4)
    for merged in (good.merge(bad), bad.merge(good)):
        assert merged.worst == "bad"
        assert not at_most("layers", merged.output_error, 1.0).holds


# ---- the stream


@pytest.mark.parametrize("form", ["master", "packed"])
def test_streaming_computes_what_whole_models_do(form, model, master, windows, tmp_path):
    directory = master
    if form == "packed":
        directory = tmp_path / "p"
        save_packed(model, directory, tiny_tokenizer())
    export_gguf(directory, tmp_path / "out.gguf")
    ids = torch.tensor(windows)[:, :-1]
    whole = {
        "packed": pack_model(load_model(directory)),
        "emulated": emulated_model(directory, tmp_path / "out.gguf"),
        "emulated without activation quantisation": emulated_model(directory, tmp_path / "out.gguf", "none"),
    }
    if form == "master":
        whole["training"] = load_model(directory)
    with open_weights(directory) as reader:
        stream = LayerStream(reader, stored_types(reader, read_gguf(tmp_path / "out.gguf")), ids, FORWARDS)
        stream.run(1e-4)
        for name, whole_model in whole.items():
            expected = torch_engine(whole_model).run(ids[1].tolist())
            assert np.abs(stream.logprobs([name], 1, slice(None))[name] - expected).max() < 1e-4, name
            part = stream.logprobs([name], 1, slice(3, 5))[name]
            assert np.allclose(part, stream.logprobs([name], 1, slice(None))[name][3:5], atol=1e-4)


def test_forwards_differ_where_they_should(master, file, windows):
    with open_weights(master) as reader:
        stream = LayerStream(reader, stored_types(reader, read_gguf(file)), torch.tensor(windows)[:, :-1], FORWARDS)
        stream.run(1e-4)
        rows = stream.logprobs(FORWARDS, 0, slice(None))
    for name in FORWARDS:
        distance = np.abs(rows[name] - rows["training"]).max()
        assert (distance == 0) == (name == "training"), name
    assert not np.array_equal(rows["emulated"], rows["emulated with float32 cache"])


# ---- the gate


def test_the_gate_proves_the_emulated_engine(master, file, windows):
    seen = []
    engine = torch_engine(emulated_model(master, file))
    report = gate(master, file, engine, windows, progress=lambda *args: seen.append(args))
    assert (report.status, report.failed_checks(), report.positions) == ("proven", [], 2 * LENGTH)
    assert report.types["blk.0.ffn_up.weight"] == "q2_0"
    assert {stage for stage, _, _ in seen} == {"bytes", "layers", "engine"}
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["engine"] == "torch"


def test_the_gate_proves_a_packed_directory(model, tmp_path, windows):
    save_packed(model, tmp_path / "p", tiny_tokenizer())
    export_gguf(tmp_path / "p", tmp_path / "out.gguf")
    engine = torch_engine(emulated_model(tmp_path / "p", tmp_path / "out.gguf"))
    report = gate(tmp_path / "p", tmp_path / "out.gguf", engine, windows)
    assert (report.status, report.failed_checks()) == ("proven", [])


def shifted(model):
    engine = torch_engine(model)

    def run(ids):
        return np.roll(engine.run(ids), 1, axis=0)

    return EngineInfo(run, "torch", "0", tokenize)


def holes(model):
    engine = torch_engine(model)

    def run(ids):
        rows = engine.run(ids)
        rows[3, 5] = -np.inf
        return rows

    return EngineInfo(run, "torch", "0", tokenize)


@pytest.mark.parametrize("engine", [shifted, holes])
def test_a_wrong_engine_fails(engine, master, file, windows):
    report = gate(master, file, engine(emulated_model(master, file)), windows)
    assert report.status == "failed"
    assert {"engine.mean_kl", "training.mean_kl"} <= set(report.failed_checks())
    assert report.reason.startswith("engine.mean_kl is ")


def test_a_packed_path_without_activation_quantisation_fails(master, file, windows):
    forwards = FORWARDS | {"packed": FORWARDS["training without activation quantisation"]}
    report = gate(master, file, torch_engine(emulated_model(master, file)), windows, forwards=forwards)
    assert {"layers.output_error", "packed.activation_ratio"} <= set(report.failed_checks())


def test_an_engine_without_activation_quantisation_fails(master, file, windows):
    report = gate(master, file, torch_engine(emulated_model(master, file, "none")), windows)
    assert report.failed_checks() == ["engine.activation_ratio"]


def test_an_effect_within_the_noise_of_codes_decides_nothing(master, file, windows):
    engine = torch_engine(emulated_model(master, file, "none"))
    effect = gate(master, file, engine, windows).measurements["emulation without activation quantisation"]["mean_kl"]
    for noise, status, holds in ((effect / 7, "failed", False), (effect / 5, "proven", None)):  # judged from 6 times the noise on
        report = run_gate(master, file, engine, windows, ParityBounds(min_positions=1, code_noise=noise))
        check = next(check for check in report.checks if check.name == "engine.activation_ratio")
        assert (report.status, check.holds) == (status, holds)


def test_bounds_decide(master, file, windows):
    engine = torch_engine(emulated_model(master, file).double())
    tight = ParityBounds(min_positions=1, layer_output=1e-9)
    report = run_gate(master, file, engine, windows, tight)
    assert (report.status, report.failed_checks()) == ("failed", ["layers.output_error"])
    many = run_gate(master, file, engine, windows, ParityBounds())
    assert (many.status, many.reason) == ("unproven", "only 96 positions were compared, and a proof needs 1000")


def test_a_model_whose_noise_hides_a_wrong_type_is_unproven(master, file, windows):
    # With no default to fall back on, and nothing of a control's cost allowed, every widened bound is beyond its cap.
    engine = torch_engine(emulated_model(master, file).double())
    none = bounds(min_positions=1, training_mean_kl=0.0, resolution=0.0)
    report = run_gate(master, file, engine, windows, none)
    assert (report.status, report.failed_checks()) == ("unproven", [])
    assert "training.mean_kl" in report.undecided_checks()
    assert report.reason.startswith("rounding alone moves this model about as far as a wrong weight type would, so ")
    check = next(check for check in report.checks if check.name == "training.mean_kl")
    assert check.bound == 0.0
    assert "rounding explains figures up to" in check.note
    # The same bounds with their caps as they are: 0.5 of what Q4_0 costs leaves room for what block-wise rounding costs.
    capped = run_gate(master, file, engine, windows, bounds(min_positions=1, training_mean_kl=0.0))
    assert (capped.status, capped.undecided_checks()) == ("proven", [])


@pytest.mark.parametrize(
    ("value", "noise", "cap", "holds", "bound"),
    [
        (0.9, 0.0, 0.0, True, 1.0),
        (1.1, 0.0, 9.0, False, 1.0),
        (2.0, 3.0, 9.0, True, 3.0),
        (2.0, 3.0, 1.5, None, 1.5),
        (1.2, 3.0, 1.5, True, 1.5),
        (3.1, 3.0, 1.5, False, 3.0),
        (2.0, 3.0, None, True, 3.0),
        (float("nan"), 3.0, 1.5, False, 3.0),
    ],
    ids=["default", "missed", "widened", "beyond-the-cap", "within-the-cap", "beyond-noise", "no-cap", "not-a-number"],
)
def test_a_bound_widens_with_noise_up_to_its_cap(value, noise, cap, holds, bound):
    check = widened("x", value, "<=", 1.0, noise, cap)
    assert (check.holds, check.bound) == (holds, bound)
    mirrored = widened("x", -value, ">=", -1.0, -noise, None if cap is None else -cap)
    assert (mirrored.holds, mirrored.bound) == (holds, -bound)


@pytest.mark.parametrize("bad", [[], [[1]], [[1, 2, 3], [1, 2]]], ids=["none", "short", "uneven"])
def test_useless_windows_are_refused(bad, master, file):
    with pytest.raises(UserError, match="token windows"):
        gate(master, file, torch_engine(load_model(master)), bad)


# ---- what rounding alone can explain


@pytest.mark.parametrize(("error", "holds"), [(0.002, False), (0.003, True)])
def test_a_perplexity_may_be_off_by_what_chance_explains_on_so_few_positions(error, holds):
    roles = ROLES["llama.cpp"]
    same = Comparison(positions=125, mean_kl=0.0, max_kl=0.0, top1=1.0, flip_margin=0.0, perplexity_ratio=1.0, perplexity_error=0.0)
    found = dict.fromkeys((*FLOORS, *roles.pairs), same)
    found[roles.training] = replace(same, perplexity_ratio=1.008)
    found[roles.handling] = replace(same, perplexity_error=error)
    checks = {check.name: check for check in engine_checks(found, ParityBounds(), codes=True, ternary=True)}
    assert checks["training.perplexity"].holds is holds


def end_to_end(packed, off, floor):
    """The end-to-end checks, by name, of a run that measured these mean distances."""

    def distance(kl):
        return Comparison(positions=1, mean_kl=kl, max_kl=kl, top1=1.0, flip_margin=0.0, perplexity_ratio=1.0, perplexity_error=0.0)

    found = {name: distance(floor) for name in FLOORS}
    found |= {"packed against training": distance(packed), "activation quantisation off": distance(off)}
    return {check.name: check for check in end_to_end_checks(found, ParityBounds())}


@pytest.mark.parametrize(
    ("packed", "floor", "holds"),
    [(0.212, 0.1, None), (0.15, 0.1, None), (0.212, 0.01, False), (0.15, 0.01, True), (1.0, 0.05, False), (1.0, 0.1, None)],
    ids=["false-alarm", "wide-floor", "missed", "held", "control", "control-in-noise"],
)
def test_the_packed_ratio_is_judged_only_where_rounding_leaves_room(packed, floor, holds):
    checks = end_to_end(packed, off=1.0, floor=floor)
    check = checks["packed.activation_ratio"]
    assert (check.holds, check.value, check.bound) == (holds, packed, 0.2)
    assert ("rounding moves this model too far" in check.note) == (holds is None)
    # What quantises nothing is as far as `off`, and is refused by the plain distance where the ratio is not judged.
    assert (checks["packed.mean_kl"].holds is False) == (packed == 1.0 or floor == 0.01)


def test_an_undecided_packed_ratio_does_not_fail_a_model_and_the_control_fails_all_the_same(master, file, windows):
    undecided = ParityBounds(min_positions=1, decidable=1e9)
    engine = torch_engine(emulated_model(master, file))
    report = run_gate(master, file, engine, windows, undecided)
    assert (report.status, report.failed_checks()) == ("proven", [])
    assert [c.holds for c in report.checks if c.name.endswith("activation_ratio")] == [None, None]
    forwards = FORWARDS | {"packed": FORWARDS["training without activation quantisation"]}
    control = run_gate(master, file, engine, windows, undecided, forwards=forwards)
    assert control.status == "failed"
    assert {"layers.output_error", "packed.mean_kl"} <= set(control.failed_checks())


def test_margins_of_changed_choices_may_stay_open_and_mean_distances_may_not(master, file, windows):
    """Figures as an engine has them on a model that rounding moves far: more than half of Q4_0's, less than rounding explains."""
    engine = torch_engine(emulated_model(master, file))
    report = run_gate(master, file, engine, windows, bounds(min_positions=1))
    assert report.status == "proven"

    def judged(*names: str, holds: bool | None):
        checks = [replace(check, holds=holds) if check.name in names else check for check in report.checks]
        run = _Run(engine=engine, positions=report.positions, pairs={})
        measured = _Measured([], LayerDifference(), [], [run])
        return _with_status(replace(report, checks=checks), read_gguf(file), measured, ParityBounds(min_positions=1))

    margins = ("packed.greedy_margin", "training.flip_margin")
    undecided = judged(*margins, holds=None)
    assert undecided.status == "proven"
    assert undecided.reason == f"rounding moves this model too far to decide {' and '.join(margins)}"
    assert judged(*margins, "training.mean_kl", holds=None).status == "unproven"
    assert judged(*margins, holds=False).status == "failed"


# ---- tokens


def test_an_engines_tokens_are_compared_line_by_line():
    tokenizer = tiny_tokenizer(around="<|begin|> $A")

    def whole(text):
        return tokenizer(text).input_ids

    def bare(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    def loses_trailing_spaces(text):
        return whole(text.rstrip(" "))

    assert differing_lines(whole, whole) == []
    assert differing_lines(whole, bare) == list(LINES)
    differ = differing_lines(whole, loses_trailing_spaces)
    assert 0 < len(differ) < len(LINES)
    assert all(line.endswith(" ") for line in differ)
    right, wrong = tokenizer_check(whole, whole), tokenizer_check(whole, loses_trailing_spaces)
    assert (right.name, right.value, right.bound, right.holds) == ("tokenizer", 0, 0, True)
    assert (wrong.value, wrong.holds) == (len(differ), False)
    assert wrong.note.startswith(f"{len(differ)} of {len(LINES)} lines, the first ' ': tokens [1] instead of [1, ")


def test_an_engine_that_cuts_text_otherwise_fails_though_its_logits_agree(master, file, windows):
    tokenizer = tiny_tokenizer()
    engine = torch_engine(emulated_model(master, file))
    right = replace(engine, tokenize=lambda text: tokenizer(text).input_ids)
    wrong = replace(engine, tokenize=lambda text: [0, *tokenizer(text).input_ids])
    report = gate(master, file, right, windows)
    assert (report.status, {c.name: c.holds for c in report.checks}["tokenizer"]) == ("proven", True)
    report = gate(master, file, wrong, windows)
    assert (report.status, report.failed_checks()) == ("failed", ["tokenizer"])
    lines = len(LINES)
    assert report.reason.startswith(
        f"the engine cuts text into other tokens than the model's tokenizer, {lines} of {lines} lines, the first '': tokens [0]"
    )
    assert report.metadata()["wrinklefree.parity.tokenizer.value"] == lines


# ---- emulated_model, bytes and metadata


def test_emulated_model_takes_the_files_matrices(master, file, tmp_path, windows):
    ids = windows[0][:-1]
    data = bytearray(file.read_bytes())
    info = read_gguf(file).tensors["blk.0.ffn_up.weight"]
    data[info.offset + 2 : info.offset + info.nbytes : 18] = bytes(len(range(info.offset + 2, info.offset + info.nbytes, 18)))
    (tmp_path / "changed.gguf").write_bytes(data)
    right, changed = emulated_model(master, file), emulated_model(master, tmp_path / "changed.gguf")
    assert not np.allclose(torch_engine(right).run(ids), torch_engine(changed).run(ids), atol=1e-4)
    training = torch_engine(emulated_model(master, file, "training")).run(ids)
    assert not np.array_equal(training, torch_engine(right).run(ids))
    with pytest.raises(UserError, match="unknown activation handling 'int4'"):
        emulated_model(master, file, "int4")


def test_a_file_of_another_model_is_named(model, file, tmp_path):
    save_master(tiny_bitnet(hidden=64, ffn=192, kv_heads=2), tmp_path / "other", tiny_tokenizer())
    with pytest.raises(UserError, match=r"has no tensor blk\.0\.ffn_gate\.weight of shape \[192, 64\]"):
        emulated_model(tmp_path / "other", file)
    with open_weights(tmp_path / "other") as reader:
        differences = file_differences(reader, file)
    assert {"blk.0.ffn_gate.weight", "key bitnet.feed_forward_length"} <= set(differences)


def test_differences_name_tensors_and_keys(master, file, tmp_path):
    with open_weights(master) as reader:
        assert file_differences(reader, file) == []
        data = bytearray(file.read_bytes())
        data[read_gguf(file).tensors["blk.1.attn_q.weight"].offset + 7] ^= 1
        at = data.index(b"bitnet.rope.freq_base") + len(b"bitnet.rope.freq_base") + 4
        data[at : at + 4] = np.float32(500.0).tobytes()
        (tmp_path / "changed.gguf").write_bytes(data)
        assert file_differences(reader, tmp_path / "changed.gguf") == ["blk.1.attn_q.weight", "key bitnet.rope.freq_base"]


def test_annotating_adds_keys_and_keeps_every_tensor(file, tmp_path):
    values = {"wrinklefree.a": "text", "wrinklefree.b": 1e-9, "wrinklefree.c": -3, "wrinklefree.d": True}
    annotate_gguf(file, tmp_path / "out.gguf", values)
    before, after = read_gguf(file), read_gguf(tmp_path / "out.gguf")
    assert after.metadata == before.metadata | values
    assert all(after.raw(name).tobytes() == before.raw(name).tobytes() for name in before.tensors)
    with pytest.raises(UserError, match=r"has the key 'wrinklefree\.a' already"):
        annotate_gguf(tmp_path / "out.gguf", tmp_path / "again.gguf", {"wrinklefree.a": "other"})


# ---- whose proof it is


def test_a_window_given_twice_is_refused(master, file, windows):
    engine = torch_engine(emulated_model(master, file))
    with pytest.raises(UserError, match="given twice shows nothing new"):
        gate(master, file, engine, [windows[0], windows[0]])


def test_a_key_that_nobody_expects_fails(master, file, windows, tmp_path):
    engine = torch_engine(emulated_model(master, file))
    for key in ("tokenizer.chat_template.other", "bitnet.rope.scaling.factor"):
        annotate_gguf(file, tmp_path / "more.gguf", {key: "x"})
        report = gate(master, tmp_path / "more.gguf", engine, windows)
        assert (report.status, report.failed_checks()) == ("failed", ["bytes"])
        assert report.reason == f"the file differs from its source in key {key}"
    annotate_gguf(file, tmp_path / "proof.gguf", {"wrinklefree.parity.status": "proven"})
    assert gate(master, tmp_path / "proof.gguf", engine, windows).status == "proven"


def test_a_key_given_twice_is_refused(file, tmp_path):
    annotate_gguf(file, tmp_path / "one.gguf", {"general.aa": "a", "general.ab": "b"})
    (tmp_path / "two.gguf").write_bytes((tmp_path / "one.gguf").read_bytes().replace(b"general.ab", b"general.aa"))
    with pytest.raises(UserError, match=r"the key 'general\.aa' twice"):
        read_gguf(tmp_path / "two.gguf")


def test_embeddings_that_ruin_a_model_are_not_proven(model, tmp_path, windows):
    """Columns 40 times the others leave nothing of their neighbours in a block of 32."""
    wild = copy.deepcopy(model)
    with torch.no_grad():
        wild.model.embed_tokens.weight[:, ::32] *= 40
    for name, one in (("wild", wild), ("tame", model)):
        save_master(one, tmp_path / name, tiny_tokenizer())
        export_gguf(tmp_path / name, tmp_path / f"{name}.gguf", "q2_0", embedding="q4_1")
        engine = torch_engine(emulated_model(tmp_path / name, tmp_path / f"{name}.gguf"))
        report = gate(tmp_path / name, tmp_path / f"{name}.gguf", engine, windows)
        cost = abs(report.measurements["embeddings against training"]["perplexity_ratio"] - 1)
        assert "q4_1 embeddings alone change perplexity by" in report.reason
        assert report.failed_checks() == []
        if name == "wild":
            assert (report.status, cost > 0.2) == ("unproven", True)
        else:
            assert (report.status, cost < 0.05) == ("proven", True)


def test_a_proof_holds_for_its_own_tensors_and_weights(master, file, windows, tmp_path):
    report = gate(master, file, torch_engine(emulated_model(master, file)), windows)
    annotate_gguf(file, tmp_path / "proven.gguf", report.metadata())
    assert proof_status(tmp_path / "proven.gguf") == ("proven", "")
    assert proof_status(file) is None
    changed = bytearray((tmp_path / "proven.gguf").read_bytes())
    changed[-40] ^= 1
    (tmp_path / "changed.gguf").write_bytes(changed)
    assert proof_status(tmp_path / "changed.gguf") == ("unproven", "the tensors are not those that were proven")
    with open_weights(master) as reader:
        assert report.details["source_sha256"] == source_digest(reader)
    other = load_model(master)
    with torch.no_grad():
        other.model.norm.weight[0] += 1
    save_master(other, tmp_path / "other", tiny_tokenizer())
    with open_weights(tmp_path / "other") as reader:
        assert report.details["source_sha256"] != source_digest(reader)
