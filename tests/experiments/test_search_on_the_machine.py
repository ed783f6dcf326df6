"""Searches on the committed model of the paper's machine, where every concept is known: the code ranked first is the right one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import tl_codebook as tlc
from tests.tiny import HOSTS
from tl_codebook.experiments import tokfsm
from tl_codebook.store import match_text

pytestmark = pytest.mark.skipif("hooked" not in HOSTS, reason="it was saved from a HookedTransformer, which TransformerLens 4 has not")
FOLDER = Path(__file__).resolve().parents[2] / "demos" / "tokfsm"
RESULTS = json.loads((FOLDER / "results.json").read_text())
SETTING = tokfsm.TokFSMSetting.from_dict(RESULTS["setting"])
MACHINE = SETTING.machine()


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Codes of 200 rows to search in, and of 200 others to check what was found."""
    model = tlc.load(FOLDER / "model").to(torch.float32)
    rows = tokfsm.held_out_rows(SETTING, seed=RESULTS["seed"])
    folder = tmp_path_factory.mktemp("stores")
    return [tlc.collect_codes(model, half, folder / str(i), progress=False) for i, half in enumerate((rows[:200], rows[200:]))]


def state_at(store):
    """Return the state that was just written at each position, -1 elsewhere, from the tokens alone."""
    found = np.full(store.n_tokens, -1)
    for i in range(store.n_sequences):
        where = store.sequence(i)
        tokens = torch.from_numpy(store.tokens(where.start, where.stop))[None]
        states = tokfsm.read_states(MACHINE, tokens)[0].numpy()
        found[where.start + 2 : where.start + 1 + 2 * len(states) : 2] = states[: len(range(where.start + 2, where.stop, 2))]
    return found


def state_matches(store, state):
    """Return the second digits of a state; looking back for the first one, so that 0 0 0 is two matches, of which one is of one state."""
    first, second = f"{state:02d}"
    matches = match_text(store, f"(?<={first}){second}")
    return matches.where(matches.start % 2 == 1)


def test_the_search_finds_a_state_where_it_stands(stores):
    truth = state_at(stores[0])
    for state in (0, 7, 42, 99):
        np.testing.assert_array_equal(state_matches(stores[0], state).positions(), np.flatnonzero(truth == state))


def share_right(stores, concepts, truth):
    """Of concepts [(value, query)], the share whose first code is, in the other text, most often where that value is."""
    right, precise = [], []
    for value, query in concepts:
        code = tlc.search_codes(stores[0], query, by="mi", n=1)[0].code
        values = truth[stores[1].positions(code)]
        kinds, counts = np.unique(values, return_counts=True)
        right.append(kinds[counts.argmax()] == value)
        precise.append(float(np.mean(values == value)))
    return float(np.mean(right)), float(np.mean(precise))


def test_the_right_code_is_first_for_states_and_digits(stores):
    states = [(state, state_matches(stores[0], state)) for state in range(MACHINE.n_states)]
    right, precision = share_right(stores, states, state_at(stores[1]))
    assert right >= 0.98
    assert precision >= 0.98
    digits = [(digit, [digit]) for digit in range(MACHINE.base)]
    right, precision = share_right(stores, digits, stores[1].tokens(0, stores[1].n_tokens))
    assert right == 1
    assert precision >= 0.98


def test_a_search_for_a_shuffled_concept_finds_nothing(stores):
    """The control: positions at random, as many as a state has, have no code."""
    store = stores[0]
    text = np.flatnonzero(~store.is_special())
    some = np.random.default_rng(0).choice(text, 200, replace=False)
    mask = np.isin(np.arange(store.n_tokens), some)
    assert tlc.search_codes(store, mask, n=1)[0].f1 < 0.1
    assert tlc.search_codes(store, mask, by="mi", n=1)[0].mi < 0.005
