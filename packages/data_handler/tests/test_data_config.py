import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from data_handler import DataConfig, SourceConfig, UserError, config_directory, config_names, load_config, parse_config

ROOT = Path(__file__).parents[1]
TEXT = SourceConfig(name="own", kind="text", path="x")


@pytest.mark.parametrize("name", config_names())
def test_every_packaged_configuration_is_valid(name):
    config = load_config(name)
    assert isinstance(config, DataConfig)
    assert load_config(str(config_directory() / f"{name}.yaml")) == config


def test_the_packaged_names_include_the_documented_ones():
    assert {"demo", "fineweb_edu", "jsonl", "text"} <= set(config_names())
    assert [source.kind for source in load_config("demo").sources] == ["stdlib_code", "stdlib_prose"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": ""}, "name must be a non-empty string"),
        ({"kind": "csv"}, "source own: kind must be one of stdlib_code, .*, not 'csv'"),
        ({"kind": ["text"]}, "kind must be one of"),
        ({"path": None}, "source own: path must be a non-empty string"),
        ({"path": 3}, "path must be a non-empty string, not 3"),
        ({"dataset": "x/y"}, "source own: dataset has no effect on kind text, remove it"),
        ({"text_column": "body"}, "text_column has no effect on kind text"),
        ({"kind": "stdlib_code"}, "path has no effect on kind stdlib_code"),
        ({"kind": "hub", "path": None}, "dataset must be a non-empty string"),
        ({"kind": "hub", "dataset": "x/y"}, "path has no effect on kind hub"),
        ({"kind": "hub", "path": None, "dataset": "x/y", "split": ""}, "split must be a non-empty string"),
        ({"kind": "package", "path": "numpy"}, "path must be DISTRIBUTION:GLOB"),
        ({"weight": 0}, "weight must be a number above 0, not 0"),
        ({"weight": float("nan")}, "weight must be a number above 0"),
        ({"weight": True}, "weight must be a number above 0"),
        ({"weight": "1"}, "weight must be a number above 0"),
    ],
)
def test_a_source_names_its_wrong_field(fields, message):
    with pytest.raises(UserError, match=message):
        SourceConfig(**{"name": "own", "kind": "text", "path": "x", **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sources": ()}, "sources must be a non-empty list"),
        ({"sources": (TEXT, TEXT)}, "the name own is used twice"),
        ({"sources": ("x",)}, "sources must be"),
        ({"sequence_length": 1}, "sequence_length must be a whole number of at least 2, not 1"),
        ({"sequence_length": 8.0}, "sequence_length must be a whole number"),
        ({"heldout_share": 1.0}, "heldout_share must be at least 0 and below 1, not 1.0"),
        ({"heldout_share": None}, "heldout_share must be"),
        ({"heldout_tokens": 0}, "heldout_tokens must be"),
        ({"packing": "yes"}, "packing must be true or false, not 'yes'"),
        ({"packing_buffer": 0}, "packing_buffer must be a whole number of at least 1"),
        ({"packing": False, "packing_buffer": 8}, "packing_buffer has no effect without packing"),
    ],
)
def test_a_configuration_names_its_wrong_field(fields, message):
    with pytest.raises(UserError, match=message):
        DataConfig(**{"sources": (TEXT,), **fields})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sources: [{name: a, kind: text, path: x, wieght: 2}]", "source 1 has an unknown key 'wieght': the keys are name, kind"),
        ("sources: [{name: a, kind: text, path: x}]\nseq_len: 4", "unknown key 'seq_len': the keys are sources, sequence_length"),
        ("sources: [{kind: text, path: x}]", "source 1 has no name"),
        ("sources: [text]", "source 1 must be a mapping"),
        ("sequence_length: 4", "needs `sources`"),
        ("sources: [", "is not valid YAML"),
        ("- a", "must be a mapping with `sources`"),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence(text, message, tmp_path):
    path = tmp_path / "data.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load_config(str(path))
    assert "\n" not in str(caught.value)


def test_an_unknown_name_lists_the_known_ones(tmp_path):
    with pytest.raises(UserError, match="no data configuration 'demmo': use chat, demo, fineweb_edu"):
        load_config("demmo")
    with pytest.raises(UserError, match=r"missing\.yaml cannot be read"):
        load_config(str(tmp_path / "missing.yaml"))


def test_a_parsed_mapping_equals_the_dataclass():
    raw = {"sources": [{"name": "own", "kind": "text", "path": "x", "weight": 2}], "packing": False, "heldout_share": 0}
    expected = DataConfig(sources=(SourceConfig(name="own", kind="text", path="x", weight=2),), packing=False, heldout_share=0)
    assert parse_config(raw) == expected


def test_the_configurations_are_found_in_the_layout_of_a_wheel(tmp_path):
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    for package in wheel["packages"]:
        shutil.copytree(ROOT / package, tmp_path / Path(package).name, ignore=shutil.ignore_patterns("__pycache__"))
    for source, target in wheel["force-include"].items():
        shutil.copytree(ROOT / source, tmp_path / target)
    code = "import data_handler as d; print(d.__file__); print(d.config_directory()); print(d.load_config('demo').sources[0].kind)"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout.split() == [
        str(tmp_path / "data_handler" / "__init__.py"),
        str(tmp_path / "data_handler" / "configs" / "data"),
        "stdlib_code",
    ]
