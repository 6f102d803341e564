"""The command line: results, mistakes, and a quick --help."""

import json
import os
import subprocess
import sys

import pytest
from bitnet_arch import save_master
from bitnet_arch.diffusion import add_mask_token
from bitnet_arch.gguf import export_gguf
from bitnet_arch.testing import tiny_bitnet, tiny_tokenizer
from wrinklefree_eval import texts
from wrinklefree_eval.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    save_master(tiny_bitnet(hidden=64, ffn=64, layers=1), folder / "model", tiny_tokenizer())
    export_gguf(folder / "model", folder / "model.gguf")
    weights = (folder / "model" / "model.safetensors").read_bytes()
    damaged = folder / "damaged"
    damaged.mkdir()
    for file in (folder / "model").iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    (damaged / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    (folder / "damaged.gguf").write_bytes((folder / "model.gguf").read_bytes()[:5000])
    (folder / "junk.gguf").write_text("hello")
    return folder


@pytest.fixture(autouse=True)
def short_texts(monkeypatch):
    documents = [{"text": "A short text.", "domain": "prose"}, {"text": "def f(): pass", "domain": "code"}]
    monkeypatch.setattr(texts, "heldout_documents", lambda: documents)


@pytest.mark.parametrize("name", ["model", "model.gguf"])
def test_both_tasks_run_and_leave_a_card_and_json(name, folder, tmp_path, capsys):
    assert main([str(folder / name), "--limit", "3", "--out", str(tmp_path), "--json"]) == 0
    captured = capsys.readouterr()
    printed = json.loads(captured.out)
    assert printed == json.loads((tmp_path / "results.json").read_text())
    assert set(printed["tasks"]) == {"perplexity", "sst2_local"}
    assert (printed["tasks"]["perplexity"]["n"], printed["tasks"]["sst2_local"]["n"]) == (2, 3)
    assert printed["command"].startswith("python -m wrinklefree_eval ")
    assert "it/s" in captured.err  # progress
    card = (tmp_path / "card.md").read_text()
    assert "sst2_local (stand-in)" in card
    assert "| sst2 " not in card


def test_without_json_the_card_is_printed(folder, capsys):
    assert main([str(folder / "model"), "--tasks", "perplexity"]) == 0
    assert capsys.readouterr().out.startswith("# Evaluation of model\n")


def mistakes():
    yield "missing", ["nowhere"], "does not exist"
    yield "no model", ["."], "no config.json"
    yield "damaged weights", ["damaged"], "truncated or damaged"
    yield "no GGUF", ["junk.gguf"], "not a usable GGUF file"
    yield "damaged GGUF", ["damaged.gguf"], "not a usable GGUF file"
    yield "no task", ["model", "--tasks", ","], "no task is named"
    yield "unknown task", ["model", "--tasks", "perplexity,sst2_locl"], "there is no task 'sst2_locl'"
    yield "limit", ["model", "--limit", "0"], "--limit is 0"
    yield "context", ["model", "--context", "5000"], "takes from 2 to 511"
    yield "context, engine", ["model.gguf", "--context", "5000"], "takes from 2 to 511"
    yield "out", ["model", "--out", "junk.gguf/out"], "cannot be written"


@pytest.mark.parametrize(("arguments", "words"), [m[1:] for m in mistakes()], ids=[m[0] for m in mistakes()])
def test_a_mistake_is_one_sentence(arguments, words, folder, capfd, monkeypatch):
    monkeypatch.chdir(folder)
    assert main(arguments) == 2
    captured = capfd.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err
    assert captured.out == ""


def test_an_interruption_is_75_and_writes_nothing(folder, tmp_path, monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(texts, "heldout_documents", interrupted)
    assert main([str(folder / "model"), "--tasks", "perplexity", "--out", str(tmp_path)]) == 75
    assert list(tmp_path.iterdir()) == []
    assert "interrupted" in capsys.readouterr().err


def test_help_does_not_wait_for_pytorch():
    code = (
        "import sys; from wrinklefree_eval.cli import main\n"
        "try: main(['--help'])\n"
        "finally: print(sorted(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "sst2_local" in done.stdout
    loaded = done.stderr
    assert "'wrinklefree_eval.cli'" in loaded
    for module in ("torch", "lm_eval", "scattertext", "data_handler"):
        assert f"'{module}'" not in loaded


@pytest.mark.slow
def test_a_real_task_without_a_hub_is_one_sentence(folder, tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "wrinklefree_eval", str(folder / "model"), "--tasks", "sst2"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr.startswith("error: the data of task 'sst2' could not be loaded (")
    assert done.stderr.count("\n") == 1


def test_a_diffusion_models_likelihood_is_not_reported_as_one(tmp_path, capsys):
    model, tokenizer = tiny_bitnet(hidden=64, ffn=64, layers=1), tiny_tokenizer()
    add_mask_token(model, tokenizer, block_size=4, token_shift=True)
    save_master(model, tmp_path / "model", tokenizer)
    assert main([str(tmp_path / "model"), "--tasks", "perplexity"]) == 2
    assert "known only up to a bound" in capsys.readouterr().err
