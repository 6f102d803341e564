"""A model through the whole house, by the commands that a person types, each in a process of its own."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import openai
import pytest
from bitnet_arch import save_master
from bitnet_arch.testing import tiny_llama, tiny_tokenizer

VOCABULARY = 512
# One thread: another test runs beside this one, and two threads wait for each other where a core is taken.
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def wf(*arguments, **options):
    command = [sys.executable, "-m", "wf_deployer", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=600, check=False, **options)
    assert done.returncode == 0, f"{arguments}: {done.stderr}"
    return done.stdout


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.timeout(1800)
def test_convert_train_export_serve_ask_and_evaluate(tmp_path):
    save_master(tiny_llama(hidden=256, ffn=512, vocab=VOCABULARY), tmp_path / "float", tiny_tokenizer())
    wf("convert", tmp_path / "float", "--out", tmp_path / "ternary")
    run = tmp_path / "run"
    wf(
        *("train", "model=bitnet_2b", f"model.pretrained={tmp_path / 'ternary'}", "training=smoke", "training.max_steps=12"),
        *("training.rows_per_step=8", "training.learning_rate=2e-3", "data.heldout_tokens=2048", "training.compare_fp=false"),
        f"output_dir={run}",
    )
    summary = json.loads((run / "summary.json").read_text())
    assert summary["gguf"]["status"] == "proven"
    assert json.loads((run / "model.gguf.parity.json").read_text())["status"] == "proven"
    wf("export", run / "model", "--out", tmp_path / "again.gguf", "--type", "q2_0", "--positions", 64)
    assert wf("generate", run / "model", "def ", "--max-tokens", 8) == wf(
        "generate", tmp_path / "again.gguf", "def ", "--max-tokens", 8
    )
    ask_server(run / "model.gguf")
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] - 0.2
    by_torch = evaluate(run / "model", "perplexity,sst2_local", tmp_path / "torch")
    by_engine = evaluate(run / "model.gguf", "sst2_local", tmp_path / "engine")
    perplexity = by_torch["tasks"]["perplexity"]["metrics"]["token_perplexity"]["value"]
    assert 1 < perplexity < 0.9 * VOCABULARY
    assert by_engine["model"]["parity"] == "proven"
    one, two = (found["tasks"]["sst2_local"] for found in (by_torch, by_engine))
    assert one["stand_in"]
    assert one["metrics"]["acc"]["value"] == two["metrics"]["acc"]["value"]


def evaluate(model, tasks, out):
    wf("eval", model, "--tasks", tasks, "--limit", 8, "--out", out)
    assert (out / "card.md").read_text().startswith("# Evaluation of")
    return json.loads((out / "results.json").read_text())


def ask_server(path):
    port = free_port()
    command = [sys.executable, "-m", "wf_deployer", "serve", str(path), "--port", str(port), "--alias", "tiny"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as reply:
                    if reply.status == 200:
                        break
            except OSError:
                pass
            assert server.poll() is None, server.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.2)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        assert [model.id for model in client.models.list()] == ["tiny"]
        answer = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hello"}], max_tokens=4, temperature=0
        )
        assert answer.usage.completion_tokens >= 1
        stream = client.completions.create(model="tiny", prompt="def ", max_tokens=4, stream=True)
        assert sum(len(chunk.choices) for chunk in stream) >= 1
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
