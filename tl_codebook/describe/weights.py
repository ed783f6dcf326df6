"""The straight way from a site to the logits: the weights along the residual stream, read off a host and proven on a probe.

What a head or an MLP adds to the residual stream goes to the logits through the final norm and the unembedding as well as through later
layers. With the scale of the final norm given, the first of these ways is linear. Hosts lay their weights out differently, and some models
scale or normalise between the steps, so nothing is believed: a short run of the model has to agree, or there is an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_codebook.contexts import bypassed
from tl_codebook.errors import ConfigError
from tl_codebook.hosts import home_device, is_bridge, n_layers, quiet, raw_activations
from tl_codebook.names import hook_name, split_hook_name

__all__ = ["FinalNorm", "LogitPath", "final_norm", "logit_path"]

_COLUMNS = 2**13  # tokens of the vocabulary at a time, so that no whole copy of a half-precision unembedding is made
_TOLERANCE = {torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""The error of a proof as a share of what it computes; 1e-3 in float32. Weights that are read wrongly miss most of it."""
_WRITERS = ("attn_out", "mlp_out", "resid_pre", "resid_mid", "resid_post", "resid_delta")
_READERS = ("q", "k", "qkv")


@dataclass(frozen=True)
class FinalNorm:
    """What the final norm does to a vector of the residual stream, apart from dividing by its scale and adding a bias."""

    weight: Float[Tensor, " d_model"]
    centred: bool
    """It subtracts the mean first (LayerNorm)."""
    scales: bool
    """It divides by a scale; False where the model has no final norm."""
    eps: float

    def linear(self, x: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """Return the norm of `x` for a scale of 1 and no bias."""
        return (x - x.mean(-1, keepdim=True) if self.centred else x) * self.weight.to(x)

    def scale(self, x: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row"]:
        """Return what the norm divides `x` by."""
        if not self.scales:
            return torch.ones(x.shape[:-1], dtype=x.dtype, device=x.device)
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        return (x.square().mean(-1) + self.eps).sqrt()


@dataclass(frozen=True)
class LogitPath:
    """The linear way from a site to the logits, along the residual stream alone."""

    out: Float[Tensor, "d_in d_model"] | None
    """What writes the site into the residual stream; None where the site is what is written."""
    norm: FinalNorm
    unembed: Float[Tensor, "d_model vocabulary"]

    def logits(self, x: Float[Tensor, "row d_in"]) -> Float[Tensor, "row vocabulary"]:
        """Return what vectors at the site add to the logits where the final norm has a scale of 1."""
        x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        with torch.no_grad(), torch.autocast(device_type=x.device.type, enabled=False):
            written = x if self.out is None else x @ self.out.to(x)
            read = self.norm.linear(written.to(self.unembed.device))
            return torch.cat([read @ columns.to(read.dtype) for columns in self.unembed.split(_COLUMNS, dim=1)], dim=1)


@torch.no_grad()
def final_norm(host: Any) -> FinalNorm:
    """Read the final norm off a host: LayerNorm or RMSNorm, with a weight or without (folded), or none at all.

    Raises:
        ConfigError: a final norm that is neither.

    >>> final_norm(model).centred, final_norm(model).weight.shape
    (True, torch.Size([32]))
    """
    module = getattr(host, "ln_final", None)
    d_model = int(host.cfg.d_model)
    weight = next((w for w in (getattr(module, "w", None), getattr(module, "weight", None)) if isinstance(w, Tensor)), None)
    like = host.W_U if weight is None else weight
    ones = torch.ones(d_model, device=like.device)
    eps = float(getattr(host.cfg, "eps", None) or 1e-5)
    x = (8 * (1 + torch.randn(2, 3, d_model, generator=torch.Generator().manual_seed(0)))).to(like)
    if module is None:
        return FinalNorm(ones, False, False, eps)
    with quiet(host), bypassed(host):
        odd = ((module(x).float() - module(-x).float()) / 2).to(ones.device)  # a bias cancels
    x = x.float()
    weights = [ones] if weight is None else [weight.detach().float(), 1 + weight.detach().float(), ones]  # 1 + w: as Gemma writes it
    kinds = [FinalNorm(w, centred, scales, eps) for w in weights for centred, scales in ((True, True), (False, True), (False, False))]
    errors = [_error(norm.linear(x.flatten(0, 1)).view_as(x) / norm.scale(x).unsqueeze(-1), odd) for norm in kinds]
    best = min(range(len(kinds)), key=lambda i: errors[i])
    if errors[best] <= _TOLERANCE.get(like.dtype, 1e-3):
        return kinds[best]
    raise ConfigError(
        f"the final norm ({type(module).__name__}) is neither a LayerNorm nor an RMSNorm, so that there is no direct way to the logits to "
        "read. Measure the effect of forcing the code instead: describe_code(..., measure=True)."
    )


@torch.no_grad()
def logit_path(host: Any, name: str) -> LogitPath:
    """Read the straight way from a hook point to the logits off a host, and prove it on a short run without codebooks.

    Raises:
        ConfigError: the site has no such way (q, k, qkv, and where key-value heads serve several heads v; a hook point outside the site
            table), or the model does something on the way that is not in its weights.

    >>> path = logit_path(model, "blocks.1.attn.hook_z")
    >>> path.out.shape, path.logits(torch.ones(1, 32)).shape
    (torch.Size([32, 32]), torch.Size([1, 61]))
    """
    layer, site = split_hook_name(name)
    out = _out(host, layer, site, name)
    path = LogitPath(out, final_norm(host), host.W_U.detach())
    _prove(host, path, layer, site, name)
    return path


def _out(host: Any, layer: int | None, site: str, name: str) -> Tensor | None:
    """Return the weights that write a site into the residual stream, None where it is written as it is."""
    instead = "Measure the effect of forcing it instead: describe_code(..., measure=True)."
    if site in _READERS:
        raise ConfigError(f"{name!r} says where attention looks and writes nothing, so it has no direct effect on the logits. {instead}")
    if layer is None:
        raise ConfigError(f"{name!r} is no site of the table, so that nothing is known of its way to the logits. {instead}")
    if site == "resid_mid" and is_bridge(host):
        raise ConfigError(
            f"{name!r} is the MLP's input alone on a TransformerBridge, not the residual stream, so it has no direct effect. {instead}"
        )
    if site in _WRITERS:
        return None
    part = host.blocks[layer].mlp if site == "post" else host.blocks[layer].attn
    weight = getattr(part, "W_out" if site == "post" else "W_O", None)
    if not isinstance(weight, Tensor):
        raise ConfigError(f"the {type(part).__name__} of block {layer} has no weights that write {name!r} into the stream. {instead}")
    weight = weight.detach()
    if site == "post":
        return weight
    kv = getattr(host.cfg, "n_key_value_heads", None) or host.cfg.n_heads
    if site == "v" and kv != host.cfg.n_heads:
        raise ConfigError(
            f"each of the {kv} key-value heads at {name!r} serves {host.cfg.n_heads // kv} heads, so that what a code writes depends on "
            f"which of them attends to it. {instead}"
        )
    return weight.reshape(-1, weight.shape[-1])


def _prove(host: Any, path: LogitPath, layer: int | None, site: str, name: str) -> None:
    n_pos = min(4, int(getattr(host.cfg, "n_ctx", 4) or 4))
    tokens = (torch.arange(2 * n_pos) * 7919 + 13).remainder(int(host.cfg.d_vocab)).reshape(2, n_pos)
    tokens = tokens.to(home_device(host, "hook_embed"))
    inside, last = {"z": "z", "v": "z", "post": "post"}.get(site, ""), hook_name(n_layers(host) - 1, "resid_post")
    wanted = {part: hook_name(layer, part) for part in ("resid_pre", "resid_post", "attn_out", "mlp_out", *([inside] if inside else []))}
    with bypassed(host):
        seen = raw_activations(host, tokens, list(dict.fromkeys([*wanted.values(), last])))
        with quiet(host):
            logits = host(tokens).flatten(0, 1).float()
    flat = {key: value.reshape(tokens.numel(), -1) for key, value in seen.items()}
    dtype = seen[last].dtype
    tolerance = _TOLERANCE.get(dtype, 1e-3)
    if not site.startswith("resid"):
        added = torch.stack([flat[wanted[part]].double() for part in ("attn_out", "mlp_out") if wanted[part] in flat]).sum(0)
        change = flat[wanted["resid_post"]].double() - flat[wanted["resid_pre"]].double()
        rounding = 4 * torch.finfo(dtype).eps * float(flat[wanted["resid_post"]].double().norm())
        if not _error(added, change, rounding) <= tolerance:
            raise _unproven(name, f"block {layer} does not add to the stream just what is at attn_out and mlp_out")
    if path.out is not None:
        written = flat[wanted[inside]].double() @ path.out.double()
        if not _error(_varying(written), _varying(flat[wanted["mlp_out" if site == "post" else "attn_out"]].double())) <= tolerance:
            raise _unproven(name, f"what block {layer} adds is not {inside} times its output weights")
    cap = float(getattr(host.cfg, "output_logits_soft_cap", None) or -1.0)
    stream = flat[last].float()
    ours = path.norm.linear(stream) / path.norm.scale(stream).unsqueeze(-1)
    ours = ours.to(path.unembed.device) @ path.unembed.float()
    ours = cap * torch.tanh(ours / cap) if cap > 0 else ours  # models with a cap have no biases that would be bent too
    if not _error(_varying(ours), _varying(logits.to(ours.device))) <= tolerance:
        raise _unproven(name, "the logits are not those of the final norm and the unembedding")


def _varying(x: Tensor) -> Tensor:
    """Leave out what is the same at every position: biases."""
    return x - x.mean(0, keepdim=True)


def _error(ours: Tensor, theirs: Tensor, floor: float = 0.0) -> float:
    """Return how far two tensors are apart as a share of the second; a difference below `floor` is rounding."""
    apart = max(float((ours.to(theirs) - theirs).norm()) - floor, 0.0)
    return apart / max(float(theirs.norm()), 1e-30)


def _unproven(name: str, why: str) -> ConfigError:
    return ConfigError(
        f"no direct way from {name!r} to the logits could be proven on this model: {why} (a norm or a factor in between?). Measure the "
        "effect of forcing the code instead: describe_code(..., measure=True)."
    )
