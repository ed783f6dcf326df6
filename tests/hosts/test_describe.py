"""The direct effect on the logits against logits of the host itself, and what is measured against runs one by one, on every host."""

import numpy as np
import pytest
import torch

import tl_codebook as tlc
from tests.hosts.prepared import CONFIGS, MODELS, N_CODES, prepared
from tests.hosts.state import TOKENS, assert_same_state, available, state_of
from tests.tiny import HOSTS, KINDS, make_hf, make_host, make_tokenizer
from tl_codebook import force_code
from tl_codebook.convert.huggingface import load_hf
from tl_codebook.describe import describe_code, direct_logit_effect, measured
from tl_codebook.describe.logits import extremes
from tl_codebook.describe.measured import fits_at, forcing_effect
from tl_codebook.describe.places import places_without, rows_ending_at
from tl_codebook.describe.weights import final_norm, logit_path
from tl_codebook.describe.words import Words
from tl_codebook.errors import ConfigError
from tl_codebook.names import Code, hook_name

SCALE = 1.7
WRITERS = ("z", "v", "attn_out", "mlp_out", "post", "resid_pre", "resid_mid", "resid_post", "resid_delta")
TEXTS = [" ".join(f"w{3 + (5 * i + j * j) % 57}" for j in range(4 + 9 * (i % 5))) for i in range(12)]


def hold_scale(model):
    """Let the final norm divide by a constant, written down by hand."""
    weight = model.ln_final.w.detach()
    centred = str(model.cfg.normalization_type).startswith("LN")

    def forward(x, *_, **__):
        return (x - x.mean(-1, keepdim=True) if centred else x) / SCALE * weight

    vars(model.ln_final)["forward"] = forward  # what a Module calls; a Bridge hands attributes on to what it wraps


def others_held(model, site):
    """Hooks that keep what the last block reads of itself as it is without forcing: only the straight way is left."""
    clean = {}
    held = {"resid_pre": ("attn_out", "mlp_out"), "z": ("mlp_out",), "v": ("mlp_out",), "attn_out": ("mlp_out",), "resid_mid": ("mlp_out",)}
    names = [hook_name(1, part) for part in held.get(site, ())]
    with torch.no_grad(), model.hooks(fwd_hooks=[(name, lambda x, hook, name=name: clean.update({name: x.clone()})) for name in names]):
        model(TOKENS)
    return [(name, lambda x, hook, name=name: clean[name]) for name in names]


def forced_logits(model, hooks):
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        return model(TOKENS)[:, 0]  # at position 0 a head attends to that position alone, as v is read


def config_for(site, config):
    return config if site in ("z", "v") else tlc.CodebookConfig(**{**config.to_dict(), "n_groups": 2 if site == "post" else 1})


@pytest.mark.parametrize("site", WRITERS)
@pytest.mark.parametrize("kind", [*KINDS, "native"])
def test_the_direct_effect_is_exact_while_the_scale_is_held(kind, site):
    model = make_host(kind)
    if site not in available(model):
        pytest.skip(f"{kind} has no {site}")
    config = CONFIGS["paper" if site in ("mlp_out", "v") else "residual"]  # a mean and a sum
    tlc.attach(model, {site: config_for(site, config)}, layers=-1)
    codes = [Code(1, site, 1 if site in ("z", "v", "post") else None, number) for number in (2, 7)]
    if (site == "v" and "llama" in kind) or (site == "resid_mid" and (kind.startswith("bridge") or HOSTS == ("bridge",))):
        with pytest.raises(ConfigError, match="serves 2 heads" if site == "v" else "the MLP's input alone on a TransformerBridge"):
            direct_logit_effect(model, codes[0])
        return
    state = state_of(model)
    a, b = (direct_logit_effect(model, code, scale=SCALE) for code in codes)
    assert_same_state(state_of(model), state)
    assert a.shape == (61,)
    hold_scale(model)
    held = others_held(model, site)
    logits = [forced_logits(model, [force_code(code, pos=0), *held]) for code in codes]
    for row in range(2):
        torch.testing.assert_close(logits[0][row] - logits[1][row], a - b, rtol=1e-3, atol=1e-3 * float((a - b).abs().max()))
    assert float((a - b).abs().max()) > 0.01


@pytest.mark.skipif("hooked" not in HOSTS, reason="the Bridge computes its norm inside Hugging Face, where no hook changes the scale")
@pytest.mark.parametrize("config", CONFIGS)
def test_the_direct_effect_is_exact_under_the_scale_that_a_hook_sets(config):
    model = prepared("hooked-gpt2", config).model
    hold = ("ln_final.hook_scale", lambda scale, hook: torch.full_like(scale, SCALE))
    effects = [direct_logit_effect(model, f"L1.mlp_out:{code}", scale=SCALE) for code in (3, 8)]
    with torch.no_grad():
        a, b = (model.run_with_hooks(TOKENS, fwd_hooks=[force_code(f"L1.mlp_out:{code}", pos=4), hold])[:, 4] for code in (3, 8))
    torch.testing.assert_close(a - b, (effects[0] - effects[1]).expand(2, -1), rtol=1e-4, atol=1e-4)


def test_the_final_norm_is_read_off_each_host(any_model):
    norm = final_norm(any_model)
    x = 3 + torch.randn(2, 4, 32)
    with torch.no_grad():
        out, zero = any_model.ln_final(x), any_model.ln_final(torch.zeros(1, 1, 32))
    torch.testing.assert_close(norm.linear(x.flatten(0, 1)) / norm.scale(x).reshape(-1, 1) + zero[0], out.flatten(0, 1))
    assert norm.centred == (any_model.cfg.normalization_type == "LN")
    torch.testing.assert_close(norm.weight, any_model.ln_final.w.detach())


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_the_effect_is_that_of_the_rounded_weights(kind, dtype):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = make_host(kind)
        tlc.attach(model, "z", n_codes=N_CODES, k=2)
    exact = direct_logit_effect(model, "L1.z.2:3")
    rounded = direct_logit_effect(model.to(dtype), "L1.z.2:3")
    assert rounded.dtype == torch.float32
    assert float((rounded - exact).norm() / exact.norm()) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("architecture", "changes", "refused"),
    [
        ("olmo2", {}, {"z": "block 0 adds is not z times its output weights", "post": "is not post times its output weights"}),
        ("granite", {"residual_multiplier": 0.2}, {"z": "a norm or a factor in between", "post": "a norm or a factor in between"}),
        (
            "granite",
            {"logits_scaling": 8.0},
            dict.fromkeys(("z", "mlp_out", "post", "resid_post"), "not those of the final norm and the unembedding"),
        ),
        ("mixtral", {}, {"post": "MoEBridge of block 0 has no weights"}),
        ("opt", {}, {}),
    ],
)
def test_a_way_that_is_not_in_the_weights_is_refused(architecture, changes, refused):
    model = load_hf(make_hf(architecture, **changes), make_tokenizer(), host="bridge")
    for site in ("z", "mlp_out", "post", "resid_post"):
        if site in refused:
            with pytest.raises(ConfigError, match=rf"{refused[site]}.* Measure the effect of forcing"):
                logit_path(model, hook_name(0, site))
        else:
            assert torch.isfinite(logit_path(model, hook_name(0, site)).logits(torch.ones(1, 48 if site == "post" else 32))).all()


def test_a_soft_cap_is_left_out():
    """Gemma 2: a norm that writes its weight as 1 + w, and logits bent by tanh."""
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"vocab_size": 61, "head_dim": 8, "max_position_embeddings": 48, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.Gemma2Config(**sizes, final_logit_softcapping=2.0)
    hf = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in hf.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.15)
    weight = 1 + hf.model.norm.weight.detach()
    model = load_hf(hf, make_tokenizer(), host="bridge")
    tlc.attach(model, "mlp_out", layers=1, n_codes=8)
    with pytest.raises(ConfigError, match="is not post times its output weights"):  # another norm comes before the stream
        logit_path(model, "blocks.1.mlp.hook_post")
    a, b = (direct_logit_effect(model, f"L1.mlp_out:{code}", scale=SCALE) for code in (3, 5))
    vars(model.ln_final)["forward"] = lambda x: x / SCALE * weight
    logits = [forced_logits(model, [force_code(f"L1.mlp_out:{code}", pos=0)])[0].double() for code in (3, 5)]
    uncapped = [2 * torch.atanh(row / 2) for row in logits]
    torch.testing.assert_close((uncapped[0] - uncapped[1]).float(), a - b, rtol=1e-3, atol=1e-3 * float((a - b).abs().max()))


@pytest.mark.parametrize("site", ["q", "k", "qkv"])
def test_sites_that_write_nothing(site, tmp_path):
    model = make_host("native")
    tlc.attach(model, {site: tlc.CodebookConfig(8, 2)}, layers=0)
    store = tlc.collect_codes(model, TEXTS, tmp_path / "store", progress=False)
    code = f"L0.{site}.1:3" if site != "qkv" else "L0.qkv:3"
    with pytest.raises(ConfigError, match=rf"hook_{site}' says where attention looks and writes nothing"):
        direct_logit_effect(model, code)
    found = describe_code(store, code, model, measure=True)
    assert found.raises == found.lowers == ()
    assert "no direct effect on the logits" in found.notes[0]
    assert found.effect.n_places > 0
    assert len(found.similar) == 7


def test_a_site_outside_the_table():
    model = make_host("native")
    tlc.attach(model, {"hook_embed": tlc.CodebookConfig(8)})
    with pytest.raises(ConfigError, match="'hook_embed' is no site of the table"):
        direct_logit_effect(model, "hook_embed:3")


@pytest.fixture
def few_places(monkeypatch):
    """Run one by one, many places take long."""
    monkeypatch.setattr(measured, "N_PLACES", 12)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Stores of prepared models, made when they are asked for."""
    made = {}

    def of(kind, config="residual"):
        if (kind, config) not in made:
            path = tmp_path_factory.mktemp("stores") / "store"
            made[kind, config] = tlc.collect_codes(prepared(kind, config).model, TEXTS, path, context_length=20, progress=False)
        return made[kind, config]

    return of


def one_by_one(model, rows, code, *hooks):
    """The log-probabilities after each row, and whether the code is there; for each row a run of its own."""
    result, there = [], []
    for row in rows:
        with torch.no_grad(), model.hooks(fwd_hooks=list(hooks)):
            logits, cache = model.run_with_cache(torch.as_tensor(row)[None])
        ids = cache[f"{code.hook_name}.hook_codes"][0, -1]
        there.append(bool(((ids if code.group is None else ids[code.group]) == code.code).any()))
        result.append(logits[0, -1].double().log_softmax(-1))
    return torch.stack(result), torch.tensor(there)


@pytest.mark.parametrize("kind", [*KINDS, "native"])
def test_the_effect_of_forcing_as_one_by_one(kind, stores, few_places):
    model, store = prepared(kind).model, stores(kind)
    state = state_of(model.train())
    words = Words.of_store(store)
    for label in ("L1.mlp_out:4", "L0.z.2:3"):
        code = Code.parse(label)
        counts = store.counts(code.hook_name)[code.group or 0]
        found = forcing_effect(model, store, code, counts, words, 5, np.random.default_rng(2))
        assert_same_state(state_of(model), state)
        places = places_without(store, store.positions(code), 12, np.random.default_rng(2))
        assert not set(places.tolist()) & set(store.positions(code).tolist())
        assert not store.is_special()[places].any()
        rows = rows_ending_at(store, places, 48)
        model.eval()
        before, there = one_by_one(model, rows, code)
        after, _ = one_by_one(model, rows, code, force_code(code, pos=-1))
        model.train()
        before, after = before[~there], after[~there]
        assert found.n_places == len(before) > 6
        assert found.kl == pytest.approx(float((after.exp() * (after - before)).sum(-1).mean()), rel=1e-3)
        above, below = extremes((after - before).mean(0), 5, words)
        for ours, expected in ((found.raises, above), (found.lowers, below)):
            assert [row.logit for row in ours] == pytest.approx([row.logit for row in expected], abs=1e-4)
        assert found.control_kl > 0
    model.eval()


@pytest.mark.parametrize("kind", MODELS[:1] + MODELS[-1:])
def test_the_control_forces_another_code(kind, tmp_path, few_places):
    """Where all other codes are one vector, the control is known: any of them, forced."""
    model = make_host(kind)
    books = tlc.attach(model, "mlp_out", layers=1, n_codes=6, k=2, selection="nearest")
    with torch.no_grad():
        books["blocks.1.hook_mlp_out"].codes[0, 1:] = 3 * torch.randn(32)
    store = tlc.collect_codes(model, TEXTS, tmp_path / "store", context_length=20, progress=False)
    code = Code.parse("L1.mlp_out:5")  # of equal codes the lowest are chosen, this one never is
    assert store.counts("L1.mlp_out")[0, 5] == 0
    found = forcing_effect(model, store, code, store.counts("L1.mlp_out")[0], Words(None), 3, np.random.default_rng(0))
    rows = rows_ending_at(store, places_without(store, store.positions(code), 12, np.random.default_rng(0)), 48)
    before, _ = one_by_one(model, rows, code)
    others = [one_by_one(model, rows, code, force_code(f"L1.mlp_out:{other}", pos=-1))[0] for other in (0, 3)]
    kls = [float((after.exp() * (after - before)).sum(-1).mean()) for after in others]
    assert kls[0] != pytest.approx(kls[1], rel=1e-2)
    assert min(kls) * 0.99 <= found.control_kl <= max(kls) * 1.01
    assert found.kl == pytest.approx(kls[1], rel=1e-3)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", MODELS[:1] + MODELS[-1:])
def test_similarity_and_scale_as_one_by_one(kind, config, stores):
    host, store = prepared(kind, config), stores(kind, config)
    for name, group in (("blocks.1.hook_mlp_out", None), ("blocks.0.attn.hook_z", 1)):
        counts = store.counts(name)[group or 0]
        code = Code(None, name, group, int(counts.argmax()))
        book = host.books[name]
        places = store.positions(code)
        places = places[~store.is_special()[places]][:60:4]
        found = fits_at(host.model, store, code, places)
        for i, row in enumerate(rows_ending_at(store, places, 48)):
            with torch.no_grad():
                _, cache = host.model.run_with_cache(torch.as_tensor(row)[None])
            x = cache[f"{name}.hook_x"][:, -1]
            y = book.normalise(x.reshape(1, book.n_groups, -1))[0, group or 0]
            ids = cache[f"{name}.hook_codes"][0, -1].reshape(book.n_groups, -1)[group or 0].tolist()
            stream = cache["blocks.1.hook_resid_post"][0, -1]
            centred = stream - stream.mean() if host.model.cfg.normalization_type == "LN" else stream
            assert float(found.scale[i]) == pytest.approx(float(centred.square().mean().sqrt()), rel=1e-3)
            if code.code not in ids:
                assert bool(found.similarity[i].isnan())
                continue
            if book.config.selection == "residual":
                y = y - sum(book.codes[group or 0, other] for other in ids[: ids.index(code.code)])
            cosine = torch.nn.functional.cosine_similarity(y, book.codes[group or 0, code.code], dim=0)
            assert float(found.similarity[i]) == pytest.approx(float(cosine.detach()), abs=1e-4)
        assert int((~found.similarity.isnan()).sum()) > 5


@pytest.mark.parametrize("kind", [*KINDS, "native"])
def test_a_page_with_everything(kind, stores):
    model, store = prepared(kind).model, stores(kind)
    state = state_of(model)
    counts = store.counts("L1.mlp_out", special=False)[0]
    code = Code(1, "mlp_out", None, int(np.abs(counts - counts.sum() / 8).argmin()))  # there are places with it and without it
    found = describe_code(store, code, model, n=6, n_contexts=7, measure=True)
    assert_same_state(state_of(model), state)
    assert found == describe_code(store, code, model, n=6, n_contexts=7, measure=True)
    similarity = [context.similarity for context in found.top]
    assert similarity == sorted(similarity, reverse=True)
    assert len(similarity) == 7
    assert all(-1 <= value <= 1 for value in similarity)
    for context in found.top:
        assert int(store.ids(code.hook_name)[context.position, 0, context.slot]) == code.code
    effect = direct_logit_effect(model, code, scale=found.scale)
    assert [row.token for row in found.raises] == effect.argsort(descending=True)[:6].tolist()
    assert [row.logit for row in found.lowers] == pytest.approx(effect.sort().values[:6].tolist(), rel=1e-5)
    assert found.effect.n_places > 20
    assert found.notes == ()


def test_user_hooks_stay_and_count(stores):
    """What a user has hung on the model is part of it: it acts in what is measured, and is there afterwards."""
    model, store = prepared(MODELS[0]).model, stores(MODELS[0])
    calls = []
    model.hook_dict["blocks.0.hook_mlp_out"].add_hook(lambda x, hook: calls.append(1))
    try:
        state = state_of(model, logits=False)
        describe_code(store, "L1.mlp_out:3", model, measure=True)
        assert len(calls) > 5
        assert_same_state(state_of(model, logits=False), state)
    finally:
        model.reset_hooks()
