"""Bypassed, counted and masked: what runs without codebooks, what is counted, and what padding does not do."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import tl_codebook as tlc
from tests.hosts.state import TOKENS
from tl_codebook.errors import ShapeError, UnknownHookError
from tl_codebook.hosts import is_bridge

N_CODES, K = 12, 2


def attach(model, sites=("z", "mlp_out")):
    return tlc.attach(model, list(sites), n_codes=N_CODES, k=K)


def bincount(ids, n_codes=N_CODES):
    """How often each code of each group occurs in ids [..., group, k]."""
    return torch.stack([torch.bincount(group.reshape(-1), minlength=n_codes) for group in ids.unbind(-2)])


def test_bypassed_runs_the_model_as_it_was(any_model):
    with torch.no_grad():
        plain = any_model(TOKENS)
        attach(any_model, ["z", "mlp_out", "resid_delta", "resid_pre", "resid_post"])
        snapped = any_model(TOKENS)
        with tlc.bypassed(any_model) as inside:
            assert inside is any_model
            assert torch.equal(any_model(TOKENS), plain)
        assert torch.equal(any_model(TOKENS), snapped)
        with pytest.raises(KeyboardInterrupt), tlc.bypassed(any_model):
            raise KeyboardInterrupt
        assert torch.equal(any_model(TOKENS), snapped)


def test_bypassed_leaves_the_others_on(model):
    books = attach(model, ["z", "mlp_out", "resid_delta"])
    with torch.no_grad():
        tlc.detach(model, ["mlp_out", "resid_delta"])
        only_z = model(TOKENS)
        tlc.attach(model, {name: book for name, book in books.items() if "hook_z" not in name})
        everything = model(TOKENS)
        with tlc.bypassed(model, ["mlp_out", "resid_delta"]):
            assert torch.equal(model(TOKENS), only_z)
            with tlc.bypassed(model):
                model(TOKENS)
            assert torch.equal(model(TOKENS), only_z)  # the inner block restores the outer one
        assert torch.equal(model(TOKENS), everything)


def test_bypassed_names_what_is_not_there(model):
    attach(model)
    message = r"no codebook sits at 'L1.resid_post'.*Codebooks sit at: blocks.0.attn.hook_z"
    with pytest.raises(UnknownHookError, match=message), tlc.bypassed(model, "L1.resid_post"):
        pytest.fail("the block must not run")


def test_evaluation_does_not_count_and_training_does(any_model):
    books = attach(any_model)
    _, cache = any_model.run_with_cache(TOKENS)
    assert all(int(book.usage.counts.sum()) == int(book.usage.n_vectors) == 0 for book in books.values())
    any_model.train()
    _, cache = any_model.run_with_cache(TOKENS)
    for name, book in books.items():
        ids = cache[f"{name}.hook_codes"]
        assert torch.equal(book.usage.counts, bincount(ids if ids.ndim == 4 else ids.unsqueeze(-2)))
        assert int(book.usage.n_vectors) == TOKENS.numel()


def test_count_usage_counts_afresh_and_gives_the_totals_back(model):
    books = attach(model)
    model.train()(TOKENS)
    totals = {name: book.usage.counts.clone() for name, book in books.items()}
    model.eval()
    with tlc.count_usage(model) as counted:
        assert all(counted[name] is book.usage for name, book in books.items())
        model(TOKENS[:1])
        for book in books.values():
            assert book.usage.counts.sum(-1).tolist() == [TOKENS.shape[1] * K] * book.n_groups
            assert torch.all(book.usage.perplexity >= 1)
            assert torch.all(book.usage.perplexity <= N_CODES)
    model(TOKENS)
    for name, book in books.items():
        assert torch.equal(book.usage.counts, totals[name])
        assert book.count_when == "train"


def test_count_usage_of_some_sites_leaves_the_others(model):
    books = attach(model)
    with tlc.count_usage(model, "L1.z") as counted:
        model(TOKENS)
        assert list(counted) == ["blocks.1.attn.hook_z"]
        assert int(books["blocks.1.attn.hook_z"].usage.counts.sum()) == TOKENS.numel() * 4 * K
        assert int(books["blocks.0.attn.hook_z"].usage.counts.sum()) == 0


def test_usage_knows_the_error_of_the_codes(model):
    books = attach(model, ["mlp_out"])
    with tlc.count_usage(model):
        _, cache = model.run_with_cache(TOKENS)
        for name, book in books.items():
            x, q = cache[f"{name}.hook_x"].double().flatten(0, 1), cache[name].double().flatten(0, 1)
            expected = (x - q).square().sum() / (x - x.mean(0)).square().sum()
            torch.testing.assert_close(book.usage.unexplained, expected.reshape(1), rtol=1e-6, atol=0)


def test_forced_codes_count_and_empty_slots_do_not(model):
    books = attach(model, ["mlp_out"])
    name = "blocks.1.hook_mlp_out.hook_codes"
    with tlc.count_usage(model):
        model.run_with_hooks(TOKENS, fwd_hooks=[tlc.force_code("L1.mlp_out:4", slot="all")])
        counts = books["blocks.1.hook_mlp_out"].usage.counts[0]
        assert counts.tolist() == [0, 0, 0, 0, TOKENS.numel(), *[0] * (N_CODES - 5)]
    with tlc.count_usage(model):
        model.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda ids, hook: torch.full_like(ids, -1))])
        assert int(books["blocks.1.hook_mlp_out"].usage.counts.sum()) == 0


@pytest.mark.filterwarnings("ignore:.*checkpointing_enable")
@pytest.mark.parametrize("reentrant", [False, True])
def test_trap_22_gradient_checkpointing_counts_once(model, reentrant):
    """The recomputation in the backward pass encodes again; where loss terms exist (not in the reentrant kind) they reach the codes."""
    books = attach(model, ["z", "mlp_out"])
    model.train()
    if is_bridge(model):
        model.original_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    else:
        for block in model.blocks:
            block.forward = lambda *args, _f=block.forward, **kwargs: checkpoint(partial(_f, **kwargs), *args, use_reentrant=reentrant)
    loss = model(TOKENS, return_type="loss")
    if reentrant:
        assert all(book.terms is None for book in books.values())  # the first pass runs without gradients: no term, rather than an old one
    else:
        loss = loss + sum(book.terms.reconstruction for book in books.values())
    loss.backward()
    for book in books.values():
        assert int(book.usage.counts.sum()) == TOKENS.numel() * book.n_groups * K
        assert int(book.usage.n_vectors) == TOKENS.numel()
        assert float(book.codes.grad.abs().sum()) > 0


# --- Padding


def padded(side, rows=((5, 9, 33, 12, 60), (4, 21, 7))):
    """A batch of sequences of different lengths, and its mask."""
    width = max(map(len, rows))
    tokens, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        places = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        tokens[i, places], mask[i, places] = torch.tensor(row), 1
    return tokens, mask


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_gives_the_codes_of_each_sequence_alone(any_model, side):
    books = attach(any_model, ["z", "v", "mlp_out", "resid_post", "resid_delta"])
    any_model.tokenizer.padding_side = side
    tokens, mask = padded(side)
    _, together = any_model.run_with_cache(tokens, attention_mask=mask)
    for row in range(2):
        alone = tokens[row][mask[row].bool()].unsqueeze(0)
        any_model.tokenizer.padding_side = "right"
        _, cache = any_model.run_with_cache(alone)
        for name in books:
            ids = together[f"{name}.hook_codes"][row][mask[row].bool()]
            assert torch.equal(ids, cache[f"{name}.hook_codes"][0]), name


@pytest.mark.parametrize("side", ["left", "right"])
def test_masked_leaves_padding_out_of_counts_and_loss_terms(model, side):
    books = attach(model)
    model.tokenizer.padding_side = side
    tokens, mask = padded(side)
    model.train()
    with tlc.masked(model, mask if side == "left" else mask.bool()):  # a tokenizer's mask is one of whole numbers
        _, cache = model.run_with_cache(tokens, attention_mask=mask)
    inside = mask.bool()
    for name, book in books.items():
        ids, x, q = cache[f"{name}.hook_codes"], cache[f"{name}.hook_x"], cache[name]
        ids = (ids if ids.ndim == 4 else ids.unsqueeze(-2))[inside]
        assert torch.equal(book.usage.counts, bincount(ids))
        assert int(book.usage.n_vectors) == 8
        error = (x.reshape(*tokens.shape, -1) - q.reshape(*tokens.shape, -1)).square().sum(-1)[inside]
        torch.testing.assert_close(book.usage.error.sum(), error.sum().double(), rtol=1e-5, atol=0)
        torch.testing.assert_close(book.terms.reconstruction, error.mean(), rtol=1e-5, atol=0)
        torch.testing.assert_close(book.terms.commitment, error.mean(), rtol=1e-5, atol=0)
        assert book.token_mask is None


def test_masked_blocks_can_be_nested(model):
    books = attach(model)
    tokens, mask = padded("right")
    model.train()
    with tlc.masked(model, mask.bool()):
        with tlc.masked(model, torch.zeros_like(mask, dtype=torch.bool)):
            model(tokens)
        assert all(int(book.usage.n_vectors) == 0 for book in books.values())
        model(tokens)
    assert all(int(book.usage.n_vectors) == 8 for book in books.values())
    model(tokens)
    assert all(int(book.usage.n_vectors) == 8 + tokens.numel() for book in books.values())


def test_a_mask_of_another_size_is_refused(model):
    attach(model)
    message = r"blocks.0.attn.hook_z: the padding mask is \(2, 3\), the activations are \(2, 7\)"
    with pytest.raises(ShapeError, match=message), tlc.masked(model, torch.ones(2, 3, dtype=torch.bool)):
        model(TOKENS)
    assert all(point.codebook.token_mask is None for point in tlc.sites(model).values())
