"""Which rows of the current forward pass an intervention acts on.

Positions are absolute: row i of the token tensor, padding included, whether or not a KV cache makes the current pass one row long.
Negative positions count from the end of the prompt (outside of generation: of the sequence).
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from tl_codebook.errors import ConfigError, EmptyInterventionWarning, PositionError
from tl_codebook.points import SnapCall

__all__ = ["Positions"]


def _index(value: Any) -> int:
    kind = str(getattr(value, "dtype", type(value).__name__))
    if isinstance(value, bool) or "bool" in kind:
        raise PositionError(f"position {value!r} is a bool. Give a whole number, or a mask with one bool a position.")
    try:
        return operator.index(value)
    except TypeError:
        raise PositionError(f"position {value!r} is a {type(value).__name__}. Give a whole number.") from None


class Positions:
    """A choice of positions: None (all), an int, a list of ints, a slice, or a bool mask [pos] or [batch pos]."""

    def __init__(self, pos: Any, *, prompt_only: bool = False, generated_only: bool = False):
        if prompt_only and generated_only:
            raise ConfigError("prompt_only and generated_only were both asked for, which leaves no position. Give one of them, or neither.")
        self.prompt_only, self.generated_only = prompt_only, generated_only
        self.indices: list[int] | None = None
        self.slice: slice | None = None
        self.mask: Bool[Tensor, "*batch pos"] | None = None
        if pos is None:
            return
        if isinstance(pos, slice):
            parts = [None if part is None else _index(part) for part in (pos.start, pos.stop, pos.step)]
            if parts[2] is not None and parts[2] < 1:
                raise PositionError(f"a slice with step {parts[2]} was given. Give a step >= 1.")
            self.slice = slice(*parts)
            return
        if not isinstance(pos, Tensor) and (hasattr(pos, "__array__") or isinstance(pos, Iterable)) and not isinstance(pos, str):
            pos = list(pos) if not hasattr(pos, "__array__") else torch.as_tensor(pos)
        if isinstance(pos, list) and pos and all(isinstance(item, bool) for item in pos):
            pos = torch.tensor(pos)
        if isinstance(pos, Tensor) and pos.dtype == torch.bool and pos.ndim > 0:
            if pos.ndim > 2:
                raise PositionError(f"a mask of shape {tuple(pos.shape)} was given. Give [pos] or [batch pos].")
            self.mask = pos
            empty = not bool(pos.any())
        else:
            many = list(pos) if isinstance(pos, list) or (isinstance(pos, Tensor) and pos.ndim == 1) else [pos]
            self.indices = [_index(item) for item in many]
            empty = not many
        if empty:
            warnings.warn("an intervention at no position was asked for: it will change nothing", EmptyInterventionWarning, stacklevel=4)

    @property
    def empty(self) -> bool:
        """Tell whether no position was asked for."""
        return self.indices == [] or (self.mask is not None and not bool(self.mask.any()))

    def __repr__(self) -> str:
        if self.indices is not None:
            return str(self.indices[0] if len(self.indices) == 1 else self.indices)
        if self.slice is not None:
            return str(self.slice)
        return "all" if self.mask is None else f"a mask of {int(self.mask.sum())} positions"

    def absolute(self, call: SnapCall) -> list[int] | None:
        """Return the indices asked for, counted from the start of the sequence; None where they were not given one by one."""
        if self.indices is None:
            return None
        length, clock = call.chosen.shape[1], call.clock
        prompt = clock.prompt_length
        growing = clock.generating or clock.offset > 0
        result = []
        for index in self.indices:
            place = index if index >= 0 else prompt + index
            if place < 0 or (not growing and place >= length):
                what = f"the prompt has {prompt}" if growing else f"the sequence has {length}"
                count = prompt if growing else length
                raise PositionError(
                    f"{call.site}: position {index} was asked for, but {what} positions. Give 0 to {count - 1}, or -{count} to -1."
                )
            result.append(place)
        return result

    def rows(self, call: SnapCall) -> Bool[Tensor, "#batch pos"]:
        """Return which rows of this pass are meant."""
        batch, length = call.chosen.shape[:2]
        clock, device = call.clock, call.chosen.device
        here = torch.arange(clock.offset, clock.offset + length, device=device)
        growing = clock.generating or clock.offset > 0
        if self.mask is not None:
            rows = self._rows_of_mask(self.mask.to(device), call, here, growing)
        elif self.slice is not None:
            start, stop, step = (
                part if part is None or part >= 0 else max(0, clock.prompt_length + part)
                for part in (self.slice.start, self.slice.stop, self.slice.step)
            )
            start, step = start or 0, step or 1
            rows = (here >= start) & ((here - start) % step == 0)
            if stop is not None:
                rows &= here < stop
        elif self.indices is not None:
            wanted = torch.tensor(self.absolute(call), device=device, dtype=torch.long)
            rows = torch.isin(here, wanted)
        else:
            rows = torch.ones_like(here, dtype=torch.bool)
        if self.prompt_only:
            rows = rows & (here < clock.prompt_length)
        if self.generated_only:
            rows = rows & (here >= clock.prompt_length)
        return rows.expand(batch, length) if rows.ndim == 2 else rows.unsqueeze(0)

    def _rows_of_mask(self, mask: Tensor, call: SnapCall, here: Tensor, growing: bool) -> Tensor:
        batch = call.chosen.shape[0]
        length = call.clock.prompt_length if growing else call.chosen.shape[1]
        if mask.shape[-1] != length or (mask.ndim == 2 and mask.shape[0] not in (1, batch)):
            raise PositionError(
                f"{call.site}: a mask of shape {tuple(mask.shape)} was given for {batch} x {length} positions. Give [{length}] or "
                f"[{batch}, {length}]."
            )
        inside = here < length
        return mask[..., here.clamp(max=length - 1)] & inside
