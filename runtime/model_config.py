"""The model's own shape, read from its config.json and generation_config.json."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from zllm.errors import ConfigError, ModelLoadError
from zllm.runtime.json_files import read_object
from zllm.runtime.models.architectures import require_supported

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


_UNSUPPORTED = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "sequence_bias": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "top_h": None,
    "num_beams": 1,
    "penalty_alpha": None,
    "dola_layers": None,
    "guidance_scale": 1.0,
    "exponential_decay_length_penalty": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "stop_strings": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "max_new_tokens": None,
}
"""Of generation_config.json: what changes the tokens, and the value that does not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding: frequencies theta^(-2i/D) (Su et al. 2021, RoFormer)."""

    theta: float = 10000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """What generation_config.json says where a request says nothing. None: it is silent too."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder's dimensions. Checked when made, so that models may rely on them."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = field(default_factory=RopeConfig)
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    initializer_range: float = 0.02
    dtype: torch.dtype = torch.float32
    """Of the checkpoint."""
    eos_token_ids: tuple[int, ...] = ()
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    ignored: tuple[str, ...] = ()
    """What the two files ask for and nothing here does, each with its file."""

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            if not 1 <= value < 2**31:
                raise ModelLoadError(
                    f"config.json: {name} is {value}: it must be at least 1 and below 2^31"
                )
        if self.num_heads % self.num_kv_heads:
            raise ModelLoadError(
                f"config.json: num_attention_heads is {self.num_heads}, no multiple of "
                f"num_key_value_heads ({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise ModelLoadError(f"config.json: head_dim is {self.head_dim}: it must be even")

    @property
    def num_parameters(self) -> int:
        """Weights without the norms, which weigh nothing."""
        heads = self.num_heads + 2 * self.num_kv_heads
        layer = self.hidden_size * (heads + self.num_heads) * self.head_dim
        layer += 3 * self.hidden_size * self.intermediate_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * layer + embeddings

    def notes(self) -> list[str]:
        """Lines for the operator: where answers may differ from what the checkpoint asks for."""
        return [f"{what} is not supported, and ignored" for what in self.ignored]

    def context_length(self, max_model_len: int | None) -> int:
        """Tokens of the longest request where memory allows it. Raises ConfigError."""
        limit = self.max_position_embeddings
        if max_model_len is not None and max_model_len > limit:
            raise ConfigError(
                f"max_model_len is {max_model_len}: the model's positions end at {limit}"
            )
        return max_model_len or limit

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Read `config.json`, and `generation_config.json` where there is one.

        Raises ModelLoadError where a file is missing, is no JSON, lacks a field, or asks for
        something that no model here implements.
        """
        raw = read_object(folder / "config.json")
        if raw is None:
            raise ModelLoadError(
                f"{folder} has no config.json: give the folder of a Hugging Face checkpoint"
            )
        generation = read_object(folder / "generation_config.json") or {}
        return cls.from_dict(raw, generation)

    @classmethod
    def from_dict(
        cls, raw: dict[str, Any], generation: dict[str, Any] | None = None
    ) -> ModelConfig:
        """From the two files' contents; see `from_folder`."""
        generation = generation or {}
        architectures = raw.get("architectures")
        if not isinstance(architectures, list) or not architectures:
            raise ModelLoadError("config.json: `architectures` names no architecture")
        # First of all: another architecture's fields have other names, and the lack of ours is no
        # news.
        architecture = str(architectures[0])
        require_supported(architecture)
        if raw.get("quantization_config"):
            raise ModelLoadError(
                "config.json: quantization_config is set, and quantized checkpoints are not "
                "supported: use the checkpoint in bfloat16, float16 or float32"
            )
        if raw.get("hidden_act", "silu") != "silu":
            raise ModelLoadError(
                f"config.json: hidden_act is {raw['hidden_act']!r}: only 'silu' is supported"
            )
        if raw.get("use_sliding_window"):
            raise ModelLoadError("config.json: use_sliding_window is true, which is not supported")
        layer_types = raw.get("layer_types") or []
        if not isinstance(layer_types, list) or set(map(str, layer_types)) - {"full_attention"}:
            raise ModelLoadError(
                f"config.json: layer_types is {layer_types!r}: only a list of 'full_attention' is "
                "supported"
            )
        num_heads = _integer(raw, "num_attention_heads")
        hidden_size = _integer(raw, "hidden_size")
        # A Qwen3 that says nothing has what transformers' Qwen3Config has.
        head_dim = raw.get("head_dim", 128)
        return cls(
            architecture=architecture,
            vocab_size=_integer(raw, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_integer(raw, "intermediate_size"),
            num_layers=_integer(raw, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=_integer(raw, "num_key_value_heads", num_heads),
            head_dim=_integer(raw, "head_dim", 128)
            if head_dim
            else hidden_size // max(num_heads, 1),
            max_position_embeddings=_integer(raw, "max_position_embeddings"),
            rms_norm_eps=_number(raw, "rms_norm_eps", 1e-6),
            rope=_rope(raw),
            tie_word_embeddings=_flag(raw, "tie_word_embeddings"),
            attention_bias=_flag(raw, "attention_bias"),
            initializer_range=_number(raw, "initializer_range", 0.02),
            dtype=_dtype(raw),
            eos_token_ids=_end_tokens(generation, raw),
            sampling=_sampling_defaults(generation),
            ignored=(*_ignored_rope(raw), *_ignored_generation(generation)),
        )


def _integer(raw: dict[str, Any], name: str, default: int | None = None) -> int:
    value = raw.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ModelLoadError(f"config.json: {name} is {value!r}: it must be an integer")
    return value


def _number(raw: dict[str, Any], name: str, default: float) -> float:
    value = raw.get(name, default)
    if not _is_number(value) or value < 0.0:
        raise ModelLoadError(f"config.json: {name} is {value!r}: it must be a number of at least 0")
    return float(value)


def _flag(raw: dict[str, Any], name: str) -> bool:
    value = raw.get(name)
    if value is not None and not isinstance(value, bool):
        raise ModelLoadError(f"config.json: {name} is {value!r}: it must be true or false")
    return bool(value)


def _sampling_defaults(generation: dict[str, Any]) -> SamplingDefaults:
    def number(name: str, high: float) -> float | None:
        value = generation.get(name)
        if value is None:
            return None
        if not _is_number(value) or not 0.0 <= value <= high:
            raise ModelLoadError(
                f"generation_config.json: {name} is {value!r}: it must be a number in [0, {high:g}]"
            )
        return float(value)

    top_p = number("top_p", 1.0)
    if top_p == 0.0:
        raise ModelLoadError("generation_config.json: top_p is 0: it must be above 0")
    top_k = generation.get("top_k")
    if top_k == -1:
        top_k = 0
    if top_k is not None and not _is_id(top_k):
        raise ModelLoadError(
            f"generation_config.json: top_k is {top_k!r}: it must be a number of tokens, 0 for all"
        )
    return SamplingDefaults(
        temperature=number("temperature", 100.0),
        top_p=top_p,
        top_k=top_k,
        min_p=number("min_p", 1.0),
    )


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) <= sys.float_info.max  # an int may be too large for a float


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _ignored_generation(generation: dict[str, Any]) -> list[str]:
    return [
        f"generation_config.json: {name} {generation[name]!r}"
        for name, neutral in _UNSUPPORTED.items()
        if generation.get(name) not in (None, neutral)
    ]


def _end_tokens(generation: dict[str, Any], raw: dict[str, Any]) -> tuple[int, ...]:
    """One id, a list of ids, or nothing; null in the first file is nothing said."""
    value = generation.get("eos_token_id")
    if value is None:
        value = raw.get("eos_token_id")
    if value is None:
        return ()
    ids = tuple(value) if isinstance(value, list) else (value,)
    if not all(_is_id(item) for item in ids):
        raise ModelLoadError(
            f"eos_token_id is {value!r}: it must be a token's id, or a list of them"
        )
    return ids


def _dtype(raw: dict[str, Any]) -> torch.dtype:
    """`dtype`, or `torch_dtype` as it was called before transformers 5."""
    name = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    if not isinstance(name, str) or name not in _DTYPES:
        raise ModelLoadError(
            f"config.json: dtype is {name!r}: it must be one of {', '.join(_DTYPES)}"
        )
    return _DTYPES[name]


def _rope(raw: dict[str, Any]) -> RopeConfig:
    """`rope_parameters` (transformers 5), or `rope_theta` with `rope_scaling` before it."""
    given = _given_rope(raw)
    for name, parameters in given.items():
        if not isinstance(parameters, dict) or any(
            isinstance(value, dict) for value in parameters.values()
        ):
            raise ModelLoadError(
                f"config.json: {name} is {parameters!r}: only one RoPE for all layers is supported"
            )
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind != "default":
            raise ModelLoadError(
                f"config.json: {name} asks for the RoPE type {kind!r}: only 'default' is supported"
            )
    if len(given) > 1 and given["rope_parameters"] != given["rope_scaling"]:
        raise ModelLoadError("config.json: rope_parameters and rope_scaling differ: keep one")
    chosen: dict[str, Any] = next(iter(given.values()), {})
    theta = chosen.get("rope_theta", raw.get("rope_theta", 10000.0))
    if not _is_number(theta) or not theta > 0.0:
        raise ModelLoadError(f"config.json: rope_theta is {theta!r}: it must be a number above 0")
    return RopeConfig(theta=float(theta))


def _given_rope(raw: dict[str, Any]) -> dict[str, Any]:
    return {name: raw[name] for name in ("rope_parameters", "rope_scaling") if raw.get(name)}


def _ignored_rope(raw: dict[str, Any]) -> list[str]:
    """What the default type, or none, makes nothing of: a factor that lacks its type, say."""
    return [
        f"config.json: {name}.{key} {value!r} without a rope_type that has it"
        for name, parameters in _given_rope(raw).items()
        for key, value in parameters.items()
        if key not in ("rope_theta", "rope_type", "type")
    ]
