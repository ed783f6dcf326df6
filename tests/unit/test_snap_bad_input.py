"""Bad input to select, snap and decode: what was given, what is true, what to do. No shape checks: what users see."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.unit.test_snap import SELECTIONS, normal
from tl_codebook.errors import ConfigError, InvalidCodeError, ShapeError
from tl_codebook.snap import decode, select, snap

pytestmark = pytest.mark.usefixtures("unchecked")

BOTH = pytest.mark.parametrize("function", [select, snap])


def values():
    return normal(4, 2, 5), normal(2, 7, 5, seed=1)


@BOTH
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("k", [0, -1, 8, True, False, 2.0, "2", None])
def test_k(function, selection, k):
    with pytest.raises(ConfigError, match=r"k=.* codes of 7 were asked for. Give a whole number, 1 <= k <= 7"):
        function(*values(), k, selection=selection)


@BOTH
@pytest.mark.parametrize(
    ("x_shape", "codes_shape"),
    [
        ((4, 2, 6), (2, 7, 5)),  # d_group
        ((4, 3, 5), (2, 7, 5)),  # group
        ((4, 1, 5), (2, 7, 5)),  # a group that would spread
        ((4, 2, 1), (2, 7, 5)),
        ((4, 5), (2, 7, 5)),
        ((5,), (1, 7, 5)),
        ((), (1, 7, 5)),
        ((4, 2, 5), (7, 5)),
        ((4, 2, 5), (1, 2, 7, 5)),
        ((4, 2, 5), (2, 5, 7)),
    ],
)
def test_shapes_that_do_not_fit(function, x_shape, codes_shape):
    with pytest.raises(ShapeError) as info:
        function(torch.ones(x_shape), torch.ones(codes_shape), 1)
    message = str(info.value)
    assert str(x_shape) in message
    assert str(codes_shape) in message
    assert "Give x [..., group d_group] and codes [group code d_group] with the same group and d_group" in message


WRONG = {
    "whole numbers": lambda t: t.long(),
    "bools": lambda t: t > 0,
    "complex": lambda t: t.to(torch.complex64),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
}


@BOTH
@pytest.mark.parametrize("fault", WRONG)
@pytest.mark.parametrize("which", ["x", "codes", "both"])
def test_what_is_no_dense_floating_point_tensor(function, fault, which):
    x, codes = values()
    if which != "codes":
        x = WRONG[fault](x)
    if which != "x":
        codes = WRONG[fault](codes)
    name = "codes" if which == "codes" else "x"
    with pytest.raises(ShapeError, match=rf"{name} is a torch.* tensor on (cpu|meta). Give dense floating-point values"):
        function(x, codes, 1)


@pytest.mark.parametrize("fault", ["complex", "meta", "sparse"])
def test_what_is_no_dense_table_of_codes_to_decode(fault):
    _, codes = values()
    with pytest.raises(ShapeError, match=r"codes.*Give"):
        decode(torch.zeros(4, 2, 3, dtype=torch.long), WRONG[fault](codes))


@BOTH
def test_two_devices(function):
    with FakeTensorMode():  # which needs no second device
        with pytest.raises(ShapeError, match=r"x is on cuda:0, the codes are on cpu. Bring them to one device"):
            function(torch.empty(4, 2, 5, device="cuda:0"), torch.empty(2, 7, 5), 1)
        with pytest.raises(ShapeError, match=r"on cuda:0 and codes .* on cpu. Give ids .* on one device"):
            decode(torch.empty(4, 2, 3, dtype=torch.long, device="cuda:0"), torch.empty(2, 7, 5))


@BOTH
@pytest.mark.parametrize("name", ["similarity", "selection"])
@pytest.mark.parametrize("value", ["cosine", "Nearest", "", None, 3])
def test_unknown_choices(function, name, value):
    known = {"similarity": r"\['euclidean', 'inner_product'\]", "selection": r"\['residual', 'nearest'\]"}[name]
    with pytest.raises(ConfigError, match=rf"{name}={value!r} is not known. Choose one of {known}"):
        function(*values(), 2, **{name: value})


@pytest.mark.parametrize("value", ["max", "Sum", "", None, 3])
def test_an_unknown_reduction(value):
    x, codes = values()
    for call in (lambda: snap(x, codes, 2, reduce=value), lambda: decode(select(x, codes, 2), codes, value)):
        with pytest.raises(ConfigError, match=rf"reduce={value!r} is not known. Choose one of \['sum', 'mean'\]"):
            call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int64])
def test_disabled_that_is_not_bool(dtype):
    with pytest.raises(ShapeError, match=rf"disabled is {dtype} on cpu. Give bools on cpu"):
        select(*values(), 2, disabled=torch.zeros(4, 2, 7, dtype=dtype))


def test_disabled_on_another_device():
    with pytest.raises(ShapeError, match=r"disabled is torch.bool on meta. Give bools on cpu"):
        select(*values(), 2, disabled=torch.zeros(4, 2, 7, dtype=torch.bool, device="meta"))


@pytest.mark.parametrize("shape", [(4, 2, 6), (4, 3, 7), (3, 2, 7), (1, 4, 2, 7), (2, 7, 1), (4, 2), (8,), (0,), (0, 2, 7)])
def test_disabled_of_another_shape(shape):
    with pytest.raises(ShapeError) as info:
        select(*values(), 2, disabled=torch.zeros(shape, dtype=torch.bool))
    assert str(shape) in str(info.value)
    assert "Give what spreads to (4, 2, 7): [..., group code]" in str(info.value)


@pytest.mark.parametrize("shape", [(), (7,), (1,), (1, 7), (2, 1), (2, 7), (1, 2, 7), (1, 1, 1), (4, 1, 1), (4, 1, 7), (4, 2, 7)])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_disabled_spreads(shape, selection):
    x, codes = values()
    disabled = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.4
    ids = select(x, codes, 2, selection=selection, disabled=disabled)
    assert torch.equal(ids, select(x, codes, 2, selection=selection, disabled=disabled.expand(4, 2, 7).contiguous()))
    assert not (disabled.expand(4, 2, 7).gather(-1, ids.clamp(min=0)) & (ids >= 0)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bool, torch.complex64])
def test_ids_that_are_not_whole_numbers(dtype):
    _, codes = values()
    with pytest.raises(InvalidCodeError, match=rf"ids are {dtype}. Give integers"):
        decode(torch.zeros(4, 2, 3, dtype=dtype), codes)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8])
def test_ids_of_any_whole_numbers(dtype):
    _, codes = values()
    ids = torch.tensor([[[0, 6], [1, 2]]])
    assert torch.equal(decode(ids.to(dtype), codes), decode(ids, codes))


@pytest.mark.parametrize(
    ("ids_shape", "codes_shape"), [((4, 3, 1), (2, 7, 5)), ((4, 1, 1), (2, 7, 5)), ((2,), (2, 7, 5)), ((2, 3), (7, 5))]
)
def test_ids_that_do_not_fit(ids_shape, codes_shape):
    with pytest.raises(ShapeError) as info:
        decode(torch.zeros(ids_shape, dtype=torch.long), torch.ones(codes_shape))
    message = str(info.value)
    assert str(ids_shape) in message
    assert str(codes_shape) in message
    assert "Give ids [..., group slot] and codes [group code d_group] on one device" in message


def test_ids_on_another_device():
    _, codes = values()
    with pytest.raises(ShapeError, match=r"on meta and codes .* on cpu. Give ids .* on one device"):
        decode(torch.zeros(4, 2, 3, dtype=torch.long, device="meta"), codes)


# --- What looks wrong and is not


@pytest.mark.parametrize("selection", SELECTIONS)
def test_nothing_to_do(selection):
    _, codes = values()
    codes.requires_grad_()
    for lead in ((0,), (3, 0), (0, 3)):
        out, ids = snap(torch.empty(*lead, 2, 5), codes, 3, selection=selection)
        assert out.shape == (*lead, 2, 5)
        assert ids.shape == (*lead, 2, 3)
        assert decode(ids, codes).shape == (*lead, 2, 5)
        for shape in ((2, 7), (*(1 for _ in lead), 2, 7), (*lead, 2, 7)):
            masked = select(torch.empty(*lead, 2, 5), codes, 3, selection=selection, disabled=torch.ones(shape, dtype=torch.bool))
            assert masked.shape == (*lead, 2, 3)
        (codes.grad,) = torch.autograd.grad(out.sum(), codes)
        assert (codes.grad == 0).all()


def test_no_slots_decode_to_zero():
    _, codes = values()
    for reduce in ("sum", "mean"):
        leaf = codes.clone().requires_grad_()
        out = decode(torch.empty(4, 2, 0, dtype=torch.long), leaf, reduce)
        assert torch.equal(out, torch.zeros(4, 2, 5))
        out.sum().backward()
        assert (leaf.grad == 0).all()


@pytest.mark.parametrize("selection", SELECTIONS)
def test_one_vector_without_leading_axes_and_one_code(selection):
    x, codes = values()
    out, ids = snap(x[0], codes, 2, selection=selection)
    assert ids.shape == (2, 2)
    assert torch.equal(out, snap(x, codes, 2, selection=selection)[0][0])
    assert (select(x, codes[:, :1], 1, selection=selection) == 0).all()


def test_non_contiguous_tensors():
    x, codes = values()
    expected = snap(x, codes, 3)
    strided = torch.stack([x, -x], -1)[..., 0], codes.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert not any(tensor.is_contiguous() for tensor in strided)
    assert all(torch.equal(a, b) for a, b in zip(snap(*strided, 3), expected, strict=True))
    ids = torch.stack([expected[1], expected[1]], -1)[..., 1]
    assert torch.equal(decode(ids, strided[1]), expected[0])
    spread = normal(1, 2, 5).expand(6, 2, 5)
    assert len(select(spread, codes, 3).unique(dim=0)) == 1
