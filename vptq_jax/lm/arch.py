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
        qk_norm: every head of q and k is normalized before it is rotated, by `q_norm` and `k_norm`.
        qkv_bias: q, k and v always have a bias.
        bias_keys: which of `attention_bias` (q, k, v and o) and `mlp_bias` a config.json has.
        windows: the layers that have the sliding window, unless the config lists them: none of them, all, or those
            from `max_window_layers` on.
        max_position_embeddings, num_kv_heads, head_dim, bos_token_id, eos_token_id, sliding_window: what a config.json
            means that does not say; None means as many as heads, and what the heads make of the hidden size.
        gguf: `general.architecture` of its GGUF files.
        gguf_names: name in GGUF files of every module (within its layer).
        gguf_interleaved: the two halves of every head of q and k are interleaved in GGUF files.
    """

    hf_class: str
    attention: tuple[tuple[str, ...], ...] = (("q_proj", "k_proj", "v_proj"), ("o_proj",))
    mlp: tuple[tuple[str, ...], ...] = (("gate_proj", "up_proj"), ("down_proj",))
    attention_norms: Norms = _BEFORE_ATTENTION
    mlp_norms: Norms = _BEFORE_MLP
    qk_norm: bool = False
    qkv_bias: bool = False
    bias_keys: tuple[str, ...] = ()
    windows: Literal["none", "all", "upper"] = "none"
    max_position_embeddings: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    sliding_window: int | None = None
    gguf: str
    gguf_names: Mapping[str, str] = dataclasses.field(default_factory=lambda: _GGUF_NAMES)
    gguf_interleaved: bool = False

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
