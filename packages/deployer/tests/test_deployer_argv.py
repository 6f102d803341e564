"""What `wf` starts: the argv of every command, and that a user's mistake is one sentence."""

import shlex
import subprocess
import sys

import pytest
from wf_deployer.cli import main

ARGV = [
    pytest.param(["convert", "src", "--out", "o"], "bitnet_arch convert src --out o", id="convert"),
    pytest.param(
        [
            "convert",
            "org/m",
            "--out",
            "o",
            "--norm",
            "none",
            "--gain",
            "one",
            "--softness",
            "0.25",
            "--granularity",
            "row",
            "--rotation",
            "--calibration",
            "c.txt",
            "--packed",
            "--json",
        ],
        "bitnet_arch convert org/m --out o --norm none --gain one --softness 0.25 --granularity row --rotation "
        "--calibration c.txt --packed --json",
        id="convert-all",
    ),
    pytest.param(["export", "d", "--out", "f.gguf"], "wrinklefree_inference export d --out f.gguf", id="export"),
    pytest.param(
        [
            "export",
            "d",
            "--out",
            "f.gguf",
            "--type",
            "tq2_0",
            "--architecture",
            "llama",
            "--embedding",
            "q8_0",
            "--positions",
            "64",
            "--unproven",
            "--json",
        ],
        "wrinklefree_inference export d --out f.gguf --type tq2_0 --architecture llama --embedding q8_0 --positions 64 "
        "--unproven --json",
        id="export-all",
    ),
    pytest.param(["generate", "m", "a b"], "wrinklefree_inference generate m 'a b'", id="generate"),
    pytest.param(
        ["generate", "m", "hi", "--max-tokens", "8", "--temperature", "0.7", "--seed", "-1", "--json"],
        "wrinklefree_inference generate m hi --max-tokens 8 --temperature 0.7 --seed=-1 --json",
        id="generate-all",
    ),
    pytest.param(
        ["generate", "m", "--seed", "1", "--", "-x"], "wrinklefree_inference generate --seed 1 -- m -x", id="generate-dash"
    ),
    pytest.param(["generate", "m", ""], "wrinklefree_inference generate m ''", id="generate-empty"),
    pytest.param(["serve", "m.gguf"], "wrinklefree_inference serve m.gguf", id="serve"),
    pytest.param(
        [
            "serve",
            "m.gguf",
            "--host",
            "::1",
            "--port",
            "0",
            "--alias",
            "a",
            "--context",
            "64",
            "--parallel",
            "3",
            "--api-key-file",
            "k",
        ],
        "wrinklefree_inference serve m.gguf --host ::1 --port 0 --alias a --context 64 --parallel 3 --api-key-file k",
        id="serve-all",
    ),
    pytest.param(["eval", "m", "--tasks", "perplexity"], "wrinklefree_eval m --tasks perplexity", id="eval"),
    pytest.param(
        ["eval", "m", "--tasks", "perplexity,sst2_local", "--out", "r", "--limit", "5", "--context", "64", "--json"],
        "wrinklefree_eval m --tasks perplexity,sst2_local --out r --limit 5 --context 64 --json",
        id="eval-all",
    ),
    pytest.param(["train"], "wrinklefree", id="train"),
    pytest.param(["train", "a=1", "+b.c=[1,2]", "~d"], "wrinklefree a=1 '+b.c=[1,2]' '~d'", id="train-overrides"),
    pytest.param(["train", "--", "--cfg"], "wrinklefree --cfg", id="train-options"),
]


@pytest.mark.parametrize(("arguments", "expected"), ARGV)
def test_dry_run_prints_the_argv(arguments, expected, capfd):
    assert main([arguments[0], "--dry-run", *arguments[1:]]) == 0
    out, err = capfd.readouterr()
    assert shlex.split(out) == [sys.executable, "-m", *shlex.split(expected)]
    assert err == ""


def test_verbose_shows_the_command_on_stderr_as_a_shell_reads_it(capfd):
    assert main(["generate", "m", "it's $(x) `y`", "--dry-run", "--verbose"]) == 0
    out, err = capfd.readouterr()
    assert err == f"+ {out}"
    read_back = subprocess.run(["bash", "-c", f"printf '%s\\n' {out}"], capture_output=True, text=True, check=True).stdout
    assert read_back.splitlines()[-1] == "it's $(x) `y`"


MISTAKES = [
    pytest.param(["convert", "x"], "--out", id="missing-option"),
    pytest.param(["generate", "m"], "PROMPT", id="missing-argument"),
    pytest.param(["conver"], "convert", id="misspelt-command"),
    pytest.param(["export", "d", "--out", "f", "--type", "q4"], "tq2_0", id="unknown-type"),
    pytest.param(["serve", "m", "--port", "70000"], "65535", id="port-out-of-range"),
    pytest.param(["eval", "m", "--tasks", "t", "--limit", "many"], "--limit", id="not-a-number"),
    pytest.param(["train", "--could", "aws"], "--cloud", id="misspelt-option"),
    pytest.param(["train", "smoke"], "KEY=VALUE", id="override-without-value"),
    pytest.param(["train", "--cloud", "azure"], "kubernetes", id="unknown-cloud"),
    pytest.param(["train", "a=1", "--spot"], "--cloud", id="cloud-option-here"),
    pytest.param(["train", "--disk-size", "9"], "--disk-size", id="cloud-number-here"),
    pytest.param(["train", "--mount", "/a=s3://b"], "--mount", id="cloud-list-here"),
    pytest.param(["train", "a=1", "--cloud", "aws"], "sky launch", id="cloud-without-dry-run"),
    pytest.param(["train", "--cloud", "aws", "--accelerators", "L4:x", "--dry-run"], "L4:1", id="accelerators"),
    pytest.param(["train", "--cloud", "aws", "--cpus", "many", "--dry-run"], "8+", id="cpus"),
    pytest.param(["train", "--cloud", "aws", "--memory", "1T", "--dry-run"], "32+", id="memory"),
    pytest.param(["train", "--cloud", "aws", "--name", "A b", "--dry-run"], "lower-case", id="name"),
    pytest.param(["train", "--cloud", "aws", "--region", "a b", "--dry-run"], "us-east-1", id="region"),
    pytest.param(["train", "--cloud", "aws", "--secret", "A-B", "--dry-run"], "HF_TOKEN", id="secret"),
    pytest.param(["train", "--cloud", "aws", "--mount", "out=s3://b", "--dry-run"], "/outputs=s3://", id="mount-path"),
    pytest.param(["train", "--cloud", "aws", "--mount", "/out=ftp://b", "--dry-run"], "gs://", id="mount-scheme"),
    pytest.param(["train", "--cloud", "aws", "--mount", "/out=./absent", "--dry-run"], "absent", id="mount-absent"),
    pytest.param(
        ["train", "--cloud", "aws", "--mount", "/o=s3://a", "--mount", "/o=s3://b", "--dry-run"], "once", id="mount-twice"
    ),
    pytest.param(["train", "--cloud", "kubernetes", "--instance-type", "g6.xlarge", "--dry-run"], "--cpus", id="instance"),
]


@pytest.mark.parametrize(("arguments", "named"), MISTAKES)
def test_a_mistake_is_one_sentence_and_exit_2(arguments, named, capfd):
    assert main(arguments) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert named in err


def test_a_secret_given_with_its_value_is_refused_without_repeating_it(capfd):
    assert main(["train", "--cloud", "aws", "--secret", "HF_TOKEN=hunter2", "--dry-run"]) == 2
    out, err = capfd.readouterr()
    assert "HF_TOKEN" in err
    assert "hunter2" not in out + err


def test_a_workdir_that_is_no_repository_is_refused(tmp_path, capfd):
    assert main(["train", "--cloud", "aws", "--workdir", str(tmp_path), "--dry-run"]) == 2
    assert str(tmp_path) in capfd.readouterr().err


@pytest.mark.parametrize("module", ["wrinklefree", "wrinklefree_eval", "wrinklefree_inference", "bitnet_arch"])
def test_a_missing_package_is_one_sentence_with_the_install_command(module, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    command = {
        "wrinklefree": ["train"],
        "wrinklefree_eval": ["eval", "m", "--tasks", "perplexity"],
        "wrinklefree_inference": ["serve", "m"],
        "bitnet_arch": ["convert", "m", "--out", "o"],
    }[module]
    monkeypatch.setitem(sys.modules, module, None)  # how Python itself marks a module that cannot be imported
    assert main(command) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(f"error: {module.replace('_', '-')} is not installed")
    assert "uv sync --all-packages" in err
    assert err.count("\n") == 1


def test_version_and_bare_help(capfd):
    assert main(["--version"]) == 0
    assert capfd.readouterr().out.startswith("wf-deployer ")
    assert main([]) == 0
    assert "doctor" in capfd.readouterr().out


COMMANDS = ["convert", "export", "generate", "serve", "eval", "train", "doctor"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command, capfd):
    assert main([command, "--help"]) == 0
    assert f"wf {command}" in capfd.readouterr().out.partition("Examples")[2]


def test_help_and_doctor_import_neither_torch_nor_another_package():
    script = f"""
import sys
from wf_deployer.cli import main
heavy = ("torch", "transformers", "sky", "bitnet_arch", "data_handler", "wrinklefree", "wrinklefree_inference", "wrinklefree_eval")
def loaded():
    return [name for name in heavy if name in sys.modules]
for arguments in [[]] + [[c, "--help"] for c in {COMMANDS!r}]:
    assert main(arguments) == 0
    assert not loaded(), (arguments, loaded())
assert main(["doctor"]) in (0, 1)
assert not loaded(), ("doctor", loaded())
assert main(["train", "a=1", "--cloud", "aws", "--dry-run"]) == 0
assert not loaded(), ("train", loaded())
print("light", file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.stderr.endswith("light\n"), done.stderr
    assert done.returncode == 0
