"""What one patch changes: which ids of one run take the place of which of the other; and the ids of controls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor

from tl_codebook.errors import DataError
from tl_codebook.graphs.running import equally_frequent
from tl_codebook.names import Address, Code, split_hook_name
from tl_codebook.points import CodebookPoint

__all__ = ["Edit", "edited", "edits_of", "substitutes", "wrong_codes"]

Slots = Int[Tensor, "row pos group slot"]


@dataclass(frozen=True, eq=False)
class Edit:
    """One patch: a whole codebook, or one group, one position or one code of it."""

    name: str
    pos: int | None = None
    group: int | None = None
    code: Code | None = None
    cells: list[tuple[int, int, int]] = field(default_factory=list)
    """For a code: the rows, the slot that it has in the clean run, and that of its match in the corrupt run."""

    def __str__(self) -> str:
        what = str(self.code or Address(*split_hook_name(self.name), self.group))
        return what if self.pos is None else f"{what}@{self.pos}"


def edits_of(
    by: str, points: Sequence[CodebookPoint], clean: Mapping[str, Tensor], corrupt: Mapping[str, Tensor]
) -> tuple[list[Edit], tuple[tuple[str, ...], ...]]:
    """Return the patches that are asked for, and the names along the axes of their map."""
    if by == "code":
        edits = [edit for point in points for edit in _code_edits(point, clean[point.site], corrupt[point.site])]
        if not edits:
            raise DataError(
                "the clean and the corrupt run have the same codes at all of these sites, so that there is none to patch. Give other "
                "prompts or other sites."
            )
        return edits, (tuple(map(str, edits)),)
    if by == "position":
        length = clean[points[0].site].shape[1]
        edits = [Edit(point.site, pos) for point in points for pos in range(length)]
        return edits, (tuple(str(Edit(point.site)) for point in points), tuple(map(str, range(length))))
    if by == "group":
        groups = [(point.site, group) for point in points for group in range(point.codebook.n_groups)]
        edits = [Edit(name, group=group if clean[name].shape[2] > 1 else None) for name, group in groups]
    else:
        edits = [Edit(point.site) for point in points]
    return edits, (tuple(map(str, edits)),)


def _code_edits(point: CodebookPoint, clean: Slots, corrupt: Slots) -> list[Edit]:
    layer, site = split_hook_name(point.site)
    found: dict[tuple[int, int, int], Edit] = {}
    differing = (clean.sort(-1).values != corrupt.sort(-1).values).any(-1)
    for row, pos, group in differing.nonzero().tolist():
        ours, theirs = clean[row, pos, group].tolist(), corrupt[row, pos, group].tolist()
        for slot, match in zip(_only(ours, theirs), _only(theirs, ours), strict=False):
            place = Code(layer, site, group if point.codebook.n_groups > 1 else None, ours[slot])
            edit = found.setdefault((group, pos, ours[slot]), Edit(point.site, pos, group, place))
            edit.cells.append((row, slot, match))
    return [found[key] for key in sorted(found, key=lambda key: (key[1], key[0], key[2]))]


def _only(ids: list[int], others: list[int]) -> list[int]:
    """Return the slots of codes that the others have not, or not as often."""
    left, slots = Counter(others), []
    for slot, code in enumerate(ids):
        if code >= 0 and left[code] == 0:
            slots.append(slot)
        left[code] = max(0, left[code] - 1)
    return slots


def edited(edit: Edit, base: Slots, other: Slots, *, reverse: bool = False) -> Slots:
    """Return the ids of a run with those of another brought in; `reverse` where the base is the clean run."""
    new = base.clone()
    if edit.code is not None:
        assert edit.pos is not None
        for row, clean_slot, corrupt_slot in edit.cells:
            to, origin = (clean_slot, corrupt_slot) if reverse else (corrupt_slot, clean_slot)
            new[row, edit.pos, edit.group or 0, to] = other[row, edit.pos, edit.group or 0, origin]
        return new
    where = (slice(None), slice(None) if edit.pos is None else edit.pos, slice(None) if edit.group is None else edit.group)
    new[where] = other[where]
    return new


def substitutes(ids: Slots, counts: Int[Tensor, "group code"], generator: torch.Generator) -> Slots:
    """Return for each id another code of the same group and of (nearly) equal frequency, drawn anew for each place."""
    new = ids.clone()
    for group in range(ids.shape[2]):
        mine = new[:, :, group]
        for code in mine[mine >= 0].unique().tolist():
            others = equally_frequent(counts[group], code, generator)
            here = ids[:, :, group] == code
            if len(others):
                mine[here] = others[torch.randint(len(others), (int(here.sum()),), generator=generator)]
    return new


def wrong_codes(clean: Slots, corrupt: Slots, otherwise: Slots) -> Slots:
    """Return for each id the one that the same slot has at another position of the row, `otherwise` where there is none that would do.

    It is that of the next position, round the end of the row, where it is neither what the clean nor what the corrupt run has here.
    """
    new, left = otherwise.clone(), clean >= 0
    for shift in range(1, clean.shape[1]):
        moved = clean.roll(-shift, dims=1)
        take = left & (moved != clean) & (moved != corrupt) & (moved >= 0)
        new, left = torch.where(take, moved, new), left & ~take
    return new
