"""Bad numbers, devices, dtypes and failures in the forward pass: an error that names the place, or the defined result."""

import copy

import pytest
import torch
from jaxtyping import config

import tl_codebook as tlc
from tests.hosts.prepared import LAST, MODELS, N_CODES, ids_of, run
from tests.hosts.state import TOKENS, assert_same_state, state_of
from tests.tiny import make_host
from tl_codebook import force_code
from tl_codebook.errors import NonFiniteError, ShapeError
from tl_codebook.hosts import is_bridge
from tl_codebook.snap import definition

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


@pytest.fixture(autouse=True)
def _as_users_see_it():
    """Switch the shape checks of the tests off: what the package itself says to a wrong argument is what users see."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture(params=[MODELS[0], MODELS[-1]])
def model(request):
    """A fresh host; what these tests are about does not depend on the architecture."""
    return make_host(request.param)


# --- 26, 27, 28: numbers


def poisoned(value, pos=2):
    def poison(x, hook):
        x = x.clone()
        x[1, pos] = value
        return x

    return poison


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("training", [False, True])
def test_fault_26_nan_at_a_codebook_raises(host, value, training):
    host.model.train(training)
    try:
        message = (
            r"blocks.1.hook_mlp_out: 1 of 14 vectors hold NaN or Inf, which a snap would turn into a valid code.*on_nonfinite='propagate'"
        )
        with pytest.raises(NonFiniteError, match=message):
            run(host.model, (f"{LAST}.hook_x", poisoned(value)))
    finally:
        host.model.eval()
    assert torch.equal(ids_of(run(host.model)), ids_of(host.before))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_fault_26_nan_that_is_let_through_stays_nan(model, value):
    books = tlc.attach(model, "mlp_out", layers=1, n_codes=N_CODES, k=2, on_nonfinite="propagate")
    before = run(model)
    with tlc.count_usage(model):
        cache = run(model, (f"{LAST}.hook_x", poisoned(value)))
        assert int(books[LAST].usage.counts.sum()) == 13 * 2
    where = torch.zeros(2, 7, dtype=torch.bool)
    where[1, 2] = True
    assert torch.equal(ids_of(cache), torch.where(where.unsqueeze(-1), -1, ids_of(before)))
    assert torch.isnan(cache[LAST][where]).all()
    assert torch.equal(cache[LAST][~where], before[LAST][~where])
    forced = run(model, (f"{LAST}.hook_x", poisoned(value)), force_code("L1.mlp_out:3", slot="all"))
    assert torch.isnan(forced[LAST][where]).all()  # not even a forced code makes it finite


@pytest.mark.parametrize("similarity", ["inner_product", "euclidean"])
def test_fault_27_a_zero_vector_has_a_defined_code(model, similarity):
    books = tlc.attach(model, "mlp_out", layers=1, n_codes=6, k=2, similarity=similarity, selection="nearest")
    with torch.no_grad():
        books[LAST].codes[0, 4] = 0
    cache = run(model, (f"{LAST}.hook_x", lambda x, hook: x * 0))
    expected = [0, 1] if similarity == "inner_product" else None  # every score is 0: the lowest ids
    assert torch.isfinite(cache[LAST]).all()
    assert (ids_of(cache) == ids_of(cache)[0, 0]).all()
    assert ids_of(cache)[0, 0].tolist() == expected or (expected is None and int(ids_of(cache)[0, 0, 0]) == 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fault_28_equal_scores_go_to_the_lowest_id(model, dtype):
    books = tlc.attach(model, "mlp_out", layers=1, n_codes=6, k=3, selection="nearest")
    with torch.no_grad():
        books[LAST].codes.copy_(books[LAST].codes[:, :1].expand(-1, 6, -1))
    model.to(dtype)
    assert (ids_of(run(model)) == torch.tensor([0, 1, 2])).all()


# --- 31, 32, 33: devices, dtypes, modes


def test_fault_31_codes_on_another_device_than_the_activation(model):
    books = tlc.attach(model, "mlp_out", layers=1, n_codes=4)
    books[LAST].to("meta")
    with pytest.raises(ShapeError, match=r"blocks.1.hook_mlp_out: the activation is on cpu, the codes are on meta. Call model.to\('cpu'\)"):
        model(TOKENS)


@NEEDS_CUDA
def test_fault_31_codebooks_follow_the_model_to_the_device(model):
    tlc.attach(model, ["z", "mlp_out", "resid_delta"], n_codes=N_CODES, k=2)
    before = run(model)
    model.to("cuda")
    cache = run(model, tokens=TOKENS.cuda())
    assert all(point.codebook.codes.is_cuda for point in tlc.sites(model).values())
    assert (ids_of(cache).cpu() == ids_of(before)).float().mean() > 0.9
    late = tlc.attach(model, "resid_post", n_codes=4)
    assert all(book.codes.is_cuda for book in late.values())
    assert (ids_of(run(model, force_code("L1.mlp_out:3", pos=[1, -1]), tokens=TOKENS.cuda()))[:, [1, -1], -1] == 3).all()


@NEEDS_CUDA
def test_fault_38_a_deepcopy_on_a_device(model):
    tlc.attach(model, ["z", "mlp_out"], n_codes=N_CODES)
    model.to("cuda")
    twin = copy.deepcopy(model)
    assert torch.equal(ids_of(run(twin, tokens=TOKENS.cuda())), ids_of(run(model, tokens=TOKENS.cuda())))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cast", ["model and codes", "model"])
def test_fault_32_half_precision_chooses_in_fp32_and_answers_in_its_own(model, dtype, cast):
    books = tlc.attach(model, ["z", "mlp_out"], n_codes=N_CODES, k=2)
    model.to(dtype)
    if cast == "model":
        for book in books.values():
            book.float()
    cache = run(model)
    for name, book in books.items():
        x = cache[f"{name}.hook_x"]
        assert x.dtype == cache[name].dtype == dtype
        expected = definition.residual_codes((x if x.ndim == 4 else x.unsqueeze(2)).float(), book.codes.detach().float(), 2, "euclidean")
        ids = cache[f"{name}.hook_codes"]
        assert torch.equal(ids if ids.ndim == 4 else ids.unsqueeze(2), expected)


def test_fault_33_gradients_pass_straight_through(model):
    books = tlc.attach(model, "mlp_out", layers=1, n_codes=N_CODES)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    gradients, inputs = {}, {}

    def lead(x, hook):
        inputs["x"] = x.detach().clone().requires_grad_()
        return inputs["x"]

    hooks = {"fwd_hooks": [(f"{LAST}.hook_x", lead)], "bwd_hooks": [(LAST, lambda gradient, hook: gradients.update(site=gradient.clone()))]}
    with model.hooks(**hooks):
        model(TOKENS, return_type="loss").backward()
    assert float(gradients["site"].abs().sum()) > 0
    assert torch.equal(inputs["x"].grad, gradients["site"].reshape(inputs["x"].shape))
    assert books[LAST].codes.grad is None  # frozen


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_fault_33_what_is_attached_without_gradients_can_be_trained(model, mode):
    with mode():
        books = tlc.attach(model, ["z", "mlp_out"], n_codes=N_CODES)
        model(TOKENS)
    model.train()
    loss = model(TOKENS, return_type="loss") + sum(book.terms.reconstruction for book in books.values() if book.terms)
    loss.backward()
    assert all(float(book.codes.grad.abs().sum()) > 0 for book in books.values())
    with mode(), tlc.count_usage(model):
        model(TOKENS)


# --- 37, 38: failures and copies


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), KeyboardInterrupt()], ids=["out of memory", "Ctrl-C"])
def test_fault_37_a_forward_that_fails_changes_nothing(any_model, error):
    tlc.attach(any_model, ["z", "mlp_out", "resid_delta"], n_codes=N_CODES)
    before = state_of(any_model)

    def fail(x, hook):
        raise error

    with pytest.raises(type(error)):
        any_model.run_with_hooks(TOKENS, fwd_hooks=[force_code("L0.mlp_out:1"), ("blocks.1.hook_resid_pre", fail)])
    any_model.reset_hooks()
    assert_same_state(state_of(any_model), before)


def test_fault_38_state_dict_and_shared_memory(model):
    books = tlc.attach(model, ["z", "mlp_out"], n_codes=N_CODES)
    logits = model(TOKENS).detach()
    if not is_bridge(model):  # the state_dict of a Bridge leaves codebooks out: tl_codebook.save is there for that
        state = {name: value.clone() for name, value in model.state_dict().items()}
        with torch.no_grad():
            for book in books.values():
                book.codes.zero_()
        assert not torch.equal(model(TOKENS), logits)
        model.load_state_dict(state)
    model.share_memory()
    assert all(book.codes.is_shared() for book in books.values())
    assert torch.equal(model(TOKENS), logits)
