"""Gradients of a host's base under the names, and in the shapes, of the Hugging Face model that it was made from."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from tests.parity.golden import assert_floats, parameters
from tl_codebook.attachment import sites
from tl_codebook.convert.layouts import LAYOUTS, Layout

ARCHITECTURES = {"GPT2LMHeadModel": "gpt2", "GPTNeoForCausalLM": "gpt_neo", "GPTNeoXForCausalLM": "gpt_neox"}
"""What a HookedTransformer says of its origin -> `model_type`."""

_GPT2 = {
    "embed.W_E": "transformer.wte.weight",
    "pos_embed.W_pos": "transformer.wpe.weight",
    "ln_final.w": "transformer.ln_f.weight",
    "ln_final.b": "transformer.ln_f.bias",
    "unembed.W_U": "transformer.wte.weight",
}
_NEOX = {
    "embed.W_E": "gpt_neox.embed_in.weight",
    "ln_final.w": "gpt_neox.final_layer_norm.weight",
    "ln_final.b": "gpt_neox.final_layer_norm.bias",
    "unembed.W_U": "embed_out.weight",
}
OUTSIDE_BLOCKS = {"gpt2": _GPT2, "gpt_neo": _GPT2, "gpt_neox": _NEOX}
"""`model_type` -> parameter of a HookedTransformer -> Hugging Face's; two that are tied have one name."""

INSIDE_BLOCK = {
    "gpt2": {"ln1": "ln_1", "ln2": "ln_2", "mlp_in": "c_fc"},
    "gpt_neo": {"ln1": "ln_1", "ln2": "ln_2", "mlp_in": "c_fc"},
    "gpt_neox": {"ln1": "input_layernorm", "ln2": "post_attention_layernorm", "mlp_in": "dense_h_to_4h"},
}
"""What `Layout` does not name."""

NO_BIAS = {"gpt_neo": ("q_proj.bias", "k_proj.bias", "v_proj.bias")}
"""`model_type` -> what a HookedTransformer has and Hugging Face has not."""


def model_type(model: Any) -> str:
    """Return Hugging Face's name of the architecture of a host."""
    if hasattr(model, "original_model"):
        return str(model.original_model.config.model_type)
    return ARCHITECTURES[model.cfg.original_architecture]


def base_gradients(model: Any) -> dict[str, Tensor]:
    """Return the gradients of the base after a backward pass, by Hugging Face's names (``embed_out.weight`` as in transformers 4).

    Parameters that were not reached, and biases that TransformerLens adds, are left out. A tied embedding has one gradient, the sum.

    Args:
        model: A HookedTransformer or a TransformerBridge of GPT-2, GPT-Neo or GPT-NeoX, with or without codebooks.
    """
    own = {id(parameter) for point in sites(model).values() for parameter in point.codebook.parameters()}
    found = {name: p.grad.detach() for name, p in model.named_parameters() if p.grad is not None and id(p) not in own}
    read = _from_bridge if hasattr(model, "original_model") else _from_hooked
    return read(found, model_type(model), model.cfg.n_heads)


def assert_base_gradients(model: Any, want: Mapping[str, Tensor], prefix: str = "grad/base/") -> None:
    """Compare with those gradients of a case that start with `prefix`: to 1e-5 + 1e-4 of the largest entry of each."""
    got = base_gradients(model)
    names = [key.removeprefix(prefix) for key in want if key.startswith(prefix)]
    assert names, prefix
    for name in names:
        assert got[name].shape == want[prefix + name].shape, name
        assert_close(got[name], want[prefix + name], name)


def assert_codebook_gradients(book: Any, want: Mapping[str, Tensor], prefix: str) -> None:
    """Compare the gradients of one codebook with those at ``<prefix>`` (``grad/cb/layer0_mlp``), or by group (``<prefix>_gcb0``)."""
    # As `parameters` reads them from a checkpoint: one prefix, or one with a number for each group.
    keys = [prefix] if f"{prefix}/codebook.weight" in want else [f"{prefix}_gcb{group}" for group in range(book.n_groups)]
    groups = [parameters(want, f"{key}/", 1) for key in keys]
    assert len(groups) == book.n_groups
    for name, parameter in book.named_parameters():
        assert_close(parameter.grad, torch.cat([group[name] for group in groups]), f"{prefix} {name}")


def assert_close(got: Tensor, want: Tensor, name: str) -> None:
    """Compare gradients to 1e-5 + 1e-4 of the largest entry, and say which they are."""
    try:
        assert_floats(got, want, atol=1e-5, of_largest=1e-4)
    except AssertionError as error:
        raise AssertionError(f"{name}: {error}") from error


def fused(q: Tensor, k: Tensor, v: Tensor, axes: str, n_heads: int) -> Tensor:
    """Put the gradients [(head d_head) ...] of q, k and v into the rows of the fused projection, in the order of `axes`."""
    stacked = rearrange(torch.stack([q, k, v]), "qkv (head d_head) ... -> qkv head d_head ...", head=n_heads)
    return rearrange(stacked, f"qkv head d_head ... -> ({axes}) ...")


def _join_qkv(gradients: dict[str, Tensor], layout: Layout, prefix: str, n_heads: int, turn: Callable[[Tensor], Tensor]) -> None:
    """Replace ``q``, ``k`` and ``v`` under the prefix, as [out (in)], by the parameters of Hugging Face."""
    for part in ("weight", "bias"):
        names = [f"{prefix}.{letter}.{part}" for letter in "qkv"]
        if names[0] not in gradients:
            continue
        values = [gradients.pop(name) for name in names]
        if layout.fused is None:
            gradients.update({f"{prefix}.{to}.{part}": value for to, value in zip(layout.qkv, values, strict=True)})
        else:
            whole = fused(*values, axes=layout.fused, n_heads=n_heads)
            gradients[f"{prefix}.{layout.qkv[0]}.{part}"] = turn(whole) if part == "weight" else whole


def _turn(kind: str) -> Callable[[Tensor], Tensor]:
    """Return what makes a weight [out in] one of Hugging Face's: GPT-2's are [in out]."""
    return (lambda value: value.T) if kind == "gpt2" else (lambda value: value)


def _from_bridge(found: Mapping[str, Tensor], kind: str, n_heads: int) -> dict[str, Tensor]:
    """The names of a Bridge are Hugging Face's but for the wrappers and, in attention, the parts that it has split."""
    layout = LAYOUTS[kind]
    gradients = {name.replace("._original_component", ""): value for name, value in found.items()}
    gradients.pop("lm_head.bias", None)
    if "lm_head.weight" in gradients:
        gradients["embed_out.weight"] = gradients.pop("lm_head.weight")
    blocks = {match[1] for name in gradients if (match := re.match(rf"({re.escape(layout.blocks)}\.\d+)\.", name))}
    for block in blocks:
        prefix = f"{block}.{layout.attn}"
        _join_qkv(gradients, layout, prefix, n_heads, _turn(kind))
        for part in ("weight", "bias"):
            if f"{prefix}.o.{part}" in gradients:
                gradients[f"{prefix}.{layout.attn_out}.{part}"] = gradients.pop(f"{prefix}.o.{part}")
    return gradients


def _from_hooked(found: Mapping[str, Tensor], kind: str, n_heads: int) -> dict[str, Tensor]:
    layout, turn = LAYOUTS[kind], _turn(kind)
    outside, inside = OUTSIDE_BLOCKS[kind], INSIDE_BLOCK[kind]
    gradients: dict[str, Tensor] = {}
    for name, value in found.items():
        match = re.fullmatch(r"blocks\.(\d+)\.(?:(ln[12])|attn|mlp)\.(\w+)", name)
        if match is None:
            if name != "unembed.b_U":
                value = value.T if name == "unembed.W_U" else value
                gradients[outside[name]] = gradients.get(outside[name], 0) + value
            continue
        block, norm, parameter = layout.block(int(match[1])), match[2], match[3]
        part = "weight" if parameter[0] in "wW" else "bias"
        if norm:
            gradients[f"{block}.{inside[norm]}.{part}"] = value
        elif parameter in ("W_in", "W_out", "b_in", "b_out"):
            to = f"{block}.{layout.mlp}.{inside['mlp_in'] if parameter.endswith('in') else layout.mlp_out}.{part}"
            gradients[to] = turn(value.T) if part == "weight" else value
        elif parameter == "W_O":
            gradients[f"{block}.{layout.attn}.{layout.attn_out}.weight"] = turn(rearrange(value, "head d_head d_in -> d_in (head d_head)"))
        elif parameter == "b_O":
            gradients[f"{block}.{layout.attn}.{layout.attn_out}.bias"] = value
        else:
            axes = "head d_in d_head -> (head d_head) d_in" if part == "weight" else "head d_head -> (head d_head)"
            gradients[f"{block}.{layout.attn}.{parameter[-1].lower()}.{part}"] = rearrange(value, axes)
    for layer in {match[1] for name in found if (match := re.match(r"blocks\.(\d+)\.", name))}:
        _join_qkv(gradients, layout, f"{layout.block(int(layer))}.{layout.attn}", n_heads, turn)
    return {name: value for name, value in gradients.items() if not name.endswith(NO_BIAS.get(kind, ()))}
