"""Turn the base of a TransformerLens host back into the Hugging Face model that computes the same.

One row per tensor of Hugging Face: which tensors of a HookedTransformer it is made of, and the einops pattern that makes it. A
TransformerBridge keeps the tensors of Hugging Face; there q, k and v alone are put together anew, since the fused ones it keeps beside them
go stale in training.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from tl_codebook import hosts
from tl_codebook.convert.layouts import LAYOUTS, Layout, layout_of
from tl_codebook.convert.pretrained import unfilled_model
from tl_codebook.errors import CheckpointError

__all__ = ["hf_model_of"]


class _Row(NamedTuple):
    """A tensor of Hugging Face, and the tensors of a HookedTransformer that it is made of; ``N`` stands for the layer."""

    hf: str
    hooked: tuple[str, ...]
    pattern: str = ""
    """Empty = the same tensor; with several tensors their axis is ``qkv``."""


def _norm(hf: str, hooked: str) -> list[_Row]:
    return [_Row(f"{hf}.weight", (f"{hooked}.w",)), _Row(f"{hf}.bias", (f"{hooked}.b",))]


def _heads(projections: Iterable[str], *, bias: bool) -> list[_Row]:
    """The rows of three separate projections, each [out in]."""
    rows = []
    for projection, x in zip(projections, "QKV", strict=True):
        rows.append(_Row(f"{projection}.weight", (f"blocks.N.attn.W_{x}",), "head d_in d_head -> (head d_head) d_in"))
        rows += [_Row(f"{projection}.bias", (f"blocks.N.attn.b_{x}",), "head d_head -> (head d_head)")] if bias else []
    return rows


def _linear(hf: str, hooked: str, name: str, *, bias: bool = True) -> list[_Row]:
    weight = _Row(
        f"{hf}.weight", (f"{hooked}.W_{name}",), "head d_head d_out -> d_out (head d_head)" if name == "O" else "d_in d_out -> d_out d_in"
    )
    return [weight, _Row(f"{hf}.bias", (f"{hooked}.b_{name}",))] if bias else [weight]


_H, _X, _M = "transformer.h.N", "gpt_neox.layers.N", "model.layers.N"
_UNEMBED = _Row("lm_head.weight", ("unembed.W_U",), "d_model token -> token d_model")
_QKV_WEIGHTS, _QKV_BIASES = (tuple(f"blocks.N.attn.{kind}_{x}" for x in "QKV") for kind in "Wb")
_LEARNED_POSITIONS = [
    _Row("transformer.wte.weight", ("embed.W_E",)),
    _Row("transformer.wpe.weight", ("pos_embed.W_pos",)),
    *_norm(f"{_H}.ln_1", "blocks.N.ln1"),
    *_norm(f"{_H}.ln_2", "blocks.N.ln2"),
    *_norm("transformer.ln_f", "ln_final"),
    _UNEMBED,
]


def _llama(*, qkv_bias: bool) -> list[_Row]:
    return [
        _Row("model.embed_tokens.weight", ("embed.W_E",)),
        _Row(f"{_M}.input_layernorm.weight", ("blocks.N.ln1.w",)),
        *_heads((f"{_M}.self_attn.{x}_proj" for x in "qkv"), bias=qkv_bias),
        *_linear(f"{_M}.self_attn.o_proj", "blocks.N.attn", "O", bias=False),
        _Row(f"{_M}.post_attention_layernorm.weight", ("blocks.N.ln2.w",)),
        *_linear(f"{_M}.mlp.gate_proj", "blocks.N.mlp", "gate", bias=False),
        *_linear(f"{_M}.mlp.up_proj", "blocks.N.mlp", "in", bias=False),
        *_linear(f"{_M}.mlp.down_proj", "blocks.N.mlp", "out", bias=False),
        _Row("model.norm.weight", ("ln_final.w",)),
        _UNEMBED,
    ]


_ROWS: dict[str, list[_Row]] = {
    "gpt2": [  # its Conv1D layers keep [in out]
        *_LEARNED_POSITIONS,
        _Row(f"{_H}.attn.c_attn.weight", _QKV_WEIGHTS, "qkv head d_in d_head -> d_in (qkv head d_head)"),
        _Row(f"{_H}.attn.c_attn.bias", _QKV_BIASES, "qkv head d_head -> (qkv head d_head)"),
        _Row(f"{_H}.attn.c_proj.weight", ("blocks.N.attn.W_O",), "head d_head d_out -> (head d_head) d_out"),
        _Row(f"{_H}.attn.c_proj.bias", ("blocks.N.attn.b_O",)),
        _Row(f"{_H}.mlp.c_fc.weight", ("blocks.N.mlp.W_in",)),
        _Row(f"{_H}.mlp.c_fc.bias", ("blocks.N.mlp.b_in",)),
        _Row(f"{_H}.mlp.c_proj.weight", ("blocks.N.mlp.W_out",)),
        _Row(f"{_H}.mlp.c_proj.bias", ("blocks.N.mlp.b_out",)),
    ],
    "gpt_neo": [
        *_LEARNED_POSITIONS,
        *_heads((f"{_H}.attn.attention.{x}_proj" for x in "qkv"), bias=False),
        *_linear(f"{_H}.attn.attention.out_proj", "blocks.N.attn", "O"),
        *_linear(f"{_H}.mlp.c_fc", "blocks.N.mlp", "in"),
        *_linear(f"{_H}.mlp.c_proj", "blocks.N.mlp", "out"),
    ],
    "gpt_neox": [
        _Row("gpt_neox.embed_in.weight", ("embed.W_E",)),
        *_norm(f"{_X}.input_layernorm", "blocks.N.ln1"),
        *_norm(f"{_X}.post_attention_layernorm", "blocks.N.ln2"),
        _Row(f"{_X}.attention.query_key_value.weight", _QKV_WEIGHTS, "qkv head d_in d_head -> (head qkv d_head) d_in"),
        _Row(f"{_X}.attention.query_key_value.bias", _QKV_BIASES, "qkv head d_head -> (head qkv d_head)"),
        *_linear(f"{_X}.attention.dense", "blocks.N.attn", "O"),
        *_linear(f"{_X}.mlp.dense_h_to_4h", "blocks.N.mlp", "in"),
        *_linear(f"{_X}.mlp.dense_4h_to_h", "blocks.N.mlp", "out"),
        *_norm("gpt_neox.final_layer_norm", "ln_final"),
        _UNEMBED,
    ],
    "llama": _llama(qkv_bias=False),
    "mistral": _llama(qkv_bias=False),
    "qwen2": _llama(qkv_bias=True),
}


def _gpt2(cfg: Any) -> dict[str, Any]:
    return {
        "n_positions": cfg.n_ctx,
        "n_embd": cfg.d_model,
        "n_layer": cfg.n_layers,
        "n_head": cfg.n_heads,
        "n_inner": cfg.d_mlp,
        "activation_function": cfg.act_fn,
        "layer_norm_epsilon": cfg.eps,
        "scale_attn_weights": cfg.use_attn_scale,
        "scale_attn_by_inverse_layer_idx": cfg.scale_attn_by_inverse_layer_idx,
    } | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)  # a HookedTransformer has no dropout


def _gpt_neo(cfg: Any) -> dict[str, Any]:
    return {
        "hidden_size": cfg.d_model,
        "num_layers": cfg.n_layers,
        "num_heads": cfg.n_heads,
        "max_position_embeddings": cfg.n_ctx,
        "intermediate_size": cfg.d_mlp,
        "activation_function": cfg.act_fn,
        "layer_norm_epsilon": cfg.eps,
        "attention_types": [[list(cfg.attn_types or ["global"] * cfg.n_layers), 1]],
    } | ({"window_size": cfg.window_size} if cfg.window_size else {})


def _rotary(cfg: Any) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(cfg.rotary_base)}
    if cfg.use_NTK_by_parts_rope:
        rope |= {
            "rope_type": "llama3",
            "factor": cfg.NTK_by_parts_factor,
            "low_freq_factor": cfg.NTK_by_parts_low_freq_factor,
            "high_freq_factor": cfg.NTK_by_parts_high_freq_factor,
            "original_max_position_embeddings": cfg.NTK_original_ctx_len,
        }
    return {
        "hidden_size": cfg.d_model,
        "intermediate_size": cfg.d_mlp,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "max_position_embeddings": cfg.n_ctx,
        "hidden_act": cfg.act_fn,
        "rope_parameters": rope,
    }


def _gpt_neox(cfg: Any) -> dict[str, Any]:
    fields = _rotary(cfg) | {"layer_norm_eps": cfg.eps, "use_parallel_residual": cfg.parallel_attn_mlp, "attention_bias": True}
    fields["rope_parameters"] |= {"partial_rotary_factor": (cfg.rotary_dim or cfg.d_head) / cfg.d_head}
    return fields


def _llama_like(cfg: Any) -> dict[str, Any]:
    window = cfg.window_size if cfg.use_local_attn else None
    fields = _rotary(cfg) | {"rms_norm_eps": cfg.eps, "num_key_value_heads": cfg.n_key_value_heads or cfg.n_heads, "head_dim": cfg.d_head}
    return fields | {"sliding_window": window, "use_sliding_window": window is not None, "max_window_layers": 0}


_FIELDS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "gpt2": _gpt2,
    "gpt_neo": _gpt_neo,
    "gpt_neox": _gpt_neox,
    "llama": lambda cfg: {key: value for key, value in _llama_like(cfg).items() if "window" not in key},
    "mistral": lambda cfg: {
        key: value for key, value in _llama_like(cfg).items() if key not in ("use_sliding_window", "max_window_layers")
    },
    "qwen2": _llama_like,
}
"""The configuration of Hugging Face from that of a HookedTransformer; `hf_model_of` adds what all have."""

_WITHOUT_WORD = ("attn_only", "use_qk_norm", "clip_qkv", "use_logn_attn", "use_dynamic_ntk_rope", "use_yarn_rope", "use_attention_sinks")
"""What a HookedTransformer may be told to do, and these architectures never do."""


def hf_model_of(model: Any) -> Any:
    """Return a Hugging Face model on the CPU with the base weights of a host, sharing none of them.

    Raises:
        ConfigError: an architecture that is not in the table.
        CheckpointError: processed weights, or weights that Hugging Face has no place for.
    """
    config, tensors, left = _of_bridge(model) if hosts.is_bridge(model) else _of_hooked(model)
    lost = [name for name, value in left.items() if bool((value != 0).any())]
    if lost:
        raise CheckpointError(
            f"{config.model_type} has no place for {', '.join(map(repr, lost[:5]))}{' and others' if len(lost) > 5 else ''}, which "
            f"{'is' if len(lost) == 1 else 'are'} not zero (trained?). Freeze at zero before training what Hugging Face lacks "
            "(parameter.requires_grad_(False)), or keep this model with tl_codebook.save. Nothing was written."
        )
    unembed = next(name for name in tensors if name.endswith(("lm_head.weight", "embed_out.weight")))
    embed = next(name for name in tensors if name.endswith(("wte.weight", "embed_in.weight", "embed_tokens.weight")))
    config.tie_word_embeddings = bool(config.tie_word_embeddings) and torch.equal(tensors[unembed], tensors[embed])
    return _filled(config, tensors)


def _filled(config: Any, tensors: Mapping[str, Tensor]) -> Any:
    hf_model = unfilled_model(config, config.dtype)
    apart = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    if "embed_out.weight" in hf_model.state_dict() and "lm_head.weight" in apart:  # GPT-NeoX before transformers 5.14
        apart["embed_out.weight"] = apart.pop("lm_head.weight")
    try:
        hf_model.load_state_dict(apart, assign=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"the weights do not fit the {type(hf_model).__name__} that their configuration describes ({error}). Keep this model with "
            "tl_codebook.save; nothing was written."
        ) from error
    hf_model.tie_weights()
    return hf_model.eval()


def _of_bridge(model: Any) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    inner = model.original_model
    if getattr(model, "_weights_processed", False):
        raise CheckpointError(
            "the weights of this TransformerBridge were processed (enable_compatibility_mode), and Hugging Face computes with those from "
            "before. Export a bridge without it; nothing was written."
        )
    if type(inner).__name__ == "NativeModel":
        raise CheckpointError(
            "this TransformerBridge has TransformerLens' own architecture (boot_native), which Hugging Face lacks. Keep it with "
            "tl_codebook.save; nothing was written."
        )
    layout = layout_of(str(inner.config.model_type))
    config = copy.deepcopy(inner.config)
    config.dtype = next(iter(inner.parameters())).dtype  # a model that was cast keeps the old one in its configuration
    tensors = {name: _tensor(inner, name) for name in unfilled_model(config, config.dtype).state_dict()}
    used = set(map(id, tensors.values()))
    if layout.fused:
        for layer in range(len(model.blocks)):
            fused, parts = _fused(inner, layout, layer, int(config.num_attention_heads))
            used |= set(map(id, parts))
            tensors |= fused
    named = {name.replace("._original_component", ""): value for name, value in inner.named_parameters() if ".codebook." not in name}
    # A fused projection is kept under two names, and only one of the names of each parameter is listed.
    return config, tensors, {name: value for name, value in named.items() if id(value) not in used}


def _module(inner: nn.Module, path: str) -> nn.Module:
    """Return the module of Hugging Face at a path through the wrappers of a Bridge, with its own wrapper."""
    module = inner
    for name in path.split("."):
        module = _unwrapped(module).get_submodule(name)
    return module


def _unwrapped(module: nn.Module) -> nn.Module:
    while isinstance(inside := module._modules.get("_original_component"), nn.Module):
        module = inside
    return module


def _tensor(inner: nn.Module, name: str) -> Tensor:
    path, _, last = name.rpartition(".")
    try:
        value: Tensor = getattr(_unwrapped(_module(inner, path)), last)
    except AttributeError:
        raise CheckpointError(
            f"this TransformerBridge holds no tensor for {name!r} of {type(inner).__name__} (LoRA or another library's modules? Merge or "
            "remove them first). Nothing was written."
        ) from None
    return value


def _fused(inner: nn.Module, layout: Layout, layer: int, n_heads: int) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Put the q, k and v that the Bridge computes with back into one projection; return its tensors, and those it was made of."""
    attention = _module(inner, f"{layout.block(layer)}.{layout.attn}")
    parts: list[Any] = [_unwrapped(attention.get_submodule(name)) for name in "qkv"]
    path = f"{layout.block(layer)}.{layout.attn}.{layout.qkv[0]}"
    weights = [part.weight.mT if isinstance(part, nn.Linear) else part.weight for part in parts]  # [in out], as the Conv1D of GPT-2 has it
    weight = rearrange(torch.stack(weights), f"qkv d_in (head d_head) -> d_in ({layout.fused})", head=n_heads)
    target: Any = _unwrapped(_module(inner, path))
    tensors = {f"{path}.weight": weight.mT if isinstance(target, nn.Linear) else weight}
    if target.bias is not None:
        tensors[f"{path}.bias"] = rearrange(
            torch.stack([part.bias for part in parts]), f"qkv (head d_head) -> ({layout.fused})", head=n_heads
        )
    return tensors, [tensor for part in parts for tensor in (part.weight, part.bias)]


def _of_hooked(model: Any) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    from transformers import CONFIG_MAPPING

    cfg = model.cfg
    if str(cfg.normalization_type or "").endswith("Pre"):
        raise CheckpointError(
            f"the norms of this HookedTransformer were folded into its weights (normalization_type={cfg.normalization_type!r}, fold_ln). "
            "Load it without weight processing (load_hf, from_pretrained_no_processing); nothing was written."
        )
    kind = _model_type(cfg)
    odd = [name for name in _WITHOUT_WORD if getattr(cfg, name, None)]
    if odd or cfg.d_vocab_out not in (-1, cfg.d_vocab):
        reason = ", ".join(odd) or f"d_vocab_out={cfg.d_vocab_out} beside d_vocab={cfg.d_vocab}"
        raise CheckpointError(
            f"{kind} of Hugging Face has no word for {reason}. Keep this model with tl_codebook.save; nothing was written."
        )
    own = {name: value for name, value in model.named_parameters() if ".codebook." not in name}
    tensors, used = {}, set()
    for row in _ROWS[kind]:
        for layer in range(cfg.n_layers) if "N" in row.hf else [0]:
            names = [_hooked_name(name.replace("N", str(layer)), own, kind) for name in row.hooked]
            used |= set(names)
            value = own[names[0]] if len(names) == 1 else torch.stack([own[name] for name in names])
            tensors[row.hf.replace("N", str(layer))] = rearrange(value, row.pattern) if row.pattern else value
    tokens = {f"{name}_token_id": _token_id(model, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    common = {"vocab_size": cfg.d_vocab, "tie_word_embeddings": True, "dtype": next(iter(own.values())).dtype}
    config = CONFIG_MAPPING[kind](**_plain(_FIELDS[kind](cfg) | common | tokens))
    return config, tensors, {name: value for name, value in own.items() if name not in used}


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.item() if hasattr(value, "item") else value for key, value in fields.items()}  # numpy numbers are no JSON


def _token_id(model: Any, name: str) -> int | None:
    value = getattr(getattr(model, "tokenizer", None), name, None)
    return int(value) if value is not None and 0 <= int(value) < model.cfg.d_vocab else None


def _hooked_name(name: str, own: Mapping[str, Tensor], kind: str) -> str:
    head, dot, last = name.rpartition(".")
    found = next((candidate for candidate in (f"{head}{dot}_{last}", name) if candidate in own), None)  # _W_K: the key-value heads
    if found is None:
        raise CheckpointError(f"this HookedTransformer lacks {name!r}, which a {kind} of Hugging Face needs. Nothing was written.")
    return found


def _model_type(cfg: Any) -> str:
    """Return the `model_type` of Hugging Face: by where the model came from, or else (built from a configuration) by what it computes."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    origin = getattr(cfg, "original_architecture", None)
    if origin:
        kind = next((kind for kind in LAYOUTS if MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind] == origin), None)
        layout_of(kind or str(origin))
        return str(kind)
    rotary, rms = cfg.positional_embedding_type == "rotary", cfg.normalization_type == "RMS"
    if rotary and rms and cfg.gated_mlp:
        return "llama"
    if rotary and cfg.normalization_type == "LN" and not cfg.gated_mlp:
        return "gpt_neox"
    if cfg.positional_embedding_type == "standard" and cfg.normalization_type == "LN" and not cfg.gated_mlp:
        return "gpt_neo" if cfg.use_local_attn or not cfg.use_attn_scale else "gpt2"
    raise CheckpointError(
        f"no architecture of the table has positional_embedding_type={cfg.positional_embedding_type!r}, normalization_type="
        f"{cfg.normalization_type!r} and gated_mlp={cfg.gated_mlp}. Keep this model with tl_codebook.save; nothing was written."
    )
