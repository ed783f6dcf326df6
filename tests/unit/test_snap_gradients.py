"""Decoding with gradients, and the straight-through estimator."""

import pytest
import torch

from tests.unit.test_snap import normal
from tl_codebook.snap import decode, definition, select, snap, straight_through

REDUCE = pytest.mark.parametrize("reduce", ["sum", "mean"])


def some_ids(*shape, n_codes, lowest=0, seed=5):
    return torch.randint(lowest, n_codes, shape, generator=torch.Generator().manual_seed(seed))


def looped(ids, codes, reduce):
    out = torch.zeros(*ids.shape[:-1], codes.shape[-1], dtype=codes.dtype)
    for *lead, group in torch.cartesian_prod(*(torch.arange(n) for n in ids.shape[:-1])).tolist():
        slots = ids[(*lead, group)].tolist()
        total = sum((codes[group, code] for code in slots if code >= 0), torch.zeros(codes.shape[-1], dtype=codes.dtype))
        counted = sum(code > -2 for code in slots)
        out[(*lead, group)] = total / max(1, counted) if reduce == "mean" else total
    return out


@REDUCE
@pytest.mark.parametrize("lowest", [0, -1, -2])
def test_decoding_equals_a_loop(reduce, lowest):
    codes = normal(3, 6, 4)
    ids = some_ids(2, 5, 3, 4, n_codes=6, lowest=lowest)
    expected = looped(ids, codes, reduce)
    torch.testing.assert_close(decode(ids, codes, reduce), expected)
    torch.testing.assert_close(definition.decode(ids, codes, reduce), expected)


@pytest.mark.parametrize("form", [decode, definition.decode])
def test_empty_slots_and_no_slots(form):
    codes = torch.tensor([[[6.0, 12.0], [3.0, 0.0]]])
    ids = torch.tensor([[[0, 1]], [[0, -1]], [[0, -2]], [[-1, -1]], [[-2, -2]], [[-1, -2]]])
    assert form(ids, codes, "sum").squeeze(1).tolist() == [[9, 12], [6, 12], [6, 12], [0, 0], [0, 0], [0, 0]]
    assert form(ids, codes, "mean").squeeze(1).tolist() == [[4.5, 6], [3, 6], [6, 12], [0, 0], [0, 0], [0, 0]]


@REDUCE
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 3, 1), (2, 5, 3, 4), (0, 3, 2), (4, 0, 3, 2)])
def test_decode_is_the_definition(reduce, dtype, shape):
    codes = normal(shape[-2], 6, 5, dtype=dtype)
    ids = some_ids(*shape, n_codes=6, lowest=-2)
    upstream = normal(*shape[:-1], 5, seed=2, dtype=dtype)
    results = []
    for form in (definition.decode, decode):
        leaf = codes.clone().requires_grad_()
        out = form(ids, leaf, reduce)
        out.backward(upstream)
        assert out.dtype == leaf.grad.dtype == dtype
        results.append((out.detach(), leaf.grad))
    tolerance = {torch.float16: 4e-3, torch.bfloat16: 3e-2}.get(dtype)
    for slow, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, **({} if tolerance is None else {"rtol": tolerance, "atol": tolerance}))


@REDUCE
def test_the_gradient_of_decoding_by_finite_differences(reduce):
    codes = normal(2, 4, 3, dtype=torch.float64).requires_grad_()
    ids = some_ids(3, 2, 3, n_codes=4, lowest=-2)
    assert torch.autograd.gradcheck(lambda c: decode(ids, c, reduce), (codes,))


@REDUCE
def test_only_chosen_codes_get_a_gradient(reduce):
    codes = normal(2, 6, 4).requires_grad_()
    ids = torch.tensor([[[1, 1], [5, -1]], [[3, -2], [5, 0]]])
    decode(ids, codes, reduce).sum().backward()
    per_code = codes.grad[..., 0].tolist()
    if reduce == "sum":
        assert per_code == [[0, 2, 0, 1, 0, 0], [1, 0, 0, 0, 0, 2]]
    else:
        assert per_code == [[0, 1, 0, 1, 0, 0], [0.5, 0, 0, 0, 0, 1]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_codes_get_the_whole_gradient(dtype):
    # Added up one by one in bf16, ones stop counting at 256.
    codes = torch.ones(1, 4, 2, dtype=dtype, requires_grad=True)
    decode(torch.zeros(8192, 1, 1, dtype=torch.long), codes, "sum").sum().backward()
    assert codes.grad[0, 0].tolist() == [8192, 8192]


def test_straight_through_is_exactly_the_codes():
    y = normal(100, 2, 5).mul(1e4).requires_grad_()
    q = normal(100, 2, 5, seed=1).mul(1e-4)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        assert torch.equal(straight_through(y.to(dtype), q.to(dtype)), q.to(dtype))
    with torch.no_grad():
        assert straight_through(y, q) is q


def test_straight_through_passes_the_gradient_to_both():
    y, q, upstream = normal(4, 5).requires_grad_(), normal(4, 5, seed=1).requires_grad_(), normal(4, 5, seed=2)
    straight_through(y, q).backward(upstream)
    assert torch.equal(y.grad, upstream)
    assert torch.equal(q.grad, upstream)


def test_straight_through_can_spare_the_codes():
    y, q, upstream = normal(4, 5).requires_grad_(), normal(4, 5, seed=1).requires_grad_(), normal(4, 5, seed=2)
    out = straight_through(y, q, to_codes=False)
    assert torch.equal(out, q)
    out.backward(upstream)
    assert torch.equal(y.grad, upstream)
    assert q.grad is None


@pytest.mark.parametrize(("selection", "reduce"), [("nearest", "mean"), ("nearest", "sum"), ("residual", "sum")])
def test_the_gradient_of_snap_is_that_of_its_surrogate(selection, reduce):
    """With the ids held, the surrogate is decode(ids, codes) + x - x0; its finite differences are what backward gives."""
    x = normal(3, 2, 4, dtype=torch.float64).requires_grad_()
    codes = normal(2, 6, 4, seed=1, dtype=torch.float64).requires_grad_()
    ids = select(x, codes, 3, selection=selection)
    start = x.detach().clone()

    def surrogate(x, codes):
        return (decode(ids, codes, reduce) + x - start).sin().sum()

    out, _ = snap(x, codes, 3, selection=selection, reduce=reduce)
    grads = torch.autograd.grad(out.sin().sum(), (x, codes))
    for wrt, grad in ((0, grads[0]), (1, grads[1])):
        numeric = torch.zeros_like(grad)
        for index in torch.cartesian_prod(*(torch.arange(n) for n in grad.shape)).tolist():
            values = []
            for step in (1e-6, -1e-6):
                moved = [x.detach().clone(), codes.detach().clone()]
                moved[wrt][tuple(index)] += step
                values.append(surrogate(*moved))
            numeric[tuple(index)] = (values[0] - values[1]) / 2e-6
        torch.testing.assert_close(grad, numeric, rtol=1e-6, atol=1e-8)
