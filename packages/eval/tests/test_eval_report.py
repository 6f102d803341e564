"""The card and the JSON say what they must."""

import json

import pytest
from bitnet_arch import UserError, save_master
from bitnet_arch.gguf import annotate_gguf, export_gguf
from bitnet_arch.parity import ParityReport
from bitnet_arch.testing import tiny_bitnet, tiny_tokenizer
from wrinklefree_eval.evaluate import describe_model
from wrinklefree_eval.report import Evaluation, Metric, ModelInfo, TaskResult, prepare_directory, write_report

CARD = """# Evaluation of model

- model: `run/model`
- form: master
- engine: PyTorch (transformers)
- context: 511 tokens

| task | metric | value | n | baseline |
|---|---|---|---|---|
| perplexity | token_perplexity ↓ | 12.5000 ± 0.2500 | 38 |  |
| sst2_local (stand-in) | acc ↑ | 0.5100 ± 0.0500 | 100 | majority 0.5200 |

- perplexity: Held-out text. 300 tokens, 900 bytes (code: perplexity 12.5000, 1.2000 bits per byte, 300 tokens).
- sst2_local: Film reviews.

## Read this with the figures

- `sst2_local` is a stand-in for SST-2.
- The weights are derived from: a 4-bit copy.
- Only a part of the examples was evaluated: 100 of 1064 in `sst2_local`.

## How

```
python -m wrinklefree_eval run/model
```

Versions: python 3.11, torch 2.13.
"""


def evaluation(**changes):
    domains = {"code": {"token_perplexity": 12.5, "bits_per_byte": 1.2, "tokens": 300}}
    perplexity = TaskResult(
        name="perplexity",
        description="Held-out text",
        stand_in=None,
        n=38,
        available=38,
        metrics=(Metric("token_perplexity", 12.5, 0.25, False),),
        baseline=None,
        details={"tokens": 300, "bytes": 900, "domains": domains},
    )
    sst2 = TaskResult(
        name="sst2_local",
        description="Film reviews",
        stand_in="a stand-in for SST-2",
        n=100,
        available=1064,
        metrics=(Metric("acc", 0.51, 0.05, True),),
        baseline=Metric("majority", 0.52, None, True),
    )
    fields = {
        "model": ModelInfo("run/model", "directory", "master", "PyTorch (transformers)", provenance="a 4-bit copy"),
        "command": "python -m wrinklefree_eval run/model",
        "context": 511,
        "limit": 100,
        "versions": {"python": "3.11", "torch": "2.13"},
        "tasks": (perplexity, sst2),
    }
    return Evaluation(**fields | changes)


def test_the_card_is_as_agreed():
    assert evaluation().to_markdown() == CARD


def test_the_json_has_every_figure_of_the_card():
    found = json.loads(json.dumps(evaluation().to_json()))
    assert found["tasks"]["sst2_local"]["metrics"]["acc"] == {"value": 0.51, "stderr": 0.05, "higher_is_better": True}
    assert found["tasks"]["sst2_local"]["baseline"]["value"] == 0.52
    assert found["tasks"]["perplexity"]["details"]["tokens"] == 300
    assert found["model"]["provenance"] == "a 4-bit copy"
    assert len(found["notes"]) == 3


def test_nothing_is_noted_where_nothing_limits_the_claim():
    task = evaluation().tasks[0]
    plain = evaluation(model=ModelInfo("m.gguf", "gguf", "tq2_0", "llama.cpp", parity="proven"), tasks=(task,))
    assert plain.notes() == []
    assert "Read this" not in plain.to_markdown()
    for parity in ("unproven", "no report"):
        unproven = evaluation(model=ModelInfo("m.gguf", "gguf", "tq2_0", "llama.cpp", parity=parity), tasks=(task,))
        assert unproven.notes() == [f"The GGUF file is not proven to compute what was trained (parity: {parity})."]


def test_reports_are_written_whole_and_replace_older_ones(tmp_path):
    out = tmp_path / "a" / "b"
    prepare_directory(out)
    for _ in range(2):
        results, card = write_report(evaluation(), out)
    assert card.read_text() == CARD
    assert json.loads(results.read_text()) == json.loads(json.dumps(evaluation().to_json()))
    assert sorted(path.name for path in out.iterdir()) == ["card.md", "results.json"]


def test_a_directory_that_cannot_be_written_is_said_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another directory with --out"):
        prepare_directory(tmp_path / "file" / "out")


def test_a_failed_write_leaves_nothing(tmp_path):
    (tmp_path / "results.json").mkdir()  # a name that cannot be replaced by a file
    with pytest.raises(UserError, match=r"results\.json failed"):
        write_report(evaluation(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_model_says_where_it_is_from_and_whether_it_was_proven(tmp_path):
    directory, file = tmp_path / "model", tmp_path / "model.gguf"
    save_master(tiny_bitnet(layers=1), directory, tiny_tokenizer())
    export_gguf(directory, file)
    assert describe_model(directory) == ModelInfo(str(directory), "directory", "master", "PyTorch (transformers)")
    assert describe_model(file) == ModelInfo(str(file), "gguf", "tq2_0", "llama.cpp (xllamacpp)", parity="no report")
    for kind, embedding in (("i2_s", "q4_1"), ("bf16", "q8_0"), ("f16", "f16")):
        export_gguf(directory, tmp_path / "other.gguf", kind, embedding=embedding)
        assert describe_model(tmp_path / "other.gguf").form == kind
    # What lies beside a file may belong to another one, and may be missing where it is moved to: the file itself says it.
    (directory / "provenance.json").write_text('{"source": "a 4-bit copy"}')
    (tmp_path / "model.gguf.parity.json").write_text('{"status": "proven"}')
    assert describe_model(directory).provenance == "a 4-bit copy"
    assert (describe_model(file).parity, describe_model(file).provenance) == ("no report", None)
    export_gguf(directory, file)
    moved = tmp_path / "elsewhere" / "renamed.gguf"
    moved.parent.mkdir()
    annotate_gguf(file, moved, ParityReport(status="unproven", reason="skipped").metadata())
    assert (describe_model(file).parity, describe_model(file).provenance) == ("no report", "a 4-bit copy")
    assert (describe_model(moved).parity, describe_model(moved).provenance) == ("unproven", "a 4-bit copy")
    (directory / "provenance.json").write_text("{")
    with pytest.raises(UserError, match=r"provenance\.json is damaged"):
        describe_model(directory)
