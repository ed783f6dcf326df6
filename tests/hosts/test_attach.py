"""Attach and detach: every site on every host, nothing left behind, nothing of the user's lost."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformer_lens.hook_points import HookPoint

import tl_codebook as tlc
from tests.hosts.prepared import MODELS
from tests.hosts.state import TOKENS, assert_same_state, available, distinct, state_of
from tests.tiny import HOSTS, KINDS, N_HEADS, ODD_ARCHITECTURES, make_host
from tl_codebook import Codebook, CodebookConfig
from tl_codebook.errors import AttachError, ConfigError, HookNeverFiredError, NonFiniteError, ShapeError, UnknownHookError
from tl_codebook.hosts import PositionClock, is_bridge
from tl_codebook.names import SITES, hook_name
from tl_codebook.points import CodebookPoint

EVERY_KIND = [*KINDS, "native", *(f"bridge-{architecture}" for architecture in ODD_ARCHITECTURES)]
N_CODES, K = 8, 2


@pytest.fixture(params=EVERY_KIND)
def every_model(request):
    return make_host(request.param)


def codes_of(cache):
    return {name: value for name, value in cache.items() if name.endswith("hook_codes")}


# --- There and back


def test_attach_and_detach_at_every_site_leave_the_model_bit_for_bit(every_model):
    before = state_of(every_model)
    books = tlc.attach(every_model, distinct(every_model), n_codes=N_CODES, k=K)
    assert not torch.equal(every_model(TOKENS), before["logits"])
    assert tlc.detach(every_model) == books
    assert_same_state(state_of(every_model), before)


def test_attach_works_at_each_site_alone(every_model):
    before = state_of(every_model)
    for site in available(every_model):
        books = tlc.attach(every_model, site, n_codes=N_CODES, k=K)
        assert list(books) == [hook_name(0, site), hook_name(1, site)]
        logits, cache = every_model.run_with_cache(TOKENS)
        assert not torch.equal(logits, before["logits"]), site
        codes = codes_of(cache)
        assert list(codes) == [f"{name}.hook_codes" for name in books]
        for ids in codes.values():
            assert ids.dtype == torch.long
            assert 0 <= int(ids.min()) <= int(ids.max()) < N_CODES
        tlc.detach(every_model)
        assert torch.equal(every_model(TOKENS), before["logits"]), site
    assert_same_state(state_of(every_model), before)


def test_detach_of_one_site_leaves_the_others(any_model):
    tlc.attach(any_model, "mlp_out", n_codes=N_CODES)
    before = state_of(any_model)
    tlc.attach(any_model, ["z", "resid_delta"], n_codes=N_CODES)
    assert list(tlc.detach(any_model, ["L1.z", "blocks.0.attn.hook_z", "resid_delta"])) == [
        "blocks.1.attn.hook_z",
        "blocks.0.attn.hook_z",
        "blocks.0.hook_resid_delta",
        "blocks.1.hook_resid_delta",
    ]
    assert_same_state(state_of(any_model), before)


def test_a_detached_codebook_attached_again_gives_the_same_codes(any_model):
    tlc.attach(any_model, ["z", "mlp_out"], n_codes=N_CODES, k=K)
    logits = any_model(TOKENS)
    books = tlc.detach(any_model)
    assert tlc.attach(any_model, books) == books
    assert torch.equal(any_model(TOKENS), logits)


def test_detach_is_idempotent_and_names_what_is_not_there(model):
    tlc.attach(model, "mlp_out", n_codes=N_CODES)
    assert len(tlc.detach(model)) == 2
    assert tlc.detach(model) == {}
    with pytest.raises(UnknownHookError, match=r"no codebook sits at 'mlp_out'.*no site; call attach first"):
        tlc.detach(model, "mlp_out")


def test_layers_choose_blocks_from_either_end(model):
    assert list(tlc.attach(model, "mlp_out", layers=-1, n_codes=N_CODES)) == ["blocks.1.hook_mlp_out"]
    tlc.detach(model)
    assert list(tlc.attach(model, ["mlp_out", "z"], layers=[0], n_codes=N_CODES)) == ["blocks.0.hook_mlp_out", "blocks.0.attn.hook_z"]


def test_a_mapping_gives_each_place_its_own_codebook(model):
    book = Codebook(32, CodebookConfig(n_codes=5))
    books = tlc.attach(
        model, {"L0.mlp_out": book, "z": CodebookConfig(n_codes=6, k=2), "blocks.1.hook_resid_post": CodebookConfig(n_codes=7)}
    )
    assert {name: (b.n_groups, b.n_codes, b.k) for name, b in books.items()} == {
        "blocks.0.hook_mlp_out": (1, 5, 1),
        "blocks.0.attn.hook_z": (N_HEADS, 6, 2),
        "blocks.1.attn.hook_z": (N_HEADS, 6, 2),
        "blocks.1.hook_resid_post": (1, 7, 1),
    }
    assert books["blocks.0.hook_mlp_out"] is book
    assert book.label == "blocks.0.hook_mlp_out"
    assert list(tlc.sites(model)) == ["blocks.0.attn.hook_z", "blocks.0.hook_mlp_out", "blocks.1.attn.hook_z", "blocks.1.hook_resid_post"]


# --- What the codes are


@pytest.mark.parametrize("kind", [f"{host}-llama" for host in HOSTS] + ["bridge-mixtral", "bridge-granite", "bridge-olmo2"])
def test_grouped_query_attention_has_a_group_for_each_key_value_head(kind):
    model = make_host(kind)
    books = tlc.attach(model, ["z", "q", "k", "v"], n_codes=N_CODES, k=K)
    groups = {name.rpartition("_")[2]: book.n_groups for name, book in books.items()}
    assert groups == {"z": 4, "q": 4, "k": 2, "v": 2}
    _, cache = model.run_with_cache(TOKENS)
    assert cache["blocks.1.attn.hook_q.hook_codes"].shape == (2, 7, 4, K)
    assert cache["blocks.1.attn.hook_k.hook_codes"].shape == cache["blocks.1.attn.hook_v.hook_codes"].shape == (2, 7, 2, K)


def test_the_site_carries_the_decoded_codes_and_hook_x_the_original(every_model):
    sites = [site for site in distinct(every_model) if site != "resid_delta"]
    _, plain = every_model.run_with_cache(TOKENS)
    books = tlc.attach(every_model, sites, n_codes=N_CODES, k=K)
    _, cache = every_model.run_with_cache(TOKENS)
    first = hook_name(0, "resid_pre")  # the one site that no other codebook changes
    assert torch.equal(cache[f"{first}.hook_x"], plain[first])
    for name, book in books.items():
        ids, x = cache[f"{name}.hook_codes"], cache[f"{name}.hook_x"]
        grouped = ids.unsqueeze(-2) if book.n_groups == 1 else ids
        assert torch.equal(cache[name].reshape(x.shape), book.decode(grouped).detach().reshape(x.shape)), name
        assert torch.equal(book.encode(x.flatten(-2) if book.n_groups > 1 else x), grouped), name


def test_resid_delta_snaps_what_the_block_adds(every_model):
    books = tlc.attach(every_model, "resid_delta", n_codes=N_CODES, k=K)
    _, cache = every_model.run_with_cache(TOKENS)
    for layer in range(2):
        block = f"blocks.{layer}"
        ids = cache[f"{block}.hook_resid_delta.hook_codes"]
        added = books[f"{block}.hook_resid_delta"].decode(ids.unsqueeze(-2)).squeeze(-2).detach()
        assert torch.equal(cache[f"{block}.hook_resid_delta"], added)
        assert torch.equal(cache[f"{block}.hook_resid_post"], cache[f"{block}.hook_resid_pre"] + added)
    assert torch.equal(cache["blocks.1.hook_resid_pre"], cache["blocks.0.hook_resid_post"])


def test_resid_delta_is_the_difference_of_the_untouched_model(any_model):
    _, plain = any_model.run_with_cache(TOKENS)
    tlc.attach(any_model, "resid_delta", layers=0, n_codes=N_CODES)
    _, cache = any_model.run_with_cache(TOKENS)
    expected = plain["blocks.0.hook_resid_post"] - plain["blocks.0.hook_resid_pre"]
    torch.testing.assert_close(cache["blocks.0.hook_resid_delta.hook_x"], expected, rtol=0, atol=1e-6)


def test_resid_delta_sits_between_resid_pre_and_resid_post(any_model):
    books = tlc.attach(any_model, ["resid_pre", "resid_delta", "resid_post"], n_codes=N_CODES, k=K)
    _, cache = any_model.run_with_cache(TOKENS)

    def decoded(name):
        return books[name].decode(cache[f"{name}.hook_codes"].unsqueeze(-2)).squeeze(-2).detach()

    for layer in range(2):
        pre, delta, post = (hook_name(layer, site) for site in ("resid_pre", "resid_delta", "resid_post"))
        assert torch.equal(cache[pre], decoded(pre))
        assert torch.equal(cache[f"{post}.hook_x"], cache[pre] + decoded(delta))
        assert torch.equal(cache[post], decoded(post))


@pytest.mark.parametrize("order", [["resid_delta", "resid_post", "resid_pre"], ["resid_pre", "resid_post", "resid_delta"]])
def test_resid_delta_can_come_and_go_before_and_after_its_neighbours(model, order):
    before, states = state_of(model), []
    for site in order:
        states.append(state_of(model))
        tlc.attach(model, site, n_codes=N_CODES)
    logits = model(TOKENS)
    for site, state in zip(reversed(order), reversed(states), strict=True):
        tlc.detach(model, site)
        assert_same_state(state_of(model), state)
    for site in order:  # and in the order in which they came
        tlc.attach(model, site, n_codes=N_CODES)
    assert model(TOKENS).shape == logits.shape
    for site in order:
        tlc.detach(model, site)
        model(TOKENS)
    assert_same_state(state_of(model), before)


# --- A failed attach


class Unmovable(Codebook):
    """A codebook for which there is no memory on the device of the model."""

    def to(self, *args, **kwargs):
        raise torch.OutOfMemoryError("no memory left")


class Interrupted(Codebook):
    """A codebook whose user presses Ctrl-C while attach tries it out."""

    def snap(self, y):
        raise KeyboardInterrupt


FOREIGN = type("ForeignPoint", (HookPoint,), {})


def occupy(model, name="blocks.0.hook_resid_pre"):
    model.hook_dict[name].__class__ = FOREIGN


def break_second_block(model):
    next(model.blocks[1].parameters()).data.fill_(torch.nan)


def parallel(model):
    return "blocks.0.hook_resid_mid" not in model.hook_dict


CONFIG = CodebookConfig(n_codes=N_CODES)
FAILURES = {
    "site": (lambda m: ["z", "mlpout"], {"n_codes": 4}, UnknownHookError, r"no site 'mlpout'. Did you mean 'mlp_out'"),
    "no site": (lambda m: [], {"n_codes": 4}, UnknownHookError, r"no site was given"),
    "layer": (lambda m: "z", {"n_codes": 4, "layers": [0, 2]}, UnknownHookError, r"no layer 2: the model has 2 layers. Give 0 to 1"),
    "hook name": (
        lambda m: {"blocks.0.hook_mlp_oot": CONFIG},
        {},
        UnknownHookError,
        r"no hook point 'blocks.0.hook_mlp_oot'.*hook_mlp_out",
    ),
    "layer in a name": (lambda m: {"blocks.7.hook_mlp_out": CONFIG}, {}, UnknownHookError, r"Layers go from 0 to 1"),
    "no n_codes": (lambda m: "z", {}, ConfigError, r"n_codes was not given"),
    "option": (lambda m: "z", {"n_codes": 4, "similarty": "euclidean"}, ConfigError, r"no option 'similarty'. Did you mean 'similarity'"),
    "groups": (
        lambda m: ["mlp_out", "z"],
        {"n_codes": 4, "n_groups": 3},
        ConfigError,
        r"hook_mlp_out'.*d_in=32 cannot be split.*n_groups=3",
    ),
    "groups across heads": (
        lambda m: "z",
        {"n_codes": 4, "n_groups": 3},
        ConfigError,
        r"n_groups=3 was asked for at .*z', which has 4 heads",
    ),
    "k": (lambda m: "z", {"n_codes": 4, "k": 5}, ConfigError, r"k=5 codes were asked for, but there are n_codes=4"),
    "width": (lambda m: {"L0.z": CONFIG, "L1.mlp_out": Codebook(16, CONFIG)}, {}, ShapeError, r"d_in=16, the activation there has 32"),
    "same book twice": (lambda m: dict.fromkeys(("L0.z", "L1.z"), Codebook(32, CONFIG)), {}, AttachError, r"one Codebook was given for"),
    "same place twice": (lambda m: {"z": CONFIG, "L1.z": CONFIG}, {}, AttachError, r"another name in the same call means too"),
    "not a codebook": (lambda m: {"z": CONFIG, "L1.mlp_out": nn.Linear(2, 2)}, {}, ConfigError, r"'L1.mlp_out' is mapped to a Linear"),
    "never fires": (
        lambda m: {"L0.z": CONFIG, "blocks.0.attn.hook_result": CONFIG},
        {},
        HookNeverFiredError,
        r"hook_result' exists, but nothing",
    ),
    "not positions": (lambda m: {"blocks.0.attn.hook_pattern": CONFIG}, {}, ShapeError, r"carries \(2, 4, 3, 3\) for tokens \(2, 3\)"),
    "occupied": (
        lambda m: ["resid_delta", "z", "resid_pre"],
        {"n_codes": 4},
        AttachError,
        r"is a ForeignPoint, put there by another library",
    ),
    "NaN": (lambda m: ["resid_delta", "z", "resid_post"], {"n_codes": 4}, NonFiniteError, r"blocks\.1.*hold NaN or Inf"),
    "no memory": (
        lambda m: {"resid_delta": CONFIG, "L0.z": CONFIG, "L1.z": Unmovable(32, CodebookConfig(n_codes=4, n_groups=4))},
        {},
        torch.OutOfMemoryError,
        "no memory left",
    ),
    "Ctrl-C": (lambda m: {"resid_delta": CONFIG, "z": CONFIG, "L1.mlp_out": Interrupted(32, CONFIG)}, {}, KeyboardInterrupt, "^$"),
}
PREPARE = {"occupied": occupy, "NaN": break_second_block}


@pytest.mark.parametrize("kind", [MODELS[0], MODELS[-1]])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_attach_leaves_the_model_bit_for_bit(kind, failure):
    model, (sites, options, error, message) = make_host(kind), FAILURES[failure]
    PREPARE.get(failure, lambda m: None)(model)
    seen = []
    model.add_hook("blocks.0.hook_resid_post", lambda x, hook: seen.append(x.shape))
    model.add_hook("blocks.1.attn.hook_z", lambda x, hook: x * 0.5, is_permanent=True)
    before = state_of(model, logits=failure != "NaN")
    seen.clear()
    with pytest.raises(error, match=message):
        tlc.attach(model, sites(model), **options)
    assert seen == []  # the probe does not run the user's hooks
    assert_same_state(state_of(model, logits=failure != "NaN"), before)
    if failure != "NaN":
        assert seen == [(2, 7, 32)]


def test_a_failed_attach_leaves_earlier_codebooks_as_they_were(any_model):
    tlc.attach(any_model, ["z", "resid_delta"], n_codes=N_CODES)
    before = state_of(any_model)
    with pytest.raises(AttachError, match=r"'blocks.0.attn.hook_z' already holds a codebook \(8 codes, k=1\). Call detach"):
        tlc.attach(any_model, ["mlp_out", "z"], n_codes=N_CODES)
    assert_same_state(state_of(any_model), before)


def test_a_failed_attach_leaves_the_codebook_given_as_it_was(model):
    book = Codebook(32, CONFIG).train()
    with pytest.raises(HookNeverFiredError):
        tlc.attach(model, {"L0.mlp_out": book, "blocks.0.attn.hook_result": CONFIG})
    assert (book.training, book.label, book.count_when, int(book.usage.counts.sum())) == (True, "", "train", 0)


def test_parallel_blocks_refuse_resid_mid_and_say_why(any_model):
    if not parallel(any_model):
        assert len(tlc.attach(any_model, "resid_mid", n_codes=N_CODES)) == 2
        return
    before = state_of(any_model)
    with pytest.raises(UnknownHookError, match=r"no hook point 'blocks.0.hook_resid_mid'.*in parallel.*use resid_pre or resid_post"):
        tlc.attach(any_model, ["z", "resid_mid"], n_codes=N_CODES)
    assert_same_state(state_of(any_model), before)


@pytest.mark.parametrize("training", [True, False])
def test_attach_takes_the_mode_of_the_model_and_counts_nothing(model, training):
    model.train(training)
    books = tlc.attach(model, ["z", "resid_delta"], n_codes=N_CODES)
    assert all(int(book.usage.counts.sum()) == 0 and book.terms is None for book in books.values())
    assert [name for name, module in model.named_modules() if module.training is not training] == []


# --- Copies


def test_a_deepcopy_is_independent(any_model):
    tlc.attach(any_model, ["z", "mlp_out", "resid_delta"], n_codes=N_CODES, k=K)
    with torch.no_grad():
        logits = any_model(TOKENS)
    twin = copy.deepcopy(any_model)
    assert torch.equal(twin(TOKENS), logits)
    with torch.no_grad():
        for point in tlc.sites(twin).values():
            assert isinstance(point, CodebookPoint)
            assert point.clock is PositionClock.of(twin) is not PositionClock.of(any_model)
            point.codebook.codes.zero_()
        assert not torch.equal(twin(TOKENS), logits)
        assert torch.equal(any_model(TOKENS), logits)
        tlc.detach(twin)
        assert torch.equal(any_model(TOKENS), logits)
    assert list(tlc.sites(twin)) == []
    assert len(tlc.sites(any_model)) == 6


def test_a_deepcopy_after_a_training_step_works(model):
    """Loss terms and what resid_delta remembers hang on a graph, which cannot be copied."""
    if is_bridge(model) and "GPT2" in type(model.original_model).__name__:
        pytest.skip(
            "a GPT-2 Bridge keeps a non-leaf attention pattern and cannot be copied after a forward with gradients, codebooks or not"
        )
    books = tlc.attach(model.train(), ["mlp_out", "resid_delta"], n_codes=N_CODES)
    model(TOKENS, return_type="loss").backward()
    assert next(iter(books.values())).terms is not None
    twin = copy.deepcopy(model)
    assert all(point.codebook.terms is None for point in tlc.sites(twin).values())
    assert torch.equal(twin.eval()(TOKENS), model.eval()(TOKENS))


def test_a_hooked_transformer_pickles_with_its_codebooks():
    if "hooked" not in HOSTS:
        pytest.skip("this TransformerLens has no HookedTransformer; a Bridge cannot be pickled, codebooks or not")
    model = make_host("hooked-gpt2")
    tlc.attach(model, ["z", "resid_delta"], n_codes=N_CODES)
    twin = pickle.loads(pickle.dumps(model))  # noqa: S301
    assert torch.equal(twin(TOKENS), model(TOKENS))
    assert list(tlc.sites(twin)) == list(tlc.sites(model))


def test_sites_are_in_the_order_of_layers_and_of_the_site_table(any_model):
    asked = distinct(any_model)
    tlc.attach(any_model, list(reversed(asked)), layers=[1, 0], n_codes=N_CODES)
    assert list(tlc.sites(any_model)) == [hook_name(layer, site) for layer in range(2) for site in SITES if site in asked]
