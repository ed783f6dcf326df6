"""Where Hugging Face models keep what TransformerLens names: one row per architecture, no class per architecture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tl_codebook.errors import ConfigError, nearest

__all__ = ["LAYOUTS", "Layout", "layout_of"]


@dataclass(frozen=True)
class Layout:
    """Module paths of one architecture; those of the parts of a block are relative to it."""

    blocks: str
    """The list of blocks, from the language model down."""
    attn: str
    attn_out: str
    """The projection of the heads to the residual stream, under `attn`: its input is z, its output attn_out."""
    qkv: tuple[str, ...]
    """One fused projection, or those of q, k and v, under `attn`."""
    mlp: str
    mlp_out: str
    """The projection of the hidden layer to the residual stream, under `mlp`: its input is post, its output mlp_out."""
    fused: Literal["qkv head d_head", "head qkv d_head"] | None = None
    """The axes that the output of one fused projection has."""

    def block(self, layer: int) -> str:
        """Return the path of a block."""
        return f"{self.blocks}.{layer}"


_LLAMA = Layout("model.layers", "self_attn", "o_proj", ("q_proj", "k_proj", "v_proj"), "mlp", "down_proj")

LAYOUTS: dict[str, Layout] = {
    "gpt2": Layout("transformer.h", "attn", "c_proj", ("c_attn",), "mlp", "c_proj", "qkv head d_head"),
    "gpt_neox": Layout("gpt_neox.layers", "attention", "dense", ("query_key_value",), "mlp", "dense_4h_to_h", "head qkv d_head"),
    "gpt_neo": Layout("transformer.h", "attn.attention", "out_proj", ("q_proj", "k_proj", "v_proj"), "mlp", "c_proj"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
}
"""`model_type` of a configuration -> layout."""


def layout_of(model_type: str) -> Layout:
    """Return the layout of an architecture, or raise `ConfigError` with those that are known.

    >>> layout_of("gpt2").block(3)
    'transformer.h.3'
    """
    if model_type not in LAYOUTS:
        raise ConfigError(f"models of type {model_type!r} are not in the table. {nearest(model_type, LAYOUTS)}Known: {' '.join(LAYOUTS)}.")
    return LAYOUTS[model_type]
