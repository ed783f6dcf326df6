"""The peers: the same snap, written in the ways that people write it. None of them knows anything of ours but the definition.

Each is built for one case and its codes, and then called with inputs; it returns vectors and ids, or None for what it does not compute.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tl_codebook.benchmarks.cases import Case
from tl_codebook.snap import definition, snap

__all__ = ["PEERS", "Built", "Peer", "plain_eager"]

Snap = Callable[[Tensor], tuple[Tensor | None, Tensor | None]]

_CHUNK = 512
"""Rows whose scores the GEMM alone holds at once on a CPU."""
_SCORES_OF_DEFINITION = 2**24
"""Scores that the definition holds at once on a CPU; it would otherwise need more memory than most machines have."""


@dataclass(frozen=True)
class Built:
    """A peer made ready for a case."""

    snap: Snap
    note: str | None = None


@dataclass(frozen=True)
class Peer:
    """A way to snap: what it is, how to make it ready, whether it has a gradient, and why it might not run."""

    what: str
    build: Callable[[Case, Tensor], Built]
    has_backward: bool = False
    obstacle: Callable[[Case, torch.device], str | None] = lambda case, device: None


def _ours(case: Case, codes: Tensor) -> Built:
    return Built(lambda x: snap(x, codes, case.shape.k, similarity=case.similarity, selection=case.selection, reduce=case.reduce))


def _definition(case: Case, codes: Tensor) -> Built:
    choose = definition.residual_codes if case.selection == "residual" else definition.nearest_codes
    at_once = _SCORES_OF_DEFINITION * (4 if codes.is_cuda else 1)
    n = max(1, at_once // (case.shape.n_groups * case.shape.n_codes))

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            ids = torch.cat([choose(part, codes, case.shape.k, case.similarity) for part in x.split(n)])
        return definition.decode(ids, codes, case.reduce).to(codes.dtype), ids

    return Built(run)


def plain_eager(x: Tensor, codes: Tensor, k: int, similarity: str, selection: str) -> tuple[Tensor, Tensor]:
    """Snap in a dozen lines: one batched product over the groups, norms, topk, gather, mean."""
    groups = torch.arange(codes.shape[0], device=codes.device).view(-1, 1, 1)
    rest = x.transpose(0, 1)

    def scores(y: Tensor) -> Tensor:
        products = torch.bmm(y, codes.transpose(1, 2))
        if similarity == "inner_product":
            return products / codes.norm(dim=-1).unsqueeze(1)
        return products - codes.square().sum(-1).unsqueeze(1) / 2

    if selection == "nearest":
        ids = scores(rest).topk(k, dim=-1).indices
        return codes[groups, ids].mean(2).transpose(0, 1), ids.transpose(0, 1)
    chosen, total = [], torch.zeros_like(rest)
    for _ in range(k):
        chosen.append(scores(rest).argmax(-1, keepdim=True))
        code = codes[groups, chosen[-1]].squeeze(2)
        rest, total = rest - code, total + code
    return total.transpose(0, 1), torch.cat(chosen, -1).transpose(0, 1)


def _eager(case: Case, codes: Tensor) -> Built:
    return Built(lambda x: plain_eager(x, codes, case.shape.k, case.similarity, case.selection))


def _eager_tf32(case: Case, codes: Tensor) -> Built:
    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            return plain_eager(x, codes, case.shape.k, case.similarity, case.selection)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    return Built(run)


def _no_tf32(case: Case, device: torch.device) -> str | None:
    return None if device.type == "cuda" and case.dtype == "float32" else "TF32 exists on GPUs, for float32"


def _compiled(case: Case, codes: Tensor) -> Built:
    torch._dynamo.reset()
    compiled = torch.compile(plain_eager, dynamic=False)
    return Built(lambda x: compiled(x, codes, case.shape.k, case.similarity, case.selection))


def _paper(case: Case, codes: Tensor) -> Built:
    """Follow the arithmetic of the original library: one group at a time, all scores, norms divided out, topk, gather, sum / k."""
    k = case.shape.k

    def one_group(x: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        if case.similarity == "inner_product":
            logits = torch.matmul(x, table.T) / torch.linalg.vector_norm(table, dim=-1).reshape(1, 1, -1)
        else:
            logits = -torch.cdist(x, table)
        ids = logits.topk(k, dim=-1).indices
        out: Tensor = functional.embedding(ids, table).sum(-2) / k
        return out if torch.is_grad_enabled() else out.detach().clone(), ids  # the copy is the original's

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        parts = [one_group(x[None, :, g], codes[g]) for g in range(codes.shape[0])]
        return torch.cat([out for out, _ in parts]).transpose(0, 1), torch.cat([ids for _, ids in parts]).transpose(0, 1)

    return Built(run)


def _nearest_only(case: Case, device: torch.device) -> str | None:
    return "it has no greedy pursuit" if case.selection == "residual" else None


def _faiss(case: Case, codes: Tensor) -> Built:
    """Search with faiss, exactly; one search a group, codes handed over anew in each call, as the other peers read them anew."""
    import faiss

    k, on_gpu = case.shape.k, codes.is_cuda
    metric = faiss.METRIC_INNER_PRODUCT if case.similarity == "inner_product" else faiss.METRIC_L2
    resources = faiss.StandardGpuResources() if on_gpu else None
    if on_gpu:
        import faiss.contrib.torch_utils
    else:
        faiss.omp_set_num_threads(torch.get_num_threads())
    offsets = torch.arange(codes.shape[0], device=codes.device)[:, None] * codes.shape[1]

    def search(x: Tensor, table: Tensor) -> Tensor:
        if on_gpu:
            return torch.as_tensor(faiss.knn_gpu(resources, x.contiguous(), table.contiguous(), k, metric=metric)[1])
        return torch.from_numpy(faiss.knn(x.contiguous().numpy(), table.contiguous().numpy(), k, metric=metric)[1])

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        tables = codes / codes.norm(dim=-1, keepdim=True) if case.similarity == "inner_product" else codes
        ids = torch.stack([search(x[:, g], tables[g]) for g in range(codes.shape[0])], 1)
        out = functional.embedding_bag((ids + offsets).flatten(0, 1), codes.flatten(0, 1), mode="mean")
        return out.view_as(x), ids

    return Built(run)


def _no_faiss(case: Case, device: torch.device) -> str | None:
    if importlib.util.find_spec("faiss") is None:
        return "faiss is not installed"
    if case.dtype != "float32":
        return "faiss searches float32"
    if device.type == "cuda":
        import faiss

        if not hasattr(faiss, "knn_gpu") or not hasattr(faiss, "StandardGpuResources"):
            return "this faiss is built without GPU support"
    return _nearest_only(case, device)


def _gemm(case: Case, codes: Tensor) -> Built:
    """Multiply and throw away: the scores in chunks of rows into one reused buffer, the fastest of three layouts."""
    if not codes.is_cuda:
        codes = codes.float()  # scores are fp32 whatever the dtype, and half precision may be slower on a CPU
    n_codes, device, n_groups = codes.shape[1], codes.device, codes.shape[0]
    columns = codes.transpose(1, 2).contiguous()
    rows = max(_CHUNK, 2**29 // (n_groups * n_codes)) if codes.is_cuda else _CHUNK
    layouts: dict[str, Callable[[Tensor, int, Tensor], object]] = {
        "x @ codes.T": lambda x, g, out: torch.mm(x, codes[g].T, out=out),
        "x @ columns": lambda x, g, out: torch.mm(x, columns[g], out=out),
        "codes @ x.T": lambda x, g, out: torch.mm(codes[g], x.T, out=out.view(n_codes, -1)),
    }

    def make(name: str) -> Snap:
        buffer = torch.empty(0, dtype=codes.dtype, device=device)

        def run(x: Tensor) -> tuple[None, None]:
            nonlocal buffer
            x = x.to(codes.dtype)
            need = min(rows, x.shape[0]) * n_codes
            if buffer.numel() < need:
                buffer = torch.empty(need, dtype=codes.dtype, device=device)
            for g in range(n_groups):
                for part in x[:, g].split(rows):
                    layouts[name](part, g, buffer[: part.shape[0] * n_codes].view(-1, n_codes))
            return None, None

        return run

    trial, seconds = case.tensors(device)[0][0], {}
    for name in layouts:
        call, times = make(name), []
        for _ in range(3):
            if codes.is_cuda:
                torch.cuda.synchronize()
            started = time.perf_counter()
            call(trial)
            if codes.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        seconds[name] = min(times)
    best = min(seconds, key=seconds.__getitem__)
    return Built(make(best), best)


PEERS: dict[str, Peer] = {
    "ours": Peer("tl_codebook.snap", _ours, has_backward=True),
    "gemm": Peer("the fp32 scores alone, in chunks of 512 rows into a reused buffer: the floor", _gemm),
    "definition": Peer("snap/definition.py, all scores, in chunks of rows", _definition, has_backward=True),
    "paper": Peer("the original library's arithmetic, a loop over heads", _paper, has_backward=True, obstacle=_nearest_only),
    "eager": Peer("bmm over groups, norms, topk, gather, mean", _eager, has_backward=True),
    "eager_tf32": Peer("the same with TF32 products", _eager_tf32, has_backward=True, obstacle=_no_tf32),
    "compile": Peer("the same through torch.compile", _compiled, has_backward=True),
    "faiss": Peer("faiss, exact search", _faiss, obstacle=_no_faiss),
}
