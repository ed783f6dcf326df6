"""Exact edges: how often forcing one code makes another appear."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_codebook.errors import ConfigError, DataError, InvalidCodeError, PositionError, ShapeError, check_whole
from tl_codebook.graphs.order import fires_before, in_order
from tl_codebook.graphs.running import as_rows, codes_of, count_ids, equally_frequent, points_of, recording
from tl_codebook.hosts import as_host
from tl_codebook.interventions import force_code
from tl_codebook.names import Code, CodeLike, as_code
from tl_codebook.points import CodebookPoint
from tl_codebook.steering import run_rows

if TYPE_CHECKING:
    import networkx

__all__ = ["FlipRate", "FlipRates", "flip_rate"]

Codes = CodeLike | Iterable[CodeLike]
Slot = int | Literal["all", "append"]


class FlipRate(NamedTuple):
    """What forcing one code does to another. Rates are shares of rows, 0 to 1; NaN where there is no row."""

    cause: Code
    effect: Code
    before: float
    """Rows in which the effect is there with nothing forced."""
    after: float
    """Rows in which it is there with the cause forced."""
    difference: float
    """`after` less `before`."""
    flipped: float
    """Of the rows in which the effect was absent before, those in which it is there afterwards."""
    n_rows: int
    """Rows in which the cause was forced, one position in each."""
    n_absent: int
    """Rows in which the effect was absent before."""
    random_cause: float
    """Control: `flipped` when a random code of equal frequency is forced instead of the cause."""
    wrong_effect: float
    """Control: `flipped` of wrong codes, those of equal frequency in the effect's place: the mean over them."""


@dataclass(frozen=True, eq=False, repr=False)
class FlipRates:
    """What forcing codes does to others: the fields of `FlipRate` as tensors [cause effect]. ``rates[cause, effect]`` is one of them."""

    causes: tuple[Code, ...]
    effects: tuple[Code, ...]
    before: Float[Tensor, "cause effect"]
    after: Float[Tensor, "cause effect"]
    flipped: Float[Tensor, "cause effect"]
    n_rows: Int[Tensor, "cause effect"]
    n_absent: Int[Tensor, "cause effect"]
    random_cause: Float[Tensor, "cause effect"]
    wrong_effect: Float[Tensor, "cause effect"]
    lag: int

    def __repr__(self) -> str:
        lines = [f"FlipRates of {len(self.causes)} causes and {len(self.effects)} effects, lag {self.lag}"]
        for row in sorted(self.rows(), key=lambda row: -row.flipped if row.flipped == row.flipped else 1.0)[:10]:
            controls = f"random cause {row.random_cause:.2f}, wrong effect {row.wrong_effect:.2f}"
            lines.append(f"  {row.cause} -> {row.effect}: flipped {row.flipped:.2f} of {row.n_absent} ({controls})")
        return "\n".join([*lines, "  ..."] if len(self.causes) * len(self.effects) > 10 else lines)

    @property
    def difference(self) -> Float[Tensor, "cause effect"]:
        """Return `after` less `before`."""
        return self.after - self.before

    def __getitem__(self, pair: tuple[CodeLike, CodeLike]) -> FlipRate:
        """Return what one cause does to one effect.

        Raises:
            InvalidCodeError: a code that is not among the causes, or the effects.
        """
        place = []
        for code, known, what in zip(map(as_code, pair), (self.causes, self.effects), ("cause", "effect"), strict=True):
            if code not in known:
                raise InvalidCodeError(f"{code} is no {what} here. There are: {', '.join(map(str, known))}.")
            place.append(known.index(code))
        i, j = place
        names = ("before", "after", "difference", "flipped", "n_rows", "n_absent", "random_cause", "wrong_effect")
        return FlipRate(self.causes[i], self.effects[j], **{name: getattr(self, name)[i, j].item() for name in names})

    def rows(self) -> list[FlipRate]:
        """Return all of them, cause by cause."""
        return [self[cause, effect] for cause in self.causes for effect in self.effects]

    def graph(self, least: int | float = 0.0) -> networkx.DiGraph:
        """Return a graph with an edge from each cause to each effect whose `flipped` is above `least` and above both controls.

        Nodes are `Code`; the ``weight`` of an edge is `flipped`, its other attributes the rest of `FlipRate`. Controls that were not run
        hold nothing back.

        Args:
            least: What `flipped` has to pass, 0 to 1.

        Raises:
            ConfigError: a site whose place in a pass is not known.
        """
        import networkx as nx

        names = in_order({code.hook_name for code in (*self.causes, *self.effects)})
        graph = nx.DiGraph(kind="flips", lag=self.lag, sites=names)
        for row in self.rows():
            controls = [control for control in (row.random_cause, row.wrong_effect) if control == control]
            if row.flipped > max([least, *controls]):
                own = {key: value for key, value in row._asdict().items() if key not in ("cause", "effect") and value == value}
                graph.add_edge(row.cause, row.effect, weight=row.flipped, **own)
        return graph


def flip_rate(
    model: Any,
    tokens: Any,
    cause: Codes,
    effect: Codes,
    *,
    lag: int = 0,
    pos: int | Sequence[int] | Bool[Tensor, "..."] | None = None,
    slot: Slot = -1,
    n_rows: int | None = 256,
    controls: bool = True,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> FlipRates:
    """Return how often forcing a code makes another appear, for each cause and each effect.

    A row is a sequence and one position t of it at which the cause is absent with nothing forced. There, and nowhere else, the cause is
    forced (`force_code`); the effect is looked for at t + `lag`. `flipped` counts only the rows in which it was absent there before: of
    these, the share in which it is there afterwards. `before` and `after` are shares of all rows. Rows of one cause serve all effects, and
    many rows run as one batch.

    Controls, on the same rows: `random_cause`, where in each row another code of the cause's codebook (and group) is forced, drawn from the
    ten that are the nearest in frequency and, where there are such, absent there; and `wrong_effect`, with the cause forced, the mean of
    `flipped` over the ten codes that are the nearest to the effect in frequency in its codebook (and group). Frequencies are those in
    these tokens. That the cause makes the effect appear is said only by a `flipped` above both, and with few rows (`n_absent`) the
    difference may be chance: no test is made.

    Nothing is padded or masked out: every position of a row counts as text, and a padding token would be forced at, looked at and counted
    like any other. Give rows of one length in tokens.

    Args:
        model: A host with codebooks.
        tokens: Sequences without padding: tokens [row pos], a text, or texts of one length in tokens.
        cause, effect: Codes or labels, or lists of them. Each effect sits at a site after that of each cause.
        lag: Positions from the cause to the effect, >= 0.
        pos: Positions at which a cause may be forced: None (all), an int, a list of ints (negative from the end) or a bool mask [pos] or
            [row pos], such as one without BOS.
        slot: Which slot the cause takes, as in `force_code`.
        n_rows: Draw at most so many rows for each cause, >= 1; None takes all.
        controls: Run the controls, which doubles the work; without them they are NaN.
        batch_size: Rows of one pass, >= 1.
        seed: Of the rows and the controls.
        progress: Show a progress bar.

    Raises:
        LabelError, InvalidCodeError: a code that the model has not.
        UnknownHookError: a site without a codebook.
        ConfigError: an option out of range, or an effect whose site does not come after the cause's.
        DataError: bad tokens, no position so far from the end, or a cause that is at every position already.
        PositionError, ShapeError: positions that the sequences have not, or a mask of another shape.

    Source: Tamkin et al. 2023, section 4 (forcing codes); Pearl 2009, section 3.4 (do).

    >>> from tl_codebook import attach
    >>> _ = attach(model, "mlp_out", n_codes=16, k=2)
    >>> rates = flip_rate(model, torch.arange(24).reshape(2, 12), "L0.mlp_out:3", ["L1.mlp_out:5", "L1.mlp_out:6"], progress=False)
    >>> rates.flipped.shape, 0 <= rates["L0.mlp_out:3", "L1.mlp_out:5"].after <= 1
    (torch.Size([1, 2]), True)
    """
    check_whole("lag", lag, least=0)
    check_whole("batch_size", batch_size, least=1)
    if n_rows is not None:
        check_whole("n_rows", n_rows, least=1)
    host = as_host(model)
    causes, effects = _codes(cause, "cause"), _codes(effect, "effect")
    points = {point.site: point for point in points_of(host, [code.hook_name for code in (*causes, *effects)])}
    for code in (*causes, *effects):
        force_code(code)[1].check(points[code.hook_name].codebook)
    for a in causes:
        for b in effects:
            if not fires_before(a.hook_name, b.hook_name):
                raise ConfigError(f"forcing {a} was asked to change {b}, whose site does not come after it. Give effects of later sites.")
    rows = as_rows(host, tokens, "tokens")
    allowed = _allowed(pos, rows.shape)
    if lag >= rows.shape[1]:
        raise DataError(f"lag={lag} was asked for, but the sequences have {rows.shape[1]} positions. Give longer ones or a smaller lag.")
    allowed[:, rows.shape[1] - lag :] = False
    if not bool(allowed.any()):
        raise DataError(
            f"no position was left at which to force anything: pos={pos!r}, lag={lag}. Give other positions or longer sequences."
        )
    _, ids = codes_of(host, rows, list(points.values()), batch_size)
    counts = {name: count_ids(each, points[name].codebook.n_codes) for name, each in ids.items()}

    generator = torch.Generator().manual_seed(seed)
    trials: list[_Trials] = []
    for code in causes:
        there = _present(ids[code.hook_name], code.group or 0, torch.tensor([code.code])).squeeze(-1)
        spots = (allowed & ~there).nonzero()
        if not len(spots):
            raise DataError(f"{code} is at every position that was asked for already, so that forcing it changes nothing. Give other text.")
        if n_rows is not None and len(spots) > n_rows:
            spots = spots[torch.randperm(len(spots), generator=generator)[:n_rows].sort().values]
        trials.append(_Trials([code] * len(spots), spots))
        if controls:
            trials.append(_Trials(_random_codes(code, spots, ids[code.hook_name], counts[code.hook_name], generator), spots))
    wrong = {b: equally_frequent(counts[b.hook_name][b.group or 0], b.code, generator) for b in effects}
    looked_for = {b: torch.cat([torch.tensor([b.code]), wrong[b]]) for b in effects}
    found = _forced(host, rows, trials, points, looked_for, lag, slot, batch_size, progress)
    return _rates(causes, effects, trials, ids, looked_for, found, lag, controls)


class _Trials(NamedTuple):
    """Rows to run: in each one code is forced at one position."""

    codes: list[Code]
    spots: Int[Tensor, "trial 2"]
    """Sequence and position."""


def _codes(given: Codes, what: str) -> tuple[Code, ...]:
    one = isinstance(given, str) or hasattr(given, "code")  # a label, a Code, or a row about one
    codes = tuple(map(as_code, cast("Iterable[CodeLike]", [given] if one else given)))
    if not codes:
        raise InvalidCodeError(f"no {what} was given. Give one code or several, such as 'L3.mlp_out:417'.")
    twice = next((code for code in codes if codes.count(code) > 1), None)
    if twice is not None:
        raise InvalidCodeError(f"the {what} {twice} was given more than once. Give each code once.")
    return codes


def _allowed(pos: Any, shape: Sequence[int]) -> Bool[Tensor, "row pos"]:
    if pos is None:
        return torch.ones(*shape, dtype=torch.bool)
    if isinstance(pos, Tensor) and pos.dtype == torch.bool:
        if pos.ndim not in (1, 2) or pos.shape not in (shape, shape[1:]):
            raise ShapeError(f"a mask of shape {list(pos.shape)} was given. Give [{shape[1]}] or {list(shape)}.")
        return pos.cpu().expand(*shape).clone()
    allowed = torch.zeros(*shape, dtype=torch.bool)
    for index in pos if isinstance(pos, Sequence) else [pos]:
        if isinstance(index, bool) or not isinstance(index, int) or not -shape[1] <= index < shape[1]:
            raise PositionError(f"position {index!r} was asked for, but there are {shape[1]}. Give 0 to {shape[1] - 1}, or negative ones.")
        allowed[:, index] = True
    return allowed


def _present(ids: Int[Tensor, "*row group slot"], group: int, codes: Int[Tensor, " code"]) -> Bool[Tensor, "*row code"]:
    """Tell which codes are among those of a group."""
    return (ids[..., group, :, None] == codes).any(-2)


def _random_codes(
    code: Code, spots: Int[Tensor, "trial 2"], ids: Tensor, counts: Int[Tensor, "group code"], generator: torch.Generator
) -> list[Code]:
    """Draw for each row a code of equal frequency, one that is absent there where there is such."""
    group = code.group or 0
    others = equally_frequent(counts[group], code.code, generator)
    if not len(others):
        raise ConfigError(f"the codebook of {code} has no other code to compare it with. Say controls=False.")
    absent = ~_present(ids[spots[:, 0], spots[:, 1]], group, others)
    weights = torch.where(absent.any(-1, keepdim=True), absent, True).double()
    drawn = others[torch.multinomial(weights, 1, generator=generator).squeeze(-1)]
    return [Code(code.layer, code.site, code.group, number) for number in drawn.tolist()]


def _forced(
    model: Any,
    tokens: Int[Tensor, "row pos"],
    trials: Sequence[_Trials],
    points: Mapping[str, CodebookPoint],
    looked_for: Mapping[Code, Int[Tensor, " code"]],
    lag: int,
    slot: Slot,
    batch_size: int,
    progress: bool,
) -> dict[Code, Bool[Tensor, "trial code"]]:
    """Run all trials, and tell for each which of the codes looked for are there."""
    codes = [code for some in trials for code in some.codes]
    spots = torch.cat([some.spots for some in trials])
    noted = [point for name, point in points.items() if any(code.hook_name == name for code in looked_for)]
    found: dict[Code, list[Tensor]] = {code: [] for code in looked_for}
    with tqdm(total=len(codes), desc="forcing codes", unit="row", disable=not progress) as bar:
        for first in range(0, len(codes), batch_size):
            here, at = codes[first : first + batch_size], spots[first : first + batch_size]
            rows = torch.arange(len(here))
            masks: dict[Code, Tensor] = {}
            for row, code in enumerate(here):
                masks.setdefault(code, torch.zeros(len(here), tokens.shape[1], dtype=torch.bool))[row, at[row, 1]] = True
            notes, ids = recording(noted)
            run_rows(model, tokens[at[:, 0]], [*(force_code(code, pos=mask, slot=slot) for code, mask in masks.items()), *notes])
            for code, wanted in looked_for.items():
                found[code].append(_present(ids[code.hook_name][rows, at[:, 1] + lag], code.group or 0, wanted))
            bar.update(len(here))
    return {code: torch.cat(parts) for code, parts in found.items()}


def _rates(
    causes: tuple[Code, ...],
    effects: tuple[Code, ...],
    trials: Sequence[_Trials],
    ids: Mapping[str, Tensor],
    looked_for: Mapping[Code, Tensor],
    found: Mapping[Code, Tensor],
    lag: int,
    controls: bool,
) -> FlipRates:
    shape = (len(causes), len(effects))
    names = ("before", "after", "flipped", "random_cause", "wrong_effect")
    rates = {name: torch.full(shape, torch.nan, dtype=torch.float64) for name in names}
    numbers = {name: torch.zeros(shape, dtype=torch.long) for name in ("n_rows", "n_absent")}
    starts = [0]
    for some in trials:
        starts.append(starts[-1] + len(some.codes))
    for i in range(len(causes)):
        own = i * (1 + controls)
        spots = trials[own].spots
        for j, b in enumerate(effects):
            before = _present(ids[b.hook_name][spots[:, 0], spots[:, 1] + lag], b.group or 0, looked_for[b])
            after = found[b][starts[own] : starts[own + 1]]
            rates["before"][i, j], rates["after"][i, j] = before[:, 0].double().mean(), after[:, 0].double().mean()
            numbers["n_rows"][i, j], numbers["n_absent"][i, j] = len(spots), int((~before[:, 0]).sum())
            each = _appeared(before, after)
            rates["flipped"][i, j] = each[0]
            if controls:
                rates["random_cause"][i, j] = _appeared(before, found[b][starts[own + 1] : starts[own + 2]])[0]
                rates["wrong_effect"][i, j] = each[1:].nanmean()
    return FlipRates(causes, effects, **rates, **numbers, lag=lag)


def _appeared(before: Bool[Tensor, "trial code"], after: Bool[Tensor, "trial code"]) -> Float[Tensor, " code"]:
    """Return for each code the share of the rows without it before that have it afterwards; NaN where there is no such row."""
    return (after & ~before).sum(0).double() / (~before).sum(0)
