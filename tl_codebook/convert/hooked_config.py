"""What a HookedTransformer needs of a Hugging Face model, from the model itself: one row per architecture, no class per architecture.

TransformerLens guesses much of a configuration from the name of a model or from its usual size: 4 * d_model, rotary base 10000, no linear
or YaRN scaling, no biases in Llama. The rows here correct it; what a HookedTransformer cannot be told is refused by name. TransformerLens
for the other architectures is taken as it is, and judged by its logits alone.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tl_codebook.building import hooked_from_config
from tl_codebook.convert.layouts import LAYOUTS
from tl_codebook.errors import ConfigError

__all__ = ["UnrepresentableError", "hooked_from_hf"]


class UnrepresentableError(Exception):
    """What of a model a host has no place for. `load_hf` says the rest and raises a `CheckpointError`."""


_LLAMA = {"max_position_embeddings": "n_ctx", "rms_norm_eps": "eps", "hidden_act": "act_fn"}
_FIELDS: dict[str, dict[str, str]] = {
    "gpt2": {"n_positions": "n_ctx", "layer_norm_epsilon": "eps", "activation_function": "act_fn"},
    "gpt_neo": {"max_position_embeddings": "n_ctx", "layer_norm_epsilon": "eps", "activation_function": "act_fn"},
    "gpt_neox": {"max_position_embeddings": "n_ctx", "layer_norm_eps": "eps", "hidden_act": "act_fn"},
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
}
"""`model_type` -> field of Hugging Face -> field of TransformerLens. Its keys are the architectures that are checked to the last tensor."""

_ROTARY: dict[str, dict[str, str]] = {
    "default": {},
    "dynamic": {},  # differs only beyond max_position_embeddings, where a HookedTransformer ends
    "linear": {"factor": "rotary_scaling_factor"},
    "llama3": {
        "factor": "NTK_by_parts_factor",
        "low_freq_factor": "NTK_by_parts_low_freq_factor",
        "high_freq_factor": "NTK_by_parts_high_freq_factor",
        "original_max_position_embeddings": "NTK_original_ctx_len",
    },
    "yarn": {
        "factor": "yarn_factor",
        "beta_fast": "yarn_beta_fast",
        "beta_slow": "yarn_beta_slow",
        "truncate": "yarn_truncate",
        "original_max_position_embeddings": "yarn_original_max_position_embeddings",
    },
}
"""`rope_type` -> key of rope_parameters -> field of TransformerLens."""

_SAME_ACTIVATION = {"swish": "silu", "gelu_python": "gelu", "gelu_python_tanh": "gelu_new", "gelu_accurate": "gelu_new"}
_WORDS_IN_PATHS = ("llama", "gemma")


def hooked_from_hf(hf_model: Any, tokenizer: Any) -> Any:
    """Build a HookedTransformer with the weights of a Hugging Face model, unprocessed. `hf_model` is changed: give a copy.

    Parameters that the HookedTransformer has and Hugging Face does not (the bias of the unembedding, all biases of a Llama ...) are zero,
    or not used, and get ``requires_grad=False``: training then trains what Hugging Face would train, and the result can be exported back.

    Raises:
        UnrepresentableError: a field, or a parameter, that HookedTransformer has no place for.
    """
    from transformer_lens import loading_from_pretrained as loading

    config: Any = copy.deepcopy(hf_model.config)
    config.architectures = [type(hf_model).__name__]
    known = _fields(config, hf_model) if config.model_type in _FIELDS else {}
    device, dtype = next(hf_model.parameters()).device, next(hf_model.parameters()).dtype
    theirs = dict(hf_model.named_parameters())  # before biases are added
    if config.model_type in _FIELDS:
        _add_fused_biases(hf_model)
    with tempfile.TemporaryDirectory(prefix="tlcb-") as folder:
        word = next((word for word in _WORDS_IN_PATHS if word in folder.lower()), None)
        if word is not None:
            raise ConfigError(
                f"the folder for temporary files, {Path(folder).parent}, has the word {word!r} in its name, by which TransformerLens takes "
                "every model in it for one of that family. Set the environment variable TMPDIR to another folder, or use host='bridge'."
            )
        config.save_pretrained(folder)
        cfg = loading.get_pretrained_model_config(folder, hf_cfg=config.to_dict(), fold_ln=False, device=device, dtype=dtype)
        cfg = type(cfg).from_dict({**cfg.to_dict(), **known, "attn_scale": -1.0} if known else cfg.to_dict())
        cfg.model_name = Path(getattr(config, "_name_or_path", "") or type(hf_model).__name__).name
        cfg.tokenizer_name = None
        weights = loading.get_pretrained_state_dict(folder, cfg, hf_model, dtype=dtype)
    if known:
        _add_attention_biases(weights, hf_model, cfg)
        _check_all_used(weights, theirs)
    if "blocks.0.mlp.W_in" in weights:
        cfg.d_mlp = weights["blocks.0.mlp.W_in"].shape[-1]
    model = hooked_from_config(cfg, tokenizer)
    ours = dict(model.named_parameters())
    lost = [name for name in ours if name not in weights and not name.rsplit(".", 1)[-1].startswith("b")]
    if known and lost:  # Bloom has an embedding of positions that is never read
        raise UnrepresentableError(f"TransformerLens converts no weight for {', '.join(lost[:6])}")
    added = [name for name in ours if name not in weights or _is_made_up(weights[name], theirs)]
    weights = {name: value.detach() if isinstance(value, Tensor) else value for name, value in weights.items()}  # copied on loading
    model.load_and_process_state_dict(weights, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False)
    model.move_model_modules_to_device()
    if known:
        _check_rotary(model, hf_model)
    for name in added:
        ours[name].requires_grad_(False)
    return model


def _fields(config: Any, hf_model: Any) -> dict[str, Any]:
    """Return the fields of TransformerLens that the config settles, and correct the config where TransformerLens would stumble."""
    from transformer_lens.utilities.activation_functions import SUPPORTED_ACTIVATIONS

    fields = {}
    for theirs, ours in _FIELDS[config.model_type].items():
        value = getattr(config, theirs)
        if ours == "act_fn":
            value = _SAME_ACTIVATION.get(value, value)
            if value not in SUPPORTED_ACTIVATIONS:
                raise UnrepresentableError(f"{theirs}={value!r} is not among its activations ({', '.join(SUPPORTED_ACTIVATIONS)})")
            setattr(config, theirs, value)
        fields[ours] = value
    config.n_ctx = fields["n_ctx"]  # TransformerLens reads it for GPT-2; only old config files have it, and not always the right one
    fields["d_head"] = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if _FIELDS[config.model_type] is _LLAMA:
        fields |= _windows(config)
    if getattr(config, "rope_parameters", None):
        fields |= _rotary(config, hf_model)
    return fields


def _windows(config: Any) -> dict[str, Any]:
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * config.num_hidden_layers
    strange = sorted(set(kinds) - {"sliding_attention", "full_attention"})
    if strange:
        raise UnrepresentableError(f"layer_types names {', '.join(map(repr, strange))}")
    if not window or "sliding_attention" not in kinds:
        return {"use_local_attn": False, "attn_types": None, "window_size": None}
    types = ["local" if kind == "sliding_attention" else "global" for kind in kinds]
    return {"use_local_attn": True, "attn_types": types, "window_size": window}


def _rotary(config: Any, hf_model: Any) -> dict[str, Any]:
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default") if isinstance(rope, Mapping) else None
    if kind not in _ROTARY:
        raise UnrepresentableError(f"rope_parameters with rope_type={kind!r} is not among its scalings ({', '.join(_ROTARY)})")
    module = _rotary_module(hf_model)
    fields: dict[str, Any] = {ours: rope[theirs] for theirs, ours in _ROTARY[kind].items() if rope.get(theirs) is not None}
    fields |= {"rotary_base": rope["rope_theta"], "rotary_dim": 2 * module.inv_freq.numel()}
    fields |= {"use_NTK_by_parts_rope": kind == "llama3", "use_yarn_rope": kind == "yarn"}
    if kind == "yarn":
        fields["yarn_attention_factor"] = float(module.attention_scaling)
    return fields


def _rotary_module(hf_model: Any) -> Any:
    found = [module for module in hf_model.modules() if isinstance(getattr(module, "inv_freq", None), Tensor)]
    if len(found) != 1:
        raise UnrepresentableError(f"it has {len(found)} rotary embeddings, and HookedTransformer takes one for all layers")
    return found[0]


def _add_fused_biases(hf_model: Any) -> None:
    """Give a fused projection without bias (GPT-NeoX with attention_bias=False) one of zeros: TransformerLens splits it unseen."""
    layout = LAYOUTS[hf_model.config.model_type]
    for layer in range(len(hf_model.get_submodule(layout.blocks))):
        attention = hf_model.get_submodule(f"{layout.block(layer)}.{layout.attn}")
        for projection in map(attention.get_submodule, (*layout.qkv, layout.attn_out) if layout.fused else ()):
            if projection.bias is None:
                projection.bias = nn.Parameter(torch.zeros_like(projection.weight[:, 0]), requires_grad=False)


def _add_attention_biases(weights: dict[str, Any], hf_model: Any, cfg: Any) -> None:
    """Put biases of separate projections where TransformerLens puts zeros: Llama with attention_bias=True."""
    layout = LAYOUTS[hf_model.config.model_type]
    if layout.fused:
        return
    for layer in range(cfg.n_layers):
        attention = hf_model.get_submodule(f"{layout.block(layer)}.{layout.attn}")
        for letter, path in zip("QKVO", (*layout.qkv, layout.attn_out), strict=True):
            bias: Tensor | None = getattr(attention.get_submodule(path), "bias", None)
            if bias is not None:
                grouped = f"blocks.{layer}.attn._b_{letter}"
                name = grouped if grouped in weights else f"blocks.{layer}.attn.b_{letter}"
                weights[name] = bias if letter == "O" else bias.view(-1, cfg.d_head)


def _holds(parameter: Tensor, value: Tensor) -> bool:
    """Tell whether a converted weight is a view of a parameter. The converters of the table copy nothing."""
    start = parameter.data_ptr()
    return start <= value.data_ptr() < start + parameter.numel() * parameter.element_size()


def _is_made_up(value: Any, theirs: Mapping[str, Tensor]) -> bool:
    return isinstance(value, Tensor) and not any(_holds(p, value) for p in theirs.values()) and not bool(value.any())


def _check_all_used(weights: Mapping[str, Any], theirs: Mapping[str, Tensor]) -> None:
    """Refuse parameters that nothing was made of: fresh ones are zero, and then no comparison of logits sees that they are gone."""
    values = [value for value in weights.values() if isinstance(value, Tensor)]
    unused = [name for name, parameter in theirs.items() if not any(_holds(parameter, value) for value in values)]
    if unused:
        more = f" and {len(unused) - 4} more" if len(unused) > 4 else ""
        raise UnrepresentableError(f"it has no place for {', '.join(unused[:4])}{more}")


def _check_rotary(model: Any, hf_model: Any) -> None:
    """Compare the angles of one step, which settle those of all positions, with Hugging Face's: the probe reaches no far position."""
    if model.cfg.positional_embedding_type != "rotary" or model.cfg.n_ctx < 2:
        return
    module = _rotary_module(hf_model)
    step = getattr(module, "original_inv_freq", module.inv_freq).double().cpu()  # "dynamic" changes the other one while it runs
    scale, close = float(module.attention_scaling), 1e-4 if model.cfg.dtype == torch.float32 else 2e-2
    for block in model.blocks:
        sin, cos = (table[1, : len(step)].double().cpu() for table in (block.attn.rotary_sin, block.attn.rotary_cos))
        same = len(sin) == len(step) and torch.allclose(torch.atan2(sin, cos), step, rtol=close, atol=0)
        if not (same and torch.allclose(torch.hypot(sin, cos), torch.full_like(sin, scale), rtol=close, atol=0)):
            layers = "sliding_window" if block.attn.attn_type == "local" else "full attention"
            raise UnrepresentableError(
                f"rope_parameters={dict(hf_model.config.rope_parameters)!r} gives other angles in layers with {layers}"
            )
