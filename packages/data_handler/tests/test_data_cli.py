import json
import re
from pathlib import Path

import pytest
from data_handler import documents, is_heldout, load_config
from data_handler.__main__ import main


@pytest.fixture
def own(tmp_path, words):
    lines = [json.dumps({"text": text}) + "\n" for text in words["a"]]
    (tmp_path / "own.jsonl").write_text("".join(lines))
    (tmp_path / "own.yaml").write_text(f"sources: [{{name: own, kind: jsonl, path: {tmp_path}/own.jsonl}}]\nheldout_share: 0.2\n")
    return tmp_path


def test_statistics_count_what_is_there(own, words, byte_tokenizer, capsys):
    byte_tokenizer.save_pretrained(own / "tokenizer")
    assert main(["stats", str(own / "own.yaml"), "--json", "--tokenizer", str(own / "tokenizer")]) == 0
    held = [t for t in words["a"] if is_heldout(t, 0.2)]
    assert json.loads(capsys.readouterr().out)["domains"] == [
        {
            "domain": "own",
            "kind": "jsonl",
            "weight": 1.0,
            "documents": len(words["a"]),
            "characters": sum(map(len, words["a"])),
            "tokens": sum(len(t) + 1 for t in words["a"]),
            "heldout_documents": len(held),
            "heldout_characters": sum(map(len, held)),
            "heldout_tokens": sum(len(t) + 1 for t in held),
            "complete": True,
        }
    ]
    assert main(["stats", str(own / "own.yaml"), "--limit", "3"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^own +3 ", out, re.MULTILINE)
    assert "only the first 3 documents" in out
    assert "tokens" not in out


def test_the_demo_is_counted(capsys):
    assert main(["stats", "demo", "--json"]) == 0
    domains = json.loads(capsys.readouterr().out)["domains"]
    assert [d["domain"] for d in domains] == ["code", "prose"]
    for domain, source in zip(domains, load_config("demo").sources, strict=True):
        assert domain["documents"] == len(list(documents(source)))
        assert 0 < domain["heldout_documents"] < domain["documents"]
        assert domain["characters"] > 500_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stats", "demmo"], "no data configuration 'demmo'"),
        (["stats", "demo", "--limit", "0"], "--limit must be at least 1"),
        (["stats", "demo", "--tokenizer", "nowhere"], "--tokenizer nowhere is not a directory"),
        (["stats", "OWN", "--tokenizer", "EMPTY"], "holds no tokenizer"),
        (["stats", "EMPTY.yaml"], "source own is empty"),
        (["stats", "fineweb_edu"], "HuggingFaceFW/fineweb-edu could not be opened"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(arguments, message, own, capsys, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (own / "empty").mkdir()
    (own / "empty.yaml").write_text(f"sources: [{{name: own, kind: text, path: {own}/empty}}]")
    (own / "empty" / "a.txt").write_text(" ")
    names = {"OWN": own / "own.yaml", "EMPTY": own / "empty", "EMPTY.yaml": own / "empty.yaml"}
    assert main([str(names.get(a, a)) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_an_interruption_is_75(monkeypatch, capsys):
    def interrupt(_source):
        raise KeyboardInterrupt

    monkeypatch.setattr("data_handler.__main__.records", interrupt)
    assert main(["stats", "demo"]) == 75
    assert "interrupted" in capsys.readouterr().err


def test_the_readme_example_runs(capsys):
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    exec(code, {})
    assert capsys.readouterr().out.splitlines() == ["torch.Size([8, 128])", "8", "True"]
