"""Activation patching of codes: which codes carry what makes one run differ from another."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_codebook.characters import escaped
from tl_codebook.errors import ConfigError, DataError, NonFiniteError, ShapeError, check_whole, nearest
from tl_codebook.graphs.edits import Edit, edited, edits_of, substitutes, wrong_codes
from tl_codebook.graphs.running import as_rows, codes_of, frequencies, points_of, same_slots
from tl_codebook.hosts import as_host
from tl_codebook.interventions import patch_codes
from tl_codebook.names import Code
from tl_codebook.steering import run_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["PatchEffects", "patch_effects"]

Metric = Callable[[Float[Tensor, "row pos vocabulary"]], Any]

_BY = ("site", "group", "position", "code")
"""What one patch may be; ``head`` is another word for ``group``."""


@dataclass(frozen=True, eq=False, repr=False)
class PatchEffects:
    """What a metric becomes when codes of one run are brought into another, for each place that was patched.

    Tensors are float64 and aligned with `axes`: the names along each of their axes.
    """

    by: str
    axes: tuple[tuple[str, ...], ...]
    """Names along each axis: addresses; for ``position`` addresses and positions; for ``code`` ``<code>@<position>``."""
    clean: float
    """The metric of the clean run, with nothing patched."""
    corrupt: float
    into_corrupt: Float[Tensor, "*place"]
    """The metric of the corrupt run with the clean codes brought in (denoising)."""
    into_clean: Float[Tensor, "*place"]
    """The metric of the clean run with the corrupt codes brought in (noising)."""
    n_changed: Int[Tensor, "*place"]
    """Slots in which the two runs differ there; where there is none, nothing was run and nothing changes."""
    random: Float[Tensor, "*place"] | None = None
    """Control: the metric of the corrupt run with, for each clean code, another one of (nearly) equal frequency."""
    wrong: Float[Tensor, "*place"] | None = None
    """Control: the metric of the corrupt run with codes of the clean run from other positions of the same row."""
    codes: tuple[Code, ...] = ()
    """With ``by="code"`` the clean codes, one for each name."""
    positions: tuple[int, ...] = ()
    """With ``by="code"`` the position of each, and with ``by="position"`` all of them."""
    words: tuple[str, ...] = ()
    """The tokens of the first clean prompt, for plots; none where the model has no tokenizer."""

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.into_corrupt.shape))
        lines = [f"PatchEffects by {self.by} ({shape}): the metric is {self.clean:.4g} clean, {self.corrupt:.4g} corrupt"]
        if self.clean != self.corrupt:
            lines += [f"  {name}: recovered {share:+.3f}" for name, share in self.top(5)]
        return "\n".join(lines)

    @property
    def recovered(self) -> Float[Tensor, "*place"]:
        """Return which share of the difference the clean codes bring back: 0 nothing, 1 all of it; below 0 and above 1 can be.

        Raises:
            DataError: the metric is the same in both runs.
        """
        return self.share(self.into_corrupt)

    @property
    def lost(self) -> Float[Tensor, "*place"]:
        """Return which share of the difference the corrupt codes destroy: 0 nothing, 1 all of it.

        Raises:
            DataError: the metric is the same in both runs.
        """
        return 1.0 - self.share(self.into_clean)

    def share(self, values: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """Return where values of the metric lie between the corrupt run (0) and the clean one (1).

        Raises:
            DataError: the metric is the same in both runs.
        """
        if self.clean == self.corrupt:
            raise DataError(
                f"a share of the difference was asked for, but the metric is {self.clean:g} in both runs. Look at into_corrupt and "
                "into_clean, or give prompts or a metric that differ."
            )
        return (values - self.corrupt) / (self.clean - self.corrupt)

    def top(self, n: int = 10, what: str = "recovered") -> list[tuple[str, float]]:
        """Return the `n` places with the largest values of `recovered`, `lost`, ... by size, each with its names and value."""
        check_whole("n", n, least=1)
        values = self.values(what)
        order = values.abs().flatten().argsort(descending=True, stable=True)[:n].tolist()
        spots = [torch.unravel_index(torch.tensor(index), values.shape) for index in order]
        names = ["@".join(axis[int(i)] for axis, i in zip(self.axes, spot, strict=True)) for spot in spots]
        return [(name, float(values.flatten()[index])) for name, index in zip(names, order, strict=True)]

    def values(self, what: str) -> Float[Tensor, "*place"]:
        """Return ``recovered``, ``lost``, ``into_corrupt``, ``into_clean``, or the controls as shares, ``random`` and ``wrong``.

        Raises:
            ConfigError: no such values, or controls that were not run.
        """
        known = ("recovered", "lost", "into_corrupt", "into_clean", "random", "wrong")
        if what not in known:
            raise ConfigError(f"values {what!r} were asked for. {nearest(str(what), known)}Give one of {', '.join(known)}.")
        if what in ("random", "wrong"):
            control = getattr(self, what)
            if control is None:
                raise ConfigError(f"the control {what!r} was asked for, but none was run. Call patch_effects(..., controls=True).")
            return self.share(control)
        found: Tensor = getattr(self, what)
        return found

    def plot(self, what: str = "recovered", *, ax: Axes | None = None, n: int = 30) -> Axes:
        """Draw the map with matplotlib, and return its axes: sites by positions as an image, else bars, those of the `n` largest.

        Raises:
            ConfigError: no such values, or matplotlib is not installed.
        """
        from tl_codebook.graphs.plots import plot_effects

        return plot_effects(self, what, ax, n)


def patch_effects(
    model: Any,
    clean: Any,
    corrupt: Any,
    metric: Metric,
    *,
    by: str = "site",
    sites: str | Iterable[str] | None = None,
    controls: bool = False,
    store: Any = None,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> PatchEffects:
    """Bring codes of the clean run into the corrupt one, and the reverse, a place at a time, and measure what that does.

    Patches run as rows of one batched forward pass, each row with its own. The codes of the other run are those it has with nothing
    patched. Places at which the two runs have the same codes are not run: the metric stays as it is.

    Nothing is padded or masked out: every position of a row is text, a padding token too, and the positions of the two prompts stand for
    each other one by one. Give prompts of one length in tokens.

    Args:
        model: A host with codebooks.
        clean, corrupt: Prompts without padding, tokens [row pos] or text, of one shape: position i of the one stands for position i of
            the other.
        metric: From logits [row pos vocabulary] of all rows to one number, such as a mean logit difference.
        by: What one patch is. ``site``: a whole codebook, at every position. ``group`` or ``head``: one group of it. ``position``: a
            codebook at one position. ``code``: one code at one position, in the rows where the clean run has it and the corrupt one does
            not; the codes in which two runs differ at a place are matched in the order of their slots (greedy pursuit may choose a code
            twice: so often it is there), and into the clean run goes the match of the code, in its place (a code without a match is left
            out).
        sites: Hook names, addresses (``L3.mlp_out``) or sites (``z``) to patch, whole codebooks; all of them by default.
        controls: Run the controls `random` and `wrong` of `PatchEffects` too, which doubles the work.
        store: A `CodeStore` that says how frequent codes are; by default the two runs themselves do, which is little text.
        batch_size: Rows of one pass, >= 1.
        seed: Of the control.
        progress: Show a progress bar.

    Returns:
        The metric for each place, both ways.

    Raises:
        ShapeError: prompts of different shapes, or a metric that gives more than one number.
        NonFiniteError: a metric that gives NaN or infinity.
        ConfigError: another `by`, a model without codebooks, an address with a group in `sites`, or a batch of no row.
        DataError: prompts with which the runs have the same codes at all of these sites (``by="code"``), or bad tokens.
        UnknownHookError: a name at which no codebook sits.

    Source: Tamkin et al. 2023, section 4 (interventions on codes); Zhang and Nanda 2024, section 2 (both directions, and the shares).

    >>> from tl_codebook import attach
    >>> _ = attach(model, ["z", "mlp_out"], n_codes=16, k=2)
    >>> clean, corrupt = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 2, 9, 4]])
    >>> effects = patch_effects(model, clean, corrupt, lambda logits: logits[:, -1, 5].mean(), by="position", progress=False)
    >>> effects.into_corrupt.shape, effects.axes[0][:2], effects.axes[1]
    (torch.Size([4, 4]), ('L0.z', 'L0.mlp_out'), ('0', '1', '2', '3'))
    """
    by = "group" if by == "head" else by
    if by not in _BY:
        raise ConfigError(f"by={by!r} was asked for. {nearest(str(by), _BY)}Give one of {', '.join(_BY)}.")
    if not callable(metric):
        raise ConfigError(f"metric is a {type(metric).__name__}. Give a function from logits [row pos vocabulary] to one number.")
    check_whole("batch_size", batch_size, least=1)
    host = as_host(model)
    points = points_of(host, sites)
    prompts = {"clean": as_rows(host, clean, "clean"), "corrupt": as_rows(host, corrupt, "corrupt")}
    if prompts["clean"].shape != prompts["corrupt"].shape:
        raise ShapeError(
            f"clean is {list(prompts['clean'].shape)} and corrupt {list(prompts['corrupt'].shape)} tokens. Give prompts of one shape, so "
            "that each position of the one stands for that of the other."
        )
    measured, ids = {}, {}
    for kind, tokens in prompts.items():
        logits, ids[kind] = codes_of(host, tokens, points, batch_size)
        measured[kind] = _number(metric, torch.cat(logits), f"the {kind} run")
    for point in points:
        pair = same_slots([ids[kind][point.site] for kind in prompts], point)
        ids["clean"][point.site], ids["corrupt"][point.site] = pair

    edits, axes = edits_of(by, points, ids["clean"], ids["corrupt"])
    ways = {"into_corrupt": ("corrupt", "clean"), "into_clean": ("clean", "corrupt")}
    if controls:
        generator = torch.Generator().manual_seed(seed)
        counts = frequencies(store, points, [ids["clean"], ids["corrupt"]])
        ids["random"] = {name: substitutes(each, counts[name], generator) for name, each in ids["clean"].items()}
        ids["wrong"] = {name: wrong_codes(each, ids["corrupt"][name], ids["random"][name]) for name, each in ids["clean"].items()}
        ways |= {"random": ("corrupt", "random"), "wrong": ("corrupt", "wrong")}
    values = {way: torch.full((len(edits),), measured[base], dtype=torch.float64) for way, (base, _) in ways.items()}
    n_changed = torch.tensor([_n_changed(edit, ids) for edit in edits], dtype=torch.long)
    jobs = [(index, way) for index in n_changed.nonzero().flatten().tolist() for way in ways]
    n_rows = len(prompts["clean"])
    step = max(1, batch_size // n_rows)
    with tqdm(total=len(jobs), desc=f"patches by {by}", unit="patch", disable=not progress) as bar:
        for first in range(0, len(jobs), step):
            some = jobs[first : first + step]
            patches = [_patch(edits[index], *ways[way], prompts, ids) for index, way in some]
            for (index, way), logits in zip(some, _run(host, patches, batch_size).split(n_rows), strict=True):
                values[way][index] = _number(metric, logits, f"the {ways[way][0]} run with {edits[index]} patched")
            bar.update(len(some))
    shape = tuple(map(len, axes))
    positions = tuple(edit.pos for edit in edits) if by == "code" else tuple(range(prompts["clean"].shape[1])) if by == "position" else ()
    return PatchEffects(
        by=by,
        axes=axes,
        clean=measured["clean"],
        corrupt=measured["corrupt"],
        n_changed=n_changed.reshape(shape),
        codes=tuple(edit.code for edit in edits if edit.code is not None),
        positions=tuple(pos for pos in positions if pos is not None),
        words=_words(host, prompts["clean"][0]),
        **{way: each.reshape(shape) for way, each in values.items()},
    )


def _words(host: Any, row: Int[Tensor, " pos"]) -> tuple[str, ...]:
    tokenizer = getattr(host, "tokenizer", None)
    return () if tokenizer is None else tuple(escaped(str(tokenizer.decode([token]))) for token in row.tolist())


def _number(metric: Metric, logits: Tensor, run: str) -> float:
    found = metric(logits)
    value = found.detach() if isinstance(found, Tensor) else torch.as_tensor(found)
    if value.ndim or value.is_complex():
        raise ShapeError(f"the metric gave {value.dtype} {list(value.shape)} for {run}. Return one number, such as `.mean()` over rows.")
    number = float(value)
    if not math.isfinite(number):
        raise NonFiniteError(f"the metric gave {number} for {run}. Return a finite number; look at the logits that it was given.")
    return number


class _Patched(NamedTuple):
    """The rows of one patch: their tokens, and the ids of one codebook with the patch in them."""

    edit: Edit
    tokens: Int[Tensor, "row pos"]
    ids: Int[Tensor, "row pos group slot"]


def _n_changed(edit: Edit, ids: Mapping[str, Mapping[str, Tensor]]) -> int:
    corrupt = ids["corrupt"][edit.name]
    return int((edited(edit, corrupt, ids["clean"][edit.name]) != corrupt).sum())


def _patch(edit: Edit, base: str, other: str, prompts: Mapping[str, Tensor], ids: Mapping[str, Mapping[str, Tensor]]) -> _Patched:
    return _Patched(edit, prompts[base], edited(edit, ids[base][edit.name], ids[other][edit.name], reverse=base == "clean"))


def _run(model: Any, patches: Sequence[_Patched], batch_size: int) -> Float[Tensor, "row pos vocabulary"]:
    """Return the logits of the rows of several patches, one after the other."""
    tokens = torch.cat([patch.tokens for patch in patches])
    sources: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    for number, patch in enumerate(patches):
        name, n_rows = patch.edit.name, len(patch.tokens)
        mine = slice(number * n_rows, (number + 1) * n_rows)
        sources.setdefault(name, patch.ids.new_zeros(len(tokens), *patch.ids.shape[1:]))[mine] = patch.ids
        where = masks.setdefault(name, torch.zeros(tokens.shape, dtype=torch.bool))
        where[mine] = True if patch.edit.pos is None else torch.arange(tokens.shape[1]) == patch.edit.pos
    logits = []
    for first in range(0, len(tokens), batch_size):
        rows = slice(first, first + batch_size)
        hooks = [patch_codes(sources[name][rows], name, pos=where[rows]) for name, where in masks.items() if bool(where[rows].any())]
        logits.append(run_rows(model, tokens[rows], hooks))
    return torch.cat(logits)
