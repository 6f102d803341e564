"""`export`: a file takes its name only when it is proven, and what it says about itself."""

import atexit
import copy
import gc
import json
import shutil
import subprocess
import sys
import typing

import numpy as np
import pytest
from bitnet_arch import ConversionConfig, UserError, convert_model, open_weights, save_master, save_packed
from bitnet_arch.diffusion import add_mask_token
from bitnet_arch.gguf import ARCHITECTURES, EMBEDDING_TYPES, export_gguf, read_gguf
from bitnet_arch.parity import ParityError
from bitnet_arch.parity.proof import proof_status
from bitnet_arch.testing import tiny_bitnet, tiny_llama, tiny_tokenizer, train_tiny
from bitnet_kernels import Engine
from transformers import AutoModelForCausalLM, BitNetConfig, LlamaConfig, Qwen2Config, Qwen3Config
from wrinklefree_inference import export, generate
from wrinklefree_inference.cli import main
from wrinklefree_inference.export import default_positions, export_proven, probe_windows, tensors_by_type
from wrinklefree_inference.llamacpp import EngineError, LlamaCpp

SHAPE = {"hidden": 64, "ffn": 128, "layers": 2}


@pytest.fixture(scope="module")
def model():
    return train_tiny(tiny_bitnet(**SHAPE), steps=60)


@pytest.fixture(scope="module")
def directory(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "m"
    save_master(model, path, tiny_tokenizer())
    return path


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_process_that_ends_with_the_command_leaves_out_its_last_collection_and_a_call_does_not(monkeypatch):
    at_exit = []
    monkeypatch.setattr(atexit, "register", at_exit.append)
    monkeypatch.setattr(sys, "argv", ["wrinklefree_inference", "--help"])
    with pytest.raises(SystemExit):
        main(["--help"])
    assert at_exit == []
    with pytest.raises(SystemExit):
        main()
    assert at_exit == [gc.freeze]


def test_the_command_proves_a_model_on_1000_positions(directory, tmp_path, capsys):
    assert main(["export", str(directory), "--out", str(tmp_path / "model.gguf"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    sidecar = json.loads((tmp_path / "model.gguf.parity.json").read_text())
    assert names(tmp_path) == ["model.gguf", "model.gguf.parity.json"]
    assert (sidecar["status"], sidecar["positions"]) == ("proven", 1000)
    # So little trained, the model may show no effect of quantised activations above the noise of codes.
    assert sidecar["reason"] in ("", "rounding moves this model too far to decide engine.activation_ratio")
    assert printed["bytes"] == (tmp_path / "model.gguf").stat().st_size
    assert {k: v for k, v in printed.items() if k in sidecar} == sidecar
    assert all(check["holds"] is not False for check in sidecar["checks"])
    assert sidecar["types"]["blk.0.ffn_up.weight"] == "q2_0"
    assert next(check for check in sidecar["checks"] if check["name"] == "tokenizer")["holds"] is True
    metadata = read_gguf(tmp_path / "model.gguf").metadata
    assert metadata["wrinklefree.parity.status"] == "proven"
    assert metadata["wrinklefree.parity.engine"] == "native (bitnet_kernels) and llama.cpp (xllamacpp)"
    assert metadata["wrinklefree.parity.engine_positions"] == "1000 and 125"
    figures = {check["name"]: check["value"] for check in sidecar["checks"]}
    assert metadata["wrinklefree.parity.engine.mean_kl.value"] == figures["engine.mean_kl"] < 1e-4
    # The annotated file, not only the one that was compared, loads in the engine and holds the same tensors.
    export_gguf(directory, tmp_path / "plain.gguf")
    plain, proven = read_gguf(tmp_path / "plain.gguf"), read_gguf(tmp_path / "model.gguf")
    assert all(np.array_equal(plain.raw(name), proven.raw(name)) for name in plain.tensors)
    with LlamaCpp(tmp_path / "model.gguf") as engine:
        assert np.isfinite(engine.logprobs([5, 6, 7])).all()


def test_nothing_but_a_gguf_file_is_written_over(directory, tmp_path, capsys):
    kept = tmp_path / "thesis.tex"
    kept.write_text("precious")
    for out, message in ((kept, "is no GGUF file"), (directory / "model.safetensors", "lies in the model directory itself")):
        before = out.read_bytes()
        assert main(["export", str(directory), "--out", str(out), "--unproven"]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
        assert out.read_bytes() == before


def test_the_file_keeps_where_its_weights_come_from(model, tmp_path):
    save_master(model, tmp_path / "m", tiny_tokenizer(), provenance="a 4-bit copy")
    assert export_proven(tmp_path / "m", tmp_path / "out.gguf", positions=4).failed_checks() == []
    metadata = read_gguf(tmp_path / "out.gguf").metadata
    assert metadata["wrinklefree.provenance"] == "a 4-bit copy"
    assert metadata["wrinklefree.parity.tokenizer.value"] == metadata["wrinklefree.parity.tokenizer.bound"] == 0


def test_a_packed_directory_is_compared_with_its_own_matrices(model, tmp_path):
    save_packed(model, tmp_path / "p", tiny_tokenizer())
    report = export_proven(tmp_path / "p", tmp_path / "out.gguf", positions=40)
    assert report.failed_checks() == []
    assert report.status == "unproven"


def test_too_few_positions_are_not_called_a_proof(directory, tmp_path):
    stages = {}
    report = export_proven(directory, tmp_path / "out.gguf", "f16", 40, lambda stage, done, of: stages.update({stage: (done, of)}))
    assert (report.status, report.reason) == ("unproven", "only 40 positions were compared, and a proof needs 1000")
    assert read_gguf(tmp_path / "out.gguf").metadata["wrinklefree.parity.status"] == "unproven"
    assert set(stages) == {"writing", "bytes", "layers", "engine"}
    assert stages["engine"] == (40, 40)


def test_unproven_skips_the_engine_and_says_so(directory, tmp_path, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise AssertionError("the engine was started")

    monkeypatch.setattr(export, "LlamaCpp", refuse)
    assert main(["export", str(directory), "--out", str(tmp_path / "out.gguf"), "--unproven"]) == 0
    assert "unproven: the gate was skipped on request" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.gguf.parity.json").read_text())["status"] == "unproven"


def test_a_missed_bound_leaves_no_file_and_keeps_the_previous_one(directory, tmp_path, monkeypatch, capsys):
    def export_with_a_wrong_scale(source, out, *args, **options):
        report = export_gguf(source, out, *args, **options)
        info = read_gguf(out).tensors["blk.0.ffn_gate.weight"]
        blocks = np.memmap(out, np.uint8, "r+", info.offset, (info.nbytes // 18, 18))
        scales = blocks[:, :2].view(np.float16)
        scales[:] = (scales.astype(np.float32) * 1.01).astype(np.float16)
        return report

    monkeypatch.setattr(export, "export_gguf", export_with_a_wrong_scale)
    (tmp_path / "kept.gguf").write_bytes(b"GGUF previous")
    for name in ("new.gguf", "kept.gguf"):
        assert main(["export", str(directory), "--out", str(tmp_path / name), "--positions", "40"]) == 1
        captured = capsys.readouterr()
        assert captured.err.startswith(
            f"error: {name} was not written: the file differs from its source in blk.0.ffn_gate.weight ("
        )
        assert captured.err.count("\n") == 1
    assert names(tmp_path) == ["kept.gguf"]
    assert (tmp_path / "kept.gguf").read_bytes() == b"GGUF previous"
    with pytest.raises(ParityError) as caught:
        export_proven(directory, tmp_path / "new.gguf", positions=40)
    assert caught.value.report.failed_checks()[0] == "bytes"


def test_an_engine_that_dies_is_a_missed_proof(directory, tmp_path, monkeypatch):
    class Dying(LlamaCpp):
        def logprobs(self, ids):
            self._process.kill()
            self._process.wait()
            return super().logprobs(ids)

    monkeypatch.setattr(export, "LlamaCpp", Dying)
    with pytest.raises(ParityError, match=r"out\.gguf was not written: llama\.cpp does not answer \(it has stopped\)"):
        export_proven(directory, tmp_path / "out.gguf", positions=4)
    assert names(tmp_path) == []


def test_an_engine_refuses_a_damaged_file(directory, tmp_path):
    export_gguf(directory, tmp_path / "out.gguf")
    (tmp_path / "out.gguf").write_bytes((tmp_path / "out.gguf").read_bytes()[:5000])
    with pytest.raises(EngineError, match=r"could not load .*out\.gguf"):
        LlamaCpp(tmp_path / "out.gguf")


def test_an_interrupt_leaves_nothing(directory, tmp_path, monkeypatch, capsys):
    engines = []

    class Seen(LlamaCpp):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            engines.append(self)

        def logprobs(self, ids):
            super().logprobs(ids[:2])
            raise KeyboardInterrupt

    monkeypatch.setattr(export, "LlamaCpp", Seen)
    assert main(["export", str(directory), "--out", str(tmp_path / "out.gguf"), "--positions", "20"]) == 75
    assert "interrupted" in capsys.readouterr().err
    assert names(tmp_path) == []
    assert engines[0]._process.poll() is not None


def test_a_full_disk_leaves_nothing(directory, tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "annotate_gguf", full)
    assert main(["export", str(directory), "--out", str(tmp_path / "out.gguf"), "--unproven"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert names(tmp_path) == []


@pytest.mark.parametrize("limit", [1000, 40_000, 60_000])
def test_a_disk_that_fills_up_while_a_file_is_written_is_told_of(limit, directory, tmp_path):
    """The limit of a file's size stands for the disk: the kernel refuses what is beyond it, in the middle of a tensor."""
    code = (
        "import resource, sys; from wrinklefree_inference.cli import main\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    out = tmp_path / "out.gguf"
    command = [sys.executable, "-c", code, "export", str(directory), "--out", str(out), "--unproven"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"error: writing {out} failed (File too large): free some space or choose another output\n"
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{m}", "--type", "tq2_0"], "has rows of 64, but TQ2_0 needs a multiple of 256"),
        (["{m}", "--positions", "0"], "--positions must be at least 1, not 0"),
        (["{m}", "--positions", "9", "--unproven"], "--positions has no effect with --unproven"),
        (["{m}", "--engine", "native", "--unproven"], "--engine has no effect with --unproven"),
        (["{untied}", "--engine", "llama.cpp"], "llama.cpp does not run the architecture 'wrinklefree'"),
        (["{m}", "--engine", "llama.cpp", "--type", "i2_s"], "llama.cpp does not run I2_S"),
        (["{m}/none"], "is not a model directory"),
        (["{untied}", "--architecture", "bitnet"], "untied head"),
        (["{untied}", "--architecture", "llama"], "is a 'bitnet', which cannot be written as 'llama'"),
        (["{float}"], "is not ternary"),
        (["{m}", "--embedding", "q6_k"], "token_embd.weight has rows of 64, which Q6_K cannot have"),
        (["{m}", "--type", "i2_s"], "has rows of 64, but I2_S needs a multiple of 128"),
    ],
    ids=[
        "width",
        "positions",
        "no-effect",
        "engine-no-effect",
        "engine",
        "engine-i2_s",
        "missing",
        "untied",
        "architecture",
        "float",
        "embedding",
        "i2_s",
    ],
)
def test_mistakes_end_in_one_sentence(arguments, words, directory, tmp_path, capsys):
    places = {"m": directory, "untied": tmp_path / "u", "float": tmp_path / "f"}
    save_master(convert_model(tiny_llama(tied=False, **SHAPE), ConversionConfig(gain="one")), places["untied"], tiny_tokenizer())
    save_master(tiny_llama(**SHAPE), places["float"], tiny_tokenizer())
    given = [argument.format(**places) for argument in arguments]
    assert main(["export", *given, "--out", str(tmp_path / "out.gguf")]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err
    assert names(tmp_path) == ["f", "u"]


@pytest.mark.parametrize("engine", ["none", "native"])
def test_a_model_that_llama_cpp_does_not_run_is_compared_with_the_native_engine_if_there_is_one(
    engine, tmp_path, monkeypatch, capsys
):
    """Without it bytes, tokens, layers and the packed model are compared all the same, and the report says what lacks."""

    def refuse(*args, **kwargs):
        raise AssertionError("the engine was started")

    monkeypatch.setattr(export, "LlamaCpp", refuse)
    if engine == "none":
        monkeypatch.setattr(export, "has_native_engine", lambda: False)
    save_master(convert_model(tiny_llama(tied=False, **SHAPE), ConversionConfig(gain="one")), tmp_path / "m", tiny_tokenizer())
    assert main(["export", str(tmp_path / "m"), "--out", str(tmp_path / "out.gguf"), "--positions", "40"]) == 0
    printed = capsys.readouterr().out
    reason = {
        "none": "bitnet-kernels, whose engine runs such files, is not installed, and llama.cpp does not run the architecture",
        "native": "only 40 positions were compared, and a proof needs 1000",
    }
    assert f"unproven: {reason[engine]}" in printed
    sidecar = json.loads((tmp_path / "out.gguf.parity.json").read_text())
    assert {check["name"] for check in sidecar["checks"]} >= {"bytes", "tokenizer", "layers.output_error", "packed.mean_kl"}
    assert all(check["holds"] is not False for check in sidecar["checks"])
    written = read_gguf(tmp_path / "out.gguf").metadata
    assert (written["general.architecture"], written["wrinklefree.parity.status"]) == ("wrinklefree", "unproven")
    assert sidecar["engine"] == {"none": "", "native": "native (bitnet_kernels)"}[engine]
    assert any(check["name"] == "native.mean_kl" for check in sidecar["checks"]) == (engine == "native")


def test_the_native_engine_proves_what_llama_cpp_does_not_run(tmp_path):
    model = convert_model(tiny_llama(tied=False, **SHAPE), ConversionConfig(gain="one"))
    save_master(train_tiny(model, steps=10, rows=2), tmp_path / "m", tiny_tokenizer())
    report = export_proven(tmp_path / "m", tmp_path / "out.gguf")
    assert (report.status, report.engine, report.positions) == ("proven", "native (bitnet_kernels)", 1000)
    assert proof_status(tmp_path / "out.gguf") == ("proven", report.reason)
    assert read_gguf(tmp_path / "out.gguf").metadata["wrinklefree.parity.engine"] == "native (bitnet_kernels)"


def test_a_diffusion_models_file_is_unproven_though_causal_attention_agrees(tmp_path):
    model, tokenizer = tiny_bitnet(**SHAPE), tiny_tokenizer()
    add_mask_token(model, tokenizer, block_size=4, token_shift=True)
    save_master(model, tmp_path / "m", tokenizer)
    report = export_proven(tmp_path / "m", tmp_path / "out.gguf")
    assert (report.status, report.failed_checks(), report.positions) == ("unproven", [], 1000)
    assert report.reason == "attention in both directions, which diffusion decodes with, was not compared"
    assert any(check.name == "native.mean_kl" and check.holds for check in report.checks)


def test_auto_takes_both_engines_and_a_choice_takes_one(directory, tmp_path, monkeypatch):
    asked = []

    class Counted(LlamaCpp):
        def logprobs(self, ids):
            asked.append(len(ids))
            return super().logprobs(ids)

    monkeypatch.setattr(export, "LlamaCpp", Counted)
    found = {}
    for engine, positions in (("auto", 1000), ("native", 1000), ("llama.cpp", 40)):
        report = export_proven(directory, tmp_path / "out.gguf", positions=positions, engine=engine)
        found[engine] = report.status, report.engine, list(asked)
        asked.clear()
    assert found["auto"] == ("proven", "native (bitnet_kernels) and llama.cpp (xllamacpp)", [125])
    assert found["native"] == ("unproven", "native (bitnet_kernels)", [])
    assert found["llama.cpp"] == ("unproven", "llama.cpp (xllamacpp)", [40])


def test_a_file_that_the_native_engine_refuses_is_a_missed_proof(directory, tmp_path, monkeypatch):
    def refuse(path, context):
        raise ValueError(f"{path}: the key x is no number")

    monkeypatch.setattr(export, "native_engine", refuse)
    with pytest.raises(ParityError, match=r"the native engine does not run it \(the key x is no number\); --engine") as caught:
        export_proven(directory, tmp_path / "out.gguf", positions=4)
    assert caught.value.report.engine == "native (bitnet_kernels)"
    assert export_proven(directory, tmp_path / "out.gguf", positions=4, engine="llama.cpp").failed_checks() == []
    with pytest.raises(ParityError, match=r"the native engine does not run it \(the key x is no number\)$"):
        export_proven(directory, tmp_path / "out.gguf", positions=4, architecture="wrinklefree")


@pytest.mark.parametrize("architecture", ["auto", "wrinklefree"])
@pytest.mark.parametrize("trouble", ["not finite", "memory"])
def test_a_native_engine_that_stops_is_a_missed_proof_under_its_name(trouble, architecture, model, tmp_path, monkeypatch, capsys):
    loud = copy.deepcopy(model)
    if trouble == "memory":
        why = "there is not enough memory"
        advice = "; --engine llama.cpp leaves that out" if architecture == "auto" else ""

        def fail(*args, **options):
            raise MemoryError

        monkeypatch.setattr(Engine, "step", fail)
    else:
        why, advice = "what the head reads is not finite: the file's numbers are damaged or too large", ""
        loud.model.norm.weight.data.fill_(3e38)  # a finite number, and what comes of it is none
    save_master(loud, tmp_path / "m", tiny_tokenizer())
    arguments = ["--out", str(tmp_path / "out.gguf"), "--architecture", architecture, "--positions", "4", "--json"]
    assert main(["export", str(tmp_path / "m"), *arguments]) == 1
    printed = capsys.readouterr()
    reason = f"out.gguf was not written: the native engine stopped ({why}){advice}"
    assert printed.err == f"error: {reason}\n"
    report = json.loads(printed.out)
    assert (report["status"], report["engine"], report["reason"]) == ("failed", "native (bitnet_kernels)", reason)
    assert names(tmp_path) == ["m"]


def test_what_was_asked_for_is_in_the_file_and_in_the_report(directory, tmp_path, capsys):
    words = ["--type", "f16", "--embedding", "q8_0", "--architecture", "bitnet", "--positions", "40"]
    assert main(["export", str(directory), "--out", str(tmp_path / "out.gguf"), *words]) == 0
    printed = capsys.readouterr().out
    assert "  q8_0   token_embd\n" in printed
    assert "  f16    blk.*.attn_q (2), blk.*.attn_k (2)" in printed
    written = read_gguf(tmp_path / "out.gguf")
    assert (written.tensors["token_embd.weight"].ggml_id, written.metadata["general.architecture"]) == (8, "bitnet")
    assert main(["export", str(directory), "--out", str(tmp_path / "own.gguf"), "--unproven", "--architecture", "wrinklefree"]) == 0
    assert read_gguf(tmp_path / "own.gguf").metadata["general.architecture"] == "wrinklefree"


def test_wf_offers_the_same_choices():
    cli = pytest.importorskip("wf_deployer.cli")
    hints = typing.get_type_hints(cli.export)
    names = ("gguf_type", "architecture", "embedding", "engine")
    offered = {name: set(typing.get_args(typing.get_args(hints[name])[0])) for name in names}
    assert offered == {
        "gguf_type": set(export.KINDS),
        "architecture": set(ARCHITECTURES),
        "embedding": set(EMBEDDING_TYPES),
        "engine": set(export.ENGINES),
    }
    assert set(typing.get_args(typing.get_args(typing.get_type_hints(cli.generate)["engine"])[0])) == set(generate.ENGINES)


def test_tensors_are_summed_up_by_what_they_became():
    types = {
        "token_embd.weight": "f16",
        "blk.0.attn_q.weight": "tq2_0",
        "blk.1.attn_q.weight": "q2_0",
        "blk.1.attn_k.weight": "q2_0",
    }
    assert tensors_by_type(types) == {
        "f16": ["token_embd"],
        "tq2_0": ["blk.*.attn_q (1)"],
        "q2_0": ["blk.*.attn_q (1)", "blk.*.attn_k (1)"],
    }


# What the presets of training become: their families, with what of a released model's configuration decides.
LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE = LLAMA3 | {"rope_theta": 5e5, "original_max_position_embeddings": 64}
SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 0,
    "bos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": True,
}
PRESETS = {
    "smollm2_135m": (LlamaConfig(**SIZES), "subln", "bitnet"),
    "qwen2_0.5b": (Qwen2Config(**SIZES), "none", "qwen2"),
    "qwen3_0.6b": (Qwen3Config(**SIZES, head_dim=32), "none", "qwen3"),
    "llama_1b": (LlamaConfig(**SIZES, rope_parameters=ROPE), "subln", "wrinklefree"),
    "llama_1b, model.norm=none": (LlamaConfig(**SIZES, rope_parameters=ROPE), "none", "llama"),
    "bitnet_2b": (BitNetConfig(**SIZES, hidden_act="relu2"), "none", "wrinklefree"),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_which_presets_can_be_proven(preset, tmp_path):
    config, norm, architecture = PRESETS[preset]
    model = AutoModelForCausalLM.from_config(config).float().eval()
    conversion = ConversionConfig(norm="none") if norm == "none" else ConversionConfig(norm=norm, gain="one")
    model = train_tiny(convert_model(model, conversion), steps=5, rows=2)
    save_master(model, tmp_path / "m", tiny_tokenizer())
    report = export_proven(tmp_path / "m", tmp_path / "out.gguf", positions=8)
    assert read_gguf(tmp_path / "out.gguf").metadata["general.architecture"] == architecture
    assert (report.status, report.failed_checks()) == ("unproven", [])
    assert report.reason.startswith("only 8 positions were compared")
    assert ("llama.cpp" in report.engine) == (architecture != "wrinklefree")


def test_a_directory_as_output_is_refused(directory, tmp_path):
    with pytest.raises(UserError, match="is a directory"):
        export_proven(directory, tmp_path, positions=4)


def test_probe_windows_cover_what_is_asked_for_and_large_models_take_64(directory, tmp_path):
    with open_weights(directory) as reader:
        assert default_positions(reader) == 1000
        windows = probe_windows(reader, 1000)
        assert [len(window) for window in windows] == [126] * 8
        assert len({tuple(window) for window in windows}) == 8
        assert probe_windows(reader, 1000) == windows
        assert [len(window) for window in probe_windows(reader, 64)] == [65]
    shutil.copytree(directory, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 12}))
    with open_weights(tmp_path / "m") as reader:
        assert {len(window) for window in probe_windows(reader, 100)} == {11}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    with open_weights(tmp_path / "m") as reader, pytest.raises(UserError, match="tokens that the model does not have"):
        probe_windows(reader, 100)
