"""The snap on a CPU: chunks of rows through one reused buffer of scores, on workers that compute alone.

Nothing here holds ``[row group code]`` or ``[row k d_group]``. Three things cost, next to the matrix product that nobody can avoid:

* fresh memory: buffers are reused;
* the selection: `rows.best` looks at maxima;
* the scaling of scores: many rows get it, and the bias, from a copy of the codes; few rows, for which the copy would cost more, from a pass
  over their scores.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_codebook.snap import halves, rows
from tl_codebook.snap.centre import centre
from tl_codebook.snap.gradients import decode_rows
from tl_codebook.snap.workers import run, scratch, whose

__all__ = ["snap"]

_GRAM_WIDTH = 32  # d_group from which on updating the scores is cheaper than computing them again (measured; 4x at 768)
_GRAM_BYTES = 64 * 2**20
_CHUNK_BYTES = 20 * 2**20  # of scores: mostly still in a cache when they are looked at again
_LONG = 256  # d_group from which on the product is so long that this matters less than how often the codes are packed for it
_LONG_CHUNK_BYTES = 64 * 2**20
_COPY_BYTES = 8 * 2**20  # of the codes of a group with scale and bias built in
_ALL_CHUNKS_BYTES = 2**30  # of all workers together
_TRIED = 32  # rows that tell whether bf16 is of use
_MOST_UNPROVEN = 0.2  # of them: beyond that, doing rows twice takes longer

_serials = itertools.count()


class _Table(NamedTuple):
    """What turns rows into scores.

    Where `built_in`, scale and bias are built into a copy of the codes, with `shift` and a last column of minus `bias`; scores are its
    products with ``[x - shift, 1]``. Otherwise they are ``(x - shift) @ codes^T * scale - bias``.
    """

    codes: Float[Tensor, "group code d_group"]
    built_in: bool
    shift: Float[Tensor, "group 1 d_group"] | None
    scale: Float[Tensor, "group code"] | None
    bias: Float[Tensor, "group code"] | None
    twins: list[tuple[Int[Tensor, " twin"], Int[Tensor, " twin"]] | None]
    serial: int


def _twins(codes: Float[Tensor, "code d_group"], sizes: Float[Tensor, " code"]) -> tuple[Int[Tensor, " twin"], Int[Tensor, " twin"]] | None:
    """Return codes that equal an earlier one bit for bit, and those earlier ones; None where there are none, which is the rule.

    A matrix product may round equal columns differently, and equal scores have to go to the lowest id.
    """
    values = sizes.numpy()
    ordered = np.sort(values)
    shared = ordered[1:][ordered[1:] == ordered[:-1]]
    if not len(shared):
        return None
    suspects = torch.from_numpy(np.flatnonzero(np.isin(values, shared)))
    _, kind = torch.unique(codes.index_select(0, suspects), dim=0, return_inverse=True)
    first = torch.full_like(suspects, codes.shape[0]).scatter_reduce_(0, kind, suspects, "amin").gather(0, kind)
    later = first != suspects
    return (suspects[later], first[later]) if later.any() else None


def _make_equal(columns: Float[Tensor, "row code"], twins: tuple[Tensor, Tensor] | None) -> None:
    if twins is not None:
        columns[:, twins[0]] = columns[:, twins[1]]


def _table(codes: Float[Tensor, "group code d_group"], similarity: str, n_rows: int) -> _Table:
    _, n_codes, d_group = codes.shape
    # For few rows, writing the codes out again takes longer than a pass over their scores; and each worker keeps its copy.
    built_in = n_rows >= 2 * d_group and 4 * n_codes * (d_group + 1) <= _COPY_BYTES
    serial = next(_serials)
    if similarity == "inner_product":
        norms = codes.norm(dim=-1)
        scale = torch.where(norms > 0, norms, 1.0).reciprocal_()
        return _Table(codes, built_in, None, scale, None, [_twins(c, s) for c, s in zip(codes, scale, strict=True)], serial)
    shift = centre(codes)  # where nothing is built in, (x - m) c ranks as (x - m) (c - m) does
    bias = _half_squares(codes, shift)
    return _Table(codes, built_in, shift, None, bias, [_twins(c, b) for c, b in zip(codes, bias, strict=True)], serial)


def _built_in(table: _Table, group: int) -> Float[Tensor, "code width"]:
    """Return this thread's copy of the codes of a group with scale and bias built in; tasks of one group follow each other."""
    codes = table.codes[group]
    n_codes, d_group = codes.shape
    copy = scratch("codes", (n_codes, d_group + (table.bias is not None)), torch.float32)
    if whose("codes", (table.serial, group)):
        return copy
    if table.scale is not None:
        torch.mul(codes, table.scale[group].unsqueeze(1), out=copy)
    if table.shift is not None and table.bias is not None:
        torch.sub(codes, table.shift[group], out=copy[:, :d_group])
        torch.neg(table.bias[group], out=copy[:, d_group])
    return copy


def _half_squares(codes: Float[Tensor, "group code d_group"], shift: Float[Tensor, "group 1 d_group"]) -> Float[Tensor, "group code"]:
    """Return half the squared distances of the codes from a point, without a second copy of the codes."""
    at_once = max(1, 2**18 // (codes.shape[0] * codes.shape[2]))
    return torch.cat([(part - shift).square_().sum(-1) for part in codes.split(at_once, 1)], 1).div_(2)


def _scores(x: Float[Tensor, "row d_group"], table: _Table, group: int, out: Float[Tensor, "row code"]) -> None:
    matrix = _built_in(table, group) if table.built_in else table.codes[group]
    if table.shift is not None:
        wide = scratch("x", (x.shape[0], matrix.shape[1]), torch.float32)
        if table.built_in:
            wide[:, -1] = 1.0
        torch.sub(x, table.shift[group], out=wide[:, : x.shape[1]])
        x = wide
    torch.mm(x, matrix.t(), out=out)
    if not table.built_in:
        if table.scale is not None:
            out.mul_(table.scale[group])
        if table.bias is not None:
            out.sub_(table.bias[group])
    _make_equal(out, table.twins[group])


def _chunk_rows(n_rows: int, n_groups: int, width: int, d_group: int) -> int:
    size, least = (_CHUNK_BYTES // (4 * width), 64) if d_group < _LONG else (_LONG_CHUNK_BYTES // (4 * width), 512)
    fair = -(-n_rows * n_groups // torch.get_num_threads())  # something to do for every worker
    return max(1, min(n_rows, 1024, max(size, least), max(fair, 128)))


def _grams(codes: Tensor, table: _Table, n_rows: int, k: int) -> Float[Tensor, "group code code"] | None:
    """Return what choosing code i takes from the score of code j, where a table of it is small and pays; None otherwise."""
    n_groups, n_codes, d_group = codes.shape
    if d_group < _GRAM_WIDTH or n_groups * n_codes**2 * 4 > _GRAM_BYTES or n_rows * (k - 1) < n_codes:
        return None
    grams = torch.bmm(codes, (codes if table.shift is None else codes - table.shift).transpose(1, 2))
    for gram, twins in zip(grams, table.twins, strict=True):
        _make_equal(gram, twins)
    return grams if table.scale is None else grams.mul_(table.scale.unsqueeze(1))


def _residual(
    x: Float[Tensor, "row d_group"],
    table: _Table,
    group: int,
    gram: Float[Tensor, "code code"] | None,
    disabled: Bool[Tensor, "row code"] | None,
    ids: Int[Tensor, "row k"],
) -> None:
    codes, k = table.codes[group], ids.shape[1]
    scores = scratch("scores", (x.shape[0], codes.shape[0]), torch.float32)
    rest = x
    for slot in range(k):
        if slot == 0 or gram is None:
            _scores(rest, table, group, scores)
            if disabled is not None:
                scores.masked_fill_(disabled, -torch.inf)
        chosen = rows.first_best(scores)
        ids[:, slot] = chosen
        if slot == k - 1:
            return
        if gram is None:
            rest = rest - codes.index_select(0, chosen)
        else:
            scores.sub_(torch.index_select(gram, 0, chosen, out=scratch("gram", tuple(scores.shape), torch.float32)))


def _nearest(
    x: Float[Tensor, "row d_group"], table: _Table, group: int, disabled: Bool[Tensor, "row code"] | None, ids: Int[Tensor, "row k"]
) -> None:
    n_codes, k = table.codes.shape[1], ids.shape[1]
    scores = scratch("scores", (x.shape[0], rows.padded(n_codes, k)), torch.float32)
    inside = scores[:, :n_codes]
    _scores(x, table, group, inside)
    if disabled is not None:
        inside.masked_fill_(disabled, -torch.inf)
    if k == 1:
        ids[:, 0] = rows.first_best(inside)
    else:
        scores[:, n_codes:] = -torch.inf
        ids.copy_(rows.best(scores, n_codes, k))


def _scale_and_bias(table: _Table, group: int) -> tuple[Float[Tensor, " code"] | None, Float[Tensor, " code"] | None]:
    return None if table.scale is None else table.scale[group], None if table.bias is None else table.bias[group]


def _by_halves(
    x: Float[Tensor, "row d_group"], table: _Table, group: int, halved: halves.Halved, k: int
) -> tuple[Int[Tensor, "row k"], Int[Tensor, " unproven"]]:
    shifted = x if table.shift is None else x - table.shift[group]
    return halves.nearest(shifted, table.codes[group], *_scale_and_bias(table, group), halved, k)


def _proven(x: Float[Tensor, "row d_group"], table: _Table, group: int, halved: halves.Halved, ids: Int[Tensor, "row k"]) -> int:
    """Choose like `_nearest`, through bf16; return how many rows had to be done again."""
    found, left = _by_halves(x, table, group, halved, ids.shape[1])
    if len(left):
        again = found.index_select(0, left)
        _nearest(x.index_select(0, left), table, group, None, again)
        found[left] = again
    ids.copy_(found)
    return len(left)


def _halved(x: Float[Tensor, "row d_group"], table: _Table, group: int, k: int) -> halves.Halved | None:
    """Return the codes of a group in bf16, if they prove most of a few rows.

    Tried once, before the work is shared out: what a row gets may not depend on which worker was first.
    """
    halved = halves.halve(table.codes[group], *_scale_and_bias(table, group))
    some = torch.randint(x.shape[0], (_TRIED,), generator=torch.Generator().manual_seed(0))  # a stride could meet one position only
    left = _by_halves(x.index_select(0, some).float(), table, group, halved, k)[1]
    return halved if len(left) <= _MOST_UNPROVEN * _TRIED else None


def snap(
    x: Float[Tensor, "row group d_group"],
    codes: Float[Tensor, "group code d_group"],
    k: int,
    similarity: str,
    selection: str,
    reduce: str | None,
    disabled: Bool[Tensor, "#row group code"] | None = None,
) -> tuple[Float[Tensor, "row group d_group"] | None, Int[Tensor, "row group k"]]:
    """Choose k codes for every row and, unless `reduce` is None, decode them.

    Equal to `definition` up to fp32 rounding of the scores. Each chunk of each group is one task of a worker.
    """
    n_rows, n_groups, d_group = x.shape
    n_codes = codes.shape[1]
    ids = torch.empty(n_rows, n_groups, k, dtype=torch.long)
    out = None if reduce is None else torch.empty(n_rows, n_groups, d_group, dtype=codes.dtype)
    exact = codes.float()
    table = _table(exact, similarity, n_rows)
    residual = selection == "residual" and k > 1
    width = rows.padded(n_codes, 1 if residual else k)
    size = _chunk_rows(n_rows, n_groups, width, d_group)
    grams = _grams(exact, table, n_rows, k) if residual else None
    halved: list[halves.Halved | None] = [None] * n_groups
    if disabled is None and halves.supported() and halves.worth_it(n_rows, n_codes, d_group, k, selection):
        halved = [_halved(x[:, group], table, group, k) for group in range(n_groups)]

    def work(task: tuple[int, int]) -> None:
        group, start = task
        here = slice(start, start + size)
        x_here, ids_here = x[here, group].float(), ids[here, group]
        masked = None if disabled is None else disabled.expand(n_rows, -1, -1)[here, group]
        halved_here = halved[group]
        if residual:
            _residual(x_here, table, group, None if grams is None else grams[group], masked, ids_here)
        elif halved_here is not None:
            _proven(x_here, table, group, halved_here, ids_here)
        else:
            _nearest(x_here, table, group, masked, ids_here)
        if out is not None and reduce is not None:
            if k == n_groups == 1 and out.dtype == torch.float32:
                torch.index_select(exact[0], 0, ids_here[:, 0], out=out[here, 0])
                return
            out[here, group] = decode_rows(ids_here, exact[group], reduce, filled=True)

    tasks = [(group, start) for group in range(n_groups) for start in range(0, n_rows, size)]
    run(work, tasks, max(1, _ALL_CHUNKS_BYTES // (4 * size * width)))
    return out, ids
