"""Conversations: the assistant's words are learnt, and nothing else."""

import json
from itertools import islice

import numpy as np
import pytest
from bitnet_arch import load_tokenizer, resolve_pretrained
from data_handler import BatchLoader, DataConfig, PackedStream, SourceConfig, UserError, documents
from data_handler.cache import tokenised
from data_handler.chat import assistant_spans, encode_conversation, marks_generation
from data_handler.encoding import Encoder
from data_handler.sources import Record, records

CHATS = [
    [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "Four."}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi, there!"},
        {"role": "user", "content": "And in French?"},
        {"role": "assistant", "content": "Salut, ça va ?"},
    ],
    [{"role": "assistant", "content": "I begin."}, {"role": "user", "content": "So do I."}],
    [{"role": "user", "content": "Nobody answers."}],
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def smollm():
    return load_tokenizer(resolve_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct").path)


def learnt(conversation, tokenizer):
    """The runs of learnt tokens, as texts."""
    runs, ids = [], conversation.tokens
    for start in np.flatnonzero(np.diff(conversation.loss, prepend=False) & conversation.loss):
        end = start + int(np.argmin(np.append(conversation.loss[start:], False)))
        runs.append(tokenizer.decode(ids[start:end]))
    return runs


def test_every_turn_of_the_assistant_is_learnt_and_nothing_else(smollm, byte_tokenizer):
    for chat in CHATS:
        said = [message["content"] for message in chat if message["role"] == "assistant"]
        found = encode_conversation(chat, smollm, "s")
        assert learnt(found, smollm) == [f"{text}<|im_end|>\n" for text in said]
        assert found.tokens.tolist() == smollm.apply_chat_template(chat, tokenize=True, return_dict=False)
        found = encode_conversation(chat, byte_tokenizer, "s")  # "ROLE: CONTENT\n"
        assert learnt(found, byte_tokenizer) == [f"{text}\n" for text in said]


def test_a_template_that_marks_the_assistant_decides_itself(smollm):
    marked = load_tokenizer(resolve_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct").path)
    marked.chat_template = CHATML
    assert marks_generation(CHATML)
    assert not marks_generation(smollm.chat_template)
    for chat in CHATS[:3]:
        said = [message["content"] for message in chat if message["role"] == "assistant"]
        assert learnt(encode_conversation(chat, marked, "s"), marked) == [f"{text}<|im_end|>" for text in said]
    chat = CHATS[1]  # with a system message, where the two templates lay out the same text
    one, two = encode_conversation(chat, marked, "s"), encode_conversation(chat, smollm, "s")
    assert one.tokens.tolist() == two.tokens.tolist()
    # Prefix differences also have the line break that the template puts behind the end marker.
    extra = np.flatnonzero(one.loss != two.loss)
    assert smollm.decode(two.tokens[extra]) == "\n\n"


def test_a_template_that_rewrites_earlier_turns_is_refused(byte_tokenizer):
    other = type(byte_tokenizer)(tokenizer_object=byte_tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    with pytest.raises(UserError, match="s holds conversations, and the tokenizer has no chat template"):
        encode_conversation(CHATS[0], other, "s")
    other.chat_template = "{% for m in messages %}{{ m['content'] if loop.last else m['content'][:2] }}{% endfor %}"
    with pytest.raises(UserError, match=r"s: the chat template lays message 3 out in another way .* \{% generation %\}"):
        encode_conversation(CHATS[1], other, "s")
    other.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match=r"s: the chat template refuses a conversation \(roles must alternate\)"):
        encode_conversation(CHATS[0], other, "s")


def test_spans_are_those_of_the_words_in_the_text(smollm):
    text, spans = assistant_spans(CHATS[1], smollm, "s")
    assert [text[start:end] for start, end in spans] == ["Hi, there!<|im_end|>\n", "Salut, ça va ?<|im_end|>\n"]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": chat, "id": i}) + "\n" for i, chat in enumerate(CHATS * 10)))
    return SourceConfig(name="chats", kind="jsonl", path=str(path), messages_column="messages")


@pytest.mark.parametrize("streaming", [False, True])
def test_packed_rows_learn_what_each_conversation_alone_would(streaming, source, smollm, tmp_path):
    """Beside a source of plain text, all of which is learnt."""
    plain = tmp_path / "plain.jsonl"
    plain.write_text("".join(json.dumps({"text": f"Plain text number {i}."}) + "\n" for i in range(40)))
    if streaming:
        source = SourceConfig(name="chats", kind="jsonl", path=source.path, messages_column="messages", streaming=True)
    sources = (source, SourceConfig(name="plain", kind="jsonl", path=str(plain)))
    stream = PackedStream(DataConfig(sources=sources, sequence_length=96, heldout_share=0), smollm)
    alone = {tuple(found.tokens): found.loss for found in (encode_conversation(chat, smollm, "s") for chat in CHATS)}
    seen, several = set(), 0
    for batch in islice(BatchLoader(stream, rows_per_step=4), 10):
        for row, domain in enumerate(batch["domain"].tolist()):
            documents_ids = batch["document_ids"][row]
            several += int(documents_ids.max() > 1)
            for number in range(1, int(documents_ids.max()) + 1):
                at = documents_ids == number
                ids, labels = batch["input_ids"][row][at], batch["labels"][row][at]
                assert labels[0] == -100
                mask = alone[tuple(ids.tolist())] if domain == 0 else np.ones(len(ids), bool)
                assert (labels[1:] != -100).tolist() == mask[1:].tolist()
                assert (labels[labels != -100] == ids[labels != -100]).all()
                seen.add((domain, tuple(ids.tolist())))
    assert several > 10
    assert {ids for domain, ids in seen if domain == 0} == set(alone)


def test_parquet_conversations_and_their_text(source, tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"messages": CHATS}), tmp_path / "c.parquet")
    table = SourceConfig(name="s", kind="parquet", path=str(tmp_path / "c.parquet"), messages_column="messages")
    assert [record.messages for record in records(table)] == CHATS
    assert list(documents(source))[:4] == list(documents(table))
    assert next(documents(table)) == "user: What is 2 + 2?\nassistant: Four."


def test_a_refused_conversation_is_not_passed_over_after_the_repair(source, byte_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("data_handler.cache.BATCH_DOCUMENTS", 4)
    strict = type(byte_tokenizer)(tokenizer_object=byte_tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    strict.chat_template = "{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('no user') }}{% endif %}" + CHATML
    with pytest.raises(UserError, match=r"source chats: the chat template refuses a conversation \(no user"):
        tokenised(source, Encoder(strict), tmp_path / "cache")
    text = (tmp_path / "chats.jsonl").read_text().replace('"assistant", "content": "I begin."', '"system", "content": "I begin."')
    (tmp_path / "chats.jsonl").write_text(text)
    corpus, _ = tokenised(source, Encoder(strict), tmp_path / "cache")
    assert len(corpus) == 40


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("text", r"'messages' in .*:1 \(byte 0\) is not a list of messages"),
        ([{"role": "user"}], "a message of 'messages' in .* has no content"),
        ([{"content": "a"}], "has no role"),
        ([{"role": "user", "content": ["a"]}], "'messages.content' in .* is not text but list"),
    ],
)
def test_what_is_no_conversation_is_named(value, message, tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": value}) + "\n")
    with pytest.raises(UserError, match=message):
        list(records(SourceConfig(name="s", kind="jsonl", path=str(tmp_path / "x.jsonl"), messages_column="messages")))
    with pytest.raises(UserError, match="has no column 'chat': set messages_column to one of messages"):
        list(records(SourceConfig(name="s", kind="jsonl", path=str(tmp_path / "x.jsonl"), messages_column="chat")))


def test_the_encoder_leaves_the_tokenizer_as_it_was(smollm):
    encoder = Encoder(smollm)
    smollm("a text of more than four tokens", truncation=True, max_length=4)
    (store,) = encoder.encode([Record("a text of more than four tokens <|im_end|>")], "s")
    assert len(store.tokens) > 8
    special = smollm.convert_tokens_to_ids("<|im_end|>")
    assert special not in store.tokens[:-1]  # text is data
    assert smollm("<|im_end|>").input_ids == [special]
