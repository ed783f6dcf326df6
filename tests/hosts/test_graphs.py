"""Patching and flip rates on every host, against runs one by one with hooks of our own."""

from collections import Counter

import pytest
import torch

from tests.hosts.prepared import MODELS, N_CODES, prepared, run
from tests.hosts.state import TOKENS, assert_same_state, state_of
from tests.tiny import HOSTS
from tests.unit.model_by_hand import chain
from tl_codebook import force_code
from tl_codebook.graphs import flip_rate, patch_effects
from tl_codebook.names import Address, as_code

CORRUPT = TOKENS.flip(0).roll(2, 1)


def metric(logits):
    return (logits[:, -1, 5] - logits[:, -1, 9]).mean() + logits[:, 2, 40].mean()


def patched(model, tokens, name, edit):
    with torch.no_grad():
        return float(metric(model.run_with_hooks(tokens, fwd_hooks=[(f"{name}.hook_codes", lambda ids, hook: edit(ids.clone()))])))


def four(ids):
    return ids if ids.ndim == 4 else ids.unsqueeze(2)


@pytest.mark.parametrize("by", ["site", "group", "position"])
def test_places_as_one_by_one(any_host, by):
    model, before, state = any_host.model, any_host.before, state_of(any_host.model)
    other = run(model, tokens=CORRUPT)
    found = patch_effects(model, TOKENS, CORRUPT, metric, by=by, batch_size=5, progress=False)
    assert_same_state(state_of(model), state)
    places = [Address.parse(name) for name in found.axes[0]]
    for ours, tokens, source in ((found.into_corrupt, CORRUPT, before), (found.into_clean, TOKENS, other)):
        expected = []
        for place in places:
            name, group = place.hook_name, slice(None) if place.group is None else place.group
            for pos in range(TOKENS.shape[1]) if by == "position" else [slice(None)]:

                def edit(ids, name=name, pos=pos, group=group):
                    new = four(ids)
                    new[:, pos, group] = four(source[f"{name}.hook_codes"])[:, pos, group]  # noqa: B023
                    return new.reshape(ids.shape)

                expected.append(patched(model, tokens, name, edit))
        torch.testing.assert_close(ours.flatten(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    assert float(found.recovered.abs().max()) > 0.05


def test_codes_as_one_by_one(each_config):
    model, clean = each_config.model, each_config.before
    corrupt = run(model, tokens=CORRUPT)
    found = patch_effects(model, TOKENS, CORRUPT, metric, by="code", sites=["L0.z", "L1.mlp_out"], progress=False)
    expected = {}
    for name in ("blocks.0.attn.hook_z", "blocks.1.hook_mlp_out"):
        ours, theirs = four(clean[f"{name}.hook_codes"]), four(corrupt[f"{name}.hook_codes"])
        for row, pos, group in torch.ones(ours.shape[:3]).nonzero().tolist():
            a, b = ours[row, pos, group].tolist(), theirs[row, pos, group].tolist()
            new = list((Counter(a) - Counter(b)).elements())
            old = list((Counter(b) - Counter(a)).elements())
            assert len(new) == len(old)
            for code in set(new):
                expected.setdefault((name, group, pos, code), []).append(row)
    names = [(code.hook_name, code.group or 0, pos, code.code) for code, pos in zip(found.codes, found.positions, strict=True)]
    assert set(names) == set(expected)
    assert len(names) == len(expected)
    for index in range(0, len(names), 7):
        name, group, pos, code = names[index]
        for value, tokens, theirs, forth in (
            (found.into_corrupt, CORRUPT, clean, True),
            (found.into_clean, TOKENS, corrupt, False),
        ):

            def edit(ids):
                new, source = four(ids), four(theirs[f"{name}.hook_codes"])  # noqa: B023
                for row in expected[name, group, pos, code]:  # noqa: B023
                    have, others = new[row, pos, group].tolist(), source[row, pos, group].tolist()  # noqa: B023
                    a, b = (others, have) if forth else (have, others)  # noqa: B023
                    ranks_a = [i for i, c in enumerate(a) if c not in b or a[:i].count(c) >= b.count(c)]
                    ranks_b = [i for i, c in enumerate(b) if c not in a or b[:i].count(c) >= a.count(c)]
                    for i, j in zip(ranks_a, ranks_b, strict=True):
                        if a[i] == code:  # noqa: B023
                            new[row, pos, group, j if forth else i] = a[i] if forth else b[j]  # noqa: B023
                return new.reshape(ids.shape)

            assert float(value[index]) == pytest.approx(patched(model, tokens, name, edit), abs=1e-5), (found.axes[0][index], forth)


def flips_by_hand(model, cause, effect, lag, slot):
    """Every row by itself: before, after, of each row in which the cause is absent."""
    cause, effect = as_code(cause), as_code(effect)
    plain = run(model)
    rows = []
    for row, pos in torch.ones(TOKENS[:, : TOKENS.shape[1] - lag].shape).nonzero().tolist():
        if (four(plain[f"{cause.hook_name}.hook_codes"])[row, pos, cause.group or 0] == cause.code).any():
            continue
        forced = run(model, force_code(cause, pos=pos, slot=slot), tokens=TOKENS[row : row + 1])
        where = (pos + lag, effect.group or 0)
        rows.append(
            [
                bool((four(cache[f"{effect.hook_name}.hook_codes"])[i][where] == effect.code).any())
                for cache, i in ((plain, row), (forced, 0))
            ]
        )
    return torch.tensor(rows)


@pytest.mark.parametrize("slot", [-1, 0, "all", "append"])
@pytest.mark.parametrize("lag", [0, 2])
def test_flips_as_one_by_one(host, lag, slot):
    causes, effects = ["L0.z.2:3", "L0.mlp_out:5"], ["L1.z.1:4", "L1.z.1:7", "L1.mlp_out:2"]
    state = state_of(host.model)
    found = flip_rate(host.model, TOKENS, causes, effects, lag=lag, slot=slot, n_rows=None, batch_size=9, progress=False)
    assert_same_state(state_of(host.model), state)
    for cause in causes:
        for effect in effects:
            rows = flips_by_hand(host.model, cause, effect, lag, slot)
            ours = found[cause, effect]
            assert (ours.n_rows, ours.n_absent) == (len(rows), int((~rows[:, 0]).sum()))
            assert (ours.before, ours.after) == pytest.approx(tuple(rows.double().mean(0).tolist()))
            assert ours.flipped == pytest.approx(float(rows[~rows[:, 0], 1].double().mean()), nan_ok=True)


def test_the_controls_of_flips_as_one_by_one():
    """With eleven other codes, of which ten are taken, the wrong effects are all but the farthest in frequency."""
    host = prepared(MODELS[0])
    cause, effect = as_code("L0.mlp_out:5"), as_code("L1.mlp_out:2")
    found = flip_rate(host.model, TOKENS, cause, effect, n_rows=None, progress=False)
    rates = []
    for code in range(N_CODES):
        rows = flips_by_hand(host.model, cause, f"L1.mlp_out:{code}", 0, -1)
        absent = ~rows[:, 0]
        rates.append(float(rows[absent, 1].double().mean()) if bool(absent.any()) else float("nan"))
    others = torch.tensor([rate for code, rate in enumerate(rates) if code != effect.code], dtype=torch.float64)
    leaving_one_out = [float(torch.cat([others[:i], others[i + 1 :]]).nanmean()) for i in range(len(others))]
    assert any(found.wrong_effect.item() == pytest.approx(value) for value in leaving_one_out)


@pytest.mark.parametrize("kind", HOSTS)
def test_the_chain_on_each_host(kind):
    model = chain(kind)
    found = flip_rate(model, torch.tensor([[3, 4, 5, 6]]), "L0.mlp_out:8", ["L0.resid_post:8", "L0.resid_post:7"], progress=False)
    assert found.flipped.tolist() == [[1, 0]]
    clean, corrupt = torch.tensor([[3, 4, 5]]), torch.tensor([[3, 9, 5]])
    effects = patch_effects(model, clean, corrupt, lambda logits: logits[0, 1, 4], by="position", sites="mlp_out", progress=False)
    torch.testing.assert_close(effects.recovered, torch.tensor([[0.0, 1, 0]], dtype=torch.float64), rtol=0, atol=1e-4)
