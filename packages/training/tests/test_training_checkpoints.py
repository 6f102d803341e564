"""What continues a run, and what is refused because it would be another one."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from wrinklefree import exporting, models
from wrinklefree.callbacks import metrics, newest_checkpoint, read_metrics
from wrinklefree.cli import main


@pytest.fixture(autouse=True)
def without_engine(monkeypatch):
    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda name: None)


@pytest.fixture
def own_corpus(corpus, tmp_path):
    """A copy of the corpus that a test may change."""
    return shutil.copytree(corpus, tmp_path / "texts")


@pytest.fixture
def short(overrides, corpus, own_corpus):
    """A run of one arm on `own_corpus`, with checkpoints at steps 3 and 6."""
    return [*(o.replace(str(corpus), str(own_corpus)) for o in overrides), "training.compare_fp=false"]


def run(overrides, *more):
    """Run to the end and forget that it ended: what a crash just before the summary leaves."""
    arguments = [*overrides, *more]
    assert main(arguments) == 0
    directory = Path(next(o for o in reversed(arguments) if o.startswith("output_dir=")).split("=", 1)[1])
    (directory / "summary.json").unlink()
    return directory


def weights(directory):
    return load_file(directory / "model" / "model.safetensors")


def assert_equal(one, two):
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def refusal(arguments, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1]


def test_changed_text_is_refused_and_no_tokenizer_is_trained_again(short, own_corpus, capsys, monkeypatch):
    directory = run(short)
    expected = weights(directory)
    changed = next(own_corpus.glob("salad-*.txt"))
    original = changed.read_text()
    changed.write_text(original + " zero zero")
    assert "was trained on other text" in refusal(short, capsys)
    changed.write_text(original)
    monkeypatch.setattr(models, "own_tokenizer", lambda *_: pytest.fail("the run has a tokenizer"))
    run(short)
    assert_equal(weights(directory), expected)


def test_going_back_sets_later_checkpoints_aside(short, capsys):
    directory = run(short)
    expected, checkpoints = weights(directory), directory / "checkpoints"
    later = (checkpoints / "step-6.ckpt").read_bytes()
    changed = [*short, f"resume={checkpoints / 'step-3.ckpt'}", "training.learning_rate=1e-4"]
    assert "training.learning_rate=0.002, and this run has training.learning_rate=0.0001" in refusal(changed, capsys)
    assert (checkpoints / "step-6.ckpt").read_bytes() == later
    run(short, f"resume={checkpoints / 'step-3.ckpt'}")
    assert (checkpoints / "superseded-1" / "step-6.ckpt").read_bytes() == later
    assert [line["step"] for line in read_metrics(directory / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert newest_checkpoint(checkpoints).name == "step-6.ckpt"
    assert_equal(weights(directory), expected)


def test_a_checkpoint_continues_in_another_directory_but_not_among_foreign_ones(short, tmp_path, capsys):
    first = run(short)
    checkpoint = first / "checkpoints" / "step-3.ckpt"
    other = tmp_path / "other"
    run(short, f"output_dir={other}", f"resume={checkpoint}")
    assert_equal(weights(other), weights(first))
    error = refusal([*short, f"output_dir={other}", f"resume={checkpoint}"], capsys)
    assert "holds checkpoints of its own run" in error


def test_settings_without_a_bearing_on_the_result_may_change(short):
    directory = run(short)
    expected = weights(directory)
    run(short, "training.keep_checkpoints=5", "training.checkpoint_every=2", "sample_prompt=zero")
    assert_equal(weights(directory), expected)


def test_relative_rates_are_those_of_the_start_when_a_run_continues(short, tmp_path):
    whole = run(short, "training.relative_learning_rate=true", "training.learning_rate=2e-2")
    again = run(
        short,
        "training.relative_learning_rate=true",
        "training.learning_rate=2e-2",
        f"output_dir={tmp_path / 'again'}",
        f"resume={whole / 'checkpoints' / 'step-3.ckpt'}",
    )
    assert_equal(weights(again), weights(whole))


DAMAGE = {
    "empty": lambda content: b"",
    "cut at the start": lambda content: content[:1000],
    "cut in the middle": lambda content: content[: len(content) // 2],
    "text": lambda content: b"not a checkpoint\n" * 100,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named(kind, short, capsys):
    directory = run(short)
    newest = newest_checkpoint(directory / "checkpoints")
    newest.write_bytes(DAMAGE[kind](newest.read_bytes()))
    error = refusal(short, capsys)
    assert f"{newest} is damaged or no checkpoint" in error
    assert "resume=PATH of an older one" in error
    # The remedy works.
    run(short, f"resume={directory / 'checkpoints' / 'step-3.ckpt'}")


def test_checkpoints_of_other_things_are_refused(short, tmp_path, capsys):
    torch.save({"weights": torch.ones(3)}, tmp_path / "step-1.ckpt")
    assert "is no checkpoint of this trainer" in refusal([*short, f"resume={tmp_path / 'step-1.ckpt'}"], capsys)
    directory = run(short, "training.compare_fp=true")
    twin = directory / "fp" / "checkpoints" / "step-3.ckpt"
    again = [*short, "training.compare_fp=true", f"output_dir={tmp_path / 'again'}", f"resume={twin}"]
    assert "is of the unquantised arm" in refusal(again, capsys)


def test_a_checkpoint_of_another_width_is_refused_where_no_setting_tells(short, tmp_path, capsys):
    """The same settings name a pretrained directory whose content has changed."""
    from bitnet_arch import save_master
    from bitnet_arch.testing import tiny_llama, tiny_tokenizer

    source = tmp_path / "llama"
    save_master(tiny_llama(hidden=64, ffn=128), source, tiny_tokenizer())
    arguments = [o for o in short if not o.startswith("model.")] + ["model=smollm2_135m", f"model.pretrained={source}"]
    run(arguments)
    shutil.rmtree(source)
    save_master(tiny_llama(hidden=128, ffn=128), source, tiny_tokenizer())
    assert "is of another model (its model." in refusal(arguments, capsys)


def test_a_full_disk_while_figures_are_written_is_one_sentence(short, monkeypatch, tmp_path, capsys):
    def point_to_a_full_device(path, text):
        path.symlink_to("/dev/full")

    with monkeypatch.context() as patch:
        patch.setattr(metrics, "write_text", point_to_a_full_device)
        error = refusal(short, capsys)
    assert "metrics.jsonl failed (No space left on device): free some space" in error
    # With space again, the same command starts over.
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert main(short) == 0
