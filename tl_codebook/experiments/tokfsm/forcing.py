"""Forcing a state by its codes: does the model go on as if it had read another state than it did?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_codebook.attachment import match_sites
from tl_codebook.attachment import sites as codebook_sites
from tl_codebook.errors import ConfigError, DataError, ShapeError
from tl_codebook.experiments.tokfsm.bayes import bayes_predictions
from tl_codebook.experiments.tokfsm.forced_codes import hooks_at, hooks_while_reading, state_hooks
from tl_codebook.experiments.tokfsm.machine import TokFSM, check_range
from tl_codebook.experiments.tokfsm.text_of_model import (
    Hook,
    HooksOfRows,
    check_fits,
    check_prefixes,
    last_probabilities,
    next_state_probabilities,
)
from tl_codebook.experiments.tokfsm.tokens import write_tokens
from tl_codebook.experiments.tokfsm.validity import successor_match
from tl_codebook.names import Address, split_hook_name

__all__ = ["ForcingFigures", "force_states", "jensen_shannon", "site_sets", "state_forcing"]

_MLP, _ATTENTION = ("mlp_out", "post"), ("z", "attn_out", "q", "k", "v", "qkv")


class ForcingFigures(NamedTuple):
    """How near a model comes to a target state, mean over rows; nats, and shares of what it is with nothing forced (1, by definition)."""

    jsd_machine: float
    """Jensen-Shannon divergence from the machine's distribution of the digit after the target."""
    normalised_machine: float
    jsd_model: float
    """The same from the model's own distribution where the text has the target instead of the state it has."""
    normalised_model: float
    successor_share: float | None
    """Share of the target's successors among the equally many next states that are most probable (`successor_match`), 0 to 1; None where
    it was not measured."""
    successor_exact: float | None
    """Share of rows in which these are all of them, 0 to 1."""
    n_rows: int


def jensen_shannon(p: Float[Tensor, "*lead outcome"], q: Float[Tensor, "..."]) -> Float[Tensor, "*lead"]:
    """Return the Jensen-Shannon divergence of two distributions in nats, 0 (the same) to log 2 (nothing in common), in float64.

    Raises:
        DataError: numbers that are no probabilities (negative, or with another sum than 1).
        ShapeError: tensors of two shapes.

    Source: Lin 1991, section IV.

    >>> jensen_shannon(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([[0.0, 1.0], [0.5, 0.5]])).tolist()
    [0.693..., 0.0]
    """
    if p.shape != q.shape:
        raise ShapeError(f"distributions {list(p.shape)} and {list(q.shape)} were given. Give one of each for the same outcomes.")
    p, q = p.double(), q.double()
    for each in (p, q):
        if not bool((each >= 0).all() and ((each.sum(-1) - 1).abs() < 1e-4).all()):
            raise DataError("a distribution with negative numbers, or another sum than 1, was given. Give probabilities, not logits.")
    m = (p + q) / 2
    # p log p - p log m rather than p log(p / m), which is not a number where neither has an outcome.
    terms = torch.xlogy(p, p) - torch.xlogy(p, m) + torch.xlogy(q, q) - torch.xlogy(q, m)
    return (terms.sum(-1) / 2).clamp(0, math.log(2))


def _resolve(model: Any, machine: TokFSM, codes: Mapping[str, Tensor], names: str | Iterable[str] | None) -> list[str]:
    """Return the hook names of sites of which there are codes."""
    chosen = [point.site for point in match_sites(model, list(codes) if names is None else names)]
    missing = [name for name in chosen if name not in codes]
    if missing:
        raise DataError(f"the codes of {missing[0]!r} were asked for, but those given are of {', '.join(codes)}. Give its codes too.")
    if not chosen:
        raise ConfigError("no site was given, at which nothing would be forced. Give one or more.")
    for name in chosen:
        if codes[name].shape[0] != machine.n_states:
            raise ShapeError(
                f"codes {list(codes[name].shape)} were given for {name!r}, but the machine has {machine.n_states} states. "
                f"Give [state ...] over all of them (state_codes)."
            )
    return chosen


def force_states(
    model: Any,
    machine: TokFSM,
    codes: Mapping[str, Int[Tensor, "_ *group k"]],
    prefixes: Int[Tensor, "row pos"],
    targets: Int[Tensor, " _"],
    names: str | Iterable[str] | None = None,
    *,
    batch_size: int = 100,
) -> Float[Tensor, "row vocabulary"]:
    """Return the distribution of the next token, with the codes of a target state forced at the last digit of each row.

    Args:
        model: A host with codebooks.
        machine: The machine.
        codes: Ids of each state by hook name (`state_codes`).
        prefixes: Rows of BOS and the digits of complete states.
        targets: The state to force in each row.
        names: Where: hook names, addresses or sites; wherever there are codes by default.
        batch_size: Rows run at a time, >= 1.

    Returns:
        Float64 probabilities.

    Raises:
        ConfigError: a batch of no row, no site, or a model of another vocabulary or a shorter context.
        DataError: rows that do not end in a complete state, targets that are no state, or a site without codes.
        ShapeError: another number of targets than of rows, or codes that do not fit the machine or the site.
        UnknownHookError: a name at which no codebook sits.

    Source: Tamkin et al. 2023, section 3 (interventions on the codes of a state).
    """
    check_prefixes(machine, prefixes)
    machine.check_states(targets)
    if targets.shape != prefixes.shape[:1]:
        raise ShapeError(f"targets {list(targets.shape)} were given for {len(prefixes)} rows. Give one state for each row.")
    chosen = _resolve(model, machine, codes, names)
    hooks = state_hooks(codes, targets.cpu().long(), chosen, prefixes.shape[1] - 1)
    return last_probabilities(model, machine, prefixes, batch_size, hooks)


def site_sets(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the sets of sites to force at: each alone, all of the MLPs, all of the attention, and all there are.

    >>> for label, names in site_sets(["blocks.0.attn.hook_z", "blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"]).items():
    ...     print(label, len(names))
    L0.z 1
    L0.mlp_out 1
    L1.mlp_out 1
    all MLP 2
    all attention 1
    all 3
    """
    every = list(names)
    kinds = {name: split_hook_name(name)[1] for name in every}
    sets = {str(Address(None, name)): [name] for name in every}
    for label, kind in (("all MLP", _MLP), ("all attention", _ATTENTION)):
        members = [name for name in every if kinds[name] in kind]
        sets |= {label: members} if members else {}
    return sets | {"all": every}


def _rollouts(machine: TokFSM, targets: Int[Tensor, " row"], n_states: int, generator: torch.Generator) -> Int[Tensor, "row state"]:
    """Sample rollouts that do not end in the target of their row."""
    states = machine.sample(len(targets), n_states, generator)
    for _ in range(1000):
        same = states[:, -1] == targets
        if not bool(same.any()):
            return states
        states[same] = machine.sample(int(same.sum()), n_states, generator)
    raise DataError(
        f"rollouts of {n_states} states of this machine end (nearly) always in state {int(targets[same][0])}, so that no other could be "
        f"replaced by it. Give another prefix_states, or a machine that goes on to several states."
    )


def state_forcing(
    model: Any,
    machine: TokFSM,
    codes: Mapping[str, Int[Tensor, "_ *group k"]],
    *,
    n_prefixes_per_state: int = 10,
    prefix_states: int = 62,
    seed: int,
    sites: Mapping[str, Sequence[str]] | None = None,
    controls: Sequence[str] | None = None,
    n_successor_prefixes: int = 1,
    while_reading: Sequence[Mapping[str, Int[Tensor, "_ number *group k"]]] = (),
    batch_size: int = 100,
) -> dict[str, ForcingFigures]:
    """Force each state, where the text has another one, and measure how near the model's next digit comes to what it is after the target.

    Each row is a rollout of the machine, of ``prefix_states + 1`` states; at the last digit of the last one, which is not the target, the
    codes of the target are forced. A transition to the target need not be one that the machine makes.

    Args:
        model: A host with codebooks.
        machine: The machine.
        codes: Ids of each state by hook name (`state_codes`).
        n_prefixes_per_state: Rows for each target, >= 1.
        prefix_states: States before the one that is replaced, >= 0.
        seed: Of the rollouts and the controls.
        sites: Sets of sites to force at, by label; by default those of `site_sets`.
        controls: Labels of the sets for which the controls and the match of successors are measured; by default "all MLP" and "all".
        n_successor_prefixes: Rows for each target in which the successors are looked at, 0 (none) to `n_prefixes_per_state`; each costs up
            to ``base ** (n_digits - 1)`` passes more than the divergence does. The match is that of single rows, not of their mean.
        while_reading: What is forced at the digits of the next state, where its successors are looked at (`codes_while_reading`): a model
            may read the last state from the text again there. Nothing by default.
        batch_size: Rows run at a time, >= 1.

    Returns:
        Figures by label: "none" (nothing forced), the sets, and for the controls "<label>, wrong" (the codes of a random other state than
        the target) and "<label>, random" (random codes). Normalised figures are NaN where those of "none" are 0.

    Raises:
        ConfigError: numbers or labels out of range, or a model of another vocabulary or a shorter context.
        DataError: a machine of one state, one whose rollouts all end in one state, or a site without codes.
        ShapeError: codes that do not fit the machine or the site.
        UnknownHookError: a name at which no codebook sits.

    Source: Tamkin et al. 2023, section 3 (normalised Jensen-Shannon divergence after replacing the codes of a state).
    """
    check_range("n_prefixes_per_state", n_prefixes_per_state, 1, None, "nothing would be measured")
    check_range("prefix_states", prefix_states, 0, None, "it is a number of states")
    if not 0 <= n_successor_prefixes <= n_prefixes_per_state:
        raise ConfigError(
            f"n_successor_prefixes={n_successor_prefixes} was asked for, but there are {n_prefixes_per_state} rows for each target. "
            f"Give 0 to {n_prefixes_per_state}."
        )
    if machine.n_states < 2:
        raise DataError("a machine of one state was given, which no other state could replace. Give one of two states or more.")
    every = _resolve(model, machine, codes, None)
    sets = {label: _resolve(model, machine, codes, names) for label, names in (site_sets(every) if sites is None else sites).items()}
    controls = [label for label in ("all MLP", "all") if label in sets] if controls is None else list(controls)
    unknown = [label for label in controls if label not in sets]
    if unknown or "none" in sets:
        raise ConfigError(
            f"controls for {unknown[0]!r} were asked for, but the sets of sites are: {', '.join(sets)}. Give labels of these."
            if unknown
            else "a set of sites with the label 'none' was given, which is that of nothing forced. Choose another label."
        )
    n_digits = machine.n_digits
    last = (prefix_states + 1) * n_digits
    check_fits(model, machine, last + (n_digits if n_successor_prefixes else 1))

    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(machine.n_states).repeat_interleave(n_prefixes_per_state)
    n_rows = len(targets)
    states = _rollouts(machine, targets, prefix_states + 1, generator)
    others = (targets + torch.randint(1, machine.n_states, (n_rows,), generator=generator)) % machine.n_states
    points = codebook_sites(model)
    by_chance = {
        name: torch.randint(points[name].codebook.n_codes, (n_rows, *codes[name].shape[1:]), generator=generator) for name in every
    }
    rows = write_tokens(machine, states, keep_last=True)
    replaced = write_tokens(machine, torch.cat([states[:, :-1], targets[:, None]], dim=1), keep_last=True)
    each_state = write_tokens(machine, torch.arange(machine.n_states)[:, None], keep_last=True)
    of_machine = bayes_predictions(machine, each_state)[:, -1][targets]
    of_model = last_probabilities(model, machine, replaced, batch_size)
    looked_at = (torch.arange(n_rows) % n_prefixes_per_state < n_successor_prefixes).nonzero().flatten()

    def divergences(hooks: Sequence[Hook] | HooksOfRows) -> tuple[float, float]:
        said = last_probabilities(model, machine, rows, batch_size, hooks)
        return float(jensen_shannon(said, of_machine).mean()), float(jensen_shannon(said, of_model).mean())

    unforced = divergences(())

    def figures(raw: tuple[float, float], match: tuple[float | None, float | None] = (None, None)) -> ForcingFigures:
        shares = [value / base if base else math.nan for value, base in zip(raw, unforced, strict=True)]
        return ForcingFigures(raw[0], shares[0], raw[1], shares[1], *match, n_rows)

    def successors(names: Sequence[str]) -> tuple[float, float]:
        hooks = state_hooks(codes, targets[looked_at], names, last)
        later = hooks_while_reading(while_reading, targets[looked_at], names, last, machine.base)
        said = next_state_probabilities(model, machine, rows[looked_at], fwd_hooks=hooks, hooks_after=later, batch_size=batch_size)
        each = said.unflatten(0, (machine.n_states, n_successor_prefixes))
        match = torch.stack([successor_match(machine, each[:, prefix]) for prefix in range(n_successor_prefixes)])
        return float(match.mean()), float((match == 1).double().mean())

    result = {"none": figures(unforced)}
    for label, names in sets.items():
        match = successors(names) if label in controls and n_successor_prefixes else (None, None)
        result[label] = figures(divergences(state_hooks(codes, targets, names, last)), match)
        if label in controls:
            result[f"{label}, wrong"] = figures(divergences(state_hooks(codes, others, names, last)))
            result[f"{label}, random"] = figures(divergences(hooks_at({name: by_chance[name] for name in names}, last)))
    return result
