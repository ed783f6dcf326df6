"""The finite state machine, its streams, texts and rows, as the original has them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tl_codebook.experiments.tokfsm import (
    TokFSM,
    bayes_predictions,
    make_tokenizer,
    original_continuations,
    original_trajectories,
    read_text,
    transition_validity,
    write_text,
    write_tokens,
)

CASES = ["N100_e10_b10_seed42", "N4_e1_b2_seed42"]


class Golden:
    """A case, and the machine that it was made of."""

    def __init__(self, folder):
        self.folder = folder
        self.spec = json.loads((folder / "expected.json").read_text())
        with np.load(folder / "arrays.npz") as arrays:
            self.arrays = dict(arrays)
        args = self.spec["args"]
        self.rng = np.random.default_rng(args["seed"])
        self.machine = TokFSM.random(args["N"], args["num_edges"], self.rng, base=args["representation_base"])


@pytest.fixture(params=CASES)
def golden(request, shared):
    return Golden(shared(f"golden/fsm/{request.param}"))


def test_the_machine(golden):
    machine, spec = golden.machine, golden.spec
    assert machine.n_digits == spec["digits"]
    assert np.array_equal(machine.transition.numpy(), golden.arrays["transition_matrix"])
    assert np.array_equal(machine.reversed().transition.numpy(), golden.arrays["reverse_matrix"])
    states = range(machine.n_states)
    assert [machine.successors(state).tolist() for state in states] == spec["out_neighbors"]
    assert [machine.predecessors(state).tolist() for state in states] == spec["in_neighbors"]
    assert [write_text(machine, torch.tensor([state])) for state in states] == spec["token_repr"]


def test_a_machine_from_a_matrix(golden):
    matrix, spec = golden.arrays["transition_matrix"], golden.spec["loaded"]
    machine = TokFSM(torch.from_numpy(matrix) > 0, base=golden.machine.base)
    assert (machine.n_states, machine.n_edges, machine.n_digits) == (spec["N"], spec["N"] * spec["num_edges"], spec["digits"])
    assert machine.adjacency.equal(golden.machine.adjacency)
    assert transition_validity(machine, [spec["traj"]]).share == 1


def test_trajectories(golden):
    machine, spec = golden.machine, golden.spec
    after = spec["generate_trajectory_after_init"]
    assert original_trajectories(machine, len(after), len(after[0]), golden.rng).tolist() == after
    seeded = spec["generate_trajectory_seed7"]
    assert original_trajectories(machine, len(seeded), len(seeded[0]), np.random.default_rng(7)).tolist() == seeded


def test_continuations_and_steps(golden):
    machine, spec = golden.machine, golden.spec
    steps = spec["step_seed8"]
    assert original_continuations(machine, torch.tensor([0]), len(steps), np.random.default_rng(8)).tolist() == [steps]
    want = golden.arrays["generate_trajectories_seed9"]
    start = torch.tensor(spec["generate_trajectories_start"])
    assert original_continuations(machine, start, want.shape[1], np.random.default_rng(9)).tolist() == want.tolist()


def test_transition_accuracy(golden):
    for item in golden.spec["transition_accuracy"]:
        validity = transition_validity(golden.machine, item["trajs"])
        assert [validity.share, validity.first_share] == item["result"]


def test_valid_trajectories(golden):
    """The case tries its first two lists of `transition_accuracy`, one by one."""
    trajectories = [row for item in golden.spec["transition_accuracy"][:2] for row in item["trajs"]]
    assert [transition_validity(golden.machine, [row]).share == 1 for row in trajectories] == golden.spec["is_valid_trajectory"]


def test_text(golden):
    machine, spec = golden.machine, golden.spec
    assert [write_text(machine, torch.tensor(row)) for row in spec["generate_trajectory_seed7"]] == spec["traj_to_str"]
    texts = spec["seq_to_traj"]
    assert [read_text(machine, text).tolist() for text in texts["in"]] == texts["out"]
    assert read_text(machine, texts["single_in"]).tolist() == texts["single_out"]


def test_inputs_that_can_occur(golden):
    """A state, and a state with the first digit of a successor."""
    machine, spec = golden.machine, golden.spec["valid_input"]
    states = torch.arange(machine.n_states)[:, None]
    first_digits = bayes_predictions(machine, write_tokens(machine, states, keep_last=True))[:, -1] > 0
    pairs = [write_text(machine, states[state]) + str(digit) for state, digit in first_digits.nonzero().tolist()]
    assert sorted(pairs) == sorted(spec["3"])
    assert [write_text(machine, state) for state in states] == spec["2"]


def test_the_dataset(golden):
    """The original's labels are the tokens, BOS counted; ours come of `collate`."""
    spec = golden.spec["dataset"]
    want = golden.arrays["dataset/input_ids"]
    machine = golden.machine
    assert machine.bos == spec["bos_token_id"]
    rollouts = original_trajectories(machine, spec["max_samples"], machine.states_in_row(spec["seq_len"]), golden.rng)
    assert write_tokens(machine, rollouts).tolist() == want.tolist()


def test_the_tokenizer(golden):
    from transformers import AutoTokenizer

    ours, theirs = make_tokenizer(golden.machine), AutoTokenizer.from_pretrained(golden.folder / "tokenizer")
    assert ours.get_vocab() == theirs.get_vocab()
    texts = [*golden.spec["traj_to_str"], *golden.spec["seq_to_traj"]["in"], "", "01<|endoftext|>10", "0 1?"]
    for text in texts:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    for ids in ours(golden.spec["seq_to_traj"]["in"])["input_ids"]:
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        assert getattr(ours, name) == getattr(theirs, name)
