"""torch.compile with codebooks: no graph breaks of our own, the results of eager, and whatever changes after compiling is seen.

Whole models take seconds to compile, so most tests compile one hook point of a model.
"""

import logging

import pytest
import torch
from jaxtyping import config
from torch._dynamo.utils import counters

import tl_codebook as tlc
from tests.hosts.state import TOKENS
from tests.tiny import HOSTS, VOCABULARY, make_host
from tl_codebook import ban_code, force_code
from tl_codebook.interventions import patch_codes

SITE, N_CODES = "blocks.0.hook_mlp_out", 12


@pytest.fixture(autouse=True)
def _fresh_compiler():
    """Start from nothing compiled, and without the shape checks of the tests, which Dynamo would have to trace."""
    config.update("jaxtyping_disable", True)
    logging.getLogger("torch.__trace").setLevel(logging.CRITICAL)  # or pytest formats thousands of its records
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    config.update("jaxtyping_disable", False)


@pytest.fixture
def small():
    """A HookedTransformer of one block."""
    if "hooked" not in HOSTS:
        pytest.skip("this TransformerLens has no HookedTransformer")
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    sizes = {"n_layers": 1, "d_model": 32, "n_ctx": 16, "d_head": 8, "n_heads": 4, "d_vocab": VOCABULARY, "act_fn": "gelu"}
    return HookedTransformer(HookedTransformerConfig(**sizes, seed=0, device="cpu")).eval()


@pytest.fixture
def point():
    """The codebook at one hook point of a model, which the tests call as the model would; it is the same on both hosts."""
    model = make_host(f"{HOSTS[0]}-gpt2")
    tlc.attach(model, ["z", "mlp_out"], layers=0, n_codes=N_CODES, k=2)
    model(TOKENS)
    return tlc.sites(model)[SITE]


def compiled(function, **options):
    return torch.compile(function, backend="aot_eager", **options)


def activations():
    return torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(4))


def breaks():
    return sum(counters["graph_break"].values())


@torch.no_grad()
def assert_like_eager(fast, slow, x):
    torch.testing.assert_close(fast(x), slow(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_whole_model_is_one_graph(small):
    tlc.attach(small, ["z", "resid_delta", "resid_post"], n_codes=N_CODES, k=2)
    fast = compiled(small, fullgraph=True)
    assert_like_eager(fast, small, TOKENS)
    assert breaks() == 0
    assert counters["stats"]["unique_graphs"] == 1
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for tokens in (TOKENS, TOKENS.flip(0)):  # the number of snaps, for one, must not be guarded
            fast(tokens)


@pytest.mark.slow
def test_trap_19_hooks_added_to_a_model_after_compiling_are_honoured(small):
    books = tlc.attach(small, "mlp_out", n_codes=N_CODES, k=2)
    with torch.no_grad():
        books[SITE].codes[0, 7] = 5.0
        plain = small(TOKENS)
    fast = compiled(small)
    assert_like_eager(fast, small, TOKENS)
    with small.hooks(fwd_hooks=[force_code("L0.mlp_out:7", pos=[1, -1])]), torch.no_grad():
        forced = fast(TOKENS)
        torch.testing.assert_close(forced, small(TOKENS), rtol=1e-5, atol=1e-5)
    changed = (forced - plain).abs().amax(-1) > 1e-3
    assert torch.equal(changed, torch.tensor([0, 1, 0, 0, 0, 0, 1], dtype=torch.bool).expand(2, -1))
    assert_like_eager(fast, small, TOKENS)


@pytest.mark.slow
def test_a_bridge_gives_the_results_of_eager():
    model = make_host("bridge-gpt2")
    fast = compiled(model)
    with torch.no_grad():
        fast(TOKENS)
    before = breaks()
    torch._dynamo.reset()
    counters.clear()
    tlc.attach(model, ["z", "mlp_out"], n_codes=N_CODES, k=2)
    assert_like_eager(fast, model, TOKENS)
    added = breaks() - before
    assert added <= 4, f"{added} graph breaks more than the {before} that a Bridge has of its own, for four codebooks"


def test_a_hook_point_is_one_graph_and_compiles_once(point):
    fast = compiled(lambda x: point(x), fullgraph=True)
    for x in (activations(), activations() * 2, -activations()):
        assert_like_eager(fast, point, x)
    assert breaks() == 0
    assert counters["stats"]["unique_graphs"] == 1


HOOKS = {
    "append": force_code("L0.mlp_out:7", slot="append"),
    "ban": ban_code(list(range(6)), layer=0, site="mlp_out"),
    "patch": patch_codes(torch.full((1, 7, 2), 3), "L0.mlp_out"),
    "mine": (f"{SITE}.hook_codes", lambda ids, hook: torch.full_like(ids, -1)),
}


@pytest.mark.parametrize("name", ["mine", *(pytest.param(name, marks=pytest.mark.slow) for name in ("append", "ban", "patch"))])
def test_trap_19_hooks_added_after_compiling_are_honoured(point, name):
    x, fast = activations(), compiled(lambda x: point(x))
    with torch.no_grad():
        plain = point(x)
        point.clock.prompt_length = x.shape[1]
        torch.testing.assert_close(fast(x), plain, rtol=1e-5, atol=1e-5)
        point.hook_codes.add_hook(HOOKS[name][1])
        expected = point(x)
        assert not torch.allclose(expected, plain, atol=1e-3)
        torch.testing.assert_close(fast(x), expected, rtol=1e-5, atol=1e-5)
        point.hook_codes.remove_hooks()
        torch.testing.assert_close(fast(x), plain, rtol=1e-5, atol=1e-5)


def test_trap_19_a_bad_edit_after_compiling_still_raises(point):
    x, fast = activations(), compiled(lambda x: point(x))
    fast(x)
    point.hook_codes.add_hook(lambda ids, hook: ids + 100)
    with pytest.raises(Exception, match=rf"{SITE}.hook_codes: a hook returned the id 1\d\d, but there are 12 codes"):
        fast(x)


def test_detach_bypass_and_new_codes_after_compiling_are_seen(point):
    x, fast = activations(), compiled(lambda x: point(x))
    with torch.no_grad():
        snapped = fast(x)
        assert not torch.allclose(snapped, x, atol=1e-3)
        point.enabled = False
        assert torch.equal(fast(x), x)
        point.enabled = True
        torch.testing.assert_close(fast(x), snapped, rtol=1e-5, atol=1e-5)
        point.codebook.codes.mul_(0.5)
        assert not torch.allclose(point(x), snapped, atol=1e-3)
        assert_like_eager(fast, point, x)


def test_attach_to_a_compiled_model_attaches_to_the_model(small):
    fast = compiled(small)  # nothing is compiled before the first call
    books = tlc.attach(fast, "mlp_out", n_codes=N_CODES)
    assert list(tlc.sites(small)) == list(tlc.sites(fast)) == list(books) == [SITE]
    with tlc.bypassed(fast):
        assert not tlc.sites(small)[SITE].enabled
    assert tlc.detach(fast) == books
    assert tlc.sites(small) == {}


def test_training_compiled_is_training_eager(point):
    """Gradients to the codes and to the input, loss terms and counts."""
    book, results = point.codebook.train(), []
    for run in (point, compiled(lambda x: point(x))):
        book.usage.reset()
        book.zero_grad()
        x = activations().requires_grad_()
        loss = (run(x) * activations().flip(0)).sum()
        (loss + 2 * book.terms.reconstruction + 3 * book.terms.commitment).backward()
        results.append((loss.detach(), *(term.detach() for term in book.terms[:2]), book.codes.grad.clone(), x.grad.clone()))
        assert int(book.usage.counts.sum()) == 14 * 2
        assert int(book.usage.n_vectors) == 14
    for eager, fast in zip(*results, strict=True):
        assert float(eager.abs().sum()) > 0
        torch.testing.assert_close(fast, eager, rtol=1e-5, atol=1e-5)


def test_nan_is_caught_in_compiled_code_too(point):
    x, fast = activations(), compiled(lambda x: point(x))
    with torch.no_grad():
        fast(x)
        x[1, 2, 3] = torch.nan
        with pytest.raises(RuntimeError, match="NaN or Inf reached a codebook"):
            fast(x)
