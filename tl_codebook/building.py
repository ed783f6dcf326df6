"""Make a host around weights that are already here: the two ways that need no network and no weight processing."""

from __future__ import annotations

from typing import Any

import torch

from tl_codebook.errors import ConfigError

__all__ = ["bridge_around", "hooked_from_config", "hooked_transformer_class", "native_bridge"]


def hooked_transformer_class() -> Any | None:
    """Return `HookedTransformer`, or None where TransformerLens has none (4.0 and later raise on any access to it)."""
    try:
        from transformer_lens import HookedTransformer
    except ImportError:
        return None
    return HookedTransformer


def hooked_from_config(cfg: Any, tokenizer: Any) -> Any:
    """Build a HookedTransformer with fresh weights from its config (an object, or its fields)."""
    hooked = hooked_transformer_class()
    if hooked is None:
        raise ConfigError(
            "a HookedTransformer was asked for, and TransformerLens 4 has none. Install 'transformer-lens<4', or boot the model as a "
            "TransformerBridge and attach the codes alone: attach(bridge, Codebooks.from_pretrained(folder))."
        )
    if isinstance(cfg, dict):
        from transformer_lens import HookedTransformerConfig

        cfg = HookedTransformerConfig.from_dict(cfg)
    return _round_as_hugging_face(hooked(cfg, tokenizer, move_to_device=False))


def _round_as_hugging_face(model: Any) -> Any:
    """Recompute plain rotary tables with Hugging Face's rounding of angles: by position 2000 the difference moves logits by 3e-4."""
    cfg = model.cfg
    other = cfg.use_NTK_by_parts_rope or cfg.use_yarn_rope or cfg.use_dynamic_ntk_rope or cfg.rotary_adjacent_pairs or cfg.rotary_base_local
    for attn in (block.attn for block in model.blocks if cfg.positional_embedding_type == "rotary" and not other):
        step = 1.0 / cfg.rotary_base ** (torch.arange(0, cfg.rotary_dim, 2).float() / cfg.rotary_dim)
        step = step if attn.attn_type == "local" else step / cfg.rotary_scaling_factor
        angles = torch.arange(len(attn.rotary_sin)).float()[:, None] * step.repeat(2)
        attn.rotary_sin.copy_(angles.sin()), attn.rotary_cos.copy_(angles.cos())
    return model


def bridge_around(hf_model: Any, tokenizer: Any, source: str | None = None) -> Any:
    """Wrap a Hugging Face model, in place, in a TransformerBridge. `source` is its hub name, if it has one."""
    from transformer_lens.model_bridge import TransformerBridge

    architecture = type(hf_model).__name__
    hf_model.config.architectures = [architecture]
    if hasattr(hf_model, "set_attn_implementation"):
        hf_model.set_attn_implementation("eager")  # the Bridge hooks scores and patterns
    if tokenizer is not None:
        return TransformerBridge.boot_transformers(
            source or architecture, hf_model=hf_model, tokenizer=tokenizer, dtype=next(hf_model.parameters()).dtype
        )
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    return build_bridge_from_module(hf_model, architecture, hf_config=hf_model.config)


def native_bridge(fields: dict[str, Any], tokenizer: Any) -> Any:
    """Build a TransformerBridge around TransformerLens' own architecture from the fields of its config."""
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    with torch.random.fork_rng(devices=[]):
        return TransformerBridge.boot_native(TransformerBridgeConfig.from_dict(fields), tokenizer)
