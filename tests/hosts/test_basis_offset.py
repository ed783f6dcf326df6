"""Folded value biases move z and v by a constant: codes are held in their own basis by an offset, and nothing else changes.

Every comparison is with the unprocessed model that the codes were trained on, or the processed one in the reverse direction.
"""

import copy
import pickle
import warnings

import pytest
import torch

import tl_codebook as tlc
from tests.hosts.state import TOKENS, assert_same_state, state_of
from tests.tiny import HOSTS, make_host, make_tokenizer
from tl_codebook import CodebookConfig, Codebooks
from tl_codebook.basis import fingerprint
from tl_codebook.contexts import count_usage
from tl_codebook.convert.huggingface import load_hf
from tl_codebook.errors import BasisMismatchError, BasisWarning, CheckpointError, ShapeError
from tl_codebook.interventions import ban_code, force_code, patch_codes

BIASED = [f"{host}-{architecture}" for host in HOSTS for architecture in ("gpt2", "neox", "neo")]
FIRST = BIASED[0]
Z = "blocks.1.attn.hook_z"
hooked_only = pytest.mark.skipif("hooked" not in HOSTS, reason="TransformerLens 4 has no HookedTransformer")


def make_qwen(host):
    """RMSNorm, which is never centred, with biases at q, k and v."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = Qwen2ForCausalLM(Qwen2Config(**sizes, vocab_size=61, max_position_embeddings=48)).eval()
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.15)
    return load_hf(model, make_tokenizer(), host=host)


def make(kind):
    host, _, architecture = kind.partition("-")
    return make_qwen(host) if architecture == "qwen" else make_host(kind)


def processed(kind):
    """The same model, with all of the weight processing that TransformerLens does by default."""
    model = make(kind)
    if kind.startswith("hooked"):
        model.process_weights_()
    else:
        model.enable_compatibility_mode(disable_warnings=True)
    return model.eval()


def books_on(model, sites=("z",), n_codes=12, k=3):
    """Attach codes that are activations of the model, so that many of them are close, and take them with their basis."""
    books = tlc.attach(model, dict.fromkeys(sites, CodebookConfig(n_codes, k, selection="nearest")))
    with tlc.bypassed(model), torch.no_grad():
        cache = model.run_with_cache(torch.arange(3, 15).reshape(1, -1))[1]
    with torch.no_grad():
        for name, book in books.items():
            book.codes.copy_(book.grouped(cache[name].reshape(1, n_codes, -1))[0].transpose(0, 1))
    return Codebooks.of(model)


def attached(model, books):
    """Attach a copy of the codebooks, which must give exactly the one warning of an offset."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", BasisWarning)
        tlc.attach(model, copy.deepcopy(books))
    (message,) = [str(w.message) for w in caught if w.category is BasisWarning]
    assert "differ by a constant" in message
    return model


def both(kind=FIRST, sites=("z",), **settings):
    """The model that the codes were made on, and the processed one that they were attached to."""
    plain = make(kind)
    books = books_on(plain, sites, **settings)
    return plain, attached(processed(kind), books)


@torch.no_grad()
def run(model, *hooks):
    with model.hooks(fwd_hooks=list(hooks)):
        logits, cache = model.run_with_cache(TOKENS)
    return logits.log_softmax(-1), cache


def assert_same(got, want, names, atol=1e-5):
    for name in names:
        assert got[1][f"{name}.hook_codes"].tolist() == want[1][f"{name}.hook_codes"].tolist(), name
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=atol)


def assert_silent(model, books):
    with warnings.catch_warnings():
        warnings.simplefilter("error", BasisWarning)
        tlc.attach(model, books)
    assert all(point.offset is None for point in tlc.sites(model).values())


# --- the same model ---


@pytest.mark.parametrize("sites", [("z",), ("v",), ("z", "v", "q", "k")], ids="+".join)
@pytest.mark.parametrize("kind", [*BIASED, *[f"{host}-qwen" for host in HOSTS]])
@pytest.mark.parametrize("direction", ["processed since", "trained on processed"])
def test_ids_and_log_probabilities_are_those_of_the_other_model(kind, sites, direction):
    first, second = make(kind), processed(kind)
    if direction == "trained on processed":
        first, second = second, first
    books = books_on(first, sites)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BasisWarning)
        unshifted = copy.deepcopy(second)
        tlc.attach(unshifted, dict(copy.deepcopy(books)))
    attached(second, books)
    want = run(first)
    assert_same(run(second), want, list(books))
    shifted = [name for name, point in tlc.sites(second).items() if point.offset is not None]
    assert shifted == [name for name in books if name.endswith(("hook_z", "hook_v"))]
    wrong = run(unshifted)[1]
    assert any(not torch.equal(wrong[f"{name}.hook_codes"], want[1][f"{name}.hook_codes"]) for name in shifted)  # or this tests nothing


@pytest.mark.parametrize("kind", [f"{host}-llama" for host in HOSTS])
def test_without_value_biases_nothing_moves(kind):
    plain, model = make(kind), processed(kind)
    books = books_on(plain, ("z", "v", "q", "k", "post", "mlp_out"))
    assert_silent(model, copy.deepcopy(books))
    assert_same(run(model), run(plain), list(books))


@pytest.mark.parametrize("kind", [f"{host}-gpt2" for host in HOSTS])
def test_sites_that_processing_leaves_alone_have_no_offset(kind):
    plain, model = make(kind), processed(kind)
    books = books_on(plain, ("q", "k", "post"))
    assert_silent(model, copy.deepcopy(books))
    assert_same(run(model), run(plain), list(books))


@hooked_only
@pytest.mark.parametrize("kinds", [("hooked-gpt2", "bridge-gpt2"), ("bridge-neo", "hooked-neo")], ids="-".join)
def test_from_one_host_to_the_other(kinds):
    plain = make(kinds[0])
    books = books_on(plain)
    assert_same(run(attached(processed(kinds[1]), books)), run(plain), list(books))


def test_one_group_and_layer_norm():
    plain, model = make(FIRST), processed(FIRST)
    tlc.attach(plain, {"z": CodebookConfig.paper(20, 4, n_groups=1)})
    books = Codebooks.of(plain)
    assert_same(run(attached(model, books)), run(plain), list(books))


def test_no_processing_gives_no_offset():
    books = books_on(make("bridge-gpt2"), ("z", "v"))
    model = make("bridge-gpt2")
    model.enable_compatibility_mode(no_processing=True, disable_warnings=True)
    assert_silent(model, books)


# --- what is no constant ---


@pytest.mark.parametrize("kind", [f"{host}-{architecture}" for host in HOSTS for architecture in ("gpt2", "llama")])
@pytest.mark.parametrize("noise", [5e-4, 1e-3, 1e-2])
def test_other_weights_are_not_made_up_for(kind, noise):
    books, model = books_on(make(kind), ("z", "v")), make(kind)
    add_noise(model, noise)
    with pytest.warns(BasisWarning, match="other weights"):
        tlc.attach(model, books)
    assert all(point.offset is None for point in tlc.sites(model).values())


@pytest.mark.parametrize("kind", [f"{host}-gpt2" for host in HOSTS])
def test_other_weights_that_were_processed_too_are_refused(kind):
    books, model = books_on(make(kind)), make(kind)
    add_noise(model, 1e-2)
    if kind.startswith("hooked"):
        model.process_weights_()
    else:
        model.enable_compatibility_mode(disable_warnings=True)
    before = state_of(model)
    with pytest.raises(BasisMismatchError, match=r"weights were processed .*more has moved than a constant.*without weight processing"):
        tlc.attach(model, books)
    assert_same_state(state_of(model), before)


@hooked_only
def test_refactored_attention_is_no_constant():
    books, model = books_on(make("hooked-gpt2")), make("hooked-gpt2")
    model.process_weights_(refactor_factored_attn_matrices=True)
    with pytest.raises(BasisMismatchError, match="more has moved than a constant"):
        tlc.attach(model, books)


@pytest.mark.parametrize("kind", [f"{host}-gpt2" for host in HOSTS])
def test_centred_sites_are_refused_beside_shifted_ones(kind):
    books, model = books_on(make(kind), ("z", "mlp_out")), processed(kind)
    before = state_of(model)
    with pytest.raises(BasisMismatchError, match="center_writing_weights"):
        tlc.attach(model, books)
    assert_same_state(state_of(model), before)


@torch.no_grad()
def add_noise(model, size):
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


# --- half precision ---

HALVES = [torch.bfloat16, torch.float16]


def folded(kind, dtype):
    """The model with nothing but its value biases folded, in half precision; of a Bridge, with all processing, cast afterwards."""
    if not kind.startswith("hooked"):
        return processed(kind).to(dtype)
    model = make(kind).to(dtype)
    off = dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed"), False)
    model.load_and_process_state_dict(model.state_dict(), **off, fold_value_biases=True)
    return model.eval()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("sides", ["model", "codes", "both"])
@pytest.mark.parametrize("kind", [*BIASED, *[f"{host}-llama" for host in HOSTS]])
def test_rounding_to_half_precision_is_no_other_basis(kind, dtype, sides):
    books = books_on(make(kind).to(torch.float32 if sides == "model" else dtype), ("z", "v", "q", "mlp_out", "resid_post"))
    assert_silent(make(kind).to(torch.float32 if sides == "codes" else dtype), books)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("then", ["float32", "half"])
@pytest.mark.parametrize("kind", [f"{host}-{architecture}" for host in HOSTS for architecture in ("gpt2", "neox")])
def test_a_constant_that_half_precision_cannot_prove_is_refused(kind, dtype, then):
    books = books_on(make(kind) if then == "float32" else make(kind).to(dtype), ("z", "v"))
    model = folded(kind, dtype)
    before = state_of(model)
    remedy = "Load the model in float32, attach the codes, then cast" if then == "float32" else "save them again"
    with pytest.raises(BasisMismatchError, match=rf"too coarse to prove.*{remedy}.*float32 proves it"):
        tlc.attach(model, books)
    assert_same_state(state_of(model), before)


@pytest.mark.parametrize("dtype", HALVES)
def test_attaching_in_float32_and_casting_is_the_way_round(dtype):
    plain, model = both()
    model.to(dtype)
    again = Codebooks.of(model)
    assert again.basis.processing[str(dtype).removeprefix("torch.")]
    plain = make(FIRST).to(dtype)
    assert_silent(plain, copy.deepcopy(again))
    assert (run(plain)[0].float() - run(model)[0].float()).abs().mean() < 0.5


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", [f"{host}-{architecture}" for host in HOSTS for architecture in ("gpt2", "llama")])
def test_other_weights_in_half_precision_only_warn(kind, dtype):
    """A llama comes without value biases: those that training gives it are no sign of processing."""
    books, model = books_on(make(kind).to(dtype), ("z", "v")), make(kind)
    add_noise(model, 2e-2)
    with pytest.warns(BasisWarning, match="other weights"):
        tlc.attach(model.to(dtype), books)
    assert all(point.offset is None for point in tlc.sites(model).values())


# --- saving ---


@pytest.mark.parametrize("kind", BIASED)
def test_saved_codes_belong_to_the_basis_that_they_live_in(kind, tmp_path):
    plain, model = both(kind, ("z", "v"))
    Codebooks.of(model).save_pretrained(tmp_path / "codes")
    books = Codebooks.from_pretrained(tmp_path / "codes")
    fresh = make(kind)
    assert_silent(fresh, copy.deepcopy(books))
    assert torch.equal(run(fresh)[0], run(plain)[0])
    again = attached(processed(kind), books)
    assert torch.equal(run(again)[0], run(model)[0])
    for name, point in tlc.sites(again).items():
        assert torch.equal(point.offset, tlc.sites(model)[name].offset)


@pytest.mark.parametrize("direction", ["processed since", "trained on processed"])
@hooked_only
def test_a_saved_model_comes_back_with_its_offsets(direction, tmp_path):
    first, second = make("hooked-gpt2"), processed("hooked-gpt2")
    if direction == "trained on processed":
        first, second = second, first
    model = attached(second, books_on(first, ("z", "v", "q")))
    tlc.save(model, tmp_path / "model")
    with pytest.warns(BasisWarning, match="differ by a constant"):
        again = tlc.load(tmp_path / "model")
    assert_same(run(again), run(model), list(tlc.sites(model)), atol=0)
    assert list(again.state_dict()) == list(model.state_dict())


def test_the_basis_is_the_mean_with_the_offset_and_the_same_spread():
    plain, model = both()
    seen, basis, then = fingerprint(model), Codebooks.of(model).basis, Codebooks.of(plain).basis
    for name, point in tlc.sites(model).items():
        assert torch.equal(basis.means[name], seen.means[name] + point.offset.flatten())
        assert torch.equal(basis.spreads[name], seen.spreads[name])
        torch.testing.assert_close(basis.means[name], then.means[name], rtol=1e-5, atol=1e-6)


# --- what happens at the site ---


@pytest.mark.parametrize("kind", [f"{host}-neox" for host in HOSTS])
def test_hook_x_is_in_the_basis_of_the_codes_and_the_old_name_in_that_of_the_model(kind):
    plain, model = both(kind)
    (_, want), (_, got) = run(plain), run(model)
    for name, point in tlc.sites(model).items():
        torch.testing.assert_close(got[f"{name}.hook_x"], want[f"{name}.hook_x"], rtol=0, atol=1e-5)
        shape = got[f"{name}.hook_x"].shape
        torch.testing.assert_close(got[name].reshape(shape) + point.offset, want[name].reshape(shape), rtol=0, atol=1e-5)


HOOKS = {
    "force": lambda other: force_code("L1.z.2:5", pos=[1, 3]),
    "ban": lambda other: ban_code("L0.z.1:4"),
    "ban without refill": lambda other: ban_code("L0.z.1:4", refill=False),
    "empty": lambda other: (f"{Z}.hook_codes", lambda ids, hook: ids.fill_(-1)),
    "patch": lambda other: patch_codes(other, "L1.z.3"),
}


@pytest.mark.parametrize("name", HOOKS)
@pytest.mark.parametrize("kind", [f"{host}-gpt2" for host in HOSTS])
def test_interventions_do_what_they_did(kind, name):
    plain, model = both(kind)
    with torch.no_grad():
        other = plain.run_with_cache(TOKENS.flip(1))[1]
    hook = HOOKS[name](other)
    want, got = run(plain, hook), run(model, hook)
    assert_same(got, want, list(tlc.sites(plain)))
    assert not torch.allclose(want[0], run(plain)[0], atol=1e-3)


def test_generation_with_and_without_a_cache():
    plain, model = both()
    settings = {"max_new_tokens": 6, "do_sample": False, "stop_at_eos": False, "verbose": False, "return_type": "tokens"}
    for cached in (True, False):
        with torch.no_grad():
            tokens = [each.generate(TOKENS[:, :4], use_past_kv_cache=cached, **settings).tolist() for each in (plain, model)]
        assert tokens[0] == tokens[1]


def test_counts_terms_and_gradients_of_the_codes():
    plain, model = both()
    figures = []
    for each in (plain, model):
        with count_usage(each) as usage:
            each.train()(TOKENS, return_type="loss").backward()
        book = tlc.sites(each)[Z].codebook
        figures.append((usage[Z].counts, usage[Z].unexplained, *book.terms[:2], book.codes.grad))
    assert torch.equal(figures[0][0], figures[1][0])
    for want, got in zip(figures[0][1:], figures[1][1:], strict=True):
        torch.testing.assert_close(got.float(), want.float(), rtol=1e-4, atol=1e-5)
    assert figures[0][-1].abs().sum() > 0


# --- life of the offset ---


@pytest.mark.parametrize("kind", [f"{host}-gpt2" for host in HOSTS])
def test_bypassed_and_detached_it_is_the_processed_model(kind):
    model = processed(kind)
    before = state_of(model)
    attached(model, books_on(make(kind), ("z", "v")))
    with tlc.bypassed(model), torch.no_grad():
        assert torch.equal(model(TOKENS), before["logits"])
    tlc.detach(model)
    assert_same_state(state_of(model), before)


@pytest.mark.parametrize("kind", [f"{host}-gpt2" for host in HOSTS])
def test_copies_and_refresh_keep_it(kind):
    _, model = both(kind)
    want = run(model)[0]
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin)[0], want)
    assert tlc.sites(twin)[Z].offset is not tlc.sites(model)[Z].offset
    tlc.refresh(model)
    assert torch.equal(run(model)[0], want)
    with torch.no_grad():
        tlc.sites(twin)[Z].offset.zero_()
    assert not torch.equal(run(twin)[0], want)
    assert torch.equal(run(model)[0], want)


@hooked_only
def test_a_pickle_keeps_it():
    _, model = both("hooked-gpt2")
    again = pickle.loads(pickle.dumps(model))  # noqa: S301 - written a moment ago
    assert torch.equal(run(again)[0], run(model)[0])


def test_casting_the_model_does_not_round_it():
    _, model = both()
    want, offset = run(model)[0], tlc.sites(model)[Z].offset.clone()
    model.to(torch.bfloat16)
    with torch.no_grad():
        logits, cache = model.run_with_cache(TOKENS)
    assert logits.dtype == cache[Z].dtype == cache[f"{Z}.hook_x"].dtype == torch.bfloat16
    assert (logits.float().log_softmax(-1) - want).abs().mean() < 0.5
    assert tlc.sites(model)[Z].offset.dtype == torch.float32
    assert torch.equal(tlc.sites(model)[Z].offset, offset)
    model.to("meta")  # moves what has a device, and loses no value of the offset
    assert tlc.sites(model)[Z].offset.device.type == "meta"


def test_it_is_in_the_printed_hook_point_and_in_no_state_dict():
    plain, model = both()
    codebook = "holds Codebook(d_in=32, n_codes=12, k=3, n_groups=4, euclidean, nearest, mean)"
    assert f"{codebook}, with an offset of norm " in repr(tlc.sites(model)[Z])
    assert repr(tlc.sites(plain)[Z]).endswith(codebook)
    assert not [name for name in model.state_dict() if "offset" in name]


def test_under_inference_mode_and_autograd_afterwards():
    books, model = books_on(make(FIRST)), processed(FIRST)
    with torch.inference_mode():
        attached(model, books)
        model(TOKENS)
    model(TOKENS, return_type="loss").backward()
    assert tlc.sites(model)[Z].codebook.codes.grad.abs().sum() > 0


def test_a_compiled_hook_point_gives_what_eager_gives():
    from jaxtyping import config

    config.update("jaxtyping_disable", True)
    torch._dynamo.reset()
    try:
        _, model = both()
        point, x = tlc.sites(model)[Z], torch.randn(2, 7, 4, 8)
        with torch.no_grad():
            torch.testing.assert_close(torch.compile(point, backend="aot_eager", fullgraph=True)(x), point(x), rtol=0, atol=1e-6)
    finally:
        torch._dynamo.reset()
        config.update("jaxtyping_disable", False)


def test_an_activation_that_does_not_fit_is_still_refused():
    _, model = both()
    with pytest.raises(ShapeError, match="does not fit the codebook"):
        tlc.sites(model)[Z](torch.zeros(2, 7, 31))


def test_detached_codes_need_their_basis_to_attach_again(tmp_path):
    plain, model = both()
    kept = Codebooks.of(model)
    want = run(model)[0]
    books = tlc.detach(model)
    before = state_of(model)
    for target in (model, make(FIRST)):
        with pytest.raises(BasisMismatchError, match=r"detached from a model with folded value biases.*Codebooks\.of\(model\)"):
            tlc.attach(target, books)
    assert_same_state(state_of(model), before)
    with pytest.warns(BasisWarning, match="differ by a constant"):
        tlc.attach(model, kept)
    assert torch.equal(run(model)[0], want)
    tlc.detach(model)
    fresh = make(FIRST)
    assert_silent(fresh, kept)
    assert torch.equal(run(fresh)[0], run(plain)[0])
    assert_silent(make(FIRST), dict(tlc.detach(fresh)))  # no offset held them there


def test_kmeans_starts_in_the_basis_of_the_codes():
    plain, held = both()
    rows = torch.arange(3, 51).reshape(4, 12)
    for model in (plain, held):
        tlc.initialise_codes_(model, rows, n_iterations=2, progress=False)
    there, here = (tlc.sites(model)[Z].codebook.codes for model in (plain, held))
    torch.testing.assert_close(here, there, rtol=0, atol=1e-4)


def test_codes_held_by_an_offset_are_not_exported(tmp_path):
    processed_model = processed(FIRST)
    books = books_on(processed_model)
    model = attached(make(FIRST), books)
    with pytest.raises(CheckpointError, match=r"hook_z' were trained on weights processed otherwise .* Attach them to the model"):
        tlc.export_hf(model, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
