"""What differs between TransformerLens hosts, in one place.

A host is a `HookedTransformer` (TransformerLens 3.9) or a `TransformerBridge` (3.9 and 4). It is recognised by its structure, never by its
class: 4.0 removed `HookedTransformer`, and even a `getattr` for it raises there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from tl_codebook.errors import AttachError, UnknownHookError, nearest
from tl_codebook.names import MADE_OF, SITES, CodesHookName, hook_name, split_hook_name

__all__ = [
    "Host",
    "PositionClock",
    "StrictRegistry",
    "as_host",
    "evaluating",
    "head_count",
    "home_device",
    "is_bridge",
    "joined_heads",
    "n_layers",
    "processing",
    "quiet",
    "raw_activations",
    "resolve_sites",
    "stable_name",
]


@runtime_checkable
class Host(Protocol):
    """A model with hooks: what this package asks of TransformerLens."""

    cfg: Any
    blocks: Any
    hook_dict: dict[str, HookPoint]


def as_host(model: Any) -> Any:
    """Return the host in `model` (inside `torch.compile`'s wrapper if need be), or raise for anything else."""
    host = getattr(model, "_orig_mod", model)
    if not isinstance(host, nn.Module) or not hasattr(host, "hook_dict") or not hasattr(host, "blocks"):
        raise AttachError(
            f"a {type(model).__name__} was given where a TransformerLens model is needed. Load it as a HookedTransformer or a "
            "TransformerBridge (tl_codebook.load_hf turns a Hugging Face model into one)."
        )
    return host


def is_bridge(model: Any) -> bool:
    """Tell a TransformerBridge from a HookedTransformer."""
    return "_hook_registry" in vars(as_host(model))


def n_layers(model: Any) -> int:
    """Return the number of blocks."""
    return len(model.blocks)


def head_count(model: Any, site: str) -> int:
    """Return how many attention heads a head site has: n_heads at z and q, the number of key-value heads at k and v."""
    kv = getattr(model.cfg, "n_key_value_heads", None)
    ungrouped = getattr(model.cfg, "ungroup_grouped_query_attention", False)
    return int(kv if site in ("k", "v") and kv and not ungrouped else model.cfg.n_heads)


def home_device(model: Any, name: str) -> torch.device:
    """Return the device of the block that a hook name belongs to (a model may be spread over several)."""
    layer, _ = split_hook_name(name)
    home = model if layer is None else model.blocks[layer]
    return next(iter(home.parameters())).device


def stable_name(model: Any, name: str) -> str:
    """Return the HookedTransformer spelling of a hook name, or raise `UnknownHookError` with the nearest names.

    A Bridge lists one hook point under two or three names, and its canonical ones change between versions.
    """
    hooks = model.hook_dict
    layer, site = split_hook_name(name)
    if site in MADE_OF and layer is not None and layer < n_layers(model):
        return name
    if name not in hooks:
        raise unknown_hook(model, name)
    same = [other for other in hooks if hooks[other] is hooks[name]]
    return next((other for other in [name, *same] if split_hook_name(other)[0] is not None), name)


def unknown_hook(model: Any, name: str) -> UnknownHookError:
    """Describe a hook name that the model does not have: what it has, and what is close."""
    layer, site = split_hook_name(name.removesuffix(".hook_codes").removesuffix(".hook_x"))
    kind = "TransformerBridge" if is_bridge(model) else "HookedTransformer"
    text = f"no hook point {name!r} on this {kind} ({n_layers(model)} layers)."
    advice = nearest(name, model.hook_dict).strip()
    if layer is not None and layer >= n_layers(model):
        advice = f"Layers go from 0 to {n_layers(model) - 1}."
    elif site == "resid_mid":
        advice = "Its attention and MLP run in parallel on the same residual stream, so there is no resid_mid; use resid_pre or resid_post."
    elif layer is not None:
        have = [s for s in SITES if hook_name(layer, s) in model.hook_dict]
        advice = f"{advice} Sites of block {layer} that can hold a codebook: {' '.join(have)}."
    return UnknownHookError(f"{text} {advice}".strip())


def resolve_sites(model: Any, sites: str | Sequence[str], layers: int | Sequence[int] | None) -> list[str]:
    """Return the hook names of sites at layers; unknown ones raise `UnknownHookError`."""
    wanted = [sites] if isinstance(sites, str) else list(sites)
    if not wanted:
        raise UnknownHookError(f"no site was given. Give one or more of: {' '.join(SITES)}.")
    for site in wanted:
        if site not in SITES:
            raise UnknownHookError(f"no site {site!r}. {nearest(str(site), SITES)}Sites: {' '.join(SITES)}.")
    total = n_layers(model)
    chosen = range(total) if layers is None else list(layers) if isinstance(layers, Sequence) and not isinstance(layers, str) else [layers]
    if not chosen:
        raise UnknownHookError(f"no layer was given. Give one or more of 0 to {total - 1}, or leave layers out for all of them.")
    for layer in chosen:
        if isinstance(layer, bool) or not isinstance(layer, int) or not -total <= layer < total:
            raise UnknownHookError(f"no layer {layer!r}: the model has {total} layers. Give 0 to {total - 1}, or -{total} to -1.")
    return [stable_name(model, hook_name(layer % total, site)) for layer in chosen for site in wanted]


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Run a model as in evaluation inside the ``with`` block, and leave each of its modules in the mode that it was in.

    Gradients are as they were; what is no `nn.Module` has no mode.

    >>> _ = model.train().blocks[0].eval()  # as a user may who wants no dropout there
    >>> with evaluating(model):
    ...     model.training, model.blocks[1].training
    (False, False)
    >>> model.training, model.blocks[0].training
    (True, False)
    """
    modes = [(module, module.training) for module in _modules(model)]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _modules(model: Any) -> dict[nn.Module, None]:
    """Return every module of a model, those that a Bridge has beside its tree too: a dropout after the embeddings is one."""
    found: dict[nn.Module, None] = {}
    for module in model.modules() if isinstance(model, nn.Module) else ():
        inner = vars(module).get("original_model")
        found.update(dict.fromkeys([module, *(inner.modules() if isinstance(inner, nn.Module) else ())]))
    return found


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Run the model as in evaluation, with every hook on its hook points set aside for the duration."""
    points = [m for m in model.modules() if isinstance(m, HookPoint)]
    saved = [(p._forward_hooks, p._backward_hooks, p.fwd_hooks, p.bwd_hooks) for p in points]
    try:
        for p in points:
            p._forward_hooks, p._backward_hooks, p.fwd_hooks, p.bwd_hooks = OrderedDict(), OrderedDict(), [], []
        with evaluating(model):
            yield
    finally:
        for p, state in zip(points, saved, strict=True):
            p._forward_hooks, p._backward_hooks, p.fwd_hooks, p.bwd_hooks = state


@torch.no_grad()
def raw_activations(model: Any, tokens: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Run `tokens` and return what a user hook would see at each hook point; hook points that never fire are missing.

    Nothing the user hung on the model runs. A made hook point (`MADE_OF`) is computed from its parts where no codebook made it.
    """
    got: dict[str, Tensor] = {}
    hooks = model.hook_dict

    def keeper(name: str) -> Any:
        def keep(value: Tensor, hook: Any) -> None:
            got[name] = value.detach().clone()

        return keep

    needed = dict.fromkeys(names)
    made = {name: split_hook_name(name) for name in names if split_hook_name(name)[1] in MADE_OF}
    parts = {name: [f"blocks.{layer}.{part}" for part in MADE_OF[site]] for name, (layer, site) in made.items()}
    needed |= {part: None for name in made for part in parts[name]}
    with quiet(model):
        for name in needed:
            if name in hooks:
                hooks[name].add_hook(keeper(name))
        model(tokens)
    for name, (_, site) in made.items():
        if name not in got and all(part in got for part in parts[name]):
            found = [got[part] for part in parts[name]]
            got[name] = found[1] - found[0] if site == "resid_delta" else joined_heads(found, int(model.cfg.n_heads))
    return {name: got[name] for name in names if name in got}


def joined_heads(qkv: Sequence[Tensor], n_heads: int) -> Float[Tensor, "batch pos d_in"]:
    """Put q, k and v, [batch pos head d_head] or flattened, side by side as the fused projection of GPT-NeoX has them."""
    heads = torch.stack([part.reshape(*part.shape[:2], n_heads, -1) for part in qkv], dim=-2)
    return rearrange(heads, "batch pos head qkv d_head -> batch pos (head qkv d_head)")


class PositionClock:
    """Knows the absolute position of row 0 of the current forward pass: with a KV cache a step has one row.

    Hangs on every block as a forward pre-hook (a root-level one does not work: TransformerLens calls ``self.forward`` directly).
    """

    def __init__(self, model: Any) -> None:
        self.offset = 0
        """Absolute position of the first row of the current pass."""
        self.prompt_length = 0
        """Rows of the pass that started the current sequence; what lies beyond was generated."""
        self.generating = False
        self._in_prompt = self._started = False
        self._first = model.blocks[0]
        for block in model.blocks:
            block.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the position off the arguments of a block, as its forward pre-hook."""
        entry = kwargs.get("past_kv_cache_entry")
        if entry is not None:
            self.offset = entry.past_keys.shape[1]
        else:
            cache = next((a for a in [*args, *kwargs.values()] if hasattr(a, "get_seq_length")), None)
            if cache is None:
                self.offset = 0
            elif module is self._first:  # one cache for all layers: the later blocks find this pass in it already
                self.offset = int(cache.get_seq_length())
        if module is self._first and self.generating:
            self._in_prompt, self._started = not self._started, True
        if self.offset == 0 and (self._in_prompt or not self.generating):
            stream = args[0] if args else kwargs.get("hidden_states", kwargs.get("resid_pre"))
            self.prompt_length = 0 if stream is None else stream.shape[1]

    @contextmanager
    def generation(self) -> Iterator[None]:
        """Take the next pass for the prompt, and every further one, cached or not, for its continuation."""
        before = self.generating
        self.generating, self._started = True, False
        try:
            yield
        finally:
            self.generating = before

    @classmethod
    def of(cls, model: Any) -> PositionClock:
        """Return the clock of the model, hanging one on it if there is none."""
        hooks = model.blocks[0]._forward_pre_hooks.values()
        return next((hook for hook in hooks if isinstance(hook, cls)), None) or cls(model)

    @classmethod
    def remove(cls, model: Any) -> None:
        """Take the clock off every block, leaving other hooks alone."""
        for block in model.blocks:
            for key in [key for key, hook in block._forward_pre_hooks.items() if isinstance(hook, cls)]:
                del block._forward_pre_hooks[key]
                block._forward_pre_hooks_with_kwargs.pop(key, None)


class StrictRegistry(dict[str, HookPoint]):
    """The hook registry of a Bridge, except that it raises where a hook name made by this package does not exist.

    The Bridge of TransformerLens 3.9 looks a name up with ``in`` and goes on without it. Plain strings keep that behaviour.
    """

    model_text = "this TransformerBridge"

    def copy(self) -> StrictRegistry:
        """Copy, staying strict: the Bridge looks names up in a copy."""
        return StrictRegistry(self)

    def __contains__(self, name: object) -> bool:
        found = super().__contains__(name)
        if not found and isinstance(name, CodesHookName):
            have = [key for key in self if key.endswith(".hook_codes")]
            raise UnknownHookError(
                f"no hook point {str(name)!r} on {self.model_text}. {nearest(name, have)}Codebooks sit at: "
                f"{', '.join(key.removesuffix('.hook_codes') for key in have) or 'no site; call attach first'}."
            )
        return found


def processing(model: Any) -> dict[str, bool]:
    """Return what weight processing did to the model, read off its configuration and weights."""
    if is_bridge(model):
        return {"processed": bool(getattr(model, "_weights_processed", False))}
    out = model.W_O if model.cfg.attn_only else model.W_out
    centred = bool(out.mean(-1).abs().max() < 1e-5 * out.abs().max())
    folded = str(getattr(model.cfg, "normalization_type", "") or "").endswith("Pre")
    no_value_bias = bool((model.b_V == 0).all())  # says nothing by itself: a model may have none
    return {"processed": folded or centred, "fold_ln": folded, "center_writing_weights": centred, "fold_value_biases": no_value_bias}
