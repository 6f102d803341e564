"""The gate on every architecture that llama.cpp runs, on every type, and on files that no engine here runs."""

import pydoc_data.topics
import re
import struct

import numpy as np
import pytest
import torch
from bitnet_arch import (
    ConversionConfig,
    PackedBitLinear,
    UserError,
    convert_model,
    load_model,
    open_weights,
    pack_model,
    save_master,
    save_packed,
)
from bitnet_arch.bitlinear import BitLinearLRC
from bitnet_arch.gguf import export_gguf, from_gguf, read_gguf
from bitnet_arch.lrc.adapters import as_stored
from bitnet_arch.lrc.model import start_lrc
from bitnet_arch.modeling import form_of
from bitnet_arch.packed import PackedBitLinearLRC
from bitnet_arch.parity import FORWARDS, EngineInfo, ParityBounds, emulated_model, native_engine, no_engine, run_gate
from bitnet_arch.parity.forwards import TRAINING
from bitnet_arch.parity.gate import stored_types
from bitnet_arch.parity.stream import LayerStream
from bitnet_arch.testing import tiny_bitnet, tiny_tokenizer, train_tiny
from transformers import (
    BitNetConfig,
    BitNetForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

llamacpp = pytest.importorskip("wrinklefree_inference.llamacpp")
pytest.importorskip("xllamacpp")

SHAPE = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA_LAYERS = {"layer_types": ["sliding_attention"] * 5 + ["full_attention"], "sliding_window": 24, "num_hidden_layers": 6}
MAKERS = {
    "bitnet": lambda: tiny_bitnet(ffn=256),
    # Untied, with biases in attention and scaled rotary positions.
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True, rope_parameters=LLAMA3)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=128, tie_word_embeddings=True)),
    # An embedding scale, two rotary tables, and windows narrower than the probe.
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE | GEMMA_LAYERS, head_dim=64, query_pre_attn_scalar=64)),
}
LENGTH = 192
"""Positions of the probe. Of 33 files of models of three seeds two stayed unproven with 48, of which one near tie is more than the
share of other choices that is allowed, and none with 192: a tie is a quarter of it there."""


def slow(*values):
    """A case that only the slow run has."""
    return pytest.param(*values, marks=pytest.mark.slow)


BOUNDS = ParityBounds(min_positions=LENGTH)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Makes a tiny trained model's master directory by family."""
    made = {}

    def make(family):
        if family not in made:
            torch.manual_seed(0)
            model = MAKERS[family]().float()
            model = model if family == "bitnet" else convert_model(model, ConversionConfig(norm="none"))
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name.endswith("bias"):
                        parameter.normal_(0, 0.1)
                    elif "norm" in name:  # uneven gains, as long training leaves them; large ones make attention choose
                        parameter.add_(0.3 * torch.randn_like(parameter) + (3.0 if "q_norm" in name and family == "qwen3" else 0.0))
            made[family] = tmp_path_factory.mktemp(family) / "m"
            save_master(train_tiny(model, steps=20, rows=4), made[family], tiny_tokenizer())
        return made[family]

    return make


@pytest.fixture(scope="module")
def windows():
    text = pydoc_data.topics.topics["lambda"] + pydoc_data.topics.topics["assert"]
    return [tiny_tokenizer()(text).input_ids[: LENGTH + 1]]


def gate(directory, path, windows, **options):
    with llamacpp.LlamaCpp(path, context=LENGTH + 8) as engine:
        info = EngineInfo(engine.logprobs, llamacpp.NAME, engine.version, engine.tokenize)
        return run_gate(directory, path, info, windows, BOUNDS, **options)


# ---- the stream computes what whole models do


@pytest.mark.parametrize("family", ["llama", "gemma3", slow("bitnet"), slow("qwen2"), slow("qwen3")])
def test_layers_of_every_family_are_computed_as_in_the_whole_model(family, trained, windows, tmp_path):
    directory, path = trained(family), tmp_path / "out.gguf"
    export_gguf(directory, path, embedding="q8_0")
    ids = torch.tensor(windows)[:, :-1]
    whole = {
        "training": load_model(directory),
        "training in float64": load_model(directory).double(),
        "packed": pack_model(load_model(directory)),
        "emulated": emulated_model(directory, path),
        "emulated without activation quantisation": emulated_model(directory, path, "none"),
    }
    with open_weights(directory) as reader:
        stream = LayerStream(reader, stored_types(reader, read_gguf(path)), ids, {name: FORWARDS[name] for name in whole})
        stream.run(1e-4)
        for name, model in whole.items():
            with torch.no_grad():
                expected = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1).numpy()
            assert np.abs(stream.logprobs([name], 0, slice(None))[name] - expected).max() < 1e-4, name


def test_sliding_layers_get_their_own_mask_and_rotary_table(trained, windows, tmp_path):
    """Control: the same Gemma whose layers all attend to everything, or all turn alike, computes something else."""
    directory = trained("gemma3")
    right = load_model(directory)
    ids = torch.tensor(windows)[:, :-1]
    full = {"rope_type": "default", "rope_theta": 1e6}
    changes = {
        "windows": {"sliding_window": 4096},
        "tables": {"rope_parameters": {"full_attention": full, "sliding_attention": full}},
    }
    rows = {}
    for name, change in {"right": {}, **changes}.items():
        config = Gemma3TextConfig(**right.config.to_dict() | change)
        model = convert_model(Gemma3ForCausalLM(config).float().eval(), ConversionConfig(norm="none"))
        model.load_state_dict(right.state_dict())
        save_master(model, tmp_path / name, tiny_tokenizer())
        with open_weights(tmp_path / name) as reader:
            stream = LayerStream(reader, {}, ids, {name: TRAINING[name] for name in ("training", "packed")})
            stream.run(1e-4)
            rows[name] = stream.logprobs(["training"], 0, slice(None))["training"]
    for name in changes:
        assert np.abs(rows[name] - rows["right"]).max() > 1e-2, name


# ---- right files are proven


def assert_proven(report):
    """Nothing is missed; on so short a training, rounding may hide whether the engine rounds activations, and nothing else."""
    assert (report.status, report.failed_checks()) == ("proven", [])
    assert set(report.undecided_checks()) <= {"engine.activation_ratio", "packed.activation_ratio"}


def show(name, report):
    distance = report.measurements["engine against emulation"]["mean_kl"]
    missed = ", ".join(f"{c.name} {c.value:.1e} {c.op} {c.bound:.1e}" for c in report.checks if c.holds is False)
    print(f"{name}: {report.status}; KL {distance:.1e}; missed: {missed or 'nothing'}; {report.reason}")


@pytest.mark.parametrize("family", MAKERS)
def test_the_gate_proves_every_stock_architecture(family, trained, windows, tmp_path):
    report = export_gguf(trained(family), tmp_path / "out.gguf", "q2_0")
    assert report.architecture == family
    report = gate(trained(family), tmp_path / "out.gguf", windows)
    show(family, report)
    assert_proven(report)
    assert report.types["blk.1.ffn_down.weight"] == "q2_0"


@pytest.mark.parametrize(("kind", "embedding"), [("bf16", "bf16"), slow("f16", "f16"), slow("tq1_0", "f16"), slow("tq2_0", "f16")])
def test_the_gate_proves_every_type_that_llama_cpp_runs(kind, embedding, trained, windows, tmp_path):
    export_gguf(trained("llama"), tmp_path / "out.gguf", kind, embedding=embedding)
    report = gate(trained("llama"), tmp_path / "out.gguf", windows)
    show(kind, report)
    assert_proven(report)
    assert (report.types["blk.0.attn_q.weight"], report.types["output.weight"]) == (kind, embedding)


@pytest.mark.parametrize(
    ("family", "embedding"), [("llama", "q6_k"), slow("llama", "q8_0"), slow("llama", "q4_1"), slow("bitnet", "q4_1")]
)
def test_quantised_embeddings_are_proven_and_their_cost_is_told(family, embedding, trained, windows, tmp_path):
    export_gguf(trained(family), tmp_path / "out.gguf", "tq2_0", embedding=embedding)
    report = gate(trained(family), tmp_path / "out.gguf", windows)
    assert_proven(report)
    assert re.search(rf"{embedding} embeddings alone change perplexity by [+-][0-9.e-]+%$", report.reason)
    cost = report.measurements["embeddings against training"]["mean_kl"]
    assert {"q8_0": 1e-8, "q6_k": 1e-6, "q4_1": 1e-4}[embedding] < cost < {"q8_0": 1e-4, "q6_k": 1e-3, "q4_1": 0.1}[embedding]
    # Control: an emulation that leaves the head's input alone is farther from the engine.
    loose = {name: type(f)(**{**vars(f), "rounded_head": False}) for name, f in FORWARDS.items()}
    control = gate(trained(family), tmp_path / "out.gguf", windows, forwards=loose)
    distance = [r.measurements["engine against emulation"]["mean_kl"] for r in (report, control)]
    show(f"{family} {embedding}, costing KL {cost:.1e}", report)
    assert abs(distance[0]) < abs(distance[1])


# ---- wrong files fail


def rewrite(path, change):
    data = bytearray(path.read_bytes())
    change(data, read_gguf(path))
    path.write_bytes(data)


def rope_base(data, written):
    architecture = written.metadata["general.architecture"]
    at = data.index(f"{architecture}.rope.freq_base".encode()) + len(f"{architecture}.rope.freq_base") + 4
    data[at : at + 4] = struct.pack("<f", 100.0)


def drop_q_norm(data, written):
    for name, info in written.tensors.items():
        if name.endswith("attn_q_norm.weight"):
            data[info.offset : info.offset + info.nbytes] = np.ones(info.shape, "<f4").tobytes()


def head_is_embedding(data, written):
    head, embedding = written.tensors["output.weight"], written.tensors["token_embd.weight"]
    data[head.offset : head.offset + head.nbytes] = data[embedding.offset : embedding.offset + embedding.nbytes]


def swap_heads(data, written):
    """Put the rows of q and k into the order of the other kind of rotary positions."""
    for name, info in written.tensors.items():
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            rows = np.frombuffer(bytes(data[info.offset : info.offset + info.nbytes]), np.uint8)
            heads = 4 if "attn_q" in name else 2
            halves = rows.reshape(heads, 2, -1, info.nbytes // info.shape[0]).swapaxes(1, 2)
            data[info.offset : info.offset + info.nbytes] = halves.tobytes()


def pattern_of_windows(data, written):
    at = data.index(b"gemma3.attention.sliding_window") + len(b"gemma3.attention.sliding_window") + 4
    data[at : at + 4] = struct.pack("<I", 8)


DAMAGE = {
    "llama-rows": ("llama", swap_heads),
    "llama-rope": ("llama", rope_base),
    "llama-head": ("llama", head_is_embedding),
    "qwen3-rows": ("qwen3", swap_heads),
    "qwen3-rope": ("qwen3", rope_base),
    "qwen3-q-norm": ("qwen3", drop_q_norm),
    "gemma3-window": ("gemma3", pattern_of_windows),
}


@pytest.mark.parametrize("damage", [name if name in ("llama-rows", "qwen3-q-norm") else slow(name) for name in DAMAGE])
def test_a_wrong_file_fails_by_bytes_and_by_the_engine(damage, trained, windows, tmp_path):
    family, change = DAMAGE[damage]
    export_gguf(trained(family), tmp_path / "out.gguf", "q2_0")
    rewrite(tmp_path / "out.gguf", change)
    report = gate(trained(family), tmp_path / "out.gguf", windows)
    show(damage, report)
    assert report.status == "failed"
    assert {"bytes", "engine.mean_kl"} <= set(report.failed_checks())


EXPORTERS = {
    "llama-rows": ("llama", "rotary_heads", lambda config, name: 0),
    "llama-frequencies": ("llama", "llama3_factors", lambda rope, width: np.ones(width // 2, np.float32)),
    "qwen3-rope": ("qwen3", "rope_of", lambda config: {"rope_type": "default", "rope_theta": 100.0}),
}


@pytest.mark.parametrize("wrong", ["llama-rows", slow("llama-frequencies"), slow("qwen3-rope")])
def test_an_exporter_that_is_wrong_itself_fails_by_the_engine(wrong, trained, windows, tmp_path, monkeypatch):
    """Bytes agree with what the exporter thinks is right: only an engine sees it."""
    family, name, changed = EXPORTERS[wrong]
    monkeypatch.setattr(f"bitnet_arch.gguf.{'architectures' if name == 'rope_of' else 'plan'}.{name}", changed)
    export_gguf(trained(family), tmp_path / "out.gguf", "q2_0")
    report = gate(trained(family), tmp_path / "out.gguf", windows)
    show(wrong, report)
    assert report.status == "failed"
    assert "bytes" not in report.failed_checks()
    assert "engine.mean_kl" in report.failed_checks()


# ---- files that no engine here runs


def fails(path, tmp_path, directory, windows, at):
    """The report on a copy with one byte changed."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    (tmp_path / "bad.gguf").write_bytes(data)
    return run_gate(directory, tmp_path / "bad.gguf", None, windows, BOUNDS)


def test_i2_s_is_compared_without_an_engine(trained, windows, tmp_path):
    path = tmp_path / "out.gguf"
    export_gguf(trained("bitnet"), path, "i2_s")
    report = run_gate(trained("bitnet"), path, None, windows, BOUNDS)
    assert (report.status, report.failed_checks(), report.engine) == ("unproven", [], "")
    assert report.reason.startswith("llama.cpp does not run I2_S, which bitnet.cpp and the native engine load")
    assert {c.name: c.holds for c in report.checks} == dict.fromkeys(
        [
            "bytes",
            "layers.wrong_codes",
            "layers.output_error",
            "tokenizer",
            "packed.mean_kl",
            "packed.activation_ratio",
            "packed.greedy_margin",
        ],
        True,
    )
    info = read_gguf(path).tensors["blk.1.ffn_up.weight"]
    report = fails(path, tmp_path, trained("bitnet"), windows, info.offset + 17)
    assert (report.status, report.failed_checks()) == ("failed", ["bytes"])
    assert report.reason == "the file differs from its source in blk.1.ffn_up.weight"
    text = path.read_bytes()
    at = text.index(b"tokenizer.ggml.add_bos_token") + len(b"tokenizer.ggml.add_bos_token") + 4
    assert "bytes" in fails(path, tmp_path, trained("bitnet"), windows, at).failed_checks()
    engine = EngineInfo(lambda ids: np.zeros((len(ids), 512)), "none", "0", lambda text: [])
    with pytest.raises(UserError, match=r"cannot be compared with an engine: llama.cpp does not run I2_S"):
        run_gate(trained("bitnet"), path, engine, windows, BOUNDS)


def test_a_tokenizer_that_cannot_be_rebuilt_fails_without_an_engine(trained, windows, tmp_path, monkeypatch):
    """The exporter itself is wrong, so that bytes agree."""
    monkeypatch.setattr("bitnet_arch.gguf.tokenizer._byte_level_pre", lambda *_: "smollm")
    export_gguf(trained("bitnet"), tmp_path / "out.gguf", "i2_s")
    report = run_gate(trained("bitnet"), tmp_path / "out.gguf", None, windows, BOUNDS)
    assert (report.status, report.failed_checks()) == ("failed", ["tokenizer"])
    assert report.reason.startswith("the file cuts text into other tokens than the model's tokenizer")


FORMS = {
    "subln-rows": {"norm": "subln", "granularity": "row", "gain": "one"},
    "allnorm-groups-rotated": {"norm": "allnorm", "granularity": "group128", "rotation": True, "gain": "one"},
    "bitlinear": {"norm": "bitlinear", "gain": "one"},
}


@pytest.mark.parametrize(
    ("form", "stored"), [slow("subln-rows", "packed"), ("allnorm-groups-rotated", "packed"), slow("bitlinear", "master")]
)
def test_our_own_architecture_is_compared_without_an_engine(form, stored, windows, tmp_path):
    torch.manual_seed(0)
    model = convert_model(MAKERS["qwen3"]().float().eval(), ConversionConfig(**FORMS[form]))
    (save_master if stored == "master" else save_packed)(model, tmp_path / "m", tiny_tokenizer())
    path = tmp_path / "out.gguf"
    export_gguf(tmp_path / "m", path)
    assert "architecture 'wrinklefree'" in no_engine(path)
    report = run_gate(tmp_path / "m", path, None, windows, BOUNDS)
    assert (report.status, report.failed_checks(), report.details["layers"]) == ("unproven", [], 14)
    # What was compared layer by layer is what the whole model computes: its own layers, fake-quantised or packed.
    ids = torch.tensor(windows)[:, :-1]
    with open_weights(tmp_path / "m") as reader:
        stream = LayerStream(reader, {}, ids, {name: TRAINING[name] for name in ("training", "packed")})
        stream.run(1e-4)
        with torch.no_grad():
            expected = load_model(tmp_path / "m")(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1).numpy()
        name = "training" if stored == "master" else "packed"
        found = stream.logprobs([name], 0, slice(None))[name]
        assert np.abs(found - expected).max() < 1e-4
    info = read_gguf(path).tensors["blk.1.ffn_down.weight"]
    assert fails(path, tmp_path, tmp_path / "m", windows, info.offset + 30).failed_checks() == ["bytes"]


def test_packed_layers_of_our_own_form_are_judged(windows, tmp_path):
    """Control: packed layers that lose their activation quantisation are seen though no engine runs."""
    torch.manual_seed(0)
    save_master(
        convert_model(MAKERS["qwen3"]().float().eval(), ConversionConfig(**FORMS["bitlinear"])), tmp_path / "m", tiny_tokenizer()
    )
    export_gguf(tmp_path / "m", tmp_path / "out.gguf")
    forwards = FORWARDS | {"packed": FORWARDS["training without activation quantisation"]}
    report = run_gate(tmp_path / "m", tmp_path / "out.gguf", None, windows, BOUNDS, forwards=forwards)
    assert report.status == "failed"
    assert "layers.output_error" in report.failed_checks()


# ---- low-rank corrections


def corrected(rank, dtype, stored, directory):
    """A directory of an untrained model whose adapters are random, and matter."""
    torch.manual_seed(0)
    model = start_lrc(MAKERS["qwen2"]().float().eval(), rank, dtype)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, BitLinearLRC):
                module.lrc_u.normal_(0, 0.05)
    (save_master if stored == "master" else save_packed)(model, directory, tiny_tokenizer())
    return model


@pytest.mark.parametrize(
    ("rank", "dtype", "stored"), [slow(4, "float16", "packed"), (0.05, "float16", "master"), slow(4, "int8", "packed")]
)
def test_a_low_rank_correction_is_written_read_back_and_compared(rank, dtype, stored, windows, tmp_path):
    corrected(rank, dtype, stored, tmp_path / "m")
    path = tmp_path / "out.gguf"
    report = export_gguf(tmp_path / "m", path)
    assert (report.architecture, report.tensors["blk.0.attn_q.lrc_u"], report.tensors["blk.1.ffn_down.lrc_v"]) == (
        "wrinklefree",
        "f16",
        "f16",
    )
    written = read_gguf(path)
    k = 4 if rank == 4 else 13
    assert written.tensors["blk.1.ffn_down.lrc_v"].shape == (256, k)
    assert written.metadata["wrinklefree.lrc.rank"] == pytest.approx(rank)
    restored = from_gguf(path)
    assert (form_of(restored.config).lrc_rank, form_of(restored.config).lrc_dtype) == (rank, "float16")
    expected = load_model(tmp_path / "m")
    for (name, one), (_, two) in zip(expected.named_modules(), restored.named_modules(), strict=True):
        if isinstance(one, BitLinearLRC | PackedBitLinearLRC):
            assert isinstance(two, PackedBitLinearLRC), name
            for key in ("lrc_u", "lrc_v"):  # int8 adapters are what their codes stand for, in f16
                assert torch.equal(getattr(two, key).half(), as_stored(getattr(one, key).detach(), dtype).half()), (name, key)
    ids = torch.tensor(windows)[:, :-1]
    with torch.no_grad():
        found, right = (model(input_ids=ids, use_cache=False).logits for model in (restored, expected))
        for module in restored.modules():
            if isinstance(module, PackedBitLinearLRC):
                module.lrc_u.zero_()
        without = restored(input_ids=ids, use_cache=False).logits
    # Scales and embeddings are rounded to f16; leaving the correction out is another matter.
    assert (found - right).abs().max() < 0.05 * (without - right).abs().max()
    report = run_gate(tmp_path / "m", path, None, windows, BOUNDS)
    assert (report.status, report.failed_checks()) == ("unproven", [])
    at = written.tensors["blk.0.attn_v.lrc_u"].offset + 9
    report = fails(path, tmp_path, tmp_path / "m", windows, at)
    assert report.reason == "the file differs from its source in blk.0.attn_v.lrc_u"


def test_a_stock_architecture_refuses_a_correction_by_name(tmp_path):
    corrected(4, "float16", "packed", tmp_path / "m")
    with pytest.raises(UserError, match=r"has a low-rank correction \(LRC\), which no stock architecture holds"):
        export_gguf(tmp_path / "m", tmp_path / "out.gguf", architecture="qwen2")


def test_a_correction_gives_back_the_same_file(tmp_path):
    corrected(4, "float16", "packed", tmp_path / "m")
    export_gguf(tmp_path / "m", tmp_path / "one.gguf")
    save_packed(from_gguf(tmp_path / "one.gguf"), tmp_path / "again", tiny_tokenizer())
    export_gguf(tmp_path / "again", tmp_path / "two.gguf")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()
    assert any(isinstance(module, PackedBitLinear) for module in from_gguf(tmp_path / "two.gguf").modules())


# ---- the native engine


def native_gate(directory, path, windows, **options):
    return run_gate(directory, path, native_engine(path, LENGTH), windows, BOUNDS, **options)


def show_native(name, report):
    off = report.measurements["activation quantisation off"]["mean_kl"]
    print(f"{name}: KL {report.measurements['native against the file']['mean_kl']:.1e} of {off:.1e}; {report.failed_checks()}")


@pytest.mark.parametrize("family", MAKERS)
def test_the_native_engine_computes_every_stock_architecture(family, trained, windows, tmp_path):
    export_gguf(trained(family), tmp_path / "out.gguf", "q2_0")
    report = native_gate(trained(family), tmp_path / "out.gguf", windows)
    show_native(family, report)
    assert set(report.undecided_checks()) <= {"native.activation_ratio", "packed.activation_ratio"}
    if report.failed_checks() == ["native.mean_kl"]:
        # On some processors an activation of gemma3 lies where torch's float32 sums round it to another code than float64: with so
        # few positions that is more than the mean may be off, and far less than all codes are.
        found = report.measurements
        assert found["native against the file"]["mean_kl"] < 0.2 * found["activation quantisation off"]["mean_kl"]
        return
    assert (report.status, report.failed_checks()) == ("unproven", [])
    assert report.reason.startswith("llama.cpp could run the file and has not")


def test_i2_s_is_proven_by_the_native_engine(trained, windows, tmp_path):
    export_gguf(trained("bitnet"), tmp_path / "out.gguf", "i2_s")
    report = native_gate(trained("bitnet"), tmp_path / "out.gguf", windows)
    assert (report.status, report.failed_checks(), report.engine) == ("proven", [], "native (bitnet_kernels)")
    assert report.measurements["file against training"]["mean_kl"] < 1e-6  # its scales are float32: embeddings alone are rounded


ODD = SHAPE | {"hidden_size": 96, "intermediate_size": 224, "num_attention_heads": 6}
"""Rows that no block of 256, 128 or 64 divides, and vectors that no register's width does."""
ODD_MAKERS = {
    "bitnet-relu2": lambda: BitNetForCausalLM(BitNetConfig(**ODD, hidden_act="relu2", tie_word_embeddings=True)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**ODD, attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**ODD, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**ODD, head_dim=20)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**ODD | GEMMA_LAYERS, head_dim=20, query_pre_attn_scalar=20, final_logit_softcapping=5.0)
    ),
}
ODD_FORMS = FORMS | {
    "none": {"norm": "none"},
    "subln-rotated": {"norm": "subln", "rotation": True, "gain": "one"},
    "none-groups": {"norm": "none", "granularity": "group128"},
}


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Makes the directory of a briefly trained model of our own architecture, by family and form, and its file."""
    made = {}

    def make(family, form):
        if (family, form) not in made:
            torch.manual_seed(0)
            config = ConversionConfig(**ODD_FORMS[form])
            model = convert_model(ODD_MAKERS[family]().float().eval(), config)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "norm" in name or name.endswith("bias"):
                        parameter.add_(0.3 * torch.randn_like(parameter))
            folder = tmp_path_factory.mktemp(family)
            save_master(train_tiny(model, steps=20, rows=4), folder / "m", tiny_tokenizer())
            export_gguf(folder / "m", folder / "out.gguf", architecture="wrinklefree")
            made[family, form] = folder
        return made[family, form]

    return make


@pytest.mark.parametrize(
    ("family", "form"),
    [
        ("bitnet-relu2", "none"),
        ("qwen3", "allnorm-groups-rotated"),
        ("gemma3", "bitlinear"),
        *(slow(family, form) for family in ("llama", "qwen2", "qwen3", "gemma3") for form in ODD_FORMS),
    ],
)
def test_the_native_engine_proves_our_own_architecture(family, form, odd, windows):
    folder = odd(family, form)
    report = native_gate(folder / "m", folder / "out.gguf", windows)
    show_native(f"{family} {form}", report)
    assert (report.status, report.failed_checks(), report.engine) == ("proven", [], "native (bitnet_kernels)")
    assert set(report.undecided_checks()) <= {"native.activation_ratio", "packed.activation_ratio"}


def doubled_scale(data, written):
    info = written.tensors["blk.1.ffn_down.weight"]
    blocks = np.frombuffer(bytes(data[info.offset : info.offset + info.nbytes]), np.uint8).copy()
    values = blocks.view("<f2")
    data[info.offset : info.offset + info.nbytes] = (values * np.float16(2)).tobytes()


def swapped_matrices(data, written):
    one, other = written.tensors["blk.0.ffn_gate.weight"], written.tensors["blk.0.ffn_up.weight"]
    first, second = (bytes(data[i.offset : i.offset + i.nbytes]) for i in (one, other))
    data[one.offset : one.offset + one.nbytes], data[other.offset : other.offset + other.nbytes] = second, first


def norm_left_out(data, written):
    info = written.tensors["blk.1.attn_norm.weight"]
    data[info.offset : info.offset + info.nbytes] = np.ones(info.shape, "<f4").tobytes()


def other_rope_base(data, written):
    at = data.index(b"wrinklefree.rope.freq_base") + len(b"wrinklefree.rope.freq_base") + 4
    data[at : at + 4] = struct.pack("<f", 100.0)


@pytest.mark.parametrize("change", [doubled_scale, swapped_matrices, norm_left_out, other_rope_base], ids=lambda f: f.__name__)
def test_a_wrong_file_of_our_own_fails_by_bytes_and_by_the_native_engine(change, odd, windows, tmp_path):
    folder = odd("bitnet-relu2", "none")
    path = tmp_path / "wrong.gguf"
    path.write_bytes((folder / "out.gguf").read_bytes())
    rewrite(path, change)
    report = native_gate(folder / "m", path, windows)
    show_native(change.__name__, report)
    assert report.status == "failed"
    assert {"bytes", "native.mean_kl", "native.training_mean_kl"} <= set(report.failed_checks())


def test_an_exporter_that_is_wrong_itself_fails_by_the_native_engine(odd, windows, tmp_path, monkeypatch):
    folder = odd("qwen3", "allnorm-groups-rotated")
    wrong = {"rope_type": "default", "rope_theta": 100.0}
    monkeypatch.setattr("bitnet_arch.gguf.architectures.rope_of", lambda config: wrong)
    export_gguf(folder / "m", tmp_path / "out.gguf")
    report = native_gate(folder / "m", tmp_path / "out.gguf", windows)
    show_native("rope", report)
    assert "bytes" not in report.failed_checks()
    assert "native.mean_kl" in report.failed_checks()


@pytest.mark.parametrize(("dtype", "stored"), [("float16", "master"), slow("int8", "packed")])
def test_a_low_rank_correction_is_proven_by_the_native_engine(dtype, stored, windows, tmp_path):
    corrected(4, dtype, stored, tmp_path / "m")
    export_gguf(tmp_path / "m", tmp_path / "out.gguf")
    report = native_gate(tmp_path / "m", tmp_path / "out.gguf", windows)
    show_native(f"low rank, {dtype}", report)
    assert (report.status, report.failed_checks()) == ("proven", [])
