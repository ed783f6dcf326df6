"""The fused snap: scores live in registers only, block maxima choose candidates, fp32 decides, and a proof sends doubtful rows round again.

Rows are taken in slabs, so that everything between the kernels fits a fixed workspace. One slab and one choice is:

1. `prepare_kernel` shifts and splits the rows (not for bf16 inputs, whose products are exact as they are);
2. `best_block_kernel` or `block_maxima_kernel` finds candidates on the tensor cores;
3. `best_code_kernel` or `best_codes_kernel` scores them in fp32, writes ids, and lists the rows it cannot prove;
4. steps 2 and 3 in fp32 for the listed rows. The list stays on the GPU: nothing here waits for it, so a CUDA graph can hold all of it.

The numbers below that decide about speed are modelled for an H200, not measured.

Axes: ``row group code k d_group``; blocks are 8 codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_codebook.snap.centre import centre
from tl_codebook.snap.triton_candidates import best_block_kernel, block_maxima_kernel, prepare_kernel
from tl_codebook.snap.triton_common import BLOCK, Tiles, at_least, interpreted
from tl_codebook.snap.triton_rescore import LARGEST_SPAN, SUPER, best_code_kernel, best_codes_kernel

__all__ = ["Plan", "plan_for", "select"]

_BLOCK: int = BLOCK.value
_SUPER: int = SUPER.value
_PREPARE_ROWS = 16
_DECIDE_ROWS = 8
_DECIDE_ELEMENTS = 4096  # products at once
_MULTIPROCESSORS = 132  # fewer programs than this leave some idle
_PROGRAMS_WANTED = 4 * _MULTIPROCESSORS  # where the codes can be shared out, so that the last wave of programs wastes little
_LARGE_SHARED = 200_000  # bytes of shared memory a program may use on an H100 or H200; other cards have about half


@dataclass(frozen=True)
class Plan:
    """How the kernels are launched.

    Args:
        tiles: For the tensor cores.
        exact: For the fp32 pass over rows that were not proven.
        one_pass: Keep a running best (only for one code at a time) instead of writing the maxima of all blocks.
    """

    tiles: Tiles
    exact: Tiles
    one_pass: bool


def plan_for(n_rows: int, n_groups: int, n_codes: int, d: int, n_best: int, direct: bool, shared_memory: int) -> Plan:
    """Choose tiles; the tests compile them for sm_90, and the smaller ones for sm_80 and sm_89, and see that no register is spilled."""
    depth = min((64, 32, 16), key=lambda step: (triton.cdiv(d, step) * step, -step))  # first of all little padding
    if shared_memory < _LARGE_SHARED:
        tiles = Tiles(64, 128, depth, 8, 2)
    elif n_rows <= 64:
        tiles = Tiles(64, 128, depth, 4, 3)
    else:
        tiles = Tiles(128, 256 if direct else 128, depth, 8, 3)
    few = -(-n_rows // tiles.rows) * n_groups < _MULTIPROCESSORS
    one_pass = n_best == 1 and not (few and n_codes <= _BLOCK * LARGEST_SPAN)
    return Plan(tiles, Tiles(32, 64, 32, 4, 2), one_pass)


@dataclass(frozen=True)
class _Codebook:
    """What every slab needs of the codebook.

    `high` and `low` are what the tensor cores multiply (the codes themselves where products are `direct`), `bias` belongs to them and
    `exact_bias` to the shifted codes; `limits` [group 4] are the largest lengths in the slack of a score.
    """

    codes: Tensor
    high: Tensor
    low: Tensor
    centre: Tensor | None
    divisor: Tensor | None
    scale: Tensor | None
    bias: Tensor | None
    exact_bias: Tensor | None
    limits: Tensor
    direct: bool

    @property
    def flags(self) -> dict[str, bool]:
        """The compile-time constants that say which of these exist."""
        return {"HAS_CENTRE": self.centre is not None, "HAS_SCALE": self.scale is not None, "HAS_BIAS": self.exact_bias is not None}


def _split(source: Tensor, codebook_centre: Tensor | None, width: int, by_group: bool, **residual: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Run `prepare_kernel` over `[row group d]`; `by_group` writes `[group row ...]`. A width of 0 asks for the lengths alone."""
    n_rows, n_groups, d = source.shape
    lead = (n_groups, n_rows) if by_group else (n_rows, n_groups)
    high = torch.empty(*lead, width, dtype=torch.bfloat16, device=source.device)
    low = torch.empty_like(high)
    squares = torch.empty(*lead, 3, dtype=torch.float32, device=source.device)
    padded = width or max(16, at_least(d))
    codes, chosen, rest = residual.get("codes"), residual.get("chosen"), residual.get("rest")
    prepare_kernel[(triton.cdiv(n_rows, _PREPARE_ROWS), n_groups)](
        source, source if codebook_centre is None else codebook_centre, source if rest is None else rest,
        source if chosen is None else chosen, source if codes is None else codes, high, low, squares,
        n_rows, d, n_groups, 1 if chosen is None else chosen.stride(1), *source.stride(),
        *((1, 1, 1) if codes is None else codes.stride()), *((1, n_rows) if by_group else (n_groups, 1)), padded,
        ROWS=_PREPARE_ROWS, DEPTH=min(64, padded & -padded), HAS_CENTRE=codebook_centre is not None, SUBTRACT=chosen is not None,
        KEEP_REST=rest is not None, SPLIT=width > 0, enable_fp_fusion=True, num_warps=4,
    )  # fmt: skip
    return high, low, squares


def _aligned(x: Float[Tensor, "a b d_group"], width: int) -> Float[Tensor, "a b width"]:
    """Return x if it can be loaded 16 bytes at a time, without masks; otherwise a copy that can, padded with zeros."""
    if x.shape[-1] == width and x.stride(-1) == 1 and all(s % 8 == 0 for s in x.stride()[:2]) and x.data_ptr() % 16 == 0:
        return x
    copy = x.new_zeros(*x.shape[:2], width)
    copy[..., : x.shape[-1]] = x
    return copy


def _codebook(
    codes: Float[Tensor, "group code d_group"], similarity: str, disabled: Bool[Tensor, "group code"] | None, direct: bool, width: int
) -> _Codebook:
    euclidean = similarity == "euclidean"
    middle = centre(codes).squeeze(1).contiguous() if euclidean else None
    high, low, squares = _split(codes.transpose(0, 1), middle, 0 if direct else width, by_group=True)
    divisor = scale = None
    bias = exact_bias = None
    lengths = squares.sqrt()
    if euclidean:
        exact_bias = bias = squares[..., 0] / -2
        if direct:
            bias = _split(codes.transpose(0, 1), None, 0, by_group=True)[2][..., 0] / -2
        largest_bias = exact_bias.abs().amax(1, keepdim=True)
    else:
        norm = torch.linalg.vector_norm(codes, dim=-1, dtype=torch.float32)
        divisor = torch.where(norm > 0, norm, 1.0)
        scale = 1 / divisor
        lengths = lengths * scale.unsqueeze(-1)
        largest_bias = torch.zeros(codes.shape[0], 1, device=codes.device)
    if disabled is not None:
        bias = (torch.zeros_like(lengths[..., 0]) if bias is None else bias).masked_fill(disabled, -torch.inf)
        exact_bias = (torch.zeros_like(bias) if exact_bias is None else exact_bias).masked_fill(disabled, -torch.inf)
    limits = torch.cat([lengths.amax(1)[:, [0, 1, 2]], largest_bias], dim=1).contiguous()
    if direct:
        high = low = _aligned(codes, width)
    return _Codebook(
        codes, high, low, middle, divisor, scale,
        None if bias is None else bias.contiguous(), None if exact_bias is None else exact_bias.contiguous(), limits, direct,
    )  # fmt: skip


def _padded(n_blocks: int) -> int:
    """Give every row of maxima the alignment that wide loads need."""
    return triton.cdiv(n_blocks, _SUPER) * _SUPER


class _Slab:
    """The kernels' common arguments for some rows, and what they hand to each other."""

    def __init__(self, book: _Codebook, plan: Plan, n_rows: int, n_best: int, n_listed: Int[Tensor, " group"]) -> None:
        device, n_groups = book.codes.device, book.codes.shape[0]
        self.book, self.plan, self.n_best, self.n_listed = book, plan, n_best, n_listed
        self.n_rows, self.n_groups, self.n_codes, self.d = n_rows, n_groups, book.codes.shape[1], book.codes.shape[2]
        self.n_blocks = triton.cdiv(self.n_codes, _BLOCK)
        self.listed = torch.empty(n_groups, n_rows, dtype=torch.int32, device=device)
        if plan.one_pass:
            self.block = torch.empty(n_rows, n_groups, dtype=torch.int32, device=device)
            self.second = torch.empty(n_rows, n_groups, dtype=torch.float32, device=device)
        else:
            self.maxima = torch.empty(n_rows, n_groups, _padded(self.n_blocks), dtype=torch.float32, device=device)

    def choose(self, x: Tensor, high: Tensor, low: Tensor, squares: Tensor | None, ids: Int[Tensor, "row group _"]) -> None:
        """Write ids for all rows, then again, in fp32, for those that were not proven."""
        self._candidates(high, low, "direct" if self.book.direct else "split")
        self._decide(x, squares, ids, listed=False)
        if squares is not None:
            self._candidates(x, x, "exact")
            self._decide(x, squares, ids, listed=True)

    def _candidates(self, x: Tensor, x_low: Tensor, precision: str) -> None:
        book, exact = self.book, precision == "exact"
        tiles = self.plan.exact if exact else self.plan.tiles
        codes, low = (book.codes, book.codes) if exact else (book.high, book.low)
        bias = book.exact_bias if exact else book.bias
        outputs = (self.block, self.second) if self.plan.one_pass else (self.maxima,)
        grid: tuple[int, ...] = (triton.cdiv(self.n_rows, tiles.rows), self.n_groups)
        sizes = [self.n_rows, self.n_codes, x.shape[2], self.n_groups, self.n_blocks]
        if not self.plan.one_pass:
            n_tiles = triton.cdiv(self.n_codes, tiles.codes)
            splits = max(1, min(n_tiles // 4, triton.cdiv(_PROGRAMS_WANTED, grid[0] * grid[1])))
            sizes += [self.maxima.stride(1), triton.cdiv(n_tiles, splits)]
            grid = (*grid, triton.cdiv(n_tiles, sizes[-1]))
        kernel: Any = best_block_kernel if self.plan.one_pass else block_maxima_kernel
        kernel[grid](
            x, x_low, codes, low, *self._or(book.centre, book.scale, bias), self.listed, self.n_listed, *outputs,
            *sizes, *x.stride(), *codes.stride(),
            ROWS=tiles.rows, CODES=tiles.codes, DEPTH=tiles.depth, EVEN=x.shape[2] % tiles.depth == 0, PRECISION=precision,
            **book.flags, UPCAST=interpreted(), LISTED=exact, enable_fp_fusion=True, num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip

    def _decide(self, x: Tensor, squares: Tensor | None, ids: Tensor, listed: bool) -> None:
        book = self.book
        n_best = min(self.n_blocks, self.n_best + (not book.direct))  # one more block than needed makes nearly every row provable
        wide = _DECIDE_ROWS * _BLOCK if self.plan.one_pass else at_least(n_best) * _BLOCK
        depth = max(16, min(_DECIDE_ELEMENTS // wide, at_least(self.d)))
        constants = dict(DEPTH=depth, **book.flags, PROVE=squares is not None and not listed, LISTED=listed)
        vectors = (x, book.codes, *self._or(book.centre, book.divisor, book.exact_bias))
        lists = (*self._or(squares), book.limits, self.listed, self.n_listed, ids)
        if self.plan.one_pass:
            best_code_kernel[(triton.cdiv(self.n_rows, _DECIDE_ROWS), self.n_groups)](
                *vectors, self.block, self.second, *lists,
                self.n_rows, self.n_codes, self.d, self.n_groups, ids.stride(1), *x.stride(), *book.codes.stride(),
                ROWS=_DECIDE_ROWS, **constants, enable_fp_fusion=True, num_warps=4,
            )  # fmt: skip
            return
        n_supers = triton.cdiv(self.n_blocks, _SUPER)
        best_codes_kernel[(self.n_rows, self.n_groups)](
            *vectors, self.maxima, *lists,
            self.n_rows, self.n_codes, self.d, self.n_groups, self.n_blocks, self.maxima.stride(1), ids.stride(1),
            *x.stride(), *book.codes.stride(),
            K=self.n_best, N_BEST=n_best, N_SUPER=min(n_best, n_supers), SUPERS=at_least(n_supers),
            WIDE_BLOCKS=at_least(min(n_best, n_supers)) * _SUPER, WIDE=wide, **constants, enable_fp_fusion=True, num_warps=1,
        )  # fmt: skip

    def _or(self, *tensors: Tensor | None) -> list[Tensor]:
        """A pointer for each tensor; where there is none, any, which the kernel does not look at."""
        return [self.book.limits if t is None else t for t in tensors]


def _shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that a program may use (in the interpreter, of an H200)."""
    if device.type != "cuda":
        return _LARGE_SHARED
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])


def select(
    x: Float[Tensor, "row group d_group"],
    codes: Float[Tensor, "group code d_group"],
    k: int,
    similarity: str,
    selection: str,
    disabled: Bool[Tensor, "group code"] | None,
    workspace: int,
    plan: Plan | None = None,
) -> tuple[Int[Tensor, "row group k"], Int[Tensor, "slab group"]]:
    """Choose k codes for every row; also return how many rows of each slab and choice were redone in fp32.

    Args:
        x: Not fp64, like `codes`.
        workspace: Bytes that may be held at once beside the inputs, the ids and (twice) the codebook.
        plan: How to launch the kernels, instead of `plan_for`.
    """
    n_rows, n_groups, d = x.shape
    n_codes = codes.shape[1]
    residual = selection == "residual" and k > 1
    n_best, n_choices = (1, k) if residual else (k, 1)
    half = torch.bfloat16 if similarity == "euclidean" else x.dtype  # 11 bits of fp16 far from zero need the centre, 8 of bf16 do not
    direct = not residual and x.dtype == codes.dtype == half and half != torch.float32
    ids = torch.empty(n_rows, n_groups, k, dtype=torch.long, device=x.device)
    if plan is None:
        plan = plan_for(n_rows, n_groups, n_codes, d, n_best, direct, _shared_memory(x.device))
    width = triton.cdiv(d, plan.tiles.depth) * plan.tiles.depth
    maxima = 0 if plan.one_pass else 4 * _padded(triton.cdiv(n_codes, _BLOCK))
    at_once = max(1, workspace // (n_groups * (16 + (2 * width if direct else 4 * width + 12) + 4 * d * residual + maxima)))
    at_once = at_once if at_once < plan.tiles.rows else at_once // plan.tiles.rows * plan.tiles.rows
    book = _codebook(codes, similarity, disabled, direct, width)
    n_slabs = triton.cdiv(n_rows, at_once)
    redone = torch.zeros(n_slabs * n_choices, n_groups, dtype=torch.int32, device=x.device)
    for i in range(n_slabs):
        rows, out = x[i * at_once : (i + 1) * at_once], ids[i * at_once : (i + 1) * at_once]
        rest = torch.empty(rows.shape, dtype=torch.float32, device=x.device) if residual else None
        for choice in range(n_choices):
            slab = _Slab(book, plan, rows.shape[0], n_best, redone[i * n_choices + choice])
            if direct:
                high = _aligned(rows, width)
                slab.choose(rows, high, high, None, out)
                continue
            chosen = out[:, :, choice - 1 : choice] if choice else None
            high, low, squares = _split(rows, book.centre, width, by_group=False, codes=codes, chosen=chosen, rest=rest)
            rows = rows if rest is None else rest
            slab.choose(rows, high, low, squares, out[:, :, choice:] if residual else out)
    return ids, redone
