"""What distinguishes the supported decoders: one entry a model type, and nothing about them elsewhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal, NamedTuple

_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GGUF_NAMES_OF_FOUR_NORMS = _GGUF_NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


class Norms(NamedTuple):
    """The norms around one half of a block, `h + after(half(before(h)))`, by their Hugging Face names."""

    before: str
    after: str | None = None


_BEFORE_ATTENTION, _BEFORE_MLP = Norms("input_layernorm"), Norms("post_attention_layernorm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """What all models of one type have in common.

    Attributes:
        hf_class: the class in transformers.
        attention, mlp: names of the linear layers in forward order; those that read one input stand together.
        attention_norms, mlp_norms: the norms around the halves of a block.
        norm_offset: norms multiply by this plus their weight (GGUF files hold the sum).
        qk_norm: every head of q and k is normalized before it is rotated, by `q_norm` and `k_norm`.
        qkv_bias: q, k and v always have a bias.
        bias_keys: which of `attention_bias` (q, k, v and o) and `mlp_bias` a config.json has.
        activation, activation_key: of the gate, and where a config.json names it.
        bos_first: texts begin with the BOS token, without which the model is at a loss.
        scaled_embedding: embeddings are multiplied by the square root of the hidden size.
        soft_cap: a config.json may have `final_logit_softcapping`.
        query_pre_attn_scalar: queries are divided by the square root of this and not of `head_dim`; the default of a
            key of config.json, None where there is none.
        windows: the layers that have the sliding window, unless the config lists them: none of them, all, those from
            `max_window_layers` on, or all but every nth, where n is `window_period` or the config's
            `sliding_window_pattern`.
        rope_theta, local_rope_theta: of a config.json that does not say; the second, where layers with a window rotate
            in their own way, is of those.
        stretched_context: `max_position_embeddings` counts what the rope stretches the context to.
        max_position_embeddings, num_kv_heads, head_dim, tie_word_embeddings, bos_token_id, eos_token_id, pad_token_id,
            sliding_window: what a config.json means that does not say; None means as many as heads, and what the heads
            make of the hidden size.
        gguf: `general.architecture` of its GGUF files.
        gguf_query_scalars: by number of layers, where it is not `head_dim`: GGUF files do not say it.
        gguf_names: name in GGUF files of every module (within its layer).
        gguf_interleaved: the two halves of every head of q and k are interleaved in GGUF files.
    """

    hf_class: str
    attention: tuple[tuple[str, ...], ...] = (("q_proj", "k_proj", "v_proj"), ("o_proj",))
    mlp: tuple[tuple[str, ...], ...] = (("gate_proj", "up_proj"), ("down_proj",))
    attention_norms: Norms = _BEFORE_ATTENTION
    mlp_norms: Norms = _BEFORE_MLP
    norm_offset: float = 0.0
    qk_norm: bool = False
    qkv_bias: bool = False
    bias_keys: tuple[str, ...] = ()
    activation: Literal["silu", "gelu_pytorch_tanh"] = "silu"
    activation_key: str = "hidden_act"
    bos_first: bool = False
    scaled_embedding: bool = False
    soft_cap: bool = False
    query_pre_attn_scalar: int | None = None
    windows: Literal["none", "all", "upper", "pattern"] = "none"
    window_period: int = 1
    rope_theta: float = 10000.0
    local_rope_theta: float | None = None
    stretched_context: bool = False
    max_position_embeddings: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    sliding_window: int | None = None
    gguf: str
    gguf_names: Mapping[str, str] = dataclasses.field(default_factory=lambda: _GGUF_NAMES)
    gguf_interleaved: bool = False
    gguf_query_scalars: Mapping[int, int] = dataclasses.field(default_factory=dict)

    def inputs(self) -> list[tuple[str, ...]]:
        """The linear layers of a block in forward order, by path within it; those that read one input together."""
        halves = (("self_attn", self.attention), ("mlp", self.mlp))
        return [tuple(f"{half}.{name}" for name in names) for half, groups in halves for names in groups]


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(
        hf_class="LlamaForCausalLM",
        bias_keys=("attention_bias", "mlp_bias"),
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        gguf="llama",
        gguf_interleaved=True,
    ),
    "mistral": Architecture(
        hf_class="MistralForCausalLM",
        windows="all",
        max_position_embeddings=131072,
        num_kv_heads=8,
        bos_token_id=1,
        eos_token_id=2,
        sliding_window=4096,
        gguf="llama",
        gguf_interleaved=True,
    ),
    "qwen2": Architecture(
        hf_class="Qwen2ForCausalLM",
        qkv_bias=True,
        windows="upper",
        max_position_embeddings=32768,
        num_kv_heads=32,
        sliding_window=4096,
        gguf="qwen2",
    ),
    "qwen3": Architecture(
        hf_class="Qwen3ForCausalLM",
        qk_norm=True,
        bias_keys=("attention_bias",),
        windows="upper",
        max_position_embeddings=32768,
        num_kv_heads=32,
        head_dim=128,
        sliding_window=4096,
        gguf="qwen3",
    ),
    "gemma3_text": Architecture(
        hf_class="Gemma3ForCausalLM",
        attention_norms=Norms("input_layernorm", "post_attention_layernorm"),
        mlp_norms=Norms("pre_feedforward_layernorm", "post_feedforward_layernorm"),
        norm_offset=1.0,
        qk_norm=True,
        bias_keys=("attention_bias",),
        activation="gelu_pytorch_tanh",
        activation_key="hidden_activation",
        bos_first=True,
        scaled_embedding=True,
        soft_cap=True,
        query_pre_attn_scalar=256,
        windows="pattern",
        window_period=6,
        rope_theta=1_000_000.0,
        local_rope_theta=10_000.0,
        stretched_context=True,
        max_position_embeddings=131072,
        num_kv_heads=4,
        head_dim=256,
        tie_word_embeddings=True,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
        sliding_window=4096,
        gguf="gemma3",
        gguf_names=_GGUF_NAMES_OF_FOUR_NORMS,
        gguf_query_scalars={62: 168},
    ),
}
"""By `model_type`."""

SAME_INPUT: Mapping[str, str] = {
    name: names[0]
    for architecture in ARCHITECTURES.values()
    for names in (*architecture.attention, *architecture.mlp)
    for name in names[1:]
}
"""For every linear layer that reads the same tensor as one before it: the first that does."""


def supported() -> str:
    """The supported model types, for messages."""
    return ", ".join(ARCHITECTURES)


def gguf_architectures() -> tuple[str, ...]:
    """The supported values of `general.architecture`."""
    return tuple(dict.fromkeys(architecture.gguf for architecture in ARCHITECTURES.values()))


def model_type_of_gguf(architecture: str, *, windowed: bool) -> str:
    """The model type of a GGUF architecture; of several, the one whose models have sliding windows or have none."""
    types = [name for name, entry in ARCHITECTURES.items() if entry.gguf == architecture]
    return next((name for name in types if (ARCHITECTURES[name].windows != "none") == windowed), types[0])
