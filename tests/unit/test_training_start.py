"""How codes start: shares of the stages, k-means, and what it does with too little data."""

import warnings

import pytest
import torch

import tl_codebook as tlc
from tests.tiny import make_host
from tl_codebook import Codebook, CodebookConfig
from tl_codebook.errors import DataError, NonFiniteError
from tl_codebook.snap import decode, select
from tl_codebook.training.initialisation import fit_codes, initialise_codes_, kmeans, spread_centres, stage_sizes


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def clusters(n_each=20, n_groups=2, spread=0.01):
    """Eight corners of a cube, each with points around it, in another order for each group; and the mean of each cluster."""
    corners = torch.tensor([[a, b, c] for a in (0.0, 10.0) for b in (0.0, 10.0) for c in (0.0, 10.0)])
    points = corners.repeat_interleave(n_each, 0) + spread * torch.randn(8 * n_each, 3, generator=seeded(1))
    x = torch.stack([points + 100 * group for group in range(n_groups)], dim=1)
    return x, x.view(8, n_each, n_groups, 3).mean(1).transpose(0, 1)


def error_of(book, y, codes):
    ids = select(y, codes, book.k, similarity=book.config.similarity, selection=book.config.selection)
    return float((decode(ids, codes, book.config.reduce) - y).square().sum())


def sorted_rows(x):
    return torch.stack([torch.stack(sorted(group, key=lambda row: row.round().tolist())) for group in x])


@pytest.mark.parametrize(("n_codes", "k"), [(256, 4), (8, 8), (9, 8), (1, 1), (1024, 8), (10, 3), (5, 4)])
def test_stage_sizes(n_codes, k):
    sizes = stage_sizes(n_codes, k)
    assert len(sizes) == k
    assert sum(sizes) == n_codes
    assert min(sizes) >= 1
    assert sizes == sorted(sizes, reverse=True)


def test_stage_sizes_by_hand():
    assert stage_sizes(256, 4) == [125, 61, 40, 30]  # 256 / (1 + 1/2 + 1/3 + 1/4) * (1, 1/2, 1/3, 1/4), the rest to the first
    assert stage_sizes(7, 1) == [7]


def test_kmeans_finds_separate_clusters_from_a_start_in_each_of_them():
    x, means = clusters()
    x, means = x[:60], means[:, :3]  # three of the clusters
    found = 0
    for seed in range(200):  # Lloyd's algorithm finds the clusters where it starts in each; look for such starts
        start = x[torch.randperm(len(x), generator=seeded(seed))[:3], 0]
        if len(torch.cdist(start, means[0]).argmin(-1).unique()) == 3:
            centres = kmeans(x, 3, n_iterations=30, generator=seeded(seed))
            torch.testing.assert_close(sorted_rows(centres), sorted_rows(means), rtol=0, atol=1e-4)
            found += 1
            if found == 5:
                return
    raise AssertionError("fewer than five such starts among 200")


def test_kmeans_is_the_same_for_a_seed_and_leaves_the_global_one_alone():
    x, _ = clusters(spread=3.0)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two, other = (kmeans(x, 5, generator=seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_one_lloyd_iteration_by_hand():
    x = torch.tensor([0.0, 1.0, 10.0, 13.0]).reshape(4, 1, 1)
    first = spread_centres(x, 2, generator=seeded(2)).flatten()
    nearest = (x.flatten()[:, None] - first).abs().argmin(-1)
    expected = torch.stack([x.flatten()[nearest == centre].mean() for centre in range(2)])
    torch.testing.assert_close(kmeans(x, 2, n_iterations=1, generator=seeded(2)).flatten(), expected)


def test_a_centre_is_drawn_with_the_square_of_its_distance_to_those_before():
    x = torch.tensor([0.0, 1.0, 3.0]).reshape(3, 1, 1)
    drawn = [spread_centres(x, 2, generator=seeded(seed)).flatten().tolist() for seed in range(2000)]
    after_zero = [second for first, second in drawn if first == 0.0]
    assert 0.0 not in after_zero
    assert after_zero.count(3.0) / len(after_zero) == pytest.approx(9 / 10, abs=0.04)  # 1 and 9 are the squares; about 670 draws


def test_spread_centres_find_rare_clusters_in_every_group():
    where = torch.randn(30, 2, 8, generator=seeded()) * 5
    sizes = torch.tensor([2000] + [3] * 29)  # at random, most centres would fall into the first
    x = where.repeat_interleave(sizes, dim=0) + 0.01 * torch.randn(int(sizes.sum()), 2, 8, generator=seeded(1))
    centres = spread_centres(x, 30, generator=seeded(2))
    for group in range(2):
        assert torch.cdist(where[:, group], centres[group]).min(-1).values.max() < 0.5


def test_many_centres_are_drawn_several_at_a_time():
    x = torch.randn(5000, 1, 3, generator=seeded())
    assert torch.unique(spread_centres(x, 2100, generator=seeded())[0], dim=0).shape[0] > 2000


def test_more_centres_than_vectors():
    x = torch.randn(3, 2, 4, generator=seeded())
    centres = kmeans(x, 10, generator=seeded())
    assert centres.shape == (2, 10, 4)
    assert centres.isfinite().all()
    for group in range(2):
        assert torch.cdist(x[:, group], centres[group]).min(-1).values.max() < 0.05 * x.std()  # every vector has a centre


@pytest.mark.parametrize("selection", ["nearest", "residual"])
def test_few_distinct_vectors_warn_and_fit(selection):
    y = torch.randn(5, 1, 6, generator=seeded()).repeat(20, 1, 1)
    book = Codebook(6, CodebookConfig(12, 2, selection=selection))
    book.label = "blocks.0.hook_mlp_out"
    with pytest.warns(UserWarning, match=r"^blocks\.0\.hook_mlp_out: 5 distinct inputs for 12 codes"):
        codes = fit_codes(book, y, generator=seeded())
    assert codes.shape == (1, 12, 6)
    assert codes.isfinite().all()


@pytest.mark.parametrize("value", [0.0, 2.0])
def test_constant_activations(value):
    book = Codebook(6, CodebookConfig(4, 2))
    with pytest.warns(UserWarning, match="1 distinct inputs for 4 codes"):
        codes = fit_codes(book, torch.full((30, 1, 6), value), generator=seeded())
    assert codes.isfinite().all()
    assert error_of(book, torch.full((30, 1, 6), value), codes) < 1e-3


def test_enough_distinct_vectors_do_not_warn():
    book = Codebook(6, CodebookConfig(8, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_codes(book, torch.randn(50, 1, 6, generator=seeded()), generator=seeded())


def test_distinct_vectors_are_counted_beyond_the_first_rows():
    """A first row of a document that repeats itself is no lack of variety."""
    y = torch.cat([torch.zeros(16, 1, 6), torch.randn(200, 1, 6, generator=seeded())])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_codes(Codebook(6, CodebookConfig(8)), y, generator=seeded())


def test_stages_beat_one_kmeans_under_greedy_pursuit():
    y = torch.randn(800, 2, 8, generator=seeded(7))
    book = Codebook(16, CodebookConfig(32, 4, 2))
    staged = fit_codes(book, y, generator=seeded())
    single = kmeans(y, 32, generator=seeded())
    assert staged.shape == single.shape == (2, 32, 8)
    assert error_of(book, y, staged) < 0.7 * error_of(book, y, single)
    sizes = stage_sizes(32, 4)
    norms = [part.norm(dim=-1).mean().item() for part in staged.split(sizes, dim=1)]
    assert norms == sorted(norms, reverse=True)  # coarse first, finer after


def test_nearest_selection_is_fitted_by_one_kmeans():
    y = torch.randn(100, 1, 6, generator=seeded())
    book = Codebook(6, CodebookConfig(8, 3, selection="nearest"))
    assert torch.equal(fit_codes(book, y, generator=seeded(1)), kmeans(y, 8, generator=seeded(1)))


# --- a model's codebooks ---


@pytest.fixture
def model():
    model = make_host("bridge-gpt2")
    tlc.attach(model, ["z", "mlp_out"], n_codes=8, k=2)
    return model


def codes(model):
    return {name: point.codebook.codes.detach().clone() for name, point in tlc.sites(model).items()}


TOKENS = torch.randint(3, 61, (6, 20), generator=torch.Generator().manual_seed(3))


def test_initialising_lowers_the_error_of_every_site_and_moves_nothing_else(model):
    base = {name: p.clone() for name, p in model.named_parameters() if ".codebook." not in name}

    def unexplained():
        with tlc.bypassed(model), torch.no_grad():
            cache = model.run_with_cache(TOKENS)[1]
        errors = {}
        for name, point in tlc.sites(model).items():
            book, x = point.codebook, cache[name].reshape(TOKENS.numel(), -1)
            errors[name] = float((book.decode(book.encode(x)).flatten(-2) - x).square().sum() / (x - x.mean(0)).square().sum())
        return errors

    before = unexplained()
    initialise_codes_(model, TOKENS, progress=False)
    after = unexplained()
    assert all(after[name] < 0.8 < before[name] for name in before)
    assert not any(point.codebook.fresh for point in tlc.sites(model).values())
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)
    assert all(int(point.codebook.usage.n_vectors) == 0 for point in tlc.sites(model).values())


def test_initialising_is_deterministic_and_limited_to_names(model):
    start = codes(model)
    initialise_codes_(model, TOKENS, names="z", seed=4, progress=False)
    first = codes(model)
    assert [name for name in first if not torch.equal(first[name], start[name])] == ["blocks.0.attn.hook_z", "blocks.1.attn.hook_z"]
    initialise_codes_(model, TOKENS, names="z", seed=4, progress=False)
    assert all(torch.equal(value, first[name]) for name, value in codes(model).items())
    initialise_codes_(model, TOKENS, names="z", seed=5, progress=False)
    assert not torch.equal(codes(model)["blocks.0.attn.hook_z"], first["blocks.0.attn.hook_z"])


def test_padding_is_left_out(model):
    mask = torch.ones_like(TOKENS, dtype=torch.bool)
    mask[:, 10:] = False
    other = TOKENS.clone()
    other[:, 10:] = 7
    initialise_codes_(model, TOKENS, mask=mask, progress=False)
    first = codes(model)
    initialise_codes_(model, other, mask=mask, progress=False)
    assert all(torch.equal(value, first[name]) for name, value in codes(model).items())


def test_sites_that_do_not_fit_at_once_are_taken_in_turns(model, monkeypatch):
    initialise_codes_(model, TOKENS, progress=False)
    first = codes(model)
    monkeypatch.setattr("tl_codebook.training.initialisation._BYTES_AT_ONCE", 1)
    initialise_codes_(model, TOKENS, progress=False)
    assert all(torch.equal(value, first[name]) for name, value in codes(model).items())


@pytest.mark.parametrize(("tokens", "mask"), [(TOKENS[:0], None), (TOKENS, torch.zeros_like(TOKENS, dtype=torch.bool))])
def test_no_tokens(model, tokens, mask):
    start = codes(model)
    with pytest.raises(DataError, match="no tokens were given"):
        initialise_codes_(model, tokens, mask=mask)
    assert all(torch.equal(value, start[name]) for name, value in codes(model).items())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_activations_that_are_no_numbers_name_their_site(value):
    model = make_host("native")
    books = tlc.attach(model, "mlp_out", n_codes=8)
    before = {name: book.codes.detach().clone() for name, book in books.items()}
    with torch.no_grad():
        next(p for p in model.blocks[1].mlp.parameters() if p.ndim == 2).fill_(value)
    tokens = torch.randint(0, 61, (4, 12))
    with pytest.raises(NonFiniteError, match=r"^blocks\.1\.hook_mlp_out: .*NaN or Inf, at 48 of 48 tokens"):
        initialise_codes_(model, tokens, progress=False)
    assert all(torch.equal(book.codes, before[name]) and book.fresh for name, book in books.items())


def test_padding_may_hold_nan():
    model = make_host("native")
    books = tlc.attach(model, "resid_pre", n_codes=4, layers=0)
    with torch.no_grad():
        next(p for p in model.parameters() if p.shape[0] == 61)[60] = torch.nan  # the embedding of the token of the padding
    tokens = torch.randint(0, 60, (4, 12))
    tokens[:, 8:] = 60
    initialise_codes_(model, tokens, mask=tokens != 60, progress=False)
    assert books["blocks.0.hook_resid_pre"].codes.isfinite().all()
