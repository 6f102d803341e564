"""Group `model`: which model is trained, and how it is made ternary."""

from dataclasses import dataclass, fields
from typing import Literal

from bitnet_arch import ConversionConfig

from wrinklefree.correction import CorrectionConfig
from wrinklefree.mapping import require


@dataclass(frozen=True, kw_only=True, slots=True)
class ShapeConfig:
    """Shape of a model that starts from random weights; the names are `transformers.LlamaConfig`'s."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            require(isinstance(value, bool) or value > 0, f"model.shape.{item.name} must be positive, not {value}")
        heads, kv = self.num_attention_heads, self.num_key_value_heads
        require(
            self.hidden_size % heads == 0, f"model.shape.hidden_size {self.hidden_size} must be a multiple of the {heads} heads"
        )
        require(
            self.hidden_size // heads % 2 == 0,
            f"model.shape gives heads of {self.hidden_size // heads}, and rotary positions need an even number: change "
            "hidden_size or num_attention_heads",
        )
        require(heads % kv == 0, f"model.shape.num_attention_heads {heads} must be a multiple of num_key_value_heads {kv}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which model is trained.

    Attributes:
        name: used in the run directory's name.
        pretrained: a model directory or hub id to convert; None starts from random weights of `shape`.
        shape: given exactly when `pretrained` is not.
        norm, gain, softness, granularity, rotation: how it is converted, see `bitnet_arch.ConversionConfig`; None takes its
            default, and gain 1 on random weights. A directory that is ternary already (master form) is trained as it is; of these,
            it takes what it is anyway.
        lrc: give a float model a low-rank correction (docs/objectives.md), and train nothing but that.
    """

    name: str
    pretrained: str | None = None
    shape: ShapeConfig | None = None
    norm: Literal["subln", "none", "allnorm", "bitlinear"] | None = None
    gain: Literal["calibrated", "one"] | None = None
    softness: float | None = None
    granularity: Literal["tensor", "row", "group128"] | None = None
    rotation: bool | None = None
    lrc: CorrectionConfig | None = None

    def __post_init__(self) -> None:
        for name in ("norm", "gain", "softness", "granularity", "rotation"):
            require(
                self.lrc is None or getattr(self, name) is None or (name, getattr(self, name)) == ("norm", "none"),
                f"model.{name} has no effect with model.lrc, which starts from the float model without norms: leave it out",
            )
        require((self.pretrained is None) != (self.shape is None), "give exactly one of model.pretrained and model.shape")
        require(
            self.shape is None or self.gain != "calibrated",
            "model.gain=calibrated has nothing to calibrate on random weights: leave it out",
        )
        for name in ("gain", "softness"):
            given = getattr(self, name) is not None
            require(not (given and self.norm == "none"), f"model.{name} has no effect with model.norm=none: leave it out")
        require(
            self.softness is None or (self.shape is None and self.gain != "one"),
            "model.softness has no effect where no gain is calibrated: leave it out",
        )
        self.conversion()

    def conversion(self) -> ConversionConfig:
        """Return the conversion's own configuration."""
        gain = self.gain or ("calibrated" if self.shape is None or self.norm == "none" else "one")
        default = ConversionConfig()
        softness = default.softness if self.softness is None else self.softness
        return ConversionConfig(
            norm=self.norm or default.norm,
            gain=gain,
            softness=softness,
            granularity=self.granularity or default.granularity,
            rotation=default.rotation if self.rotation is None else self.rotation,
        )
