"""The backward pass: gradients of the codes against autograd of the definition, and what it may hold in memory."""

import threading

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.unit.test_snap import BOTH, normal
from tl_codebook import Codebook, CodebookConfig
from tl_codebook.snap import decode, definition, gradients, select, snap

REDUCE = pytest.mark.parametrize("reduce", ["sum", "mean"])


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def some_ids(*shape, n_codes, lowest=0, seed=5):
    return torch.randint(lowest, n_codes, shape, generator=torch.Generator().manual_seed(seed))


def by_autograd(upstream, ids, n_codes, reduce):
    """Return the gradient of the codes in float64."""
    codes = torch.zeros(ids.shape[1], n_codes, upstream.shape[-1], dtype=torch.float64, requires_grad=True)
    definition.decode(ids, codes, reduce).backward(upstream.double())
    return codes.grad


def assert_near(fast, upstream, ids, reduce, sums=2e-6):
    """Compare with float64: off by the rounding of the sum (relative to what was added up) and of the dtype, no more."""
    exact = by_autograd(upstream, ids, fast.shape[1], reduce)
    added_up = by_autograd(upstream.abs(), ids, fast.shape[1], reduce)
    sums = 1e-14 if fast.dtype == torch.float64 else sums
    assert ((fast.double() - exact).abs() <= sums * added_up + torch.finfo(fast.dtype).eps * exact.abs()).all()


@REDUCE
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1, 1), (50, 1, 4), (50, 3, 1), (300, 4, 8), (20, 2, 3)])
@pytest.mark.parametrize("lowest", [0, -1, -2])
@pytest.mark.parametrize("n_codes", [1, 7, 500])
def test_the_gradient_of_the_codes_is_that_of_autograd(reduce, dtype, shape, lowest, n_codes):
    ids = some_ids(*shape, n_codes=n_codes, lowest=lowest)
    upstream = normal(*shape[:2], 5, dtype=dtype)
    kept = ids.clone(), upstream.clone()
    fast = gradients.codes_gradient(upstream, ids, n_codes, reduce)
    assert fast.dtype == dtype
    assert fast.shape == (shape[1], n_codes, 5)
    assert_near(fast, upstream, ids, reduce)
    chosen = torch.zeros(shape[1], n_codes, dtype=torch.bool)
    for group in range(shape[1]):
        chosen[group, ids[:, group][ids[:, group] >= 0]] = True
    assert (fast[~chosen] == 0).all()
    assert torch.equal(ids, kept[0])
    assert torch.equal(upstream, kept[1])
    codes = normal(shape[1], n_codes, 5, seed=3, dtype=dtype).requires_grad_()
    decode(ids, codes, reduce).backward(upstream)
    assert torch.equal(codes.grad, fast)


@REDUCE
@pytest.mark.parametrize("value", [-1, -2])
def test_nothing_chosen_gives_no_gradient(reduce, value):
    ids, upstream = torch.full((6, 2, 3), value), normal(6, 2, 4)
    assert torch.equal(gradients.codes_gradient(upstream, ids, 5, reduce), torch.zeros(2, 5, 4))
    assert torch.equal(gradients.codes_gradient(upstream[:0], ids[:0], 5, reduce), torch.zeros(2, 5, 4))


@REDUCE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_code_that_fires_everywhere(reduce, dtype):
    """12 000 rows choose code 3, twice; nothing is lost on the way, and nothing reaches the others."""
    ids = torch.full((12_000, 2, 3), 3)
    ids[..., 1] = some_ids(12_000, 2, n_codes=900, lowest=-2)
    upstream = normal(12_000, 2, 4, dtype=dtype).abs()
    fast = gradients.codes_gradient(upstream, ids, 900, reduce)
    assert_near(fast, upstream, ids, reduce, sums=5e-5)  # fp32, one after the other
    assert torch.equal(fast, gradients.codes_gradient(upstream, ids, 900, reduce))


@REDUCE
def test_strided_gradients(reduce):
    ids, upstream = some_ids(40, 3, 4, n_codes=9, lowest=-2), normal(40, 3, 6)
    expected = gradients.codes_gradient(upstream, ids, 9, reduce)
    strided = upstream.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert torch.equal(gradients.codes_gradient(strided, ids.flip(-1).flip(-1), 9, reduce), expected)
    assert torch.equal(gradients.codes_gradient(strided, ids.permute(2, 1, 0).contiguous().permute(2, 1, 0), 9, reduce), expected)
    spread = torch.ones(()).expand(40, 3, 6)  # what .sum() sends back
    assert_near(gradients.codes_gradient(spread, ids, 9, reduce), spread, ids, reduce)


@REDUCE
def test_the_same_bits_every_time_and_no_complaint_where_that_is_demanded(reduce):
    x, upstream = normal(3000, 2, 16), normal(3000, 2, 16, seed=2)
    grads = []
    before = torch.get_num_threads()
    try:
        torch.use_deterministic_algorithms(True)
        for n_threads in (1, 1, 2, 2, 3):
            torch.set_num_threads(n_threads)
            codes = normal(2, 40, 16, seed=1).requires_grad_()
            out, ids = snap(x, codes, 4, selection="nearest", reduce=reduce)
            (out + decode(ids, codes, reduce)).backward(upstream)
            grads.append(codes.grad)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(before)
    assert all(torch.equal(grad, grads[0]) for grad in grads)


@REDUCE
def test_second_derivatives_of_decoding(reduce):
    codes = normal(2, 4, 3, dtype=torch.float64).requires_grad_()
    ids = some_ids(3, 2, 3, n_codes=4, lowest=-2)
    assert torch.autograd.gradgradcheck(lambda c: decode(ids, c, reduce).sin(), (codes,))
    x = normal(3, 2, 3, dtype=torch.float64)
    ids = select(x, codes, 2)
    penalties = []
    for form in (lambda: snap(x, codes, 2, reduce=reduce)[0], lambda: definition.decode(ids, codes, reduce)):
        (grad,) = torch.autograd.grad(form().pow(3).sum(), codes, create_graph=True)
        penalties.append(torch.autograd.grad(grad.square().sum(), codes)[0])
    torch.testing.assert_close(*penalties)


def test_rows_of_nan_give_codes_no_gradient():
    x, codes = normal(60, 1, 4), normal(1, 9, 4, seed=1).requires_grad_()
    x[[0, 7, 59]] = torch.nan
    fine = torch.isfinite(x).all(-1).squeeze(1)
    out, ids = snap(x, codes, 2)
    out[fine].square().sum().backward()
    expected = torch.zeros_like(codes).requires_grad_()
    expected.data.copy_(codes.data)
    definition.decode(ids[fine], expected, "sum").square().sum().backward()
    torch.testing.assert_close(codes.grad, expected.grad)


@pytest.mark.parametrize("n_bags", [1, 5, 3000])
@pytest.mark.parametrize("sizes", ["even", "one hot", "all empty", "last hot", "first hot"])
def test_adding_up_in_runs_is_adding_up(n_bags, sizes):
    generator = torch.Generator().manual_seed(1)
    counts = torch.randint(0, 4, (n_bags,), generator=generator)
    if sizes != "even":
        counts[{"one hot": n_bags // 2, "last hot": -1, "first hot": 0, "all empty": 0}[sizes]] = 5000
    if sizes == "all empty":
        counts[:] = 0
    ends = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])  # the last bag holds the empty slots, and here none
    rows = torch.randint(-9, 10, (800, 4), generator=generator).float()  # whole numbers: sums are exact in any order
    sources = torch.randint(0, 800, (int(ends[-1]),), generator=generator)
    expected = torch.zeros(n_bags, 4).index_add_(0, torch.arange(n_bags).repeat_interleave(counts), rows[sources])
    assert torch.equal(gradients._in_runs(sources, rows, ends), expected)
    more = torch.cat([sources, torch.randint(0, 800, (777,), generator=generator)])  # 777 empty slots
    assert torch.equal(gradients._in_runs(more, rows, ends), expected)


# --- The losses of a codebook


def plain_losses(x, codes, config, weights):
    """A codebook in training, with nothing but autograd: language-model loss, reconstruction, commitment."""
    y = x.unflatten(-1, (codes.shape[0], -1))
    choose = definition.residual_codes if config.selection == "residual" else definition.nearest_codes
    with torch.no_grad():
        ids = choose(y, codes, config.k, config.similarity)
    q = definition.decode(ids, codes, config.reduce)
    reconstruction = (q - y.detach()).square().sum((-1, -2)).mean()
    commitment = (q.detach() - y).square().sum((-1, -2)).mean()
    return ((q + y - y.detach()).flatten(-2) * weights).sum(), reconstruction, commitment


@BOTH
@pytest.mark.parametrize("selection", ["nearest", "residual"])
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("n_groups", [1, 3])
@pytest.mark.parametrize("parts", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0.5, 0.25)], ids=["lm", "reconstruction", "commitment", "all"])
def test_the_losses_of_a_codebook_have_the_gradients_of_a_plain_one(similarity, selection, k, n_groups, parts):
    config = CodebookConfig(40, k, n_groups, similarity=similarity, selection=selection)
    book = Codebook(12, config).train()
    x, weights = normal(6, 25, 12), normal(6, 25, 12, seed=8)
    ours, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    codes = book.codes.detach().clone().requires_grad_()
    out = book(ours)
    losses = ((out * weights).sum(), book.terms.reconstruction, book.terms.commitment)
    expected = plain_losses(plain, codes, config, weights)
    for a, b in zip(losses, expected, strict=True):
        torch.testing.assert_close(a, b)
    for terms in (losses, expected):
        sum(part * term for part, term in zip(parts, terms, strict=True)).backward()
    torch.testing.assert_close(ours.grad, plain.grad)
    torch.testing.assert_close(book.codes.grad, codes.grad, rtol=1e-4, atol=1e-5)
    assert book.codes.grad.any() == (parts != (0, 0, 1))
    assert ours.grad.any() == (parts != (0, 1, 0))


# --- Memory


def largest_allocation(function):
    """Return the bytes of the largest tensor that came to be, on a thread that has kept nothing from earlier calls."""
    sizes, errors = [], []

    def target():
        try:
            torch.set_num_threads(1)
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
                function()
            sizes.extend(event.nbytes() for event in record.profiler.kineto_results.events() if event.name() == "[memory]")
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    assert not errors, errors
    assert sizes, "nothing was recorded"
    return max(sizes)


def forward_and_backward(n_rows, d_group, n_codes, k, selection, reduce):
    x, codes = torch.randn(n_rows, 1, d_group), torch.randn(1, n_codes, d_group)

    def step():
        leaf = codes.clone().requires_grad_()
        out, ids = snap(x, leaf, k, selection=selection, reduce=reduce)
        (out * decode(ids, leaf, reduce)).sum().backward()

    return step


def test_the_recorder_sees_allocations(one_thread):
    assert 4 * 512 * 300 <= largest_allocation(lambda: torch.ones(512, 300) + 1) < 5 * 512 * 300
    x, codes = torch.randn(512, 1, 64), torch.randn(1, 500, 64)
    per_slot = 4 * 512 * 16 * 64
    assert largest_allocation(lambda: definition.decode(definition.nearest_codes(x, codes, 16, "euclidean"), codes, "sum")) >= per_slot


@pytest.mark.parametrize(("selection", "reduce"), [("nearest", "mean"), ("residual", "sum")])
def test_nothing_holds_a_vector_for_every_slot(selection, reduce, one_thread):
    n_rows, d_group, k = 512, 256, 64
    most = largest_allocation(forward_and_backward(n_rows, d_group, 2000, k, selection, reduce))
    assert most < 4 * n_rows * k * d_group
    if selection == "nearest":  # residual selection keeps a table of products, [code code]
        assert most < 4 * n_rows * k * d_group / 4


@pytest.mark.parametrize(("selection", "reduce"), [("nearest", "mean"), ("residual", "sum")])
@pytest.mark.parametrize("k", [1, 4])
def test_nothing_holds_the_scores_of_all_rows(selection, reduce, k, one_thread):
    n_rows, n_codes = 20_000, 1000
    most = largest_allocation(forward_and_backward(n_rows, 8, n_codes, k, selection, reduce))
    assert most < 4 * n_rows * n_codes / 4
