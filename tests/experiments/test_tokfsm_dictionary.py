"""The TopK dictionary: what it recovers, what it leaves alone, and how it encodes, by hand."""

import pytest
import torch

from tl_codebook.errors import ConfigError, DataError, ShapeError
from tl_codebook.experiments.tokfsm import dictionary as module
from tl_codebook.experiments.tokfsm.agreement import adjusted_mutual_information
from tl_codebook.experiments.tokfsm.concepts import choose_codes, code_table
from tl_codebook.experiments.tokfsm.dictionary import TopKDictionary, train_topk_dictionary

# Pre-activations of x - (1, 1) are its two parts, their sum less 4, and the first again.
BY_HAND = TopKDictionary(
    atoms=torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [1.0, 0.0]]),
    encoder=torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 0.0]]),
    latent_bias=torch.tensor([0.0, 0.0, -4.0, 0.0]),
    bias=torch.tensor([1.0, 1.0]),
    k=2,
)
X = torch.tensor([[4.0, 3.0], [-1.0, 2.0], [0.0, 0.0]])  # pre-activations 3 2 1 3; -2 1 -5 -2; -1 -1 -6 -1


def planted(n_atoms=8, d=16, n=2000, seed=0):
    """One atom a vector, 4 to 8 of it, off the origin, with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    atoms = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q[:n_atoms]
    which = torch.randint(n_atoms, (n,), generator=generator)
    x = atoms[which] * (4 + 4 * torch.rand(n, 1, generator=generator)) + 1 + 0.05 * torch.randn(n, d, generator=generator)
    return atoms, which, x


def train(x, **options):
    return train_topk_dictionary(x, **{"n_latents": 24, "k": 1, "steps": 400, "batch_size": 128, "learning_rate": 0.01} | options)


def test_encoding_by_hand():
    assert BY_HAND.encode(X).tolist() == [[0, 3], [1, -1], [-1, -1]]  # of equals the lowest first; what is not above 0 does not fire
    assert BY_HAND.values(X).tolist() == [[3, 3], [1, 0], [0, 0]]
    assert BY_HAND.reconstruct(X).tolist() == [[7, 1], [1, 2], [1, 1]]
    assert BY_HAND.decode(torch.tensor([[2, -1]]), torch.tensor([[5.0, 9.0]])).tolist() == [[4, 5]]
    assert BY_HAND.encode(X[:0]).shape == (0, 2)


def test_unexplained_by_hand():
    # Errors: (-3, 2), (-2, 0), (-1, -1): 13 + 4 + 2. The mean is (1, 5/3): squares 9 + 4 + 1 and 16/9 + 1/9 + 25/9.
    assert BY_HAND.unexplained(X) == pytest.approx(19 / (14 + 42 / 9))


def test_rows_at_a_time_change_nothing(monkeypatch):
    whole = BY_HAND.encode(X), BY_HAND.values(X)
    monkeypatch.setattr(module, "_VALUES_AT_ONCE", 1)
    assert all(a.equal(b) for a, b in zip(whole, (BY_HAND.encode(X), BY_HAND.values(X)), strict=True))


@pytest.mark.parametrize("seed", range(3))
def test_a_planted_dictionary_is_found(seed):
    atoms, which, x = planted(seed=seed)
    found = train(x, seed=seed)
    assert found.atoms.norm(dim=1).allclose(torch.ones(24))
    assert found.unexplained(x) < 0.01
    ids = found.encode(x)
    assert adjusted_mutual_information(which, ids[:, 0]) > 0.99
    table = code_table(ids[None], which[None], 24, len(atoms))  # what counts codes counts latents
    chosen = choose_codes(table, min_recall=0.95)
    assert len(set(chosen.code.tolist())) == len(atoms)  # each planted atom has its latent
    assert chosen.precision.min() > 0.99


def test_two_atoms_at_once():
    atoms, _, _ = planted()
    generator = torch.Generator().manual_seed(1)
    pairs = torch.rand(3000, 8, generator=generator).topk(2).indices
    x = (atoms[pairs] * (3 + 3 * torch.rand(3000, 2, 1, generator=generator))).sum(1)
    found = train(x, k=2, steps=800)
    assert found.encode(x).shape == (3000, 2)
    assert found.unexplained(x) < 0.1
    assert (found.values(x).diff(dim=1) <= 0).all()  # most active first


def test_the_same_seed_gives_the_same_and_torchs_own_state_is_left_alone():
    x = planted()[2]
    state = torch.get_rng_state()
    first, other = (train(x, steps=30, seed=seed) for seed in (1, 2))
    with torch.no_grad():
        second = train(x, steps=30, seed=1)
    assert torch.get_rng_state().equal(state)
    assert all(torch.equal(a, b) for a, b in zip(first[:4], second[:4], strict=True))
    assert not first.atoms.equal(other.atoms)


def test_scale_does_not_matter():
    x = planted()[2]
    small, large = train(x, steps=100), train(1024 * x, steps=100)
    assert small.atoms.allclose(large.atoms, atol=1e-3)
    assert (1024 * small.bias).allclose(large.bias, rtol=1e-2)
    assert small.unexplained(x) == pytest.approx(large.unexplained(1024 * x), rel=1e-2)


def test_dead_latents_are_trained_on_the_error():
    """The third latent is never the greatest (half the first, and the second is the first negated), so only the auxiliary loss moves it."""
    x = planted()[2]
    row = torch.randn(16, generator=torch.Generator().manual_seed(0))

    def gradient(dead_after):
        encoder = torch.stack([row, -row, row / 2]).requires_grad_()
        silent = torch.tensor([30, 30, 49])
        module._loss(x, torch.eye(3, 16), encoder, torch.zeros(3), torch.zeros(16), 1, silent, dead_after).backward()
        assert silent.tolist() == [0, 0, 50]  # what fires is counted from 0 again
        return encoder.grad[2].norm()

    assert gradient(dead_after=49) > 0
    assert gradient(dead_after=50) == 0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: train(X, n_latents=0), ConfigError, "n_latents=0"),
        (lambda: train(X, k=0), ConfigError, "k=0"),
        (lambda: train(X, k=25), ConfigError, "k=25 of 24 latents"),
        (lambda: train(X, steps=0), ConfigError, "steps=0"),
        (lambda: train(X, batch_size=0), ConfigError, "batch_size=0"),
        (lambda: train(X, dead_after=0), ConfigError, "dead_after=0"),
        (lambda: train(X, learning_rate=0.0), ConfigError, "learning_rate=0.0"),
        (lambda: train(X[:0]), DataError, "0 vectors without any variance"),
        (lambda: train(X[:1]), DataError, "1 vectors without any variance"),
        (lambda: train(X / 0), DataError, "NaN or Inf"),
        (lambda: BY_HAND.encode(X[:, :1]), ShapeError, r"vectors \[3, 1\] were given to a dictionary of d=2"),
        (lambda: BY_HAND.encode(X / 0), DataError, "NaN or Inf"),
        (lambda: BY_HAND.unexplained(X[:1]), DataError, "1 vectors without any variance"),
        (lambda: BY_HAND.decode(torch.tensor([[4]]), torch.ones(1, 1)), DataError, "latent 4 was given, but there are 4"),
    ],
)
def test_what_cannot_be_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
