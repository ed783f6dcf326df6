"""The hook point that a codebook lives in.

`attach` turns an existing HookPoint into a `CodebookPoint` in place (``hook_point.__class__ = CodebookPoint``). On a Bridge one HookPoint
object is held by its parent, two registries, alias attributes and closures; adopting it keeps them all, replacing it would have to find
them.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from tl_codebook.codebook import Codebook
from tl_codebook.errors import AttachError, InvalidCodeError, ShapeError
from tl_codebook.hosts import PositionClock
from tl_codebook.names import CODES, INPUT

__all__ = ["CodebookPoint", "RelayPoint", "SnapCall", "current_call"]


@dataclass
class SnapCall:
    """One snap, as the hooks at `hook_codes` may ask about it while they run."""

    site: str
    codebook: Codebook
    y: Float[Tensor, "*lead group d_group"]
    """What the codes are chosen for (after the LayerNorm, if there is one)."""
    chosen: Int[Tensor, "*lead group k"]
    """The ids before any hook, and after those that chose again (`ban_code`)."""
    n_lead: int
    """Leading axes of the activation: 2 for [batch pos ...], 1 where a host flattens them."""
    clock: PositionClock
    disabled: Bool[Tensor, "batch pos group code"] | None = None
    """Codes that hooks of this snap have ruled out so far: a refill by the next hook must not bring them back."""


_local = threading.local()


def current_call() -> SnapCall | None:
    """Return the snap whose `hook_codes` is running in this thread."""
    return getattr(_local, "call", None)


class RelayPoint(HookPoint):
    """A hook point that serves one which TransformerLens does not have (`tl_codebook.made`).

    At `hook_resid_post` (where `delta` is set) the output becomes resid_pre + snap(resid_post - resid_pre);
    at `hook_resid_pre` (where `feeds` is set) the value is noted for it. At `hook_q`, `hook_k` and `hook_v` (where `joint` is set, to a
    hook point and a number) the value becomes a part of what their codebook says.
    """

    delta: CodebookPoint | None
    feeds: CodebookPoint | None
    joint: tuple[Any, int] | None

    ROLES = ("delta", "feeds", "joint")

    @property
    def serves(self) -> bool:
        """Tell whether another hook point needs this one."""
        return any(self.__dict__.get(role) is not None for role in self.ROLES)

    def stop_serving(self, point: Any) -> None:
        """Serve `point` no more, and be a plain HookPoint again where that was all."""
        for role in self.ROLES:
            served = self.__dict__.get(role)
            if (served[0] if isinstance(served, tuple) else served) is point:
                self.__dict__.pop(role, None)
        if type(self) is RelayPoint and not self.serves:
            self.__class__ = HookPoint  # type: ignore[assignment]

    def __call__(self, x: Tensor) -> Tensor:
        """Change the value as the point's role asks, then do what a HookPoint does."""
        out: Tensor = super().__call__(self._change(x))
        feeds = self.__dict__.get("feeds")
        if feeds is not None and feeds.enabled:
            feeds.__dict__["resid_pre"] = out
        return out

    def _change(self, x: Tensor) -> Tensor:
        joint = self.__dict__.get("joint")
        if joint is not None and joint[0].enabled:
            x = joint[0].part(joint[1], x)
        delta = self.__dict__.get("delta")
        if delta is None or not delta.enabled:
            return x
        resid_pre = delta.__dict__.pop("resid_pre", None)
        if resid_pre is None:
            raise AttachError(
                f"{delta.site}: the block ended without having started at its hook_resid_pre (start_at_layer?). Run whole blocks, or use "
                "bypassed(model, ['resid_delta'])."
            )
        return resid_pre + delta(x - resid_pre)

    def has_hooks(self, *args: Any, **kwargs: Any) -> bool:
        """Say yes: a Bridge skips some hook points when nothing hangs on them (Granite)."""
        return True


class _HeadName(str):
    """The name of a hook point whose tensors are [batch pos group slot].

    `run_with_cache(pos_slice=)` of a HookedTransformer finds the position axis by asking whether the name ends in hook_q, k, v or z.
    """

    __slots__ = ()

    def endswith(self, suffix: Any, *rest: Any) -> bool:
        return "hook_z" in (suffix if isinstance(suffix, tuple) else (suffix,)) or super().endswith(suffix, *rest)


class _HeadLayout:
    """The same for the Bridge of TransformerLens 3.9, which asks the conversion of the hook point; nothing is converted."""

    splits_attention_heads = True

    def convert(self, value: Any, *_: Any) -> Any:
        return value

    revert = convert


class GroupedCodesPoint(HookPoint):
    """The `hook_codes` of a grouped codebook."""

    def __init__(self) -> None:
        super().__init__()
        self.hook_conversion = _HeadLayout()  # type: ignore[assignment]

    @property
    def name(self) -> str | None:
        return self.__dict__.get("_name")

    @name.setter
    def name(self, name: str | None) -> None:
        self.__dict__["_name"] = None if name is None else _HeadName(name)


class CodebookPoint(RelayPoint):
    """A HookPoint with a codebook in front of it.

    The old name carries the snapped activation, in the model's own layout. ``<name>.hook_x`` carries what goes in, [batch pos d_in] or
    [batch pos group d_group]; ``<name>.hook_codes`` the int64 ids, [batch pos k] or [batch pos group k]: edit them and the output follows.

    Where the value biases of the model were folded since the codes were trained, `offset` is what z or v lost by it:
    snap(x) = decode(encode(x + offset)) - offset. `hook_x`, `hook_codes` and all that the codebook counts are in the codes' own basis, with
    the offset; the old name is in the model's.
    """

    site: str
    codebook: Codebook
    hook_x: HookPoint
    hook_codes: HookPoint
    enabled: bool
    clock: PositionClock
    n_snaps: int
    offset: Float[Tensor, "group d_group"] | None
    """What brings the model's activations into the basis of the codes; None where they are in it."""

    def adopt(self, site: str, codebook: Codebook, clock: PositionClock, offset: Float[Tensor, " d_in"] | None = None) -> None:
        """Take the codebook in; the class of the object has just been changed to this one."""
        self.site, self.enabled, self.n_snaps = site, True, 0
        with torch.inference_mode(False):
            self.offset = None if offset is None else offset.clone().to(codebook.codes.device, torch.float32).reshape(-1, codebook.d_group)
        self.__dict__["clock"] = clock
        codebook.label = site
        self.hook_x = HookPoint()
        self.hook_codes = GroupedCodesPoint() if codebook.n_groups > 1 else HookPoint()
        self.codebook = codebook

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        # Not a buffer: casting the model to bf16 must not round it, and no state_dict has room for it.
        offset = self.__dict__.get("offset")
        if offset is not None:
            self.offset = offset.to(fn(offset).device)
        return super()._apply(fn, *args, **kwargs)

    def __repr__(self) -> str:
        point, codebook = super().__repr__(), self._modules.get("codebook")
        if codebook is None:
            return point
        shift = "" if self.offset is None else f", with an offset of norm {float(self.offset.norm()):.3g} for folded value biases"
        return f"{point} holds {codebook!r}{shift}"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "resid_pre"}  # hangs on a graph: no copy of it

    def release(self) -> Codebook:
        """Give the codebook back and become what the object was before."""
        codebook = self.codebook
        codebook.label = ""
        for name in ("hook_x", "hook_codes", "codebook", "site", "enabled", "n_snaps", "offset", "clock"):
            delattr(self, name)
        self.__dict__.pop("resid_pre", None)
        self.__class__ = RelayPoint if self.serves else HookPoint  # type: ignore[assignment]
        return codebook

    # In __call__ (RelayPoint), not in forward(): a backward hook at the old name must bracket the identity alone, so that zeroing the
    # gradient there also zeroes that of the codes.
    def _change(self, x: Tensor) -> Tensor:
        x = super()._change(x)
        return self._snap(x) if self.enabled else x

    def has_hooks(self, *args: Any, **kwargs: Any) -> bool:
        """Say yes while the codebook is on, see `RelayPoint.has_hooks`."""
        return self.enabled or self.serves or HookPoint.has_hooks(self, *args, **kwargs)

    def in_basis(self, x: Float[Tensor, "*lead d_in"]) -> Float[Tensor, "*lead group d_group"]:
        """Split raw activations into groups and add the offset: what `hook_x` carries."""
        grouped = self.codebook.grouped(x)
        return grouped if self.offset is None else (grouped + self.offset).to(x.dtype)

    def _snap(self, x: Tensor) -> Tensor:
        book = self.codebook
        n_lead = min(2, x.ndim - 1)
        lead = x.shape[:n_lead]
        if n_lead < 1 or lead.numel() * book.d_in != x.numel():
            raise ShapeError(
                f"{self.site}: an activation of shape {tuple(x.shape)} does not fit the codebook, which takes [batch pos ...] with "
                f"{book.d_in} values a position ({book.n_groups} groups of {book.d_group}). Detach it, or undo what changed the shape."
            )
        plain = book.n_groups == 1
        grouped = self.in_basis(x.reshape(*lead, book.d_in))
        x_in = grouped.squeeze(-2) if plain else grouped
        seen = self.hook_x(x_in)
        if seen is not x_in and (
            not isinstance(seen, Tensor) or seen.shape != x_in.shape or seen.dtype != x_in.dtype or seen.device != x_in.device
        ):
            kind = f"{seen.dtype} {tuple(seen.shape)} on {seen.device}" if isinstance(seen, Tensor) else f"a {type(seen).__name__}"
            raise ShapeError(f"{self.site}.{INPUT}: a hook returned {kind}. Return {x_in.dtype} {tuple(x_in.shape)} on {x_in.device}.")
        y = book.normalise(seen.unsqueeze(-2) if plain else seen)
        hooked = bool(self.hook_codes.fwd_hooks)  # a plain list, so that Dynamo guards on it and sees hooks added after compiling
        q, chosen = (None, book.choose(y)) if hooked else book.snap(y)
        ids = chosen.squeeze(-2) if plain else chosen
        ids = self._edited(ids, SnapCall(self.site, book, y, chosen, n_lead, self.clock)) if hooked else self.hook_codes(ids)
        if not torch.compiler.is_compiling():  # Dynamo would guard on the number and compile again at every call
            self.n_snaps += 1
        out = book.emit(y, ids.unsqueeze(-2) if plain else ids, q)
        if self.offset is not None:
            out = out - self.offset
        return out.reshape(x.shape).to(x.dtype)

    def _edited(self, ids: Tensor, call: SnapCall) -> Tensor:
        outer = current_call()
        _local.call = call
        try:
            new = self.hook_codes(ids.clone())
        finally:
            _local.call = outer
        where, book = f"{self.site}.{CODES}", call.codebook
        shape = " ".join(map(str, ids.shape[:-1]))
        if not isinstance(new, Tensor) or new.is_floating_point() or new.is_complex() or new.dtype == torch.bool:
            kind = f"a {new.dtype} tensor" if isinstance(new, Tensor) else f"a {type(new).__name__}"
            raise InvalidCodeError(f"{where}: a hook returned {kind}. Return an integer tensor of shape [{shape} slots].")
        if new.shape[:-1] != ids.shape[:-1] or new.ndim != ids.ndim or new.shape[-1] < 1:
            raise InvalidCodeError(
                f"{where}: a hook returned ids of shape {tuple(new.shape)}. Return [{shape} slots], with at least one slot (-1 is an empty "
                "one)."
            )
        low, high = int(new.min()), int(new.max())
        if low < -2 or high >= book.n_codes:
            raise InvalidCodeError(
                f"{where}: a hook returned the id {high if high >= book.n_codes else low}, but there are {book.n_codes} codes. Return 0 to "
                f"{book.n_codes - 1}, or -1 for an empty slot."
            )
        return new.long()
