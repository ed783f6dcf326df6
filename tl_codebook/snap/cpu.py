"""The snap on a CPU: chunks of rows through one reused buffer of scores, on workers that compute alone.

Nothing here holds ``[row group code]`` or ``[row k d_group]``. Three things cost, next to the matrix product that nobody can avoid: fresh memory
(so buffers are reused), the selection (so `rows.best` looks at maxima) and the scaling of scores (so narrow groups get their scale and their
bias built into a copy of the codes, one column wider; wide ones, whose copy would weigh more, get it in a pass over the scores).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_codebook.snap import rows
from tl_codebook.snap.centre import centre
from tl_codebook.snap.gradients import decode_rows
from tl_codebook.snap.workers import run, scratch

__all__ = ["snap"]

_WIDE = 256  # d_group from which on a second copy of the codes costs more than a pass over the scores
_GRAM_WIDTH = 48  # d_group from which on updating the scores is cheaper than computing them again
_GRAM_BYTES = 64 * 2**20
_CHUNK_BYTES = 5 * 2**20  # of scores, where the product is short: they stay in a cache until they are read
_WIDE_CHUNK_ROWS = 512  # where it is long: fewer rows, and packing the codes for each product shows
_ALL_CHUNKS_BYTES = 2**30  # of all workers together


class _Table(NamedTuple):
    """What turns rows into scores: ``[x - shift, 1] @ matrix^T`` where `shift` and `augmented` say so, then ``* scale - bias``."""

    matrix: Float[Tensor, "group code width"]
    shift: Float[Tensor, "group 1 d_group"] | None
    augmented: bool
    scale: Float[Tensor, "group code"] | None
    bias: Float[Tensor, "group code"] | None


def _table(codes: Float[Tensor, "group code d_group"], similarity: str) -> _Table:
    n_groups, n_codes, d_group = codes.shape
    if similarity == "inner_product":
        norms = codes.norm(dim=-1)
        norms = torch.where(norms > 0, norms, 1.0)
        if d_group >= _WIDE:
            return _Table(codes, None, False, norms.reciprocal_(), None)
        return _Table(codes / norms.unsqueeze(-1), None, False, None, None)
    shift = centre(codes)
    if d_group >= _WIDE:  # (x - m) c ranks as (x - m) (c - m) does
        squares = codes.square().sum(-1) if not shift.any() else torch.stack([(c - m).square().sum(-1) for c, m in zip(codes, shift, strict=True)])
        return _Table(codes, shift, False, None, squares.div_(2))
    wider = codes.new_empty(n_groups, n_codes, d_group + 1)
    torch.sub(codes, shift, out=wider[..., :d_group])
    wider[..., d_group] = wider[..., :d_group].square().sum(-1).div_(-2)
    return _Table(wider, shift, True, None, None)


def _scores(x: Float[Tensor, "row d_group"], table: _Table, group: int, out: Float[Tensor, "row code"]) -> None:
    if table.shift is not None:
        wide = scratch("x", (x.shape[0], table.matrix.shape[-1]), torch.float32)
        if table.augmented:
            wide[:, -1] = 1.0
        torch.sub(x, table.shift[group], out=wide[:, : x.shape[1]])
        x = wide
    torch.mm(x, table.matrix[group].t(), out=out)
    if table.scale is not None:
        out.mul_(table.scale[group])
    if table.bias is not None:
        out.sub_(table.bias[group])


def _chunk_rows(n_rows: int, n_groups: int, width: int, d_group: int) -> int:
    # The number of threads plays no part: a chunk's size can change the last bits of its scores.
    wide = d_group >= _WIDE
    size = max(_WIDE_CHUNK_ROWS, 2**23 // width) if wide else max(128, _CHUNK_BYTES // (4 * width))
    fair = -(-n_rows * n_groups // 16)  # something for each of several workers to do
    return max(1, min(n_rows, size, max(32, fair)))


def _grams(codes: Tensor, table: _Table, n_rows: int, k: int) -> Float[Tensor, "group code code"] | None:
    """Return what choosing code i takes from the score of code j, where a table of it is small and pays; None otherwise."""
    n_groups, n_codes, d_group = codes.shape
    if d_group < _GRAM_WIDTH or n_groups * n_codes**2 * 4 > _GRAM_BYTES or n_rows * (k - 1) < 2 * n_codes:
        return None
    grams = torch.bmm(codes, table.matrix[..., :d_group].transpose(1, 2))
    return grams if table.scale is None else grams.mul_(table.scale.unsqueeze(1))


def _residual(
    x: Float[Tensor, "row d_group"],
    codes: Float[Tensor, "code d_group"],
    table: _Table,
    group: int,
    gram: Float[Tensor, "code code"] | None,
    scores: Float[Tensor, "row width"],
    disabled: Bool[Tensor, "row code"] | None,
    ids: Int[Tensor, "row k"],
) -> None:
    n_codes, k = codes.shape[0], ids.shape[1]
    inside = scores[:, :n_codes]
    rest = x
    for slot in range(k):
        if slot == 0 or gram is None:
            _scores(rest, table, group, inside)
            if disabled is not None:
                inside.masked_fill_(disabled, -torch.inf)
        chosen = rows.first_best(scores).clamp_(max=n_codes - 1)
        ids[:, slot] = chosen
        if slot == k - 1:
            return
        if gram is None:
            rest = rest - codes.index_select(0, chosen)
        else:
            inside.sub_(torch.index_select(gram, 0, chosen, out=scratch("gram", (len(chosen), n_codes), torch.float32)))


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
    table = _table(exact, similarity)
    residual = selection == "residual" and k > 1
    width = rows.padded(n_codes, 1 if residual else k)
    size = _chunk_rows(n_rows, n_groups, width, d_group)
    grams = _grams(exact, table, n_rows, k) if residual else None

    def work(task: tuple[int, int]) -> None:
        group, start = task
        here = slice(start, start + size)
        x_here, ids_here = x[here, group].float(), ids[here, group]
        scores = scratch("scores", (x_here.shape[0], width), torch.float32)
        scores[:, n_codes:] = -torch.inf
        masked = None if disabled is None else disabled.expand(n_rows, -1, -1)[here, group]
        if residual:
            _residual(x_here, exact[group], table, group, None if grams is None else grams[group], scores, masked, ids_here)
        else:
            inside = scores[:, :n_codes]
            _scores(x_here, table, group, inside)
            if masked is not None:
                inside.masked_fill_(masked, -torch.inf)
            if k == 1:
                ids_here[:, 0] = rows.first_best(scores).clamp_(max=n_codes - 1)
            else:
                ids_here.copy_(rows.best(scores, n_codes, k))
        if out is not None and reduce is not None:
            out[here, group] = decode_rows(ids_here, exact[group], reduce)

    tasks = [(group, start) for group in range(n_groups) for start in range(0, n_rows, size)]
    run(work, tasks, max(1, _ALL_CHUNKS_BYTES // (4 * size * width)))
    return out, ids


