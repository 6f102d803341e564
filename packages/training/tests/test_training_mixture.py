"""`scripts/mixture.py`: proxies of a real model end with a data configuration that trains."""

import json
import math
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from bitnet_arch import UserError
from data_handler import collate, load_config
from data_handler.mixture import InfluenceWeighted, Static, drive
from data_handler.mixture.offline import Found
from wrinklefree.cli import load_run_config
from wrinklefree.mixture import main, settings_of
from wrinklefree.objective import token_loss_sum
from wrinklefree.proxies import LanguageLearner, LearnerFactory, token_losses

SHAPE = (
    "hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 1, vocab_size: 280"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two domains: one that repeats itself, one of random letters."""
    path = tmp_path_factory.mktemp("mixture")
    generator = torch.Generator().manual_seed(0)
    letters = [chr(97 + int(i)) for i in torch.randint(0, 26, (12000,), generator=generator)]
    texts = {
        "plain": ["the cat sat on the mat " * (2 + i % 3) + str(i) for i in range(80)],
        "noise": ["".join(letters[i * 100 : i * 100 + 100]) for i in range(80)],
    }
    for name, documents in texts.items():
        (path / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in documents))
    return path


@pytest.fixture(scope="module")
def overrides(folder):
    sources = ", ".join(f"{{name: {n}, kind: jsonl, path: '{folder}/{n}.jsonl'}}" for n in ("plain", "noise"))
    return [
        f"model={{name: small, norm: none, shape: {{{SHAPE}}}}}".replace("model=", "++model="),
        f"++data={{sources: [{sources}], sequence_length: 32, heldout_share: 0.2, heldout_tokens: 512, packing: true}}",
        "training.max_steps=12",
        "training.rows_per_step=4",
        "training.learning_rate=0.01",
        "training.wandb=off",
    ]


@pytest.fixture(scope="module")
def factory(overrides, folder):
    config = load_run_config([*overrides, f"output_dir={folder}/run"])
    return LearnerFactory(config, target=[0.5, 0.5], quantized=False)


def test_token_losses_are_the_trainers(factory):
    learner = factory(0)
    batch = collate(learner.corpus.train[0].take(0, 2) + learner.corpus.train[1].take(0, 1))
    losses, counts = token_losses(learner.model, batch)
    total, count = token_loss_sum(learner.model(input_ids=batch["input_ids"]).logits, batch["labels"])
    assert counts.sum() == count
    assert math.isfinite(float(total.detach()))
    assert losses.shape == (3, 31)
    assert (losses[batch["labels"][:, 1:] == -100] == 0).all()


def test_learners_of_a_factory_are_the_same_run(factory):
    runs = []
    for _ in range(2):
        learner = factory(0)
        drive(learner, Static(learner.domains, weights=[1, 3]), 4, 4)
        runs.append((learner.validate(), learner.trained_tokens, learner.measured_tokens))
    assert runs[0] == runs[1]
    assert runs[0][1] == 4 * 4 * 32
    assert runs[0][0] != factory(0).validate()


def test_proxies_are_ternary_only_if_asked(factory):
    plain, ternary = factory(0), factory(0)
    assert plain.validate() == factory(0).validate()
    ternary = LanguageLearner(ternary.model, ternary.corpus, ternary.training, target=[0.5, 0.5], quantized=True)
    assert ternary.validate() != plain.validate()


def test_token_weights_of_zero_take_a_domain_out_of_the_step(factory):
    def stepped(rows, weights):
        learner = factory(0)
        learner.step(rows, weights, excess=False)
        return torch.cat([p.flatten() for p in learner.model.parameters()]).detach()

    alone = stepped([2, 0], None)
    assert stepped([2, 2], [1.0, 0.0]) == pytest.approx(alone, abs=1e-5)
    assert not torch.allclose(stepped([2, 2], None), alone, atol=1e-4)
    assert stepped([2, 2], [3.0, 3.0]) == pytest.approx(stepped([2, 2], None), abs=1e-6)


def test_the_excess_is_over_the_reference(factory):
    same = factory(0, reference=factory(0))
    assert same.step([2, 2], None, excess=True).excess == [0.0, 0.0]
    trained = factory(0)
    drive(trained, Static(trained.domains, weights=[1, 0.001]), 12, 4)
    result = factory(0, reference=trained).step([2, 2], None, excess=True)
    assert result.excess[0] > 1.0 > result.excess[1]
    assert result.tokens == [int(n) for n in result.tokens]
    assert factory(0).step([4, 0], None, excess=False).losses[1] != factory(0).step([4, 0], None, excess=False).losses[1]  # nan


def test_influence_is_the_first_order_gain_of_a_small_step(factory):
    learner = factory(0)
    influence = learner.influence()
    parameters = [p for p in learner.model.parameters() if p.requires_grad]
    before = learner.validate()
    losses, counts = token_losses(learner.model, collate(learner.corpus.train[0].take(0, 8)))
    gradients = torch.autograd.grad(losses.sum() / counts.sum(), parameters)
    rate = 1e-3
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter -= rate * gradient
    gained = [(a - b) / rate for a, b in zip(before, learner.validate(), strict=True)]
    assert influence[0] == pytest.approx(gained, rel=0.02, abs=2e-3)
    assert influence[0][0] > influence[1][0]


def test_the_domain_that_teaches_most_gains_weight(factory):
    learner = factory(0)
    run = drive(learner, InfluenceWeighted(learner.domains, every=3, floor=0.05), 12, 4)
    assert run.average[0] > 0.5


def command(method, overrides, *settings):
    return main([method, *overrides, *settings])


@pytest.mark.parametrize(
    ("method", "settings", "words"),
    [
        ("regmix", ["mixture.proxies=6", "mixture.target={plain: 1}"], ["rank_correlation", "6 "]),
        ("doremi", [], ["Cost: 3,072 tokens trained"]),
        ("odm", ["mixture.cap={noise: 0.4}"], ["Cost: 1,536 tokens trained, 0 measured"]),
        ("aioli", ["mixture.every=6", "mixture.probe_steps=1"], ["Cost: 1,536 tokens trained"]),
        ("influence", ["mixture.every=4", "mixture.floor=0.1"], ["Cost: 1,536 tokens trained"]),
    ],
)
def test_a_method_writes_a_configuration_that_loads(method, settings, words, overrides, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command(method, overrides, *settings) == 0
    written = Path("configs/data/mixed.yaml")
    config = load_config(str(written))
    weights = [source.weight for source in config.sources]
    assert sum(weights) == pytest.approx(1, abs=1e-4)
    assert config.sequence_length == 32
    assert [p.name for p in written.parent.iterdir()] == ["mixed.yaml"]
    text, shown = written.read_text(), capsys.readouterr().out
    assert f"# Weights found by {method} on proxies of model small" in text
    assert all(word in text for word in words[:1])
    assert "data=mixed" in shown
    # What `data=` takes: the same command composes with it.
    rest = [o for o in overrides if not o.startswith("++data")]
    assert [s.weight for s in load_run_config([*rest, "data=mixed"]).data.sources] == weights
    assert command(method, overrides, *settings) == 2  # it is not overwritten
    assert "exists: give another name" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["other place/my mix.yaml", "configs/data/mix.yaml"])
def test_what_comes_next_can_be_typed_as_it_is_printed(out, overrides, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = Found(weights=(0.25, 0.75), trained_tokens=1, measured_tokens=0)
    monkeypatch.setattr("wrinklefree.mixture.find", lambda *_: found)
    assert command("odm", overrides, f"mixture.out='{out}'") == 0
    *before, train = capsys.readouterr().out.partition("next:\n")[2].splitlines()
    assert len(before) == (Path(out).parent != Path("configs/data"))
    for line in before:
        subprocess.run(line, shell=True, check=True)
    *words, choice = shlex.split(train)
    assert words == ["uv", "run", "python", "scripts/train_lightning.py"]
    assert choice == f"data={Path(out).stem}"
    assert Path(f"configs/data/{Path(out).name}").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["magic"], "the first argument must be a method (aioli, doremi"),
        (["regmix", "mixture.proxy=3"], "regmix has no option mixture.proxy: its options are proxies"),
        (["regmix", "mixture.proxies=1"], "mixture.proxies must be a whole number of at least 2"),
        (["odm", "mixture.lr=3"], "no option 'lr'"),
        (["odm", "mixture.target={plain: 1}"], "mixture.target has no effect on odm"),
        (["aioli"], "needs the option every"),
        (["aioli", "mixture.every=2"], "steps of probing"),
        (["regmix", "mixture.target={x: 1}"], "names 'x', which is no domain"),
        (["doremi", "mixture.out=a.yml"], "must end in .yaml"),
        (["doremi", "mixture.out=[a"], "cannot be read"),
        (["doremi", "--fast"], "unknown option --fast"),
    ],
)
def test_a_mistake_is_one_sentence_and_ends_in_two(arguments, message, overrides, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*arguments[:1], *overrides, *arguments[1:]]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_values_are_yaml():
    own, rest = settings_of(["mixture.target={a: 1, b: 2}", "mixture.top=5", "data=demo"])
    assert own == {"target": {"a": 1, "b": 2}, "top": 5}
    assert rest == ["data=demo"]
    with pytest.raises(UserError, match="quote it"):
        settings_of(["mixture.target={a: 1"])


def test_a_stopped_regmix_goes_on(overrides, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    original, made = LearnerFactory.__call__, []

    def stopping(self, seed, *, reference=None):
        made.append(seed)
        if len(made) == 4:
            raise KeyboardInterrupt
        return original(self, seed, reference=reference)

    monkeypatch.setattr(LearnerFactory, "__call__", stopping)
    settings = ["mixture.proxies=6", "mixture.kind=linear"]
    assert command("regmix", overrides, *settings) == 75
    assert not Path("configs/data/mixed.yaml").exists()
    assert command("regmix", overrides, *settings) == 0
    assert len(made) == 7  # three, the one that was stopped, and the three that were missing
    stopped = load_config("configs/data/mixed.yaml")
    assert command("regmix", overrides, *settings, "mixture.out=configs/data/whole.yaml") == 0
    assert load_config("configs/data/whole.yaml") == stopped
    capsys.readouterr()


def test_the_script_explains_itself_and_shows_its_configuration(capsys, monkeypatch):
    assert main(["--help"]) == 0
    assert "mixture.out=FILE.yaml" in capsys.readouterr().out
    script = Path(__file__).parents[3] / "scripts" / "mixture.py"
    monkeypatch.setattr(sys, "argv", [str(script), "doremi", "mixture.step_size=2", "--cfg"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["mixture"] == {"step_size": 2}
    assert {source["name"] for source in shown["data"]["sources"]} == {"code", "prose"}
