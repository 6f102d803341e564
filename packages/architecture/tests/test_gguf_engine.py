"""Exported files run in llama.cpp (xllamacpp), an engine that this project did not write."""

import json
import urllib.request

import numpy as np
import pytest
import torch
import xllamacpp
from bitnet_arch import load_model, save_master, set_lambda
from bitnet_arch.gguf import export_gguf, read_gguf
from bitnet_arch.testing import TEXT, tiny_bitnet, tiny_tokenizer
from torch.nn import functional as F

POSITIONS = 64
VOCAB = 512


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny ternary model trained until its predictions are far from uniform, and the ids it is asked about."""
    directory = tmp_path_factory.mktemp("trained") / "m"
    tokenizer, model = tiny_tokenizer(VOCAB), tiny_bitnet(vocab=VOCAB).train()
    ids = torch.tensor(tokenizer(TEXT).input_ids)
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(40):
        start = torch.randint(0, len(ids) - 33, (8,))
        rows = torch.stack([ids[s : s + 33] for s in start])
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_master(model.eval(), directory, tokenizer)
    return directory, ids[:POSITIONS].tolist()


def complete(address, request):
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(f"{address}/completion", json.dumps(request).encode(), headers)) as reply:
        return json.load(reply)


def engine_logprobs(path, ids):
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel = 128, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    rows = np.full((len(ids), VOCAB), -np.inf)
    for i in range(len(ids)):
        request = {"prompt": ids[: i + 1], "n_predict": 1, "n_probs": VOCAB, "temperature": -1.0, "cache_prompt": False}
        answer = complete(server.listening_address, request)
        for entry in answer["completion_probabilities"][0]["top_logprobs"]:
            rows[i, entry["id"]] = entry["logprob"]
    return rows


@torch.no_grad()
def torch_logprobs(model, ids):
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1).numpy()


def mean_kl(p, q):
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def model_of_file(directory, path):
    """The training model with the file's own matrices and without quantisers: what an F16 file must compute."""
    model, written = load_model(directory), read_gguf(path)
    set_lambda(model, 0.0)
    short = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    for i, layer in enumerate(model.model.layers):
        with torch.no_grad():
            for name, gguf_name in short.items():
                getattr(layer.self_attn, name).weight.copy_(torch.from_numpy(written.dequantize(f"blk.{i}.{gguf_name}.weight")))
            for name in ("gate", "up", "down"):
                getattr(layer.mlp, f"{name}_proj").weight.copy_(torch.from_numpy(written.dequantize(f"blk.{i}.ffn_{name}.weight")))
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.from_numpy(written.dequantize("token_embd.weight")))
    return model


def test_llama_cpp_computes_what_an_f16_file_says_and_a_wrong_rope_base_is_seen(trained, tmp_path):
    directory, ids = trained
    export_gguf(directory, tmp_path / "f16.gguf", "f16")
    engine = engine_logprobs(tmp_path / "f16.gguf", ids)
    model = model_of_file(directory, tmp_path / "f16.gguf")
    expected = torch_logprobs(model, ids)
    print("f16 mean KL", mean_kl(expected, engine))
    assert np.isfinite(engine).all()
    assert abs(mean_kl(expected, engine)) < 1e-5
    model.model.rotary_emb.inv_freq.mul_(0.8)
    assert mean_kl(torch_logprobs(model, ids), engine) > 1e-4


@pytest.mark.parametrize("kind", ["tq1_0", "tq2_0", "q2_0"])
def test_llama_cpp_stays_near_the_training_forward_on_ternary_files(kind, trained, tmp_path):
    directory, ids = trained
    export_gguf(directory, tmp_path / "out.gguf", kind)
    engine = engine_logprobs(tmp_path / "out.gguf", ids)
    expected = torch_logprobs(load_model(directory), ids)
    print(kind, "mean KL against training", mean_kl(expected, engine))
    # The engine quantises activations by blocks, training by tokens: near, not equal.
    assert mean_kl(expected, engine) < 5e-4
    margin = np.sort(expected, -1)[:, -1] - np.sort(expected, -1)[:, -2]
    agree = expected.argmax(-1) == engine.argmax(-1)
    assert agree[margin > 0.2].all()
