"""Steering a generation: absolute positions, the same tokens with and without a KV cache."""

import functools
from types import SimpleNamespace

import pytest
import torch

import tl_codebook as tlc
from tests.hosts.state import TOKENS
from tests.tiny import KINDS, make_host
from tl_codebook import ban_code, force_code, patch_codes
from tl_codebook.errors import HookNeverFiredError, PositionError
from tl_codebook.hosts import PositionClock, is_bridge

PROMPT, NEW = TOKENS.shape[1], 5
SEEN = PROMPT + NEW - 1  # positions that pass through the model: the last new token does not
SITE, RARE = "blocks.0.hook_mlp_out", 11


@functools.cache
def prepared(kind):
    """A model whose first MLP never chooses the code RARE of its own accord."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = make_host(kind)
        books = tlc.attach(model, ["z", "mlp_out"], n_codes=12, k=2)
    with torch.no_grad():
        books[SITE].codes[0, RARE] = 3 * torch.ones(32)
    return SimpleNamespace(model=model, books=books)


@pytest.fixture(params=KINDS)
def host(request):
    return prepared(request.param)


def generate(model, tokens=TOKENS, cached=True, n=NEW):
    return model.generate(tokens, max_new_tokens=n, do_sample=False, stop_at_eos=False, verbose=False, use_past_kv_cache=cached)


def steered(host, hooks, tokens=TOKENS, cached=True, site=SITE):
    """Generate under hooks; return the tokens and the ids of the whole sequence at a site."""
    passes = []
    with tlc.steer(host.model, [*hooks, (f"{site}.hook_codes", lambda ids, hook: passes.append(ids))]):
        out = generate(host.model, tokens, cached)
    if cached:
        assert [ids.shape[1] for ids in passes] == [PROMPT] + [1] * (NEW - 1)
    return out, torch.cat(passes, 1) if cached else passes[-1]


def at(*places):
    rows = torch.zeros(2, SEEN, dtype=torch.bool)
    rows[:, list(places)] = True
    return rows


EACH = torch.tensor([[1, 0, 0, 0, 0, 0, 1], [0, 0, 1, 1, 0, 0, 0]], dtype=torch.bool)
POSITIONS = {
    "everywhere": ({}, at(*range(SEEN))),
    "prompt": ({"pos": 3}, at(3)),
    "generated": ({"pos": 9}, at(9)),
    "first generated": ({"pos": PROMPT}, at(PROMPT)),
    "last of the prompt": ({"pos": -1}, at(PROMPT - 1)),
    "list": ({"pos": [2, 9, -2, 10]}, at(2, 5, 9, 10)),
    "slice": ({"pos": slice(5, 9)}, at(5, 6, 7, 8)),
    "slice from the end of the prompt": ({"pos": slice(-2, None)}, at(*range(PROMPT - 2, SEEN))),
    "slice with a step": ({"pos": slice(1, None, 3)}, at(1, 4, 7, 10)),
    "prompt only": ({"prompt_only": True}, at(*range(PROMPT))),
    "prompt only from a place": ({"pos": slice(5, None), "prompt_only": True}, at(5, 6)),
    "generated only": ({"generated_only": True}, at(*range(PROMPT, SEEN))),
    "generated only, every other": ({"pos": slice(0, None, 2), "generated_only": True}, at(8, 10)),
    "mask of the prompt": ({"pos": torch.arange(PROMPT) > 4}, at(5, 6)),
    "mask for each sequence": ({"pos": EACH}, torch.nn.functional.pad(EACH, (0, SEEN - PROMPT))),
}


EVERYWHERE = ("prompt", "last of the prompt", "list", "slice", "prompt only", "generated only")  # the other forms on two architectures


@pytest.mark.parametrize(
    ("kind", "form"), [(kind, form) for kind in KINDS for form in POSITIONS if form in EVERYWHERE or kind.endswith(("gpt2", "llama"))]
)
def test_the_same_positions_and_tokens_with_and_without_a_cache(kind, form):
    host, (arguments, rows) = prepared(kind), POSITIONS[form]
    hook = force_code(RARE, layer=0, site="mlp_out", **arguments)
    out, ids = steered(host, [hook])
    assert torch.equal((ids == RARE).any(-1), rows)
    again, uncached = steered(host, [hook], cached=False)
    assert torch.equal(out, again)
    assert torch.equal(ids, uncached)
    assert out.shape == (2, PROMPT + NEW)


def test_forcing_changes_what_is_generated_and_afterwards_nothing(host):
    plain = generate(host.model)
    forced, _ = steered(host, [force_code(RARE, layer=0, site="mlp_out", slot="all")])
    assert not torch.equal(forced, plain)
    assert torch.equal(generate(host.model), plain)
    assert not PositionClock.of(host.model).generating


@pytest.mark.parametrize("length", [1, 5])
def test_the_next_generation_counts_its_own_prompt(host, length):
    steered(host, [force_code(RARE, layer=0, site="mlp_out", generated_only=True)])
    tokens, passes = TOKENS[:1, :length], []
    with tlc.steer(
        host.model, [force_code(RARE, layer=0, site="mlp_out", pos=-1), (f"{SITE}.hook_codes", lambda ids, hook: passes.append(ids))]
    ):
        for cached in (True, False):
            passes.clear()
            generate(host.model, tokens, cached, n=2)
            rows = (torch.cat(passes, 1) if cached else passes[-1]) == RARE
            assert rows.any(-1)[0].nonzero().flatten().tolist() == [length - 1]


def test_a_plain_forward_between_generations_is_a_sequence_of_its_own(host):
    passes = []
    record = (f"{SITE}.hook_codes", lambda ids, hook: passes.append((ids == RARE).any(-1)[0].nonzero().flatten().tolist()))
    with tlc.steer(host.model, [force_code(RARE, layer=0, site="mlp_out", pos=[-1, 0]), record]), torch.no_grad():
        generate(host.model, n=2)
        host.model(TOKENS[:, :4])
        generate(host.model, n=2, cached=False)
        host.model(TOKENS[:, :3])
    assert passes == [[0, 6], [], [0, 3], [0, 6], [0, 6], [0, 2]]


def test_a_pass_that_starts_at_a_later_layer_is_a_sequence_of_its_own(host):
    name, passes = "blocks.1.hook_mlp_out", []
    _, cache = host.model.run_with_cache(TOKENS)
    code = min(set(range(12)) - set(cache[f"{name}.hook_codes"][:, 2].flatten().tolist()))
    hooks = [force_code(code, layer=1, site="mlp_out", pos=2), (f"{name}.hook_codes", lambda ids, hook: passes.append(ids))]
    with tlc.steer(host.model, hooks), torch.no_grad():
        generate(host.model)
        passes.clear()
        try:
            host.model(cache["blocks.0.hook_resid_post"], start_at_layer=1)
        except NotImplementedError:
            pytest.skip("the Bridge of TransformerLens 3.9 has no start_at_layer")
    assert (passes[0][:, 2, -1] == code).all()


def test_bans_and_patches_hold_with_and_without_a_cache(host):
    _, cache = host.model.run_with_cache(TOKENS.flip(0))
    code = int(cache[f"{SITE}.hook_codes"][..., 0].flatten().mode().values)
    for hook in (
        ban_code(code, layer=0, site="mlp_out", pos=slice(3, 10)),
        patch_codes(cache, "L0.mlp_out"),
        patch_codes(cache, "L0.mlp_out", pos=[1, -1]),
    ):
        out, ids = steered(host, [hook])
        again, uncached = steered(host, [hook], cached=False)
        assert torch.equal(out, again)
        assert torch.equal(ids, uncached)
        if hook[1].verb == "ban_code":
            assert not (ids[:, 3:10] == code).any()
        else:
            places = slice(0, PROMPT) if hook[1].positions.indices is None else [1, PROMPT - 1]
            assert torch.equal(ids[:, places], cache[f"{SITE}.hook_codes"][:, places])


def test_a_head_is_forced_with_and_without_a_cache(host):
    name = "blocks.1.attn.hook_z"
    code = min(set(range(12)) - set(steered(host, [], site=name)[1][:, :, 3].flatten().tolist()), default=0)
    hook = force_code(code, layer=1, site="z", head=3, pos=[2, 8])
    out, ids = steered(host, [hook], site=name)
    again, uncached = steered(host, [hook], cached=False, site=name)
    assert torch.equal(out, again)
    assert torch.equal(ids, uncached)
    assert (ids[:, [2, 8], 3, -1] == code).all()


def test_a_position_before_the_prompt_is_refused(host):
    with pytest.raises(PositionError, match=r"position -8 was asked for, but the prompt has 7 positions. Give 0 to 6, or -7 to -1"):
        steered(host, [force_code(RARE, layer=0, site="mlp_out", pos=-8)])


def test_a_position_that_the_generation_never_reaches_is_told(host):
    with pytest.raises(HookNeverFiredError, match=r"force_code\(L0.mlp_out:11, pos=11\).*never came to the positions asked for"):
        steered(host, [force_code(RARE, layer=0, site="mlp_out", pos=SEEN)])


def test_a_stream_and_the_generation_of_hugging_face_count_alike(host):
    if not is_bridge(host.model):
        pytest.skip("only a Bridge has hf_generate")
    hook, passes = force_code(RARE, layer=0, site="mlp_out", generated_only=True), []
    expected, _ = steered(host, [hook])
    with tlc.steer(host.model, [hook, (f"{SITE}.hook_codes", lambda ids, hook: passes.append((ids == RARE).any(-1)[0].tolist()))]):
        out = host.model.hf_generate(TOKENS, max_new_tokens=NEW, do_sample=False, eos_token_id=999)
    assert passes == [[False] * PROMPT] + [[True]] * (NEW - 1)
    assert torch.equal(out, expected)


def test_a_stream_counts_its_prompt_and_ends_cleanly(host):
    if not hasattr(host.model, "generate_stream"):
        pytest.skip("this host has no generate_stream")
    passes = []
    record = (f"{SITE}.hook_codes", lambda ids, hook: passes.append((ids == RARE).any(-1)[0].tolist()))
    with tlc.steer(host.model, [force_code(RARE, layer=0, site="mlp_out", generated_only=True), record]):
        for _ in host.model.generate_stream(
            TOKENS, max_new_tokens=NEW, do_sample=False, stop_at_eos=False, verbose=False, max_tokens_per_yield=2
        ):
            pass
        assert passes[0] == [False] * PROMPT
        assert all(row == [True] for row in passes[1:])
        assert len(passes) >= NEW - 1
        passes.clear()
        with torch.no_grad():
            host.model(TOKENS)  # no longer a generation: every position belongs to the prompt
        assert passes == [[False] * PROMPT]
