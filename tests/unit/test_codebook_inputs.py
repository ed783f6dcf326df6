"""What a Codebook does with inputs that are not finite, not dense, not fp32; copies, modes and compilation."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.unit.test_codebook import ALL_CONFIGS, CONFIGS, make_book, normal
from tl_codebook import Codebook, CodebookConfig
from tl_codebook.errors import NonFiniteError, ShapeError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@ALL_CONFIGS
def test_nonfinite_values_raise(value, config):
    book, x = make_book(config), normal(3, 4, 8)
    book.label = "blocks.3.hook_mlp_out"
    x[1, 2, 3] = value
    before = copy.deepcopy(book)
    for call in (book, book.encode, book.eval(), book.train()):
        with pytest.raises(NonFiniteError) as raised:
            call(x)
        assert str(raised.value).startswith("blocks.3.hook_mlp_out: 1 of 24 vectors hold NaN or Inf")
        assert "on_nonfinite='propagate'" in str(raised.value)
    assert book.terms is None
    for name, tensor in book.usage.tensors().items():
        assert torch.equal(tensor, before.usage.tensors()[name]), name
    book.label = ""
    with pytest.raises(NonFiniteError, match=r"^a codebook: 1 of 24"):
        book(x)


def test_values_that_overflow_the_codes_raise():
    book = make_book(CodebookConfig(9)).half()
    with pytest.raises(NonFiniteError):
        book(torch.full((2, 8), 1e6))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@ALL_CONFIGS
@pytest.mark.parametrize("training", [False, True])
def test_nonfinite_values_propagate(value, config, training):
    book, clean = make_book(config, on_nonfinite="propagate").train(training), normal(3, 4, 8)
    expected_ids, expected = book.encode(clean), book(clean)
    x = clean.clone()
    x[1, 2, 3] = value  # in the first of two groups
    x[0, 0, 7] = value  # in the second
    ids, out = book.encode(x), book(x)
    bad = torch.zeros(3, 4, 2, dtype=torch.bool)
    bad[1, 2, 0] = bad[0, 0, 1] = True
    assert (ids[bad] == -1).all()
    assert torch.equal(ids[~bad], expected_ids[~bad])
    out, expected = out.unflatten(-1, (2, 4)), expected.unflatten(-1, (2, 4))
    assert out[bad].isnan().all()
    torch.testing.assert_close(out[~bad], expected[~bad])


def test_propagated_values_are_not_counted():
    book, x = make_book(CodebookConfig(9, k=2), on_nonfinite="propagate"), normal(3, 4, 8)
    book(x[1:])
    counts, unexplained = book.usage.counts.clone(), book.usage.unexplained
    book.usage.reset()
    x[0] = float("nan")
    book(x)
    assert torch.equal(book.usage.counts, counts)
    assert int(book.usage.n_vectors) == 8
    torch.testing.assert_close(book.usage.unexplained, unexplained)


def test_propagated_values_in_padding_touch_neither_terms_nor_usage():
    book, x = make_book(CodebookConfig(9, k=2), on_nonfinite="propagate"), normal(3, 4, 8)
    book(x[1:])
    terms, unexplained = book.terms, book.usage.unexplained
    book.usage.reset()
    x[0] = float("nan")
    book.token_mask = torch.tensor([False, True, True])[:, None].expand(3, 4)
    book(x)
    torch.testing.assert_close(book.usage.unexplained, unexplained)
    torch.testing.assert_close(book.terms.reconstruction, terms.reconstruction)
    torch.testing.assert_close(book.terms.commitment, terms.commitment)
    grads = [torch.autograd.grad(each.reconstruction, book.codes)[0] for each in (terms, book.terms)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(2, 8, dtype=torch.long), "was given a torch.int64 torch.strided tensor on cpu. Give dense floating-point"),
        (torch.ones(2, 8, dtype=torch.bool), "torch.bool"),
        (torch.ones(2, 8, dtype=torch.complex64), "torch.complex64"),
        (torch.ones(2, 8).to_sparse(), "torch.sparse_coo"),
        (torch.ones(2, 8, device="meta"), "tensor on meta"),
        (torch.ones(2, 7), "a codebook of d_in=8 was given (2, 7). Give [..., 8] with a batch axis"),
        (torch.ones(2, 2, 4), "(2, 2, 4)"),
        (torch.ones(8), "was given (8,). Give [..., 8] with a batch axis"),
        (torch.tensor(1.0), "was given ()"),
    ],
    ids=lambda value: None if isinstance(value, str) else f"{value.dtype}-{tuple(value.shape)}-{value.layout}-{value.device}",
)
def test_inputs_that_do_not_fit(x, message, unchecked):
    book = make_book(CodebookConfig(9, n_groups=2))
    book.label = "blocks.3.attn.hook_z"
    for call in (book, book.encode):
        with pytest.raises(ShapeError) as raised:
            call(x)
        assert str(raised.value).startswith("blocks.3.attn.hook_z: a codebook")
        assert message in str(raised.value)
    assert int(book.usage.n_vectors) == 0


def test_codes_on_another_device(unchecked):
    book = make_book(CodebookConfig(9)).to("meta")
    with pytest.raises(ShapeError, match=r"the activation is on cpu, the codes are on meta. Call model.to\('cpu'\)"):
        book(normal(2, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@ALL_CONFIGS
def test_codebooks_of_other_precision(dtype, config):
    book, reference = make_book(config).to(dtype), make_book(config)
    reference.load_state_dict(book.state_dict())  # the rounded codes
    x = normal(3, 4, 8, dtype=dtype).requires_grad_()
    out = book(x)
    assert out.dtype == dtype
    assert book.terms.reconstruction.dtype == torch.float32
    if config.input_norm == "none":
        assert torch.equal(book.encode(x), reference.encode(x.float()))
        tolerance = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float64: 1e-5}[dtype]
        torch.testing.assert_close(out.float(), reference(x.float()), rtol=tolerance, atol=tolerance)
    (out.float().sum() + book.terms.reconstruction).backward()
    assert x.grad.dtype == book.codes.grad.dtype == dtype
    assert torch.isfinite(book.codes.grad).all()
    used = book.codes.grad.abs().sum(-1) > 0
    assert not (used & (book.usage.counts == 0)).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@ALL_CONFIGS
def test_an_fp32_codebook_in_a_half_precision_model(dtype, config):
    book, x = make_book(config), normal(3, 4, 8, dtype=dtype)
    assert torch.equal(book.encode(x), book.encode(x.float()))
    assert torch.equal(book(x), book(x.float()).to(dtype))


@ALL_CONFIGS
def test_autocast_changes_nothing(config):
    book, x = make_book(config), normal(3, 4, 8)
    ids, out = book.encode(x), book(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(book.encode(x), ids)
        assert torch.equal(book(x), out)


@ALL_CONFIGS
def test_empty_batches_and_strides(config):
    book, x = make_book(config).eval(), normal(3, 4, 8)
    assert book(x[:0]).shape == (0, 4, 8)
    assert book(x[:, :0]).shape == (3, 0, 8)
    assert book.encode(x[:0]).shape == (0, 4, 2, 3)
    strided = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not strided.is_contiguous()
    assert torch.equal(book(strided), book(x))


def pickled(book):
    return pickle.loads(pickle.dumps(book))  # noqa: S301  (our own bytes)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
@ALL_CONFIGS
def test_copies_after_a_forward_with_gradients(duplicate, config):
    book, x = make_book(config, on_nonfinite="propagate"), normal(3, 4, 8)
    book.keep_inputs, book.token_mask, book.label = True, torch.ones(3, 4, dtype=torch.bool), "here"
    out = book(x.requires_grad_())
    twin = duplicate(book)
    assert book.terms is not None
    assert (twin.terms, twin.last_inputs, twin.token_mask) == (None, None, None)
    assert (twin.config, twin.label, twin.on_nonfinite) == (book.config, "here", "propagate")
    assert torch.equal(twin.usage.counts, book.usage.counts)
    assert torch.equal(twin(x), out)
    assert int(twin.usage.n_vectors) == 24
    assert int(book.usage.n_vectors) == 12
    with torch.no_grad():
        twin.codes.zero_()
    assert torch.equal(book(x), out)


@ALL_CONFIGS
def test_the_state_is_the_parameters(config):
    book, x = make_book(config), normal(3, 4, 8)
    book(x)
    state = book.state_dict()
    assert set(state) == {name for name, _ in book.named_parameters()}
    twin = Codebook(8, config)
    assert not torch.equal(twin(x), book(x))
    twin.load_state_dict(state, strict=True)
    assert torch.equal(twin(x), book(x))


@ALL_CONFIGS
def test_inference_mode(config):
    book, x = make_book(config), normal(3, 4, 8)
    book.count_when, book.keep_inputs = "always", True
    expected = book(x)
    with torch.inference_mode():
        assert torch.equal(book.eval()(x), expected)
        assert torch.equal(book.train()(x), expected)
    assert int(book.usage.n_vectors) == 36
    assert not book.usage.counts.is_inference()
    out = book(x.requires_grad_())
    (out.sum() + book.terms.reconstruction).backward()
    assert int(book.usage.n_vectors) == 48
    assert book.codes.grad.abs().sum() > 0


COMPILED = """
import torch
from tl_codebook import Codebook, CodebookConfig

for config in {configs}:
    for training in (False, True):
        torch.manual_seed(0)
        book = Codebook(8, config).train(training)
        x = torch.randn(3, 4, 8, requires_grad=True)
        eager = book(x)
        eager.sin().sum().backward()
        grads = [x.grad, *(p.grad for p in book.parameters())]
        counts = book.usage.counts.clone()
        x.grad = None
        book.zero_grad()
        compiled = torch.compile(book, fullgraph=True, backend="aot_eager")(x)
        assert torch.equal(compiled, eager), config
        compiled.sin().sum().backward()
        for grad, expected in zip([x.grad, *(p.grad for p in book.parameters())], grads, strict=True):
            torch.testing.assert_close(grad, expected)
        assert torch.equal(book.usage.counts, 2 * counts)
        assert bool(counts.any()) == training
        torch._dynamo.reset()
print("compiled")
"""


def test_a_compiled_codebook_is_the_codebook():
    program = COMPILED.format(configs=f"[{', '.join(f'CodebookConfig(**{c.to_dict()})' for c in (CONFIGS[0], CONFIGS[-1]))}]")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("compiled")
