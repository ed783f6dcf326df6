"""Flip rates in a model whose codes are known, and what is refused. Against runs one by one: tests/hosts/test_graphs.py."""

import math

import networkx as nx
import pytest
import torch

import tl_codebook as tlc
from tests.tiny import make_host
from tests.unit.model_by_hand import POST, chain
from tl_codebook.errors import ConfigError, DataError, InvalidCodeError, LabelError, PositionError, ShapeError, UnknownHookError
from tl_codebook.graphs import flip_rate
from tl_codebook.names import Code

TOKENS = torch.tensor([[3, 4, 5, 3], [6, 3, 7, 8]])
CAUSE, EFFECT = "L0.mlp_out:3", "L0.resid_post:3"


@pytest.fixture(scope="module")
def model():
    return chain()


def flips(model, cause=CAUSE, effect=EFFECT, **options):
    return flip_rate(model, TOKENS, cause, effect, progress=False, **options)


def test_a_cause_makes_its_effect_appear(model):
    found = flips(model, effect=["L0.resid_post:3", "L0.resid_post:4", "L0.resid_post:9"])
    row = found[CAUSE, EFFECT]
    assert (row.before, row.after, row.difference, row.flipped) == (0, 1, 1, 1)
    assert (row.n_rows, row.n_absent) == (5, 5)  # of 8 positions 3 have the code already
    assert (row.random_cause, row.wrong_effect) == (0, 0)
    other = found[CAUSE, "L0.resid_post:4"]  # at one of the five positions, from which it is driven
    assert (other.before, other.after, other.flipped, other.n_rows, other.n_absent) == (0.2, 0, 0, 5, 4)
    assert other.difference == pytest.approx(-0.2)
    assert other.wrong_effect == 0  # 3 is the farthest from it in frequency
    # Of the ten codes nearest to 4 in frequency, which all but 3 are, forcing 9 makes 9 appear.
    assert flips(model, "L0.mlp_out:9", "L0.resid_post:4").wrong_effect.item() == pytest.approx(0.1)
    never = found[CAUSE, "L0.resid_post:9"]
    assert (never.before, never.after, never.flipped, never.n_absent, never.wrong_effect) == (0, 0, 0, 5, 0)
    assert [tuple(map(str, row[:2])) for row in found.rows()] == [(CAUSE, f"L0.resid_post:{n}") for n in (3, 4, 9)]
    assert torch.equal(found.difference, found.after - found.before)


def test_what_they_look_like(model):
    rates = flips(model, ["L0.mlp_out:3", "L0.mlp_out:4"], ["L0.resid_post:3", "L0.resid_post:4"])
    said = repr(rates).splitlines()
    assert said[0] == "FlipRates of 2 causes and 2 effects, lag 0"
    best = max(rates.rows(), key=lambda row: row.flipped)
    assert said[1].startswith(f"  {best.cause} -> ")
    assert f"flipped {best.flipped:.2f} of " in said[1]
    assert len(said) == 5


def test_each_cause_has_its_own_rows(model):
    causes = [f"L0.mlp_out:{n}" for n in (3, 4, 9)]
    effects = [Code(0, "resid_post", None, n) for n in (3, 4, 9)]
    found = flips(model, causes, effects)
    assert found.n_rows.tolist() == [[5] * 3, [7] * 3, [8] * 3]
    assert found.n_absent.tolist() == [[5, 4, 5], [4, 7, 7], [5, 7, 8]]
    assert torch.equal(found.flipped, torch.eye(3, dtype=torch.float64))
    assert torch.equal(found.after, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(found.before, torch.tensor([[0, 1 / 5, 0], [3 / 7, 0, 0], [3 / 8, 1 / 8, 0]], dtype=torch.float64))
    for i in range(3):
        alone = flips(model, causes[i], effects)
        assert torch.equal(alone.flipped[0], found.flipped[i])


def test_a_random_cause_makes_the_effect_appear_when_it_is_the_cause(model):
    # Forcing 9 does not make 3 appear; of the codes drawn instead, 3 would.
    found = flips(model, "L0.mlp_out:9", "L0.resid_post:3", n_rows=None, seed=1)
    assert found.flipped.item() == 0
    many = [flips(model, "L0.mlp_out:9", "L0.resid_post:5", seed=seed).random_cause.item() for seed in range(6)]
    assert max(many) > 0  # 5 is among the ten nearest in frequency to 9
    assert max(many) < 1
    assert many == [flips(model, "L0.mlp_out:9", "L0.resid_post:5", seed=seed).random_cause.item() for seed in range(6)]


def test_the_effect_is_looked_for_later(model):
    found = flips(model, effect=["L0.resid_post:3", "L0.resid_post:5"], lag=1)
    assert found.n_rows.tolist() == [[4, 4]]  # (0, 1), (0, 2), (1, 0), (1, 2): the last position has nothing after it
    assert found.before.tolist() == [[0.5, 0.25]]  # what stands after them: 5, 3, 3, 8
    assert found.after.tolist() == [[0.5, 0.25]]  # other positions change nothing in this model
    assert found.flipped.tolist() == [[0, 0]]
    assert found.n_absent.tolist() == [[2, 3]]


@pytest.mark.parametrize(
    ("pos", "n"),
    [
        (None, 5),
        (-1, 1),
        ([0, 1], 2),
        (2, 2),
        (torch.tensor([False, True, True, False]), 3),
        (torch.tensor([[False] * 4, [True] * 4]), 3),
    ],
)
def test_positions(model, pos, n):
    assert flips(model, pos=pos).n_rows.item() == n


def test_rows_are_drawn_by_the_seed(model):
    assert flips(model, n_rows=2).n_rows.item() == 2
    before = {flips(model, effect="L0.resid_post:4", n_rows=2, seed=seed).before.item() for seed in range(8)}
    assert before == {0.0, 0.5}
    same = [flips(model, effect="L0.resid_post:4", n_rows=2, seed=3).before.item() for _ in range(2)]
    assert same[0] == same[1]


def test_without_controls(model):
    passes = []
    handle = model.blocks[0].register_forward_pre_hook(lambda module, args: passes.append(args[0].shape[0]))
    try:
        found = flips(model, controls=False, batch_size=3)
    finally:
        handle.remove()
    assert passes == [2, 3, 2]  # the text, and five rows
    assert math.isnan(found.random_cause.item())
    assert math.isnan(found.wrong_effect.item())
    assert found.flipped.item() == 1


def test_the_batch_size_changes_nothing(model):
    many = flips(model, [CAUSE, "L0.mlp_out:5"], [EFFECT, "L0.resid_post:5"])
    for batch_size in (1, 2, 7):
        few = flips(model, [CAUSE, "L0.mlp_out:5"], [EFFECT, "L0.resid_post:5"], batch_size=batch_size)
        for name in ("before", "after", "flipped", "random_cause", "wrong_effect", "n_rows", "n_absent"):
            assert torch.equal(getattr(few, name), getattr(many, name)), name


def test_an_effect_that_is_always_there_has_no_rate():
    model = make_host("native")
    tlc.attach(model, {"mlp_out": tlc.CodebookConfig(n_codes=3, k=3, selection="nearest")})  # every code everywhere
    with pytest.raises(
        DataError, match=r"L0.mlp_out:1 is at every position that was asked for already, so that forcing it changes nothing"
    ):
        flip_rate(model, TOKENS, "L0.mlp_out:1", "L1.mlp_out:1", progress=False)
    tlc.detach(model, "L0.mlp_out")
    tlc.attach(model, {"L0.mlp_out": tlc.CodebookConfig(n_codes=3, k=1)})
    ids = model.run_with_cache(TOKENS)[1]["blocks.0.hook_mlp_out.hook_codes"].flatten().tolist()
    cause = next(code for code in range(3) if code not in ids or ids.count(code) < len(ids))
    row = flip_rate(model, TOKENS, f"L0.mlp_out:{cause}", "L1.mlp_out:1", progress=False)[f"L0.mlp_out:{cause}", "L1.mlp_out:1"]
    assert (row.before, row.after, row.n_absent) == (1, 1, 0)
    assert math.isnan(row.flipped)


def test_the_graph_has_what_is_above_the_controls(model):
    found = flips(model, [CAUSE, "L0.mlp_out:4"], [EFFECT, "L0.resid_post:4", "L0.resid_post:9"])
    graph = found.graph()
    assert isinstance(graph, nx.DiGraph)
    assert {(str(a), str(b)) for a, b in graph.edges} == {(CAUSE, EFFECT), ("L0.mlp_out:4", "L0.resid_post:4")}
    edge = graph.edges[Code.parse(CAUSE), Code.parse(EFFECT)]
    assert (edge["weight"], edge["after"], edge["n_rows"], edge["wrong_effect"]) == (1, 1, 5, 0)
    assert graph.graph == {"kind": "flips", "lag": 0, "sites": ["blocks.0.hook_mlp_out", POST]}
    assert found.graph(least=1.0).number_of_edges() == 0


BAD = {
    "lag": ({"lag": -1}, ConfigError, r"lag=-1 was asked for. Give a whole number >= 0"),
    "long lag": ({"lag": 4}, DataError, r"lag=4 was asked for, but the sequences have 4 positions"),
    "no position": ({"lag": 1, "pos": -1}, DataError, r"no position was left at which to force anything: pos=-1, lag=1"),
    "batch": ({"batch_size": 0}, ConfigError, r"batch_size=0 was asked for"),
    "rows": ({"n_rows": 0}, ConfigError, r"n_rows=0 was asked for"),
    "backwards": (
        {"cause": EFFECT, "effect": CAUSE},
        ConfigError,
        r"forcing L0.resid_post:3 was asked to change L0.mlp_out:3, whose site does not",
    ),
    "same site": ({"effect": "L0.mlp_out:4"}, ConfigError, r"whose site does not come after it. Give effects of later sites"),
    "cause id": ({"cause": "L0.mlp_out:12"}, InvalidCodeError, r"code 12 was asked for, but the codebook has 12. Give 0 to 11"),
    "effect id": ({"effect": "L0.resid_post:99"}, InvalidCodeError, r"code 99 was asked for, but the codebook has 12"),
    "group": ({"cause": "L0.z:3"}, LabelError, r"L0.z has 4 groups. Say which: 'L0.z.0:3' to 'L0.z.3:3'"),
    "no label": ({"cause": "mlp_out 3"}, LabelError, r"cannot read 'mlp_out 3' as a code"),
    "no book": ({"effect": "L0.attn_out:3"}, UnknownHookError, r"no codebook sits at 'blocks.0.hook_attn_out'"),
    "none": ({"effect": []}, InvalidCodeError, r"no effect was given. Give one code or several"),
    "twice": ({"cause": [CAUSE, CAUSE]}, InvalidCodeError, r"the cause L0.mlp_out:3 was given more than once"),
    "outside": ({"pos": 4}, PositionError, r"position 4 was asked for, but there are 4. Give 0 to 3, or negative ones"),
    "a bool": ({"pos": True}, PositionError, r"position True was asked for"),
    "mask": ({"pos": torch.ones(3, dtype=torch.bool)}, ShapeError, r"a mask of shape \[3\] was given. Give \[4\] or \[2, 4\]"),
    "tokens": ({"tokens": TOKENS + 9}, DataError, r"tokens has token ids from 12 to 17, but the model's vocabulary is 0 to 11"),
    "shape": ({"tokens": TOKENS[0]}, ShapeError, r"tokens is torch.int64 \[4\]"),
    "slot": ({"slot": 1}, InvalidCodeError, r"slot 1 was asked for 1 code, but there are 1 slots"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_input_is_refused(unchecked, model, fault):
    changes, kind, message = BAD[fault]
    with pytest.raises(kind, match=message):
        flip_rate(model, **{"tokens": TOKENS, "cause": CAUSE, "effect": EFFECT, "progress": False} | changes)


def test_what_was_not_measured_is_refused(model):
    found = flips(model)
    with pytest.raises(InvalidCodeError, match=r"L0.mlp_out:4 is no cause here. There are: L0.mlp_out:3"):
        found["L0.mlp_out:4", EFFECT]
    with pytest.raises(InvalidCodeError, match=r"L0.resid_post:9 is no effect here"):
        found[CAUSE, "L0.resid_post:9"]


def test_a_codebook_of_one_code_has_no_control():
    model = make_host("native")
    tlc.attach(model, {"L0.mlp_out": tlc.CodebookConfig(n_codes=1, k=1), "L1.mlp_out": tlc.CodebookConfig(n_codes=4, k=1)})
    hook = ("blocks.0.hook_mlp_out.hook_codes", lambda ids, hook: torch.where(torch.arange(ids.shape[1])[:, None] > 1, -1, ids))
    with model.hooks(fwd_hooks=[hook]):  # at positions 2 and 3 no code at all
        with pytest.raises(ConfigError, match=r"the codebook of L0.mlp_out:0 has no other code to compare it with. Say controls=False"):
            flip_rate(model, TOKENS, "L0.mlp_out:0", "L1.mlp_out:0", progress=False)
        assert flip_rate(model, TOKENS, "L0.mlp_out:0", "L1.mlp_out:0", controls=False, progress=False).n_rows.item() == 4
