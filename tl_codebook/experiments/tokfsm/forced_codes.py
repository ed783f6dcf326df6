"""The codes of a state: which they are, and the hooks that put them where the text has another one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_codebook.attachment import match_sites
from tl_codebook.errors import DataError
from tl_codebook.experiments.tokfsm.machine import TokFSM
from tl_codebook.experiments.tokfsm.text_of_model import Hook, HooksAfterRows, HooksOfRows, collect_at
from tl_codebook.experiments.tokfsm.tokens import NO_STATE, read_states
from tl_codebook.interventions import patch_codes
from tl_codebook.names import codes_hook

__all__ = ["codes_while_reading", "state_codes"]


def state_codes(
    model: Any, machine: TokFSM, tokens: Int[Tensor, "sequence pos"], names: str | Iterable[str] | None = None, *, batch_size: int = 100
) -> dict[str, Int[Tensor, "state *group k"]]:
    """Return the codes that stand most often at the last digit of each state, per codebook and group, while rows of text run.

    With k > 1 it is the whole tuple of codes that is counted. Of equally frequent ones it is the lowest.

    Args:
        model: A host with codebooks.
        machine: The machine.
        tokens: Rows of its text, in which each state occurs.
        names: Hook names, addresses or sites; all codebooks by default.
        batch_size: Rows run at a time, >= 1.

    Returns:
        Ids by hook name: [state k], or [state group k] where a codebook has several groups.

    Raises:
        ConfigError: a batch of no row.
        DataError: rows that do not begin with BOS, or a state that never occurs.
        UnknownHookError: a name at which no codebook sits.

    Source: Tamkin et al. 2023, section 3 (the codes of a state).
    """
    states = read_states(machine, tokens)
    known = states != NO_STATE
    missing = (torch.bincount(states[known], minlength=machine.n_states) == 0).nonzero().flatten().tolist()
    if missing:
        raise DataError(
            f"states {missing[:5]} ({len(missing)} of {machine.n_states}) never occur in the text that was given, so that nothing is known "
            f"of their codes. Give more rows."
        )
    ids = _ids(model, tokens, names, batch_size)
    at = torch.arange(1, states.shape[1] + 1) * machine.n_digits
    return {name: _of_each(states[known], found[:, at][known], machine.n_states) for name, found in ids.items()}


def codes_while_reading(
    model: Any, machine: TokFSM, tokens: Int[Tensor, "sequence pos"], names: str | Iterable[str] | None = None, *, batch_size: int = 100
) -> list[dict[str, Int[Tensor, "state number *group k"]]]:
    """Return the codes that stand most often at each digit of a state but its last, for each state before it and the digits so far.

    Args:
        model: A host with codebooks.
        machine: The machine.
        tokens: Rows of its text.
        names: Hook names, addresses or sites; all codebooks by default.
        batch_size: Rows run at a time, >= 1.

    Returns:
        For each digit but the last, ids by hook name: [state number k], or [state number group k] where a codebook has several groups;
        the number is what the digits so far write, and its ids are -1 (no code) where it never follows the state. None for a machine of
        one-digit states.

    Raises:
        ConfigError: a batch of no row.
        DataError: rows that do not begin with BOS.
        UnknownHookError: a name at which no codebook sits.
    """
    states = read_states(machine, tokens)
    tokens, base = tokens.cpu().long(), machine.base
    ids = _ids(model, tokens, names, batch_size) if machine.n_digits > 1 else {}
    result = []
    number = torch.zeros_like(states)
    known = states != NO_STATE
    for digit in range(1, machine.n_digits):
        at = torch.arange(1, states.shape[1] + 1) * machine.n_digits + digit
        at = at[at < tokens.shape[1]]
        known, number = known[:, : len(at)], number[:, : len(at)]
        known = known & (tokens[:, at] < base)
        number = number * base + tokens[:, at]
        labels = (states[:, : len(at)] * base**digit + number)[known]
        of_each = {name: _of_each(labels, found[:, at][known], machine.n_states * base**digit) for name, found in ids.items()}
        result.append({name: codes.unflatten(0, (machine.n_states, base**digit)) for name, codes in of_each.items()})
    return result


def _ids(model: Any, tokens: Tensor, names: str | Iterable[str] | None, batch_size: int) -> dict[str, Int[Tensor, "sequence pos *group k"]]:
    hooks = {point.site: codes_hook(point.site) for point in match_sites(model, names)}
    return collect_at(model, tokens.cpu().long(), hooks, batch_size)


def _of_each(labels: Int[Tensor, " occurrence"], ids: Int[Tensor, "occurrence *group k"], n: int) -> Int[Tensor, "label *group k"]:
    """Return for each label, group by group, what `_most_frequent` does."""
    if ids.ndim == 2:
        return _most_frequent(labels, ids, n)
    return torch.stack([_most_frequent(labels, ids[:, group], n) for group in range(ids.shape[1])], dim=1)


def _most_frequent(labels: Int[Tensor, " occurrence"], ids: Int[Tensor, "occurrence k"], n: int) -> Int[Tensor, "label k"]:
    """Return the tuple of ids that each label, 0 to n - 1, has most often, the lowest of equals; -1 where it never occurs."""
    pairs, counts = torch.cat([labels[:, None], ids], dim=1).unique(dim=0, return_counts=True)  # in ascending order
    pairs = pairs[counts.argsort(descending=True, stable=True)]
    pairs = pairs[pairs[:, 0].argsort(stable=True)]
    first = torch.ones(len(pairs), dtype=torch.bool)
    first[1:] = pairs[1:, 0] != pairs[:-1, 0]
    result = torch.full((n, ids.shape[1]), -1)
    result[pairs[first, 0]] = pairs[first, 1:]
    return result


def hooks_at(forced: Mapping[str, Tensor], pos: int) -> HooksOfRows:
    """Return the hooks that put codes [row *group k] at one position, each row its own."""

    def hooks(rows: Tensor) -> list[Hook]:
        return [patch_codes(ids[rows][:, None], name, pos=pos, source_pos=0) for name, ids in forced.items()]

    return hooks


def state_hooks(codes: Mapping[str, Tensor], states: Int[Tensor, " row"], names: Iterable[str], pos: int) -> HooksOfRows:
    """Return the hooks that put the codes of a state at one position, each row those of its own state."""
    return hooks_at({name: codes[name].cpu()[states] for name in names}, pos)


def hooks_while_reading(
    codes: Sequence[Mapping[str, Tensor]], states: Int[Tensor, " row"], names: Iterable[str], pos: int, base: int
) -> HooksAfterRows:
    """Return the hooks that put, at the digits after a position, the codes of a state before them (`codes_while_reading`)."""
    chosen = list(names)

    def hooks(rows: Tensor, written: Tensor) -> list[Hook]:
        made: list[Hook] = []
        number = torch.zeros(len(rows), dtype=torch.long)
        for digit, table in enumerate(codes[: written.shape[1]]):
            number = number * base + written[:, digit]
            at = pos + 1 + digit
            made += [patch_codes(table[name][states[rows], number][:, None], name, pos=at, source_pos=0) for name in chosen]
        return made

    return hooks
