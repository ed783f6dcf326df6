"""The snap as operators of torch: registration, fake tensors, compilation, autocast, inference mode."""

import logging
import shutil

import pytest
import torch
from jaxtyping import config
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.unit.test_snap import BOTH, SELECTIONS, normal
from tl_codebook import Codebook, CodebookConfig
from tl_codebook.snap import decode, select, snap

EACH = pytest.mark.parametrize("selection", SELECTIONS)
REDUCE = pytest.mark.parametrize("reduce", ["sum", "mean"])
OPS = torch.ops.tl_codebook


@pytest.fixture
def fresh_compiler():
    """Start from nothing compiled, and without the shape checks of the tests, which Dynamo would have to trace."""
    config.update("jaxtyping_disable", True)
    logging.getLogger("torch.__trace").setLevel(logging.CRITICAL)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    config.update("jaxtyping_disable", False)


def values(n_rows=40, d_group=5, n_codes=30, dtype=torch.float32):
    return normal(n_rows, 2, d_group, dtype=dtype), normal(2, n_codes, d_group, seed=1, dtype=dtype)


def some_ids():
    return torch.randint(-2, 30, (40, 2, 3), generator=torch.Generator().manual_seed(5))


# --- What torch checks of an operator: schema, autograd, fake tensors, dynamic shapes


@EACH
@pytest.mark.parametrize("masked", [False, True])
def test_choose_is_a_proper_operator(selection, masked):
    x, codes = values()
    disabled = torch.rand(1, 2, 30, generator=torch.Generator().manual_seed(2)) < 0.5 if masked else None
    torch.library.opcheck(OPS.choose.default, (x, codes, 3, "euclidean", selection, disabled))


@BOTH
@EACH
@REDUCE
def test_snap_is_a_proper_operator(similarity, selection, reduce):
    x, codes = values()
    torch.library.opcheck(OPS.snap.default, (x, codes.requires_grad_(), 3, similarity, selection, reduce, None))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_snap_is_a_proper_operator_in_other_dtypes(dtype):
    x, codes = values(dtype=dtype)
    torch.library.opcheck(OPS.snap.default, (x, codes.requires_grad_(), 2, "euclidean", "residual", "sum", None))
    torch.library.opcheck(OPS.snap.default, (x, codes.detach(), 1, "inner_product", "nearest", "mean", None))


@REDUCE
def test_decode_is_a_proper_operator(reduce):
    _, codes = values()
    torch.library.opcheck(OPS.decode.default, (some_ids(), codes.requires_grad_(), reduce))


@REDUCE
def test_decode_backward_is_a_proper_operator(reduce):
    torch.library.opcheck(OPS.decode_backward.default, (normal(40, 2, 5).requires_grad_(), some_ids(), 30, reduce))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@EACH
def test_fake_tensors_have_the_shapes_and_dtypes_of_real_ones(dtype, selection, unchecked):
    x, codes = normal(2, 7, 2, 5, dtype=torch.float32), normal(2, 30, 5, seed=1, dtype=dtype)
    if dtype == torch.float64:
        x = x.double()
    out, ids = snap(x, codes, 3, selection=selection)
    with FakeTensorMode() as mode:
        fake_x, fake_codes = mode.from_tensor(x), mode.from_tensor(codes)
        fake_out, fake_ids = snap(fake_x, fake_codes, 3, selection=selection)
        chosen = select(fake_x, fake_codes, 3, selection=selection)
        decoded = decode(chosen, fake_codes)
    for fake, real in ((fake_out, out), (fake_ids, ids), (chosen, ids), (decoded, out)):
        assert (fake.shape, fake.dtype, fake.device, fake.stride()) == (real.shape, real.dtype, real.device, real.stride())


# --- Compilation


def loss(x, codes, k, selection, reduce):
    out, ids = snap(x, codes, k, selection=selection, reduce=reduce)
    again = decode(select(x * 2, codes, k, selection=selection), codes, reduce)
    return (out.sin() + again.square()).sum() + 0.0 * ids.sum(), ids


@pytest.mark.parametrize(("selection", "k", "reduce"), [("nearest", 1, "mean"), ("nearest", 4, "mean"), ("residual", 3, "sum")])
def test_compiled_without_a_graph_break_it_is_what_it_is_eager(selection, k, reduce, fresh_compiler):
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for n_rows in (40, 23, 11):  # from the second on, shapes are symbols
        results = []
        for function in (loss, compiled):
            x, codes = (tensor.requires_grad_() for tensor in values(n_rows))
            total, ids = function(x, codes, k, selection, reduce)
            total.backward()
            results.append((total, ids, x.grad, codes.grad))
        for eager, fast in zip(*results, strict=True):
            torch.testing.assert_close(fast, eager)
        assert torch.equal(results[0][1], results[1][1])
        assert results[1][3].any()


def test_compiled_with_shapes_unknown_from_the_start(fresh_compiler):
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for n_rows, d_group, n_codes in ((40, 5, 30), (7, 6, 70)):
        x, codes = values(n_rows, d_group, n_codes)
        assert torch.equal(compiled(x, codes, 2, "residual", "sum")[1], loss(x, codes, 2, "residual", "sum")[1])


@pytest.mark.slow
def test_compiled_to_machine_code(fresh_compiler):
    if not (shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")):
        pytest.skip("no C++ compiler on this machine")
    compiled = torch.compile(loss, fullgraph=True)
    grads = []
    for function in (loss, compiled):
        x, codes = (tensor.requires_grad_() for tensor in values())
        total, _ = function(x, codes, 3, "residual", "sum")
        total.backward()
        grads.append((total.detach(), x.grad, codes.grad))
    for eager, fast in zip(*grads, strict=True):
        torch.testing.assert_close(fast, eager)


def test_a_compiled_codebook(fresh_compiler):
    config = CodebookConfig.paper(30, k=2, n_groups=2)
    grads = []
    for compile_it in (False, True):
        torch.manual_seed(0)
        book = Codebook(10, config).eval()  # the terms of training are compiled in test_codebook_inputs
        x = normal(2, 9, 10, seed=3).requires_grad_()
        forward = torch.compile(book, fullgraph=True, backend="aot_eager") if compile_it else book
        out = forward(x)
        (out.sin().sum()).backward()
        grads.append((out.detach(), x.grad, book.codes.grad, book.norm_weight.grad))
    for eager, fast in zip(*grads, strict=True):
        torch.testing.assert_close(fast, eager)
    assert grads[1][2].any()


# --- Modes


@BOTH
@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_autocast_changes_nothing(similarity, selection, dtype):
    results = []
    for enabled in (False, True):
        x, codes = (tensor.requires_grad_() for tensor in values(200, 64, 300, dtype))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out, ids = snap(x, codes, 4, similarity=similarity, selection=selection)
            assert out.dtype == dtype
            again = decode(ids, codes, "mean")
            assert again.dtype == dtype
            weights = normal(200, 2, 64, seed=9, dtype=dtype)
            total = (out * weights).sum() + (again * weights).sum()
        total.backward()
        results.append((ids, out.detach(), x.grad, codes.grad))
    assert results[1][3].dtype == dtype
    for off, on in zip(*results, strict=True):
        assert torch.equal(off, on)


def test_autocast_around_the_backward_pass_changes_nothing():
    grads = []
    for enabled in (False, True):
        x, codes = (tensor.requires_grad_() for tensor in values(200, 16, 30))
        out, _ = snap(x, codes, 4)
        total = (out * normal(200, 2, 16, seed=9)).sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            total.backward()
        grads.append(codes.grad)
    assert torch.equal(*grads)


@BOTH
@EACH
@pytest.mark.parametrize("d_group", [5, 64, 300])
@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("inference_first", [True, False])
def test_inference_mode_and_back(similarity, selection, d_group, n_threads, inference_first, threads):
    """Memory that is kept between calls was allocated in one mode and is written to in the other."""
    threads(n_threads)
    modes = [inference_first, not inference_first, inference_first, not inference_first]
    results = []
    for size, inference in enumerate(modes, start=1):
        x, codes = values(400, d_group, 100)
        disabled = torch.zeros(1, 2, 100, dtype=torch.bool)
        with torch.inference_mode(inference):
            codes = codes.clone()
            if not inference:
                codes.requires_grad_()
            out, ids = snap(x, codes, 3, similarity=similarity, selection=selection)
            select(normal(150 * size, 2, d_group), codes, 2, similarity=similarity, selection=selection, disabled=disabled)
            decode(ids, codes)
        if not inference:
            out.sum().backward()
            assert codes.grad.sum() == pytest.approx(400 * 2 * d_group * 3)
        results.append(ids.clone())
    assert all(torch.equal(ids, results[0]) for ids in results)


def test_tensors_of_inference_mode_may_be_chosen_for_outside_of_it():
    with torch.inference_mode():
        x, codes = values()
    expected = snap(*values(), 3)
    out, ids = snap(x, codes, 3)
    assert torch.equal(out, expected[0])
    assert torch.equal(ids, expected[1])


@EACH
def test_what_is_returned_is_not_memory_that_the_next_call_writes_to(selection):
    x, codes = values(100, 16, 200)
    results = [snap(x, codes, 4, selection=selection), (select(x, codes, 1, selection=selection),)]
    kept = [[tensor.clone() for tensor in tensors] for tensors in results]
    for k in (1, 4):
        snap(-x, codes.flip(1), k, selection=selection)
        select(-x, codes.flip(1), k, selection=selection)
    for tensors, copies in zip(results, kept, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))


def test_neither_ids_nor_choosing_have_a_gradient():
    x, codes = (tensor.requires_grad_() for tensor in values())
    out, ids = snap(x, codes, 3)
    assert out.requires_grad
    assert not ids.requires_grad
    assert not select(x, codes, 3).requires_grad
    out, _ = snap(x, codes, 3, through=False)
    out.sum().backward()
    assert x.grad is None
    assert codes.grad.any()
    with torch.no_grad():
        assert not snap(x, codes, 3)[0].requires_grad


def test_frozen_codes_need_no_backward(monkeypatch):
    x, codes = values()
    monkeypatch.setattr("tl_codebook.snap.gradients.codes_gradient", lambda *args: pytest.fail("nobody wants this gradient"))
    out, _ = snap(x.requires_grad_(), codes, 3)
    out.sum().backward()
    assert (x.grad == 1).all()
