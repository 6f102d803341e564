"""Model cards, and pushing to a hub: a loopback server that answers as the hub does and keeps what it gets."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from bitnet_arch import ConversionConfig, UserError, convert_model, load_model, open_weights, save_master, save_packed
from bitnet_arch.__main__ import main
from bitnet_arch.diffusion import add_mask_token
from bitnet_arch.hub import write_model_card
from bitnet_arch.lrc.model import start_lrc
from bitnet_arch.parity.proof import source_digest
from bitnet_arch.testing import tiny_bitnet, tiny_llama, tiny_tokenizer
from huggingface_hub import ModelCard

PROVENANCE = "owner/tiny-model as packaged by somebody: a 4-bit copy"


def own():
    return convert_model(tiny_llama(hidden=64, ffn=128), ConversionConfig(norm="allnorm", gain="one", granularity="row"))


@pytest.mark.parametrize("kind", ["stock", "own"])
@pytest.mark.parametrize("save", [save_master, save_packed], ids=["master", "packed"])
def test_a_card_says_what_the_files_say(save, kind, tmp_path):
    model = tiny_bitnet(hidden=64, ffn=128) if kind == "stock" else own()
    save(model, tmp_path / "m", provenance=PROVENANCE)
    assert not (tmp_path / "m/README.md").exists()
    with open_weights(tmp_path / "m") as reader:
        details = {"source_sha256": source_digest(reader)}
    report = {"status": "proven", "reason": "a qualification", "engine": "an-engine", "engine_version": "3", "positions": 1980}
    report["details"] = details
    (tmp_path / "m.gguf.parity.json").write_text(json.dumps(report))
    path = write_model_card(tmp_path / "m", license_id="apache-2.0", parity=tmp_path / "m.gguf.parity.json")
    card = ModelCard.load(path)  # the hub's own reader
    data = card.data.to_dict()
    assert (data["base_model"], data["license"], data["library_name"]) == ("owner/tiny-model", "apache-2.0", "transformers")
    assert data["parity"] == "proven"
    assert "ternary" in data["tags"]
    assert PROVENANCE in card.text
    assert "an-engine 3, 1980 positions; a qualification" in card.text
    assert ("import bitnet_arch" in card.text) == (kind == "own")
    ternary = sum(m.weight.numel() for n, m in model.named_modules() if n.endswith("_proj"))
    total = sum(p.numel() for p in model.parameters())
    scales = sum(m.weight.shape[0] if kind == "own" else 1 for n, m in model.named_modules() if n.endswith("_proj"))
    assert f"| ternary weights | {ternary} |" in card.text
    stored = 32 * ternary if save is save_master else 2 * ternary + 32 * scales
    stored += 32 * (total - ternary + (14 if kind == "own" else 0))  # a norm of our own keeps its epsilon
    bits = stored / total
    assert data["bits_per_weight"] == pytest.approx(bits, abs=1e-3)


def test_a_card_takes_no_other_models_report(tmp_path):
    save_packed(tiny_bitnet(hidden=64, ffn=128), tmp_path / "m")
    (tmp_path / "p.json").write_text(json.dumps({"status": "proven", "reason": "", "details": {"source_sha256": "0"}}))
    with pytest.raises(UserError, match="report of another model's file"):
        write_model_card(tmp_path / "m", parity=tmp_path / "p.json")
    with pytest.raises(UserError, match="does not exist"):
        write_model_card(tmp_path / "m", parity=tmp_path / "nope.json")


def test_a_card_names_the_low_rank_correction_and_counts_its_bits(tmp_path):
    save_packed(start_lrc(own(), 6), tmp_path / "lrc")
    save_packed(own(), tmp_path / "plain")
    bits = {}
    for name in ("lrc", "plain"):
        text = write_model_card(tmp_path / name).read_text()
        assert ("| low-rank correction | rank 6, float16 |" in text) == (name == "lrc")
        bits[name] = float(next(line for line in text.splitlines() if "bits per ternary weight" in line).split("|")[2])
    assert bits["lrc"] > bits["plain"] + 1


@pytest.mark.parametrize("block_size", [8, None])
def test_a_card_of_a_diffusion_model_says_how_it_is_decoded_and_that_runs(block_size, tmp_path, capsys):
    model, tokenizer = tiny_bitnet(hidden=64, ffn=128), tiny_tokenizer()
    save_master(model, tmp_path / "plain", tokenizer)
    form = add_mask_token(model, tokenizer, block_size=block_size, token_shift=block_size is not None)
    save_packed(model, tmp_path / "m", tokenizer)
    plain, text = (write_model_card(tmp_path / name).read_text() for name in ("plain", "m"))
    blocks = "blocks of 8, from left to right," if block_size else "the whole text"
    place = "the position before it" if block_size else "its own position"
    for line in (
        f"| decoding | by diffusion: masked tokens of {blocks} are filled in, several in one forward |",
        f"| mask token | number {form.mask_token_id} |",
        f"| a token is read from | {place} |",
    ):
        assert line in text
    assert "diffusion" not in plain
    assert "mask token" not in plain
    code = text.partition("```python\n")[2].partition("```")[0].replace("path/or/id", str(tmp_path / "m"))
    exec(compile(code, "card", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_a_card_claims_nothing_that_is_not_known(tmp_path):
    save_packed(tiny_bitnet(hidden=64, ffn=128), tmp_path / "m")
    text = write_model_card(tmp_path / "m").read_text()
    for key in ("license", "base_model", "parity", "Weights:"):
        assert key not in text
    (tmp_path / "p.json").write_text(json.dumps({"status": "unproven", "reason": "no engine ran"}))
    card = ModelCard.load(write_model_card(tmp_path / "m", parity=tmp_path / "p.json"))
    assert card.data.to_dict()["parity"] == "unproven"
    assert "no engine ran" in card.text
    for content in ({"status": "failed"}, {}):
        (tmp_path / "p.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match="is no report"):
            write_model_card(tmp_path / "m", parity=tmp_path / "p.json")
    save_packed(tiny_bitnet(hidden=64, ffn=128), tmp_path / "m")  # a directory with our card is still a model's
    assert not (tmp_path / "m/README.md").exists()


def test_a_card_of_somebody_else_is_left_alone(tmp_path):
    save_packed(tiny_bitnet(hidden=64, ffn=128), tmp_path / "m")
    (tmp_path / "m/README.md").write_text("# my model\n")
    with pytest.raises(UserError, match="written by somebody else"):
        write_model_card(tmp_path / "m")
    with pytest.raises(UserError, match="not a model directory"):
        save_packed(tiny_bitnet(hidden=64, ffn=128), tmp_path / "m")
    assert (tmp_path / "m/README.md").read_text() == "# my model\n"
    save_master(tiny_llama(hidden=64, ffn=128), tmp_path / "float")
    with pytest.raises(UserError, match="is a float model"):
        write_model_card(tmp_path / "float")


# ------------------------------------------------------------------------------------------------------------ pushing


class Hub(BaseHTTPRequestHandler):
    """Answers what `push_to_hub` asks: create, card (none yet), how to upload (in the commit), commit."""

    files: dict[str, bytes]

    def log_message(self, *args):
        pass

    def answer(self, value, status=200, **headers):
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, header in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), header)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        self.answer({}, 404, X_Error_Code="EntryNotFound")

    def do_GET(self):
        self.answer({"error": "not found"}, 404, X_Error_Code="EntryNotFound")

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        url = f"http://{self.headers['Host']}/someone/tiny"
        if self.path == "/api/repos/create":
            self.answer({"url": url, "name": "someone/tiny"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"{url}/commit/0", "commitOid": "0" * 40, "pullRequestUrl": None})
        else:
            self.answer({"error": self.path}, 500)


PUSH = """
import sys, bitnet_arch
bitnet_arch.load_model(sys.argv[1]).push_to_hub("someone/tiny", token="hf_" + "x" * 34, tags=["ternary"])
"""


@pytest.mark.parametrize(
    ("kind", "save"),
    [
        pytest.param("stock", save_packed, id="stock-packed"),
        pytest.param("own", save_master, id="own-master"),
        pytest.param("stock", save_master, id="stock-master", marks=pytest.mark.slow),
        pytest.param("own", save_packed, id="own-packed", marks=pytest.mark.slow),
    ],
)
def test_push_to_hub_sends_what_load_model_reads(kind, save, tmp_path):
    save(tiny_bitnet(hidden=64, ffn=128) if kind == "stock" else own(), tmp_path / "m")
    model = load_model(tmp_path / "m")
    handler = type("Handler", (Hub,), {"files": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        environment = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
        environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        done = subprocess.run(
            [sys.executable, "-c", PUSH, str(tmp_path / "m")], env=environment, capture_output=True, text=True, check=False
        )
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr
    (tmp_path / "got").mkdir()
    for name, content in handler.files.items():
        (tmp_path / "got" / name).write_bytes(content)
    assert {"config.json", "model.safetensors", "README.md"} <= handler.files.keys()
    assert ModelCard.load(tmp_path / "got/README.md").data.tags == ["ternary"]
    ids = torch.arange(24)[None]
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "got")(ids).logits, model(ids).logits)


def test_the_command_writes_a_card_of_a_conversion_with_scales_by_row_and_a_rotation(tmp_path, capsys):
    save_master(tiny_llama(hidden=64, ffn=128), tmp_path / "float", tiny_tokenizer())
    options = ["--granularity", "row", "--rotation"]
    assert main(["convert", str(tmp_path / "float"), "--out", str(tmp_path / "rows"), *options]) == 0
    assert main(["convert", str(tmp_path / "float"), "--out", str(tmp_path / "plain")]) == 0
    for name, scale, rotation in (("rows", "row", "block Hadamard"), ("plain", "tensor", "none")):
        assert main(["card", str(tmp_path / name), "--license", "apache-2.0"]) == 0
        text = (tmp_path / name / "README.md").read_text()
        assert f"| a scale for | {scale} |" in text
        assert f"| rotation | {rotation}" in text
        assert "license: apache-2.0" in text
    capsys.readouterr()
    assert main(["card", str(tmp_path / "float")]) == 2
    assert "convert it before it gets a card" in capsys.readouterr().err
