import gzip
import json
import random
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import torch
from bitnet_arch.testing import tiny_bitnet, tiny_llama
from data_handler import DataConfig, SourceConfig, UserError
from data_handler.influence import (
    AdamMoments,
    Checkpoint,
    InfluenceConfig,
    PerSampleGradients,
    datainf_scores,
    domain_scores,
    estimate,
    exact_scores,
    group_means,
    joined_moments,
    less_scores,
    probe_examples,
    rank_correlation,
    tracin_scores,
    training_examples,
    write_table,
)
from torch import nn
from torch.nn import functional as F

METHODS = ("tracin", "less", "datainf", "exact", "distillation")
LETTERS = ("abc", "xyz")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two domains of letters that do not meet, and probes of each."""
    path = tmp_path_factory.mktemp("letters")
    draw = random.Random(0)
    for name in LETTERS:
        lines = ["".join(draw.choices(name + " ", k=20)) for _ in range(46)]
        (path / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines[6:]))
        (path / "probes").mkdir(exist_ok=True)
        probes = "".join(json.dumps({"text": line}) + "\n" for line in lines[:6])
        (path / "probes" / f"{name}-probe.jsonl").write_text(probes)
    return path


@pytest.fixture(scope="module")
def data(folder):
    sources = tuple(SourceConfig(name=name, kind="jsonl", path=str(folder / f"{name}.jsonl")) for name in LETTERS)
    return DataConfig(sources=sources, sequence_length=24, heldout_share=0.2)


@pytest.fixture(scope="module")
def sets(data, folder, byte_tokenizer):
    probes = probe_examples(str(folder / "probes"), data, byte_tokenizer, 6)
    return training_examples(data, byte_tokenizer, 12), probes


@pytest.fixture(scope="module")
def model(data, byte_tokenizer):
    """A ternary model, briefly trained, so that gradients mean something."""
    model = tiny_bitnet(hidden=32, ffn=48, vocab=257, layers=2).train()
    ids = training_examples(data, byte_tokenizer, 30).tensors["input_ids"]
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for step in range(15):
        rows = ids[(torch.arange(8) * 7 + step) % len(ids)]
        logits = model(input_ids=rows[:, :-1]).logits
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
        optimizer.step()
    for parameter in model.parameters():
        parameter.grad = None
    return model.eval()


def run(model, sets, **options):
    train, probes = sets
    options = {"layers": ("last:1",), "projection_dimension": 256, **options}
    if options["method"] == "exact":
        options = {"projection": "hadamard", **options}
    return estimate([Checkpoint(model)], train.tensors, probes.tensors, probes.group, len(probes.names), InfluenceConfig(**options))


@pytest.mark.parametrize("method", METHODS)
def test_examples_help_the_probes_of_their_own_domain(model, sets, method):
    """On a ternary model, by every method; and the control: groups of mixed probes do not tell the domains apart."""
    train, probes = sets

    def preference(probes):
        found = run(model, (train, probes), method=method)
        means = {d.name: d.groups for d in domain_scores(found, train.group, train.names)}
        return found.scores, (means["abc"][0] - means["xyz"][0]) - (means["abc"][1] - means["xyz"][1])

    scores, gap = preference(probes)
    prefers = scores[:, 0] - scores[:, 1]
    assert (prefers[train.group == 0][:, None] > prefers[train.group == 1]).float().mean() > 0.95
    mixed = type(probes)(probes.tensors, torch.arange(len(probes)) % 2, probes.names, [], [])
    assert abs(preference(mixed)[1]) < 0.3 * gap


def test_estimate_is_its_parts(model, sets):
    """What the command computes is what the formulas say of the gradients."""
    train, probes = sets
    source = PerSampleGradients(model, layers=["last:1"])
    g, p = source.collect(train.tensors), source.collect(probes.tensors)
    targets = group_means(p.values, probes.group, 2)
    whole = {"projection": "none", "projection_dimension": None}
    found = {method: run(model, sets, method=method, **whole).scores for method in ("tracin", "datainf", "exact")}
    torch.testing.assert_close(found["tracin"], tracin_scores(g, targets))
    torch.testing.assert_close(found["datainf"], datainf_scores(g, targets, "spectral"))
    torch.testing.assert_close(found["exact"], exact_scores(g, targets, "spectral"))
    other = run(model, sets, method="datainf", damping="reference", **whole)
    torch.testing.assert_close(other.scores, datainf_scores(g, targets, "reference"))
    torch.testing.assert_close(other.variants["spectral"], found["datainf"].mean(1))
    torch.testing.assert_close(other.losses, source.losses(train.tensors))


@pytest.mark.parametrize("method", ["tracin", "datainf"])
def test_a_projection_keeps_the_ranking(model, sets, method):
    exact = run(model, sets, method=method, projection="none", projection_dimension=None)
    pairs = {d: run(model, sets, method=method, projection_dimension=d).overall for d in (1024, 4)}
    assert rank_correlation(pairs[1024], exact.overall) > 0.9
    assert rank_correlation(pairs[4], exact.overall) < rank_correlation(pairs[1024], exact.overall)


def test_several_checkpoints_add_up_by_their_rates(model, sets):
    train, probes = sets
    twin = tiny_bitnet(hidden=32, ffn=48, vocab=257, layers=2, seed=1)
    config = InfluenceConfig(method="tracin", layers=("last:1",))

    def at(*checkpoints):
        return estimate(checkpoints, train.tensors, probes.tensors, probes.group, 2, config).scores

    both = at(Checkpoint(model, 0.5), Checkpoint(twin, 2.0))
    torch.testing.assert_close(both, 0.5 * at(Checkpoint(model)) + 2 * at(Checkpoint(twin)))
    with pytest.raises(UserError, match="takes one checkpoint"):
        estimate(
            [Checkpoint(model), Checkpoint(twin)],
            train.tensors,
            probes.tensors,
            probes.group,
            2,
            InfluenceConfig(layers=("last:1",)),
        )
    with pytest.raises(UserError, match="there is no checkpoint"):
        at()


def test_less_uses_the_moments_it_is_given_and_else_warms_up(model, sets):
    train, probes = sets
    source = PerSampleGradients(model, layers=["last:1"])
    size = sum(source.sizes)
    moments = AdamMoments(torch.full((size,), 1e-3), torch.full((size,), 1e-4))
    config = InfluenceConfig(method="less", layers=("last:1",), projection="none")
    given = estimate([Checkpoint(model, 3.0, moments)], train.tensors, probes.tensors, probes.group, 2, config)
    expected = less_scores(
        source.collect(train.tensors, transform=moments.direction), source.collect(probes.tensors), probes.group, 2
    )
    torch.testing.assert_close(given.scores, expected)
    torch.testing.assert_close(given.overall, expected.amax(1))
    short, long = (run(model, sets, method="less", warmup_steps=n) for n in (2, 12))
    assert not torch.allclose(short.scores, long.scores)
    assert short.scores.abs().max() <= 1
    config = InfluenceConfig(method="less", layers=("last:1",), warmup_steps=3)
    with pytest.raises(UserError, match="warmup_steps has no effect, since the checkpoint brings"):
        estimate([Checkpoint(model, 1.0, moments)], train.tensors, probes.tensors, probes.group, 2, config)


def test_an_optimisers_moments_are_joined_in_the_models_order(model):
    names = list(PerSampleGradients(model, layers=["last:1"]).names)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    state = {
        name: {"exp_avg": torch.full(shapes[name], float(i)), "exp_avg_sq": torch.ones(shapes[name]), "step": torch.tensor(4.0)}
        for i, name in reversed(list(enumerate(names)))
    }
    moments = joined_moments(model, ("last:1",), state, (0.8, 0.95))
    assert moments.first[0] == 0
    assert moments.first[-1] == len(names) - 1
    assert (moments.step, moments.beta1, moments.beta2) == (4, 0.8, 0.95)
    del state[names[2]]
    with pytest.raises(UserError, match=f"no Adam moments of {names[2]}"):
        joined_moments(model, ("last:1",), state)


def test_gradients_are_spilled_where_asked_and_nothing_changes(model, sets, tmp_path):
    kept = run(model, sets, method="datainf")
    spilled = run(model, sets, method="datainf", spill=str(tmp_path / "g"))
    assert torch.equal(kept.scores, spilled.scores)
    assert [path.name for path in (tmp_path / "g").iterdir()] == ["gradients-1.npy"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "method must be one of tracin, less, datainf, exact, distillation, not 'magic'"),
        ({"method": "tracin", "damping": 0.1}, "damping has no effect with method=tracin: leave it out, or use datainf or exact"),
        ({"method": "datainf", "landmarks": 5}, "landmarks has no effect with method=datainf"),
        ({"method": "distillation", "warmup_steps": 5}, "warmup_steps has no effect .* use less"),
        ({"damping": "huge"}, "damping must be reference, spectral or a number above 0"),
        ({"damping": -1.0}, "damping must be above 0"),
        ({"memory_mib": 0}, "memory_mib must be above 0"),
        ({"projection": "none", "projection_dimension": 5}, "projection_dimension has no effect without a projection"),
        ({"method": "exact", "projection_dimension": 5}, "projection_dimension has no effect without a projection"),
        ({"projection": "fourier"}, "projection must be one of"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        InfluenceConfig(**options)


def test_examples_say_where_they_come_from(data, byte_tokenizer, folder):
    """A fixed sample by content: training documents only, whatever their order."""
    found = training_examples(data, byte_tokenizer, 7)
    assert found.names == ("abc", "xyz")
    assert found.group.tolist() == [0] * 7 + [1] * 7
    heldout = probe_examples("heldout", data, byte_tokenizer, 50)
    lines = [json.loads(line)["text"] for line in (folder / "abc.jsonl").read_text().splitlines()]
    for i in range(7):
        assert " ".join(lines[found.document[i]].split()) == found.texts[i]
    assert not set(found.texts) & set(heldout.texts)
    assert set(heldout.group.tolist()) == {0, 1}
    assert int(found.tokens()[0]) == 20  # and the end of text
    assert (found.tensors["labels"][:, 0] == -100).all()
    backwards = folder / "backwards.jsonl"
    backwards.write_text("".join(json.dumps({"text": line}) + "\n" for line in reversed(lines)))
    again = DataConfig(sources=(SourceConfig(name="b", kind="jsonl", path=str(backwards)),), sequence_length=24, heldout_share=0.2)
    assert set(training_examples(again, byte_tokenizer, 7).texts) == set(found.texts[:7])


def test_probes_are_read_from_files_of_every_kind(data, byte_tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("some text\n\nmore text")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"body": "hello there"}\n'))
    (tmp_path / "a.md").write_text("# title")
    (tmp_path / "ignored.bin").write_bytes(b"\0")
    found = probe_examples(str(tmp_path), data, byte_tokenizer, 9, "body")
    assert found.names == ("a", "a-2", "b")
    assert probe_examples(str(tmp_path / "a.md"), data, byte_tokenizer, 9).texts == ["# title"]
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "none.txt").write_text("  ")
    for path, message in [
        (tmp_path / "nowhere", "does not exist: give a file or folder"),
        (tmp_path / "ignored.bin", "is or holds no .txt"),
        (empty, "probe file none has no document"),
    ]:
        with pytest.raises(UserError, match=message):
            probe_examples(str(path), data, byte_tokenizer, 9)
    whole = DataConfig(sources=data.sources, sequence_length=24, heldout_share=0)
    with pytest.raises(UserError, match="probes=heldout needs held-out documents"):
        probe_examples("heldout", whole, byte_tokenizer, 9)


def test_the_table_is_ranked_and_complete(model, sets, tmp_path):
    train, probes = sets
    found = run(model, sets, method="datainf")
    write_table(tmp_path / "t.parquet", found, train, probes.names)
    table = pq.read_table(tmp_path / "t.parquet").to_pydict()
    assert list(table)[:6] == ["rank", "domain", "document", "tokens", "loss", "score"]
    assert {"score@reference", "score:abc-probe", "score:xyz-probe", "text"} <= table.keys()
    assert table["score"] == sorted(table["score"], reverse=True)
    best = int(found.overall.argmax())
    assert (table["document"][0], table["text"][0]) == (train.document[best], train.texts[best])
    assert len(table["rank"]) == len(train)
    with pytest.raises(UserError, match=r"writing .* failed"):
        write_table(tmp_path / "no" / "t.parquet", found, train, probes.names)


def test_rank_correlation_shares_ranks_among_ties():
    a = torch.tensor([1.0, 2.0, 2.0, 4.0])
    assert rank_correlation(a, a.exp()) == pytest.approx(1)
    assert rank_correlation(a, -a) == pytest.approx(-1)
    assert rank_correlation(a, torch.tensor([1.0, 3.0, 2.0, 4.0])) == pytest.approx(0.9486833)


def test_any_module_with_an_objective_of_its_own(sets):
    x, y = torch.randn(20, 4), torch.randint(0, 2, (20,))
    model = nn.Sequential(nn.Linear(4, 2))
    config = InfluenceConfig(method="datainf", layers=("*",))
    one = torch.zeros(20, dtype=torch.int64)
    loss = lambda forward, example: F.cross_entropy(forward(example["x"]), example["y"])  # noqa: E731
    found = estimate([Checkpoint(model)], {"x": x, "y": y}, {"x": x, "y": y}, one, 1, config, loss)
    assert found.scores.shape == (20, 1)
    assert found.overall.mean() > 0  # all together they help themselves


def test_a_model_on_which_nothing_depends_on_the_layers_scores_zero(sets):
    """The control: an example whose labels are all ignored has no gradient and no influence."""
    train, probes = sets
    mute = {name: value.clone() for name, value in train.tensors.items()}
    mute["labels"][0] = -100
    model = tiny_llama(hidden=32, ffn=48, vocab=257, layers=2)
    config = InfluenceConfig(method="datainf", layers=("last:1",), projection_dimension=64)
    found = estimate([Checkpoint(model)], mute, probes.tensors, probes.group, 2, config)
    assert found.scores[0].abs().max() == 0
    assert found.scores[1].abs().max() > 0


def test_the_package_itself_does_not_import_influence():
    code = "import sys, data_handler; print('data_handler.influence' in sys.modules); import data_handler.influence; "
    code += (
        "print([n for n in ('lightning', 'pytorch_lightning', 'hydra', 'wandb', 'bitnet_arch', 'wrinklefree') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["False", "[]"]
