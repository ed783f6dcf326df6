"""Patching a model whose codes are known, and what is refused. Against runs one by one: tests/hosts/test_graphs.py."""

import dataclasses
import warnings

import pytest
import torch

import tl_codebook as tlc
from tests.unit.model_by_hand import N_TOKENS, OUT, POST, chain
from tests.unit.stored_codes import StoredCodes
from tl_codebook.errors import ConfigError, DataError, NonFiniteError, ShapeError, UnknownHookError
from tl_codebook.graphs import patch_effects
from tl_codebook.graphs.edits import wrong_codes
from tl_codebook.graphs.running import equally_frequent, frequencies, points_of

CLEAN = torch.tensor([[3, 4, 5], [6, 7, 8]])
CORRUPT = torch.tensor([[2, 4, 9], [6, 7, 10]])  # differs at position 0 of row 0, and at the last of both


@pytest.fixture(scope="module")
def model():
    return chain()


def difference(logits):
    """1 for the clean run, -1 for the corrupt one; only the last position counts."""
    last, rows = logits[:, -1], torch.arange(2)
    return (last[rows, CLEAN[:, -1]] - last[rows, CORRUPT[:, -1]]).mean()


def effects(model, **options):
    return patch_effects(model, CLEAN, CORRUPT, difference, progress=False, **options)


def close(found, expected):
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-4)


def test_the_model_is_what_it_says(model):
    logits, cache = model.run_with_cache(CLEAN)
    torch.testing.assert_close(logits, torch.nn.functional.one_hot(CLEAN, N_TOKENS).float(), rtol=0, atol=1e-4)
    assert torch.equal(cache[f"{OUT}.hook_codes"].squeeze(-1), CLEAN)
    assert torch.equal(cache[f"{POST}.hook_codes"].squeeze(-1), CLEAN)


def test_by_site(model):
    found = effects(model)
    assert found.axes == (("L0.z", "L0.mlp_out", "L0.resid_post"),)
    assert (found.clean, found.corrupt) == (pytest.approx(1, abs=1e-4), pytest.approx(-1, abs=1e-4))
    close(found.into_corrupt, [-1, 1, 1])
    close(found.into_clean, [1, -1, -1])
    close(found.recovered, [0, 1, 1])
    close(found.lost, [0, 1, 1])
    assert found.n_changed[1:].tolist() == [3, 3]
    assert [name for name, _ in found.top(2)] == ["L0.mlp_out", "L0.resid_post"]


def test_by_group(model):
    found = effects(model, by="group")
    assert found.axes == (("L0.z.0", "L0.z.1", "L0.z.2", "L0.z.3", "L0.mlp_out", "L0.resid_post"),)
    close(found.recovered, [0, 0, 0, 0, 1, 1])
    assert torch.equal(effects(model, by="head").recovered, found.recovered)


def test_what_it_looks_like(model):
    said = repr(effects(model, by="position")).splitlines()
    assert said[0] == "PatchEffects by position (3 x 3): the metric is 1 clean, -1 corrupt"
    assert said[1] in ("  L0.mlp_out@2: recovered +1.000", "  L0.resid_post@2: recovered +1.000")
    assert len(said) == 6


def test_by_position(model):
    found = effects(model, by="position", sites=["mlp_out", "resid_post"])
    assert found.axes == (("L0.mlp_out", "L0.resid_post"), ("0", "1", "2"))
    close(found.recovered, [[0, 0, 1], [0, 0, 1]])
    close(found.lost, [[0, 0, 1], [0, 0, 1]])
    assert found.n_changed.tolist() == [[1, 0, 2], [1, 0, 2]]
    assert found.positions == (0, 1, 2)
    assert found.top(1) == [("L0.mlp_out@2", pytest.approx(1, abs=1e-4))]


def test_by_code(model):
    found = effects(model, by="code", sites="L0.mlp_out")
    assert found.axes == (("L0.mlp_out:3@0", "L0.mlp_out:5@2", "L0.mlp_out:8@2"),)
    assert list(map(str, found.codes)) == ["L0.mlp_out:3", "L0.mlp_out:5", "L0.mlp_out:8"]
    assert found.positions == (0, 2, 2)
    close(found.recovered, [0, 0.5, 0.5])  # one of two rows each
    close(found.lost, [0, 0.5, 0.5])
    assert found.n_changed.tolist() == [1, 1, 1]


def test_a_code_of_several_rows_is_one_patch(model):
    clean, corrupt = torch.tensor([[5], [5], [7]]), torch.tensor([[6], [8], [7]])
    found = patch_effects(model, clean, corrupt, lambda logits: logits[:, 0, 5].sum(), by="code", sites="L0.mlp_out", progress=False)
    assert found.axes == (("L0.mlp_out:5@0",),)
    close(found.into_corrupt, [2])
    close(found.into_clean, [0])
    assert found.n_changed.tolist() == [2]


def test_the_controls_bring_back_less(model):
    found = effects(model, by="position", sites=["mlp_out"], controls=True)
    close(found.recovered, [[0, 0, 1]])
    # Wrong codes at the last position are those of the next one round the row, 3 and 6: neither the clean nor the corrupt answer.
    close(found.wrong, [[-1, -1, 0]])
    close(found.values("wrong"), [[0, 0, 0.5]])
    # A random code is never the clean one; it is the corrupt one now and then.
    assert -1.0001 <= float(found.random[0, 2]) <= 0.0001
    close(found.random[0, :2], [-1, -1])
    again = effects(model, by="position", sites=["mlp_out"], controls=True)
    assert torch.equal(found.random, again.random)
    assert effects(model).random is None


def test_wrong_codes_are_those_of_other_positions():
    clean, corrupt = torch.tensor([1, 2, 1, 3]), torch.tensor([2, 5, 1, 3])
    found = wrong_codes(*(each.reshape(1, 4, 1, 1) for each in (clean, corrupt, torch.tensor([9, 9, 9, 9]))))
    assert found.flatten().tolist() == [3, 1, 3, 1]
    same = torch.full((1, 3, 1, 1), 4)
    assert wrong_codes(same, same, torch.full((1, 3, 1, 1), 9)).flatten().tolist() == [9, 9, 9]


def test_controls_are_equally_frequent():
    counts = torch.tensor([0, 50, 3, 51, 0, 49, 1000, 52])
    found = equally_frequent(counts, 1, torch.Generator().manual_seed(0), n=3)
    assert set(found[:2].tolist()) == {3, 5}
    assert found[2] == 7
    assert len(equally_frequent(counts, 1, torch.Generator().manual_seed(0))) == 7
    drawn = {tuple(equally_frequent(counts, 2, torch.Generator().manual_seed(seed), n=1).tolist()) for seed in range(20)}
    assert drawn == {(0,), (4,)}  # equals in random order


def test_frequencies_of_a_store_serve_the_control(model):
    counted = [5] * 40 + [8] * 41 + [0, 1, 2, 3, 4, 6, 7, 9, 10, 11]
    store = StoredCodes({OUT: torch.tensor(counted).reshape(-1, 1, 1).numpy()}, N_TOKENS)
    points = points_of(model, ["mlp_out"])
    assert torch.equal(frequencies(store, points, [])[OUT], torch.bincount(torch.tensor(counted))[None])
    ids = {OUT: torch.tensor([[[[3, 3, -1]], [[3, 4, 5]]], [[[5, -2, 5]], [[0, 11, 3]]]])}  # once a position, however many slots
    assert frequencies(None, points, [ids, ids])[OUT].tolist() == [[2, 0, 0, 6, 2, 4, 0, 0, 0, 0, 0, 2]]
    assert effects(model, by="position", sites=["mlp_out"], controls=True, store=store).random.shape == (1, 3)
    with pytest.raises(DataError, match=r"the store has no codes of 'blocks.0.hook_resid_post', whose frequencies are needed"):
        effects(model, sites=["resid_post"], controls=True, store=store)
    few = StoredCodes({OUT: torch.tensor(counted).reshape(-1, 1, 1).numpy()}, 13)
    with pytest.raises(DataError, match=r"the store counts \[1, 13\] at 'blocks.0.hook_mlp_out', where the model has \[1, 12\] codes"):
        effects(model, sites=["mlp_out"], controls=True, store=few)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 100])
def test_the_batch_size_changes_nothing(model, batch_size):
    for by in ("site", "group", "position", "code"):
        few, many = effects(model, by=by, batch_size=batch_size), effects(model, by=by)
        torch.testing.assert_close(few.into_corrupt, many.into_corrupt, rtol=0, atol=1e-5)
        torch.testing.assert_close(few.into_clean, many.into_clean, rtol=0, atol=1e-5)


def test_patches_run_as_rows_of_few_passes(model):
    passes = []
    handle = model.blocks[0].register_forward_pre_hook(lambda module, args: passes.append(args[0].shape[0]))
    try:
        effects(model, by="position", sites=["mlp_out", "resid_post"], batch_size=8)
    finally:
        handle.remove()
    assert passes == [2, 2, 8, 8]  # the two runs; 2 ways x 2 sites x 2 positions that differ x 2 rows


def test_the_metric_sees_all_rows_and_runs_without_gradients(model):
    seen = []

    def metric(logits):
        seen.append((tuple(logits.shape), logits.requires_grad))
        return float(logits.mean())

    patch_effects(model, CLEAN, CORRUPT, metric, progress=False, batch_size=1)
    assert set(seen) == {((2, 3, N_TOKENS), False)}


def test_one_run_in_place_of_two(model):
    same = patch_effects(model, CLEAN, CLEAN, difference, progress=False)
    assert torch.equal(same.into_corrupt, torch.full((3,), same.clean, dtype=torch.float64))
    assert same.n_changed.tolist() == [0, 0, 0]
    with pytest.raises(DataError, match=r"a share of the difference was asked for, but the metric is 1 in both runs"):
        _ = same.recovered
    with pytest.raises(DataError, match=r"the same codes at all of these sites, so that there is none to patch"):
        patch_effects(model, CLEAN, CLEAN, difference, by="code", progress=False)


def test_no_warning_and_nothing_left_behind(model):
    before = [(name, len(point.fwd_hooks)) for name, point in model.hook_dict.items()]
    model.train()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            effects(model, by="code", batch_size=1)
        assert model.training
    finally:
        model.eval()
    assert [(name, len(point.fwd_hooks)) for name, point in model.hook_dict.items()] == before


BAD = {
    "by": ({"by": "sites"}, ConfigError, r"by='sites' was asked for. Did you mean 'site'\? Give one of site, group, position, code"),
    "batch": ({"batch_size": 0}, ConfigError, r"batch_size=0 was asked for"),
    "shapes": ({"corrupt": CORRUPT[:, :2]}, ShapeError, r"clean is \[2, 3\] and corrupt \[2, 2\] tokens. Give prompts of one shape"),
    "rows": ({"corrupt": CORRUPT[:1]}, ShapeError, r"clean is \[2, 3\] and corrupt \[1, 3\] tokens"),
    "one axis": ({"clean": CLEAN[0]}, ShapeError, r"clean is torch.int64 \[3\]. Give token ids \[row pos\], or text"),
    "floats": ({"clean": CLEAN.float()}, ShapeError, r"clean is torch.float32 \[2, 3\]"),
    "bools": ({"corrupt": CLEAN > 0}, ShapeError, r"corrupt is torch.bool \[2, 3\]"),
    "numbers": ({"clean": [1, 2]}, ShapeError, r"clean is a list"),
    "empty": ({"clean": CLEAN[:0]}, DataError, r"clean is \[0, 3\], which has no token"),
    "vocabulary": ({"clean": CLEAN + 5}, DataError, r"clean has token ids from 8 to 13, but the model's vocabulary is 0 to 11"),
    "negative": ({"clean": CLEAN - 100}, DataError, r"clean has token ids from -97 to -92"),
    "too long": ({"clean": CLEAN.repeat(1, 20)}, DataError, r"clean has 60 positions, but the model takes 48"),
    "vector": (
        {"metric": lambda logits: logits[:, -1, 0]},
        ShapeError,
        r"the metric gave torch.float32 \[2\] for the clean run. Return one number",
    ),
    "nan": (
        {"metric": lambda logits: logits.mean() * torch.nan},
        NonFiniteError,
        r"the metric gave nan for the clean run. Return a finite number",
    ),
    "infinite": ({"metric": lambda logits: float("inf")}, NonFiniteError, r"the metric gave inf for the clean run"),
    "no function": ({"metric": 3}, ConfigError, r"metric is a int. Give a function from logits"),
    "one group": ({"sites": ["L0.z.1"]}, ConfigError, r"'L0.z.1' was asked for, which is one group.* Give 'L0.z', with by='group'"),
    "no book": ({"sites": ["attn_out"]}, UnknownHookError, r"no codebook sits at 'attn_out'.*Codebooks sit at: blocks.0.attn.hook_z"),
    "no site": ({"sites": []}, ConfigError, r"sites is empty"),
    "text": ({"clean": "w3 w4"}, ConfigError, r"clean is text, but the model has no tokenizer"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_input_is_refused(unchecked, model, fault):
    changes, kind, message = BAD[fault]
    with pytest.raises(kind, match=message):
        patch_effects(model, **{"clean": CLEAN, "corrupt": CORRUPT, "metric": difference, "progress": False} | changes)


def test_a_metric_that_fails_later_says_where(model):
    calls = []

    def metric(logits):
        calls.append(1)
        return torch.nan if len(calls) > 2 else logits.mean()

    with pytest.raises(NonFiniteError, match=r"the metric gave nan for the corrupt run with L0.z patched|with L0.mlp_out patched"):
        patch_effects(model, CLEAN, CORRUPT, metric, progress=False)


def test_a_model_without_codebooks_is_refused():
    from tests.tiny import make_host

    bare = make_host("native")
    with pytest.raises(ConfigError, match=r"the model has no codebooks. Call attach first"):
        patch_effects(bare, CLEAN, CORRUPT, lambda logits: logits.mean())


def test_prompts_as_text():
    from tests.tiny import make_host

    model = make_host("native")
    tlc.attach(model, "mlp_out", n_codes=16, k=2)
    found = patch_effects(model, "w3 w4 w5", ["w3 w9 w5"], lambda logits: logits[0, -1, 5], by="position", progress=False)
    tokens = [model.to_tokens(text) for text in ("w3 w4 w5", "w3 w9 w5")]
    expected = patch_effects(model, *tokens, lambda logits: logits[0, -1, 5], by="position", progress=False)
    assert torch.equal(found.into_corrupt, expected.into_corrupt)
    with pytest.raises(ShapeError, match=r"clean has texts of \d+ and \d+ tokens. Give texts of one length"):
        patch_effects(model, ["w3", "w3 w4"], "w3", lambda logits: logits.mean())


def test_plots(model):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = effects(model, by="position")
    ax = found.plot()
    assert [text.get_text() for text in ax.get_yticklabels()] == ["L0.z", "L0.mlp_out", "L0.resid_post"]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["0", "1", "2"]
    assert torch.equal(torch.tensor(ax.images[0].get_array()), found.recovered)
    assert ax.images[0].norm.vmin == -ax.images[0].norm.vmax
    _, own = pyplot.subplots()
    by_code = effects(model, by="code", sites="L0.mlp_out")
    assert by_code.plot("lost", ax=own, n=2) is own
    assert {text.get_text() for text in own.get_yticklabels()} == {"L0.mlp_out:5@2", "L0.mlp_out:8@2"}
    assert [bar.get_width() for bar in own.patches] == pytest.approx([0.5, 0.5], abs=1e-4)
    sites = effects(model).plot("into_corrupt")  # bars from where nothing is patched
    assert [(bar.get_x(), bar.get_width()) for bar in sites.patches][1] == (pytest.approx(-1, abs=1e-4), pytest.approx(2, abs=1e-4))
    pyplot.close("all")
    words = dataclasses.replace(found, words=("<s>", "a$", "b"))
    assert [text.get_text() for text in words.plot().get_xticklabels()] == ["0 <s>", r"1 a\$", "2 b"]
    pyplot.close("all")
    with pytest.raises(ConfigError, match=r"values 'recoverd' were asked for. Did you mean 'recovered'\?"):
        found.plot("recoverd")
    with pytest.raises(
        ConfigError, match=r"the control 'random' was asked for, but none was run. Call patch_effects\(..., controls=True\)"
    ):
        found.plot("random")
    with pytest.raises(ConfigError, match=r"n=0 was asked for"):
        found.top(0)


def test_without_matplotlib_a_plot_says_what_to_install(model, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"matplotlib is not installed. Install it: pip install matplotlib"):
        effects(model).plot()
