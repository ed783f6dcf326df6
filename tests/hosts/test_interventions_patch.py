"""Patching, swapping, and hooks that the user writes: whatever leaves hook_codes is checked and decoded."""

import pytest
import torch

from tests.hosts.prepared import LAST, LAST_Z, LENGTH, N_CODES, K, assert_site_carries, ids_of, run
from tests.hosts.state import TOKENS
from tl_codebook import patch_codes, swap_codes
from tl_codebook.errors import InvalidCodeError, LabelError, PositionError, ShapeError, UnknownHookError

CORRUPT = TOKENS.flip(0).roll(2, 1)


# --- Patching


def test_a_patch_brings_in_the_codes_of_another_run(any_host):
    corrupt = run(any_host.model, tokens=CORRUPT)
    assert not torch.equal(ids_of(corrupt), ids_of(any_host.before))
    cache = run(any_host.model, patch_codes(any_host.before, "L1.mlp_out"), tokens=CORRUPT)
    assert torch.equal(ids_of(cache), ids_of(any_host.before))
    assert torch.equal(cache[LAST], any_host.before[LAST])
    assert torch.equal(ids_of(cache, LAST_Z), ids_of(corrupt, LAST_Z))


def test_a_patch_from_the_same_run_changes_nothing(any_host):
    hooks = [patch_codes(any_host.before, place) for place in ("L0.z", "L0.mlp_out", "L1.z", "L1.mlp_out")]
    with torch.no_grad():
        assert torch.equal(any_host.model.run_with_hooks(TOKENS, fwd_hooks=hooks), any_host.model(TOKENS))


@pytest.mark.parametrize(
    "pos", [4, [0, -1], torch.tensor([2, 3]), slice(1, 4), torch.arange(7) > 4], ids=["int", "list", "tensor", "slice", "mask"]
)
def test_a_patch_at_some_positions(host, pos):
    corrupt = run(host.model, tokens=CORRUPT)
    cache = run(host.model, patch_codes(host.before, "L1.mlp_out", pos=pos), tokens=CORRUPT)
    expected = ids_of(corrupt).clone()
    expected[:, pos] = ids_of(host.before)[:, pos]
    assert torch.equal(ids_of(cache), expected)


@pytest.mark.parametrize(("pos", "source_pos"), [(4, 1), (0, -1), ([2, 3], [5, -7]), ([1, 5], torch.tensor([6, 6]))])
def test_a_patch_from_other_positions(host, pos, source_pos):
    corrupt = run(host.model, tokens=CORRUPT)
    cache = run(host.model, patch_codes(host.before, "L1.mlp_out", pos=pos, source_pos=source_pos), tokens=CORRUPT)
    expected = ids_of(corrupt).clone()
    expected[:, pos] = ids_of(host.before)[:, source_pos]
    assert torch.equal(ids_of(cache), expected)


def test_a_patch_of_one_group_or_of_all(host):
    source, corrupt = ids_of(host.before, LAST_Z), run(host.model, tokens=CORRUPT)
    expected = ids_of(corrupt, LAST_Z).clone()
    expected[:, :, 2] = source[:, :, 2]
    for hook in (
        patch_codes(host.before, "L1.z.2"),
        patch_codes(source, "L1.z.2"),
        patch_codes(source[:, :, 2], "L1.z.2"),
        patch_codes(host.before, layer=1, site="z", head=2),
    ):
        assert torch.equal(ids_of(run(host.model, hook, tokens=CORRUPT), LAST_Z), expected)
    for whole in (patch_codes(host.before, "L1.z"), patch_codes(source, layer=1, site="z")):
        assert torch.equal(ids_of(run(host.model, whole, tokens=CORRUPT), LAST_Z), source)


def test_one_sequence_serves_a_whole_batch(host):
    source = ids_of(host.before)[:1]
    cache = run(host.model, patch_codes(source, "L1.mlp_out"), tokens=CORRUPT)
    assert torch.equal(ids_of(cache), source.expand(2, -1, -1))


def test_a_source_of_another_length_needs_positions(host):
    long = run(host.model, tokens=torch.cat([TOKENS, CORRUPT], 1))
    with pytest.raises(ShapeError, match=r"the source has 14 positions, the sequence 7. Say which ones: pos= and source_pos="):
        run(host.model, patch_codes(long, "L1.mlp_out"))
    cache = run(host.model, patch_codes(long, "L1.mlp_out", pos=[0, 1], source_pos=[12, -1]))
    expected = ids_of(host.before).clone()
    expected[:, [0, 1]] = ids_of(long)[:, [12, 13]]
    assert torch.equal(ids_of(cache), expected)


@pytest.mark.parametrize("width", [1, K + 2])
def test_a_source_with_fewer_or_more_slots(each_config, width):
    source = torch.arange(width).expand(2, LENGTH, width).contiguous()
    cache = run(each_config.model, patch_codes(source, "L1.mlp_out", pos=3))
    expected = each_config.books[LAST].codes[0, :width].detach()
    expected = expected.mean(0) if each_config.config.reduce == "mean" else expected.sum(0)
    torch.testing.assert_close(cache[LAST][:, 3], expected.expand(2, -1), rtol=1e-6, atol=1e-6)
    others = torch.arange(LENGTH) != 3
    assert torch.equal(cache[LAST][:, others], each_config.before[LAST][:, others])


BAD_PATCHES = [
    (lambda before: patch_codes(before, "L1.z.4"), LabelError, r"group 4 was asked for, but the codebook has 4"),
    (
        lambda before: patch_codes(ids_of(before, LAST_Z)[:, :, 0], "L1.z"),
        ShapeError,
        r"the codebook has 4 groups. Give \[batch pos 4 slot\]",
    ),
    (lambda before: patch_codes(ids_of(before, LAST_Z)[:, :, :3], "L1.z"), ShapeError, r"the source has 3 groups, the codebook 4"),
    (lambda before: patch_codes(torch.zeros(3, 7, 1).long(), "L1.mlp_out"), ShapeError, r"3 sequences, the model was given 2. Give 1 or 2"),
    (
        lambda before: patch_codes(before, "L1.mlp_out", pos=1, source_pos=7),
        PositionError,
        r"source position 7 was asked for.*has 7 positions",
    ),
    (lambda before: patch_codes(before, "L1.mlp_out", pos=7), PositionError, r"position 7 was asked for, but the sequence has 7"),
    (lambda before: patch_codes(torch.full((1, 7, 1), N_CODES), "L1.mlp_out"), InvalidCodeError, r"the id 12, but there are 12 codes"),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD_PATCHES)
def test_a_patch_that_does_not_fit(host, make, error, message):
    hook = make(host.before)
    with pytest.raises(error, match=message):
        run(host.model, hook)
    assert torch.equal(ids_of(run(host.model)), ids_of(host.before))


def test_a_patch_that_cannot_be_made(host):
    with pytest.raises(
        UnknownHookError, match=r"the source has no 'blocks.1.hook_resid_post.hook_codes'.*It has codes of: blocks.0.attn.hook_z"
    ):
        patch_codes(host.before, "L1.resid_post")
    with pytest.raises(ShapeError, match=r"L1.mlp_out: the source must be integer ids \[batch pos slot\]"):
        patch_codes(host.before[LAST], "L1.mlp_out")
    with pytest.raises(ShapeError, match="cache without removing batch"):
        patch_codes(ids_of(host.before)[0], "L1.mlp_out")
    for pos, source_pos in ((None, 3), ([1, 2], [3]), (slice(0, 2), [1, 2])):
        with pytest.raises(PositionError, match=r"Give both as ints or as lists of one length"):
            patch_codes(host.before, "L1.mlp_out", pos=pos, source_pos=source_pos)


# --- Swapping


def test_a_swap_goes_both_ways_and_twice_is_nothing(each_config):
    before = ids_of(each_config.before)
    a = int(before[..., 0].flatten().mode().values)
    b = next(code for code in before.flatten().tolist() if code != a)
    swap = swap_codes(f"L1.mlp_out:{a}", f"L1.mlp_out:{b}")
    expected = torch.where(before == a, b, torch.where(before == b, a, before))
    cache = run(each_config.model, swap)
    assert torch.equal(ids_of(cache), expected)
    assert_site_carries(cache, each_config.books[LAST])
    assert torch.equal(ids_of(run(each_config.model, swap, swap)), before)
    expected[:, :4], expected[:, 5:] = before[:, :4], before[:, 5:]
    assert torch.equal(ids_of(run(each_config.model, swap_codes(f"L1.mlp_out:{a}", f"L1.mlp_out:{b}", pos=4))), expected)


def test_a_swap_of_two_places_or_of_one_code_is_refused():
    with pytest.raises(LabelError, match=r"these codes sit at L1.mlp_out, L0.mlp_out. Make one hook for each"):
        swap_codes("L1.mlp_out:1", "L0.mlp_out:2")
    with pytest.raises(InvalidCodeError, match=r"code 1 was given more than once at L1.mlp_out"):
        swap_codes("L1.mlp_out:1", "L1.mlp_out:1")


# --- The user's own hooks


BAD_HOOKS = {
    "float": (lambda ids: ids.float(), r"a hook returned a torch.float32 tensor. Return an integer tensor of shape \[2 7 slots\]"),
    "bool": (lambda ids: ids > 0, r"a hook returned a torch.bool tensor"),
    "complex": (lambda ids: ids.to(torch.complex64), r"a hook returned a torch.complex64 tensor"),
    "too high": (lambda ids: torch.full_like(ids, N_CODES), r"a hook returned the id 12, but there are 12 codes. Return 0 to 11, or -1"),
    "too low": (lambda ids: ids - 100, r"a hook returned the id -\d+, but there are 12 codes"),
    "in place": (lambda ids: ids.add_(100).sum() and None, r"a hook returned the id 1\d\d, but there are 12 codes"),
    "one position": (lambda ids: ids[:, :1], r"a hook returned ids of shape \(2, 1, 3\). Return \[2 7 slots\]"),
    "one axis less": (lambda ids: ids[..., 0], r"a hook returned ids of shape \(2, 7\)"),
    "no slot": (lambda ids: ids[..., :0], r"a hook returned ids of shape \(2, 7, 0\).*at least one slot"),
}


@pytest.mark.parametrize("fault", BAD_HOOKS)
def test_what_is_no_code_is_refused(host, fault):
    function, message = BAD_HOOKS[fault]
    with pytest.raises(InvalidCodeError, match=rf"{LAST}.hook_codes: {message}"):
        run(host.model, (f"{LAST}.hook_codes", lambda ids, hook: function(ids)))
    cache = run(host.model)
    assert torch.equal(ids_of(cache), ids_of(host.before))
    assert torch.equal(cache[LAST], host.before[LAST])


GOOD_HOOKS = {
    "fewer slots": lambda ids: ids[..., :1],
    "more slots": lambda ids: torch.cat([ids, (ids[..., :2] + 1) % N_CODES], -1),
    "one empty slot": lambda ids: torch.cat([ids[..., :-1], torch.full_like(ids[..., :1], -1)], -1),
    "no slot counted": lambda ids: torch.cat([ids[..., :-1], torch.full_like(ids[..., :1], -2)], -1),
    "int32": lambda ids: ((ids + 1) % N_CODES).int(),
    "in place": lambda ids: ids.fill_(4).sum() and None,
    "nothing": lambda ids: None,
}


@pytest.mark.parametrize("way", GOOD_HOOKS)
def test_what_the_user_returns_is_decoded(each_config, way):
    function = GOOD_HOOKS[way]
    cache = run(each_config.model, (f"{LAST}.hook_codes", lambda ids, hook: function(ids)))
    ids = ids_of(each_config.before).clone()
    new = function(ids)
    assert torch.equal(ids_of(cache), ids if new is None else new)
    assert_site_carries(cache, each_config.books[LAST])


def test_minus_one_everywhere_ablates(any_host):
    for name in any_host.books:
        cache = run(any_host.model, (f"{name}.hook_codes", lambda ids, hook: torch.full_like(ids, -1)))
        assert (cache[name] == 0).all(), name
