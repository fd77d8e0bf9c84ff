"""`ModelConfig`: the facts of one decoder, read from and written to Hugging Face's `config.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from vptq_jax.lm.arch import ARCHITECTURES, Architecture, supported
from vptq_jax.schema import INT32, Reader, is_finite, is_integer, short

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
DTYPES = ("float32", "bfloat16", "float16")
MAX_LAYERS = 1 << 16
_MAX_HEAD_DIM = 1 << 16
_SMALLEST_EPS = 1e-30  # no zero in float32
_MAX_THETA = 1e30  # its powers must be float32 numbers


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: `theta` and, by `type`, how its frequencies are stretched.

    Attributes:
        theta: base wavelength.
        type: one of `ROPE_TYPES`.
        factor: stretch of the context (all types but default).
        original_max_position_embeddings: context before stretching (llama3, yarn).
        low_freq_factor, high_freq_factor: borders of the interpolated band (llama3).
        beta_fast, beta_slow: rotations that bound the ramp (yarn).
        attention_factor: factor on cos and sin; None derives it from factor and mscale (yarn).
        mscale, mscale_all_dim: parts of the derived attention factor (yarn).
        truncate: round the ramp's borders to whole dimensions (yarn).
    """

    theta: float = 10000.0
    type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.type not in ROPE_TYPES:
            raise ValueError(
                f"rope type is {short(self.type)}, which is not supported; supported: {', '.join(ROPE_TYPES)}"
            )
        for name in ("theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
            if not is_finite(getattr(self, name)):
                raise ValueError(f"rope {name} is {short(getattr(self, name))}; expected a finite number")
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            value = getattr(self, name)
            if value is not None and not (is_finite(value) and 0 <= value < _MAX_THETA):
                raise ValueError(f"rope {name} is {short(value)}; expected a number from 0 on, or None")
        if not 1 < self.theta <= _MAX_THETA:
            raise ValueError(f"rope theta is {self.theta}; expected a number above 1, at most {_MAX_THETA:g}")
        if not 1 <= self.factor <= INT32:
            raise ValueError(f"rope factor is {self.factor}; expected a number of at least 1, at most {INT32}")
        original = self.original_max_position_embeddings
        if original is not None and not (is_integer(original) and 1 <= original <= INT32):
            raise ValueError(f"rope original_max_position_embeddings is {short(original)}; expected 1 to {INT32}")
        if self.type in ("llama3", "yarn") and not self.original_max_position_embeddings:
            raise ValueError(f"rope type {self.type!r} needs original_max_position_embeddings")
        if self.type == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"rope low_freq_factor is {self.low_freq_factor} and high_freq_factor is {self.high_freq_factor}; "
                "expected 0 < low_freq_factor < high_freq_factor"
            )
        if self.type == "yarn" and not 0 < self.beta_slow < self.beta_fast:
            raise ValueError(
                f"rope beta_slow is {self.beta_slow} and beta_fast is {self.beta_fast}; "
                "expected 0 < beta_slow < beta_fast"
            )

    def to_hf(self) -> dict[str, Any]:
        """The `rope_parameters` of a `config.json`, with the keys that belong to the type."""
        keys: tuple[str, ...] = ()
        if self.type != "default":
            keys = ("factor",)
        if self.type == "llama3":
            keys += ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
        if self.type == "yarn":
            keys += ("original_max_position_embeddings", "beta_fast", "beta_slow", "truncate")
            keys += tuple(k for k in ("attention_factor", "mscale", "mscale_all_dim") if getattr(self, k) is not None)
        return {"rope_type": self.type, "rope_theta": self.theta} | {key: getattr(self, key) for key in keys}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that decides a decoder's shapes and maths; hashable.

    Attributes:
        model_type: a key of `arch.ARCHITECTURES`.
        num_kv_heads: heads of keys and values; divides num_heads.
        head_dim: width of one head, even; need not be hidden_size / num_heads.
        rope: rotary position embedding.
        max_position_embeddings: the longest context the model was made for, in tokens.
        tie_word_embeddings: the output projection is the embedding table.
        attention_bias: q, k and v have a bias.
        attention_out_bias: o has a bias.
        mlp_bias: gate, up and down have a bias.
        query_pre_attn_scalar: queries are divided by the square root of this; None: of head_dim.
        final_logit_softcapping: c of logits `c * tanh(logits / c)`, or None.
        local_rope: rotary position embedding of layers with a sliding window; None: that of all.
        sliding_window: keys a query of a sliding layer sees, itself included (None: all before it).
        full_attention_layers: layers that ignore the sliding window.
        bos_token_id, pad_token_id: token ids or None.
        eos_token_id: the ids that end a text, possibly none.
        initializer_range: standard deviation of random weights.
        dtype: dtype of the parameters in the checkpoint.

    Raises:
        ValueError: every problem found, in one error.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    query_pre_attn_scalar: int | None = None
    final_logit_softcapping: float | None = None
    local_rope: RopeConfig | None = None
    sliding_window: int | None = None
    full_attention_layers: tuple[int, ...] = ()
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    initializer_range: float = 0.02
    dtype: str = "float32"

    def __post_init__(self) -> None:
        problems = list(_problems(self))
        if problems:
            raise ValueError(_report("the model config is inconsistent", problems))

    @property
    def architecture(self) -> Architecture:
        """What all models of this type have in common."""
        return ARCHITECTURES[self.model_type]

    @property
    def first_token(self) -> int | None:
        """The token that every text has to begin with, windows of a longer one included; None: no special one."""
        return self.bos_token_id if self.architecture.bos_first else None

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer, None where it sees everything."""
        return None if layer in self.full_attention_layers else self.sliding_window

    @property
    def context_length(self) -> int:
        """Tokens that the model can attend to: the trained context, or what the rope stretches it to."""
        rope, trained = self.rope, self.max_position_embeddings
        if rope.type in ("linear", "dynamic") and not self.architecture.stretched_context:
            return int(trained * rope.factor)
        if rope.type == "yarn":
            return max(trained, int((rope.original_max_position_embeddings or 0) * rope.factor))
        return trained

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Reads a `config.json`, of transformers 4 (`rope_scaling`) or 5 (`rope_parameters`).

        Raises:
            ValueError: another model type, activation, rope or layer type than those supported,
                a value of the wrong type, or values that do not fit together; all gathered.
        """
        if not isinstance(raw, Mapping):
            raise ValueError(f"the model config is a {type(raw).__name__}; expected a JSON object")
        model_type = raw.get("model_type")
        if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
            raise ValueError(f"model_type is {short(model_type)}, which is not supported; supported: {supported()}")
        reader = Reader(raw)
        fields = _read_fields(reader, model_type)
        if reader.problems:
            raise ValueError(_report(f"the config of this {model_type} model cannot be used", reader.problems))
        return cls(**fields)

    def to_hf(self) -> dict[str, Any]:
        """A `config.json` that `from_hf` and transformers read back to this config."""
        architecture = self.architecture
        eos: Any = list(self.eos_token_id) if len(self.eos_token_id) != 1 else self.eos_token_id[0]
        raw = {
            "architectures": [architecture.hf_class],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            architecture.activation_key: architecture.activation,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_parameters": self.rope.to_hf(),
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos or None,
            "pad_token_id": self.pad_token_id,
            "initializer_range": self.initializer_range,
            "dtype": self.dtype,
        }
        raw |= {key: getattr(self, key) for key in architecture.bias_keys}
        if architecture.query_pre_attn_scalar is not None:
            raw["query_pre_attn_scalar"] = self.query_pre_attn_scalar or self.head_dim
        if architecture.soft_cap:
            raw["final_logit_softcapping"] = self.final_logit_softcapping
        if architecture.local_rope_theta is not None:
            local = self.local_rope or self.rope
            raw["rope_parameters"] = {"full_attention": self.rope.to_hf(), "sliding_attention": local.to_hf()}
        if architecture.windows != "none":
            raw["sliding_window"] = self.sliding_window
        if architecture.windows == "upper":
            raw["use_sliding_window"] = self.sliding_window is not None
        if architecture.windows in ("upper", "pattern"):
            sliding = [self.window(layer) is not None for layer in range(self.num_layers)]
            raw["layer_types"] = ["sliding_attention" if slides else "full_attention" for slides in sliding]
        return raw


def _report(what: str, problems: list[str]) -> str:
    return f"{what}:\n" + "\n".join(f"  {problem}" for problem in problems)


def _read_fields(reader: Reader, model_type: str) -> dict[str, Any]:
    architecture = ARCHITECTURES[model_type]
    fields: dict[str, Any] = {"model_type": model_type}
    for name, key in (
        ("vocab_size", "vocab_size"),
        ("hidden_size", "hidden_size"),
        ("intermediate_size", "intermediate_size"),
        ("num_layers", "num_hidden_layers"),
        ("num_heads", "num_attention_heads"),
    ):
        fields[name] = reader.integer(key, low=1, high=MAX_LAYERS if name == "num_layers" else INT32)
    heads = fields["num_heads"]
    # A config may omit the number of key and value heads (the architecture's default) or say null (as many as heads).
    fields["num_kv_heads"] = (
        reader.integer("num_key_value_heads", None, low=1)
        if "num_key_value_heads" in reader.raw
        else architecture.num_kv_heads
    ) or heads
    head_dim = reader.integer("head_dim", None if "head_dim" in reader.raw else architecture.head_dim, low=1)
    if head_dim is None and fields["hidden_size"] and heads and heads > 0:
        if fields["hidden_size"] % heads:
            reader.problems.append(
                f"hidden_size {fields['hidden_size']} is not a multiple of num_attention_heads {heads}, "
                "and head_dim is not given"
            )
        head_dim = fields["hidden_size"] // heads
    fields["head_dim"] = head_dim
    fields["rms_norm_eps"] = reader.number("rms_norm_eps", 1e-6)
    fields["max_position_embeddings"] = reader.integer(
        "max_position_embeddings", architecture.max_position_embeddings, low=1
    )
    fields["tie_word_embeddings"] = reader.boolean("tie_word_embeddings", architecture.tie_word_embeddings)
    fields["initializer_range"] = reader.number("initializer_range", 0.02)
    fields["bos_token_id"] = _first(_token_ids(reader, "bos_token_id", architecture.bos_token_id))
    fields["eos_token_id"] = _token_ids(reader, "eos_token_id", architecture.eos_token_id)
    fields["pad_token_id"] = _first(_token_ids(reader, "pad_token_id", architecture.pad_token_id))
    fields["dtype"] = _read_dtype(reader)
    biases = {key: reader.boolean(key, False) for key in architecture.bias_keys}
    fields |= biases | {"attention_out_bias": biases.get("attention_bias", False)}
    if architecture.qkv_bias:
        fields["attention_bias"] = True
    if architecture.windows != "none":
        fields |= _read_window(reader, architecture, fields["num_layers"])
    if architecture.query_pre_attn_scalar is not None:
        scalar = reader.integer("query_pre_attn_scalar", architecture.query_pre_attn_scalar, low=1)
        fields["query_pre_attn_scalar"] = None if scalar == head_dim else scalar
    if architecture.soft_cap:
        fields["final_logit_softcapping"] = reader.number("final_logit_softcapping", None)
    _refuse_arithmetic(reader, architecture)
    fields |= _read_ropes(reader, architecture, fields["max_position_embeddings"])
    if fields.get("sliding_window") is None and fields.get("local_rope") == fields["rope"]:
        fields["local_rope"] = None
    return fields


def _refuse_arithmetic(reader: Reader, architecture: Architecture) -> None:
    """Notes what a config asks for that no layer here computes."""
    key = architecture.activation_key
    activation = reader.raw.get(key, architecture.activation)
    if not isinstance(activation, str) or {"swish": "silu"}.get(activation, activation) != architecture.activation:
        reader.problems.append(
            f"{key} is {short(activation)}, which is not supported; supported: {architecture.activation}"
        )
    for key in ("attn_logit_softcapping", "use_bidirectional_attention"):
        if reader.raw.get(key):
            reader.problems.append(f"{key} is {short(reader.raw[key])}, which is not supported; expected none")


def _first(ids: tuple[int, ...]) -> int | None:
    return ids[0] if ids else None


def _token_ids(reader: Reader, key: str, default: int | None) -> tuple[int, ...]:
    value = reader.raw.get(key, default)
    ids = [] if value is None else value if isinstance(value, list | tuple) else [value]
    if not all(is_integer(i) and i <= INT32 for i in ids):
        return reader.refuse(key, "a token id, a list of them, or null", ())
    # Negative ids are an old way to say that there is no such token.
    return tuple(i for i in ids if i >= 0)


def _read_dtype(reader: Reader) -> str:
    value = reader.raw.get("dtype", reader.raw.get("torch_dtype")) or "float32"
    name = value.removeprefix("torch.") if isinstance(value, str) else value
    if not isinstance(name, str) or name not in DTYPES:
        reader.problems.append(f"dtype is {short(value)}, which is not supported; supported: {', '.join(DTYPES)}")
        return "float32"
    return name


def _read_window(reader: Reader, architecture: Architecture, num_layers: int | None) -> dict[str, Any]:
    # Null means no window; a missing key means the architecture's own.
    given = "sliding_window" in reader.raw
    window = reader.integer("sliding_window", None if given else architecture.sliding_window)
    full: tuple[int, ...] = ()
    if architecture.windows == "upper":
        if not reader.boolean("use_sliding_window", False):
            window = None
        full = tuple(range(min(reader.integer("max_window_layers", 28) or 0, num_layers or 0)))
    if architecture.windows == "pattern":
        older = reader.integer("_sliding_window_pattern", architecture.window_period, low=1)
        period = reader.integer("sliding_window_pattern", older, low=1)
        full = tuple(range(period - 1, num_layers or 0, period))
    kinds = reader.read("layer_types", (list,), "a list", None)
    if kinds is not None:
        unknown = sorted({short(kind) for kind in kinds if kind not in ("full_attention", "sliding_attention")})
        if unknown:
            reader.problems.append(
                f"layer_types holds {', '.join(unknown[:4])}, which is not supported; "
                "supported: full_attention, sliding_attention"
            )
        if num_layers is not None and len(kinds) != num_layers:
            reader.problems.append(f"layer_types has {len(kinds)} entries; expected num_hidden_layers = {num_layers}")
        full = tuple(layer for layer, kind in enumerate(kinds) if kind == "full_attention")
    return {"sliding_window": window, "full_attention_layers": full if window is not None else ()}


def _read_ropes(reader: Reader, architecture: Architecture, max_position_embeddings: int) -> dict[str, Any]:
    section = reader.object("rope_parameters") or reader.object("rope_scaling") or Reader({}, problems=reader.problems)
    theta, local_theta = architecture.rope_theta, architecture.local_rope_theta
    if local_theta is None:
        return {"rope": _read_rope(reader, section, theta, max_position_embeddings)}
    full, local = section.object("full_attention"), section.object("sliding_attention")
    if full is None and local is None:  # as transformers 4 writes it
        full, local_theta = section, reader.number("rope_local_base_freq", local_theta)
    full, local = full or Reader({}, problems=reader.problems), local or Reader({}, problems=reader.problems)
    # The theta beside the sections is that of layers without a window.
    local = Reader({"rope_theta": local_theta} | dict(local.raw), local.prefix, reader.problems)
    return {
        "rope": _read_rope(reader, full, theta, max_position_embeddings),
        "local_rope": _read_rope(reader, local, theta, max_position_embeddings),
    }


def _read_rope(
    reader: Reader, section: Reader, default_theta: float, max_position_embeddings: int
) -> RopeConfig | None:
    nested = [key for key, value in section.raw.items() if isinstance(value, Mapping)]
    if nested:
        reader.problems.append(
            f"{section.prefix}{short(nested[0])} is an object: one rope per layer type is not supported; "
            "expected one flat set of rope parameters"
        )
        return None
    theta = section.number("rope_theta", None)
    if theta is None:
        theta = reader.number("rope_theta", None)
    kind = section.raw.get("rope_type") or section.raw.get("type") or "default"
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        reader.problems.append(
            f"rope type is {short(kind)}, which is not supported; supported: {', '.join(ROPE_TYPES)}"
        )
        return None
    for place in (section, reader):
        if place.number("partial_rotary_factor", 1.0) != 1.0:
            reader.problems.append(
                f"{place.prefix}partial_rotary_factor is {short(place.raw['partial_rotary_factor'])}, "
                "which is not supported; supported: 1.0"
            )
    values: dict[str, Any] = {"type": kind, "theta": default_theta if theta is None else theta}
    if kind in ("llama3", "yarn"):
        # As transformers: the top level wins, and the context of the config is the last resort.
        original = reader.integer("original_max_position_embeddings", None, low=1)
        if original is None:
            original = section.integer("original_max_position_embeddings", None, low=1)
        values["original_max_position_embeddings"] = original or max_position_embeddings
    if kind == "yarn" and section.raw.get("factor") is None and values["original_max_position_embeddings"]:
        values["factor"] = max_position_embeddings / values["original_max_position_embeddings"]
    elif kind != "default":
        values["factor"] = section.number("factor")
    if kind == "llama3":
        values |= {key: section.number(key) for key in ("low_freq_factor", "high_freq_factor")}
    if kind == "yarn":
        values["beta_fast"] = section.number("beta_fast", None) or 32.0
        values["beta_slow"] = section.number("beta_slow", None) or 1.0
        values |= {key: section.number(key, None) for key in ("attention_factor", "mscale", "mscale_all_dim")}
        values["truncate"] = section.boolean("truncate", True)
    if reader.problems:
        return None
    try:
        return RopeConfig(**values)
    except ValueError as error:
        reader.problems.append(str(error))
        return None


def _type_problems(config: ModelConfig) -> list[str]:
    problems: list[str] = []

    def check(names: tuple[str, ...], is_right: Callable[[Any], bool], expected: str) -> None:
        problems.extend(
            f"{name} is {short(getattr(config, name))}; expected {expected}"
            for name in names
            if not is_right(getattr(config, name))
        )

    sizes = (
        "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
        "max_position_embeddings",
    )  # fmt: skip
    flags = ("tie_word_embeddings", "attention_bias", "attention_out_bias", "mlp_bias")
    check(sizes, lambda value: is_integer(value) and value >= 1, "a whole number of at least 1")
    check(sizes, lambda value: not is_integer(value) or value <= INT32, f"a whole number of at most {INT32}")
    check(("rms_norm_eps", "initializer_range"), is_finite, "a finite number")
    check(flags, lambda value: isinstance(value, bool), "true or false")
    check(("rope",), lambda value: isinstance(value, RopeConfig), "a RopeConfig")
    check(("local_rope",), lambda value: value is None or isinstance(value, RopeConfig), "a RopeConfig, or None")
    check(
        ("final_logit_softcapping",),
        lambda value: value is None or (is_finite(value) and value > 0),
        "a number above 0, or None",
    )
    check(
        ("query_pre_attn_scalar",),
        lambda value: value is None or (is_integer(value) and 1 <= value <= INT32),
        f"a whole number from 1 to {INT32}, or None",
    )
    check(
        ("sliding_window", "bos_token_id", "pad_token_id"),
        lambda value: value is None or (is_integer(value) and value <= INT32),
        f"a whole number up to {INT32}, or None",
    )
    check(
        ("full_attention_layers", "eos_token_id"),
        lambda value: isinstance(value, tuple) and all(map(is_integer, value)),
        "a tuple of whole numbers",
    )
    check(("model_type", "dtype"), lambda value: isinstance(value, str), "a text")
    return problems


def _problems(config: ModelConfig) -> list[str]:
    problems = _type_problems(config)
    if problems:
        return problems
    if config.model_type not in ARCHITECTURES:
        return [f"model_type is {config.model_type!r}, which is not supported; supported: {supported()}"]
    if config.num_layers > MAX_LAYERS:
        problems.append(f"num_layers is {config.num_layers}; expected at most {MAX_LAYERS}")
    if config.context_length > INT32:
        problems.append(f"the rope stretches the context to {config.context_length} tokens; expected at most {INT32}")
    if config.sliding_window is not None and config.architecture.windows == "none":
        problems.append(f"sliding_window is {config.sliding_window}, but {config.model_type} models have none")
    if config.local_rope is not None and config.architecture.local_rope_theta is None:
        problems.append(f"local_rope is given, but {config.model_type} models have one rope")
    if config.local_rope is not None and config.sliding_window is None:
        problems.append("local_rope is given, but sliding_window is None; expected the window of its layers")
    if config.num_heads % config.num_kv_heads:
        problems.append(
            f"num_heads is {config.num_heads} and num_kv_heads is {config.num_kv_heads}; "
            "expected num_kv_heads to divide num_heads"
        )
    if config.head_dim > _MAX_HEAD_DIM:
        problems.append(f"head_dim is {config.head_dim}; expected at most {_MAX_HEAD_DIM}")
    if config.head_dim % 2:
        problems.append(f"head_dim is {config.head_dim}; expected an even number (rotary embedding pairs dimensions)")
    if "dynamic" in {rope.type for rope in (config.rope, config.local_rope) if rope} and config.head_dim == 2:
        problems.append("head_dim is 2; rope type 'dynamic' needs at least 4")
    if not _SMALLEST_EPS <= config.rms_norm_eps <= 1:
        problems.append(f"rms_norm_eps is {config.rms_norm_eps}; expected a number above 0 ({_SMALLEST_EPS:g} to 1)")
    if config.sliding_window is not None and config.sliding_window < 1:
        problems.append(f"sliding_window is {config.sliding_window}; expected at least 1, or None for no window")
    if config.dtype not in DTYPES:
        problems.append(f"dtype is {config.dtype!r}, which is not supported; supported: {', '.join(DTYPES)}")
    return problems
