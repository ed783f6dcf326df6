"""How well single codes stand for concepts: precision, recall, decoding, purity, and codes per concept.

Everything is counted once, in a table of codes against labels, and read from there. A label is a concept that holds at a position: the
state whose last digit stands there, for example (`state_labels`). Choose codes on one half of the data, score them on the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_codebook.errors import ConfigError, DataError, ShapeError
from tl_codebook.experiments.tokfsm.automaton import check_values
from tl_codebook.experiments.tokfsm.machine import TokFSM, check_range
from tl_codebook.experiments.tokfsm.tokens import NO_STATE, read_states

__all__ = [
    "RECALLS",
    "ChosenCodes",
    "CodeTable",
    "ConceptSummary",
    "LabelScores",
    "Purity",
    "choose_codes",
    "code_table",
    "codes_per_concept",
    "decode_accuracy",
    "purity",
    "score_codes",
    "state_labels",
]


RECALLS = {"recall > 1 %": 0.01, "recall >= 95 %": 0.95 - 1e-9}
"""The paper's floor under the recall of a state code, and ours, by the names that figures have."""


class CodeTable(NamedTuple):
    """How often codes fire, labels hold, and both at once, in positions."""

    hits: Int[Tensor, "group code label"]
    activations: Int[Tensor, "group code"]
    """Over all counted positions, those without a label too."""
    occurrences: Int[Tensor, " label"]
    n_slots: int
    """Codes that fire together at a position (k); where it is 1, the codes of a group share a label's occurrences out."""

    def precision(self) -> Float[Tensor, "group code label"]:
        """Return the share of a code's activations at which the label holds; 0 for a code that never fires."""
        return self.hits / self.activations.clamp(min=1)[..., None].double()

    def recall(self) -> Float[Tensor, "group code label"]:
        """Return the share of a label's occurrences at which the code fires; 0 for a label that never holds."""
        return self.hits / self.occurrences.clamp(min=1).double()


class ChosenCodes(NamedTuple):
    """A code for each label, -1 in every number where none will do, with its figures on the data it was chosen on."""

    sites: tuple[str, ...]
    site: Int[Tensor, " label"]
    """Index into `sites`."""
    group: Int[Tensor, " label"]
    code: Int[Tensor, " label"]
    precision: Float[Tensor, " label"]
    recall: Float[Tensor, " label"]


class ConceptSummary(NamedTuple):
    """Means over all labels, each 0 to 1; a label for which nothing was found counts as 0."""

    precision: float
    recall: float
    covered: float
    """Share of the labels for which something was found."""


class LabelScores(NamedTuple):
    """Precision and recall of what was found for each label; both 0 where nothing was."""

    precision: Float[Tensor, " label"]
    recall: Float[Tensor, " label"]
    found: Bool[Tensor, " label"]

    def summary(self) -> ConceptSummary:
        """Return the means over all labels.

        >>> LabelScores(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.0]), torch.tensor([True, False])).summary()
        ConceptSummary(precision=0.5, recall=0.25, covered=0.5)
        """
        return ConceptSummary(float(self.precision.mean()), float(self.recall.mean()), float(self.found.double().mean()))


class Purity(NamedTuple):
    """How far codes and inputs stand for each other one to one; shares are 0 to 1."""

    codes: float
    """Of the codes in use, the share that stands for exactly one input."""
    inputs: float
    """Of all inputs, the share whose code is theirs alone."""
    n_codes: int
    """Codes in use."""


def state_labels(machine: TokFSM, tokens: Int[Tensor, "sequence pos"]) -> Int[Tensor, "sequence pos"]:
    """Label each position with the state whose last digit stands there; -1 elsewhere, and where the digits are no state.

    Raises:
        DataError: a row that does not begin with BOS, or a token outside the vocabulary.

    >>> state_labels(TokFSM.paper(), torch.tensor([[10, 0, 4, 1, 3, 9]])).tolist()
    [[-1, -1, 4, -1, 13, -1]]
    """
    labels = torch.full(tokens.shape, NO_STATE, dtype=torch.long)
    labels[:, machine.n_digits :: machine.n_digits] = read_states(machine, tokens)
    return labels


def code_table(
    ids: Int[Tensor, "sequence pos *group k"],
    labels: Int[Tensor, "_ _"],
    n_codes: int,
    n_labels: int,
    *,
    mask: Bool[Tensor, "_ _"] | None = None,
) -> CodeTable:
    """Count how often codes fire where labels hold. A code fires at a position if any of the k slots is it, and then once.

    Args:
        ids: 0 to ``n_codes - 1``, below 0 for an empty slot, [sequence pos k] or [sequence pos group k].
        labels: What holds at each position [sequence pos], 0 to ``n_labels - 1``, below 0 for nothing.
        n_codes, n_labels: How many there are, >= 1.
        mask: Positions to count [sequence pos]; by default all.

    Raises:
        ConfigError: fewer than one code or label.
        DataError: an id or label that is not one of them, or no position to count.
        ShapeError: shapes that do not fit each other.

    >>> table = code_table(torch.tensor([[[0], [0], [1]]]), torch.tensor([[0, -1, 1]]), n_codes=2, n_labels=2)
    >>> table.precision().tolist(), table.recall().tolist()
    ([[[0.5, 0.0], [0.0, 1.0]]], [[[1.0, 0.0], [0.0, 1.0]]])
    """
    check_range("n_codes", n_codes, 1, None, "an id is one of them")
    check_values("label", labels, n_labels)
    wrong = ids[ids >= n_codes]
    if wrong.numel():
        raise DataError(f"id {int(wrong[0])} was given, but there are {n_codes} codes. Give 0 to {n_codes - 1}, or -1 for an empty slot.")
    if ids.ndim not in (3, 4) or ids.shape[:2] != labels.shape or (mask is not None and mask.shape != labels.shape):
        masked = "" if mask is None else f" and a mask {list(mask.shape)}"
        raise ShapeError(
            f"ids {list(ids.shape)} with labels {list(labels.shape)}{masked} were given. "
            "Give ids [sequence pos k] or [sequence pos group k] with labels and mask [sequence pos]."
        )
    counted = torch.ones(labels.shape, dtype=torch.bool) if mask is None else mask.cpu()
    rows, of_rows = ids.cpu().long()[counted], labels.cpu().long()[counted]
    rows = rows.unsqueeze(1) if ids.ndim == 3 else rows
    n_positions, n_groups, n_slots = rows.shape
    if rows.numel() == 0:
        raise DataError(f"{n_positions} positions of {n_groups} groups and {n_slots} slots are left to count. Give one or more of each.")
    rows = rows.sort(-1).values
    repeated = torch.zeros_like(rows, dtype=torch.bool)
    repeated[..., 1:] = rows[..., 1:] == rows[..., :-1]
    fires = (rows >= 0) & ~repeated
    flat = torch.arange(n_groups)[:, None] * n_codes + rows
    hits = fires & (of_rows >= 0)[:, None, None]
    pairs = (flat * n_labels + of_rows[:, None, None])[hits]
    return CodeTable(
        torch.bincount(pairs, minlength=n_groups * n_codes * n_labels).reshape(n_groups, n_codes, n_labels),
        torch.bincount(flat[fires], minlength=n_groups * n_codes).reshape(n_groups, n_codes),
        torch.bincount(of_rows[of_rows >= 0], minlength=n_labels),
        n_slots,
    )


def _by_site(tables: CodeTable | Mapping[str, CodeTable]) -> dict[str, CodeTable]:
    by_site = {"": tables} if isinstance(tables, CodeTable) else dict(tables)
    if not by_site:
        raise DataError("no table was given, so that there is no code to choose or score. Give the table of one site or more.")
    labels = {site: len(table.occurrences) for site, table in by_site.items()}
    if len(set(labels.values())) > 1:
        raise ShapeError(f"the tables have these numbers of labels: {labels}. Give tables over the same labels.")
    return by_site


def _best(table: CodeTable, min_recall: float) -> list[Tensor]:
    """Return the precision, recall and flat index of the best code of one table for each label, the precision -1 where there is none."""
    precision, recall = table.precision().flatten(0, 1), table.recall().flatten(0, 1)
    precision = precision.masked_fill(recall <= min_recall, -1)
    best_precision = precision.amax(0)
    ties = precision == best_precision
    best_recall = recall.masked_fill(~ties, -1).amax(0)
    ties &= recall == best_recall
    order = torch.arange(len(recall))[:, None].expand_as(ties)
    return [best_precision, best_recall, order.masked_fill(~ties, len(recall)).amin(0)]


def choose_codes(tables: CodeTable | Mapping[str, CodeTable], min_recall: float = 0.01) -> ChosenCodes:
    """Choose, for each label, the code of the greatest precision among those whose recall is greater than `min_recall`.

    Of equals, the one of the greater recall; then that of the first site, the lowest group and the lowest id.

    Args:
        tables: The table of one site (then named ``""``), or of several by name.
        min_recall: 0 to below 1; the default is the paper's. A code of exactly this recall will not do.

    Raises:
        ConfigError: `min_recall` out of range.
        DataError: no table.
        ShapeError: tables of different numbers of labels.

    Source: Tamkin et al. 2023, section 3 (codes with a recall above 1 %, by precision).

    >>> ids, labels = torch.tensor([[[0], [0], [1], [2]]]), torch.tensor([[0, 1, 1, -1]])
    >>> chosen = choose_codes({"z": code_table(ids, labels, n_codes=3, n_labels=3)})
    >>> chosen.code.tolist(), chosen.precision.tolist(), chosen.recall.tolist()
    ([0, 1, -1], [0.5, 1.0, 0.0], [1.0, 0.5, 0.0])
    """
    if not 0 <= min_recall < 1:
        raise ConfigError(f"min_recall={min_recall} was asked for, but it is a share that recall has to pass. Give 0 to below 1.")
    by_site = _by_site(tables)
    precision, recall, flat = _best(next(iter(by_site.values())), min_recall)
    site = torch.zeros_like(flat)
    for index, table in enumerate(list(by_site.values())[1:], start=1):
        other = _best(table, min_recall)
        better = (other[0] > precision) | ((other[0] == precision) & (other[1] > recall))
        precision, recall, flat = (theirs.where(better, mine) for theirs, mine in zip(other, (precision, recall, flat), strict=True))
        site = site.masked_fill(better, index)
    none = precision < 0
    n_codes = torch.tensor([table.activations.shape[1] for table in by_site.values()])[site]
    site, group, code = (number.masked_fill(none, -1) for number in (site, flat // n_codes, flat % n_codes))
    return ChosenCodes(tuple(by_site), site, group, code, precision.masked_fill(none, 0), recall.masked_fill(none, 0))


def score_codes(chosen: ChosenCodes, tables: CodeTable | Mapping[str, CodeTable]) -> LabelScores:
    """Score chosen codes on the tables of other data. A label without a code, or that never occurs there, scores 0.

    Args:
        chosen: What `choose_codes` chose.
        tables: As they were given there.

    Raises:
        DataError: no table, or none of a site or code that was chosen.
        ShapeError: another number of labels.

    >>> chosen = choose_codes(code_table(torch.tensor([[[0], [1]]]), torch.tensor([[0, 1]]), n_codes=2, n_labels=2))
    >>> score_codes(chosen, code_table(torch.tensor([[[0], [0]]]), torch.tensor([[0, 1]]), n_codes=2, n_labels=2)).summary()
    ConceptSummary(precision=0.25, recall=0.5, covered=1.0)
    """
    by_site = _by_site(tables)
    n_labels = len(next(iter(by_site.values())).occurrences)
    if len(chosen.code) != n_labels:
        raise ShapeError(
            f"codes were chosen for {len(chosen.code)} labels, and the tables have {n_labels}. Give tables over the same labels."
        )
    precision, recall = torch.zeros(2, n_labels, dtype=torch.double)
    for index, name in enumerate(chosen.sites):
        label = (chosen.site == index).nonzero().flatten()
        if not len(label):
            continue
        if name not in by_site:
            raise DataError(f"codes of the site {name!r} were chosen, but the tables are those of {list(by_site)}. Give its table too.")
        table, group, code = by_site[name], chosen.group[label], chosen.code[label]
        n_groups, n_codes = table.activations.shape
        if int(group.max()) >= n_groups or int(code.max()) >= n_codes:
            raise DataError(
                f"group {int(group.max())} or code {int(code.max())} of the site {name!r} was chosen, but its table has {n_groups} groups "
                f"of {n_codes} codes. Give the table of the same codebook."
            )
        hits = table.hits[group, code, label].double()
        precision[label] = hits / table.activations[group, code].clamp(min=1)
        recall[label] = hits / table.occurrences[label].clamp(min=1)
    return LabelScores(precision, recall, chosen.code >= 0)


def _check_single(table: CodeTable, what: str) -> None:
    if table.n_slots != 1:
        raise DataError(
            f"{what} was asked of a table of {table.n_slots} codes a position, but it is about one code at each. "
            "Count the first slot alone: code_table(ids[..., :1], ...)."
        )


def decode_accuracy(train_table: CodeTable, table: CodeTable) -> Float[Tensor, " group"]:
    """Return how often the label can be told from one code of a group: the accuracy, 0 to 1, where a label holds.

    A code stands for the label at which it fired most often in `train_table` (the lowest of equals); one that never fired at a label
    there, and an empty slot, is a wrong answer.

    Args:
        train_table, table: One code a position: for k > 1, those of the first slot, ``code_table(ids[..., :1], ...)``.

    Raises:
        DataError: several codes a position, or no position with a label in `table`.
        ShapeError: tables of different sizes.

    >>> train = code_table(torch.tensor([[[0], [1]]]), torch.tensor([[0, 1]]), n_codes=2, n_labels=2)
    >>> decode_accuracy(train, code_table(torch.tensor([[[0], [1], [0], [1]]]), torch.tensor([[0, 1, 1, 1]]), 2, 2)).tolist()
    [0.75]
    """
    _check_single(train_table, "decode_accuracy")
    _check_single(table, "decode_accuracy")
    if train_table.hits.shape != table.hits.shape:
        raise ShapeError(
            f"tables of {list(train_table.hits.shape)} and {list(table.hits.shape)} were given. "
            "Give two [group code label] of one codebook and the same labels."
        )
    n_labelled = int(table.occurrences.sum())
    if n_labelled == 0:
        raise DataError("no position of the table has a label, so that nothing can be told. Give labels of 0 or more at some positions.")
    counts = train_table.hits
    order = torch.arange(counts.shape[-1]).expand_as(counts)
    majority = order.masked_fill(counts != counts.amax(-1, keepdim=True), counts.shape[-1]).amin(-1)
    right = table.hits.gather(-1, majority[..., None]).squeeze(-1)
    return right.masked_fill(counts.sum(-1) == 0, 0).sum(1).double() / n_labelled


def purity(codes: Int[Tensor, " input"]) -> Purity:
    """Return how many codes stand for exactly one input, and how many inputs have a code of their own.

    Args:
        codes: The code of each distinct input (each bigram at the first state, for example); below 0 for none, which is not a code.

    Raises:
        DataError: no input.

    Source: Tamkin et al. 2023, section 3 (codes that fire on exactly one n-gram).

    >>> purity(torch.tensor([7, 3, 3, 5]))
    Purity(codes=0.666..., inputs=0.5, n_codes=3)
    """
    if not len(codes):
        raise DataError("no input was given, so that no code stands for one. Give the code of one input or more.")
    counts = torch.unique(codes[codes >= 0], return_counts=True)[1]
    alone = int((counts == 1).sum())
    return Purity(alone / max(len(counts), 1), alone / len(codes), len(counts))


def codes_per_concept(table: CodeTable, coverage: float = 0.95) -> Int[Tensor, "group label"]:
    """Return how many codes of a group it takes, most frequent first, to cover a share of a label's occurrences.

    It is 0 for a label that never occurs, and -1 where all codes together do not reach the share (for empty slots).

    Args:
        table: One code a position: for k > 1, that of the first slot, ``code_table(ids[..., :1], ...)``.
        coverage: Above 0 to 1.

    Raises:
        ConfigError: `coverage` out of range.
        DataError: several codes a position.

    >>> codes_per_concept(code_table(torch.tensor([[[0], [0], [1], [2]]]), torch.tensor([[0, 0, 0, 1]]), 3, 2)).tolist()
    [[2, 1]]
    """
    if not 0 < coverage <= 1:
        raise ConfigError(f"coverage={coverage} was asked for, but it is a share of the occurrences of a label. Give above 0 to 1.")
    _check_single(table, "codes_per_concept")
    covered = table.hits.sort(dim=1, descending=True).values.cumsum(1)
    # A share of a whole number, rounded up; the subtraction undoes what rounding adds (0.1 * 30 is above 3).
    needed = (coverage * table.occurrences.double() - 1e-9).ceil().long()
    n = (covered < needed).sum(1) + 1
    return n.masked_fill(covered[:, -1] < needed, -1).masked_fill(table.occurrences == 0, 0)
