"""A codebook belongs to the basis that it was trained in: models that were processed since are refused, by name of what was done.

What folded value biases do to z and v can be undone; that is in test_basis_offset.py.
"""

import copy
import warnings

import pytest
import torch

import tl_codebook as tlc
from tests.hosts.state import TOKENS, assert_same_state, state_of
from tests.tiny import HOSTS, make_hf, make_host, make_native_bridge, make_tokenizer
from tl_codebook import Codebooks
from tl_codebook.basis import fingerprint
from tl_codebook.convert.huggingface import load_hf
from tl_codebook.errors import BasisMismatchError, BasisWarning, CheckpointError

SITES = ["z", "mlp_out", "resid_post"]
hooked_only = pytest.mark.skipif("hooked" not in HOSTS, reason="TransformerLens 4 has no HookedTransformer")


def books_of(kind, sites=SITES):
    model = make_host(kind)
    tlc.attach(model, sites, n_codes=8)
    return Codebooks.of(model)


def processed(architecture, *options):
    """A HookedTransformer with weight processing: all that `from_pretrained` does, or the options named."""
    model = make_host(f"hooked-{architecture}")
    if options:
        off = dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), False)
        model.load_and_process_state_dict(model.state_dict(), **off | dict.fromkeys(options, True))
    else:
        model.process_weights_()
    return model.eval()


def assert_passes(model, books):
    with warnings.catch_warnings():
        warnings.simplefilter("error", BasisWarning)
        tlc.attach(model, books)


def assert_refused(model, books, match):
    before = state_of(model)
    with pytest.raises(BasisMismatchError, match=match) as raised:
        tlc.attach(model, books)
    assert "without weight processing" in str(raised.value)
    assert_same_state(state_of(model), before)


@pytest.mark.parametrize("kind", [f"{host}-{architecture}" for host in HOSTS for architecture in ("gpt2", "neox", "llama")] + ["native"])
def test_the_same_model_passes(kind):
    assert_passes(make_host(kind), books_of(kind))


@hooked_only
@pytest.mark.parametrize("kind", [f"{host}-gpt2" for host in HOSTS])
@pytest.mark.parametrize("site", ["attn_out", "mlp_out", "resid_pre", "resid_mid", "resid_post", "resid_delta"])
def test_a_hooked_transformer_with_centred_weights_is_refused(kind, site):
    assert_refused(processed("gpt2"), books_of(kind, [site]), "center_writing_weights")


@hooked_only
def test_centring_alone_is_refused():
    assert_refused(processed("gpt2", "center_writing_weights"), books_of("hooked-gpt2", ["mlp_out"]), "center_writing_weights")


@hooked_only
def test_folding_layer_norms_moves_nothing_outside_attention_and_passes():
    model = make_host("hooked-gpt2")
    model.process_weights_(center_writing_weights=False, center_unembed=False)
    assert model.cfg.normalization_type == "LNPre"
    assert_passes(model, books_of("hooked-gpt2", ["mlp_out", "resid_post"]))


@hooked_only
def test_codes_of_a_processed_model_are_refused_by_the_plain_one():
    model = processed("gpt2")
    tlc.attach(model, ["mlp_out"], n_codes=8)
    books = Codebooks.of(model)
    assert_passes(processed("gpt2"), books)
    with pytest.raises(BasisMismatchError, match="lacks centred writing weights"):
        tlc.attach(make_host("hooked-gpt2"), books)


@hooked_only
def test_rms_norm_centres_nothing_so_a_processed_llama_passes():
    model = processed("llama")
    assert model.cfg.normalization_type == "RMSPre"
    assert_passes(model, books_of("hooked-llama"))


@pytest.mark.parametrize("processing", [True, False], ids=["processed", "unprocessed"])
def test_a_bridge_in_compatibility_mode(processing):
    """Trap 6: the mode processes the weights, unless it is told not to."""
    bridge = make_host("bridge-gpt2")
    bridge.enable_compatibility_mode(**({} if processing else {"no_processing": True}), disable_warnings=True)
    books = books_of("bridge-gpt2", ["mlp_out"])
    if processing:
        with pytest.raises(BasisMismatchError, match=r"center_writing_weights.*enable_compatibility_mode"):
            tlc.attach(bridge, books)
    else:
        assert_passes(bridge, books)


def test_a_processed_bridge_is_not_saved_but_its_codes_are(tmp_path):
    bridge = make_host("bridge-gpt2")
    bridge.enable_compatibility_mode(disable_warnings=True)
    tlc.attach(bridge, "mlp_out", n_codes=8)
    with pytest.raises(CheckpointError, match=r"processed \(enable_compatibility_mode\).*Codebooks\.of\(model\)\.save_pretrained"):
        tlc.save(bridge, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    Codebooks.of(bridge).save_pretrained(tmp_path / "codes")
    with pytest.raises(BasisMismatchError, match="lacks centred writing weights"):
        tlc.attach(make_host("bridge-gpt2"), Codebooks.from_pretrained(tmp_path / "codes"))


def test_compatibility_mode_after_attaching_is_caught():
    bridge = make_host("bridge-gpt2")
    tlc.attach(bridge, "mlp_out", n_codes=8)
    books = Codebooks.of(bridge)
    bridge.enable_compatibility_mode(disable_warnings=True)
    tlc.detach(bridge)
    with pytest.raises(BasisMismatchError, match="center_writing_weights"):
        tlc.attach(bridge, books)


@pytest.mark.parametrize("kind", [f"{host}-gpt2" for host in HOSTS])
def test_a_fine_tuned_base_only_warns(kind):
    books, model = books_of(kind), make_host(kind)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.02)
    with pytest.warns(BasisWarning, match=r"differs by .*% from that of the model the codes were trained on: other weights"):
        tlc.attach(model, books)
    assert list(tlc.sites(model)) == list(books)


@pytest.mark.parametrize("kind", [f"{host}-gpt2" for host in HOSTS])
def test_another_tokenizer_is_refused(kind, tmp_path):
    books, tokenizer = books_of(kind), make_tokenizer()
    tokenizer.add_tokens(["w61"])
    tokenizer.save_pretrained(tmp_path)
    model = load_hf(make_hf("gpt2", vocab_size=62), str(tmp_path), host=kind.partition("-")[0])
    before = state_of(model)
    with pytest.raises(BasisMismatchError, match="another tokenizer"):
        tlc.attach(model, books)
    assert_same_state(state_of(model), before)


def test_a_smaller_vocabulary_is_refused():
    books = books_of("bridge-gpt2")
    with pytest.raises(BasisMismatchError, match="another tokenizer"):
        tlc.attach(load_hf(make_hf("gpt2", vocab_size=50)), books)


def test_another_width_is_refused():
    with pytest.raises(BasisMismatchError, match="32 values a position, this model has 64"):
        tlc.attach(load_hf(make_hf("gpt2", n_embd=64), make_tokenizer()), books_of("bridge-gpt2", ["mlp_out"]))


def test_a_model_with_fewer_layers_is_refused():
    books = books_of("bridge-gpt2", ["mlp_out"])
    model = load_hf(make_hf("gpt2", n_layer=1), make_tokenizer(), host="bridge")
    with pytest.raises(LookupError, match="Layers go from 0 to 0"):
        tlc.attach(model, books)


def test_codes_without_a_basis_attach_anywhere():
    books = Codebooks(dict(books_of("bridge-gpt2", ["mlp_out"])))
    assert books.basis is None
    assert_passes(make_native_bridge(), books)


@pytest.mark.parametrize("kind", [f"{host}-neox" for host in HOSTS])
def test_a_fingerprint_is_mean_and_spread_of_the_raw_activation(kind):
    """Codebooks are bypassed, user hooks and modes are left alone; both are over rows and positions."""
    model = make_host(kind)
    tlc.attach(model, SITES, n_codes=8)
    books, before = Codebooks.of(model), state_of(model)
    basis = fingerprint(model, tokens=TOKENS)
    assert_same_state(state_of(model), before)
    with tlc.bypassed(model), torch.no_grad():
        cache = model.run_with_cache(TOKENS)[1]
    assert list(basis.means) == list(basis.spreads) == list(tlc.sites(model))
    for name, mean in basis.means.items():
        rows = cache[name].reshape(TOKENS.numel(), -1).double()
        torch.testing.assert_close(mean, rows.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(basis.spreads[name], (rows - rows.mean(0)).square().mean(0).sqrt(), rtol=1e-5, atol=1e-6)
    assert books.basis.vocabulary == basis.vocabulary
    again = copy.deepcopy(basis)
    again.check(model, list(basis.means))
