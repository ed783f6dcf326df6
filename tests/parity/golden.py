"""Read golden cases of the original library, and say its configurations, names and edits in the words of this one."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tl_codebook.codebook import Codebook, CodebookConfig
from tl_codebook.convert.original_config import PLACES
from tl_codebook.interventions import ban_code, force_code
from tl_codebook.names import Address, codes_hook

Hook = tuple[str, Callable[..., Any]]

SITES = {place: sites[0] for place, sites in PLACES.items()}
"""Where the original puts a codebook -> our site (the first of three for qkv)."""

TENSORS = {"codes": "codebook.weight", "norm_weight": "ln.weight", "norm_bias": "ln.bias"}
"""Our parameter -> the original's, once per group."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One case: what was run (`spec`), what came out (`data`), and its folder."""

    spec: dict[str, Any]
    data: dict[str, Tensor]
    folder: Path


def read_case(shared: Callable[[str], Path], name: str) -> Case:
    """Read a case through the `shared` fixture, which skips where the data is missing."""
    folder = shared(f"golden/{name}")
    data = {key: value.long() if value.dtype == torch.int32 else value for key, value in load_file(folder / "data.safetensors").items()}
    return Case(json.loads((folder / "case.json").read_text()), data, folder)


def stacked(data: Mapping[str, Tensor], key: str, n_groups: int) -> Tensor:
    """Return what the original keeps by group (``<key>``, or ``<key>_gcb0`` and so on) as [..., group, last]."""
    return torch.stack([data[key]] if key in data else [data[f"{key}_gcb{group}"] for group in range(n_groups)], dim=-2)


def parameters(data: Mapping[str, Tensor], prefix: str, n_groups: int) -> dict[str, Tensor]:
    """Return the tensors of one of the original's codebooks, or their gradients, under the names and in the shapes of ours."""
    grouped = f"{prefix}codebook.0.codebook.weight" in data
    parts = [f"{prefix}codebook.{group}." for group in range(n_groups)] if grouped else [prefix]
    return {ours: torch.stack([data[part + theirs] for part in parts]) for ours, theirs in TENSORS.items()}


def paper_book(tensors: Mapping[str, Tensor], k: int, similarity: str = "inner_product") -> Codebook:
    """Return a codebook as the original has it, holding the given tensors."""
    n_groups, n_codes, d_group = tensors["codes"].shape
    config = dataclasses.replace(CodebookConfig.paper(n_codes, k, n_groups), similarity=similarity)
    book = Codebook(n_groups * d_group, config)
    book.load_state_dict(dict(tensors))
    return book


def read_key(key: str) -> tuple[int, str, int | None]:
    """Read one of the original's keys: ``layer0_attn_preproj_gcb1`` is layer 0, attn_preproj, group 1.

    >>> read_key("layer1_attn_plus_mlp")
    (1, 'attn_plus_mlp', None)
    """
    match = re.fullmatch(r"layer(\d+)_(\w+?)(?:_gcb(\d+))?", key)
    assert match is not None, key
    return int(match[1]), match[2], None if match[3] is None else int(match[3])


def place_of(key: str) -> Address:
    """Return where we have what one of the original's keys names: ``layer0_attn_preproj_gcb1`` is ``L0.z.1``.

    >>> str(place_of("layer1_mlp"))
    'L1.mlp_out'
    """
    layer, place, group = read_key(key)
    return Address(layer, SITES[place], group)


def at_group(value: Tensor, place: Address) -> Tensor:
    """Return the part of [batch pos (group) last] that belongs to the group of a place."""
    return value if place.group is None else value[:, :, place.group]


def edited(place: Address, function: Callable[[Tensor], Tensor]) -> Hook:
    """Make an ordinary hook at `hook_codes` that changes the ids [batch pos slot] of one place."""

    def hook(ids: Tensor, hook: Any) -> Tensor:
        if place.group is None:
            return function(ids)
        new = function(ids[:, :, place.group])
        ids[:, :, place.group] = torch.nn.functional.pad(new, (0, ids.shape[-1] - new.shape[-1]), value=-2)  # -2: no slot
        return ids

    return codes_hook(place.hook_name), hook


def emptied(place: Address, slots: Any, pos: Any = None) -> Hook:
    """Make an ordinary hook that empties slots (id -1) at some positions, all by default."""

    def empty(ids: Tensor) -> Tensor:
        ids = ids.clone()
        rows = torch.arange(ids.shape[1])[slice(None) if pos is None else pos].reshape(-1, 1)
        ids[:, rows, torch.arange(ids.shape[2])[slots].reshape(1, -1)] = -1
        return ids

    return edited(place, empty)


def edit_hook(edit: Mapping[str, Any], shape: torch.Size) -> Hook:
    """Say one of the original's edits as a hook; `shape` is that of the tokens."""
    place, op = place_of(edit["key"]), edit["op"]
    where = {"layer": place.layer, "site": place.site, "group": place.group}
    if op == "set":
        slot = "all" if edit["slot"] is None else edit["slot"]
        return force_code(edit["code"], pos=edit["pos"], slot=slot, **where)
    if op == "set_row":
        mask = torch.zeros(shape, dtype=torch.bool)
        mask[edit["row"], edit["pos"]] = True
        return force_code(edit["code"], pos=mask, slot=edit["slot"], **where)
    if op == "block":
        return emptied(place, slice(None) if edit["slot"] is None else edit["slot"], edit["pos"])
    functions = {
        "flip_batch": lambda ids: ids.flip(0),
        "reverse_slots": lambda ids: ids.flip(-1),
        "identity": lambda ids: ids,
        "keep_first": lambda ids: ids[..., : edit["n"]],
    }
    return edited(place, functions[op])


DEFAULTS: dict[str, Any] = {
    "keep_k_codes": True,
    "disable_for_tkns": "all",
    "disable_codes": (),
    "disable_topk": 0,
    "disable_sim_idx": (),
    "cosine": False,
}
"""The options by which the original edits codes, besides its hooks."""


def option_hooks(run: Callable[[list[Hook]], Mapping[str, Tensor]], options: Mapping[Address, Mapping[str, Any]]) -> list[Hook]:
    """Say the original's options as hooks.

    ``keep_k_codes``: choose other codes instead (``ban_code``), or leave the slots empty (``ban_code(refill=False)`` and -1).
    ``disable_codes``: the same codes everywhere, one ban for each tuple. ``disable_topk``: the n codes that would have come first, so
    different ones at every position. ``disable_sim_idx``: slots; the original looks at it only without ``keep_k_codes``, and does not
    hold it to ``disable_for_tkns``. ``cosine`` has no effect in the original, whose inner product ranks as the cosine does.

    Args:
        run: Runs the model under hooks and returns the cache.
        options: By place, in the order in which the places fire.
    """
    hooks: list[Hook] = []
    for name, items in groupby(options.items(), key=lambda item: codes_hook(item[0].hook_name)):
        places = {place: DEFAULTS | dict(chosen) for place, chosen in items}
        for place, chosen in places.items():
            pos = None if chosen["disable_for_tkns"] == "all" else chosen["disable_for_tkns"]
            for codes in chosen["disable_codes"]:
                where = {"layer": place.layer, "site": place.site, "group": place.group}
                hooks.append(ban_code(list(codes), pos=pos, refill=chosen["keep_k_codes"], **where))
            if not chosen["keep_k_codes"]:
                hooks += [emptied(place, slice(0, chosen["disable_topk"]), pos), emptied(place, list(chosen["disable_sim_idx"]))]
        skipping = {place: chosen for place, chosen in places.items() if chosen["keep_k_codes"] and chosen["disable_topk"]}
        if skipping:
            ids = run(hooks)[name]
            hooks += [hook for place, chosen in skipping.items() for hook in bans_of_first(at_group(ids, place), place, chosen)]
    return hooks


def bans_of_first(ids: Tensor, place: Address, chosen: Mapping[str, Any]) -> list[Hook]:
    """Ban the first codes of every position, each code just where it is among them."""
    rows = torch.zeros(ids.shape[1], dtype=torch.bool)
    rows[slice(None) if chosen["disable_for_tkns"] == "all" else chosen["disable_for_tkns"]] = True
    first = ids[..., : chosen["disable_topk"]]
    hooks = []
    for code in first[:, rows].unique().tolist():
        mask = (first == code).any(-1) & rows
        hooks.append(ban_code(code, pos=mask, layer=place.layer, site=place.site, group=place.group))
    return hooks


def assert_floats(got: Tensor, want: Tensor, atol: float, of_largest: float = 0.0) -> None:
    """Compare floats: an absolute tolerance, plus one relative to the largest entry."""
    torch.testing.assert_close(got, want, rtol=0, atol=atol + of_largest * float(want.abs().max()))


def assert_ids(ids: Tensor, want: Tensor, place: Address) -> None:
    """Compare the ids of one place, which a hook may have left with fewer slots than its neighbours have."""
    got = at_group(ids, place)
    n_slots = want.shape[-1]
    assert got[..., :n_slots].tolist() == want.tolist()
    assert got[..., n_slots:].eq(-2).all()
