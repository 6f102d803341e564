"""The teacher of a run."""

from pathlib import Path

import torch
from bitnet_arch import Pretrained, UserError, load_model, load_tokenizer, resolve_pretrained
from transformers import PreTrainedTokenizerFast

from wrinklefree.teachers.local import LocalTeacher, check_device
from wrinklefree.teachers.settings import TeacherConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_teacher(config: TeacherConfig, original: Path | None, note: str, tokenizer: PreTrainedTokenizerFast) -> LocalTeacher:
    """Load the teacher of a run.

    Args:
        config: which.
        original: the float model that the student was converted from, if there is one.
        note: one line on where that comes from.
        tokenizer: the student's.

    Raises:
        UserError: if there is none, its tokenizer is another, or the device is not there.
    """
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
    model = load_model(source.path, DTYPES[config.dtype], quantized=False)
    return LocalTeacher(model, source.note, device=config.device, offload=config.offload, compiled=config.compiled)


def check_tokenizer(student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast, name: str) -> None:
    """Refuse a teacher that reads text as other tokens.

    Raises:
        UserError: saying what differs.
    """
    mine, theirs = student.get_vocab(), teacher.get_vocab()
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
