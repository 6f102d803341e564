"""`serve`: a second process, asked by the real `openai` client."""

import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import openai
import pytest
import torch
from bitnet_arch import UserError, load_tokenizer, save_master
from bitnet_arch.gguf import export_gguf
from bitnet_arch.testing import TEXT, tiny_bitnet, tiny_llama, tiny_tokenizer
from torch.nn import functional as F
from wrinklefree_inference import models
from wrinklefree_inference.cli import main
from wrinklefree_inference.server import api_keys, check_address

PROMPT, CONTINUATION = "The quick brown fox", " jumps over the lazy dog."
MESSAGES = [{"role": "user", "content": "The quick brown"}]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    tokenizer, model = tiny_tokenizer(), tiny_bitnet(layers=1).train()
    ids = torch.tensor(tokenizer(TEXT).input_ids)
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(60):
        rows = torch.stack([ids[s : s + 41] for s in torch.randint(0, len(ids) - 40, (8,))])
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_master(model.eval(), folder / "model", tokenizer)
    export_gguf(folder / "model", folder / "model.gguf")
    return folder


@contextmanager
def serving(*arguments, **environment):
    command = [sys.executable, "-m", "wrinklefree_inference", "serve", *map(str, arguments)]
    env = {**os.environ, **environment}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    try:
        line = process.stdout.readline()
        assert line.startswith("serving "), process.stderr.read()
        yield process, line.split(" at ")[1].split()[0]
    finally:
        process.kill()
        process.wait()


def client_of(address, key="none"):
    # A proxy of the environment has no business on the loopback interface.
    return openai.OpenAI(base_url=address, api_key=key, http_client=httpx.Client(trust_env=False), max_retries=0)


@pytest.fixture(scope="module")
def client(trained):
    with serving(trained / "model.gguf", "--port", 0, "--alias", "tiny") as (process, address):
        yield client_of(address)
        ends_cleanly(process, address, signal.SIGTERM)


def ends_cleanly(process, address, number):
    """Send a signal; the process must end with 0 and its port must be free. Returns what it wrote."""
    process.send_signal(number)
    written = process.communicate(timeout=60)
    assert process.returncode == 0
    check_address("127.0.0.1", httpx.URL(address).port)
    return written


def test_the_models_list_has_the_alias(client):
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_health_answers(client):
    address = str(client.base_url).removesuffix("/v1/")
    assert httpx.get(f"{address}/health", trust_env=False).json() == {"status": "ok"}


def test_a_completion_says_what_the_model_learnt_and_counts_tokens(client, trained):
    tokenizer = load_tokenizer(trained / "model")
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=6, temperature=0)
    assert answer.choices[0].text == CONTINUATION[: len(answer.choices[0].text)] != ""
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == len(tokenizer(PROMPT).input_ids)
    assert answer.usage.completion_tokens == 6
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 6


def test_a_streamed_completion_is_the_same_text_in_pieces(client):
    request = {"model": "tiny", "prompt": PROMPT, "max_tokens": 6, "temperature": 0}
    whole = client.completions.create(**request).choices[0].text
    events = list(client.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    pieces = [event.choices[0].text for event in events if event.choices and event.choices[0].text]
    assert "".join(pieces) == whole
    assert len(pieces) == 6
    assert events[-1].usage.completion_tokens == 6


def test_a_chat_goes_through_the_models_template(client, trained):
    tokenizer = load_tokenizer(trained / "model")
    prompt = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert prompt == "user: The quick brown\nassistant: "
    chat = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=6, temperature=0)
    plain = client.completions.create(model="tiny", prompt=prompt, max_tokens=6, temperature=0)
    assert chat.choices[0].message.content.strip() == plain.choices[0].text.strip() != ""
    assert chat.usage.prompt_tokens == plain.usage.prompt_tokens == len(tokenizer(prompt).input_ids)
    assert chat.choices[0].message.role == "assistant"


def test_a_streamed_chat_is_the_same_text_in_pieces(client):
    request = {"model": "tiny", "messages": MESSAGES, "max_tokens": 6, "temperature": 0}
    whole = client.chat.completions.create(**request).choices[0].message.content
    events = list(client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    pieces = [event.choices[0].delta.content for event in events if event.choices and event.choices[0].delta.content]
    assert "".join(pieces) == whole
    assert len(pieces) > 1
    assert events[-1].usage.completion_tokens == 6


def test_two_requests_at_once_each_get_their_own_answer(client):
    prompts = [PROMPT, "Pack my box with"]

    def ask(prompt):
        return client.completions.create(model="tiny", prompt=prompt, max_tokens=8, temperature=0).choices[0].text

    alone = [ask(prompt) for prompt in prompts]
    assert alone[0] != alone[1]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(ask, prompts * 4))
    assert together == alone * 4


def test_a_prompt_that_does_not_fit_is_a_client_error(client):
    with pytest.raises(openai.BadRequestError, match="context"):
        client.completions.create(model="tiny", prompt="a " * 3000, max_tokens=1)


def test_pages_of_other_sites_are_not_let_in(client):
    answer = httpx.get(f"{client.base_url}models", headers={"Origin": "http://elsewhere.example"}, trust_env=False)
    assert answer.headers.get("access-control-allow-origin", "") == ""


def test_ctrl_c_in_a_stream_ends_it_and_keys_are_asked_for_and_never_shown(trained, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("first-secret\n\nsecond-secret\n")
    with serving(trained / "model.gguf", "--port", 0, "--api-key-file", keys, "--verbose") as (process, address):
        with pytest.raises(openai.AuthenticationError):
            client_of(address, "wrong").models.list()
        for key in ("first-secret", "second-secret"):
            answer = client_of(address, key).completions.create(model="model", prompt="PRIVATE", max_tokens=1)
            assert answer.usage.completion_tokens == 1
        request = {"model": "model", "prompt": PROMPT, "max_tokens": 400, "temperature": 3, "extra_body": {"ignore_eos": True}}
        next(iter(client_of(address, "first-secret").completions.create(**request, stream=True)))
        output, errors = ends_cleanly(process, address, signal.SIGINT)
    assert "loading model" in errors  # the log is there
    for secret in ("secret", "PRIVATE"):
        assert secret not in output + errors


def test_a_key_may_come_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("WF_API_KEY", raising=False)
    assert api_keys(None) == []
    monkeypatch.setenv("WF_API_KEY", "k")
    assert api_keys(None) == ["k"]
    (tmp_path / "empty").write_text("\n")
    for file, words in ((tmp_path / "empty", "is empty"), (tmp_path / "missing", "cannot be read")):
        with pytest.raises(UserError, match=words):
            api_keys(file)


def test_an_address_that_cannot_be_had_says_why():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} on 127.0.0.1 is in use"):
            check_address("127.0.0.1", port)
    check_address("127.0.0.1", port)
    with pytest.raises(UserError, match="not an address of this machine"):
        check_address("192.0.2.1", 0)
    with pytest.raises(UserError, match="cannot be resolved"):
        check_address("no host", 0)


def test_a_port_in_use_by_a_server_is_one_sentence(client, trained, capfd):
    port = str(client.base_url.port)
    assert main(["serve", str(trained / "model.gguf"), "--port", port]) == 2
    assert capfd.readouterr().err == f"error: port {port} on 127.0.0.1 is in use: choose another with --port, or 0 for a free one\n"


def mistakes():
    yield "missing", ["nowhere.gguf"], "does not exist"
    yield "no GGUF", ["junk.gguf"], "not a GGUF file"
    yield "truncated", ["truncated.gguf"], "could not load"
    yield "not ternary", ["float"], "is not ternary"
    yield "no model", ["."], "no config.json"
    yield "port", ["model.gguf", "--port", "99999"], "does not exist"
    yield "context", ["model.gguf", "--context", "0"], "at least 8"
    yield "parallel", ["model.gguf", "--parallel", "0"], "at least 1"


@pytest.mark.parametrize(("arguments", "words"), [m[1:] for m in mistakes()], ids=[m[0] for m in mistakes()])
def test_a_mistake_is_one_sentence(arguments, words, trained, capfd, monkeypatch):
    monkeypatch.chdir(trained)
    (trained / "junk.gguf").write_text("hello")
    whole = (trained / "model.gguf").read_bytes()
    (trained / "truncated.gguf").write_bytes(whole[: len(whole) // 2])
    if not (trained / "float").exists():
        save_master(tiny_llama(layers=1), trained / "float", tiny_tokenizer())
    assert main(["serve", *arguments, *([] if "--port" in arguments else ["--port", "0"])]) == 2
    captured = capfd.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err


def test_a_directory_is_exported_once_and_again_when_it_changes(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("WF_CACHE", str(tmp_path))
    said = []
    first = models.exported(trained / "model", said.append)
    assert said[0].startswith("exporting ")
    assert json.loads(first.with_name("model.gguf.parity.json").read_text())["status"] == "proven"
    said.clear()
    assert models.exported(trained / "model", said.append) == first
    assert said == []
    digest = models.directory_digest(trained / "model")
    changed = tmp_path / "changed"
    changed.mkdir()
    for file in (trained / "model").iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    assert models.directory_digest(changed) == digest
    (changed / "config.json").write_text((changed / "config.json").read_text() + "\n")
    assert models.directory_digest(changed) != digest


@pytest.mark.slow
def test_a_directory_is_served_from_the_cache(trained, tmp_path):
    with serving(trained / "model", "--port", 0, WF_CACHE=str(tmp_path)) as (_, address):
        client = client_of(address)
        assert [model.id for model in client.models.list()] == ["model"]
        answer = client.completions.create(model="model", prompt=PROMPT, max_tokens=6, temperature=0)
        assert answer.choices[0].text == CONTINUATION[: len(answer.choices[0].text)] != ""
