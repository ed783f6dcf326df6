"""Interventions on codes: each function returns one ``(hook_name, function)``, exactly what ``fwd_hooks=[...]`` takes.

They edit the ids at `hook_codes`; the codebook decodes whatever leaves it. Positions: see `tl_codebook.positions`. Slots: ids come most
similar first, so slot -1 is the least similar. An id of -1 is an empty slot (contributes zero), -2 is no slot (a mean does not count it).
Source: Tamkin et al. 2023, sections 3.2 and 4 (replacing the last code, replacing all codes).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_codebook.codebook import Codebook
from tl_codebook.errors import ConfigError, InvalidCodeError, LabelError, PositionError, ShapeError, UnknownHookError, nearest
from tl_codebook.names import Address, Code, as_address, as_codes, codes_hook
from tl_codebook.points import SnapCall, current_call
from tl_codebook.positions import Positions
from tl_codebook.snap import select

__all__ = ["CodeHook", "ban_code", "force_code", "patch_codes", "swap_codes"]

Slots = Int[Tensor, "batch pos slot"]
Wider = Int[Tensor, "batch pos wider"]
Rows = Bool[Tensor, "#batch pos"]


class CodeHook:
    """The function of an intervention. It edits the ids of one place at some positions, and counts the passes in which it did."""

    verb = "edit"

    def __init__(self, address: Address, codes: tuple[Code, ...], positions: Positions):
        self.address, self.codes, self.positions = address, codes, positions
        self.n_applied = 0

    def __repr__(self) -> str:
        what = ", ".join(map(str, self.codes)) or str(self.address)
        return f"{self.verb}({what}, pos={self.positions!r})"

    @property
    def empty(self) -> bool:
        """Tell whether it was asked to act nowhere."""
        return self.positions.empty

    def check(self, codebook: Codebook) -> None:
        """Raise if the codebook has no such group or code."""
        group, n_groups = self.address.group, codebook.n_groups
        if group is None and n_groups > 1 and self.codes:
            raise LabelError(
                f"{self!r}: {self.address} has {n_groups} groups. Say which: '{self.address}.0:{self.codes[0].code}' to "
                f"'{self.address}.{n_groups - 1}:{self.codes[0].code}'."
            )
        if group is not None and group >= n_groups:
            raise LabelError(f"{self!r}: group {group} was asked for, but the codebook has {n_groups}. Give 0 to {n_groups - 1}.")
        for code in self.codes:
            if code.code >= codebook.n_codes:
                raise InvalidCodeError(
                    f"{self!r}: code {code.code} was asked for, but the codebook has {codebook.n_codes}. Give 0 to {codebook.n_codes - 1}."
                )

    def __call__(self, codes: Int[Tensor, "..."], hook: Any = None) -> Int[Tensor, "..."]:
        """Edit the ids that pass through `hook_codes`."""
        call = current_call()
        if call is None:
            raise ConfigError(f"{self!r} was called outside of a codebook. Use it as a forward hook at '<site>.hook_codes'.")
        book = call.codebook
        if call.n_lead != 2:
            raise ShapeError(
                f"{self!r}: {call.site} has no position axis in this model (batch and positions are one). Choose another site."
            )
        self.check(book)
        rows = self.positions.rows(call)
        if not bool(rows.any()):
            return codes
        self.n_applied += 1
        plain = book.n_groups == 1
        expected = 3 if plain else 4
        unbatched = codes.ndim == expected - 1  # run_with_hooks(remove_batch_dim=True)
        full = codes.unsqueeze(0) if unbatched else codes
        full = full.unsqueeze(2) if plain else full
        groups = range(book.n_groups) if self.address.group is None else [self.address.group]
        for group in groups:
            new = self.edit(full[:, :, group], rows, call, group)
            full = _widened(full, new.shape[-1], book).clone()
            full[:, :, group] = _widened(new, full.shape[-1], book)
        full = full.squeeze(2) if plain else full
        return full.squeeze(0) if unbatched else full

    def edit(self, ids: Slots, rows: Rows, call: SnapCall, group: int) -> Wider:
        """Return the ids of one group with the rows edited."""
        raise AssertionError("each intervention says what it does")


def _widened(ids: Int[Tensor, "... slot"], n_slots: int, book: Codebook) -> Int[Tensor, "... wider"]:
    """Add slots that change nothing: empty ones where codes add up, no slots at all where a mean would count them."""
    extra = max(0, n_slots - ids.shape[-1])
    return torch.nn.functional.pad(ids, (0, extra), value=-2 if book.config.reduce == "mean" else -1)


class _Force(CodeHook):
    verb = "force_code"

    def __init__(self, address: Address, codes: tuple[Code, ...], positions: Positions, slot: int | str):
        super().__init__(address, codes, positions)
        if isinstance(slot, bool) or not (isinstance(slot, int) or slot in ("all", "append")):
            raise ConfigError(f"slot={slot!r} was asked for. Give a whole number (-1 is the least similar), 'all' or 'append'.")
        self.slot = slot

    def edit(self, ids: Slots, rows: Rows, call: SnapCall, group: int) -> Wider:
        forced = torch.tensor([code.code for code in self.codes], device=ids.device)
        n, n_slots = len(forced), ids.shape[-1]
        if self.slot == "append":
            ids = _widened(ids, n_slots + n, call.codebook)
            first = n_slots
        elif n > n_slots:
            raise InvalidCodeError(f"{self!r}: {n} codes were given for {n_slots} slots. Give at most {n_slots}, or slot='append'.")
        elif self.slot == "all":
            if n == 1 and call.codebook.config.reduce == "mean":
                row = forced.expand(n_slots)
            else:  # a sum of n_slots copies would be n_slots times the vector: the place is to say these codes and nothing else
                row = _widened(forced, n_slots, call.codebook)
            return torch.where(rows.unsqueeze(-1), row, ids)
        else:
            slot = int(self.slot)
            first = slot if slot >= 0 else n_slots + slot - (n - 1)
            if not 0 <= first <= n_slots - n:
                raise InvalidCodeError(
                    f"{self!r}: slot {slot} was asked for {n} code{'s' * (n > 1)}, but there are {n_slots} slots. Give 0 to {n_slots - n}, "
                    f"or -1 to -{n_slots - n + 1}."
                )
        new = ids.clone()
        new[..., first : first + n] = torch.where(rows.unsqueeze(-1), forced, ids[..., first : first + n])
        return new


class _Ban(CodeHook):
    verb = "ban_code"

    def __init__(self, address: Address, codes: tuple[Code, ...], positions: Positions, refill: bool):
        super().__init__(address, codes, positions)
        self.refill = refill

    def edit(self, ids: Slots, rows: Rows, call: SnapCall, group: int) -> Wider:
        book = call.codebook
        banned = torch.tensor([code.code for code in self.codes], device=ids.device)
        if call.disabled is None:
            call.disabled = torch.zeros(*ids.shape[:2], book.n_groups, book.n_codes, dtype=torch.bool, device=ids.device)
        call.disabled[:, :, group, banned] |= rows.expand(ids.shape[:2]).unsqueeze(-1)
        gone = torch.isin(ids, banned) & rows.unsqueeze(-1)
        if not self.refill or not bool(gone.any()):
            return torch.where(gone, -1, ids)
        disabled = call.disabled[:, :, group]
        needed = book.k if book.config.selection == "nearest" else 1
        if int((~disabled).sum(-1).min()) < needed:
            raise InvalidCodeError(f"{self!r}: fewer than {needed} codes are left to refill with. Ban fewer codes, or use refill=False.")
        chosen, y, codes = call.chosen[:, :, group], call.y[:, :, group : group + 1], book.codes[group : group + 1].detach()
        kind = {"similarity": book.config.similarity, "selection": book.config.selection}
        again = select(y.detach(), codes, book.k, disabled=disabled.unsqueeze(2), **kind).squeeze(2)
        afresh = gone.any(-1, keepdim=True)
        if ids.shape[-1] >= book.k:  # rows that no other hook has edited are chosen again as a whole, which keeps their order
            first, added = ids[..., : book.k], ids[..., book.k :]  # slots added for other rows are empty in these
            afresh = afresh & (first == chosen).all(-1, keepdim=True) & (added < 0).all(-1, keepdim=True)
            call.chosen = call.chosen.clone()
            call.chosen[:, :, group] = torch.where(afresh, again, chosen)
            ids, gone = torch.cat([torch.where(afresh, again, first), added], -1), gone & ~afresh
        return self._refilled(torch.where(gone, -1, ids), gone, call, group) if bool(gone.any()) else ids

    def _refilled(self, ids: Slots, gone: Bool[Tensor, "batch pos slot"], call: SnapCall, group: int) -> Slots:
        """Fill single slots, where another hook has edited the row and what it put there has to stay."""
        book = call.codebook
        y, codes = call.y[:, :, group : group + 1].detach(), book.codes[group : group + 1].detach()
        nearest_only = book.config.selection == "nearest"
        assert call.disabled is not None
        for slot in range(ids.shape[-1]):
            disabled = call.disabled[:, :, group].clone()
            rest = y
            if nearest_only:  # the same code twice would not be the next best one
                used = torch.nn.functional.one_hot(ids.clamp(min=0), book.n_codes).bool() & (ids >= 0).unsqueeze(-1)
                disabled = disabled | used.any(-2)
            else:
                rest = y - torch.nn.functional.embedding(ids.clamp(min=0), codes[0]).mul((ids >= 0).unsqueeze(-1)).sum(-2, keepdim=True)
            best = select(rest, codes, 1, similarity=book.config.similarity, disabled=disabled.unsqueeze(2)).squeeze(2)
            best = torch.where(disabled.all(-1, keepdim=True), -1, best)
            ids = torch.cat(
                [ids[..., :slot], torch.where(gone[..., slot : slot + 1], best, ids[..., slot : slot + 1]), ids[..., slot + 1 :]], -1
            )
        return ids


class _Swap(CodeHook):
    verb = "swap_codes"

    def edit(self, ids: Slots, rows: Rows, call: SnapCall, group: int) -> Wider:
        first, second = (code.code for code in self.codes)
        swapped = torch.where(ids == first, second, torch.where(ids == second, first, ids))
        return torch.where(rows.unsqueeze(-1), swapped, ids)


class _Patch(CodeHook):
    verb = "patch_codes"

    def __init__(self, address: Address, positions: Positions, source: Int[Tensor, "batch pos *group slot"], source_pos: list[int] | None):
        super().__init__(address, (), positions)
        self.source, self.source_pos = source, source_pos

    def edit(self, ids: Slots, rows: Rows, call: SnapCall, group: int) -> Wider:
        source = self._source(call.codebook, group).to(ids.device)
        batch, length = ids.shape[:2]
        offset, growing = call.clock.offset, call.clock.generating or call.clock.offset > 0
        if source.shape[0] not in (1, batch):
            raise ShapeError(f"{self!r}: the source has {source.shape[0]} sequences, the model was given {batch}. Give 1 or {batch}.")
        here = torch.arange(offset, offset + length, device=ids.device)
        whole = self.positions.indices is None
        if whole and not growing and source.shape[1] != length:
            raise ShapeError(
                f"{self!r}: the source has {source.shape[1]} positions, the sequence {length}. Say which ones: pos= and source_pos=."
            )
        take = here.clone()
        if not whole:
            targets = self.positions.absolute(call) or []
            for target, origin in zip(targets, targets if self.source_pos is None else self.source_pos, strict=True):
                origin = origin if origin >= 0 else source.shape[1] + origin
                if not 0 <= origin < source.shape[1]:
                    raise PositionError(
                        f"{self!r}: source position {origin} was asked for, but the source has {source.shape[1]} positions."
                    )
                take[here == target] = origin
        rows = rows & (take < source.shape[1])
        taken = source[:, take.clamp(max=source.shape[1] - 1)]
        n_slots = max(ids.shape[-1], taken.shape[-1])
        book = call.codebook
        return torch.where(rows.unsqueeze(-1), _widened(taken, n_slots, book), _widened(ids, n_slots, book))

    def _source(self, book: Codebook, group: int) -> Slots:
        if self.source.ndim == 4:
            if self.source.shape[2] != book.n_groups:
                raise ShapeError(
                    f"{self!r}: the source has {self.source.shape[2]} groups, the codebook {book.n_groups}. Take it from there."
                )
            return self.source[:, :, group]
        if book.n_groups > 1 and self.address.group is None:
            raise ShapeError(
                f"{self!r}: the source is {tuple(self.source.shape)}, and the codebook has {book.n_groups} groups. Give [batch pos "
                f"{book.n_groups} slot], or name one group ('{self.address}.0')."
            )
        return self.source


def force_code(
    code: Any = None,
    *,
    pos: Any = None,
    slot: int | Literal["all", "append"] = -1,
    prompt_only: bool = False,
    generated_only: bool = False,
    layer: int | None = None,
    site: str | None = None,
    group: int | None = None,
    head: int | None = None,
) -> tuple[str, CodeHook]:
    """Make a hook that forces a code, or several of one place, at the positions asked for.

    Args:
        code: A `Code`, a label (``L5.z.2:88``), a list of them; or ids, with `layer`, `site` and `group` (`head` means the same).
        pos: None (every position), an int, a list, a slice or a bool mask [pos] or [batch pos]; negative from the end of the prompt.
        slot: -1 replaces the least similar code (n codes replace the n least similar); another int that slot; ``all`` makes the place say
            these codes and nothing else; ``append`` adds slots.
        prompt_only, generated_only: Leave generated, or prompt, positions alone.

    Raises:
        LabelError, InvalidCodeError: when the hook is made, or when it runs where the codebook has no such group or code.

    Source: Tamkin et al. 2023, section 4 (one code: slot -1; all codes: ``all``).

    >>> force_code("L5.z.2:88", pos=-1)
    ('blocks.5.attn.hook_z.hook_codes', force_code(L5.z.2:88, pos=-1))
    """
    codes = as_codes(code, layer=layer, site=site, group=group, head=head)
    positions = Positions(pos, prompt_only=prompt_only, generated_only=generated_only)
    return codes_hook(codes[0].hook_name), _Force(codes[0].address, codes, positions, slot)


def ban_code(
    code: Any = None,
    *,
    pos: Any = None,
    refill: bool = True,
    prompt_only: bool = False,
    generated_only: bool = False,
    layer: int | None = None,
    site: str | None = None,
    group: int | None = None,
    head: int | None = None,
) -> tuple[str, CodeHook]:
    """Make a hook that never lets a code (or several of one place) through at the positions asked for.

    Args:
        code, pos, prompt_only, generated_only, layer, site, group, head: As in `force_code`.
        refill: Choose again without the code, so that the next best one comes in; False leaves its slot empty (-1, contributes zero).

    >>> ban_code("L3.mlp_out:417")
    ('blocks.3.hook_mlp_out.hook_codes', ban_code(L3.mlp_out:417, pos=all))
    """
    codes = as_codes(code, layer=layer, site=site, group=group, head=head)
    positions = Positions(pos, prompt_only=prompt_only, generated_only=generated_only)
    return codes_hook(codes[0].hook_name), _Ban(codes[0].address, codes, positions, refill)


def swap_codes(first: Any, second: Any, *, pos: Any = None) -> tuple[str, CodeHook]:
    """Make a hook that puts one code wherever the other was chosen, both ways.

    >>> swap_codes("L3.mlp_out:4", "L3.mlp_out:7")
    ('blocks.3.hook_mlp_out.hook_codes', swap_codes(L3.mlp_out:4, L3.mlp_out:7, pos=all))
    """
    codes = as_codes([first, second])
    return codes_hook(codes[0].hook_name), _Swap(codes[0].address, codes, Positions(pos))


def patch_codes(
    source: Mapping[str, Tensor] | Any,
    address: Any = None,
    *,
    pos: Any = None,
    source_pos: Any = None,
    layer: int | None = None,
    site: str | None = None,
    group: int | None = None,
    head: int | None = None,
) -> tuple[str, CodeHook]:
    """Make a hook that brings in the codes of another run.

    Args:
        source: A cache from `run_with_cache`, or ids [batch pos slot] or [batch pos group slot]; one sequence serves a whole batch.
        address: Where: ``L3.mlp_out``, or ``L5.z.2`` for one group, or layer=, site= and group=.
        pos: Positions to overwrite, as in `force_code`; all by default, which needs sequences of one length.
        source_pos: Positions to take them from, one for each of `pos` (an int or a list); the same ones by default.

    >>> patch_codes({"blocks.3.hook_mlp_out.hook_codes": torch.tensor([[[4], [7]]])}, "L3.mlp_out", pos=1)
    ('blocks.3.hook_mlp_out.hook_codes', patch_codes(L3.mlp_out, pos=1))
    """
    place = as_address(address, layer=layer, site=site, group=group, head=head)
    name = codes_hook(place.hook_name)
    if not isinstance(source, Tensor):
        if name not in source:
            have = [key for key in list(source) if key.endswith(".hook_codes")]
            raise UnknownHookError(
                f"the source has no {str(name)!r}. {nearest(name, have)}It has codes of: {', '.join(have) or 'no site'}; cache with "
                "run_with_cache while the codebook is attached."
            )
        source = source[name]
    if not isinstance(source, Tensor) or source.is_floating_point() or source.dtype == torch.bool or source.ndim not in (3, 4):
        raise ShapeError(
            f"{place}: the source must be integer ids [batch pos slot] or [batch pos group slot]; cache without removing batch."
        )
    positions = Positions(pos)
    origins = None
    if source_pos is not None:
        origins = Positions(source_pos).indices
        if origins is None or positions.indices is None or len(origins) != len(positions.indices):
            raise PositionError(f"source_pos={source_pos!r} was given for pos={pos!r}. Give both as ints or as lists of one length.")
    return name, _Patch(place, positions, source.detach(), origins)
