"""The gradient of a snap: rotated with the vector, or of an output that goes only part of the way to the codes."""

import copy
import math

import pytest
import torch

from tests.unit.test_snap import normal
from tl_codebook import Codebook, CodebookConfig
from tl_codebook.errors import ConfigError
from tl_codebook.snap import straight_through, through
from tl_codebook.training.schedule import strength_at_step

ESTIMATOR = pytest.mark.parametrize("estimator", ["straight_through", "rotation"])


def rotation(y, q):
    """The rotation in the plane of two vectors that takes the direction of the first to that of the second, as a matrix."""
    a, b = y / y.norm(), q / q.norm()
    across = b - (a @ b) * a
    across = across / across.norm()
    cosine = a @ b
    sine = b @ across
    plane = torch.stack([a, across], dim=1)
    turn = torch.stack([torch.stack([cosine, -sine]), torch.stack([sine, cosine])])
    return torch.eye(len(y), dtype=y.dtype) + plane @ (turn - torch.eye(2, dtype=y.dtype)) @ plane.T


def rotated(y, q, strength=1.0):
    """y + strength * (q - y) with q written as (|q| / |y|) R y, |q| / |y| and R constant: what autograd makes of the definition."""
    rows = [
        (q_row.norm() / y_row.norm()).detach() * rotation(y_row.detach(), q_row.detach()) @ y_row
        for y_row, q_row in zip(y.flatten(0, -2), q.flatten(0, -2), strict=True)
    ]
    return torch.lerp(y, torch.stack(rows).view_as(y), strength)


def leaves(*shape, dtype=torch.float64):
    y, q = normal(*shape, dtype=dtype).requires_grad_(), normal(*shape, seed=1, dtype=dtype).requires_grad_()
    return y, q, normal(*shape, seed=2, dtype=dtype)


# --- rotation ---


@pytest.mark.parametrize("shape", [(7, 5), (3, 2, 4), (4, 2)])
@pytest.mark.parametrize("strength", [1.0, 0.25])
def test_the_gradient_is_that_of_the_rotation(shape, strength):
    y, q, upstream = leaves(*shape)
    through(y, q, estimator="rotation", strength=strength).backward(upstream)
    definition = rotated(y, q, strength)
    torch.testing.assert_close(definition, torch.lerp(y, q, strength))
    torch.testing.assert_close(y.grad, torch.autograd.grad(definition, y, upstream)[0], rtol=1e-9, atol=1e-12)
    assert torch.equal(q.grad, strength * upstream)


def test_the_gradient_keeps_its_length_and_its_angle():
    """What a rotation is for: the gradient lies to the input as it lay to the codes, scaled by |q| / |y|."""
    y, q, upstream = leaves(50, 6)
    through(y, q, estimator="rotation").backward(upstream)
    stretch = q.norm(dim=-1) / y.norm(dim=-1)
    torch.testing.assert_close(y.grad.norm(dim=-1), stretch * upstream.norm(dim=-1))
    cosine = torch.nn.functional.cosine_similarity
    torch.testing.assert_close(cosine(y.grad, y), cosine(upstream, q))
    assert (cosine(upstream, q) - cosine(upstream, y)).abs().min() > 1e-3  # the identity would not keep it


def test_forward_it_is_the_straight_through_estimator():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        y, q, _ = leaves(6, 5, dtype=dtype)
        out = through(y, q, estimator="rotation")
        assert out.dtype == dtype
        assert torch.equal(out, straight_through(y, q))
        assert torch.equal(out, q)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_it_computes_in_fp32(dtype):
    y, q, upstream = leaves(9, 64, dtype=dtype)
    through(y, q, estimator="rotation").backward(upstream)
    exact = y.detach().double().requires_grad_()
    through(exact, q.detach().double(), estimator="rotation").backward(upstream.double())
    assert y.grad.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else float(torch.finfo(dtype).eps)
    torch.testing.assert_close(y.grad.double(), exact.grad, rtol=tolerance, atol=1e-4 if dtype == torch.float16 else 1e-5)


NO_ROTATION = {
    "no input": ([0.0, 0.0, 0.0], [1.0, 2.0, 3.0]),
    "no codes": ([1.0, 2.0, 3.0], [0.0, 0.0, 0.0]),
    "neither": ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0]),
    "the other way": ([1.0, -2.0, 3.0], [-1.0, 2.0, -3.0]),
    "the other way, longer": ([1.0, -2.0, 3.0], [-3.0, 6.0, -9.0]),
    "almost the other way": ([1.0, 0.0, 0.0], [-1.0, 1e-6, 0.0]),
    "too short to be squared": ([1e-30, 0.0, 1e-30], [1.0, 2.0, 3.0]),
    "too long to be squared": ([1e30, 0.0, 1e30], [1.0, 2.0, 3.0]),
    "a stretch beyond the numbers": ([1e-9, 0.0, 0.0], [0.0, 2.0, 3.0]),
    "NaN": ([math.nan, 1.0, 2.0], [math.nan] * 3),
    "Inf": ([math.inf, 1.0, 2.0], [1.0, 2.0, 3.0]),
}


@pytest.mark.parametrize("case", NO_ROTATION)
def test_where_there_is_no_rotation_the_gradient_passes_straight_through(case):
    """Only in the rows concerned."""
    fine, upstream = normal(3), normal(2, 3, seed=2)
    y = torch.stack([torch.tensor(NO_ROTATION[case][0]), fine]).requires_grad_()
    q = torch.stack([torch.tensor(NO_ROTATION[case][1]), 2 * fine.flip(0)])
    through(y, q, estimator="rotation").backward(upstream)
    assert torch.equal(y.grad[0], upstream[0])
    assert y.grad.isfinite().all()
    assert not torch.allclose(y.grad[1], upstream[1])


def test_one_dimension_has_two_directions():
    y = torch.tensor([[2.0], [-2.0], [2.0]], requires_grad=True)
    through(y, torch.tensor([[3.0], [-1.0], [-1.0]]), estimator="rotation").backward(torch.ones(3, 1))
    torch.testing.assert_close(y.grad, torch.tensor([[1.5], [0.5], [1.0]]))


def test_the_rotation_is_a_constant_in_a_second_derivative_too():
    y, q, _ = leaves(5, 4)

    def second(form):
        (first,) = torch.autograd.grad(form(y, q).pow(3).sum(), y, create_graph=True)
        return torch.autograd.grad(first.square().sum(), y)[0]

    torch.testing.assert_close(second(lambda y, q: through(y, q.detach(), estimator="rotation")), second(rotated))
    zero = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(
        through(zero, torch.ones_like(zero).detach(), estimator="rotation").pow(3).sum(), zero, create_graph=True
    )
    assert torch.autograd.grad(first.sum(), zero)[0].isfinite().all()


@ESTIMATOR
def test_the_codes_can_be_spared(estimator):
    y, q, upstream = leaves(4, 3)
    through(y, q, to_codes=False, estimator=estimator).backward(upstream)
    assert q.grad is None
    assert y.grad is not None


def test_codes_move_under_an_input_that_does_not():
    y, q, upstream = leaves(4, 3)
    through(y.detach(), q, estimator="rotation").backward(upstream)
    assert torch.equal(q.grad, upstream)


def test_an_estimator_that_is_not_known():
    book = Codebook(4, CodebookConfig(3))
    book.estimator = "gumbel"
    with pytest.raises(ConfigError, match=r"estimator='gumbel' is not known\. Choose one of \['straight_through', 'rotation'\]"):
        book(torch.zeros(2, 4))


# --- in a codebook ---


def grouped_book(**settings):
    book = Codebook(8, CodebookConfig(9, k=2, n_groups=2), **settings).double().train()
    with torch.no_grad():
        book.codes.copy_(normal(2, 9, 4, seed=3, dtype=torch.float64))
    return book


def test_every_group_has_its_own_rotation():
    book, x = grouped_book(), normal(5, 8, dtype=torch.float64).requires_grad_()
    plain = book(x)
    upstream = normal(5, 8, seed=2, dtype=torch.float64)
    plain.backward(upstream)
    moved = book.codes.grad.clone()
    x.grad = book.codes.grad = None
    book.estimator = "rotation"
    out = book(x)
    out.backward(upstream)
    assert torch.equal(out, plain)
    assert torch.equal(book.codes.grad, moved)
    q = plain.detach().view(5, 2, 4)
    expected = torch.autograd.grad(rotated(book.grouped(x), q), x, upstream.view(5, 2, 4))[0]
    torch.testing.assert_close(x.grad, expected)
    assert not torch.allclose(x.grad, upstream)


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_nan_goes_through_a_rotation_as_nan(strength):
    book, x = grouped_book(on_nonfinite="propagate"), normal(3, 8, dtype=torch.float64)
    x[1, 2] = torch.nan
    x[2, 5] = torch.inf
    x.requires_grad_()
    book.estimator, book.strength = "rotation", strength
    out = book(x)
    assert out[1, :4].isnan().all()
    assert out[2, 4:].isnan().all()
    assert int(out.isfinite().sum()) == 3 * 8 - 8
    out.nansum().backward()
    assert x.grad.isfinite().all()
    assert book.codes.grad.isfinite().all()


@ESTIMATOR
@pytest.mark.parametrize("strength", [0.0, 0.25, 0.75])
def test_part_of_the_way(estimator, strength):
    book, x = grouped_book(), normal(5, 8, dtype=torch.float64).requires_grad_()
    upstream = normal(5, 8, seed=2, dtype=torch.float64)
    book.estimator = estimator
    whole = book(x)
    terms = book.terms
    whole.backward(upstream)
    to_x, to_codes = x.grad.clone(), book.codes.grad.clone()
    x.grad = book.codes.grad = None
    book.strength = strength
    out = book(x)
    torch.testing.assert_close(out, x + strength * (whole - x))
    assert strength > 0 or torch.equal(out, x)
    out.backward(upstream)
    torch.testing.assert_close(x.grad, (1 - strength) * upstream + strength * to_x)
    torch.testing.assert_close(book.codes.grad, strength * to_codes)
    assert torch.equal(book.terms.reconstruction, terms.reconstruction)
    assert torch.equal(book.terms.commitment, terms.commitment)
    assert torch.equal(book.encode(x), grouped_book().encode(x))
    with torch.no_grad():
        assert torch.equal(book(x), out)


@ESTIMATOR
def test_all_of_the_way_is_the_codes_bit_for_bit(estimator):
    y, q, upstream = leaves(40, 6, dtype=torch.float32)
    out = through(y, q, estimator=estimator, strength=1.0)
    assert torch.equal(out, q)
    out.backward(upstream)
    assert torch.equal(q.grad, upstream)
    with torch.no_grad():
        assert through(y, q, estimator=estimator, strength=1.0) is q


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_part_of_the_way_in_half_precision(dtype):
    y, q, upstream = leaves(4, 6, dtype=dtype)
    out = through(y, q, strength=0.5)
    assert out.dtype == dtype
    out.backward(upstream)
    torch.testing.assert_close(y.grad, upstream)
    torch.testing.assert_close(q.grad, upstream / 2)


def test_an_output_can_be_edited_in_place():
    """Hooks do, and the gradient of what they leave is right."""
    y, q, upstream = leaves(4, 6)
    for strength in (1.0, 0.5):
        y.grad = None
        out = through(y, q, estimator="rotation", strength=strength)
        out[0] = 0
        out.backward(upstream)
        assert (y.grad[0] == 0).all()
        assert (y.grad[1:] != 0).all()


def test_neither_is_part_of_a_codebook_that_is_written():
    book = grouped_book()
    book.estimator, book.strength = "rotation", 0.5
    assert book.state_dict().keys() == grouped_book().state_dict().keys()
    assert book.config == grouped_book().config
    twin = copy.deepcopy(book)
    assert (twin.estimator, twin.strength) == ("rotation", 0.5)


def test_the_ramp_is_a_line_that_ends():
    assert [strength_at_step(step, 4) for step in range(7)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert strength_at_step(0, 0) == 1.0
    assert [strength_at_step(step, 1) for step in range(3)] == [0.0, 1.0, 1.0]
