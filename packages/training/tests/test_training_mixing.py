"""Mixtures that move while a run trains: the trainer's side of `data_handler.mixture`."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from bitnet_arch import UserError
from data_handler import BatchLoader, PackedStream
from data_handler.mixture import Aioli, StepResult, drive
from wrinklefree import exporting
from wrinklefree.arm import train_arm
from wrinklefree.callbacks import read_metrics
from wrinklefree.cli import compose_values, load_run_config, main
from wrinklefree.config import MixtureConfig, RunConfig, from_mapping
from wrinklefree.evaluation import heldout_loss, mean_loss, rows_by_domain
from wrinklefree.mixing import Mixture
from wrinklefree.mixture import main as search
from wrinklefree.models import build_start
from wrinklefree.objective import domain_means, domain_sums, token_loss_sum
from wrinklefree.resume import KEY, check_config, plain

SHAPE = (
    "hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 1, vocab_size: 280"
)
ROWS, LENGTH = 4, 32
EQUAL = {"method": "static", "options": {"weights": {"plain": 0.5, "noise": 0.5}}}
ODM = {"method": "odm", "options": {"every": 1}}
SELDOM = {"method": "odm", "options": {"every": 2}}
EXP3 = {"method": "odm", "options": {"variant": "exp3", "every": 1}}
AIOLI = {"method": "aioli", "options": {"every": 6, "probe_steps": 2, "step_size": 4.0}}
INFLUENCE = {"method": "influence", "options": {"every": 3}, "probes": ("plain",)}


def static(plain_share):
    return {"method": "static", "options": {"weights": [plain_share, 1 - plain_share]}}


def overridden(mixture):
    """A mixture as a command line has it."""
    options = [f"mixture.options.{name}={value}" for name, value in mixture["options"].items()]
    probes = [f"mixture.probes=[{','.join(mixture['probes'])}]"] if "probes" in mixture else []
    return [f"mixture={mixture['method']}", *options, *probes]


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """Two domains: one that repeats itself, one of random letters."""
    path = tmp_path_factory.mktemp("mixing")
    generator = torch.Generator().manual_seed(0)
    letters = [chr(97 + int(i)) for i in torch.randint(0, 26, (12000,), generator=generator)]
    documents = {
        "plain": ["the cat sat on the mat " * (2 + i % 3) + str(i) for i in range(80)],
        "noise": ["".join(letters[i * 100 : i * 100 + 100]) for i in range(80)],
    }
    for name, found in documents.items():
        (path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in found))
    return path


@pytest.fixture(scope="session")
def base(texts):
    sources = ", ".join(f"{{name: {name}, kind: jsonl, path: '{texts}/{name}.jsonl'}}" for name in ("plain", "noise"))
    held = f"heldout_share: 0.2, heldout_tokens: 512, cache_dir: {texts}/cache"
    return [
        f"++model={{name: small, norm: none, shape: {{{SHAPE}}}}}",
        f"++data={{sources: [{sources}], sequence_length: {LENGTH}, {held}}}",
        "training.max_steps=12",
        f"training.rows_per_step={ROWS}",
        "training.learning_rate=0.01",
        "training.eval_every=0",
        "training.checkpoint_every=4",
        "training.keep_checkpoints=9",
        "training.threads=1",
        "training.compare_fp=false",
        "training.wandb=off",
        f"output_dir={texts}/run",
    ]


@pytest.fixture(scope="session")
def config(base):
    return load_run_config(base)


@pytest.fixture(scope="session")
def start(config):
    return build_start(config)


@pytest.fixture(scope="session")
def arm(config, start, tmp_path_factory):
    """Train one arm, once for the same arguments: its result, its figures without the speed, and its folder."""
    done = {}

    def train(mixture=None, *, resume=None, replay=None, **training):
        key = repr((mixture, resume, replay, training))
        if key not in done:
            own = replace(config, mixture=MixtureConfig(**(mixture or {})), training=replace(config.training, **training))
            folder = tmp_path_factory.mktemp("arm")
            streams = [PackedStream(own.data, start.tokenizer, seed=own.training.seed, split=s) for s in ("train", "heldout")]
            options = {"config": own, "logger": None, "tokenizer": None, "resume": resume, "replay": replay}
            title = "ternary" if replay is None else "unquantised"
            result = train_arm(title, copy.deepcopy(start.model), *streams, folder, quantized=replay is None, **options)
            lines = [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in read_metrics(folder / "metrics.jsonl")]
            done[key] = result, lines, folder
        return done[key]

    return train


def kept(folder, step):
    return torch.load(folder / "checkpoints" / f"step-{step}.ckpt", weights_only=True)[KEY]


def shares(lines):
    return [(line["weight/plain"], line["weight/noise"]) for line in lines]


def same_weights(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.model.state_dict().values(), two.model.state_dict().values(), strict=True))


def test_losses_of_domains_add_up_to_that_of_all_rows():
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 7, 11), torch.randint(0, 11, (5, 7))
    labels[2] = -100
    losses, counts = map(torch.stack, zip(*(token_loss_sum(logits[i : i + 1], labels[i : i + 1]) for i in range(5)), strict=True))
    total, count = token_loss_sum(logits, labels)
    assert (float(losses.sum()), int(counts.sum())) == (pytest.approx(float(total)), int(count))
    owner = torch.tensor([1, 0, 2, 1, 0])
    sums = domain_sums(losses, owner, 4)
    assert sums.tolist() == pytest.approx([float(losses[owner == k].sum()) for k in range(4)])
    means = domain_means(sums, domain_sums(counts, owner, 4))
    one, _ = token_loss_sum(logits[owner == 1], labels[owner == 1])
    assert means[1] == pytest.approx(float(one) / 12)
    assert all(mean != mean for mean in means[2:])  # nothing was scored


def test_odm_gives_more_to_the_domain_with_the_higher_loss_and_the_tokens_follow(arm):
    _, lines, folder = arm(ODM, max_steps=30)
    noise = [weight for _, weight in shares(lines)]
    assert noise[0] == 0.5  # the data's own share
    assert noise[-1] > 0.6
    late = lines[-1]
    assert late["loss/noise"] > late["loss/plain"] + 0.5
    # Recounted from the batches: within a row a source of what the weights of every step asked for, though they changed at each.
    tokens = [(line["tokens/plain"], line["tokens/noise"]) for line in lines]
    steps = [(a - c, b - d) for (a, b), (c, d) in zip(tokens, [(0, 0), *tokens], strict=False)]
    wanted = sum(weight * sum(step) for weight, step in zip(noise, steps, strict=True))
    assert abs(tokens[-1][1] - wanted) <= 2 * LENGTH
    assert tokens[-1][1] > 0.55 * sum(tokens[-1])
    assert json.loads(kept(folder, 30)["loader"])["tokens"]["noise"] == tokens[-1][1]


@pytest.mark.parametrize(
    "steered",
    [EQUAL, {"method": "stratified"}, {"method": "odm", "options": {"every": 1, "reference": 100.0}}],
    ids=["static", "stratified", "odm with equal rewards"],
)
def test_a_mixture_that_stays_the_datas_own_changes_no_bit(steered, arm):
    unsteered, unsteered_lines, folder = arm()
    result, lines, _ = arm(steered)
    assert len(result.history) == 1
    assert set(shares(lines)) == {(0.5, 0.5)}
    own = [{k: v for k, v in line.items() if not k.startswith(("weight/", "loss/"))} for line in lines]
    assert own == unsteered_lines
    assert same_weights(result, unsteered)
    assert unsteered.history == []
    assert kept(folder, 12)["mixture"] is None
    # Other weights are another run.
    other, other_lines, _ = arm(static(0.9))
    assert [line["loss"] for line in other_lines] != [line["loss"] for line in lines]
    assert not same_weights(other, unsteered)


def test_a_domains_losses_are_those_of_the_steps_own_tokens(arm):
    _, lines, _ = arm(EQUAL)
    for line in lines:
        assert min(line["loss/plain"], line["loss/noise"]) <= line["loss"] <= max(line["loss/plain"], line["loss/noise"])
    _, alone, _ = arm(static(1.0))
    assert all("loss/noise" not in line and line["loss/plain"] == pytest.approx(line["loss"], rel=1e-5) for line in alone)
    _, parts, _ = arm(EQUAL, micro_batch_rows=1)
    assert [line["loss/noise"] for line in parts[:3]] == pytest.approx([line["loss/noise"] for line in lines[:3]], abs=1e-3)


def test_exp3_and_influence_move_the_weights_as_they_say(arm):
    result, lines, _ = arm(EXP3, max_steps=24)
    assert len(result.history) == 24
    assert lines[-1]["weight/noise"] > 0.53  # the higher loss
    for probe in ("plain", "noise"):  # each is learnt from itself
        result, lines, _ = arm({**INFLUENCE, "probes": (probe,)})
        assert [step for step, _ in result.history] == [0, 3, 6, 9]
        assert lines[0][f"weight/{probe}"] > 0.7
        assert lines[-1][f"weight/{probe}"] > lines[0][f"weight/{probe}"]


def test_aioli_moves_the_weights_by_held_out_losses(arm):
    result, lines, _ = arm(AIOLI)
    rounds = [dict(result.history)[step] for step in (4, 10)]
    assert len({(0.5, 0.5), *rounds}) == 3
    assert [line["step"] for line in lines if "heldout_loss/plain" in line] == [2, 4, 6, 8, 10]


class Silent:
    """A learner for `drive` that learns nothing."""

    domains = ("plain", "noise")
    trained_tokens = measured_tokens = 0

    def step(self, rows, token_weights, *, excess):
        return StepResult(losses=[1.0, 1.0], tokens=[n * LENGTH for n in rows])

    def validate(self):
        return [1.0, 1.0]


def test_aioli_probes_at_the_same_steps_as_in_a_driven_run(arm):
    still = {"method": "aioli", "options": {**AIOLI["options"], "step_size": 1e-9}}
    result, lines, _ = arm(still)
    driven = drive(Silent(), Aioli(Silent.domains, **still["options"]), 12, ROWS)
    assert [step for step, _ in result.history] == [step for step, _ in driven.history[1:]] == [0, 2, 4, 6, 8, 10]
    for (_, here), (_, there) in zip(result.history, driven.history[1:], strict=True):
        assert here == pytest.approx(there, abs=1e-6)
    # Two steps on each one-hot, then the rest of the round on the mixture: from the step after the answer on.
    assert [round(max(pair), 2) for pair in shares(lines)] == [0.75, 0.75, 0.75, 0.75, 0.5, 0.5] * 2
    tokens = [(line["tokens/plain"], line["tokens/noise"]) for line in lines]
    first = max((0, 1), key=lambda k: shares(lines)[0][k])
    assert tokens[1][first] > 0.6 * sum(tokens[1])
    assert tokens[3][1 - first] - tokens[1][1 - first] > 0.6 * (sum(tokens[3]) - sum(tokens[1]))


@pytest.mark.parametrize(
    ("mixture", "workers", "steps"),
    [(SELDOM, 0, (4, 8)), (SELDOM, 2, (4,)), (AIOLI, 0, (4, 8)), (INFLUENCE, 0, (4,))],
    ids=["odm", "odm, two workers", "aioli", "influence"],
)
def test_a_run_that_is_resumed_in_the_middle_is_the_uninterrupted_one(mixture, workers, steps, arm):
    whole, lines, folder = arm(mixture)
    for step in steps:
        checkpoint = folder / "checkpoints" / f"step-{step}.ckpt"
        again, more, other = arm(mixture, data_workers=workers, resume=checkpoint)
        assert more == lines[step:]
        assert again.history == whole.history
        assert same_weights(again, whole)
        one, two = kept(folder, 12), kept(other, 12)
        assert (one["mixture"], one["loader"]) == (two["mixture"], two["loader"])
    assert len(set(shares(lines[:5]))) > 1  # it had changed before the checkpoint
    assert len(set(shares(lines[4:]))) > 1  # and changes after it
    assert len(json.dumps(json.loads(kept(folder, 12)["mixture"])["controller"])) < 1000


def test_workers_change_nothing(arm):
    here, there = (arm(SELDOM, data_workers=workers) for workers in (0, 2))
    assert here[0].history == there[0].history
    assert here[1] == there[1]
    assert same_weights(here[0], there[0])


def test_a_replay_reads_the_same_rows_and_may_be_resumed(arm):
    decided, lines, folder = arm(SELDOM)
    repeated, again, other = arm(SELDOM, replay=decided.history)
    assert repeated.history == decided.history
    assert shares(again) == shares(lines)
    assert [line["tokens/noise"] for line in again] == [line["tokens/noise"] for line in lines]
    assert [line["loss"] for line in again] != [line["loss"] for line in lines]
    assert kept(other, 12)["loader"] == kept(folder, 12)["loader"]  # the digest of the weights is in it
    _, resumed, _ = arm(SELDOM, replay=decided.history, resume=other / "checkpoints" / "step-4.ckpt")
    assert resumed == again[4:]
    # Control: with a controller of its own, other losses decide otherwise.
    history = [(step, (weights[1], weights[0])) for step, weights in decided.history]
    assert [line["tokens/noise"] for line in arm(SELDOM, replay=history)[1]] != [line["tokens/noise"] for line in again]


def test_a_whole_run_repeats_the_mixture_for_its_twin_and_says_what_changed(base, texts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda name: None)
    run = tmp_path / "run"
    more = [*overridden(ODM), "training.compare_fp=true", "training.max_steps=8", "training.eval_every=4", f"output_dir={run}"]
    assert main([*base, *more]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "mixture after" in line]
    assert [line.split(":")[0] for line in said] == ["ternary", "ternary"]
    assert "mixture after step 4: plain 0." in said[0]
    ternary, twin = (read_metrics(run / arm / "metrics.jsonl") for arm in (".", "fp"))
    assert shares(twin) == shares(ternary)
    assert len(set(shares(ternary))) > 4
    assert [line["tokens/plain"] for line in twin] == [line["tokens/plain"] for line in ternary]
    # The twin goes on by itself, after the ternary arm has ended: the history is in that arm's last checkpoint.
    (run / "summary.json").unlink()
    (run / "fp" / "checkpoints" / "step-8.ckpt").unlink()
    (run / "metrics.jsonl").write_text("")
    assert main([*base, *more]) == 0
    again = read_metrics(run / "fp" / "metrics.jsonl")
    assert [{**a, "tokens_per_s": 0} for a in again] == [{**b, "tokens_per_s": 0} for b in twin]


@pytest.mark.parametrize("mixture", [INFLUENCE, AIOLI], ids=["influence", "aioli"])
def test_how_much_evaluations_look_at_changes_no_weight(mixture, base, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda name: None)
    found = {}
    for share in ("0.1", "null"):  # 154 held-out tokens of 512
        folder = tmp_path / share
        more = ["training.compare_fp=false", f"training.eval_share={share}", f"output_dir={folder}"]
        assert main([*base, *overridden(mixture), *more]) == 0
        lines = read_metrics(folder / "metrics.jsonl")
        perplexity = json.loads((folder / "summary.json").read_text())["ppl_ternary"]
        found[share] = shares(lines), [line["loss"] for line in lines], perplexity
    assert found["0.1"][:2] == found["null"][:2]
    assert len(set(found["null"][0])) > 1  # they do move
    assert found["0.1"][2] != found["null"][2]  # and evaluations do look at less


def test_held_out_losses_by_source_make_up_the_whole(config, start):
    stream = PackedStream(config.data, start.tokenizer, split="heldout")
    parts = rows_by_domain(stream)
    assert all(int(row["domain"]) == k for k, rows in enumerate(parts) for row in rows)
    counts = [sum(int((row["labels"][1:] != -100).sum()) for row in rows) for rows in parts]
    losses = [mean_loss(start.model, rows) for rows in parts]
    whole = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    assert heldout_loss(start.model, stream) == pytest.approx(whole, rel=1e-5)
    assert losses[0] != losses[1]


@pytest.mark.parametrize("lanes", [1, 3])
def test_upcoming_rows_are_those_that_a_source_gives_next(lanes, config, start):
    data = replace(config.data, lanes=lanes)
    loader = BatchLoader(PackedStream(data, start.tokenizer), rows_per_step=3)
    list(islice(loader, 5))
    coming = [loader.upcoming(k, 4) for k in (0, 1)]
    place = loader.state_dict()
    assert [loader.upcoming(k, 4)[0]["input_ids"].tolist() for k in (0, 1)] == [rows[0]["input_ids"].tolist() for rows in coming]
    assert loader.state_dict() == place
    rows = [
        {name: value[i] for name, value in batch.items()} for batch in islice(loader, 12) for i in range(0, 3, lanes)
    ]  # of lane 0
    for k in (0, 1):
        following = [row for row in rows if int(row["domain"]) == k][:4]
        assert len(following) == 4
        assert all(torch.equal(a[name], b[name]) for a, b in zip(coming[k], following, strict=True) for name in a)


def test_shares_that_change_at_every_step_are_not_rounded_to_rows(config, start):
    loader = BatchLoader(PackedStream(config.data, start.tokenizer), rows_per_step=ROWS)
    noise, wanted, total = 0, 0.0, 0
    for step, batch in enumerate(islice(loader, 60)):
        used = (batch["document_ids"] > 0).sum(1)
        share = loader.weights.at(step * ROWS)[1][1]
        noise += int(used[batch["domain"] == 1].sum())
        wanted += share * int(used.sum())
        total += int(used.sum())
        coming = 0.6 + 0.0001 * step
        loader.set_weights({"plain": 1 - coming, "noise": coming})
    assert abs(noise - wanted) <= 2 * LENGTH
    assert noise / total > 0.59  # two of four rows in every step would be 0.5


@pytest.mark.parametrize(
    ("mixture", "changes", "message"),
    [
        ({"method": "odd"}, {}, "mixture.method must be none or one of stratified, static, influence, odm, aioli, not 'odd'"),
        ({"method": "doremi"}, {}, "needs a reference run: scripts/mixture.py doremi finds weights before training"),
        ({"method": "static"}, {}, "static needs the option weights"),
        ({"options": {"every": 3}}, {}, "mixture.options has no effect with mixture=none"),
        ({"method": "odm", "options": {"evry": 3}}, {}, "odm has no option 'evry': its options are variant"),
        ({"method": "odm", "options": {"variant": "best"}}, {}, "variant must be one of group, smoothed, exp3"),
        ({"method": "odm", "options": {"every": "often"}}, {}, "an option of the mixture's method odm has the wrong type"),
        ({"method": "odm", "options": {"every": 12}}, {}, "would first change after step 12 .* and the run has 12"),
        ({"method": "odm", "options": {"cap": {"spam": 0.1}}}, {}, "cap names 'spam', which is no domain"),
        ({"method": "odm", "options": {"cap": 0.3}}, {}, "no mixture of 2 domains"),
        ({"method": "aioli", "options": {"every": 4, "probe_steps": 2}}, {}, "steps of probing"),
        ({"method": "odm", "probes": ["plain"]}, {}, "mixture.probes has no effect on odm"),
        ({"method": "influence", "probes": ["spam"]}, {}, "mixture.probes names 'spam', which is no source: use plain, noise"),
        ({"method": "influence", "probes": []}, {}, "mixture.probes is empty"),
        ({"method": "influence"}, {"heldout_share": 0.0}, "measures held-out rows, and data.heldout_share is 0"),
        ({"method": "odm", "every": 3}, {}, "unknown key mixture.every: known keys are method, options, probes"),
        (ODM, {"sources": [{"name": "one", "kind": "stdlib_code"}]}, "needs at least two sources, and the data has only one"),
    ],
)
def test_a_mistake_is_one_sentence(mixture, changes, message, values):
    with pytest.raises(UserError, match=message) as caught:
        from_mapping(RunConfig, {**values, "mixture": mixture, "data": {**values["data"], **changes}})
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="session")
def values(base):
    return compose_values(base)


def test_the_command_line_knows_the_methods(base, capsys):
    odd, alone = ["mixture=odd"], ["mixture=odm", "data=text"]
    for mistake, message in ((odd, "aioli, exp3, influence, none, odm"), (alone, "two sources, and the data has only own")):
        assert main(mistake) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert load_run_config([*base, "mixture=exp3", "mixture.options.every=2"]).mixture.options == {"variant": "exp3", "every": 2}


def test_it_starts_from_the_datas_weights_unless_told_otherwise(config):
    sources = [replace(source, weight=weight) for source, weight in zip(config.data.sources, (3.0, 1.0), strict=True)]
    weighted = replace(config.data, sources=tuple(sources))
    assert MixtureConfig(**ODM).controller(weighted).weights == (0.75, 0.25)
    assert MixtureConfig(method="odm", options={"weights": [1, 4]}).controller(weighted).weights == (0.2, 0.8)
    assert MixtureConfig(method="stratified").controller(weighted).weights == (0.5, 0.5)


def test_another_mixture_does_not_continue_a_run_and_a_checkpoint_without_one_does(config):
    steered, other = (replace(config, mixture=MixtureConfig(**mixture)) for mixture in (ODM, SELDOM))
    with pytest.raises(UserError, match=r"was trained with mixture.options.every=1, and this run has mixture.options.every=2"):
        check_config(Path("step-4.ckpt"), {KEY: {"config": plain(steered)}}, other)
    older = plain(config)
    del older["mixture"]
    check_config(Path("step-4.ckpt"), {KEY: {"config": older}}, config)
    with pytest.raises(UserError, match=r"trained with mixture\.method=none"):
        check_config(Path("step-4.ckpt"), {KEY: {"config": older}}, steered)
    state = Mixture(steered.mixture.controller(steered.data)).state_dict()
    with pytest.raises(ValueError, match="state is of odm"):
        Mixture(MixtureConfig(**AIOLI).controller(steered.data)).load_state_dict(state)


def test_the_search_for_a_mixture_refuses_one_that_acts_in_a_run(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert search(["odm", *base, "mixture=odm"]) == 2
    assert "mixture=odm acts in a training run and has no effect on odm" in capsys.readouterr().err


UNPROVEN = """
import sys
from wrinklefree import run
from wrinklefree.cli import main
run.export = lambda *_: {"status": "unproven", "note": "not exported", "runs": False}  # it has tests of its own
sys.exit(main())
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mixture", [ODM, INFLUENCE, AIOLI], ids=["odm", "influence", "aioli"])
def test_two_processes_decide_as_one_does(mixture, base, arm, tmp_path):
    result, single, _ = arm(mixture)
    (tmp_path / "train.py").write_text(UNPROVEN)
    ddp = ["distributed=ddp", "distributed.accelerator=cpu", f"output_dir={tmp_path / 'two'}"]
    command = [sys.executable, str(tmp_path / "train.py"), *base, *overridden(mixture), *ddp]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    double = read_metrics(tmp_path / "two" / "metrics.jsonl")
    history = json.loads(kept(tmp_path / "two", 12)["mixture"])["history"]
    assert [step for step, *_ in history] == [step for step, _ in result.history]
    assert len(history) > 2
    # A ternary code at a rounding edge turns the last bit of a sum into a visible step sooner or later; the beginning agrees.
    for (step, one), (_, *two) in zip(result.history, history, strict=True):
        assert two == pytest.approx(one, abs=1e-5 if step < 4 else 2e-2)
    assert double[0]["loss"] == pytest.approx(single[0]["loss"], abs=1e-5)
    for name in ("plain", "noise"):
        assert double[0][f"loss/{name}"] == pytest.approx(single[0][f"loss/{name}"], abs=1e-5)
        here, there = ([line[f"tokens/{name}"] for line in lines] for lines in (single, double))
        assert here[:4] == there[:4]
        assert here[-1] == pytest.approx(there[-1], abs=2 * LENGTH)
