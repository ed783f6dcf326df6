"""Banning: the next best codes come in, and nothing else moves."""

import pytest
import torch

from tests.hosts.prepared import LAST, LAST_Z, LENGTH, N_CODES, PAIRS, K, assert_site_carries, ids_of, prepared, run, unused
from tests.hosts.state import TOKENS
from tl_codebook import ban_code, force_code
from tl_codebook.errors import InvalidCodeError
from tl_codebook.snap import definition


@pytest.fixture(params=[pair for pair in PAIRS if pair[1] != "residual"], ids="-".join)
def nearest_host(request):
    return prepared(*request.param)


@pytest.fixture(params=[pair for pair in PAIRS if pair[1] == "residual"], ids="-".join)
def residual_host(request):
    return prepared(*request.param)


def inputs(host, name=LAST):
    """What the codes are chosen for, [batch pos group d_group]."""
    book, x = host.books[name], host.before[f"{name}.hook_x"]
    return book.normalise(x if x.ndim == 4 else x.unsqueeze(2)).detach()


def chosen_without(host, banned, name=LAST, k=K):
    """What a codebook chooses that never had these codes, [batch pos group k]."""
    book = host.books[name]
    kept = [code for code in range(N_CODES) if code not in banned]
    choose = definition.residual_codes if book.config.selection == "residual" else definition.nearest_codes
    return torch.tensor(kept)[choose(inputs(host, name), book.codes[:, kept].detach(), k, book.config.similarity)]


def common(host, slot=0):
    """The code that is most often chosen in a slot of the last site."""
    return int(ids_of(host.before)[..., slot].flatten().mode().values)


def label(code):
    return f"L1.mlp_out:{code}"


# --- One ban


def test_a_ban_without_refill_leaves_empty_slots(any_host):
    before, code = ids_of(any_host.before), common(any_host)
    cache = run(any_host.model, ban_code(label(code), refill=False))
    assert torch.equal(ids_of(cache), torch.where(before == code, -1, before))
    assert_site_carries(cache, any_host.books[LAST])
    rest = (before != code).all(-1)
    assert torch.equal(cache[LAST][rest], any_host.before[LAST][rest])


def test_an_empty_slot_counts_in_a_mean(nearest_host):
    before, code = ids_of(nearest_host.before), common(nearest_host)
    cache = run(nearest_host.model, ban_code(label(code), refill=False))
    assert_site_carries(cache, nearest_host.books[LAST])
    assert (ids_of(cache) == -1).sum() == (before == code).sum() > 0


def test_a_ban_with_refill_is_the_choice_of_a_codebook_without_the_code(each_config):
    code = common(each_config)
    cache = run(each_config.model, ban_code(label(code)))
    assert torch.equal(ids_of(cache), chosen_without(each_config, {code}).squeeze(2))
    assert_site_carries(cache, each_config.books[LAST])
    rest = (ids_of(each_config.before) != code).all(-1)
    assert torch.equal(cache[LAST][rest], each_config.before[LAST][rest])


def test_a_ban_in_one_group_leaves_the_others(each_config):
    before = ids_of(each_config.before, LAST_Z)
    code = int(before[:, :, 2].flatten().mode().values)
    cache = run(each_config.model, ban_code(code, layer=1, site="z", head=2))
    expected = before.clone()
    expected[:, :, 2] = chosen_without(each_config, {code}, LAST_Z)[:, :, 2]
    assert torch.equal(ids_of(cache, LAST_Z), expected)


def test_a_ban_at_some_positions_leaves_the_others(host):
    code = common(host)
    cache = run(host.model, ban_code(label(code), pos=slice(2, 5)))
    expected = ids_of(host.before).clone()
    expected[:, 2:5] = chosen_without(host, {code}).squeeze(2)[:, 2:5]
    assert torch.equal(ids_of(cache), expected)


def test_a_ban_of_several_codes(each_config):
    banned = {common(each_config), common(each_config, 1), 0}
    hook = ban_code(sorted(banned), layer=1, site="mlp_out")
    assert torch.equal(ids_of(run(each_config.model, hook)), chosen_without(each_config, banned).squeeze(2))


# --- Bans and other hooks


def test_two_bans_are_one_ban_of_both(each_config):
    """The second may not bring the first one's code back, and what comes in is what one ban of both would choose."""
    first = common(each_config)
    second = int(chosen_without(each_config, {first})[..., 0].flatten().mode().values)  # often the one that came in for the first
    cache = run(each_config.model, ban_code(label(first)), ban_code(label(second)))
    assert torch.equal(ids_of(cache), chosen_without(each_config, {first, second}).squeeze(2))
    assert_site_carries(cache, each_config.books[LAST])


def test_two_bans_at_different_positions(host):
    code = common(host)
    other = int(chosen_without(host, {code})[..., 0].flatten().mode().values)
    cache = run(host.model, ban_code(label(code), pos=[0, 1, 2]), ban_code(label(other), pos=[2, 3]))
    expected = ids_of(host.before).clone()
    for banned, places in (({code}, [0, 1]), ({code, other}, [2]), ({other}, [3])):
        expected[:, places] = chosen_without(host, banned).squeeze(2)[:, places]
    assert torch.equal(ids_of(cache), expected)


def best_without(host, banned, rest, used):
    """The best code for vectors [row d_group] that is neither banned nor in use [row slot]."""
    table = definition.scores(rest.unsqueeze(1), host.books[LAST].codes.detach(), host.config.similarity)[:, 0]
    table[:, sorted(banned)] = -torch.inf
    return table.scatter(-1, used, -torch.inf).argmax(-1)


def test_a_ban_after_a_force_keeps_the_forced_code_and_refills_with_the_next_best(nearest_host):
    """Nearest codes: in the freed slot comes the most similar code that is not there yet."""
    host, banned = nearest_host, common(nearest_host)
    forced = unused(ids_of(host.before)[:, 1:4])
    cache = run(host.model, force_code(label(forced), pos=[1, 2, 3]), ban_code(label(banned)))
    expected = chosen_without(host, {banned}).squeeze(2)
    edited = ids_of(host.before)[:, 1:4].clone()
    edited[..., -1] = forced
    y = inputs(host)[:, 1:4, 0]
    for batch in range(2):
        for pos in range(3):
            row = edited[batch, pos]
            for slot in range(K):
                if row[slot] == banned:
                    row[slot] = best_without(host, {banned}, y[batch, pos].unsqueeze(0), row.unsqueeze(0))[0]
    expected[:, 1:4] = edited
    assert (ids_of(host.before)[:, 1:4, :-1] == banned).any(), "the ban must meet the forced rows"
    assert torch.equal(ids_of(cache), expected)


def test_a_ban_after_a_force_refills_for_what_the_other_codes_leave_over(residual_host):
    """Residual codes: in the freed slot comes the best code for the input minus the codes that stay."""
    host, banned = residual_host, common(residual_host)
    forced = unused(ids_of(host.before)[:, 1:4])
    cache = run(host.model, force_code(label(forced), pos=[1, 2, 3]), ban_code(label(banned)))
    expected = chosen_without(host, {banned}).squeeze(2)
    edited = ids_of(host.before)[:, 1:4].clone()
    edited[..., -1] = forced
    codes, y = host.books[LAST].codes[0].detach(), inputs(host)[:, 1:4, 0]
    for batch in range(2):
        for pos in range(3):
            row = edited[batch, pos]
            gone = (row == banned).nonzero().flatten().tolist()
            row[gone] = -1
            for slot in gone:
                rest = y[batch, pos] - codes[row[row >= 0]].sum(0)
                row[slot] = best_without(host, {banned}, rest.unsqueeze(0), torch.tensor([[banned]]))[0]
    expected[:, 1:4] = edited
    assert (ids_of(host.before)[:, 1:4, :-1] == banned).any(), "the ban must meet the forced rows"
    assert torch.equal(ids_of(cache), expected)


def test_a_ban_does_not_depend_on_the_other_rows_of_the_batch(each_config):
    """A forced code in one place must not change what a ban brings in at another."""
    code = common(each_config)
    rows = (ids_of(each_config.before) == code).any(-1)
    place = int(rows[1].nonzero()[-1])
    assert rows.sum() > 1
    force = force_code(label((code + 1) % N_CODES), pos=place, slot=K - 1 if ids_of(each_config.before)[1, place, -1] != code else 0)
    cache = run(each_config.model, force, ban_code(label(code)))
    others = torch.arange(LENGTH) != place
    assert torch.equal(ids_of(cache)[:, others], chosen_without(each_config, {code}).squeeze(2)[:, others])


def test_a_ban_of_a_forced_code_takes_it_out_again(each_config):
    cache = run(each_config.model, force_code("L1.mlp_out:5", slot=0), ban_code("L1.mlp_out:5"))
    assert not (ids_of(cache) == 5).any()
    assert (ids_of(cache) >= 0).all()
    rest = (ids_of(each_config.before) != 5).all(-1)
    assert torch.equal(ids_of(cache)[rest][:, 1:], ids_of(each_config.before)[rest][:, 1:])


def test_a_force_after_a_ban_has_the_last_word(host):
    code = common(host)
    cache = run(host.model, ban_code(label(code)), force_code(label(code), pos=3))
    expected = chosen_without(host, {code}).squeeze(2)
    expected[:, 3, -1] = code
    assert torch.equal(ids_of(cache), expected)


def test_a_ban_after_append_also_clears_the_slots_that_were_added(each_config):
    code = common(each_config)
    cache = run(each_config.model, force_code(label(code), pos=3, slot="append"), ban_code(label(code)))
    ids = ids_of(cache)
    assert ids.shape[-1] == K + 1
    assert not (ids == code).any()
    assert (ids[:, 3] >= 0).all()
    others = torch.arange(LENGTH) != 3
    assert torch.equal(ids[:, others, :K], chosen_without(each_config, {code}).squeeze(2)[:, others])


def test_the_codes_left_must_be_enough(nearest_host):
    hook = ban_code(list(range(N_CODES - K + 1)), layer=1, site="mlp_out")
    with pytest.raises(InvalidCodeError, match=r"fewer than 3 codes are left to refill with. Ban fewer codes, or use refill=False"):
        run(nearest_host.model, hook)
    enough = set(range(N_CODES - K))
    cache = run(nearest_host.model, ban_code(sorted(enough), layer=1, site="mlp_out"))
    assert set(ids_of(cache).flatten().tolist()) == set(range(N_CODES)) - enough


def test_a_slot_stays_empty_where_every_code_left_is_there_already(nearest_host):
    banned, left = list(range(N_CODES - K)), list(range(N_CODES - K, N_CODES))
    hooks = [force_code(left, layer=1, site="mlp_out", slot="append"), ban_code(banned, layer=1, site="mlp_out")]
    ids = ids_of(run(nearest_host.model, *hooks))
    assert not torch.isin(ids, torch.tensor(banned)).any()
    assert torch.equal(ids[..., :K], torch.where(ids_of(nearest_host.before) < N_CODES - K, -1, ids_of(nearest_host.before)))


def test_a_ban_of_a_code_that_was_never_chosen_changes_nothing(any_host):
    free = min(set(range(N_CODES)) - set(ids_of(any_host.before).flatten().tolist()))
    cache = run(any_host.model, ban_code(label(free)))
    assert torch.equal(ids_of(cache), ids_of(any_host.before))
    assert torch.equal(cache[LAST], any_host.before[LAST])
    with torch.no_grad():
        banned = any_host.model.run_with_hooks(TOKENS, fwd_hooks=[ban_code(label(free))])
        assert torch.equal(banned, any_host.model(TOKENS))
