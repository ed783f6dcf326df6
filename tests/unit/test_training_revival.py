"""Dead codes: which, where they go, and what is forgotten of them."""

import pytest
import torch

import tl_codebook as tlc
from tests.tiny import make_host
from tl_codebook import Codebook, CodebookConfig
from tl_codebook.training.revival import Reviver, replace_dead_

TOKENS = torch.randint(3, 61, (4, 12), generator=torch.Generator().manual_seed(3))
NAME = "blocks.0.hook_mlp_out"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("selection", ["nearest", "residual"])
def test_dead_codes_become_badly_fitted_inputs(selection):
    """One input alone is badly fitted: the dead code becomes it, or what was left over of it."""
    book = Codebook(4, CodebookConfig(3, selection=selection, n_groups=2))
    before = book.codes.detach().clone()
    y = torch.randn(5, 2, 2, generator=seeded())
    q = y.clone()
    q[3] += 1.0
    dead = torch.tensor([[False, True, False], [False, False, False]])
    moved = replace_dead_(book, dead, y, q, seeded())
    assert torch.equal(moved, dead)
    torch.testing.assert_close(book.codes[0, 1].detach(), y[3, 0] if selection == "nearest" else -torch.ones(2))
    untouched = ~dead
    assert torch.equal(book.codes.detach()[untouched], before[untouched])


def test_more_dead_codes_than_badly_fitted_inputs():
    book = Codebook(2, CodebookConfig(6))
    y = torch.randn(4, 1, 2, generator=seeded())
    q = y.clone()
    q[1:3] += 1.0
    moved = replace_dead_(book, torch.ones(1, 6, dtype=torch.bool), y, q, seeded())
    assert moved.tolist() == [[True, True, False, False, False, False]]


def test_a_perfect_fit_moves_nothing():
    book = Codebook(2, CodebookConfig(6))
    before, y = book.codes.detach().clone(), torch.randn(4, 1, 2)
    assert not replace_dead_(book, torch.ones(1, 6, dtype=torch.bool), y, y, seeded()).any()
    assert torch.equal(book.codes, before)


def test_inputs_are_drawn_by_their_error():
    y = torch.tensor([[[0.0]], [[100.0]]])
    q = torch.tensor([[[1.0]], [[103.0]]])  # squared errors 1 and 9
    drawn = []
    for seed in range(400):
        book = Codebook(1, CodebookConfig(1, selection="nearest"))
        replace_dead_(book, torch.ones(1, 1, dtype=torch.bool), y, q, seeded(seed))
        drawn.append(book.codes.item())
    assert set(drawn) == {0.0, 100.0}
    assert sum(value == 100.0 for value in drawn) / 400 == pytest.approx(0.9, abs=0.06)


# --- counting over a model ---


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = make_host("bridge-gpt2")
    tlc.attach(model, "mlp_out", n_codes=40, k=2)
    return model.train()


def test_codes_that_fired_stay_and_the_others_move(model):
    book = tlc.sites(model)[NAME].codebook
    reviver = Reviver(model, lambda rows: rows, seed=1)
    optimizer = torch.optim.AdamW([book.codes])
    optimizer.state[book.codes] = {
        "step": torch.tensor(1.0),
        "exp_avg": torch.ones_like(book.codes),
        "exp_avg_sq": torch.ones_like(book.codes),
    }
    reviver.watch(True)
    model(TOKENS)
    fired, before = book.usage.counts > 0, book.codes.detach().clone()
    assert torch.equal(reviver.counts()[NAME], book.usage.counts)
    n = reviver.revive_(step=3, optimizer=optimizer)
    changed = (book.codes.detach() != before).any(-1)
    assert torch.equal(changed, ~fired)
    assert n == sum(int((point.codebook.usage.counts == 0).sum()) for point in tlc.sites(model).values())
    state = optimizer.state[book.codes]
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(state[key].abs().sum(-1) == 0, changed)
    assert state["step"] == 1
    assert int(reviver.counts()[NAME].sum()) == 0  # counting starts again, the totals go on
    assert int(book.usage.counts.sum()) == TOKENS.numel() * 2


def test_the_same_seed_and_step_revive_the_same(model):
    import copy

    other, third = copy.deepcopy(model), copy.deepcopy(model)
    found = []
    for one, step in ((model, 3), (other, 3), (third, 4)):
        reviver = Reviver(one, lambda rows: rows, seed=1)
        reviver.watch(True)
        one(TOKENS)
        torch.rand(5)  # the global generator does not count
        reviver.revive_(step)
        found.append(tlc.sites(one)[NAME].codebook.codes.detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_without_inputs_nothing_moves(model):
    before = tlc.sites(model)[NAME].codebook.codes.detach().clone()
    assert Reviver(model, lambda rows: rows).revive_(1) == 0
    assert torch.equal(tlc.sites(model)[NAME].codebook.codes, before)


def test_counts_and_inputs_of_all_processes_decide(model):
    """A code that fired in another process is alive, and revived codes may come from its inputs."""
    book = tlc.sites(model)[NAME].codebook
    far = torch.full((1, 1, 32), 50.0)

    def gather(rows):
        if not rows.is_floating_point():
            return torch.cat([rows, torch.zeros_like(rows).index_fill(-1, torch.tensor([0, 1]), 3)])
        return torch.cat([rows, far if not gathered else torch.zeros_like(far)])

    gathered = []
    reviver = Reviver(model, gather, seed=1)
    reviver.watch(True)
    with torch.no_grad():
        book.codes[0, :2] = 900.0  # never fire here
    model(TOKENS)
    before = book.codes.detach().clone()
    reviver.revive_(1)
    assert torch.equal(book.codes[0, :2], before[0, :2])


def test_watch_keeps_and_drops_inputs(model):
    book, reviver = tlc.sites(model)[NAME].codebook, Reviver(model, lambda rows: rows)
    model(TOKENS)
    assert book.last_inputs is None
    reviver.watch(True)
    model(TOKENS)
    assert book.last_inputs[0].shape == (TOKENS.numel(), 1, 32)
    reviver.watch(False)
    assert book.last_inputs is None
    assert not book.keep_inputs


@pytest.mark.parametrize("main", [True, False])
def test_restoring_counts(model, main):
    reviver = Reviver(model, lambda rows: rows)
    model(TOKENS)
    then = reviver.counts()
    again = Reviver(model, lambda rows: rows)
    again.restore(then, main=main)
    for name, counts in again.counts().items():
        assert torch.equal(counts, then[name] if main else torch.zeros_like(counts))
