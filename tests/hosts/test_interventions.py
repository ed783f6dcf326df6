"""Forcing: which positions, which slots, which groups, and nothing else."""

import numpy as np
import pytest
import torch

import tl_codebook as tlc
from tests.hosts.prepared import LAST, LAST_Z, LENGTH, K, assert_site_carries, ids_of, run, unused
from tests.hosts.state import TOKENS
from tl_codebook import force_code
from tl_codebook.errors import EmptyInterventionWarning, InvalidCodeError, LabelError, PositionError
from tl_codebook.hosts import is_bridge

# --- Where


def test_forcing_changes_the_site_asked_and_nothing_else(any_host):
    books, before = any_host.books, any_host.before
    after = run(any_host.model, force_code("L1.mlp_out:5", pos=3))
    expected = ids_of(before).clone()
    expected[:, 3, -1] = 5
    assert torch.equal(ids_of(after), expected)
    assert_site_carries(after, books[LAST])
    others = torch.arange(LENGTH) != 3
    assert torch.equal(after[LAST][:, others], before[LAST][:, others])
    for name in books:
        if name != LAST:
            assert torch.equal(ids_of(after, name), ids_of(before, name)), name
            assert torch.equal(after[name], before[name]), name


def test_forcing_one_head_leaves_the_other_heads(any_host):
    books, before, name = any_host.books, any_host.before, "blocks.0.attn.hook_z"
    code = unused(ids_of(before, name)[:, :, 2])
    after = run(any_host.model, force_code(code, layer=0, site="z", head=2, pos=[2, 4]))
    expected = ids_of(before, name).clone()
    expected[:, [2, 4], 2, -1] = code
    assert torch.equal(ids_of(after, name), expected)
    assert_site_carries(after, books[name], name)
    z, plain = (cache[name].reshape(2, LENGTH, 4, 8) for cache in (after, before))
    assert torch.equal(z[:, :, [0, 1, 3]], plain[:, :, [0, 1, 3]])
    assert not torch.equal(z[:, [2, 4], 2], plain[:, [2, 4], 2])
    for other in books:  # nothing that comes later can change an earlier position
        assert torch.equal(ids_of(after, other)[:, :2], ids_of(before, other)[:, :2])


def test_several_hooks_at_one_place_act_one_after_the_other(host):
    before = ids_of(host.before, LAST_Z)
    hooks = [force_code("L1.z.0:4", pos=1), force_code("L1.z.3:5", pos=2), force_code("L1.z.0:6", pos=1, slot=0)]
    expected = before.clone()
    expected[:, 1, 0, -1], expected[:, 2, 3, -1], expected[:, 1, 0, 0] = 4, 5, 6
    assert torch.equal(ids_of(run(host.model, *hooks), LAST_Z), expected)


def at(*places):
    rows = torch.zeros(2, LENGTH, dtype=torch.bool)
    rows[:, list(places)] = True
    return rows


MASK = torch.tensor([0, 1, 0, 0, 1, 1, 0], dtype=torch.bool)
EACH = torch.tensor([[1, 0, 0, 0, 0, 0, 1], [0, 0, 1, 1, 0, 0, 0]], dtype=torch.bool)
POSITIONS = {
    "None": (None, at(*range(7))),
    "int": (3, at(3)),
    "zero": (0, at(0)),
    "negative": (-2, at(5)),
    "first from the end": (-7, at(0)),
    "numpy int": (np.int64(3), at(3)),
    "tensor of one": (torch.tensor(3), at(3)),
    "list": ([0, -1], at(0, 6)),
    "list with a repetition": ([2, 2, -5], at(2)),
    "tuple": ((1, 2), at(1, 2)),
    "range": (range(2, 5), at(2, 3, 4)),
    "tensor": (torch.tensor([1, 5]), at(1, 5)),
    "numpy array": (np.array([1, -1]), at(1, 6)),
    "slice": (slice(2, 5), at(2, 3, 4)),
    "slice from the end": (slice(-3, None), at(4, 5, 6)),
    "slice to the end": (slice(None, -2), at(0, 1, 2, 3, 4)),
    "slice with a step": (slice(1, None, 2), at(1, 3, 5)),
    "slice with all three": (slice(-6, -1, 3), at(1, 4)),
    "slice beyond the end": (slice(5, 100), at(5, 6)),
    "mask": (MASK, MASK.expand(2, 7)),
    "mask as a list": (MASK.tolist(), MASK.expand(2, 7)),
    "mask of numpy": (MASK.numpy(), MASK.expand(2, 7)),
    "mask of one row": (MASK.unsqueeze(0), MASK.expand(2, 7)),
    "mask for each sequence": (EACH, EACH),
}


@pytest.mark.parametrize("form", POSITIONS)
def test_each_way_to_give_positions(host, form):
    pos, rows = POSITIONS[form]
    before = ids_of(host.before)
    expected = before.clone()
    expected[..., -1] = torch.where(rows, unused(before), before[..., -1])
    assert torch.equal(ids_of(run(host.model, force_code(unused(before), layer=1, site="mlp_out", pos=pos))), expected)


@pytest.mark.parametrize("pos", [[], torch.tensor([], dtype=torch.long), torch.zeros(7, dtype=torch.bool)], ids=["list", "tensor", "mask"])
def test_no_position_warns_and_changes_nothing(host, pos):
    with pytest.warns(EmptyInterventionWarning, match=r"at no position was asked for: it will change nothing"):
        hook = force_code("L1.mlp_out:5", pos=pos)
    assert torch.equal(ids_of(run(host.model, hook)), ids_of(host.before))
    with tlc.steer(host.model, [hook]):  # asked to do nothing, it does not count as lost
        host.model(TOKENS)


@pytest.mark.parametrize(
    ("pos", "message"),
    [
        (7, r"L1|blocks.1.hook_mlp_out: position 7 was asked for, but the sequence has 7 positions. Give 0 to 6, or -7 to -1"),
        (-8, r"position -8 was asked for, but the sequence has 7 positions"),
        ([1, 99], r"position 99 was asked for"),
        (torch.ones(6, dtype=torch.bool), r"a mask of shape \(6,\) was given for 2 x 7 positions. Give \[7\] or \[2, 7\]"),
        (torch.ones(3, 7, dtype=torch.bool), r"a mask of shape \(3, 7\) was given"),
    ],
)
def test_positions_outside_the_sequence_raise_when_the_model_runs(host, pos, message):
    with pytest.raises(PositionError, match=message):
        run(host.model, force_code("L1.mlp_out:5", pos=pos))
    assert torch.equal(ids_of(run(host.model)), ids_of(host.before))


@pytest.mark.parametrize(
    ("pos", "message"),
    [
        (2.0, r"position 2.0 is a float. Give a whole number"),
        (True, r"position True is a bool"),
        ("3", r"position '3' is a str"),
        ([1, 2.5], r"position 2.5 is a float"),
        (torch.tensor(1.0), r"is a (Tensor|torch.float32)"),
        (torch.tensor([[1, 2]]), r"is a (Tensor|torch.int64)"),
        (slice(0, 5, -1), r"step -1 was given. Give a step >= 1"),
        (slice(0.5, 3), r"position 0.5 is a float"),
        (torch.ones(1, 2, 7, dtype=torch.bool), r"a mask of shape \(1, 2, 7\) was given. Give \[pos\] or \[batch pos\]"),
    ],
)
def test_what_is_no_position_raises_when_the_hook_is_made(pos, message):
    with pytest.raises(PositionError, match=message):
        force_code("L1.mlp_out:5", pos=pos)


# --- Which slots


@pytest.mark.parametrize(("slot", "place"), [(-1, 2), (0, 0), (1, 1), (-3, 0)])
def test_a_slot_is_replaced(each_config, slot, place):
    cache = run(each_config.model, force_code("L1.mlp_out:7", pos=[1, 4], slot=slot))
    expected = ids_of(each_config.before).clone()
    expected[:, [1, 4], place] = 7
    assert torch.equal(ids_of(cache), expected)
    assert_site_carries(cache, each_config.books[LAST])


@pytest.mark.parametrize(("slot", "places"), [(-1, [1, 2]), (0, [0, 1]), (-2, [0, 1])])
def test_several_codes_fill_several_slots_in_their_order(host, slot, places):
    expected = ids_of(host.before).clone()
    expected[:, 4, places] = torch.tensor([9, 2])
    assert torch.equal(ids_of(run(host.model, force_code(["L1.mlp_out:9", "L1.mlp_out:2"], pos=4, slot=slot))), expected)
    assert torch.equal(ids_of(run(host.model, force_code(torch.tensor([9, 2]), layer=1, site="mlp_out", pos=4, slot=slot))), expected)


@pytest.mark.parametrize("codes", [[7], [7, 3], [7, 3, 1]])
def test_all_makes_the_place_say_these_codes_and_nothing_else(each_config, codes):
    books, before, config = each_config.books, each_config.before, each_config.config
    cache = run(each_config.model, force_code(codes, layer=1, site="mlp_out", pos=4, slot="all"))
    vectors = books[LAST].codes[0, codes].detach()
    expected = vectors.mean(0) if config.reduce == "mean" else vectors.sum(0)
    torch.testing.assert_close(cache[LAST][:, 4], expected.expand(2, -1), rtol=1e-6, atol=1e-6)
    assert set(ids_of(cache)[:, 4].flatten().tolist()) - {-1, -2} == set(codes)
    others = torch.arange(LENGTH) != 4
    assert torch.equal(cache[LAST][:, others], before[LAST][:, others])


@pytest.mark.parametrize("codes", [[7], [7, 3]])
def test_append_adds_codes_and_leaves_other_positions_bit_for_bit(each_config, codes):
    books, before, config = each_config.books, each_config.before, each_config.config
    cache = run(each_config.model, force_code(codes, layer=1, site="mlp_out", pos=EACH, slot="append"))
    assert torch.equal(cache[LAST][~EACH], before[LAST][~EACH])
    vectors = books[LAST].codes[0].detach()
    total = vectors[ids_of(before)[EACH]].sum(1) + vectors[codes].sum(0)
    expected = total / (K + len(codes)) if config.reduce == "mean" else total
    torch.testing.assert_close(cache[LAST][EACH], expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(ids_of(cache)[..., :K], ids_of(before))
    assert torch.equal(ids_of(cache)[EACH][:, K:], torch.tensor(codes).expand(int(EACH.sum()), -1))
    assert (ids_of(cache)[~EACH][:, K:] < 0).all()


def test_append_at_one_head_leaves_the_other_heads_bit_for_bit(each_config):
    before, name = each_config.before, LAST_Z
    cache = run(each_config.model, force_code("L1.z.2:7", slot="append"), force_code("L1.z.1:3", pos=0, slot="append"))
    assert ids_of(cache, name).shape == (2, LENGTH, 4, K + 2)
    z, plain = (c[name].reshape(2, LENGTH, 4, 8) for c in (cache, before))
    assert torch.equal(z[:, :, [0, 3]], plain[:, :, [0, 3]])
    assert torch.equal(z[:, 1:, 1], plain[:, 1:, 1])
    assert_site_carries(cache, each_config.books[name], name)


@pytest.mark.parametrize(
    ("codes", "slot", "message"),
    [
        ([1], 3, r"slot 3 was asked for 1 code, but there are 3 slots. Give 0 to 2, or -1 to -3"),
        ([1], -4, r"slot -4 was asked for 1 code"),
        ([1, 2], 2, r"slot 2 was asked for 2 codes, but there are 3 slots. Give 0 to 1, or -1 to -2"),
        ([1, 2, 3, 4], -1, r"4 codes were given for 3 slots. Give at most 3, or slot='append'"),
        ([1, 2, 3, 4], "all", r"4 codes were given for 3 slots"),
    ],
)
def test_slots_that_do_not_exist(host, codes, slot, message):
    with pytest.raises(InvalidCodeError, match=message):
        run(host.model, force_code(codes, layer=1, site="mlp_out", slot=slot))
    assert torch.equal(ids_of(run(host.model)), ids_of(host.before))


def test_a_code_or_group_that_the_codebook_does_not_have(any_host):
    for hook, error, message in [
        (force_code("L1.mlp_out:12"), InvalidCodeError, r"code 12 was asked for, but the codebook has 12. Give 0 to 11"),
        (force_code("L1.z.4:1"), LabelError, r"group 4 was asked for, but the codebook has 4. Give 0 to 3"),
        (force_code("L1.mlp_out.1:1"), LabelError, r"group 1 was asked for, but the codebook has 1"),
        (force_code("L1.z:1"), LabelError, r"L1.z has 4 groups. Say which: 'L1.z.0:1' to 'L1.z.3:1'"),
    ]:
        with pytest.raises(error, match=message):
            run(any_host.model, hook)
        with pytest.raises(error, match=message), tlc.steer(any_host.model, [hook]):
            pytest.fail("the block must not run")


def test_a_bridge_without_its_batch_axis(host):
    if not is_bridge(host.model):
        pytest.skip("only a Bridge can leave the batch axis out for hooks")
    seen = {}
    hooks = [force_code("L1.mlp_out:7", pos=4), force_code("L1.z.2:7", pos=4)]

    def record(ids, hook):  # a Bridge asks for a tensor back
        seen[hook.name] = ids
        return ids

    host.model.run_with_hooks(
        TOKENS[:1], fwd_hooks=[*hooks, (f"{LAST}.hook_codes", record), (f"{LAST_Z}.hook_codes", record)], remove_batch_dim=True
    )
    mlp, z = seen[f"{LAST}.hook_codes"], seen[f"{LAST_Z}.hook_codes"]
    assert mlp.shape == (LENGTH, K)
    assert mlp[4, -1] == z[4, 2, -1] == 7
