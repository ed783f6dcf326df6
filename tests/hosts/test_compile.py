"""torch.compile with codebooks: no graph breaks of our own, the results of eager, and whatever changes after compiling is seen."""

import pytest
import torch
from jaxtyping import config
from torch._dynamo.utils import counters

import tl_codebook as tlc
from tests.hosts.state import TOKENS
from tests.tiny import HOSTS, make_host
from tl_codebook import ban_code, force_code
from tl_codebook.hosts import is_bridge

SITE = "blocks.0.hook_mlp_out"
HOOKED = [f"hooked-{architecture}" for architecture in ("gpt2", "llama")] if "hooked" in HOSTS else []


@pytest.fixture(autouse=True)
def _fresh_compiler():
    """Start from nothing compiled, and without the shape checks of the tests, which Dynamo would have to trace."""
    config.update("jaxtyping_disable", True)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    config.update("jaxtyping_disable", False)


@pytest.fixture(params=HOOKED or [pytest.param("none", marks=pytest.mark.skip(reason="this TransformerLens has no HookedTransformer"))])
def model(request):
    return make_host(request.param)


def attach(model, sites=("z", "mlp_out")):
    return tlc.attach(model, list(sites), n_codes=12, k=2)


def compiled(model, **options):
    return torch.compile(model, backend="aot_eager", **options)


def assert_like_eager(fast, model, tokens=TOKENS):
    with torch.no_grad():
        torch.testing.assert_close(fast(tokens), model(tokens), rtol=1e-5, atol=1e-5)


def test_the_whole_model_is_one_graph(model):
    attach(model, ["z", "mlp_out", "resid_delta", "resid_post"])
    fast = compiled(model, fullgraph=True)
    assert_like_eager(fast, model)
    assert sum(counters["graph_break"].values()) == 0
    assert counters["stats"]["unique_graphs"] == 1
    for _ in range(3):
        fast(TOKENS)
    with torch._dynamo.config.patch(error_on_recompile=True):  # the count of snaps, for one, must not be a guard
        with torch.no_grad():
            fast(TOKENS.flip(0))
    assert counters["stats"]["unique_graphs"] <= 2  # with and without gradients


@pytest.mark.parametrize("kind", [f"bridge-{architecture}" for architecture in ("gpt2", "llama")])
def test_a_bridge_gives_the_results_of_eager(kind):
    model = make_host(kind)
    fast = compiled(model)
    with torch.no_grad():
        fast(TOKENS)
    before = sum(counters["graph_break"].values())
    torch._dynamo.reset()
    counters.clear()
    attach(model)
    assert_like_eager(fast, model)
    added = sum(counters["graph_break"].values()) - before
    assert added <= 4, f"{added} graph breaks more than the {before} that a Bridge has of its own"  # one for each of the four codebooks


@pytest.mark.parametrize("hook", [force_code("L0.mlp_out:7", pos=[1, -1]), ban_code("L0.mlp_out:7"), force_code("L0.z.2:3", slot="append")])
def test_trap_19_hooks_added_after_compiling_are_honoured(model, hook):
    books = attach(model)
    with torch.no_grad():
        books[SITE].codes[0, 7] = books[SITE].codes[0].mean(0) * 0.5
        plain = model(TOKENS)
    fast = compiled(model)
    assert_like_eager(fast, model)
    with model.hooks(fwd_hooks=[hook]), torch.no_grad():
        expected = model(TOKENS)
        assert not torch.allclose(expected, plain, atol=1e-3)
        torch.testing.assert_close(fast(TOKENS), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # and taken off again
        torch.testing.assert_close(fast(TOKENS), plain, rtol=1e-5, atol=1e-5)


def test_trap_19_a_hook_of_the_users_own_after_compiling(model):
    attach(model)
    fast = compiled(model)
    assert_like_eager(fast, model)
    seen = []

    def ablate(ids, hook):
        seen.append(tuple(ids.shape))
        return torch.full_like(ids, -1)

    model.add_hook(f"{SITE}.hook_codes", ablate)
    assert_like_eager(fast, model)
    assert seen
    assert set(seen) == {(2, 7, 2)}


def test_trap_19_a_bad_edit_after_compiling_still_raises(model):
    attach(model)
    fast = compiled(model)
    fast(TOKENS)
    model.add_hook(f"{SITE}.hook_codes", lambda ids, hook: ids + 100)
    with pytest.raises(Exception, match=r"a hook returned the id 1\d\d, but there are 12 codes"):
        fast(TOKENS)


def test_attach_detach_bypass_and_new_codes_after_compiling_are_seen(model):
    fast = compiled(model)
    with torch.no_grad():
        plain = model(TOKENS)
        torch.testing.assert_close(fast(TOKENS), plain, rtol=1e-5, atol=1e-5)
        books = attach(fast)  # the compiled wrapper is as good as the model
        assert list(tlc.sites(model)) == list(books)
        snapped = model(TOKENS)
        assert not torch.allclose(snapped, plain, atol=1e-3)
        torch.testing.assert_close(fast(TOKENS), snapped, rtol=1e-5, atol=1e-5)
        with tlc.bypassed(model):
            torch.testing.assert_close(fast(TOKENS), plain, rtol=1e-5, atol=1e-5)
        for book in books.values():
            book.codes.zero_()
        assert not torch.allclose(model(TOKENS), snapped, atol=1e-3)
        assert_like_eager(fast, model)
        tlc.detach(fast)
        torch.testing.assert_close(fast(TOKENS), plain, rtol=1e-5, atol=1e-5)


def test_training_compiled_is_training_eager(model):
    """Gradients, loss terms and counts."""
    books = attach(model.train())
    results = []
    for run in (model, compiled(model)):
        for book in books.values():
            book.usage.reset()
        model.zero_grad()
        loss = run(TOKENS, return_type="loss") + sum(book.terms.reconstruction for book in books.values()) if run is model else None
        if loss is None:
            loss = run(TOKENS, return_type="loss")
            loss = loss + sum(book.terms.reconstruction for book in books.values())
        loss.backward()
        results.append(
            (
                loss.detach(),
                {name: book.codes.grad.clone() for name, book in books.items()},
                {name: book.usage.counts.clone() for name, book in books.items()},
            )
        )
    (loss, gradients, counts), (fast_loss, fast_gradients, fast_counts) = results
    torch.testing.assert_close(fast_loss, loss, rtol=1e-5, atol=1e-5)
    for name in books:
        assert float(gradients[name].abs().sum()) > 0
        torch.testing.assert_close(fast_gradients[name], gradients[name], rtol=1e-4, atol=1e-6)
        assert torch.equal(fast_counts[name], counts[name])
        assert int(counts[name].sum()) == TOKENS.numel() * books[name].n_groups * 2


def test_nan_is_caught_in_compiled_code_too(model):
    attach(model)
    fast = compiled(model)
    fast(TOKENS)
    assert not is_bridge(model)
    with torch.no_grad():
        model.blocks[0].mlp.b_out.fill_(torch.nan) if hasattr(model.blocks[0].mlp, "b_out") else model.W_E.data.fill_(torch.nan)
        with pytest.raises(Exception, match="NaN or Inf"):
            fast(TOKENS)
