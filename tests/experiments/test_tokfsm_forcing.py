"""Forcing a state by its codes: on a model in which one code decides, and on random ones against single interventions."""

import itertools
import math

import pytest
import torch

import tl_codebook as tlc
from tests.experiments.neox import FLOOR, model_by_hand, random_model
from tests.tiny import HOSTS
from tl_codebook.errors import ConfigError, DataError, InvalidCodeError, ShapeError, UnknownHookError
from tl_codebook.experiments.tokfsm import TokFSM, write_tokens
from tl_codebook.experiments.tokfsm.forced_codes import codes_while_reading, hooks_while_reading, state_codes, state_hooks
from tl_codebook.experiments.tokfsm.forcing import force_states, jensen_shannon, site_sets, state_forcing
from tl_codebook.experiments.tokfsm.text_of_model import next_state_probabilities

SINGLE = TokFSM(torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1], [1, 1, 0, 0], [0, 0, 1, 1]], dtype=torch.bool), base=5)
"""States of one digit; 4 is none."""
PAIRS = TokFSM.random(12, 3, seed=1, base=4)
TRIPLE = TokFSM.random(6, 3, seed=0, base=2)
"""States 000 to 101."""
Z, MLP = "blocks.0.attn.hook_z", "blocks.0.hook_mlp_out"


@pytest.fixture(params=HOSTS)
def host(request):
    return request.param


@pytest.fixture(params=HOSTS)
def pairs_model(request):
    return random_model(PAIRS, request.param)


@pytest.fixture
def unchecked():
    """Switch the shape checks of the tests off: what the package itself says to a wrong argument is what users see."""
    from jaxtyping import config

    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


def text(machine, n_rows, n_states, seed=0):
    return write_tokens(machine, machine.sample(n_rows, n_states, torch.Generator().manual_seed(seed)), keep_last=True)


def test_divergences_on_paper():
    p, q = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5])
    by_hand = (math.log(4 / 3) + 0.5 * math.log(2 / 3) + 0.5 * math.log(2)) / 2  # from m = [3/4, 1/4]
    assert float(jensen_shannon(p, q)) == pytest.approx(by_hand) == pytest.approx(float(jensen_shannon(q, p)))
    assert float(jensen_shannon(p, p)) == 0
    assert float(jensen_shannon(p, torch.tensor([0.0, 1.0]))) == pytest.approx(math.log(2))
    assert float(jensen_shannon(torch.tensor([0.3, 0.7, 0.0]), torch.tensor([0.3, 0.7, 0.0]))) == 0  # what neither has is no trouble
    rows = torch.rand(50, 3, 7).softmax(-1)
    both = jensen_shannon(rows, rows.flip(0))
    assert both.shape == (50, 3)
    assert both.dtype == torch.float64
    assert bool(((both >= 0) & (both <= math.log(2))).all())


def test_what_is_no_distribution():
    with pytest.raises(ShapeError, match=r"\[2\] and \[3\] were given"):
        jensen_shannon(torch.ones(2) / 2, torch.ones(3) / 3)
    for wrong in (torch.tensor([2.0, -1.0]), torch.tensor([1.0, 1.0]), torch.tensor([math.nan, 1.0])):
        with pytest.raises(DataError, match="Give probabilities, not logits"):
            jensen_shannon(torch.ones(2) / 2, wrong)


def test_codes_of_a_state_by_hand(host):
    model = model_by_hand(SINGLE, host)
    codes = state_codes(model, SINGLE, text(SINGLE, 30, 10), batch_size=7)
    assert list(codes) == [Z, MLP]
    assert codes[Z].shape == (4, 2, 1)
    assert codes[MLP].tolist() == [[0], [1], [2], [3]]
    only = state_codes(model, SINGLE, text(SINGLE, 30, 10), "mlp_out")
    assert list(only) == [MLP]


def test_the_code_that_stands_most_often_and_the_lowest_of_equals(host):
    model = model_by_hand(SINGLE, host)
    tokens = torch.tensor([[5, 0, 1, 0, 2, 0, 1, 3]])  # 0 three times, 1 twice, 2 and 3 once
    said = torch.tensor([0, 5, 3, 5, 1, 2, 2, 4])  # so 0: 5, 5, 2;  1: 3, 2;  2: 1;  3: 4
    with tlc.steer(model, [(f"{MLP}.hook_codes", lambda ids, hook: said[None, :, None])]):
        assert state_codes(model, SINGLE, tokens, MLP)[MLP].tolist() == [[5], [2], [1], [4]]


def test_with_several_codes_the_whole_tuple_counts(host):
    model = random_model(SINGLE, host, attached=False)
    tlc.attach(model, {"z": tlc.CodebookConfig(n_codes=9, k=2)})
    tokens = torch.tensor([[5, 0, 1, 0, 2, 0, 3, 0]])
    said = torch.tensor([[0, 0], [3, 1], [7, 7], [3, 2], [1, 2], [4, 1], [5, 6], [4, 1]])  # 0: 31, 32, 41, 41
    swapped = torch.stack([said, said.flip(-1)], dim=1)[None]  # [batch pos group k]
    with tlc.steer(model, [(f"{Z}.hook_codes", lambda ids, hook: swapped)]):
        codes = state_codes(model, SINGLE, tokens, Z)[Z]
    assert codes.tolist() == [[[4, 1], [1, 4]], [[7, 7], [7, 7]], [[1, 2], [2, 1]], [[5, 6], [6, 5]]]


def test_codes_at_the_last_digit(pairs_model):
    tokens = text(PAIRS, 60, 5)
    codes = state_codes(pairs_model, PAIRS, tokens)
    assert {name: list(ids.shape) for name, ids in codes.items()} == {
        f"blocks.{layer}.{tail}": shape for layer in (0, 1) for tail, shape in (("attn.hook_z", [12, 2, 1]), ("hook_mlp_out", [12, 1]))
    }
    _, cache = pairs_model.run_with_cache(tokens)
    name = "blocks.1.attn.hook_z"
    states, ids = tokens[:, 1::2] * 4 + tokens[:, 2::2], cache[f"{name}.hook_codes"][:, 2::2, 1, 0]
    for state in range(12):
        counts = torch.bincount(ids[states == state], minlength=12)
        assert counts[codes[name][state, 1, 0]] == counts.max()


@pytest.mark.parametrize("machine", [PAIRS, TRIPLE], ids=["two digits", "three digits"])
def test_codes_while_the_next_state_is_read_against_counting(host, machine):
    model = random_model(machine, host)
    tokens = text(machine, 40, 6)
    tables = codes_while_reading(model, machine, tokens, ["L0.z", "L1.mlp_out"], batch_size=7)
    assert len(tables) == machine.n_digits - 1
    _, cache = model.run_with_cache(tokens)
    for name, shape in (("blocks.0.attn.hook_z", (2, 1)), ("blocks.1.hook_mlp_out", (1,))):
        ids = cache[f"{name}.hook_codes"]
        for digit, table in enumerate(tables, 1):
            seen = {}
            for row in range(len(tokens)):
                for last in range(machine.n_digits, tokens.shape[1] - digit, machine.n_digits):
                    before = "".join(map(str, tokens[row, last + 1 - machine.n_digits : last + 1].tolist()))
                    after = "".join(map(str, tokens[row, last + 1 : last + 1 + digit].tolist()))
                    key = int(before, machine.base), int(after, machine.base)
                    seen.setdefault(key, []).append(ids[row, last + digit].reshape(-1).tolist())
            codes = table[name]
            assert codes.shape == (machine.n_states, machine.base**digit, *shape)
            for state in range(machine.n_states):
                for number in range(machine.base**digit):
                    got = codes[state, number].reshape(-1).tolist()
                    if (state, number) not in seen:
                        assert set(got) == {-1}
                        continue
                    for group, code in enumerate(got):
                        counts = torch.bincount(torch.tensor([each[group] for each in seen[state, number]]), minlength=12)
                        assert counts[code] == counts.max()
                        assert code == int(counts.argmax())  # the lowest of equals


def test_a_machine_of_one_digit_has_nothing_to_read_on(host):
    assert codes_while_reading(random_model(SINGLE, host), SINGLE, text(SINGLE, 5, 6)) == []


@pytest.mark.parametrize("machine", [PAIRS, TRIPLE], ids=["two digits", "three digits"])
def test_forced_while_it_is_read_the_next_state_is_that_of_the_other_text(host, machine):
    """With all codes of these positions forced nothing of the text before them is left, so the whole next state is the other text's."""
    model = random_model(machine, host)
    rows, other = text(machine, 4, 4), text(machine, 1, 4, seed=5)
    rows[:, -1] = other[:, -1]  # the embedding of the last digit stays
    rows = rows[[int(state) < machine.n_states for state in _last_states(machine, rows)]]
    target = int(_last_states(machine, other)[0])
    codes = {name: torch.zeros(machine.n_states, *shape, dtype=torch.long) for name, shape in _shapes(model).items()}
    tables = []
    for digit in range(machine.n_digits):
        written = torch.tensor(list(itertools.product(range(machine.base), repeat=digit)), dtype=torch.long)
        _, cache = model.run_with_cache(torch.cat([other.expand(len(written), -1), written], dim=1))
        ids = {name: cache[f"{name}.hook_codes"][:, -1] for name in codes}
        if digit:
            tables.append({name: each[None].expand(machine.n_states, *each.shape) for name, each in ids.items()})
        else:
            for name in codes:
                codes[name][target] = ids[name][0]
    targets, last = torch.full((len(rows),), target), rows.shape[1] - 1
    hooks = state_hooks(codes, targets, codes, last)
    later = hooks_while_reading(tables, targets, codes, last, machine.base)
    forced = next_state_probabilities(model, machine, rows, fwd_hooks=hooks, hooks_after=later, batch_size=3)
    truth = next_state_probabilities(model, machine, other)
    torch.testing.assert_close(forced, truth.expand_as(forced), rtol=1e-4, atol=1e-7)
    for table in tables:  # every digit's codes count
        right = dict(table)
        table.update({name: (ids + 5) % 12 for name, ids in right.items()})
        assert not torch.allclose(next_state_probabilities(model, machine, rows, fwd_hooks=hooks, hooks_after=later), forced, rtol=1e-3)
        table.update(right)


def _last_states(machine, rows):
    places = machine.base ** torch.arange(machine.n_digits - 1, -1, -1)
    return (rows[:, -machine.n_digits :] * places).sum(-1).tolist()


def test_each_row_gets_the_codes_of_its_own_target(pairs_model):
    codes = state_codes(pairs_model, PAIRS, text(PAIRS, 60, 5))
    prefixes, targets = text(PAIRS, 5, 4, seed=3), torch.tensor([3, 0, 11, 7, 7])
    for names, chosen in ((None, list(codes)), ("mlp_out", [name for name in codes if "mlp" in name]), ("L1.z", ["blocks.1.attn.hook_z"])):
        got = force_states(pairs_model, PAIRS, codes, prefixes, targets, names, batch_size=2)
        assert got.shape == (5, 5)
        for row, target in enumerate(targets.tolist()):
            hooks = []
            for name in chosen:
                for group, ids in enumerate(codes[name][target].reshape(-1).tolist()):
                    layer, site = int(name.split(".")[1]), "z" if "hook_z" in name else "mlp_out"
                    hooks.append(tlc.force_code(ids, layer=layer, site=site, group=group, pos=-1))
            with torch.no_grad():
                alone = pairs_model.run_with_hooks(prefixes[row : row + 1], fwd_hooks=hooks)[0, -1].softmax(-1)
            assert got[row].tolist() == pytest.approx(alone.tolist(), rel=1e-4)


def test_a_code_that_decides_gives_exactly_the_target(host):
    model = model_by_hand(SINGLE, host)
    codes = state_codes(model, SINGLE, text(SINGLE, 30, 10))
    prefixes, targets = text(SINGLE, 6, 8), torch.tensor([0, 1, 2, 3, 0, 1])
    got = force_states(model, SINGLE, codes, prefixes, targets, "mlp_out")
    assert got[:, :4].tolist() == [pytest.approx(row, abs=1e-4) for row in SINGLE.transition[targets].tolist()]

    figures = state_forcing(model, SINGLE, codes, n_prefixes_per_state=6, prefix_states=5, seed=0, n_successor_prefixes=3, batch_size=10)
    assert list(figures) == [
        "none", "L0.z", "L0.mlp_out", "all MLP", "all MLP, wrong", "all MLP, random", "all attention", "all", "all, wrong", "all, random",
    ]  # fmt: skip
    none = figures["none"]
    assert (none.normalised_machine, none.normalised_model, none.n_rows) == (1, 1, 24)
    assert none.jsd_machine == pytest.approx(none.jsd_model, abs=1e-4)
    for label in ("L0.mlp_out", "all MLP", "all"):
        assert figures[label].normalised_machine == pytest.approx(0, abs=1e-4)
        assert figures[label].normalised_model == pytest.approx(0, abs=1e-6)
    assert figures["L0.mlp_out"].successor_share is None
    assert (figures["all MLP"].successor_share, figures["all"].successor_exact) == (1, 1)
    for label in ("L0.z", "all attention"):  # which says nothing beside the MLP
        assert figures[label].normalised_model == pytest.approx(1, abs=1e-3)
    for label in ("all MLP, wrong", "all MLP, random", "all, wrong", "all, random"):
        assert figures[label].normalised_machine > 0.3
        assert figures[label].successor_share is None


def test_the_unforced_divergence_by_hand(host):
    """Deterministic: 0 -> 1 -> 0. Nothing forced, the model is sure of the wrong state; the wrong state is the one that stands there."""
    flip = TokFSM(torch.tensor([[False, True], [True, False]]), base=2)
    model = model_by_hand(flip, host)
    codes = state_codes(model, flip, torch.tensor([[2, 0, 1, 0, 1]]))
    figures = state_forcing(model, flip, codes, n_prefixes_per_state=2, prefix_states=0, seed=0)
    assert figures["none"].jsd_machine == pytest.approx(math.log(2), abs=100 * FLOOR**0.5)
    assert figures["all MLP"].jsd_machine == pytest.approx(0, abs=1e-4)
    assert figures["all MLP, wrong"].normalised_model == pytest.approx(1, abs=1e-4)
    assert 0 <= figures["all MLP, random"].normalised_model <= 1


def test_figures_are_those_of_the_parts(pairs_model):
    """The successors and the divergence from the model, computed again from one set of sites."""
    codes = state_codes(pairs_model, PAIRS, text(PAIRS, 60, 5))
    sites = {"late": ["L1.z", "L1.mlp_out"], "early": ["L0.mlp_out"]}
    arguments = {"n_prefixes_per_state": 3, "prefix_states": 4, "sites": sites, "controls": ["late"]}
    figures = state_forcing(pairs_model, PAIRS, codes, seed=7, batch_size=11, **arguments)
    assert list(figures) == ["none", "late", "late, wrong", "late, random", "early"]
    assert figures["late"].successor_share is not None
    assert figures["early"].successor_share is None
    again = state_forcing(pairs_model, PAIRS, codes, seed=7, batch_size=100, **arguments)
    assert {k: v._replace(successor_share=0, successor_exact=0) for k, v in figures.items()} == {
        k: pytest.approx(v._replace(successor_share=0, successor_exact=0), rel=1e-4) for k, v in again.items()
    }
    assert figures["late"].successor_share == pytest.approx(again["late"].successor_share)
    other = state_forcing(pairs_model, PAIRS, codes, seed=8, n_successor_prefixes=0, **arguments)
    assert other["none"].jsd_model != pytest.approx(figures["none"].jsd_model, rel=1e-6)
    assert other["late"].successor_share is None
    assert all(0 <= value.jsd_machine <= math.log(2) and value.n_rows == 36 for value in figures.values())


def test_all_codes_of_a_position_leave_nothing_of_the_text_before_it(pairs_model):
    """The residual stream is the embedding and the codes; so with all of them forced, and the same last digit, the other text is gone."""
    rows, other = text(PAIRS, 6, 4), text(PAIRS, 1, 4, seed=5)
    rows[:, -2:], other[:, -2:] = torch.tensor([1, 3]), torch.tensor([0, 3])  # states 7, and 3
    codes = {name: torch.zeros(12, *shape, dtype=torch.long) for name, shape in _shapes(pairs_model).items()}
    with torch.no_grad():
        logits, cache = pairs_model.run_with_cache(other)
    for name, ids in codes.items():
        ids[3] = cache[f"{name}.hook_codes"][0, -1]
    forced = force_states(pairs_model, PAIRS, codes, rows, torch.full((6,), 3))
    assert forced.tolist() == [pytest.approx(logits[0, -1].softmax(-1).tolist(), rel=1e-4)] * 6
    some = force_states(pairs_model, PAIRS, codes, rows, torch.full((6,), 3), "mlp_out")
    assert not torch.allclose(some, forced, rtol=1e-3)


def _shapes(model):
    return {name: (point.codebook.n_groups, 1) if point.codebook.n_groups > 1 else (1,) for name, point in tlc.sites(model).items()}


def test_sets_of_sites():
    names = [f"blocks.{layer}.{tail}" for layer in (0, 1) for tail in ("attn.hook_z", "hook_mlp_out", "hook_resid_post")]
    sets = site_sets(names)
    assert list(sets)[6:] == ["all MLP", "all attention", "all"]
    assert sets["L1.z"] == ["blocks.1.attn.hook_z"]
    assert sets["all MLP"] == ["blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"]
    assert sets["all attention"] == ["blocks.0.attn.hook_z", "blocks.1.attn.hook_z"]
    assert sets["all"] == names
    assert list(site_sets(["blocks.0.hook_mlp_out"])) == ["L0.mlp_out", "all MLP", "all"]


def test_bad_codes_of_states(pairs_model):
    with pytest.raises(DataError, match=r"states \[.*\] \(\d+ of 12\) never occur in the text .* Give more rows"):
        state_codes(pairs_model, PAIRS, text(PAIRS, 1, 4))
    with pytest.raises(UnknownHookError, match=r"no codebook sits at 'attn_out'"):
        state_codes(pairs_model, PAIRS, text(PAIRS, 60, 5), "attn_out")


def test_bad_forcing(pairs_model, unchecked):
    codes = state_codes(pairs_model, PAIRS, text(PAIRS, 60, 5))
    rows, targets = text(PAIRS, 2, 4), torch.tensor([1, 2])

    def force(message, error, codes=codes, rows=rows, targets=targets, names=None):
        with pytest.raises(error, match=message):
            force_states(pairs_model, PAIRS, codes, rows, targets, names)

    force("ends in a complete state", DataError, rows=rows[:, :-1])
    force(r"state 12 was given, but the machine has 12 states", DataError, targets=torch.tensor([1, 12]))
    force(r"targets \[1\] were given for 2 rows", ShapeError, targets=torch.tensor([1]))
    force("no codebook sits at 'attn_out'", UnknownHookError, names="attn_out")
    force("no site was given", ConfigError, names=[])
    force(r"codes of 'blocks\.0\.hook_mlp_out' were asked for", DataError, {Z: codes[Z]}, names="L0.mlp_out")
    force(r"codes \[11, 1\] were given for 'blocks\.0\.hook_mlp_out'", ShapeError, {MLP: codes[MLP][:-1]})
    force(r"the id 99", InvalidCodeError, {MLP: codes[MLP] * 0 + 99})
    force(r"the source has 1 groups, the codebook 2", ShapeError, {Z: codes[Z][:, :1]})


def test_bad_figures(pairs_model):
    codes = state_codes(pairs_model, PAIRS, text(PAIRS, 60, 5))

    def measure(message, error=ConfigError, machine=PAIRS, codes=codes, **arguments):
        with pytest.raises(error, match=message):
            state_forcing(pairs_model, machine, codes, **{"prefix_states": 3, "seed": 0} | arguments)

    measure("n_prefixes_per_state=0 was asked for", n_prefixes_per_state=0)
    measure("prefix_states=-1 was asked for", prefix_states=-1)
    measure(r"n_successor_prefixes=3 was asked for, but there are 2 rows", n_prefixes_per_state=2, n_successor_prefixes=3)
    measure(r"rows of 128 tokens were asked for, but the model takes 64", prefix_states=62)
    measure(r"controls for 'all z' were asked for", controls=["all z"])
    measure(r"the label 'none'", sites={"none": ["z"]})
    measure(r"no site was given", sites={"nowhere": []})
    measure(r"batch_size=0", batch_size=0)
    sink = TokFSM(torch.eye(12, dtype=torch.bool)[torch.zeros(12, dtype=torch.long)], base=4)
    measure(r"rollouts of 4 states of this machine end \(nearly\) always in state 0", DataError, machine=sink)
    one = TokFSM(torch.ones(1, 1, dtype=torch.bool), base=4, n_digits=2)
    measure("a machine of one state", DataError, machine=one)
