"""The command that ranks examples and domains, on a run of the trainer."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from bitnet_arch import load_model, save_master, save_packed
from data_handler import PackedStream
from data_handler.influence import PerSampleGradients
from wrinklefree.arm import train_arm
from wrinklefree.cli import load_run_config
from wrinklefree.influence import load_influence_config, main
from wrinklefree.influence_checkpoints import load_checkpoints, load_subject
from wrinklefree.models import build_start


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """A model directory and the checkpoints of the run that made it."""
    directory = tmp_path_factory.mktemp("influence") / "run"
    shape = ("hidden_size=64", "intermediate_size=96", "num_hidden_layers=2", "vocab_size=400")
    overrides = [*data(corpus), "training=smoke", "training.threads=1", "training.checkpoint_every=3"]
    overrides += ["training.max_steps=6", "training.eval_every=0", *(f"model.shape.{item}" for item in shape)]
    config = load_run_config([*overrides, f"output_dir={directory}"])
    start = build_start(config)
    streams = [PackedStream(config.data, start.tokenizer, split=split) for split in ("train", "heldout")]
    train_arm(
        "ternary",
        start.model,
        *streams,
        directory,
        config=config,
        quantized=True,
        resume=None,
        logger=None,
        tokenizer=start.trained_tokenizer,
    )
    save_master(start.model, directory / "model", start.tokenizer)
    return directory


def data(corpus):
    sources = (
        f"{{name: salad, kind: text, path: '{corpus}/salad-*.txt'}}, {{name: count, kind: text, path: '{corpus}/count-*.txt'}}"
    )
    return [
        "data=text",
        f"data.sources=[{sources}]",
        "data.sequence_length=32",
        "data.heldout_share=0.2",
        "data.heldout_tokens=512",
    ]


@pytest.fixture
def arguments(trained, corpus, tmp_path):
    common = [
        f"model.pretrained={trained / 'model'}",
        *data(corpus),
        "limit=12",
        "probe_limit=6",
        "threads=1",
        "layers=last:1",
    ]
    return [*common, f"output_dir={tmp_path / 'out'}"]


@pytest.mark.parametrize("method", ["tracin", "less", "datainf", "distillation", "exact"])
def test_the_command_ranks_examples_and_domains(arguments, tmp_path, capsys, method):
    more = {"less": ["warmup_steps=2"], "distillation": ["landmarks=10"], "exact": ["projection=hadamard"]}.get(method, [])
    assert main([*arguments, f"method={method}", *more]) == 0
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["config.yaml", "influence.parquet", "influence.png", "report.md"]
    table = pq.read_table(out / "influence.parquet").to_pydict()
    assert table["rank"] == list(range(1, 25))
    assert table["score"] == sorted(table["score"], reverse=True)
    assert {"score:salad", "score:count"} <= table.keys()
    report = (out / "report.md").read_text()
    assert "| salad | 12 |" in report
    assert f"* method: {method}" in report
    assert report.count("| `") == 20
    assert (out / "influence.png").read_bytes().startswith(b"\x89PNG")
    assert yaml.safe_load((out / "config.yaml").read_text())["method"] == method
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert "| salad | 12 |" in capsys.readouterr().out


def test_probes_of_a_domain_prefer_it(arguments, corpus, tmp_path):
    """The command's whole way: probes that count rank counting above word salad, and the other way round."""
    means = {}
    for name in ("salad", "count"):
        probes = tmp_path / f"{name}.txt"
        probes.write_text("\n\n".join(path.read_text() for path in sorted(corpus.glob(f"{name}-5*.txt"))))
        assert main([*arguments[:-1], f"output_dir={tmp_path / f'out-{name}'}", f"probes={probes}"]) == 0
        table = pq.read_table(tmp_path / f"out-{name}" / "influence.parquet").to_pydict()
        for domain in ("salad", "count"):
            means[name, domain] = torch.tensor(
                [s for s, d in zip(table["score"], table["domain"], strict=True) if d == domain]
            ).mean()
    assert means["salad", "salad"] > means["salad", "count"]
    assert means["count", "count"] > means["count", "salad"]


def test_the_trainers_checkpoints_bring_weights_rates_and_moments(trained, arguments):
    what, how = load_influence_config([*arguments, "method=less", f"checkpoints=[{trained / 'checkpoints'}]"])
    subject = load_subject(what.model.pretrained, 32)
    original = {name: tensor.clone() for name, tensor in subject.model.state_dict().items()}
    found = []
    for state in load_checkpoints(subject, what.checkpoints, what.rates, how):
        weights = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
        found.append((state.rate, state.moments, weights))
    assert len(found) == 2
    assert found[0][0] > found[1][0] > 0
    assert [moments.step for _, moments, _ in found] == [3, 6]
    assert all(torch.equal(original[name], tensor) for name, tensor in found[1][2].items())  # the run's end is its model
    assert not torch.equal(original["model.layers.1.mlp.up_proj.weight"], found[0][2]["model.layers.1.mlp.up_proj.weight"])
    kept = torch.load(trained / "checkpoints" / "step-6.ckpt", weights_only=True)["optimizer_states"][0]
    names = list(PerSampleGradients(subject.model, layers=["last:1"]).selected.items())
    (_, last), tail = names[-1], found[1][1].second
    matrices = [i for i, group in enumerate(kept["param_groups"]) if group["weight_decay"] > 0]
    vectors = [i for i, group in enumerate(kept["param_groups"]) if group["weight_decay"] == 0]
    assert len(matrices) == len(vectors) == 1
    # The trainer's own order: matrices apart from vectors, each in the model's order.
    down = next(i for i, (name, _) in enumerate(names) if name.endswith("mlp.down_proj.weight"))
    before = sum(p.numel() for _, p in names[:down])
    index = kept["param_groups"][matrices[0]]["params"][-1]
    expected = kept["state"][index]["exp_avg_sq"].flatten()
    assert torch.equal(tail[before : before + len(expected)], expected)
    index = kept["param_groups"][vectors[0]]["params"][-2]  # the last vector is the model's final norm
    assert torch.equal(tail[-last.numel() :], kept["state"][index]["exp_avg_sq"])


def test_checkpoints_change_the_ranking(trained, arguments, tmp_path):
    scores = []
    for name, more in [
        ("own", []),
        ("run", [f"checkpoints=[{trained / 'checkpoints'}]"]),
        ("same", [f"checkpoints=[{trained / 'model'}]"]),
    ]:
        assert main([*arguments[:-1], f"output_dir={tmp_path / name}", "method=tracin", *more]) == 0
        table = pq.read_table(tmp_path / name / "influence.parquet").to_pydict()
        scores.append(dict(zip(zip(table["domain"], table["document"], strict=True), table["score"], strict=True)))
    assert scores[0] == scores[2]
    assert scores[0] != scores[1]


def test_a_float_model_is_ranked_too(arguments, tmp_path):
    from bitnet_arch.testing import tiny_llama, tiny_tokenizer

    float_model = tmp_path / "float"
    save_master(tiny_llama(hidden=64, ffn=96, vocab=512), float_model, tiny_tokenizer())
    assert main([f"model={float_model}", *arguments[1:]]) == 0
    assert "float" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["model.pretrained=nowhere"], "nowhere is neither a directory nor a hub id"),
        (["model.pretrained=null"], "no model is named: give model.pretrained=DIR"),
        (["probes=nowhere.jsonl"], "probes=nowhere.jsonl does not exist"),
        (["method=magic"], "method must be one of tracin, less"),
        (["metod=less"], "unknown key metod: did you mean method?"),
        (["method=tracin", "damping=0.5"], "damping has no effect with method=tracin"),
        (["layers=last:9"], "from 1 to the model's 2 blocks"),
        (["layers=['*.nothing']"], "no parameter is named like"),
        (["limit=0"], "limit must be at least 1"),
        (["limit=many"], "limit: "),
        (["rates=[0.1]"], "rates has no effect without checkpoints"),
        (["probe_column=body"], "probe_column has no effect with probes=heldout"),
        (["method=tracin", "checkpoints=[nowhere]"], "nowhere is no checkpoint"),
        (["checkpoints=[a,b]"], "method=datainf takes one checkpoint"),
        (["data.sequence_length=4096"], "longer than the model's context"),
        (["data=nothing"], "choose one of "),
        (["memory_mib=1", "projection=none"], "one example needs"),
        (["--fast"], "unknown option --fast"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_ends_in_one_sentence(arguments, tmp_path, capsys, more, message):
    assert main([*arguments, *more]) == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1]
    assert error.splitlines()[-1].startswith("error: ")
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_replaced(arguments, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    assert main(arguments) == 2
    assert "exists and is not empty: choose another output_dir" in capsys.readouterr().err
    assert (tmp_path / "out" / "mine").read_text() == "kept"


def test_states_that_do_not_fit_are_refused(trained, arguments, tmp_path, capsys):
    from bitnet_arch.testing import tiny_bitnet, tiny_tokenizer

    other, packed, broken = tmp_path / "other", tmp_path / "packed", tmp_path / "step-1.ckpt"
    save_master(tiny_bitnet(hidden=64, ffn=128, vocab=512), other, tiny_tokenizer())
    save_packed(load_model(trained / "model"), packed, tiny_tokenizer())
    broken.write_bytes(b"no archive")
    for path, message in [(other, "is of another model"), (packed, "is packed"), (broken, "is damaged or no checkpoint")]:
        assert main([*arguments, "method=tracin", f"checkpoints=[{path}]"]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert main([*arguments, "method=tracin", f"checkpoints=[{trained / 'checkpoints'}]", "rates=[1.0]"]) == 2
    assert "there are 2 checkpoints and 1 rates" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_help_has_examples_and_cfg_shows_everything(arguments, capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "examples:" in text
    assert main([*arguments, "--cfg"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["layers"] == ["last:1"]
    assert Path(shown["model"]["pretrained"]).is_dir()
    assert shown["data"]["sequence_length"] == 32
