"""What a Codebook keeps of a forward pass: loss terms, gradients, usage; and under gradient checkpointing."""

import math

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.unit.test_codebook import ALL_CONFIGS, make_book, normal
from tl_codebook import Codebook, CodebookConfig
from tl_codebook.errors import ShapeError
from tl_codebook.usage import Usage

MASK = torch.tensor([[False, True, True, True], [False, False, True, True], [True, True, True, True]])


def parts(book, x):
    """Return normalised inputs and decoded outputs, both with their graphs."""
    y = book.normalise(book.grouped(x))
    return y, book.decode(book.choose(y))


@ALL_CONFIGS
@pytest.mark.parametrize("masked", [False, True])
def test_loss_terms(config, masked):
    book, x = make_book(config), normal(3, 4, 8).requires_grad_()
    keep = MASK.float() if masked else torch.ones(3, 4)
    book.token_mask = MASK if masked else None
    book(x)
    y, q = parts(book, x)
    reconstruction = ((q - y.detach()).square().sum((-1, -2)) * keep).sum() / keep.sum()
    commitment = ((q.detach() - y).square().sum((-1, -2)) * keep).sum() / keep.sum()
    assert book.terms.d_in == 8
    assert int(book.terms.n_positions) == int(keep.sum())
    torch.testing.assert_close(book.terms.reconstruction, reconstruction)
    torch.testing.assert_close(book.terms.commitment, commitment)
    inputs = [x, *book.parameters()]
    for term, expected in ((book.terms.reconstruction, reconstruction), (book.terms.commitment, commitment)):
        grads = torch.autograd.grad(term, inputs, allow_unused=True)
        wanted = torch.autograd.grad(expected, inputs, allow_unused=True)
        for grad, want in zip(grads, wanted, strict=True):
            assert (grad is None) == (want is None)
            if grad is not None:
                torch.testing.assert_close(grad, want)


def test_loss_terms_by_hand():
    book = Codebook(2, CodebookConfig(2))
    with torch.no_grad():
        book.codes.copy_(torch.tensor([[[1.0, 0.0], [0.0, 5.0]]]))
    x = torch.tensor([[2.0, 2.0], [0.0, 2.0], [0.0, 4.0]], requires_grad=True)
    book(x)
    assert book.encode(x).flatten().tolist() == [0, 0, 1]
    assert book.terms.reconstruction.item() == pytest.approx((5 + 5 + 1) / 3)
    book.terms.reconstruction.backward(retain_graph=True)
    assert x.grad is None
    torch.testing.assert_close(book.codes.grad[0], torch.tensor([[2 / 3 * (-1 + 1), 2 / 3 * (-2 - 2)], [0.0, 2 / 3]]))
    book.codes.grad = None
    book.terms.commitment.backward()
    assert book.codes.grad is None
    torch.testing.assert_close(x.grad, torch.tensor([[1.0, 2.0], [-1.0, 2.0], [0.0, -1.0]]) * 2 / 3)


def test_terms_are_those_of_the_last_forward():
    book, x = make_book(CodebookConfig(9, k=2)), normal(3, 4, 8)
    assert book.terms is None
    book(x)
    first = book.terms.reconstruction.item()
    book(2 * x)
    assert book.terms.reconstruction.item() != first
    with torch.no_grad():
        book(x)
    assert book.terms is None  # not the ones of the pass before, whose graph may be gone
    book(x)
    book.eval()(x)
    assert book.terms is None


def test_a_mask_of_padding_alone_gives_terms_of_zero():
    book = make_book(CodebookConfig(9, k=2))
    book.token_mask = torch.zeros(3, 4, dtype=torch.bool)
    book(normal(3, 4, 8))
    assert book.terms.reconstruction.item() == book.terms.commitment.item() == 0
    assert int(book.usage.n_vectors) == int(book.usage.counts.sum()) == 0


def test_a_mask_of_another_size_is_refused():
    book = make_book(CodebookConfig(9, k=2))
    book.label, book.token_mask = "blocks.3.hook_mlp_out", torch.ones(3, 5, dtype=torch.bool)
    with pytest.raises(ShapeError, match=r"blocks\.3\.hook_mlp_out: the padding mask is \(3, 5\), the activations are \(3, 4\)"):
        book(normal(3, 4, 8))


@ALL_CONFIGS
def test_the_gradient_is_that_of_the_surrogate(config):
    """With the ids held, the surrogate is decode(ids, codes) + y - y0; its finite differences are what backward gives."""
    book, x = make_book(config, dtype=torch.float64), normal(2, 8, dtype=torch.float64).requires_grad_()
    ids, start = book.encode(x), book.normalise(book.grouped(x)).detach().clone()
    book(x).sin().sum().backward()
    leaves = [x, *book.parameters()]

    def surrogate():
        return (book.decode(ids) + book.normalise(book.grouped(x)) - start).sin().sum()

    with torch.no_grad():
        for leaf in leaves:
            numeric = torch.zeros_like(leaf)
            for index in np.ndindex(*leaf.shape):
                before = leaf[index].clone()
                values = []
                for step in (1e-6, -1e-6):
                    leaf[index] = before + step
                    values.append(surrogate())
                leaf[index] = before
                numeric[index] = (values[0] - values[1]) / 2e-6
            torch.testing.assert_close(leaf.grad, numeric, rtol=1e-6, atol=1e-8)


def test_codes_without_the_gradient_of_what_comes_after():
    book, x = make_book(CodebookConfig(9, k=2)), normal(3, 4, 8).requires_grad_()
    book.lm_gradient_to_codes = False
    out = book(x)
    assert torch.equal(out, book.decode(book.encode(x)).flatten(-2))
    upstream = normal(3, 4, 8, seed=7)
    out.backward(upstream)
    assert torch.equal(x.grad, upstream)
    assert book.codes.grad is None
    book.terms.reconstruction.backward()
    assert book.codes.grad.abs().sum() > 0


def test_gradients_reach_a_frozen_part_neither_way():
    book, x = make_book(CodebookConfig(9, k=2)), normal(3, 4, 8)
    book.requires_grad_(False)
    assert not book(x).requires_grad
    out = book(x.requires_grad_())
    out.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert book.codes.grad is None


def test_usage_counts_activations():
    book = Codebook(4, CodebookConfig(3, k=2, n_groups=2, selection="nearest"))
    with torch.no_grad():
        book.codes.copy_(torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]]).expand(2, 3, 2))
    x = torch.tensor([[[9.0, 1.0, 1.0, 9.0], [9.0, 8.0, 2.0, 1.0]], [[1.0, 2.0, 9.0, 1.0], [9.0, 8.0, 9.0, 8.0]]])
    ids = book.encode(x)
    book(x)
    expected = torch.stack([torch.bincount(ids[..., group, :].flatten(), minlength=3) for group in range(2)])
    assert expected.tolist() == [[2, 3, 3], [3, 3, 2]]
    assert torch.equal(book.usage.counts, expected)
    assert int(book.usage.n_vectors) == 4
    book(x)
    assert torch.equal(book.usage.counts, 2 * expected)
    book.usage.reset()
    assert all(not tensor.any() for tensor in book.usage.tensors().values())
    assert set(book.usage.tensors()) == {"counts", "n_vectors", "error", "total", "square", "input_norms", "output_norms"}


def test_usage_leaves_out_padding_and_empty_slots():
    book, x = make_book(CodebookConfig(9, k=3, n_groups=2)), normal(3, 4, 8)
    book.token_mask = MASK
    book(x)
    kept = book.encode(x)[MASK]
    assert torch.equal(book.usage.counts, torch.stack([torch.bincount(kept[:, g].flatten(), minlength=9) for g in range(2)]))
    assert int(book.usage.n_vectors) == int(MASK.sum()) == 9
    y, q = parts(book, x)
    torch.testing.assert_close(book.usage.error, (q - y)[MASK].double().square().sum(-1).sum(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(book.usage.input_norms, y[MASK].detach().double().norm(dim=-1).sum(0))
    torch.testing.assert_close(book.usage.output_norms, q[MASK].detach().double().norm(dim=-1).sum(0))
    book.usage.reset()
    book.token_mask = None
    book.emit(book.grouped(x[:1, :2]), torch.tensor([[[[1, -1, 1], [8, -2, 0]], [[1, -1, -1], [-2, -2, -2]]]]))
    assert book.usage.counts.tolist() == [[0, 3, 0, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0, 1]]


@pytest.mark.parametrize(("when", "in_training", "in_eval"), [("train", 12, 0), ("always", 12, 12), ("never", 0, 0)])
def test_when_usage_is_counted(when, in_training, in_eval):
    book, x = make_book(CodebookConfig(9)), normal(3, 4, 8)
    book.count_when = when
    book(x)
    assert int(book.usage.counts.sum()) == in_training
    book.usage.reset()
    book.eval()(x)
    book.encode(x)
    assert int(book.usage.counts.sum()) == in_eval


def test_perplexity_and_dead_codes():
    usage = Usage(3, 4, 2)
    usage.counts.copy_(torch.tensor([[5, 5, 0, 0], [7, 0, 0, 0], [1, 1, 1, 3]]))
    entropy = -(3 / 6 * math.log(1 / 6) + 1 / 2 * math.log(1 / 2))
    assert usage.perplexity.tolist() == pytest.approx([2, 1, math.exp(entropy)])
    assert usage.dead_fraction == 5 / 12
    assert Usage(1, 4, 2).dead_fraction == 1


def test_unexplained_variance():
    book, x = make_book(CodebookConfig(9, k=2, n_groups=2)), normal(3, 4, 8) + 3
    book(x[:1])
    book(x[1:])
    y, q = (part.detach().double().flatten(0, 1) for part in parts(book, x))
    expected = (q - y).square().sum((0, -1)) / (y - y.mean(0)).square().sum((0, -1))
    torch.testing.assert_close(book.usage.unexplained, expected, rtol=1e-5, atol=1e-5)


def test_unexplained_variance_of_known_codebooks():
    x = normal(6, 4)
    exact = Codebook(4, CodebookConfig(6, selection="nearest"))
    exact.codes.data.copy_(x)
    exact(x)
    assert float(exact.usage.unexplained) == 0
    mean = Codebook(4, CodebookConfig(1))
    mean.codes.data.copy_(x.mean(0))
    mean(x)
    assert float(mean.usage.unexplained) == pytest.approx(1)


def test_usage_keeps_its_precision_when_the_codebook_is_cast():
    book = make_book(CodebookConfig(9)).bfloat16()
    assert book.usage.counts.dtype == torch.int64
    assert book.usage.error.dtype == torch.float64


def test_inputs_are_kept_on_request():
    book, x = make_book(CodebookConfig(9, k=2, n_groups=2)), normal(3, 4, 8)
    book(x)
    assert book.last_inputs is None
    book.keep_inputs = True
    y, q = (part.detach() for part in parts(book, x))
    book(x)
    for kept, expected in zip(book.last_inputs, (y, q), strict=True):
        assert torch.equal(kept, expected.flatten(0, 1))
        assert not kept.requires_grad
    book.token_mask = MASK
    book(x)
    for kept, expected in zip(book.last_inputs, (y, q), strict=True):
        assert torch.equal(kept, expected[MASK])


def run_checkpointed(config, use_reentrant, *, with_terms):
    book, x = make_book(config), normal(3, 4, 8).requires_grad_()
    book.keep_inputs = True
    out = book(x) if use_reentrant is None else checkpoint(book, x, use_reentrant=use_reentrant)
    kept = book.last_inputs
    loss = out.sin().sum()
    if with_terms:
        loss = loss + book.terms.reconstruction + 0.25 * book.terms.commitment
    loss.backward()
    assert book.last_inputs is kept
    return out.detach(), [x.grad, *(parameter.grad for parameter in book.parameters())], book.usage


@ALL_CONFIGS
@pytest.mark.parametrize(("use_reentrant", "with_terms"), [(False, False), (False, True), (True, False)])
def test_gradient_checkpointing_changes_nothing(config, use_reentrant, with_terms):
    out, grads, usage = run_checkpointed(config, None, with_terms=with_terms)
    new_out, new_grads, new_usage = run_checkpointed(config, use_reentrant, with_terms=with_terms)
    assert torch.equal(new_out, out)
    for new, grad in zip(new_grads, grads, strict=True):
        torch.testing.assert_close(new, grad)
    for name, tensor in usage.tensors().items():
        assert torch.equal(new_usage.tensors()[name], tensor), name
