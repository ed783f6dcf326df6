"""Known traps of attaching to TransformerLens hosts, one test each (the others: test_traps_running, test_compile, test_usage)."""

import copy

import pytest
import torch
from transformer_lens.hook_points import HookPoint

import tl_codebook as tlc
from tests.hosts.prepared import run
from tests.hosts.state import TOKENS, assert_same_state, distinct, state_of
from tests.tiny import ARCHITECTURES, HOSTS, make_hf, make_host, make_tokenizer, write_hf_folder
from tl_codebook import Codebook, CodebookConfig, force_code
from tl_codebook.convert.huggingface import load_hf
from tl_codebook.errors import AttachError, ConfigError, HookNeverFiredError, ShapeError, UnknownHookError
from tl_codebook.hosts import is_bridge, processing

CONFIG = CodebookConfig(8, 2)
BRIDGES = [f"bridge-{architecture}" for architecture in ARCHITECTURES]


def names_of(model, point):
    return [name for name, other in model.hook_dict.items() if other is point]


def test_trap_01_every_name_of_the_hook_point_still_fires(any_model):
    tlc.attach(any_model, ["z", "mlp_out", "resid_post"], n_codes=8)
    for site, point in tlc.sites(any_model).items():
        names = names_of(any_model, point)
        assert site in names
        assert not is_bridge(any_model) or len(names) > 1  # an alias and what it stands for
        for name in names:
            seen = []
            any_model.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda x, hook: seen.append(x))])  # noqa: B023
            any_model.add_hook(name, lambda x, hook: seen.append(x))  # noqa: B023
            _, cache = any_model.run_with_cache(TOKENS)
            any_model.reset_hooks()
            assert len(seen) == 2, name
            assert torch.equal(seen[0], seen[1])
            assert torch.equal(seen[0].reshape(cache[site].shape), cache[site])
    block = any_model.blocks[1]
    assert block.attn.hook_z is tlc.sites(any_model)["blocks.1.attn.hook_z"]
    assert block.hook_mlp_out is tlc.sites(any_model)["blocks.1.hook_mlp_out"]


@pytest.mark.parametrize("site", ["z", "v", "mlp_out", "resid_post", "resid_delta"])
def test_trap_02_a_backward_hook_at_the_site_gates_the_codes(model, site):
    books = tlc.attach(model.train(), site, layers=1, n_codes=8)
    ((name, book),) = books.items()
    model(TOKENS, return_type="loss").backward()
    assert float(book.codes.grad.abs().sum()) > 0
    book.codes.grad = None
    with model.hooks(bwd_hooks=[(name, lambda gradient, hook: torch.zeros_like(gradient))]):
        model(TOKENS, return_type="loss").backward()
    assert book.codes.grad is None or float(book.codes.grad.abs().sum()) == 0


def test_trap_03_copies_are_independent_and_no_reset_removes_a_codebook(any_model):
    tlc.attach(any_model, ["z", "mlp_out", "resid_delta"], n_codes=8)
    with torch.no_grad():
        logits = any_model(TOKENS)
        twin = copy.deepcopy(any_model)
        for point in tlc.sites(twin).values():
            point.codebook.codes.zero_()
        assert torch.equal(any_model(TOKENS), logits)
        assert not torch.equal(twin(TOKENS), logits)
        any_model.reset_hooks(including_permanent=True)
        assert torch.equal(any_model(TOKENS), logits)
    assert len(tlc.sites(any_model)) == 6


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_trap_04_heads_are_groups_in_every_layout(architecture):
    """The same codebooks at z, k and v give the same codes whether a host holds heads flat or apart."""
    ids = {}
    for host in HOSTS:
        model = make_host(f"{host}-{architecture}")
        torch.manual_seed(0)
        kv = getattr(model.cfg, "n_key_value_heads", None) or 4
        groups = {"z": 4, "q": 4, "k": kv, "v": kv}
        books = {f"L{layer}.{site}": Codebook(n * 8, CodebookConfig(8, 2, n)) for layer in (0, 1) for site, n in groups.items()}
        with torch.no_grad():
            for book in books.values():
                book.codes *= 0.3
        tlc.attach(model, books)
        cache = run(model)
        ids[host] = {name: cache[f"{name}.hook_codes"] for name in tlc.sites(model)}
        for name, value in ids[host].items():
            assert value.shape == (2, 7, groups[name[-1]], 2)
            assert value.unique().numel() > 2
    assert all(torch.equal(ids[host][name], value) for host in HOSTS for name, value in ids[HOSTS[0]].items())


def test_trap_04_a_wrong_number_of_groups_is_refused(any_model):
    before = state_of(any_model)
    for site in ("z", "k"):
        with pytest.raises(ConfigError, match=rf"n_groups=3 was asked for at 'blocks.0.attn.hook_{site}'.*Leave n_groups out"):
            tlc.attach(any_model, site, n_codes=8, n_groups=3)
    if getattr(any_model.cfg, "n_key_value_heads", None) == 2:
        with pytest.raises(ConfigError, match=r"n_groups=4.*hook_v', which has 2 heads \(k and v have the key-value heads"):
            tlc.attach(any_model, "v", n_codes=8, n_groups=4)
    assert_same_state(state_of(any_model), before)


@pytest.mark.skipif("hooked" not in HOSTS, reason="only a HookedTransformer can ungroup its key-value heads")
def test_trap_04_ungrouping_the_heads_afterwards_is_refused():
    model = make_host("hooked-llama")
    tlc.attach(model, "k", n_codes=8)
    model.set_ungroup_grouped_query_attention(True)
    with pytest.raises(
        ShapeError, match=r"blocks.0.attn.hook_k: an activation of shape \(2, 7, 4, 8\).*16 values a position \(2 groups of 8\)"
    ):
        model(TOKENS)
    tlc.detach(model)
    assert tlc.attach(model, "k", layers=0, n_codes=8)["blocks.0.attn.hook_k"].n_groups == 4


@pytest.mark.parametrize("kind", [f"{host}-{architecture}" for host in HOSTS for architecture in ("gpt2", "neox")])
def test_trap_05_weight_processing_shows(kind):
    model = make_host(kind)
    assert not any(processing(model).values())
    if is_bridge(model):
        model.enable_compatibility_mode()
    else:
        model.process_weights_()
    assert all(processing(model).values())


@pytest.mark.parametrize("kind", BRIDGES)
def test_trap_06_names_come_back_after_compatibility_mode(kind):
    model = make_host(kind)
    with torch.no_grad():
        plain = model(TOKENS)
        tlc.attach(model, ["z", "mlp_out", "resid_delta"], n_codes=8)
        snapped = model(TOKENS)
        model.enable_compatibility_mode(no_processing=True)
        tlc.refresh(model)
        assert torch.equal(model(TOKENS), snapped)
        _, cache = model.run_with_cache(TOKENS)
        assert [name for name in cache if name.endswith("hook_codes")] == [f"{name}.hook_codes" for name in tlc.sites(model)]
        calls = []
        with tlc.steer(
            model, [force_code("L1.mlp_out:3", pos=2), ("blocks.1.hook_mlp_out.hook_codes", lambda ids, hook: calls.append(ids))]
        ):
            model(TOKENS)
        assert len(calls) == 1  # not once for each name
        assert (calls[0][:, 2, -1] == 3).all()
        with pytest.raises(LookupError):
            model.run_with_hooks(TOKENS, fwd_hooks=[force_code("L5.mlp_out:3")])
        tlc.detach(model)
        assert torch.equal(model(TOKENS), plain)
    assert not [name for name in model.hook_dict if name.endswith(("hook_codes", "hook_x", "hook_resid_delta"))]
    assert len(tlc.attach(model, distinct(model), n_codes=8)) == 2 * len(distinct(model))  # and it can be attached to in this mode


def test_trap_07_a_hook_point_with_several_names_is_one_site(any_model):
    tlc.attach(any_model, ["z", "mlp_out"], n_codes=8)
    assert list(tlc.sites(any_model)) == [f"blocks.{layer}.{tail}" for layer in (0, 1) for tail in ("attn.hook_z", "hook_mlp_out")]
    tlc.detach(any_model)
    before = state_of(any_model)
    for name in ("blocks.0.attn.hook_z", "blocks.0.hook_mlp_out"):
        for other in names_of(any_model, any_model.hook_dict[name]):
            if other != name:
                with pytest.raises(AttachError, match=rf"means '{name}', which another name in the same call means too"):
                    tlc.attach(any_model, {name: CONFIG, other: CONFIG})
    assert_same_state(state_of(any_model), before)


def test_trap_07_two_sites_that_are_one_hook_point_are_refused():
    model = make_host("bridge-mixtral")
    assert model.hook_dict["blocks.0.mlp.hook_post"] is model.hook_dict["blocks.0.hook_mlp_out"]
    before = state_of(model)
    with pytest.raises(AttachError, match=r"hook_mlp_out' and 'blocks.0.mlp.hook_post' are one and the same hook point|hook_post' and"):
        tlc.attach(model, ["post", "mlp_out"], n_codes=8)
    assert_same_state(state_of(model), before)
    tlc.attach(model, "mlp_out", n_codes=8)
    with pytest.raises(AttachError, match="already holds a codebook"):
        tlc.attach(model, "post", n_codes=8)


def test_trap_08_canonical_names_are_stored_under_the_one_stable_name():
    model = make_host("bridge-olmo2")
    point = model.hook_dict["blocks.0.hook_attn_out"]
    (canonical,) = [name for name in names_of(model, point) if name != "blocks.0.hook_attn_out"]
    assert canonical in ("blocks.0.ln1.hook_out", "blocks.0.ln1_post.hook_out")  # 3.9, 4.3
    assert list(tlc.attach(model, {canonical: CONFIG})) == ["blocks.0.hook_attn_out"]
    assert tlc.sites(model) == {"blocks.0.hook_attn_out": point}
    cache = run(model, force_code("L0.attn_out:5", pos=1))
    assert (cache["blocks.0.hook_attn_out.hook_codes"][:, 1, -1] == 5).all()
    assert list(tlc.detach(model, canonical)) == ["blocks.0.hook_attn_out"]


@pytest.mark.parametrize("label", ["L9.mlp_out:3", "L1.z.0:3", "L0.resid_post:3"])
def test_trap_09_a_code_where_no_codebook_sits_raises_everywhere(any_model, label):
    tlc.attach(any_model, "mlp_out", n_codes=8)
    hook = force_code(label)
    before = state_of(any_model)
    with pytest.raises(LookupError, match="hook_codes"):
        any_model.run_with_hooks(TOKENS, fwd_hooks=[hook])
    with pytest.raises(LookupError, match="hook_codes"), any_model.hooks(fwd_hooks=[hook]):
        pytest.fail("the block must not run")
    with pytest.raises(UnknownHookError, match=r"no hook point '.*hook_codes'"), tlc.steer(any_model, [hook]):
        pytest.fail("the block must not run")
    assert_same_state(state_of(any_model), before)
    good = force_code("L1.mlp_out:3")
    with pytest.raises(LookupError, match="hook_codes"):
        any_model.run_with_hooks(TOKENS, fwd_hooks=[good, hook])
    assert_same_state(state_of(any_model), before)


def test_trap_09_steer_says_so_on_a_model_without_codebooks(any_model):
    with (
        pytest.raises(UnknownHookError, match=r"no hook point 'blocks.1.hook_mlp_out.hook_codes' on this"),
        tlc.steer(any_model, [force_code("L1.mlp_out:3")]),
    ):
        pytest.fail("the block must not run")


@pytest.mark.filterwarnings("ignore:.*gated-off")
def test_trap_10_hook_points_that_never_fire_are_refused(any_model):
    fired = set()
    any_model.run_with_hooks(TOKENS, fwd_hooks=[(lambda name: True, lambda x, hook: fired.add(id(hook)))])
    silent = [name for name, point in any_model.hook_dict.items() if id(point) not in fired and name.startswith("blocks.0.")]
    assert "blocks.0.attn.hook_result" in silent or is_bridge(any_model)
    if is_bridge(any_model) and "neox" in type(any_model.original_model).__name__.lower():
        assert "blocks.0.attn.hook_rot_q" in silent
    before = state_of(any_model)
    for name in silent:
        with pytest.raises(HookNeverFiredError, match=rf"the hook point '{name}' exists, but nothing passes through it"):
            tlc.attach(any_model, {name: CONFIG})
    assert_same_state(state_of(any_model), before)
    tlc.attach(any_model, distinct(any_model), n_codes=8)
    any_model(TOKENS)
    assert {name: point.n_snaps for name, point in tlc.sites(any_model).items()} == dict.fromkeys(tlc.sites(any_model), 2)  # probe and call


@pytest.mark.parametrize("forward_first", [False, True])
def test_trap_11_hook_points_that_are_skipped_without_hooks(forward_first):
    """Granite asks has_hooks() before it calls some of its hook points, through closures made at the first forward."""
    model = make_host("bridge-granite")
    with torch.no_grad():
        plain = make_host("bridge-granite")(TOKENS)
        if forward_first:
            assert torch.equal(model(TOKENS), plain)
        for site in ("attn_out", "mlp_out", "resid_mid"):
            tlc.attach(model, site, n_codes=8)
            assert not torch.equal(model(TOKENS), plain), site
            tlc.detach(model)
            assert torch.equal(model(TOKENS), plain), site


def test_trap_12_activations_without_a_position_axis():
    model = make_host("bridge-opt")
    tlc.attach(model, ["mlp_out", "attn_out"], n_codes=8, k=2)
    cache = run(model)
    assert cache["blocks.0.hook_mlp_out.hook_codes"].shape == (14, 2)
    assert cache["blocks.0.hook_attn_out.hook_codes"].shape == (2, 7, 2)
    for hook in (
        force_code("L0.mlp_out:3", pos=1),
        tlc.ban_code("L0.mlp_out:3", pos=[2]),
        tlc.patch_codes(torch.zeros(2, 7, 2).long(), "L0.mlp_out"),
    ):
        with pytest.raises(ShapeError, match=r"blocks.0.hook_mlp_out has no position axis in this model.*Choose another site"):
            run(model, hook)
    assert torch.equal(run(model)["blocks.0.hook_mlp_out.hook_codes"], cache["blocks.0.hook_mlp_out.hook_codes"])
    mine = run(model, ("blocks.0.hook_mlp_out.hook_codes", lambda ids, hook: torch.full_like(ids, 3)))
    assert (mine["blocks.0.hook_mlp_out.hook_codes"] == 3).all()


@pytest.mark.parametrize("host", HOSTS)
def test_trap_23_the_configuration_comes_from_the_model_and_not_from_its_name(host, tmp_path):
    for name, architecture in (("my-llama-run", "neox"), ("gemma-gpt2", "gpt2"), ("pythia", "llama")):
        folder = write_hf_folder(tmp_path / name, architecture)
        model = load_hf(folder, host=host)
        with torch.no_grad():
            expected = make_hf(architecture)(TOKENS).logits
            torch.testing.assert_close(model(TOKENS), expected, rtol=0, atol=1e-5)
    narrow = load_hf(make_hf("gpt2"), make_tokenizer(), host=host)
    tlc.attach(narrow, "post", layers=0, n_codes=8)
    assert tlc.sites(narrow)["blocks.0.mlp.hook_post"].codebook.d_in == 48  # n_inner, not 4 * d_model


def test_trap_24_the_name_that_the_host_writes_on_every_module_is_not_a_codebooks_own(any_model):
    assert not hasattr(Codebook, "name")
    assert "name" not in vars(Codebook(8, CONFIG))
    books = tlc.attach(any_model, ["z", "mlp_out"], n_codes=8)
    tlc.refresh(any_model)  # setup() on a HookedTransformer
    assert {book.label for book in books.values()} == set(books)
    tlc.detach(any_model)
    assert {book.label for book in books.values()} == {""}


def test_trap_25_an_occupied_hook_point_is_refused(any_model):
    foreign = type("HookedSAE", (HookPoint,), {})
    any_model.hook_dict["blocks.0.hook_attn_out"].__class__ = foreign
    tlc.attach(any_model, "mlp_out", n_codes=8)
    before = state_of(any_model)
    with pytest.raises(AttachError, match=r"'blocks.0.hook_attn_out' is a HookedSAE, put there by another library"):
        tlc.attach(any_model, ["z", "attn_out"], n_codes=8)
    with pytest.raises(AttachError, match=r"'blocks.0.hook_mlp_out' already holds a codebook \(8 codes, k=1\).*nothing was changed"):
        tlc.attach(any_model, ["z", "mlp_out"], n_codes=8)
    assert_same_state(state_of(any_model), before)


def test_trap_26_detach_leaves_nothing_behind(any_model):
    before = state_of(any_model)
    for _ in range(2):
        tlc.attach(any_model, distinct(any_model), n_codes=8)
        any_model(TOKENS)
        tlc.detach(any_model)
    assert_same_state(state_of(any_model), before)
