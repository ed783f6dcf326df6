"""Hooks of the user's own: whatever this package hangs on a model and takes off again, theirs stay and keep their order."""

import copy

import pytest
import torch

import tl_codebook as tlc
from tests.hosts.state import TOKENS, assert_same_state, state_of
from tl_codebook import force_code
from tl_codebook.errors import HookNeverFiredError, UnknownHookError
from tl_codebook.hosts import PositionClock, is_bridge

SITE = "blocks.1.hook_mlp_out"


class Log:
    """Hooks that say when they ran."""

    def __init__(self):
        self.calls = []

    def hook(self, word):
        def note(value, hook):
            self.calls.append(word)

        return note

    def take(self):
        calls, self.calls = self.calls, []
        return calls


@pytest.fixture
def log():
    return Log()


def attach(model, sites=("z", "mlp_out", "resid_delta")):
    return tlc.attach(model, list(sites), n_codes=8, k=2)


def generate(model, n=2):
    return model.generate(TOKENS[:1], max_new_tokens=n, do_sample=False, stop_at_eos=False, verbose=False)


def test_hooks_from_before_survive_attach_and_detach(any_model, log):
    any_model.add_hook(SITE, log.hook("plain"))
    any_model.add_hook(SITE, log.hook("permanent"), is_permanent=True)
    any_model.add_hook("blocks.0.hook_resid_pre", log.hook("pre"))
    any_model.add_hook("blocks.0.hook_resid_post", log.hook("post"))
    before = state_of(any_model)
    assert log.take() == ["pre", "post", "plain", "permanent"]
    attach(any_model)
    assert log.take() == []
    any_model(TOKENS)
    assert log.take() == ["pre", "post", "plain", "permanent"]
    with tlc.bypassed(any_model):
        any_model(TOKENS)
    assert log.take() == ["pre", "post", "plain", "permanent"]
    tlc.detach(any_model)
    assert_same_state(state_of(any_model), before)
    assert log.take() == ["pre", "post", "plain", "permanent"]


def test_hooks_from_after_survive_detach(any_model, log):
    attach(any_model)
    any_model.add_hook(SITE, log.hook("plain"))
    any_model.add_hook(SITE, log.hook("permanent"), is_permanent=True)
    any_model.add_hook(f"{SITE}.hook_codes", log.hook("codes"))
    any_model(TOKENS)
    assert log.take() == ["codes", "plain", "permanent"]
    tlc.detach(any_model)
    any_model(TOKENS)
    assert log.take() == ["plain", "permanent"]
    any_model.reset_hooks()
    any_model(TOKENS)
    assert log.take() == ["permanent"]


def test_a_hook_at_the_site_comes_after_the_snap_and_changes_what_follows(model):
    attach(model, ["z", "mlp_out"])  # a resid_delta codebook could absorb the change
    seen = {}
    with torch.no_grad():
        plain = model(TOKENS)
        changed = model.run_with_hooks(TOKENS, fwd_hooks=[(SITE, lambda x, hook: x * 0), (SITE, lambda x, hook: seen.update(site=x))])
    assert seen["site"].abs().max() == 0
    assert not torch.equal(changed, plain)
    with torch.no_grad():
        assert torch.equal(model(TOKENS), plain)


def test_a_hook_at_hook_x_edits_what_the_codes_are_chosen_for(model):
    books = attach(model)
    wanted = books[SITE].codes[0, 5].detach()
    seen = {}
    model.run_with_hooks(
        TOKENS,
        fwd_hooks=[(f"{SITE}.hook_x", lambda x, hook: wanted.expand_as(x)), (f"{SITE}.hook_codes", lambda ids, hook: seen.update(ids=ids))],
    )
    assert (seen["ids"][..., 0] == 5).all()


def test_nested_contexts_of_the_host_and_of_steer(model, log):
    attach(model)
    model.add_hook(SITE, log.hook("mine"))
    before = state_of(model)
    log.take()
    with model.hooks(fwd_hooks=[(SITE, log.hook("outer"))]):
        with tlc.steer(model, [force_code("L1.mlp_out:3"), (SITE, log.hook("steer"))]):
            with model.hooks(fwd_hooks=[(SITE, log.hook("inner"))]):
                model(TOKENS)
            assert log.take() == ["mine", "outer", "steer", "inner"]
            _, cache = model.run_with_cache(TOKENS)
            assert (cache[f"{SITE}.hook_codes"][..., -1] == 3).all()
            assert log.take() == ["mine", "outer", "steer"]
        model(TOKENS)
        assert log.take() == ["mine", "outer"]
    assert_same_state(state_of(model), before)


def test_steer_survives_run_with_hooks_and_reset_hooks(model, log):
    attach(model)
    with tlc.steer(model, [force_code("L1.mlp_out:3"), (SITE, log.hook("steer"))]):
        model.run_with_hooks(TOKENS, fwd_hooks=[(SITE, log.hook("run"))])
        assert log.take() == ["steer", "run"]
        model.reset_hooks()
        _, cache = model.run_with_cache(TOKENS)
        assert log.take() == ["steer"]
        assert (cache[f"{SITE}.hook_codes"][..., -1] == 3).all()
    _, cache = model.run_with_cache(TOKENS)
    assert log.take() == []
    assert not (cache[f"{SITE}.hook_codes"][..., -1] == 3).all()


def test_steer_says_when_its_hooks_were_removed_under_it(model):
    attach(model)
    message = r"the hook at 'blocks.1.hook_mlp_out.hook_codes' was removed inside the block"
    with pytest.raises(HookNeverFiredError, match=message), tlc.steer(model, [force_code("L1.mlp_out:3")]):
        model.reset_hooks(including_permanent=True)


@pytest.mark.parametrize("failure", [RuntimeError("mine"), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
def test_an_exception_inside_removes_exactly_ours(model, log, failure):
    attach(model)
    model.add_hook(SITE, log.hook("mine"))
    model.add_hook(f"{SITE}.hook_codes", log.hook("permanent"), is_permanent=True)
    before = state_of(model)

    def fail(x, hook):
        raise failure

    hooks = [force_code("L1.mlp_out:3"), ("blocks.1.attn.hook_z", fail)]
    with pytest.raises(type(failure)), tlc.steer(model, hooks), tlc.bypassed(model, "resid_delta"):
        model(TOKENS)
    assert_same_state(state_of(model), before)
    log.take()
    model(TOKENS)
    assert log.take() == ["permanent", "mine"]


def test_an_exception_inside_is_not_masked_by_a_hook_that_never_fired(model):
    attach(model)
    with pytest.raises(ZeroDivisionError), tlc.steer(model, [force_code("L1.mlp_out:3")]):
        raise ZeroDivisionError


def test_a_model_that_failed_inside_a_block_runs_as_before_and_can_be_copied(model):
    """What resid_delta remembers of a block that never ended hangs on a graph; neither the next pass nor a copy may see it."""
    attach(model)
    logits = model(TOKENS).detach()

    def fail(x, hook):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        model.run_with_hooks(TOKENS, fwd_hooks=[(SITE, fail)])
    if not (is_bridge(model) and "GPT2" in type(model.original_model).__name__):  # that one cannot be copied after any pass with gradients
        assert torch.equal(copy.deepcopy(model)(TOKENS), logits)
    assert torch.equal(model(TOKENS), logits)


def test_a_hook_that_never_fired_raises_at_the_end_of_the_block(any_model):
    attach(any_model)
    generate(any_model)  # TransformerLens sets modes and keeps notes of its own
    before = state_of(any_model)
    message = r"force_code\(L1.mlp_out:3, pos=all\) at '.*hook_codes' never acted: the model did not run"
    with pytest.raises(HookNeverFiredError, match=message), tlc.steer(any_model, [force_code("L1.mlp_out:3")]):
        pass
    late = force_code("L0.z.1:3", pos=50, generated_only=True)
    with pytest.raises(HookNeverFiredError, match=r"pos=50\).*never came to the positions"), tlc.steer(any_model, [late]):
        generate(any_model)
    mine = ("blocks.0.attn.hook_z", lambda x, hook: None)
    with pytest.raises(HookNeverFiredError, match=r"at 'blocks.0.attn.hook_z' was never called"), tlc.steer(any_model, [mine]):
        pass
    assert_same_state(state_of(any_model), before)


def test_steer_works_on_a_model_without_codebooks_and_leaves_no_clock(model, log):
    before = state_of(model)
    with tlc.steer(model, [(SITE, log.hook("steer"))]):
        model(TOKENS)
    assert log.take() == ["steer"]
    assert_same_state(state_of(model), before)
    assert not any(isinstance(hook, PositionClock) for block in model.blocks for hook in block._forward_pre_hooks.values())


def test_steer_checks_every_name_before_it_adds_a_hook(model):
    attach(model)
    before = state_of(model)
    hooks, message = (
        [force_code("L1.mlp_out:3"), force_code("L2.mlp_out:3")],
        r"no hook point 'blocks.2.hook_mlp_out.*Layers go from 0 to 1",
    )
    with pytest.raises(UnknownHookError, match=message), tlc.steer(model, hooks):
        pytest.fail("the block must not run")
    assert_same_state(state_of(model), before)


def test_two_steers_inside_each_other_leave_generate_as_it_was(model):
    attach(model)
    with tlc.steer(model, [force_code("L1.mlp_out:3")]):
        with tlc.steer(model, [force_code("L0.mlp_out:2")]):
            _, cache = model.run_with_cache(TOKENS)
            generate(model)
        assert (cache["blocks.0.hook_mlp_out.hook_codes"][..., -1] == 2).all()
        assert (cache["blocks.1.hook_mlp_out.hook_codes"][..., -1] == 3).all()
        generate(model)
    assert "generate" not in vars(model)
    assert not PositionClock.of(model).generating
