"""Put codebooks into a model, look at them, and take them out again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from tl_codebook import hosts
from tl_codebook.codebook import Codebook, CodebookConfig
from tl_codebook.errors import AttachError, BasisMismatchError, ConfigError, HookNeverFiredError, ShapeError, UnknownHookError, nearest
from tl_codebook.made import check_made, drop, make
from tl_codebook.names import CODES, HEAD_SITES, INPUT, MADE_OF, SITES, Address, split_hook_name
from tl_codebook.points import CodebookPoint, RelayPoint

__all__ = ["attach", "detach", "match_sites", "refresh", "sites"]

Books = Mapping[str, Codebook | CodebookConfig]

_UNPLACED = "_taken_from_an_offset"
"""Attribute of a codebook that was detached where an offset held it: without its basis nobody knows whether the next model needs one."""


def attach(
    model: Any,
    sites: str | Sequence[str] | Books,
    *,
    layers: int | Sequence[int] | None = None,
    n_codes: int | None = None,
    k: int = 1,
    n_groups: int | None = None,
    on_nonfinite: Literal["raise", "propagate"] = "raise",
    **config: Any,
) -> dict[str, Codebook]:
    """Put a codebook at every site asked for and return the codebooks by hook name; a failed call leaves the model as it was.

    A short probe runs through the model, with the user's hooks set aside, to learn the widths and to prove that every site fires.

    Args:
        model: A HookedTransformer or TransformerBridge.
        sites: One or more of z q k v attn_out mlp_out post resid_pre resid_mid resid_post resid_delta qkv; or, for full control, a mapping
            from a site, an address (``L3.mlp_out``) or a hook name to a `CodebookConfig` or a `Codebook`.
        layers: Layers to use, negative ones from the end; all by default. Not with addresses or hook names.
        n_codes, k, n_groups, config: The fields of `CodebookConfig`. At z, q, k, v one group per head unless n_groups says else.
        on_nonfinite: What a NaN or Inf at a site does: ``raise``, or ``propagate`` it to the output.

    Raises:
        UnknownHookError: no such site, layer or hook point.
        AttachError: the hook point holds a codebook or something else already, or two names mean one hook point.
        HookNeverFiredError: a hook point that exists and never fires.
        ConfigError, ShapeError: a codebook that does not fit.
        BasisMismatchError: `Codebooks` trained on weights processed otherwise (where only value biases were folded they are made to fit).

    Source: Tamkin et al. 2023, section 2 (where codebooks sit).

    >>> books = attach(model, ["z", "mlp_out"], n_codes=32, k=4)
    >>> list(books)[:2], books["blocks.0.attn.hook_z"].codes.shape
    (['blocks.0.attn.hook_z', 'blocks.0.hook_mlp_out'], torch.Size([4, 32, 8]))
    >>> logits, cache = model.run_with_cache(torch.tensor([[1, 2, 3]]))
    >>> cache["blocks.0.hook_mlp_out.hook_codes"].shape
    torch.Size([1, 3, 4])
    """
    model = hosts.as_host(model)
    if isinstance(sites, Mapping):
        if n_codes is not None or n_groups is not None or config or k != 1:
            raise ConfigError(
                "sites is a mapping to codebooks, and n_codes, k, n_groups or others were given too. Put them in the mapping."
            )
        wanted = _from_mapping(model, sites, layers)
    else:
        if n_codes is None:
            raise ConfigError("n_codes was not given. Say how many codes each group has, such as n_codes=1024.")
        try:
            settings = CodebookConfig(n_codes, k, n_groups, **config)
        except TypeError:
            unknown = sorted(set(config) - {"similarity", "selection", "input_norm", "reduce"})
            known = ["similarity", "selection", "input_norm", "reduce"]
            raise ConfigError(f"attach has no option {unknown[0]!r}. {nearest(unknown[0], known)}Options: {' '.join(known)}.") from None
        wanted = dict.fromkeys(hosts.resolve_sites(model, sites, layers), settings)
    basis = getattr(sites, "basis", None)
    _refuse_unplaced(wanted, () if basis is None else basis.means)
    offsets = {} if basis is None else basis.check(model, wanted)
    _refuse_occupied(model, wanted)
    shapes = _probe(model, wanted)
    with torch.inference_mode(False):  # or neither could the codes be trained, nor the totals of their use be added to
        books = {name: _built(model, name, item, shapes[name], on_nonfinite) for name, item in wanted.items()}
    modes = {name: book.training for name, book in books.items()}
    try:
        _adopt(model, books, offsets)
        _prove(model, books)
    except BaseException:
        _release(model, books)
        for name, book in books.items():
            book.train(modes[name])
        raise
    for book in books.values():
        book.__dict__.pop(_UNPLACED, None)
    return books


def _from_mapping(model: Any, books: Books, layers: int | Sequence[int] | None) -> dict[str, Codebook | CodebookConfig]:
    wanted: dict[str, Codebook | CodebookConfig] = {}
    owner: dict[int, str] = {}
    if not books:
        raise UnknownHookError("an empty mapping of codebooks was given. Give at least one hook name and its Codebook or CodebookConfig.")
    for key, item in books.items():
        if not isinstance(item, Codebook | CodebookConfig):
            raise ConfigError(f"{key!r} is mapped to a {type(item).__name__}. Give a Codebook or a CodebookConfig.")
        if key in SITES:
            names = hosts.resolve_sites(model, key, layers)
        elif layers is not None:
            raise ConfigError(f"layers={layers!r} was given, but {key!r} names its layer itself. Leave layers out.")
        else:
            names = [hosts.stable_name(model, Address.parse(key).hook_name if key.startswith("L") else key)]
        if isinstance(item, Codebook) and len(names) > 1:
            raise ConfigError(f"one Codebook was given for {len(names)} hook points of site {key!r}. Give a CodebookConfig, or one each.")
        for name in names:
            if name in wanted:
                raise AttachError(f"{key!r} means {name!r}, which another name in the same call means too. Name each hook point once.")
            if isinstance(item, Codebook) and id(item) in owner:
                raise AttachError(f"one Codebook was given for {owner[id(item)]!r} and {name!r}. Give each hook point its own (deepcopy).")
            owner[id(item)] = name
            wanted[name] = item
    return wanted


def _refuse_unplaced(wanted: Books, measured: Iterable[str]) -> None:
    for name, book in wanted.items():
        if isinstance(book, Codebook) and _UNPLACED in book.__dict__ and name not in measured:
            raise BasisMismatchError(
                f"the codebook for {name!r} was detached from a model with folded value biases, where an offset kept it exact, and a "
                "plain mapping does not say what its codes were trained on. Attach it as Codebooks with a basis: those that were attached "
                "before, or Codebooks.of(model) from before the detach."
            )


def _refuse_occupied(model: Any, names: Iterable[str]) -> None:
    hooks, seen = model.hook_dict, dict[int, str]()
    for name in names:
        point = hooks.get(name)
        if point is None:
            check_made(model, name)
            continue  # still to be made
        if isinstance(point, CodebookPoint):
            book = point.codebook
            raise AttachError(
                f"{name!r} already holds a codebook ({book.n_codes} codes, k={book.k}). Call detach(model, {name!r}) first; nothing was "
                "changed."
            )
        if type(point) not in (HookPoint, RelayPoint):
            raise AttachError(
                f"{name!r} is a {type(point).__name__}, put there by another library. Take that off first; nothing was changed."
            )
        if id(point) in seen:
            raise AttachError(f"{name!r} and {seen[id(point)]!r} are one and the same hook point in this model. Give one of them.")
        seen[id(point)] = name


def _probe_tokens(model: Any) -> Tensor:
    n_pos = min(3, int(getattr(model.cfg, "n_ctx", 3) or 3))
    vocabulary = int(model.cfg.d_vocab)
    return (torch.arange(2 * n_pos) % vocabulary).reshape(2, n_pos).to(hosts.home_device(model, "hook_embed"))


def _probe(model: Any, names: Iterable[str]) -> dict[str, torch.Size]:
    tokens = _probe_tokens(model)
    got = hosts.raw_activations(model, tokens, list(names))
    for name in names:
        if name not in got:
            raise HookNeverFiredError(
                f"the hook point {name!r} exists, but nothing passes through it in this model. Choose a site that fires"
                f"{', or call set_use_attn_result(True) first' if name.endswith('result') else ''}; nothing was changed."
            )
        shape = got[name].shape
        if shape[:2] != tokens.shape and not (len(shape) == 2 and shape[0] == tokens.numel()):
            raise ShapeError(f"{name!r} carries {tuple(shape)} for tokens {tuple(tokens.shape)}: not [batch pos ...]. Choose another site.")
        if not got[name].is_floating_point():
            raise ShapeError(f"{name!r} carries {got[name].dtype}. A codebook takes floating-point activations; choose another site.")
    return {name: got[name].shape for name in names}


def _built(
    model: Any, name: str, item: Codebook | CodebookConfig, shape: torch.Size, on_nonfinite: Literal["raise", "propagate"]
) -> Codebook:
    d_in = shape[2:].numel() if len(shape) > 2 else shape[-1]
    site = split_hook_name(name)[1]
    heads = hosts.head_count(model, site) if site in HEAD_SITES else 1
    config = item.config if isinstance(item, Codebook) else item
    groups = heads if config.n_groups is None else config.n_groups
    if site in HEAD_SITES and heads % groups and (groups % heads or groups == model.cfg.n_heads):
        raise ConfigError(
            f"n_groups={groups} was asked for at {name!r}, which has {heads} heads"
            f"{' (k and v have the key-value heads of grouped-query attention)' if heads != model.cfg.n_heads else ''}. "
            f"Leave n_groups out for one group per head, or give a divisor of {heads}."
        )
    if isinstance(item, CodebookConfig):
        try:
            item = Codebook(d_in, config.with_groups(groups), on_nonfinite=on_nonfinite)
        except ConfigError as error:
            raise ConfigError(f"{name!r}: {error}") from None
    if item.d_in != d_in:
        raise ShapeError(
            f"the codebook for {name!r} has d_in={item.d_in}, the activation there has {d_in} values. Make one of d_in={d_in}."
        )
    return item


def _adopt(model: Any, books: Mapping[str, Codebook], offsets: Mapping[str, Tensor]) -> None:
    for name, book in books.items():  # first what may fail: a device without room for the codes
        book.to(device=hosts.home_device(model, name))
    clock = hosts.PositionClock.of(model)
    for name, book in books.items():
        point = make(model, name) if split_hook_name(name)[1] in MADE_OF else model.hook_dict[name]
        if not isinstance(point, CodebookPoint):
            point.__class__ = CodebookPoint
        point.adopt(name, book, clock, offsets.get(name))
        point.train(model.training)
    refresh(model)


def _prove(model: Any, books: Mapping[str, Codebook]) -> None:
    points = {name: point for name, point in sites(model).items() if name in books}
    before = [(book, book.count_when, book.on_nonfinite) for book in books.values()]
    with torch.no_grad():  # autograd would save codes that were made in inference mode, and cannot
        diverged = not all(bool(torch.isfinite(book.codes).all()) for book in books.values())  # loaded with allow_nonfinite=True
    try:
        for book in books.values():
            book.count_when = "never"
            book.on_nonfinite = "propagate" if diverged else book.on_nonfinite
        with hosts.quiet(model), torch.no_grad():
            model(_probe_tokens(model))
    finally:
        for book, when, policy in before:
            book.count_when, book.on_nonfinite = when, policy
    for name, point in points.items():
        if not point.n_snaps:
            raise HookNeverFiredError(f"the codebook at {name!r} was never reached by a probe. Choose another site; nothing was changed.")


def _release(model: Any, names: Iterable[str]) -> dict[str, Codebook]:
    points, released = sites(model), {}
    for name in names:
        if name in points:
            if split_hook_name(name)[1] in MADE_OF:
                drop(model, name)
            released[name] = points[name].release()
    if not sites(model):
        hosts.PositionClock.remove(model)
    refresh(model)
    return released


def detach(model: Any, names: str | Iterable[str] | None = None) -> dict[str, Codebook]:
    """Take codebooks out (all, or those that `names` match) and return them by hook name; the model is bit for bit what it was.

    Those that an offset kept exact (`CodebookPoint.offset`) attach again only with their basis: keep ``Codebooks.of(model)`` of before.

    Args:
        names: Hook names, addresses (``L3.mlp_out``) or sites (``z``).

    Raises:
        UnknownHookError: a name at which no codebook sits.

    >>> _ = attach(model, "mlp_out", n_codes=16)
    >>> sorted(detach(model)), sites(model)
    (['blocks.0.hook_mlp_out', 'blocks.1.hook_mlp_out'], {})
    """
    model = hosts.as_host(model)
    points = match_sites(model, names)
    for point in points:
        if point.offset is not None:
            point.codebook.__dict__[_UNPLACED] = True
    return _release(model, [point.site for point in points])


def sites(model: Any) -> dict[str, CodebookPoint]:
    """Return the hook points that hold a codebook, by hook name: each once, in the order of the layers.

    Iterate this rather than `hook_dict` or a cache, where a Bridge lists a hook point under two or three names.

    >>> _ = attach(model, ["z", "mlp_out"], layers=-1, n_codes=16)
    >>> list(sites(model))
    ['blocks.1.attn.hook_z', 'blocks.1.hook_mlp_out']
    """
    points = [m for m in hosts.as_host(model).modules() if isinstance(m, CodebookPoint) and "site" in m.__dict__]
    order = list(SITES)

    def key(point: CodebookPoint) -> tuple[int, int, str]:
        layer, site = split_hook_name(point.site)
        return (-1 if layer is None else layer, order.index(site) if site in order else len(order), point.site)

    return {point.site: point for point in sorted(points, key=key)}


def match_sites(model: Any, names: str | Iterable[str] | None = None) -> list[CodebookPoint]:
    """Return the codebook points that hook names, addresses or sites mean; None means all. Unknown names raise."""
    points = sites(model)
    if names is None:
        return list(points.values())
    found: dict[str, CodebookPoint] = {}
    asked = [names] if isinstance(names, str) else list(names) if isinstance(names, Iterable) else [names]
    for name in asked:
        if not isinstance(name, str):
            raise UnknownHookError(f"a site was given as {name!r:.60}. Give hook names, addresses ('L3.mlp_out') or sites ('z').")
        if name in SITES:
            matching = [n for n in points if split_hook_name(n)[1] == name]
        elif name.startswith("L"):
            address = Address.parse(name)
            if address.group is not None:
                raise UnknownHookError(
                    f"{name!r} is one group of a codebook; here a whole one is meant. Say {str(replace(address, group=None))!r}."
                )
            matching = [n for n in points if n == address.hook_name]
        else:
            matching = [n for n in points if n == name or (name in model.hook_dict and model.hook_dict[name] is points[n])]
        if not matching:
            raise UnknownHookError(
                f"no codebook sits at {name!r}. {nearest(name, points)}Codebooks sit at: "
                f"{', '.join(points) or 'no site; call attach first'}."
            )
        found |= {n: points[n] for n in matching}
    return list(found.values())


def refresh(model: Any) -> None:
    """Publish the names of the codebooks' hook points again, as `enable_compatibility_mode()` makes necessary on a Bridge.

    >>> _ = attach(model, "mlp_out", n_codes=16)
    >>> refresh(model)
    >>> "blocks.0.hook_mlp_out.hook_codes" in model.hook_dict
    True
    """
    model = hosts.as_host(model)
    if not hosts.is_bridge(model):
        model.setup()
        return
    registry = model._hook_registry
    live = set(map(id, model.modules()))
    ours = (f".{CODES}", f".{INPUT}", *(f".{SITES[site]}" for site in MADE_OF))
    for name in [n for n, p in registry.items() if n.endswith(ours) or id(p) not in live]:
        del registry[name]
    points = sites(model)
    for name, point in points.items():
        for child in (INPUT, CODES):
            getattr(point, child).name = f"{name}.{child}"
            registry[f"{name}.{child}"] = getattr(point, child)
        if split_hook_name(name)[1] in MADE_OF:
            point.name = name
            registry[name] = point
    kind = hosts.StrictRegistry if points else dict
    if type(registry) is not kind:
        model._hook_registry = kind(registry)
