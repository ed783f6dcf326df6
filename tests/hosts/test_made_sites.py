"""The site `qkv`, whose hook point is made out of those of q, k and v (`resid_delta`, the other one, is in test_attach)."""

import copy
import pickle

import pytest
import torch
from einops import rearrange

import tl_codebook as tlc
from tests.hosts.state import TOKENS, assert_same_state, state_of
from tests.tiny import HOSTS, make_host
from tl_codebook import CodebookConfig, force_code
from tl_codebook.errors import AttachError, ConfigError, UnknownHookError

KINDS = [f"{host}-{architecture}" for architecture in ("neox", "gpt2") for host in HOSTS]
NAME = "blocks.1.attn.hook_qkv"
N_HEADS = 4


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def joined(kind):
    """A tiny host with a codebook over q, k and v of its last layer: three groups, none of which is q, k or v."""
    model = make_host(kind)
    torch.manual_seed(5)
    books = tlc.attach(model, {NAME: CodebookConfig.paper(12, k=2, n_groups=3)})
    return model, books[NAME]


def side_by_side(cache, layer=1):
    parts = [cache[f"blocks.{layer}.attn.hook_{letter}"].reshape(*TOKENS.shape, N_HEADS, -1) for letter in "qkv"]
    return rearrange(torch.stack(parts), "qkv b p head d -> b p (head qkv d)")


def test_the_codebook_decides_q_k_and_v(kind, joined):
    model, book = joined
    with torch.no_grad():
        _, raw = make_host(kind).run_with_cache(TOKENS)
        _, cache = model.run_with_cache(TOKENS)
    x = side_by_side(raw)  # layer 0 has no codebook, so what comes into layer 1 is the same
    torch.testing.assert_close(cache[f"{NAME}.hook_x"], rearrange(x, "b p (g d) -> b p g d", g=3), rtol=0, atol=1e-5)
    assert cache[f"{NAME}.hook_codes"].tolist() == book.encode(x).tolist()
    torch.testing.assert_close(side_by_side(cache), book(x), rtol=0, atol=1e-5)
    torch.testing.assert_close(cache[NAME], side_by_side(cache), rtol=0, atol=0)


def test_a_code_can_be_forced(joined):
    model, book = joined
    with torch.no_grad(), model.hooks(fwd_hooks=[force_code("L1.qkv.2:7", pos=3, slot="all")]):
        _, cache = model.run_with_cache(TOKENS)
    width = book.d_group
    torch.testing.assert_close(side_by_side(cache)[:, 3, 2 * width :], book.codes[2, 7].detach().expand(len(TOKENS), -1))


def test_gradients_reach_the_projections_and_the_codes(kind, joined):
    model, book = joined
    model.train()
    loss = model(TOKENS).square().mean()
    loss.backward()
    assert book.codes.grad.abs().sum() > 0
    own = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and ".1." in name and "codebook" not in name}
    letters = [name for name in own if any(f".{w}" in name for w in ("W_Q", "W_K", "W_V", "q.", "k.", "v."))]
    assert len({name for name in letters if name.endswith(("W_Q", "W_K", "W_V", "weight"))}) >= 3
    assert all(own[name].abs().sum() > 0 for name in letters if name.endswith(("W_Q", "W_V", "weight")))


@pytest.mark.parametrize("cached", [True, False])
def test_generation_is_that_of_whole_passes(joined, cached):
    model, _ = joined
    prompt = TOKENS[:, :4]
    with torch.no_grad():
        got = model.generate(
            prompt, max_new_tokens=5, do_sample=False, use_past_kv_cache=cached, stop_at_eos=False, verbose=False, return_type="tokens"
        )
        for length in range(4, 9):
            assert model(got[:, :length])[:, -1].argmax(-1).tolist() == got[:, length].tolist()


def test_bypassed_and_detached_the_model_is_what_it_was(kind):
    model = make_host(kind)
    before = state_of(model)
    tlc.attach(model, "qkv", n_codes=9, k=2)
    assert list(tlc.sites(model)) == ["blocks.0.attn.hook_qkv", "blocks.1.attn.hook_qkv"]
    assert f"{NAME}.hook_codes" in model.hook_dict
    with torch.no_grad():
        snapped = model(TOKENS)
        with tlc.bypassed(model):
            assert torch.equal(model(TOKENS), before["logits"])
        assert not torch.allclose(snapped, before["logits"], atol=1e-3)
    tlc.detach(model, "qkv")
    assert_same_state(state_of(model), before)


def test_beside_codebooks_at_q_and_resid_delta(kind):
    model = make_host(kind)
    before = state_of(model)
    tlc.attach(model, {"qkv": CodebookConfig(9), "q": CodebookConfig(9), "resid_delta": CodebookConfig(9)})
    with torch.no_grad():
        _, cache = model.run_with_cache(TOKENS)
    # q is snapped once more, by its own codebook, after the joint one
    joint = rearrange(cache[NAME], "b p (head qkv d) -> qkv b p head d", head=N_HEADS, qkv=3)[0]
    ids = cache["blocks.1.attn.hook_q.hook_codes"]
    assert ids.tolist() == tlc.sites(model)["blocks.1.attn.hook_q"].codebook.encode(joint.flatten(-2)).tolist()
    tlc.detach(model, "qkv")
    assert "blocks.0.attn.hook_q.hook_codes" in model.hook_dict
    tlc.detach(model)
    assert_same_state(state_of(model), before)


def test_a_copy_is_a_copy(kind, joined):
    model, _ = joined
    expected = model(TOKENS).detach() if kind.startswith("hooked") else None
    twin = copy.deepcopy(model) if expected is not None else None
    if twin is None:
        pytest.skip("a Bridge cannot be copied after a forward, codebooks or not")
    with torch.no_grad():
        tlc.sites(twin)[NAME].codebook.codes.zero_()
        assert not torch.allclose(twin(TOKENS), expected, atol=1e-3)
        torch.testing.assert_close(model(TOKENS), expected, rtol=0, atol=0)
        again = pickle.loads(pickle.dumps(model))  # noqa: S301 - our own bytes
        torch.testing.assert_close(again(TOKENS), expected, rtol=0, atol=0)


def test_saved_loaded_and_exported(kind, joined, tmp_path):
    model, _ = joined
    with torch.no_grad():
        expected = model(TOKENS)
    tlc.save(model, tmp_path / "model")
    assert torch.equal(tlc.load(tmp_path / "model")(TOKENS), expected)
    assert tlc.export_hf(model, tmp_path / "hf").ids == 1.0


def test_trained_further(kind, joined):
    model, book = joined
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    before = book.codes.detach().clone()
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(TOKENS, return_type="loss")
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert not torch.equal(book.codes, before)


@pytest.mark.parametrize("host", HOSTS)
def test_grouped_query_attention_is_refused(host):
    model = make_host(f"{host}-llama")
    before = state_of(model)
    with pytest.raises(ConfigError, match="k and v have 2 heads and q 4"):
        tlc.attach(model, "qkv", n_codes=9)
    assert_same_state(state_of(model), before)


def test_an_input_for_each_of_the_three_is_refused():
    model = make_host(KINDS[0])
    if not hasattr(model, "set_use_split_qkv_input"):
        pytest.skip("this host has no split inputs")
    tlc.attach(model, {NAME: CodebookConfig(9)})
    model.set_use_split_qkv_input(True)
    with pytest.raises(AttachError, match="no input in common here"):
        model(TOKENS)


def test_occupied_and_unknown(joined):
    model, _ = joined
    with pytest.raises(AttachError, match="already holds a codebook"):
        tlc.attach(model, {NAME: CodebookConfig(9)})
    with pytest.raises(UnknownHookError):
        tlc.attach(model, {"blocks.7.attn.hook_qkv": CodebookConfig(9)})
