"""The machine of TokFSM: how it is made, what it refuses, and what it samples."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from tl_codebook.errors import ConfigError, DataError
from tl_codebook.experiments.tokfsm import TokFSM, original_continuations, original_trajectories

MACHINE = TokFSM(torch.tensor([[0, 1, 1], [1, 0, 0], [1, 1, 1]], dtype=torch.bool), base=2)


def test_the_papers_machine_is_the_seeded_one():
    machine = TokFSM.paper()
    rng = np.random.default_rng(42)
    for state in range(100):
        assert machine.successors(state).tolist() == sorted(rng.choice(100, 10, replace=False).tolist())
    assert (machine.n_states, machine.n_edges, machine.base, machine.bos, machine.n_vocabulary, machine.n_digits) == (
        100,
        1000,
        10,
        10,
        11,
        2,
    )
    assert machine.transition[machine.adjacency].eq(0.1).all()
    assert len({(state, after // 10) for state, after in machine.adjacency.nonzero().tolist()}) == 686


def test_a_hand_made_machine():
    assert MACHINE.n_digits == 2
    assert MACHINE.n_edges == 6
    assert MACHINE.transition.tolist() == [[0, 0.5, 0.5], [1, 0, 0], pytest.approx([1 / 3] * 3)]
    assert [MACHINE.successors(state).tolist() for state in range(3)] == [[1, 2], [0], [0, 1, 2]]
    assert [MACHINE.predecessors(state).tolist() for state in range(3)] == [[1, 2], [0, 2], [0, 2]]
    assert MACHINE.reversed().adjacency.tolist() == MACHINE.adjacency.T.tolist()
    assert MACHINE.reversed().n_digits == 2


@pytest.mark.parametrize(
    ("n_states", "base", "n_digits"), [(1, 2, 1), (2, 2, 1), (3, 2, 2), (125, 5, 3), (126, 5, 4), (243, 3, 5), (1000, 10, 3)]
)
def test_as_few_digits_as_the_states_need(n_states, base, n_digits):
    """The original takes a logarithm, which rounds up to 4 digits at 125 states in base 5."""
    assert TokFSM.random(n_states, 1, 0, base=base).n_digits == n_digits
    assert TokFSM.random(n_states, 1, 0, base=base, n_digits=n_digits + 1).n_digits == n_digits + 1


def test_the_machine_keeps_its_own_copy():
    adjacency = torch.ones(2, 2, dtype=torch.bool)
    machine = TokFSM(adjacency, 2)
    adjacency.zero_()
    assert machine.n_edges == 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TokFSM.random(100, 10, 0, n_digits=1), "100 states need 2 digits in base 10. Give n_digits=2"),
        (lambda: TokFSM.random(5, 2, 0, base=2, n_digits=2), "5 states need 3 digits in base 2"),
        (lambda: TokFSM.random(5, 2, 0, n_digits=0), "n_digits=0 .* need 1 digits"),
        (lambda: TokFSM.random(5, 2, 0, n_digits=99), "n_digits=99 .* Give 1, which is enough"),
        (lambda: TokFSM.random(5, 6, 0), "n_edges=6 was asked for.* of 5. Give 1 to 5"),
        (lambda: TokFSM.random(5, 0, 0), "n_edges=0"),
        (lambda: TokFSM.random(0, 1, 0), "n_states=0"),
        (lambda: TokFSM.random(5, 2, 0, base=1), "base=1 .* Give 2 to 36"),
        (lambda: TokFSM.random(5, 2, 0, base=37), "base=37"),
        (lambda: TokFSM(torch.eye(3)), r"torch.float32 \[3, 3\] was given.* Give bool \[state next\]"),
        (lambda: TokFSM(torch.ones(3, 2, dtype=torch.bool)), r"\[3, 2\]"),
        (lambda: TokFSM(torch.ones(0, 0, dtype=torch.bool)), "n_states=0"),
        (lambda: TokFSM(torch.tensor([[True, True], [False, False]])), r"states \[1\] have no successor"),
        (lambda: TokFSM(torch.tensor([[True, False], [True, False]])).reversed(), r"states \[1\] have no successor"),
        (lambda: MACHINE.sample(0, 4), "n_sequences=0"),
        (lambda: MACHINE.sample(4, 0), "n_states=0"),
        (lambda: MACHINE.sample(4, 3, start=torch.tensor([1])), "start has the shape"),
        (lambda: original_trajectories(MACHINE, 0, 3, np.random.default_rng(0)), "0 rollouts of 3 states"),
        (lambda: original_continuations(MACHINE, torch.tensor([0]), 0, np.random.default_rng(0)), "0 states"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("state", [-1, 3])
def test_there_is_no_such_state(state):
    calls = [
        lambda: MACHINE.successors(state),
        lambda: MACHINE.predecessors(state),
        lambda: MACHINE.sample(1, 3, start=torch.tensor([state])),
        lambda: original_continuations(MACHINE, torch.tensor([state]), 3, np.random.default_rng(0)),
    ]
    for call in calls:
        with pytest.raises(DataError, match=f"state {state} was given, but the machine has 3 states. Give 0 to 2"):
            call()


@pytest.mark.parametrize("n_tokens", [-2, 0, 1, 3, 127])
def test_odd_rows_are_refused(n_tokens):
    with pytest.raises(ConfigError, match=f"rows of {n_tokens} tokens were asked for.* Give a multiple of 2, 2 or more"):
        TokFSM.paper().states_in_row(n_tokens)


def test_rows_of_other_digits():
    three, one = TokFSM.random(125, 2, 0, base=5), TokFSM.random(5, 2, 0)
    assert (three.states_in_row(3), three.states_in_row(9), one.states_in_row(2)) == (1, 3, 2)
    with pytest.raises(ConfigError, match="a multiple of 3, 3 or more"):
        three.states_in_row(8)
    with pytest.raises(ConfigError, match="a multiple of 1, 2 or more"):
        one.states_in_row(1)


@pytest.mark.parametrize("make", [lambda: torch.Generator().manual_seed(3), lambda: np.random.default_rng(3)])
def test_samples_repeat_follow_edges_and_have_the_right_frequencies(make):
    rollouts = MACHINE.sample(4000, 12, make())
    assert rollouts.shape == (4000, 12)
    assert rollouts.equal(MACHINE.sample(4000, 12, make()))
    generator = make()
    assert not MACHINE.sample(8, 12, generator).equal(MACHINE.sample(8, 12, generator))
    before, after = rollouts[:, :-1].flatten(), rollouts[:, 1:].flatten()
    counts = torch.zeros(3, 3).index_put_((before, after), torch.ones(len(before)), accumulate=True)
    assert (counts / counts.sum(1, keepdim=True)).sub(MACHINE.transition).abs().max() < 0.02
    assert counts[~MACHINE.adjacency].eq(0).all()
    assert (rollouts[:, 0].bincount(minlength=3) / 4000).sub(1 / 3).abs().max() < 0.03


def test_torchs_own_generator_is_the_default():
    torch.manual_seed(5)
    first = MACHINE.sample(5, 5)
    torch.manual_seed(5)
    assert first.equal(MACHINE.sample(5, 5))


def test_given_starts():
    start = torch.tensor([0, 1, 2, 1], dtype=torch.int32)
    rollouts = MACHINE.sample(4, 3, start=start)
    assert rollouts[:, 0].tolist() == start.tolist()
    assert rollouts[[1, 3], 1].eq(0).all()
    assert rollouts.dtype == torch.long


def test_machines_where_states_differ_in_their_successors():
    """Both ways of sampling, from the same distribution."""
    machine = TokFSM.paper().reversed()
    rollouts = machine.sample(500, 8)
    assert machine.adjacency[rollouts[:, :-1], rollouts[:, 1:]].all()
    others = original_trajectories(machine, 500, 8, np.random.default_rng(0))
    assert machine.adjacency[others[:, :-1], others[:, 1:]].all()


def test_the_package_brings_nothing_of_it():
    program = (
        "import json, sys, tl_codebook; before = [m for m in sys.modules if m.startswith('tl_codebook.experiments')]\n"
        "import tl_codebook.experiments.tokfsm; heavy = ['datasets', 'transformers', 'tokenizers', 'transformer_lens', 'accelerate']\n"
        "print(json.dumps([before, [m for m in heavy if m in sys.modules]]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [[], []]
