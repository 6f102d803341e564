"""The teacher of a run."""

from pathlib import Path

import torch
from bitnet_arch import Pretrained, UserError, load_config, load_model, load_tokenizer, resolve_pretrained
from bitnet_arch.diffusion import MASK_TOKEN, diffusion_of
from transformers import PreTrainedTokenizerFast

from wrinklefree.teachers.base import Teacher
from wrinklefree.teachers.cache import DiskCache
from wrinklefree.teachers.local import LocalTeacher, check_device
from wrinklefree.teachers.remote import RemoteSource, read_key
from wrinklefree.teachers.settings import TeacherConfig
from wrinklefree.teachers.tops import LocalSource, TopSource, TopTeacher

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_teacher(
    config: TeacherConfig,
    original: Path | None,
    note: str,
    tokenizer: PreTrainedTokenizerFast,
    vocabulary: int,
    tops: tuple[int, float] | None = None,
) -> Teacher:
    """Load the teacher of a run.

    Args:
        config: which.
        original: the float model that the student was converted from, if there is one.
        note: one line on where that comes from.
        tokenizer: the student's.
        vocabulary: how many tokens the student has logits of.
        tops: of a teacher that is known by its likeliest tokens, how many, and the temperature.

    Raises:
        UserError: if there is none, its tokenizer is another, the device is not there, or a server does not answer.
    """
    if not config.tops_only:
        return _local(config, original, note, tokenizer)
    assert tops is not None
    top_k, temperature = tops
    if config.kind == "local":
        teacher = _local(config, original, note, tokenizer)
        assert teacher.shape is not None
        if teacher.shape.vocabulary > vocabulary:  # the objective cannot look: a cache's answers are all that it sees
            raise UserError(
                f"the teacher {teacher.note} has logits of {teacher.shape.vocabulary} tokens and the model of {vocabulary}: choose "
                "a teacher of the model's own family"
            )
        source: TopSource = LocalSource(teacher, top_k, temperature)
    else:
        assert config.url is not None
        assert config.model is not None
        source = RemoteSource(
            config.url,
            config.model,
            config.kind,
            top_k,
            tokenizer,
            timeout=60.0 if config.timeout_s is None else config.timeout_s,
            retries=3 if config.retries is None else config.retries,
            concurrency=8 if config.concurrency is None else config.concurrency,
            key=read_key(config.api_key_file),
        )
    cache = None
    if config.cache_dir is not None:
        cache = DiskCache(Path(config.cache_dir).expanduser() / f"{source.digest}-k{top_k}-t{temperature:g}", top_k, vocabulary)
    return TopTeacher(source, top_k, cache)


def _local(config: TeacherConfig, original: Path | None, note: str, tokenizer: PreTrainedTokenizerFast) -> LocalTeacher:
    check_device(config.device, config.offload)
    if config.model is None:
        if original is None:
            raise UserError(
                "the objectives need a teacher, and the model was ternary from the start, so that there is no original to learn "
                "from: name one as teacher.model=DIR, or set the objectives' weights to 0"
            )
        source = Pretrained(original, "directory", note)
    else:
        source = resolve_pretrained(config.model)
        check_tokenizer(tokenizer, load_tokenizer(source.path), config.model)
    if diffusion_of(load_config(source.path)) is not None:
        raise UserError(
            f"the teacher {source.path} is a diffusion model, and a teacher is run autoregressively: name the model that it was "
            "made from as teacher.model"
        )
    model = load_model(source.path, DTYPES[config.dtype], quantized=False)
    return LocalTeacher(model, source.note, device=config.device, offload=config.offload, compiled=config.compiled)


def check_tokenizer(student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast, name: str) -> None:
    """Refuse a teacher that reads text as other tokens.

    The mask token of a student that diffuses is in no text, and a teacher need not know it.

    Raises:
        UserError: saying what differs.
    """
    mine, theirs = student.get_vocab(), teacher.get_vocab()
    if student.mask_token == MASK_TOKEN and MASK_TOKEN not in theirs:
        del mine[MASK_TOKEN]
    reason = None
    if len(mine) != len(theirs):
        reason = f"it has {len(theirs)} tokens, the model's {len(mine)}"
    elif mine != theirs:
        token = min(token for token in mine.keys() | theirs.keys() if mine.get(token) != theirs.get(token))
        reason = f"token {token!r} is {theirs.get(token)} there and {mine.get(token)} here"
    elif student.backend_tokenizer.to_str() != teacher.backend_tokenizer.to_str():
        text = "Hello  world,\n\tüñí 12345 and don't; def f(x): return {'a': x}"
        if student(text).input_ids != teacher(text).input_ids:
            reason = "it cuts the same text in another way"
    if reason is not None:
        raise UserError(
            f"the teacher {name} has another tokenizer than the model ({reason}), and their distributions are of different tokens: "
            "choose a teacher of the model's own family"
        )
