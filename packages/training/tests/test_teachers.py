"""Teachers: where they run, what they keep, and servers over a real loopback."""

import copy
import errno
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from bitnet_arch import UserError, save_master
from bitnet_arch.testing import tiny_llama, tiny_tokenizer
from safetensors.torch import load_file, save_file
from wrinklefree import exporting
from wrinklefree.callbacks import read_metrics
from wrinklefree.cli import load_run_config, main
from wrinklefree.losses.divergence import top_log_probabilities
from wrinklefree.resume import KEY, check_config, check_teacher, plain
from wrinklefree.teachers import local
from wrinklefree.teachers.cache import DiskCache
from wrinklefree.teachers.load import check_tokenizer, load_teacher
from wrinklefree.teachers.local import LocalTeacher, _move_all_but
from wrinklefree.teachers.remote import RemoteSource, read_key
from wrinklefree.teachers.settings import TeacherConfig
from wrinklefree.teachers.tops import LocalSource, TopTeacher, piece_spans
from wrinklefree.views import Head, Needs, model_logits

K = 5


def llama(seed=0):
    return tiny_llama(hidden=32, ffn=64, layers=2, vocab=512, seed=seed)


def batch(order=(0, 1, 2)):
    """Rows of two documents each and padding; the same documents whatever the order of rows."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 512, (3, 12), generator=generator)[list(order)]
    documents = torch.tensor([[1] * 5 + [2] * 4 + [0] * 3]).expand(3, 12)
    positions = torch.tensor([[*range(5), *range(4), 0, 0, 0]]).expand(3, 12)
    return {"input_ids": ids, "document_ids": documents, "position_ids": positions}


class Counting(LocalSource):
    """Counts what it is asked for."""

    asked = 0

    def tops(self, pieces):
        self.asked += len(pieces)
        return super().tops(pieces)


def counting(seed=0):
    return Counting(LocalTeacher(llama(seed), "tiny"), K, 2.0)


def test_documents_are_found_in_their_rows():
    spans = piece_spans(torch.tensor([[1, 1, 2, 0], [1, 1, 1, 1], [0, 0, 0, 0]]))
    assert spans == [(0, 2), (2, 3), (4, 8)]


def test_pieces_alone_are_answered_as_in_their_rows():
    data, model = batch(), llama()
    lesson = TopTeacher(counting(), K).lesson(data, Needs(logits=True))
    positions = (data["document_ids"].flatten() > 0).nonzero()[:, 0]
    values, tokens, _ = lesson.targets.top(positions, K, 2.0)
    expected, chosen, _ = top_log_probabilities(model_logits(model, data).flatten(0, 1)[positions], K, 2.0)
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-4)
    assert (tokens == chosen).float().mean() > 0.98


def test_pieces_are_asked_where_the_batch_is_and_found_in_main_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: self.clone())  # as of a batch on another device: a copy
    asked, found = [], []

    class Source(LocalSource):
        def tops(self, pieces):
            asked.extend(piece.untyped_storage().data_ptr() for piece in pieces)
            return super().tops(pieces)

    class Cache(DiskCache):
        def get(self, piece):
            found.append(piece.untyped_storage().data_ptr())
            return super().get(piece)

    data = batch()
    TopTeacher(Source(LocalTeacher(llama(), "tiny"), K, 2.0), K, Cache(tmp_path, K, 512)).lesson(data, Needs(logits=True))
    own = data["input_ids"].untyped_storage().data_ptr()
    assert len(asked) == len(found) == 6
    assert set(asked) == {own}
    assert own not in found


def test_a_second_epoch_in_another_order_runs_no_teacher_and_gets_the_same_bits(tmp_path):
    first = counting()
    teacher = TopTeacher(first, K, DiskCache(tmp_path / "cache", K, 512, shard_tokens=20))
    before = teacher.lesson(batch(), Needs(logits=True)).targets.top(torch.arange(36), K, 2.0)
    assert first.asked == 6
    teacher.close()
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 2
    again = counting()
    teacher = TopTeacher(again, K, DiskCache(tmp_path / "cache", K, 512))
    after = teacher.lesson(batch((2, 0, 1)), Needs(logits=True)).targets.top(torch.arange(36), K, 2.0)
    assert again.asked == 0
    rows = torch.tensor([2, 0, 1])
    for a, b in zip(before[:2], after[:2], strict=True):
        assert torch.equal(a.view(3, 12, K)[rows], b.view(3, 12, K))
    # Control: what is not in it is asked for.
    other = batch() | {"input_ids": batch()["input_ids"] + 0}
    other["input_ids"][0, 0] = 511 - other["input_ids"][0, 0]
    teacher.lesson(other, Needs(logits=True))
    assert again.asked == 1


def test_a_cache_that_cannot_be_kept_there_asks_for_another_place(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"choose another teacher\.cache_dir and run again") as found:
        DiskCache(tmp_path / "file" / "x", K, 512)
    assert "space" not in str(found.value)
    monkeypatch.setattr(Path, "mkdir", lambda *args, **kwargs: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(UserError, match=r"free some space, or choose another teacher\.cache_dir, and run again"):
        DiskCache(tmp_path / "y", K, 512)


def test_a_damaged_shard_and_one_of_another_k_are_named(tmp_path):
    cache = DiskCache(tmp_path, K, 512)
    cache.put(torch.arange(4), torch.zeros(4, K), torch.zeros(4, K, dtype=torch.int64))
    cache.flush()
    shard = next(tmp_path.glob("*.safetensors"))
    assert set(load_file(shard)) == {"keys", "starts", "tokens", "log_probabilities"}
    with pytest.raises(UserError, match="of another top_k"):
        DiskCache(tmp_path, K + 1, 512)
    assert len(DiskCache(tmp_path, K, 1)) == 1  # token 0 alone is in it
    tensors = load_file(shard)
    for wrong in (512, -1):
        tensors["tokens"][2, 1] = wrong
        save_file(tensors, shard)
        with pytest.raises(
            UserError, match=rf"{shard.name} of the teacher's cache names token {wrong}, and the vocabulary has 512"
        ):
            DiskCache(tmp_path, K, 512)
    shard.write_bytes(shard.read_bytes()[:50])
    with pytest.raises(UserError, match="is damaged"):
        DiskCache(tmp_path, K, 512)


def test_teachers_with_other_weights_have_other_digests_and_precision_acts():
    a, b = LocalTeacher(llama(0), "a"), LocalTeacher(llama(1), "b")
    assert a.digest == LocalTeacher(llama(0), "again").digest != b.digest
    half = LocalTeacher(llama(0).to(torch.bfloat16), "half")
    full, low = (t.lesson(batch(), Needs(logits=True)).targets.full(torch.arange(9)) for t in (a, half))
    assert low.dtype == torch.float32
    assert 0 < float((full - low).abs().max()) < 0.1
    assert all(not p.requires_grad for p in a.model.parameters())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_parameters", {"rope_theta": 3.0, "rope_type": "default"}),
        ("rms_norm_eps", 1e-2),
        ("hidden_act", "gelu"),
        ("text_config", {"sliding_window": 4}),
    ],
)
def test_teachers_with_equal_weights_that_compute_otherwise_have_other_digests(key, value):
    digest, other = LocalTeacher(llama(), "one").digest, llama()
    setattr(other.config, key, value)
    assert LocalTeacher(other, "other").digest != digest


def test_where_a_teacher_lies_and_what_wrote_it_change_no_digest():
    digest, moved = LocalTeacher(llama(), "one").digest, llama()
    moved.config._name_or_path, moved.config.architectures = "elsewhere", ["LlamaForCausalLM"]
    moved.config.transformers_version = "4.0.0"
    assert LocalTeacher(moved, "moved").digest == digest


@pytest.mark.parametrize("tied", [True, False])
def test_all_but_the_head_moves_aside_and_comes_back(tied):
    model = tiny_llama(hidden=32, ffn=64, layers=2, vocab=512, tied=tied)
    before = LocalTeacher(model, "tiny").lesson(batch(), Needs(logits=True)).targets.full(torch.arange(9))
    head = Head(model).module
    # Another type stands for another device, of which there may be none.
    _move_all_but(model, head, torch.float64)
    moved = {name: tensor.dtype == torch.float64 for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    stays = {"model.embed_tokens.weight"} if tied else {"lm_head.weight"}
    assert {name for name, away in moved.items() if not away} == stays
    assert len(moved) > 10
    model.to(torch.float32)
    after = LocalTeacher(model, "tiny").lesson(batch(), Needs(logits=True)).targets.full(torch.arange(9))
    assert torch.equal(before, after)


def test_an_offloaded_teacher_puts_its_weights_aside_and_says_the_same(monkeypatch):
    seen = []
    monkeypatch.setattr(local, "_move_all_but", lambda model, kept, device: seen.append((model, kept, device)))
    plain, offloaded = LocalTeacher(llama(), "plain"), LocalTeacher(llama(), "aside", offload=True)
    a = plain.lesson(batch(), Needs(logits=True)).targets.full(torch.arange(9))
    assert not seen
    b = offloaded.lesson(batch(), Needs(logits=True)).targets.full(torch.arange(9))
    assert seen == [(offloaded.model, Head(offloaded.model).module, "cpu")]
    assert torch.equal(a, b)


def test_tokenizers_that_differ_are_refused_with_the_reason():
    check_tokenizer(tiny_tokenizer(), tiny_tokenizer(), "same")
    with pytest.raises(UserError, match="it has 600 tokens, the model's 512"):
        check_tokenizer(tiny_tokenizer(512), tiny_tokenizer(600), "longer")
    other = tiny_tokenizer(512, around="<|begin|> $A")
    with pytest.raises(UserError, match=r"token '.*' is .* there and .* here"):
        check_tokenizer(tiny_tokenizer(512), other, "other")


def test_the_students_own_mask_token_is_no_difference_and_any_other_token_is():
    masked, other = tiny_tokenizer(512), tiny_tokenizer(512)
    masked.add_special_tokens({"mask_token": "<|mask|>"})
    check_tokenizer(masked, tiny_tokenizer(512), "the original")
    other.add_special_tokens({"mask_token": "<|other|>"})
    with pytest.raises(UserError, match="it has 512 tokens, the model's 513"):
        check_tokenizer(other, tiny_tokenizer(512), "the original")
    with pytest.raises(UserError, match="it has 513 tokens, the model's 512"):
        check_tokenizer(tiny_tokenizer(512), masked, "a diffusion model")


class Server:
    """A server that answers as vLLM or SGLang do, with a tiny model's distributions, on a real socket."""

    def __init__(self, dialect, model, tokenizer):
        self.dialect, self.model, self.tokenizer = dialect, model, tokenizer
        self.requests, self.failures, self.delay, self.most, self.status = [], 0, 0.0, 20, 503
        self.now = self.together = 0
        self.drips = None
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.requests.append((self.path, dict(self.headers), body))
                    failing = outer.failures > 0
                    outer.failures -= failing
                    outer.now += 1
                    outer.together = max(outer.together, outer.now)
                time.sleep(outer.delay)
                if outer.drips:
                    self.drip(json.dumps(outer.answer(body)).encode())
                    return
                content = b"busy" if failing else json.dumps(outer.answer(body)).encode()
                with outer.lock:
                    outer.now -= 1
                try:
                    self.send_response(outer.status if failing else 200)
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:
                    pass  # it was not waited for

            def drip(self, content):
                """Send a byte now and then for two seconds, then the answer: where it may be anything, none is out of time."""
                start = b"HTTP/1.0 200 OK\r\n"
                head, inner, tail = (
                    (start + b"X-Slow: ", b"x", b"\r\n\r\n") if outer.drips == "head" else (start + b"\r\n", b" ", b"")
                )
                try:
                    self.wfile.write(head)
                    for _ in range(20):
                        self.wfile.write(inner)
                        time.sleep(0.1)
                    self.wfile.write(tail + content)
                except OSError:
                    pass  # it was not waited for

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @torch.no_grad()
    def answer(self, body):
        ids, k = (
            (body["prompt"], body["prompt_logprobs"]) if self.dialect == "vllm" else (body["input_ids"], body["top_logprobs_num"])
        )
        log_p = self.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        places = [None]
        for at in range(1, len(ids)):
            values, tokens = log_p[at - 1].topk(min(k, self.most))
            found = dict(zip(tokens.tolist(), values.tolist(), strict=True))
            found.setdefault(ids[at], float(log_p[at - 1, ids[at]]))  # as vLLM does: the token that is there comes, too
            texts = {token: self.tokenizer.decode([token]) for token in found}
            if self.dialect == "vllm":
                places.append({str(t): {"logprob": v, "rank": 1, "decoded_token": texts[t]} for t, v in found.items()})
            else:
                places.append([[v, t, texts[t]] for t, v in list(found.items())[: min(k, self.most)]])
        if self.dialect == "vllm":
            return {"choices": [{"text": "x", "prompt_logprobs": places}]}
        return {"text": "x", "meta_info": {"input_top_logprobs": places}}


@pytest.fixture
def serve():
    servers = []

    def start(dialect="vllm", model=None, tokenizer=None):
        servers.append(Server(dialect, model or llama(), tokenizer or tiny_tokenizer()))
        return servers[-1]

    yield start
    for server in servers:
        server.server.shutdown()
        server.server.server_close()


def source(server, **changes):
    options = {"timeout": 20.0, "retries": 2, "concurrency": 3} | changes
    made = RemoteSource(server.url, "tiny", server.dialect, options.pop("top_k", K), tiny_tokenizer(), **options)
    made.pause = 0.01
    return made


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
def test_a_server_teaches_what_its_model_would_here(serve, dialect):
    server, data = serve(dialect), batch()
    remote = TopTeacher(source(server, key="secret"), K).lesson(data, Needs(logits=True)).targets
    local = TopTeacher(LocalSource(LocalTeacher(llama(), "tiny"), K, 1.0), K).lesson(data, Needs(logits=True)).targets
    positions = torch.tensor([0, 1, 2, 3, 5, 6, 7, 12, 13])  # all but the last of a document
    (values, tokens, _), (expected, chosen, _) = (t.top(positions, K, 1.0) for t in (remote, local))
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(tokens, chosen)
    last, *_ = remote.top(torch.tensor([4, 8]), K, 1.0)
    assert bool((last == -torch.inf).all())
    path, headers, _ = server.requests[-1]
    assert path == {"vllm": "/v1/completions", "sglang": "/generate"}[dialect]
    assert headers["Authorization"] == "Bearer secret"
    assert len(server.requests) == 1 + 6


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
def test_another_model_under_the_same_name_has_another_digest(serve, dialect):
    def sure(seed):
        model = llama(seed)
        model.model.norm.weight.data *= 20  # as it is, it holds every token for likely, whatever the seed
        return model

    server = serve(dialect, sure(0))
    first = source(server).digest
    assert source(serve(dialect, sure(0))).digest == first  # at another address
    server.model = sure(1)
    assert source(server).digest != first
    # Control: the noise of another machine, some 1e-3 nats a token, makes no other model of it.
    server.model = sure(0)
    whole, noise = server.model.forward, torch.Generator().manual_seed(0)

    def noisy(**inputs):
        found = whole(**inputs)
        found.logits = found.logits + 1e-3 * torch.randn(found.logits.shape, generator=noise)
        return found

    server.model.forward = noisy
    assert source(server).digest == first


def test_requests_go_out_together_and_are_repeated_where_they_fail(serve):
    server = serve()
    teacher = source(server)
    server.delay, server.failures = 0.2, 2
    pieces = [torch.arange(1, 5) + i for i in range(4)]
    assert len(teacher.tops(pieces)) == 4
    assert 1 < server.together <= 3
    assert len(server.requests) == 1 + 4 + 2


def test_a_server_that_is_slow_down_or_refuses_is_named_and_not_waited_for(serve):
    server = serve()
    teacher = source(server, timeout=0.3, retries=1)
    server.delay = 1.5
    with pytest.raises(UserError, match=r"no answer in 2 tries \(no answer in 0.3 s\): start it, or raise teacher.timeout_s"):
        teacher.tops([torch.arange(1, 4)])
    server.delay, server.failures, server.status = 0.0, 1, 400
    before = len(server.requests)
    with pytest.raises(UserError, match="refused a request \\(400"):
        teacher.tops([torch.arange(1, 4)])
    assert len(server.requests) == before + 1  # asking again would not help
    server.server.shutdown()
    server.server.server_close()
    with pytest.raises(UserError, match="gave no answer in 1 try"):
        source(server, retries=0)


@pytest.mark.parametrize("where", ["head", "body"])
def test_a_server_that_drips_is_not_waited_for(where, serve):
    server = serve()
    teacher = source(server, timeout=1.0, retries=1)
    server.drips = where
    with pytest.raises(UserError, match=r"gave no answer in 2 tries \(no answer in 1 s\)"):
        teacher.tops([torch.arange(1, 4)])
    # Control: the same answer, if it has the time.
    teacher.timeout = 60.0
    assert len(teacher.tops([torch.arange(1, 4)])) == 1


def test_an_answer_that_is_no_json_is_asked_for_again_and_named(serve):
    server = serve()
    teacher = source(server, retries=1)
    server.failures, server.status = 1, 200
    assert len(teacher.tops([torch.arange(1, 4)])) == 1
    server.failures = 2
    with pytest.raises(UserError, match=r"gave no answer in 2 tries \(its answer is no JSON\)"):
        teacher.tops([torch.arange(1, 4)])


def test_an_address_that_cannot_be_asked_is_no_answer_without_json(serve):
    with pytest.raises(UserError, match=r"teacher.url=http://127.0.0.1:1/ä is no address that can be asked"):
        RemoteSource("http://127.0.0.1:1/ä", "tiny", "vllm", K, tiny_tokenizer(), timeout=5, retries=0, concurrency=1)


@pytest.mark.parametrize("key", ["one\ntwo", "one\r\nX-Other: two", "schlüssel", "键", "tab\tbed", "\x7f"])
def test_a_key_that_no_header_can_carry_is_refused(key, tmp_path):
    path = tmp_path / "key"
    path.write_bytes(key.encode())
    with pytest.raises(UserError, match="holds more than one line of printable ASCII") as refused:
        read_key(str(path))
    assert key not in str(refused.value)
    path.write_bytes(b"  s3cret-key_=\r\n")
    assert read_key(str(path)) == "s3cret-key_="


def test_too_few_log_probabilities_and_another_dialect_are_named(serve):
    server = serve()
    server.most = 3
    with pytest.raises(
        UserError, match=r"gave [34] log-probabilities a token, and the objective needs 5: start it with --max-logprobs"
    ):
        source(server).tops([torch.arange(1, 6)])
    server.dialect, wrong = "sglang", "vllm"
    server.answer = lambda body: {"choices": [{"text": "x"}]}
    with pytest.raises(UserError, match="answered without the log-probabilities of the prompt's"):
        RemoteSource(server.url, "tiny", wrong, K, tiny_tokenizer(), timeout=5, retries=0, concurrency=1)


def spoilt(answer, dialect, change):
    """An answer whose entries, (log-probability, token) each, have been changed at position 2."""
    if dialect == "vllm":
        place = answer["choices"][0]["prompt_logprobs"][2]
        entries = change([(found["logprob"], int(token)) for token, found in place.items()])
        # Keys with a zero in front: two of the same token are two keys.
        place.clear()
        place.update({"0" * i + str(token): {"logprob": value} for i, (value, token) in enumerate(entries)})
    else:
        place = answer["meta_info"]["input_top_logprobs"][2]
        place[:] = [[value, token, None] for value, token in change([(value, token) for value, token, _ in place])]
    return answer


@pytest.mark.parametrize("first", [True, False], ids=["probe", "later"])
@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entries: [(entries[0][0], 512), *entries[1:]], "token 512"),
        (lambda entries: [(entries[0][0], -1), *entries[1:]], "token -1"),
        (lambda entries: [(value, 7) for value, _ in entries], "the same token twice"),
        (lambda entries: [(float("nan"), entries[0][1]), *entries[1:]], "the log-probability nan of token"),
        (lambda entries: [(0.5, entries[0][1]), *entries[1:]], "the log-probability 0.5 of token"),
        (lambda entries: [(-1.0, token) for _, token in entries], r"probabilities that sum to (1\.839|2\.207)"),
    ],
    ids=["beyond", "below", "twice", "nan", "above", "sum"],
)
def test_what_no_distribution_can_be_is_refused_and_named(dialect, change, message, first, serve):
    server = serve(dialect)
    teacher = None if first else source(server)
    whole = server.answer
    server.answer = lambda body: spoilt(whole(body), dialect, change)
    with pytest.raises(UserError, match=f"answered with {message}.* at position 2, which is no distribution of the model's 512"):
        source(server) if teacher is None else teacher.tops([torch.arange(1, 6)])


def test_tokens_that_a_server_holds_for_impossible_are_an_answer(serve):
    server = serve("sglang")
    whole = server.answer
    server.answer = lambda body: spoilt(whole(body), "sglang", lambda entries: [*entries[:-1], (-torch.inf, entries[-1][1])])
    (top,) = source(server).tops([torch.arange(1, 6)])
    assert top.log_probabilities[1, -1] == -torch.inf
    assert bool(top.log_probabilities[1, :-1].isfinite().all())


def test_a_server_with_another_tokenizer_is_refused(serve):
    other = tiny_tokenizer(512, around="<|begin|> $A")  # one special token more: everything behind it has moved
    with pytest.raises(UserError, match=r"has another tokenizer than the model \(token \d+ is"):
        source(serve(tokenizer=other))


@pytest.fixture
def run(corpus, overrides, tmp_path, monkeypatch):
    """A run on a pretrained directory, and that directory's model."""
    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda name: None)
    model, directory = tiny_llama(hidden=64, ffn=128), tmp_path / "llama"
    save_master(copy.deepcopy(model), directory, tiny_tokenizer())
    kept = [o for o in overrides if not o.startswith("model.")]
    kept += ["model=smollm2_135m", f"model.pretrained={directory}", "training.compare_fp=false", "training.max_steps=4"]
    kept += ["objectives={ce: {}, logits: {top_k: 5}}", "training.eval_every=0"]

    def start(name, *more):
        assert main([*kept, f"output_dir={tmp_path / name}", *more]) == 0
        return [line["objective/logits"] for line in read_metrics(tmp_path / name / "metrics.jsonl")]

    return start, model, kept


def test_runs_with_a_cache_or_a_server_learn_what_a_local_teacher_teaches(run, serve, tmp_path, monkeypatch):
    start, model, _ = run
    plain = start("plain")
    cached = start("cached", f"teacher.cache_dir={tmp_path / 'cache'}")
    near = {"rel": 1e-3, "abs": 1e-7}  # the mass of all other tokens is summed there, and what is left of 1 here
    assert cached == pytest.approx(plain, **near)
    monkeypatch.setattr(LocalSource, "tops", lambda *args: pytest.fail("the teacher was run"))
    assert start("again", f"teacher.cache_dir={tmp_path / 'cache'}") == cached
    server = serve("vllm", model)
    remote = start("remote", "teacher.kind=vllm", "teacher.model=tiny", f"teacher.url={server.url}")
    assert remote == pytest.approx(plain, **near)  # what follows a document's last token, of which it says nothing, is not scored


def test_a_cache_that_two_teachers_of_equal_weights_share_answers_each_as_itself(tmp_path):
    def answer(name, cache):
        config = TeacherConfig(model=str(tmp_path / name), cache_dir=str(tmp_path / cache))
        teacher = load_teacher(config, None, "", tiny_tokenizer(), 512, (K, 1.0))
        found = teacher.lesson(batch(), Needs(logits=True)).targets.top(torch.arange(36), K, 1.0)
        teacher.close()
        return torch.cat(found[:2], -1)

    for name, base in (("near", 10000.0), ("far", 3.0)):
        model = llama()
        model.config.rope_parameters = {"rope_theta": base, "rope_type": "default"}
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.data *= 20  # so that it matters where a token stands
        save_master(model, tmp_path / name, tiny_tokenizer())
    apart, shared = ([answer(name, cache or f"{name} alone") for name in ("near", "far")] for cache in ("", "shared"))
    assert not torch.equal(*apart)
    assert all(torch.equal(alone, cached) for alone, cached in zip(apart, shared, strict=True))


def test_behind_a_cache_a_teacher_with_more_logits_is_refused_too(run, tmp_path, capsys):
    _, _, kept = run
    save_master(tiny_llama(hidden=64, ffn=128, vocab=576), tmp_path / "wide", tiny_tokenizer())  # the same tokenizer
    for more in ([], [f"teacher.cache_dir={tmp_path / 'cache'}"]):
        assert main([*kept, f"output_dir={tmp_path / 'run'}", f"teacher.model={tmp_path / 'wide'}", *more]) == 2
        assert "has logits of 576 tokens and the model of 512" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["teacher.cache_dir=x", "objectives={logits: {}}"], "must be of kind logits, with a top_k"),
        (["teacher.cache_dir=x", "objectives={relations: {layer: 0, heads: 4}}"], "must be of kind logits"),
        (["teacher.kind=vllm", "teacher.model=m"], "teacher.kind=vllm needs teacher.url"),
        (["teacher.kind=vllm", "teacher.url=http://x"], "teacher.kind=vllm needs teacher.model"),
        (["teacher.kind=vllm", "teacher.url=x", "teacher.model=m"], "must begin with http"),
        (
            ["teacher.kind=vllm", "teacher.url=http://x:notaport", "teacher.model=m"],
            "teacher.url names no host, or a port that is no",
        ),
        (["teacher.kind=vllm", "teacher.url=http://", "teacher.model=m"], "teacher.url names no host"),
        (["teacher.kind=vllm", "teacher.url=http://x:99999", "teacher.model=m"], "teacher.url names no host"),
        (["teacher.url=http://x"], "teacher.url belongs to a server"),
        (["teacher.kind=vllm", "teacher.url=http://x", "teacher.model=m", "teacher.timeout_s=inf"], "must be at most 1e6 seconds"),
        (
            ["teacher.kind=vllm", "teacher.url=http://x", "teacher.model=m", "teacher.retries=11"],
            "retries must be at most 10, not 11",
        ),
        (
            ["teacher.kind=sglang", "teacher.url=http://x", "teacher.model=m", "teacher.offload=true"],
            "offload has no effect on a server",
        ),
        (
            ["teacher.kind=vllm", "teacher.url=http://x", "teacher.model=m", "objectives={logits: {top_k: 4, temperature: 2}}"],
            "gives probabilities at temperature 1",
        ),
        (
            ["teacher.kind=vllm", "teacher.url=http://x", "teacher.model=m", "objectives={logits: {top_k: 4, scope: attended}}"],
            "says nothing of what follows a document's last token",
        ),
        (["teacher.kind=llamacpp"], "teacher.kind"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_meant_are_refused(more, message):
    with pytest.raises(UserError, match=message):
        load_run_config(more)


def test_a_run_goes_on_after_its_server_has_moved():
    """What the server says is compared by the teacher's digest; its name is the run's."""
    there = ["teacher.kind=vllm", "teacher.model=m", "objectives={ce: {}, logits: {top_k: 4}}"]
    old, moved, other = (
        load_run_config([*there, *more])
        for more in (["teacher.url=http://a:1"], ["teacher.url=http://b:2"], ["teacher.url=http://a:1", "teacher.model=n"])
    )
    content = {KEY: {"config": plain(old), "teacher": "digest"}}
    check_config(Path("step-1.ckpt"), content, moved)
    with pytest.raises(UserError, match=r"was trained with teacher\.model=m, and this run has teacher\.model=n"):
        check_config(Path("step-1.ckpt"), content, other)
    with pytest.raises(UserError, match="was trained with another teacher"):
        check_teacher(Path("step-1.ckpt"), content, "another")


def test_a_server_that_is_down_ends_a_run_before_its_first_step(run, tmp_path, capsys):
    _, _, kept = run
    more = ["teacher.kind=vllm", "teacher.model=tiny", "teacher.url=http://127.0.0.1:9", "teacher.retries=0"]
    assert main([*kept, *more, f"output_dir={tmp_path / 'down'}"]) == 2
    assert "gave no answer in 1 try" in capsys.readouterr().err.splitlines()[-1]
    assert not (Path(tmp_path) / "down" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_a_compiled_teacher_says_the_same():
    plain, compiled = LocalTeacher(llama(), "plain"), LocalTeacher(llama(), "compiled", compiled=True)
    a, b = (t.lesson(batch(), Needs(logits=True)).targets.full(torch.arange(9)) for t in (plain, compiled))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
