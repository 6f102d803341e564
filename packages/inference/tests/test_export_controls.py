"""The parity gate with an engine that this project did not write and with its own, and the mistakes that both must catch."""

import shutil
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from bitnet_arch import PackedBitLinear, load_model, open_weights, save_master
from bitnet_arch.__main__ import main as convert
from bitnet_arch.gguf import export_gguf, from_gguf, read_gguf
from bitnet_arch.parity import FORWARDS, EngineInfo, ParityBounds, ParityError, emulated_model, native_engine, run_gate
from bitnet_arch.parity.engines import log_softmax
from bitnet_arch.testing import tiny_bitnet, tiny_tokenizer, train_tiny
from bitnet_kernels import Engine
from wrinklefree_inference.export import export_proven, probe_windows
from wrinklefree_inference.llamacpp import EngineError, LlamaCpp, normalized

WINDOW, WINDOWS = 120, 2
BOUNDS = ParityBounds(min_positions=WINDOW)
UNROUNDED = FORWARDS | {
    "emulated": FORWARDS["emulated without activation quantisation"],
    "emulated with float32 cache": replace(FORWARDS["emulated without activation quantisation"], half_cache=False),
}
UNROUNDED_PACKED = FORWARDS | {"packed": FORWARDS["training without activation quantisation"]}


def spread_gains(model):
    """Give norms the uneven gains that long training leaves; a hundred steps move them by 2% only."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny trained ternary model and token windows."""
    directory = tmp_path_factory.mktemp("trained") / "m"
    model = tiny_bitnet()
    spread_gains(model)
    save_master(train_tiny(model), directory, tiny_tokenizer())
    with open_weights(directory) as reader:
        return directory, probe_windows(reader, WINDOWS * WINDOW)


@pytest.fixture(scope="module")
def files(trained, tmp_path_factory):
    """The right file of each type."""
    folder = tmp_path_factory.mktemp("files")
    for kind in ("f16", "tq1_0", "tq2_0", "q2_0"):
        export_gguf(trained[0], folder / f"{kind}.gguf", kind)
    return folder


def gate(trained, path, forwards=None, windows=1):
    directory, ids = trained
    bounds = ParityBounds(min_positions=windows * WINDOW)
    with LlamaCpp(path) as engine:
        info = EngineInfo(engine.logprobs, "llama.cpp", engine.version, engine.tokenize)
        return run_gate(directory, path, info, ids[:windows], bounds, forwards=forwards)


def native_gate(trained, path, windows=1, forwards=None, engine=None):
    """The gate with the project's own engine alone, which is no proof of a file that llama.cpp runs."""
    directory, ids = trained
    bounds = ParityBounds(min_positions=windows * WINDOW)
    return run_gate(directory, path, engine or native_engine(path, WINDOW), ids[:windows], bounds, forwards=forwards)


def show(name, report):
    figures = ", ".join(f"{c.name} {c.value:.2e}" for c in report.checks if c.holds is False)
    same = "native against the file" if "native against the file" in report.measurements else "engine against emulation"
    distance = report.measurements[same]["mean_kl"]
    print(f"{name}: {report.status}; missed: {figures or 'nothing'}; KL {distance:.1e}")


@pytest.mark.parametrize("kind", ["f16", "tq1_0", "tq2_0", "q2_0"])
def test_a_right_file_is_proven_by_llama_cpp(kind, trained, files):
    report = gate(trained, files / f"{kind}.gguf", windows=WINDOWS)
    show(kind, report)
    assert (report.status, report.reason, report.failed_checks()) == ("proven", "", [])
    assert report.positions == WINDOWS * WINDOW
    assert all(check.holds for check in report.checks)
    assert report.types["blk.0.ffn_up.weight"] == kind


@pytest.mark.parametrize("kind", ["f16", "tq1_0", "tq2_0", "q2_0"])
def test_the_native_engine_computes_what_was_trained(kind, trained, files):
    report = native_gate(trained, files / f"{kind}.gguf", windows=WINDOWS)
    show(f"native {kind}", report)
    assert (report.status, report.failed_checks(), report.undecided_checks()) == ("unproven", [], [])
    assert report.reason == "llama.cpp could run the file and has not, and this project's own engine alone is no proof of it"
    figures = {check.name: check for check in report.checks}
    assert figures["native.mean_kl"].value < 0.02 * report.measurements["activation quantisation off"]["mean_kl"]
    assert figures["native.activation_ratio"].holds


def test_both_engines_prove_a_file_on_their_own_positions(trained, files):
    path, seen = files / "tq2_0.gguf", []
    with LlamaCpp(path, on_position=lambda: seen.append(1)) as engine:
        foreign = EngineInfo(engine.logprobs, "llama.cpp", engine.version, engine.tokenize, windows=1)
        bounds = ParityBounds(min_positions=WINDOWS * WINDOW)
        report = run_gate(trained[0], path, [native_engine(path, WINDOW), foreign], trained[1], bounds)
        few = run_gate(
            trained[0], path, [native_engine(path, WINDOW), foreign], trained[1], replace(bounds, min_foreign=WINDOW + 1)
        )
    assert (report.status, report.reason, report.positions) == ("proven", "", WINDOWS * WINDOW)
    assert (report.engine, report.details["engine_positions"]) == ("native (bitnet_kernels) and llama.cpp", "240 and 120")
    assert len(seen) == 2 * WINDOW
    positions = {name: figures["positions"] for name, figures in report.measurements.items()}
    assert (positions["native against training"], positions["engine against training"]) == (240, 120)
    assert {c.name for c in report.checks} >= {"tokenizer", "native.tokenizer", "engine.mean_kl", "native.mean_kl"}
    assert (few.status, few.reason) == ("unproven", "llama.cpp ran only 120 positions, and a proof needs 121 of it")


# ---- what can go wrong in a file: each changes bytes in place


def tensor(path, name):
    """A writable view of a tensor's bytes, `[rows, row_bytes]`."""
    written = read_gguf(path)
    info = written.tensors[name]
    rows = int(np.prod(info.shape[:-1]))
    return np.memmap(path, np.uint8, "r+", info.offset, (rows, info.nbytes // rows))


def matrices(path, suffix=""):
    kept = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    names = read_gguf(path).tensors
    return [n for n in names if n.split(".")[-2] in kept and n.endswith(suffix + ".weight" if suffix else "")]


def scales(path, name):
    """A writable f16 view of a TQ2_0 tensor's block scales."""
    return tensor(path, name).reshape(-1, 66)[:, 64:].view(np.float16)


def invert_scales(path):
    for name in matrices(path):
        view = scales(path, name)
        view[:] = (1.0 / view.astype(np.float32)).astype(np.float16)


def permute_queries_and_keys(path):
    metadata = read_gguf(path).metadata
    for name in matrices(path, "attn_q") + matrices(path, "attn_k"):
        heads = metadata["bitnet.attention.head_count" if "attn_q" in name else "bitnet.attention.head_count_kv"]
        view = tensor(path, name)
        view[:] = view.reshape(heads, 2, -1, view.shape[1]).swapaxes(1, 2).reshape(view.shape)


def set_float(path, key, value):
    data = bytearray(path.read_bytes())
    at = data.index(key.encode()) + len(key) + 4
    data[at : at + 4] = struct.pack("<f", value)
    path.write_bytes(data)


def wrong_rope_base(path):
    set_float(path, "bitnet.rope.freq_base", 1000.0)


def wrong_epsilon(path):
    set_float(path, "bitnet.attention.layer_norm_rms_epsilon", 1e-6)


def distort_like_q4_0(path):
    for name in matrices(path):
        view = tensor(path, name).view(np.float16).reshape(-1, 32)
        extreme = np.take_along_axis(view, np.abs(view).argmax(-1)[:, None], -1)
        view[:] = np.where(view * np.sign(extreme) < 0, view * np.float16(0.875), view)


def drop_a_norm(path):
    tensor(path, "blk.1.ffn_sub_norm.weight").view(np.float32)[:] = 1.0


def scale_off_by_one_percent(path):
    view = scales(path, "blk.1.ffn_gate.weight")
    view[:] = (view.astype(np.float32) * 1.01).astype(np.float16)


def value_scale_doubled(path):
    view = scales(path, "blk.1.attn_v.weight")
    view[:] = view * np.float16(2)


def flip_a_thousandth_of_the_signs(path):
    codes = tensor(path, "blk.1.ffn_gate.weight").reshape(-1, 66)[:, :64]
    rng = np.random.default_rng(0)
    rows, columns = rng.integers(0, len(codes), len(codes) * 256 // 1000), rng.integers(0, 64, len(codes) * 256 // 1000)
    low = codes[rows, columns] & 3
    codes[rows, columns] = (codes[rows, columns] & 0b11111100) | (2 - low)


@pytest.mark.parametrize(
    ("damage", "kind", "caught_by_logits"),
    [
        (invert_scales, "tq2_0", True),
        (permute_queries_and_keys, "tq2_0", True),
        (wrong_rope_base, "tq2_0", True),
        (distort_like_q4_0, "f16", True),
        (drop_a_norm, "tq2_0", True),
        (wrong_epsilon, "tq2_0", False),
        (scale_off_by_one_percent, "tq2_0", False),
        (value_scale_doubled, "tq2_0", False),
        (flip_a_thousandth_of_the_signs, "tq2_0", False),
    ],
)
def test_a_damaged_file_fails(damage, kind, caught_by_logits, trained, files, tmp_path):
    path = tmp_path / "damaged.gguf"
    shutil.copy(files / f"{kind}.gguf", path)
    damage(path)
    report = gate(trained, path)
    show(damage.__name__, report)
    missed = report.failed_checks()
    assert report.status == "failed"
    assert "bytes" in missed
    assert ("engine.mean_kl" in missed) or not caught_by_logits


@pytest.mark.parametrize(
    ("damage", "caught_by_logits"),
    [
        (invert_scales, True),
        (permute_queries_and_keys, True),
        (wrong_rope_base, True),
        (drop_a_norm, True),
        (wrong_epsilon, True),  # which llama.cpp's bounds let through
        (scale_off_by_one_percent, False),
        (value_scale_doubled, False),
    ],
)
def test_a_damaged_file_fails_in_the_native_engine(damage, caught_by_logits, trained, files, tmp_path):
    path = tmp_path / "damaged.gguf"
    shutil.copy(files / "tq2_0.gguf", path)
    damage(path)
    report = native_gate(trained, path)
    show(f"native {damage.__name__}", report)
    missed = report.failed_checks()
    assert "bytes" in missed
    assert ("native.mean_kl" in missed) == caught_by_logits


def swap_gate_and_up(path):
    gate_, up = (tensor(path, f"blk.0.ffn_{name}.weight") for name in ("gate", "up"))
    gate_[:], up[:] = up.copy(), gate_.copy()


@pytest.mark.parametrize("gate_of", [gate, native_gate], ids=["llama.cpp", "native"])
def test_swapped_matrices_fail(gate_of, trained, files, tmp_path):
    shutil.copy(files / "tq2_0.gguf", tmp_path / "swapped.gguf")
    swap_gate_and_up(tmp_path / "swapped.gguf")
    report = gate_of(trained, tmp_path / "swapped.gguf")
    show("gate and up swapped", report)
    assert {"bytes", "native.mean_kl" if gate_of is native_gate else "engine.mean_kl"} <= set(report.failed_checks())


def test_a_matrix_that_went_through_q4_0_is_refused_by_the_native_engine(files, tmp_path):
    shutil.copy(files / "f16.gguf", tmp_path / "damaged.gguf")
    distort_like_q4_0(tmp_path / "damaged.gguf")
    with pytest.raises(ValueError, match="is not ternary"):
        native_engine(tmp_path / "damaged.gguf", WINDOW)


# ---- what can go wrong with text: logits are compared on token ids and agree all the same


@pytest.fixture(scope="module")
def begun(trained, tmp_path_factory):
    """The trained model with a tokenizer that puts a begin token before every text."""
    directory = tmp_path_factory.mktemp("begun") / "m"
    save_master(load_model(trained[0]), directory, tiny_tokenizer(around="<|begin|> $A"))
    with open_weights(directory) as reader:
        return directory, probe_windows(reader, WINDOW)


def test_a_tokenizer_that_puts_a_begin_token_before_texts_is_proven(begun, tmp_path):
    export_gguf(begun[0], tmp_path / "out.gguf")
    report = gate(begun, tmp_path / "out.gguf")
    assert (report.status, report.failed_checks()) == ("proven", [])
    with LlamaCpp(tmp_path / "out.gguf") as engine:
        for text, ids in (("", [1]), ("a fox", [1, *tiny_tokenizer(around="$A")("a fox").input_ids])):
            assert engine.tokenize(text) == ids


@pytest.mark.parametrize("key", ["add_bos_token", "add_eos_token"])
@pytest.mark.parametrize("around", [None, "<|begin|> $A"], ids=["nothing", "begin"])
def test_a_file_that_puts_other_tokens_around_texts_fails_though_logits_agree(key, around, trained, begun, tmp_path):
    source, path = trained if around is None else begun, tmp_path / "damaged.gguf"
    export_gguf(source[0], path)
    data = bytearray(path.read_bytes())
    at = data.index(f"tokenizer.ggml.{key}".encode()) + len(f"tokenizer.ggml.{key}") + 4
    data[at] ^= 1
    path.write_bytes(data)
    report = gate(source, path)
    show(f"{key} inverted", report)
    assert report.failed_checks() == ["bytes", "tokenizer"]


@pytest.mark.parametrize("name", ["smollm", "llama-bpe", "default"])
def test_a_wrong_pre_tokenizer_fails_where_the_exporter_itself_is_wrong(name, trained, tmp_path, monkeypatch):
    monkeypatch.setattr("bitnet_arch.gguf.tokenizer._byte_level_pre", lambda *_: name)
    export_gguf(trained[0], tmp_path / "out.gguf")
    report = gate(trained, tmp_path / "out.gguf")
    show(f"pre-tokenizer {name}", report)
    assert report.failed_checks() == ["tokenizer"]
    assert "the engine cuts text into other tokens than the model's tokenizer" in report.reason
    with pytest.raises(ParityError, match=r"new\.gguf was not written: the engine cuts text into other tokens"):
        export_proven(trained[0], tmp_path / "new.gguf", positions=4)
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf"]


# ---- what can go wrong in an engine, or in what it is compared with


def tokenize(text):
    return list(tiny_tokenizer()(text).input_ids)


def torch_engine(model):
    @torch.no_grad()
    def run(ids):
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1).numpy()

    return EngineInfo(run, "torch", "0", tokenize)


def test_an_engine_that_computes_squared_relu_fails(trained, files):
    path = files / "tq2_0.gguf"
    model = emulated_model(trained[0], path)

    class SquaredReLU(torch.nn.Module):
        def forward(self, x):
            return torch.relu(x).square()

    assert run_gate(trained[0], path, torch_engine(model), trained[1][:1], BOUNDS).status == "proven"
    for layer in model.model.layers:
        layer.mlp.act_fn = SquaredReLU()
    report = run_gate(trained[0], path, torch_engine(model), trained[1][:1], BOUNDS)
    show("squared ReLU", report)
    assert report.status == "failed"
    assert {"engine.mean_kl", "training.mean_kl"} <= set(report.failed_checks())


@pytest.mark.parametrize("kind", ["tq2_0", "q2_0"])
def test_an_engine_without_activation_quantisation_fails(kind, trained, files):
    path = files / f"{kind}.gguf"
    report = run_gate(trained[0], path, torch_engine(emulated_model(trained[0], path, "none")), trained[1][:1], BOUNDS)
    show(f"{kind} engine without activation quantisation", report)
    assert report.failed_checks() == ["engine.activation_ratio"]


def own(model):
    """An engine of torch that claims to handle activations as training does."""
    return replace(torch_engine(model), handling="training")


class Unrounded(torch.nn.Module):
    """A packed layer without its rounding of activations."""

    def __init__(self, layer):
        super().__init__()
        self.weight = layer.codes().float() * layer.weight_scale

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight)


def test_an_engine_of_ours_without_activation_quantisation_fails(trained, files):
    path = files / "tq2_0.gguf"
    model = from_gguf(path)
    assert native_gate(trained, path, engine=own(model)).failed_checks() == []
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, module in list(part.named_children()):
                if isinstance(module, PackedBitLinear):
                    setattr(part, name, Unrounded(module))
    report = native_gate(trained, path, engine=own(model))
    show("native without activation quantisation", report)
    assert {"native.mean_kl", "native.activation_ratio"} <= set(report.failed_checks())


def test_an_engine_of_ours_that_rounds_keys_and_values_fails(trained, files):
    path = files / "tq2_0.gguf"
    engine = Engine(path, context=WINDOW, cache="int8")
    info = EngineInfo(lambda ids: log_softmax(engine.logits(ids)), "native", "0", None, "training")
    report = native_gate(trained, path, engine=info)
    show("native with an int8 cache", report)
    assert "native.mean_kl" in report.failed_checks()


def test_llama_cpps_rounding_by_blocks_fails_as_our_own(trained, files):
    path = files / "tq2_0.gguf"
    report = native_gate(trained, path, engine=own(emulated_model(trained[0], path)))
    show("rounding by blocks", report)
    assert "native.mean_kl" in report.failed_checks()


def test_a_reference_of_ours_without_activation_quantisation_fails(trained, files):
    forwards = FORWARDS | {"file": FORWARDS["file without activation quantisation"]}
    report = native_gate(trained, files / "tq2_0.gguf", forwards=forwards)
    assert {"native.mean_kl", "native.activation_ratio"} <= set(report.failed_checks())


@pytest.mark.parametrize("kind", ["tq2_0", "q2_0"])
def test_a_reference_without_activation_quantisation_fails(kind, trained, files):
    report = gate(trained, files / f"{kind}.gguf", UNROUNDED)
    show(f"{kind} against no activation quantisation", report)
    assert report.status == "failed"
    assert report.failed_checks() == ["engine.activation_ratio"]


def test_packed_layers_without_activation_quantisation_fail(trained, files):
    report = gate(trained, files / "tq2_0.gguf", UNROUNDED_PACKED)
    show("packed without activation quantisation", report)
    assert {"layers.output_error", "packed.mean_kl", "packed.activation_ratio"} <= set(report.failed_checks())


def test_the_token_that_is_generated_does_not_touch_the_distribution(trained, files):
    ids = trained[1][0][:30]
    with LlamaCpp(files / "tq2_0.gguf") as engine:
        expected = engine.logprobs(ids)[-1]
        for other in (0, 2, 230):
            engine._plain_token = lambda other=other: other
            assert np.array_equal(engine.logprobs(ids)[-1], expected)


def test_reusing_the_cache_changes_no_more_than_rounding_does(trained, files):
    ids = trained[1][0][:40]
    with LlamaCpp(files / "tq2_0.gguf") as engine:
        reused = engine.logprobs(ids)
        alone = np.stack([engine.logprobs(ids[: i + 1])[-1] for i in (5, 20, 39)])
    with LlamaCpp(files / "tq2_0.gguf") as engine:
        fresh = engine.logprobs(ids)
    assert np.array_equal(reused, fresh)
    kl = (np.exp(alone) * (alone - reused[[5, 20, 39]])).sum(-1)
    assert np.abs(kl).max() < 1e-4


def test_an_engines_probabilities_are_normalised_if_they_nearly_are():
    row = np.log([0.25, 0.75])
    assert np.allclose(normalized(row + 1e-6, 0), row, atol=1e-12)
    for bad in (row + 2e-2, np.array([0.0, -np.inf])):
        with pytest.raises(EngineError, match="no full distribution at position 3"):
            normalized(bad, 3)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_smollm2_untrained_fails_only_as_a_wrong_file(tmp_path):
    """Converted but untrained: 30 layers amplify rounding, and controls must fail all the same.

    Rounding (of embeddings to f16, or by blocks instead of tokens) moves this model's perplexity by more or less than any proof may
    explain away, depending on the processor (16% and 3% on one): the right file is then unproven, for that reason.
    Its bytes, its layers and the engines against their forwards are within their bounds.
    """
    directory = tmp_path / "m"
    assert convert(["convert", "HuggingFaceTB/SmolLM2-135M-Instruct", "--out", str(directory)]) == 0
    report = export_proven(directory, tmp_path / "out.gguf")
    show("SmolLM2-135M", report)
    assert (report.positions, report.failed_checks()) == (64, [])
    undecided = {"training.perplexity", "native.training_perplexity"} & set(report.undecided_checks())
    assert (report.status == "unproven") == bool(undecided) == any(name in report.reason for name in undecided)
    judged = {check.name for check in report.checks if check.holds}
    assert judged >= {"bytes", "tokenizer", "layers.wrong_codes", "layers.output_error", "engine.mean_kl"}
    assert {report.types["blk.7.attn_q.weight"], report.types["blk.7.ffn_down.weight"]} == {"q2_0", "tq2_0"}
    bounds = {check.name: check.bound for check in report.checks}
    assert ParityBounds().ternary_mean_kl < bounds["engine.mean_kl"] < 0.5
    with open_weights(directory) as reader:
        windows = probe_windows(reader, 64)
    for damage in (permute_queries_and_keys, wrong_rope_base):
        path = tmp_path / "damaged.gguf"
        shutil.copy(tmp_path / "out.gguf", path)
        damage(path)
        damaged = gate((directory, windows), path)
        show(damage.__name__, damaged)
        assert damaged.status == "failed"
        assert {"bytes", "engine.mean_kl"} <= set(damaged.failed_checks())
