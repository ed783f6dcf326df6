"""CodebookConfig, and what a Codebook computes."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_codebook import Codebook, CodebookConfig
from tl_codebook.errors import ConfigError
from tl_codebook.snap import select

CONFIGS = [
    CodebookConfig(n_codes=9, k=3, n_groups=2),
    CodebookConfig(n_codes=9, k=3, n_groups=2, similarity="inner_product"),
    CodebookConfig(n_codes=9, k=3, n_groups=2, selection="nearest"),
    CodebookConfig(n_codes=9, k=3, n_groups=2, selection="nearest", reduce="sum", similarity="inner_product"),
    CodebookConfig(n_codes=9, k=3, n_groups=2, input_norm="layer_norm"),
    CodebookConfig.paper(9, k=3, n_groups=2),
]
ALL_CONFIGS = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.similarity}-{c.selection}-{c.input_norm}-{c.reduce}")


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_book(config, d_in=8, *, seed=1, dtype=torch.float32, **options):
    """Make a codebook with weights that are nowhere zero or one."""
    book = Codebook(d_in, config, **options).to(dtype)
    with torch.no_grad():
        for i, parameter in enumerate(book.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=seed + i, dtype=dtype))
    return book


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_codes": 0}, "n_codes=0 was asked for. Give a whole number >= 1"),
        ({"n_codes": -5}, "n_codes=-5"),
        ({"n_codes": 2.0}, "n_codes=2.0"),
        ({"n_codes": True}, "n_codes=True"),
        ({"n_codes": "8"}, "n_codes='8'"),
        ({"n_codes": None}, "n_codes=None"),
        ({"k": 0}, "k=0"),
        ({"k": 1.0}, "k=1.0"),
        ({"k": None}, "k=None"),
        ({"k": 9}, "k=9 codes were asked for, but there are n_codes=8. Give k <= n_codes"),
        ({"n_groups": 0}, "n_groups=0"),
        ({"n_groups": False}, "n_groups=False"),
        ({"n_groups": "4"}, "n_groups='4'"),
        ({"similarity": "cosine"}, "similarity='cosine' is not known. Choose one of ['inner_product', 'euclidean']"),
        ({"similarity": None}, "similarity=None"),
        ({"selection": "topk"}, "selection='topk' is not known. Choose one of ['nearest', 'residual']"),
        ({"input_norm": "layernorm"}, "input_norm='layernorm' is not known. Choose one of ['none', 'layer_norm']"),
        ({"reduce": "max"}, "reduce='max' is not known. Choose one of ['sum', 'mean']"),
        ({"selection": "residual", "reduce": "mean"}, "use reduce='sum', or selection='nearest'"),
    ],
)
def test_configurations_that_cannot_be(fields, message, unchecked):
    with pytest.raises(ConfigError) as raised:
        CodebookConfig(**({"n_codes": 8} | fields))
    assert message in str(raised.value)
    with pytest.raises(ConfigError) as raised:
        CodebookConfig.from_dict(CodebookConfig(8).to_dict() | fields)
    assert message in str(raised.value)


def test_defaults():
    config = CodebookConfig(1024, k=8)
    assert (config.similarity, config.selection, config.input_norm, config.reduce) == ("euclidean", "residual", "none", "sum")
    assert config.n_groups is None
    assert CodebookConfig(1).k == 1
    assert CodebookConfig(8, selection="nearest").reduce == "mean"
    assert CodebookConfig(8, selection="nearest", reduce="sum").reduce == "sum"
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.k = 3


def test_the_paper():
    assert CodebookConfig.paper(10_000, k=8, n_groups=4) == CodebookConfig(
        n_codes=10_000, k=8, n_groups=4, similarity="inner_product", selection="nearest", input_norm="layer_norm", reduce="mean"
    )
    assert CodebookConfig.paper(100).k == 1


@ALL_CONFIGS
def test_a_configuration_survives_json(config):
    assert CodebookConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(CodebookConfig.from_dict(config.to_dict())) == hash(config)
    assert config.with_groups(5) == CodebookConfig.from_dict(config.to_dict() | {"n_groups": 5})


def test_unknown_and_missing_keys():
    fields = CodebookConfig(8).to_dict()
    with pytest.raises(ConfigError, match=r"unknown keys \['auto_map', 'kk'\] and lacks \[\]"):
        CodebookConfig.from_dict(fields | {"kk": 3, "auto_map": "os.system"})
    fields.pop("selection")
    with pytest.raises(ConfigError, match=r"lacks \['selection'\].*'similarity'"):
        CodebookConfig.from_dict(fields)


@pytest.mark.parametrize(
    ("d_in", "n_groups", "message"),
    [
        (512, 12, "d_in=512 cannot be split into n_groups=12 equal groups. Divisors near 12: 8, 16"),
        (4, 8, "d_in=4 cannot be split into n_groups=8"),
        (0, 1, "d_in=0"),
        (-4, 2, "d_in=-4"),
        (4.0, 2, "d_in=4.0"),
        (True, 1, "d_in=True"),
    ],
)
def test_widths_that_cannot_be(d_in, n_groups, message, unchecked):
    with pytest.raises(ConfigError) as raised:
        Codebook(d_in, CodebookConfig(8, n_groups=n_groups))
    assert message in str(raised.value)


def test_an_unknown_way_with_nonfinite_values(unchecked):
    with pytest.raises(ConfigError, match=r"on_nonfinite='ignore' is not known. Choose 'raise' or 'propagate'"):
        Codebook(4, CodebookConfig(8), on_nonfinite="ignore")


def test_shapes_and_names():
    book = Codebook(12, CodebookConfig(n_codes=5, k=2, n_groups=3))
    assert book.codes.shape == (3, 5, 4)
    assert (book.n_groups, book.d_group, book.n_codes, book.k, book.d_in) == (3, 4, 5, 2, 12)
    assert book.norm_weight is None
    assert [name for name, _ in book.named_parameters()] == ["codes"]
    x = normal(2, 7, 12)
    assert book.encode(x).shape == (2, 7, 3, 2)
    assert book.encode(x).dtype == torch.int64
    assert book.decode(book.encode(x)).shape == (2, 7, 3, 4)
    assert book(x).shape == x.shape
    plain = Codebook(12, CodebookConfig.paper(5))
    assert plain.n_groups == plain.config.n_groups == 1
    assert [name for name, _ in plain.named_parameters()] == ["codes", "norm_weight", "norm_bias"]
    assert "n_codes=5, k=1, n_groups=1, inner_product, nearest, mean" in repr(plain)


def test_codes_start_as_standard_normal_noise():
    codes = Codebook(64, CodebookConfig(512, n_groups=4)).codes.detach()
    assert abs(float(codes.mean())) < 0.02
    assert abs(float(codes.std()) - 1) < 0.02


def test_a_hand_computed_snap():
    book = Codebook(2, CodebookConfig(3, k=2))
    with torch.no_grad():
        book.codes.copy_(torch.tensor([[[4.0, 0.0], [0.0, 1.0], [1.0, 1.0]]]))
    x = torch.tensor([[5.0, 1.5]])
    assert book.encode(x).tolist() == [[[0, 2]]]
    assert book(x).tolist() == [[5.0, 1.0]]
    nearest = Codebook(2, CodebookConfig(3, k=2, selection="nearest"))
    nearest.load_state_dict(book.state_dict())
    assert nearest(x).tolist() == [[2.5, 0.5]]
    assert nearest(torch.tensor([[0.1, 0.9]])).tolist() == [[0.5, 1.0]]


@ALL_CONFIGS
def test_forward_is_normalise_choose_decode(config):
    book, x = make_book(config), normal(4, 5, 8)
    y = x.unflatten(-1, (2, 4))
    if config.input_norm == "layer_norm":
        centred = y - y.mean(-1, keepdim=True)
        y = centred / (y.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * book.norm_weight + book.norm_bias
    ids = select(y.detach(), book.codes, 3, similarity=config.similarity, selection=config.selection)
    assert torch.equal(book.encode(x), ids)
    total = sum(torch.stack([book.codes[group, ids[..., group, slot]] for group in range(2)], -2) for slot in range(3))
    expected = total / 3 if config.reduce == "mean" else total
    torch.testing.assert_close(book(x), expected.flatten(-2))
    assert torch.equal(book(x), book.decode(book.encode(x)).flatten(-2))


@ALL_CONFIGS
def test_groups_are_codebooks_side_by_side(config):
    book, x = make_book(config), normal(3, 4, 8).requires_grad_()
    out = book(x)
    out.sin().sum().backward()
    plain_x = x.detach().clone().requires_grad_()
    outs = []
    for group, part in enumerate(plain_x.chunk(2, -1)):
        plain = Codebook(4, config.with_groups(1))
        plain.load_state_dict({name: value[group : group + 1] for name, value in book.state_dict().items()})
        outs.append((plain, plain(part)))
        assert torch.equal(plain.encode(part)[..., 0, :], book.encode(x)[..., group, :])
    together = torch.cat([out for _, out in outs], -1)
    torch.testing.assert_close(together, out)
    together.sin().sum().backward()
    torch.testing.assert_close(plain_x.grad, x.grad)
    for name, parameter in book.named_parameters():
        torch.testing.assert_close(torch.cat([plain.get_parameter(name).grad for plain, _ in outs]), parameter.grad)


def test_each_group_has_its_own_layer_norm():
    book, x = make_book(CodebookConfig.paper(9, k=3, n_groups=2), dtype=torch.float64), normal(3, 4, 8, dtype=torch.float64)
    y = book.normalise(book.grouped(x))
    upstream = normal(*y.shape, seed=9, dtype=torch.float64)
    y.backward(upstream)
    for group in range(2):
        norm = torch.nn.LayerNorm(4, eps=1e-5, dtype=torch.float64)
        norm.load_state_dict({"weight": book.norm_weight[group].detach(), "bias": book.norm_bias[group].detach()})
        expected = norm(x[..., 4 * group : 4 * group + 4])
        torch.testing.assert_close(y[..., group, :], expected)
        expected.backward(upstream[..., group, :])
        torch.testing.assert_close(book.norm_weight.grad[group], norm.weight.grad)
        torch.testing.assert_close(book.norm_bias.grad[group], norm.bias.grad)


def test_a_new_layer_norm_is_the_identity_on_normalised_inputs():
    x = torch.nn.functional.layer_norm(normal(5, 8), (8,), eps=0.0)
    book = Codebook(8, CodebookConfig.paper(4))
    torch.testing.assert_close(book.normalise(book.grouped(x))[:, 0], x, rtol=1e-4, atol=1e-4)


SEEDS = st.integers(0, 10**6)
SELECTIONS = st.sampled_from(["nearest", "residual"])
SIMILARITIES = st.sampled_from(["euclidean", "inner_product"])


@given(SEEDS, SELECTIONS, SIMILARITIES, st.sampled_from(["none", "layer_norm"]), st.integers(1, 4), st.integers(1, 3))
@settings(max_examples=50)
def test_the_order_of_the_codes_does_not_matter(seed, selection, similarity, input_norm, k, n_groups):
    config = CodebookConfig(7, k, n_groups, similarity=similarity, selection=selection, input_norm=input_norm)
    book = make_book(config, d_in=4 * n_groups, seed=seed, dtype=torch.float64)
    x = normal(5, 4 * n_groups, seed=seed + 9, dtype=torch.float64)
    order = torch.stack([torch.randperm(7, generator=torch.Generator().manual_seed(seed + g)) for g in range(n_groups)])
    ids, out = book.encode(x), book(x)
    with torch.no_grad():
        book.codes.copy_(book.codes.gather(1, order.unsqueeze(-1).expand_as(book.codes)))
    new = book.encode(x)
    assert torch.equal(order.expand(5, n_groups, 7).gather(-1, new), ids)
    assert torch.equal(book(x), out)


@given(SEEDS, st.integers(1, 12), SIMILARITIES, st.integers(1, 3))
@settings(max_examples=30)
def test_all_codes_give_the_mean_of_the_codebook(seed, n_codes, similarity, n_groups):
    config = CodebookConfig(n_codes, n_codes, n_groups, similarity=similarity, selection="nearest", reduce="mean")
    book = make_book(config, d_in=4 * n_groups, seed=seed)
    x = normal(3, 4 * n_groups, seed=seed + 5)
    assert torch.equal(book.encode(x).sort(-1).values, torch.arange(n_codes).expand(3, n_groups, n_codes))
    torch.testing.assert_close(book(x), book.codes.mean(1).flatten().expand(3, -1), rtol=1e-4, atol=1e-5)


@given(SEEDS, st.integers(1, 40), st.integers(1, 3), st.floats(0.01, 100))
@settings(max_examples=30)
def test_a_code_snaps_to_itself(seed, n_codes, n_groups, scale):
    book = make_book(CodebookConfig(n_codes, n_groups=n_groups, selection="nearest"), d_in=4 * n_groups, seed=seed)
    with torch.no_grad():
        book.codes.mul_(scale)
    x = book.codes.detach().transpose(0, 1).flatten(1)
    assert torch.equal(book.encode(x), torch.arange(n_codes)[:, None, None].expand(n_codes, n_groups, 1))
    assert torch.equal(book(x), x)


@ALL_CONFIGS
def test_one_vector_is_snapped_the_same_alone(config):
    book, x = make_book(config), normal(3, 4, 8)
    together = book(x)
    for row in range(3):
        for pos in range(4):
            torch.testing.assert_close(book(x[row, None, pos]), together[row, None, pos])
    torch.testing.assert_close(book(x.transpose(0, 1)).transpose(0, 1), together)
