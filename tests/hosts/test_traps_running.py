"""Known traps of running hosts with codebooks, one test each. The others: test_traps_attaching, test_compile, test_usage."""

import pytest
import torch

import tl_codebook as tlc
from tests.hosts.prepared import LAST, N_CODES, ids_of, run
from tests.hosts.state import TOKENS
from tests.tiny import KINDS, make_host
from tl_codebook import force_code
from tl_codebook.errors import InvalidCodeError


def generate(model, cached):
    return model.generate(TOKENS, max_new_tokens=5, do_sample=False, stop_at_eos=False, verbose=False, use_past_kv_cache=cached)


def test_trap_15_bad_edits_raise_and_minus_one_ablates(any_host):
    for edit in (
        lambda ids, hook: ids.float(),
        lambda ids, hook: ids * 0 + N_CODES,
        lambda ids, hook: ids[:, 1:],
        lambda ids, hook: ids.add_(100).sum() and None,
        lambda ids, hook: ids - 100,
    ):
        with pytest.raises(InvalidCodeError, match=rf"{LAST}.hook_codes: a hook returned"):
            run(any_host.model, (f"{LAST}.hook_codes", edit))
    ablated = run(any_host.model, (f"{LAST}.hook_codes", lambda ids, hook: ids * 0 - 1))
    assert torch.equal(ablated[LAST], torch.zeros_like(ablated[LAST]))
    assert torch.equal(run(any_host.model)[LAST], any_host.before[LAST])


def test_trap_16_absolute_positions_hold_with_and_without_a_cache(any_host):
    code = min(set(range(N_CODES)) - set(ids_of(any_host.before)[:, 2].flatten().tolist()))
    outputs, rows, passes = [], [], []
    hooks = [force_code(code, layer=1, site="mlp_out", pos=[2, 8], slot=0), (f"{LAST}.hook_codes", lambda ids, hook: passes.append(ids))]
    for cached in (True, False):
        passes.clear()
        with tlc.steer(any_host.model, hooks):
            outputs.append(generate(any_host.model, cached))
        rows.append(torch.cat(passes, 1) if cached else passes[-1])
    assert torch.equal(*outputs)
    assert torch.equal(*rows)
    assert (rows[0][:, [2, 8], 0] == code).all()


@pytest.mark.parametrize("kind", [*KINDS, "native"])
def test_trap_17_test_models_have_a_tokenizer_and_generate_alike_with_and_without_a_cache(kind):
    model = make_host(kind)
    assert model.tokenizer is not None
    assert torch.equal(generate(model, True), generate(model, False))


SLICES = {"last": (-1, slice(-1, None)), "some": ((1, 4), slice(1, 4))}


@pytest.mark.parametrize("form", SLICES)
def test_trap_18_a_cache_of_some_positions_holds_their_codes(any_host, form):
    pos_slice, rows = SLICES[form]
    _, cache = any_host.model.run_with_cache(TOKENS, pos_slice=pos_slice)
    for name, book in any_host.books.items():
        if book.n_groups == 1:
            ids = cache[f"{name}.hook_codes"]
            expected = ids_of(any_host.before, name)[:, rows]
            assert torch.equal(ids.reshape(expected.shape), expected), name


@pytest.mark.parametrize("form", SLICES)
def test_trap_18_a_cache_of_some_positions_holds_the_codes_of_every_head(any_host, form):
    """A HookedTransformer and the Bridge of 3.9 take the group axis of [batch pos group slot] for the positions."""
    pos_slice, rows = SLICES[form]
    _, cache = any_host.model.run_with_cache(TOKENS, pos_slice=pos_slice)
    for name, book in any_host.books.items():
        if book.n_groups > 1:
            ids = cache[f"{name}.hook_codes"]
            expected = ids_of(any_host.before, name)[:, rows]
            assert ids.numel() == expected.numel(), name
            assert torch.equal(ids.reshape(expected.shape), expected), name


def test_trap_27_usage_over_a_cache_is_usage_over_the_sites(any_model):
    books = tlc.attach(any_model, ["z", "mlp_out", "resid_delta"], n_codes=8, k=2)
    with tlc.count_usage(any_model):
        _, cache = any_model.run_with_cache(TOKENS)
        keys = [key for key in cache if key.endswith("hook_codes")]
        assert keys == [f"{name}.hook_codes" for name in tlc.sites(any_model)]  # each once, under the name that sites() has
        total = 0
        for key in keys:
            book = books[key.removesuffix(".hook_codes")]
            ids = cache[key] if cache[key].ndim == 4 else cache[key].unsqueeze(2)
            for group in range(book.n_groups):
                assert torch.equal(book.usage.counts[group], torch.bincount(ids[:, :, group].flatten(), minlength=8))
            total += ids.numel()
        assert total == sum(int(book.usage.counts.sum()) for book in books.values())
