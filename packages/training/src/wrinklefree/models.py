"""The model and tokenizer that a run starts from."""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from bitnet_arch import (
    ConversionConfig,
    Pretrained,
    UserError,
    check_family,
    convert_model,
    load_config,
    load_float_model,
    load_model,
    load_tokenizer,
    open_weights,
    resolve_pretrained,
    save_master,
)
from bitnet_arch.calibration import max_positions
from bitnet_arch.diffusion import diffusion_of
from bitnet_arch.modeling import TernaryForm, form_of
from data_handler import DataConfig, PackedStream, own_tokenizer, restore_tokenizer, training_documents
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from wrinklefree.config import ModelConfig, RunConfig
from wrinklefree.files import write_json
from wrinklefree.processes import is_first
from wrinklefree.teachers.base import Shape
from wrinklefree.teachers.made import train_float

CALIBRATION_ROWS, CALIBRATION_LENGTH = 4, 512
TOKENIZER_DOCUMENTS = 400
MADE_OF = "made.json"
"""In the directory of a model that was made on the spot: the settings and the text that it was made of."""


@dataclass(frozen=True)
class Start:
    """What a run starts from.

    Attributes:
        model: with `BitLinear` layers, float32, lambda 1.
        tokenizer: its tokenizer.
        note: one line that says where the weights come from.
        provenance: what the trained model keeps of that.
        original: the unconverted float model's directory, if there is one.
        trained_tokenizer: JSON of the tokenizer, if it was trained for this run.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    note: str
    provenance: str | None
    original: Path | None
    trained_tokenizer: str | None = None


def build_start(config: RunConfig, saved_tokenizer: str | None = None) -> Start:
    """Make the model of `config`: the same for the same configuration, on every process.

    Args:
        config: the run.
        saved_tokenizer: JSON of the tokenizer that the run had trained when it was left, so that none is trained again.

    Raises:
        bitnet_arch.UserError: if the weights cannot be found, the family cannot be converted, or a setting has no effect.
    """
    if config.model.shape is not None:
        return _from_made(config, saved_tokenizer) if config.makes_original else _random(config, saved_tokenizer)
    assert config.model.pretrained is not None
    source = resolve_pretrained(config.model.pretrained)
    tokenizer = load_tokenizer(source.path)
    with open_weights(source.path) as reader:
        form = reader.form
    if source.path.resolve() == (Path(config.output_dir) / "model").resolve():
        raise UserError(f"{source.path} would be replaced by the model that this run trains: choose another output_dir")
    context = max_positions(load_config(source.path))
    if context is not None and config.data.sequence_length > context:
        raise UserError(
            f"data.sequence_length={config.data.sequence_length} is longer than the model's context of {context}: lower it"
        )
    _check_likelihood(config, source.path)
    if form == "master":
        _check_master(config.model, source.path)
        return Start(load_model(source.path), tokenizer, source.note, source.provenance, None)
    if form == "packed":
        raise UserError(f"{source.path} is packed, and 2-bit weights cannot be trained: give its master form")
    if config.training.learning_rate_fp is not None:
        raise UserError("training.learning_rate_fp has no effect: a converted model is compared with its original, as it is")
    conversion = config.model.conversion()
    check_family(load_config(source.path), conversion)
    return _converted(config, source, conversion, tokenizer)


def _converted(
    config: RunConfig,
    source: Pretrained,
    conversion: ConversionConfig,
    tokenizer: PreTrainedTokenizerFast,
    trained: str | None = None,
) -> Start:
    """Convert a float model, or correct it by adapters."""
    context = max_positions(load_config(source.path))
    model = load_float_model(source)
    if config.model.lrc is not None:
        count = config.model.lrc.rows
        rows = calibration_rows(config.data, tokenizer, context, count)
        model = config.model.lrc.build(model, rows, config.training.seed)
    else:
        calibration = list(calibration_rows(config.data, tokenizer, context)) if conversion.calibrates else None
        model = convert_model(model, conversion, calibration)
    return Start(model, tokenizer, source.note, source.provenance, source.path, trained)


def _from_made(config: RunConfig, saved: str | None) -> Start:
    """Begin with a float model that is trained on the spot, of the run's shape, and kept as `teacher/` in its directory."""
    directory = Path(config.output_dir) / "teacher"
    note = (
        f"a float model of this shape, made on the spot in {_made_steps(config)} steps on the run's own text (seed "
        f"{config.training.seed}): a stand-in for a pretrained one"
    )
    # A run that continues has the settings and the text of the one that it continues, which are compared with its checkpoint's.
    if not ((saved is not None and (directory / "config.json").is_file()) or _made_of_the_same(config, directory)):
        if is_first():
            _make(config, saved, directory, note)
        else:
            while not _made_of_the_same(config, directory):
                time.sleep(1.0)
    tokenizer = load_tokenizer(directory)
    given = config.model.conversion()
    conversion = given if given.norm == "none" or config.model.gain else replace(given, gain="calibrated")
    source = Pretrained(directory, "directory", note, note)
    return _converted(config, source, conversion, tokenizer, tokenizer.backend_tokenizer.to_str())


def _make(config: RunConfig, saved: str | None, directory: Path, note: str) -> None:
    """Train the float model of the run's shape, and write it with a record of what it was made of."""
    tokenizer, model = _random_float(config, saved)
    if config.model.lrc is not None:
        config.model.lrc.check(model)
    if config.teacher.model is None:  # it will teach: what is wrong with its shape is to be said before it is made
        shape = Shape.of(model)
        for item in config.objective_settings().values():
            item.objective.check(shape, None if config.teacher.tops_only else shape)
    stream = PackedStream(config.data, tokenizer, seed=config.training.seed)
    train_float(model, stream, steps=_made_steps(config), rows_per_step=config.training.rows_per_step)
    save_master(model, directory, tokenizer, note)
    write_json(directory / MADE_OF, _settings_of_made(config) | {"text": stream.fingerprint()})


def _made_of_the_same(config: RunConfig, directory: Path) -> bool:
    """Whether a directory holds what `_make` would make, as its record has it."""
    try:
        record = json.loads((directory / MADE_OF).read_text())
        text = record.pop("text")
    except (OSError, ValueError, AttributeError, KeyError):
        return False
    if record != _settings_of_made(config):
        return False
    stream = PackedStream(config.data, load_tokenizer(directory), seed=config.training.seed)
    return bool(text == stream.fingerprint())


def _settings_of_made(config: RunConfig) -> dict[str, Any]:
    assert config.model.shape is not None
    training = config.training
    return {
        "shape": asdict(config.model.shape),
        "seed": training.seed,
        "steps": _made_steps(config),
        "rows_per_step": training.rows_per_step,
    }


def _made_steps(config: RunConfig) -> int:
    return config.teacher.made_steps or config.training.max_steps


def calibration_rows(
    data: DataConfig, tokenizer: PreTrainedTokenizerFast, context: int | None, count: int = CALIBRATION_ROWS
) -> Iterator[Tensor]:
    """Yield rows of training text from the sources in turn, int64 `[1, 512]` or as long as the model's context."""
    length = min(CALIBRATION_LENGTH, context or CALIBRATION_LENGTH)
    for i in range(count):
        ids: list[int] = []
        for text in islice(training_documents(data, i % len(data.sources)), i // len(data.sources), None):
            ids += tokenizer(text).input_ids
            if len(ids) >= length:
                break
        if ids:
            yield torch.tensor([ids[:length]], dtype=torch.int64)


def _check_likelihood(config: RunConfig, directory: Path) -> None:
    """Refuse a diffusion model where nothing trains it as one: it would be run causally, which it is not."""
    if config.diffusion is None and diffusion_of(load_config(directory)) is not None:
        raise UserError(
            f"{directory} is a diffusion model, and the objectives train an autoregressive one: give the objective dlm or tcs a "
            "weight, or name the model that it was made from as model.pretrained"
        )


def _check_master(model: ModelConfig, directory: Path) -> None:
    """Refuse conversion settings that a ternary model would ignore."""
    config = load_config(directory)
    norm = "subln" if config.model_type == "bitnet" else "none"
    form = form_of(config) or TernaryForm(norm=norm)  # type: ignore[arg-type]
    for name, found in (("norm", form.norm), ("granularity", form.granularity), ("rotation", form.rotation)):
        if getattr(model, name) not in (None, found):
            raise UserError(f"{directory} is ternary already, with {name} {found}: leave out model.{name}")
    for name in ("gain", "softness"):
        if getattr(model, name) is not None:
            raise UserError(f"{directory} is ternary already, and nothing is inserted: leave out model.{name}")
    if model.lrc is not None:
        raise UserError(f"{directory} is ternary already, and model.lrc corrects a float model: give that, or leave out model.lrc")


def _random(config: RunConfig, saved: str | None) -> Start:
    tokenizer, model = _random_float(config, saved)
    converted = convert_model(model, config.model.conversion())
    note = f"random weights, seed {config.training.seed}"
    return Start(converted, tokenizer, note, None, None, tokenizer.backend_tokenizer.to_str())


def _random_float(config: RunConfig, saved: str | None) -> tuple[PreTrainedTokenizerFast, PreTrainedModel]:
    shape = config.model.shape
    assert shape is not None
    tokenizer = restore_tokenizer(saved) if saved else own_tokenizer(config.data, shape.vocab_size, TOKENIZER_DOCUMENTS)
    llama = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        max_position_embeddings=shape.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        rms_norm_eps=shape.rms_norm_eps,
        tie_word_embeddings=shape.tie_word_embeddings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.seed)
        model = LlamaForCausalLM(llama)
    return tokenizer, model.float()
