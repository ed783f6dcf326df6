"""Run codebooks inside a plain Hugging Face model, without TransformerLens.

Each codebook hangs in its block as an ordinary submodule (``transformer.h.3.codebooks.z``), at work through ordinary forward hooks. So
``to(device)`` moves it, ``parameters()`` lists it, and ``state_dict()`` (a Trainer's checkpoints, with that) holds it. The model's own
`save_pretrained` writes the codes among the weights too, where `from_pretrained` names them as unexpected. For a folder that `attach_hf`
reads, call ``handle.remove()``, the model's `save_pretrained`, and ``Codebooks(handle.codebooks).save_pretrained(folder, overwrite=True)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_codebook.codebook import Codebook
from tl_codebook.convert.layouts import Layout, layout_of
from tl_codebook.errors import AttachError, BasisMismatchError, ConfigError, ShapeError, UnknownHookError
from tl_codebook.names import SITES, split_hook_name

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from tl_codebook.basis import Basis
    from tl_codebook.checkpoint import Codebooks

__all__ = ["HFCodebooks", "attach_hf", "refuse_sites"]

_Change = Callable[[Tensor], Tensor]

_CHILD = "codebooks"
"""The name under which a block holds its codebooks."""

_NO_PLACE = {
    "resid_mid": (
        "Hugging Face adds it to the block's output and gives it to the second norm, and a hook reaches the second of these uses only "
        "(neither does a TransformerBridge reach more; a HookedTransformer changes both)"
    )
}


class Snap:
    """One codebook at work: [batch pos d_in] in, the same shape out, and the ids of the last forward kept."""

    def __init__(self, book: Codebook):
        self.book = book
        self.ids: Int[Tensor, "batch pos *group k"] | None = None
        self.forced: Int[Tensor, "batch pos *group k"] | None = None
        """Ids to decode in place of those chosen; `ids` still has the chosen ones."""

    def __call__(self, x: Float[Tensor, "batch pos d_in"]) -> Float[Tensor, "batch pos d_in"]:
        book = self.book
        plain = book.n_groups == 1
        y = book.normalise(book.grouped(x))
        q, ids = book.snap(y)
        self.ids = (ids.squeeze(-2) if plain else ids).detach()
        if self.forced is None:
            out = book.emit(y, ids, q)
        else:
            out = book.emit(y, self.forced.unsqueeze(-2) if plain else self.forced)
        return rearrange(out, "... group d_group -> ... (group d_group)").to(x.dtype)


@dataclass
class _Stream:
    """The residual stream of one block: what happens to it at its start and at its end."""

    pre: _Change | None
    delta: _Change | None
    post: _Change | None
    start: Tensor | None = None

    def enter(self, x: Tensor) -> Tensor:
        x = x if self.pre is None else self.pre(x)
        self.start = None if self.delta is None else x
        return x

    def leave(self, x: Tensor) -> Tensor:
        if self.delta is not None and self.start is not None:
            x = self.start + self.delta(x - self.start)
            self.start = None
        return x if self.post is None else self.post(x)


@dataclass
class _Fused:
    """The output of one projection for q, k and v together."""

    axes: str
    n_heads: int
    snaps: tuple[_Change | None, ...]
    joint: _Change | None

    def __call__(self, x: Tensor) -> Tensor:
        if self.joint is not None:
            turned = rearrange(x, f"... ({self.axes}) -> ... (head qkv d_head)", qkv=3, head=self.n_heads)
            x = rearrange(self.joint(turned), f"... (head qkv d_head) -> ... ({self.axes})", qkv=3, head=self.n_heads)
        parts = rearrange(x, f"... ({self.axes}) -> qkv ... (head d_head)", qkv=3, head=self.n_heads)
        parts = torch.stack([part if snap is None else snap(part) for part, snap in zip(parts, self.snaps, strict=True)])
        return rearrange(parts, f"qkv ... (head d_head) -> ... ({self.axes})", head=self.n_heads)


# Partials of these, not closures: a deep copy of the model then calls the copied codebooks.
def _on_input(change: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (change(args[0]), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}


def _on_output(change: Any, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


@dataclass
class HFCodebooks:
    """Codebooks at work inside a Hugging Face model; leave the ``with`` block, or call `remove`, to take them out."""

    model: nn.Module
    codebooks: dict[str, Codebook]
    """By hook name; the given `Codebooks` where there was one."""
    snaps: dict[str, Snap] = field(repr=False)
    _hooks: list[RemovableHandle] = field(default_factory=list, repr=False)
    _blocks: list[nn.Module] = field(default_factory=list, repr=False)

    @property
    def ids(self) -> dict[str, Int[Tensor, "batch pos *group k"]]:
        """Return the ids of the last forward by hook name: [batch pos k], or [batch pos group k] where there are several groups.

        With a KV cache the last forward of `generate` has one position.
        """
        return {name: snap.ids for name, snap in self.snaps.items() if snap.ids is not None}

    def remove(self) -> None:
        """Take the codebooks out; the model is bit for bit what it was. Doing it twice changes nothing."""
        for hook in self._hooks:
            hook.remove()
        for block in self._blocks:
            block._modules.pop(_CHILD, None)
        for snap in self.snaps.values() if self._blocks else ():
            snap.book.label = ""
        self._hooks, self._blocks = [], []

    def __enter__(self) -> HFCodebooks:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def attach_hf(hf_model: Any, codes: str | Path | Codebooks | Mapping[str, Codebook]) -> HFCodebooks:
    """Put codebooks into a Hugging Face causal language model, so that it computes and generates what the TransformerLens host does.

    A dropout between a site and the residual stream, where the configuration has one, comes after the codebook.

    Args:
        hf_model: gpt2, gpt_neox, gpt_neo, llama, mistral or qwen2; any weights of the basis that the codes were trained in.
        codes: A folder or hub name (as `export_hf` or `Codebooks.save_pretrained` wrote it), or codebooks by hook name. Sites: z q k v
            attn_out mlp_out post resid_pre resid_post resid_delta, and qkv where one projection computes all three. Where they know
            their basis the model runs once, in evaluation mode, to compare it; other weights get a `BasisWarning`.

    Raises:
        ConfigError: an architecture that is not in the table (`tl_codebook.convert.layouts`), or what is no codebook.
        UnknownHookError: a layer or site that the model does not have, or no hook can reach (resid_mid).
        ShapeError: a codebook of another width than its site.
        BasisMismatchError: codes trained with a larger vocabulary than the model's, or on weights that were processed (value biases folded
            too: only `attach` has room for an offset).
        AttachError: a TransformerLens host, a model that holds codebooks, one Codebook for two sites, one at work in another model, or
            weights that are offloaded.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from tl_codebook import Codebook, CodebookConfig
    >>> hf_model = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4))
    >>> with attach_hf(hf_model, {"blocks.1.hook_mlp_out": Codebook(32, CodebookConfig(n_codes=16, k=2))}) as inside:
    ...     _ = hf_model(torch.tensor([[1, 2, 3]]))
    >>> inside.ids["blocks.1.hook_mlp_out"].shape
    torch.Size([1, 3, 2])
    """
    hf_model = getattr(hf_model, "_orig_mod", hf_model)
    _refuse_hosts(hf_model)
    layout = layout_of(str(getattr(hf_model.config, "model_type", "")))
    blocks = _blocks_of(hf_model, layout)
    if isinstance(codes, str | Path):
        from tl_codebook.checkpoint import Codebooks  # takes TransformerLens with it; codebooks given as objects need none

        codes = Codebooks.from_pretrained(codes)
    _refuse_codebooks(codes, blocks, hf_model, layout)
    basis: Basis | None = getattr(codes, "basis", None)
    if basis is not None:
        _check_basis(basis, codes, hf_model, blocks, layout)
    books = dict(codes) if type(codes) is dict or not isinstance(codes, dict) else codes  # Codebooks stay Codebooks
    handle = HFCodebooks(hf_model, books, {name: Snap(book) for name, book in books.items()})
    devices = {layer: next(blocks[layer].parameters()).device for layer in _layers(books)}
    for name, book in books.items():
        book.to(device=devices[_place(name)[0]]).train(hf_model.training)
    try:
        for layer in devices:
            _hang(handle, blocks[layer], layer, layout, int(hf_model.config.num_attention_heads))
    except BaseException:
        handle.remove()
        raise
    return handle


def _place(name: str) -> tuple[int, str]:
    """Return layer and site of a hook name in the site table."""
    layer, site = split_hook_name(name)
    if layer is None:
        raise UnknownHookError(f"a codebook for {name!r} was given. Hooks inside a Hugging Face model reach {_reachable()}; leave it out.")
    return layer, site


def _reachable() -> str:
    return f"the sites {' '.join(site for site in SITES if site not in _NO_PLACE)} of blocks"


def refuse_sites(names: Any) -> None:
    """Raise `UnknownHookError` for hook names that `attach_hf` has no hook for."""
    for name in names:
        _, site = _place(name)
        if site in _NO_PLACE:
            raise UnknownHookError(
                f"a codebook for {name!r} was given, and no hook inside a Hugging Face model can serve {site}: {_NO_PLACE[site]}. "
                "Train codes at resid_pre, resid_post or resid_delta instead."
            )


def _layers(books: Mapping[str, Codebook]) -> list[int]:
    return sorted({_place(name)[0] for name in books})


def _refuse_hosts(model: Any) -> None:
    if hasattr(model, "hook_dict"):
        raise AttachError(
            f"a {type(model).__name__} was given, which is a TransformerLens host. Use tl_codebook.attach(model, codes) there."
        )
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise AttachError(f"a {type(model).__name__} was given where a Hugging Face causal language model is needed.")
    if any("_original_component" in module._modules for module in model.modules()):
        raise AttachError(
            f"this {type(model).__name__} is wrapped in a TransformerBridge, which changed its modules in place. Attach to the bridge "
            "(tl_codebook.attach), or load the model anew."
        )


def _blocks_of(model: nn.Module, layout: Layout) -> Any:
    try:
        return model.get_submodule(layout.blocks)
    except AttributeError:
        raise AttachError(
            f"this {type(model).__name__} has no module {layout.blocks!r}. Give the causal language model itself (of a PEFT model its "
            "get_base_model(); AutoModelForCausalLM, not AutoModel)."
        ) from None


def _refuse_codebooks(codes: Any, blocks: Any, model: Any, layout: Layout) -> None:
    if not isinstance(codes, Mapping) or not codes:
        raise ConfigError(f"codes is {codes!r:.80}. Give a folder, a hub name, or at least one Codebook by hook name.")
    if any(_CHILD in block._modules for block in blocks):
        raise AttachError(f"this {type(model).__name__} holds codebooks already. Call remove() on what attach_hf returned first.")
    refuse_sites(codes)
    owner: dict[int, str] = {}
    for name, book in codes.items():
        if not isinstance(book, Codebook):
            raise ConfigError(f"{name!r} is mapped to a {type(book).__name__}. Give a Codebook.")
        if id(book) in owner:
            raise AttachError(f"one Codebook was given for {owner[id(book)]!r} and {name!r}. Give each hook point its own (deepcopy).")
        owner[id(book)] = name
        if book.at_work:
            raise AttachError(
                f"the codebook for {name!r} is at work in another model, at {book.label!r}. Give a copy (copy.deepcopy(codes)), or take it "
                "out there first (detach, or remove of what attach_hf returned)."
            )
        layer, site = _place(name)
        if layer >= len(blocks):
            raise UnknownHookError(f"a codebook for {name!r} was given. The model has {len(blocks)} layers: 0 to {len(blocks) - 1}.")
        if next(blocks[layer].parameters()).device.type == "meta":
            raise AttachError(f"the weights of layer {layer} are on the device 'meta' (offloaded?). Load the model without offloading.")
        width = _width(blocks[layer], site, layout, model)
        if width is not None and width != book.d_in:
            raise ShapeError(
                f"the codebook for {name!r} has d_in={book.d_in}, the activation there has {width} values. Use the codes' model."
            )
    basis = getattr(codes, "basis", None)
    vocabulary = getattr(model.config, "vocab_size", None)
    if basis is not None and vocabulary is not None and int(basis.tokens.max()) >= int(vocabulary):
        raise BasisMismatchError(
            f"these codes were trained with a vocabulary of more than {vocabulary} tokens, which is all this model has. Load the model "
            "that they were trained on."
        )


def _check_basis(basis: Basis, names: Iterable[str], model: Any, blocks: Any, layout: Layout) -> None:
    """Run the tokens of the basis through the model, and compare what passes the sites as `attach` does."""
    from tl_codebook.basis import measured  # whoever has a basis has TransformerLens already
    from tl_codebook.hosts import evaluating

    names = [name for name in names if name in basis.means]
    known, used = getattr(model.config, "max_position_embeddings", None), basis.tokens.shape[1]
    if known is not None and int(known) < used:
        raise BasisMismatchError(f"these codes come from a model of {used} positions or more, and this one has {known}. Load that model.")
    seen: dict[str, Tensor] = {}
    hooks: list[RemovableHandle] = []
    try:
        for layer in sorted({_place(name)[0] for name in names}):
            keepers = {_place(name)[1]: partial(_keep, seen, name) for name in names if _place(name)[0] == layer}
            _hook(hooks, blocks[layer], keepers, layout, int(model.config.num_attention_heads))
        with evaluating(model), torch.no_grad():
            model(basis.tokens.to(model.get_input_embeddings().weight.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    unprocessed = {"processed": False, "fold_ln": False, "center_writing_weights": False}
    offsets = basis.compare(measured(seen, basis.tokens, unprocessed, None), names)
    if offsets:
        raise BasisMismatchError(
            f"the activations at {next(iter(offsets))!r} differ by a constant from those that the codes were trained on, as folded value "
            "biases make them, and a Hugging Face model has no room for the offset that would make up for it. Attach the codes to a "
            "TransformerLens host (tl_codebook.attach), or train codes without weight processing."
        )


def _keep(seen: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    seen[name] = x.detach().clone()
    return x


def _projections(block: nn.Module, layout: Layout) -> dict[str, tuple[nn.Module, str]]:
    """Return the projection of each site, and which end of it the site is."""
    attn, mlp = block.get_submodule(layout.attn), block.get_submodule(layout.mlp)
    heads, hidden = attn.get_submodule(layout.attn_out), mlp.get_submodule(layout.mlp_out)
    found = {"z": (heads, "in"), "attn_out": (heads, "out"), "post": (hidden, "in"), "mlp_out": (hidden, "out")}
    return found | {site: (attn.get_submodule(layout.qkv[min(i, len(layout.qkv) - 1)]), "out") for i, site in enumerate("qkv")}


def _width(block: nn.Module, site: str, layout: Layout, model: Any) -> int | None:
    """Return how many values a position has at a site, or None where its module does not say (a quantised one)."""
    projections = _projections(block, layout)
    if site == "qkv":
        if layout.fused is None:
            raise UnknownHookError(
                f"a codebook at {site!r} was given, and a {type(model).__name__} computes q, k and v apart: no hook has all three. Train "
                "codes at q, k and v instead."
            )
        each = _width(block, "q", layout, model)
        return None if each is None else 3 * each
    if site not in projections:
        return int(model.config.hidden_size)
    module, end = projections[site]
    width = getattr(module, f"{end}_features", getattr(module, "nx" if end == "in" else "nf", None))  # Linear, or the Conv1D of GPT-2
    return None if width is None else int(width) // (3 if layout.fused and site in "qkv" else 1)


def _hang(handle: HFCodebooks, block: nn.Module, layer: int, layout: Layout, n_heads: int) -> None:
    here = {_place(name)[1]: name for name in handle.snaps if _place(name)[0] == layer}
    snaps = {site: handle.snaps[name] for site, name in here.items()}
    for site, snap in snaps.items():
        snap.book.label = here[site]
    block.add_module(_CHILD, nn.ModuleDict({site: snap.book for site, snap in snaps.items()}))
    handle._blocks.append(block)
    _hook(handle._hooks, block, snaps, layout, n_heads)


def _hook(hooks: list[RemovableHandle], block: nn.Module, snaps: Mapping[str, _Change], layout: Layout, n_heads: int) -> None:
    """Hang what changes the activations of a block, by site, on its modules, and put the hooks down in the list."""
    projections = _projections(block, layout)
    if layout.fused and {"q", "k", "v", "qkv"} & set(snaps):
        fused = _Fused(layout.fused, n_heads, tuple(snaps.get(site) for site in "qkv"), snaps.get("qkv"))
        hooks.append(projections["q"][0].register_forward_hook(partial(_on_output, fused)))
    for site, (module, end) in projections.items():
        if site not in snaps or (layout.fused and site in "qkv"):
            continue
        if end == "in":
            hooks.append(module.register_forward_pre_hook(partial(_on_input, snaps[site]), with_kwargs=True))
        else:
            hooks.append(module.register_forward_hook(partial(_on_output, snaps[site])))
    stream = _Stream(snaps.get("resid_pre"), snaps.get("resid_delta"), snaps.get("resid_post"))
    if stream.pre is not None or stream.delta is not None:
        hooks.append(block.register_forward_pre_hook(partial(_on_input, stream.enter), with_kwargs=True))
    if stream.delta is not None or stream.post is not None:
        hooks.append(block.register_forward_hook(partial(_on_output, stream.leave)))
