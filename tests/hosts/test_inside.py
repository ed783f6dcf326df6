"""Codebooks inside a plain Hugging Face model: what the host computes, every site, generation, removal, refusals."""

import copy
import subprocess
import sys
import warnings

import pytest
import torch

import tl_codebook as tlc
from tests.tiny import HOSTS, N_LAYERS, VOCABULARY, make_hf, make_host
from tl_codebook import Codebook, CodebookConfig
from tl_codebook.checkpoint import Codebooks
from tl_codebook.convert.export import export_hf
from tl_codebook.convert.inside import attach_hf
from tl_codebook.errors import AttachError, BasisMismatchError, BasisWarning, CheckpointError, ConfigError, ShapeError, UnknownHookError

REACHABLE = ("z", "q", "k", "v", "attn_out", "mlp_out", "post", "resid_pre", "resid_post", "resid_delta")
TOKENS = (torch.arange(2 * 20) * 17 + 5).remainder(VOCABULARY).reshape(2, 20)  # longer than the local window of GPT-Neo, which is 8
MLP = "blocks.1.hook_mlp_out"
KINDS = [f"{host}-{architecture}" for architecture in ("gpt2", "neox", "neo", "llama") for host in HOSTS]


def with_codes(kind, sites=("z", "mlp_out"), **config):
    model = make_host(kind)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        tlc.attach(model, sites, **{"n_codes": 16, "k": 2} | config)
    return model


def twin(model):
    """Copies of the codebooks of a host, by hook name."""
    return {name: copy.deepcopy(point.codebook) for name, point in tlc.sites(model).items()}


def host_ids(model):
    with torch.no_grad():
        logits, cache = model.run_with_cache(TOKENS)
    return logits, {name: cache[f"{name}.hook_codes"] for name in tlc.sites(model)}


def book(d_in=32, **config):
    return Codebook(d_in, CodebookConfig(**{"n_codes": 8, "k": 2} | config))


@pytest.mark.parametrize("kind", KINDS)
def test_z_and_mlp_out_give_the_logits_and_ids_of_the_host(kind):
    model = with_codes(kind)
    expected, ids = host_ids(model)
    hf_model = make_hf(kind.partition("-")[2])
    with torch.no_grad(), attach_hf(hf_model, twin(model)) as inside:
        logits = hf_model(TOKENS).logits
    assert list(inside.ids) == list(ids)
    for name, chosen in inside.ids.items():
        assert chosen.dtype == torch.int64
        assert torch.equal(chosen, ids[name]), name
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("site", REACHABLE)
def test_each_site_alone_is_the_site_of_the_host(kind, site):
    model = with_codes(kind, site)
    expected, ids = host_ids(model)
    hf_model = make_hf(kind.partition("-")[2])
    with torch.no_grad():
        plain = hf_model(TOKENS).logits
        with attach_hf(hf_model, twin(model)) as inside:
            logits = hf_model(TOKENS).logits
    assert len(inside.ids) == N_LAYERS
    for name, chosen in inside.ids.items():
        assert torch.equal(chosen, ids[name]), name
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert (logits - plain).abs().max() > 0.1  # the codes do something


@pytest.mark.parametrize("kind", KINDS)
def test_all_sites_at_once(kind):
    model = with_codes(kind, REACHABLE)
    expected, ids = host_ids(model)
    hf_model = make_hf(kind.partition("-")[2])
    with torch.no_grad(), attach_hf(hf_model, twin(model)) as inside:
        logits = hf_model(TOKENS).logits
    assert set(inside.ids) == set(ids)
    assert len(ids) == len(REACHABLE) * N_LAYERS
    for name, chosen in inside.ids.items():
        assert torch.equal(chosen, ids[name]), name
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_generation_is_that_of_the_host_with_and_without_a_cache(kind):
    model = with_codes(kind, ("z", "v", "mlp_out", "resid_delta"))
    prompt = TOKENS[:, :5]
    expected = model.generate(prompt, max_new_tokens=12, do_sample=False, stop_at_eos=False, verbose=False)
    hf_model = make_hf(kind.partition("-")[2])
    hf_model.generation_config.eos_token_id = None
    plain = hf_model.generate(prompt, max_new_tokens=12, do_sample=False)
    with attach_hf(hf_model, twin(model)) as inside:
        for use_cache in (True, False):
            assert hf_model.generate(prompt, max_new_tokens=12, do_sample=False, use_cache=use_cache).tolist() == expected.tolist()
            assert inside.ids[MLP].shape == (2, 1 if use_cache else 16, 2)
    assert plain.tolist() != expected.tolist()


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_removing_leaves_the_model_bit_for_bit_as_it_was(architecture):
    hf_model = make_hf(architecture)
    state = {name: value.clone() for name, value in hf_model.state_dict().items()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), list(m._modules)) for m in hf_model.modules()]
    before = hf_model(TOKENS).logits
    books = twin(with_codes(f"bridge-{architecture}", REACHABLE))
    inside = attach_hf(hf_model, books)
    assert not torch.equal(hf_model(TOKENS).logits, before)
    inside.remove()
    inside.remove()
    assert torch.equal(hf_model(TOKENS).logits, before)
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks), list(m._modules)) for m in hf_model.modules()]
    assert list(hf_model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in hf_model.state_dict().items())
    assert {one.label for one in books.values()} == {""}
    with attach_hf(hf_model, books):  # and it takes them again
        assert not torch.equal(hf_model(TOKENS).logits, before)


def test_codebooks_are_part_of_the_model():
    hf_model = make_hf("gpt2")
    books = {MLP: book(), "blocks.0.attn.hook_z": book(n_groups=4)}
    inside = attach_hf(hf_model, books)
    assert "transformer.h.1.codebooks.mlp_out.codes" in dict(hf_model.named_parameters())
    assert torch.equal(hf_model.state_dict()["transformer.h.0.codebooks.z.codes"], books["blocks.0.attn.hook_z"].codes)
    hf_model(TOKENS, labels=TOKENS).loss.backward()
    assert books[MLP].codes.grad.abs().sum() > 0
    assert hf_model.transformer.h[0].attn.c_attn.weight.grad.abs().sum() > 0  # straight through
    hf_model.train()
    assert books[MLP].training
    hf_model.to(torch.bfloat16)
    assert books[MLP].codes.dtype == torch.bfloat16
    assert hf_model(TOKENS).logits.dtype == torch.bfloat16
    assert inside.codebooks == books
    assert inside.ids["blocks.0.attn.hook_z"].shape == (2, 20, 4, 2)
    assert inside.ids[MLP].shape == (2, 20, 2)


def test_saving_the_model_with_its_codebooks_in_loses_nothing_silently(tmp_path):
    from transformers import AutoModelForCausalLM

    hf_model = make_hf("llama")
    plain = hf_model(TOKENS).logits
    inside = attach_hf(hf_model, {MLP: book()})
    hf_model.save_pretrained(tmp_path)
    Codebooks(inside.codebooks).save_pretrained(tmp_path, overwrite=True)
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["unexpected_keys"]) == {"model.layers.1.codebooks.mlp_out.codes"}
    torch.testing.assert_close(again(TOKENS).logits, plain, rtol=0, atol=1e-5)
    with attach_hf(again, tmp_path):
        torch.testing.assert_close(again(TOKENS).logits, hf_model(TOKENS).logits, rtol=0, atol=1e-5)


def test_a_deep_copy_has_codebooks_of_its_own():
    hf_model = make_hf("gpt2")
    attach_hf(hf_model, {MLP: book(), "blocks.0.hook_resid_delta": book()})
    before = hf_model(TOKENS).logits
    other = copy.deepcopy(hf_model)
    assert torch.equal(other(TOKENS).logits, before)
    with torch.no_grad():
        for module in other.transformer.h:
            for one in module.codebooks.values():
                one.codes.zero_()
    assert torch.equal(hf_model(TOKENS).logits, before)
    assert not torch.equal(other(TOKENS).logits, before)


def test_gradient_checkpointing_gives_the_same_gradients():
    def gradients(checkpointing):
        hf_model = make_hf("llama").train()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            books = {name: book() for name in (MLP, "blocks.0.hook_resid_delta", "blocks.1.hook_resid_pre", "blocks.1.hook_resid_post")}
        attach_hf(hf_model, books)
        if checkpointing:
            hf_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        hf_model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        return {name: p.grad for name, p in hf_model.named_parameters()}, {name: b.usage.counts.sum() for name, b in books.items()}

    (plain, counts), (recomputed, again) = gradients(False), gradients(True)
    assert counts == again == dict.fromkeys(counts, 2 * 20 * 2)
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-6)


def refused(error, pattern, hf_model, codes):
    names = [name for name, _ in hf_model.named_modules()] if isinstance(hf_model, torch.nn.Module) else []
    with pytest.raises(error, match=pattern):
        attach_hf(hf_model, codes)
    if names:
        assert [name for name, _ in hf_model.named_modules()] == names


def test_refusals(tmp_path):
    hf_model = make_hf("llama")
    refused(ConfigError, "type 'opt'.*Known: gpt2", make_hf("opt"), {MLP: book()})
    refused(ShapeError, r"blocks.1.hook_mlp_out'.*d_in=31.*32 values", hf_model, {MLP: book(31)})
    refused(ShapeError, r"attn.hook_k'.*d_in=32.*16 values", hf_model, {"blocks.0.attn.hook_k": book()})  # two key-value heads
    refused(ShapeError, r"mlp.hook_post'.*d_in=32.*48 values", hf_model, {"blocks.0.mlp.hook_post": book()})
    refused(ShapeError, r"hook_resid_post'.*d_in=16.*32 values", hf_model, {"blocks.0.hook_resid_post": book(16)})
    refused(ShapeError, r"attn.hook_q'.*d_in=96.*32 values", make_hf("neox"), {"blocks.0.attn.hook_q": book(96)})
    refused(UnknownHookError, "2 layers: 0 to 1", hf_model, {"blocks.2.hook_mlp_out": book()})
    refused(UnknownHookError, "resid_mid.*second norm", hf_model, {"blocks.0.hook_resid_mid": book()})
    refused(UnknownHookError, "blocks.0.mlp.hook_pre.*leave it out", hf_model, {"blocks.0.mlp.hook_pre": book()})
    refused(ConfigError, "at least one Codebook", hf_model, {})
    refused(ConfigError, "CodebookConfig. Give a Codebook", hf_model, {MLP: CodebookConfig(8)})
    refused(CheckpointError, "holds no tl_codebook.json", hf_model, tmp_path)
    one = book()
    refused(AttachError, "Give each hook point its own", hf_model, {MLP: one, "blocks.0.hook_mlp_out": one})
    refused(AttachError, "no module 'model.layers'.*AutoModelForCausalLM", hf_model.model, {MLP: book()})
    with torch.device("meta"):
        nothing = type(hf_model)(hf_model.config)
    refused(AttachError, "'meta'", nothing, {MLP: book()})
    with attach_hf(hf_model, {MLP: book()}):
        refused(AttachError, "holds codebooks already", hf_model, {"blocks.0.hook_mlp_out": book()})


@pytest.mark.parametrize("kind", [f"{host}-gpt2" for host in HOSTS])
def test_transformerlens_hosts_are_sent_to_attach(kind):
    model = make_host(kind)
    refused(AttachError, r"Use tl_codebook.attach", model, {MLP: book()})
    if kind.startswith("bridge"):
        refused(AttachError, "wrapped in a TransformerBridge", model.original_model, {MLP: book()})


def test_codes_of_a_larger_vocabulary_are_refused(tmp_path):
    model = with_codes("bridge-gpt2", "mlp_out")
    Codebooks.of(model).save_pretrained(tmp_path / "codes")
    refused(BasisMismatchError, "more than 40 tokens", make_hf("gpt2", vocab_size=40), tmp_path / "codes")


# --- the basis ---


def basis_of(kind, sites=("z", "mlp_out")):
    return copy.deepcopy(Codebooks.of(with_codes(kind, sites)))


def state(hf_model):
    return [(len(m._forward_hooks), len(m._forward_pre_hooks), list(m._modules), m.training) for m in hf_model.modules()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_the_model_of_the_codes_attaches_without_a_word_and_keeps_its_modes(kind, training):
    hf_model = make_hf(kind.partition("-")[2]).train(training)
    hf_model.get_submodule("lm_head" if hasattr(hf_model, "lm_head") else "embed_out").train(not training)
    before = state(hf_model)
    books = basis_of(kind, (*REACHABLE, "qkv")[: 11 if kind.endswith("neox") else 10])
    with warnings.catch_warnings():
        warnings.simplefilter("error", BasisWarning)
        attach_hf(hf_model, books).remove()
    assert state(hf_model) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_attaches_without_a_word(dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error", BasisWarning)
        attach_hf(make_hf("gpt2").to(dtype), basis_of("bridge-gpt2"))


@pytest.mark.parametrize("architecture", ["gpt2", "neox", "llama"])
def test_other_weights_are_warned_of(architecture):
    hf_model = make_hf(architecture)
    with torch.no_grad():
        for parameter in hf_model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
    with pytest.warns(BasisWarning, match=r"differs by .*other weights"):
        attach_hf(hf_model, basis_of(f"bridge-{architecture}"))


@pytest.mark.parametrize(("site", "match"), [("z", "no room for the offset"), ("mlp_out", "lacks centred writing weights")])
def test_codes_of_processed_weights_are_refused(site, match):
    model, hf_model = make_host("bridge-gpt2"), make_hf("gpt2")
    model.enable_compatibility_mode(disable_warnings=True)
    tlc.attach(model, site, n_codes=8)
    before = state(hf_model)
    refused(BasisMismatchError, match, hf_model, copy.deepcopy(Codebooks.of(model)))
    assert state(hf_model) == before


def test_a_model_of_fewer_positions_is_refused():
    refused(BasisMismatchError, "of 16 positions or more, and this one has 8", make_hf("gpt2", n_positions=8), basis_of("bridge-gpt2"))


def test_a_codebook_at_work_elsewhere_is_refused():
    hf_model, model = make_hf("gpt2"), with_codes("bridge-gpt2")
    books = {name: point.codebook for name, point in tlc.sites(model).items()}
    refused(AttachError, r"at work in another model, at 'blocks.0.attn.hook_z'.*copy.deepcopy", hf_model, books)
    attach_hf(hf_model, copy.deepcopy(books)).remove()
    tlc.detach(model)
    inside = attach_hf(hf_model, books)
    refused(AttachError, "at work in another model", make_hf("gpt2"), books)
    inside.remove()
    attach_hf(make_hf("gpt2"), books)


def test_a_failure_while_the_hooks_are_hung_leaves_nothing(monkeypatch):
    from tl_codebook.convert import inside

    hf_model = make_hf("gpt2")
    before, names = hf_model(TOKENS).logits, [name for name, _ in hf_model.named_modules()]
    hang = inside._hang

    def stop_at_the_second(handle, block, layer, *rest):
        hang(handle, block, layer, *rest)
        if layer == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(inside, "_hang", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        attach_hf(hf_model, {MLP: book(), "blocks.0.hook_mlp_out": book()})
    assert [name for name, _ in hf_model.named_modules()] == names
    assert torch.equal(hf_model(TOKENS).logits, before)


SCRIPT = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from tl_codebook.convert.inside import attach_hf

assert "transformer_lens" not in sys.modules
folder, use_cache = sys.argv[1], sys.argv[2] == "cached"
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
model.generation_config.eos_token_id = None
with attach_hf(model, folder) as inside:
    tokens = torch.tensor([tokenizer.encode("w5 w22 w39 w56 w12", add_special_tokens=False)])
    print(model.generate(tokens, max_new_tokens=10, do_sample=False, use_cache=use_cache)[0].tolist())
"""


@pytest.mark.parametrize(("kind", "cached"), [(f"{HOSTS[0]}-gpt2", "cached"), ("bridge-neox", "uncached"), (f"{HOSTS[0]}-llama", "cached")])
def test_a_fresh_process_generates_what_the_host_does(kind, cached, tmp_path):
    model = with_codes(kind)
    export_hf(model, tmp_path / "model")
    prompt = torch.tensor([[5, 22, 39, 56, 12]])
    expected = model.generate(prompt, max_new_tokens=10, do_sample=False, stop_at_eos=False, verbose=False)
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "model"), cached]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip().splitlines()[-1] == str(expected[0].tolist())


def test_codebooks_given_as_objects_need_no_transformerlens(tmp_path):
    script = (
        "import sys, torch\n"
        "from transformers import GPT2Config, GPT2LMHeadModel\n"
        "from tl_codebook.codebook import Codebook, CodebookConfig\n"
        "from tl_codebook.convert.inside import attach_hf\n"
        "model = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4))\n"
        f"inside = attach_hf(model, {{{MLP!r}: Codebook(32, CodebookConfig(8, 2))}})\n"
        "model(torch.tensor([[1, 2, 3]]))\n"
        f"print(tuple(inside.ids[{MLP!r}].shape), 'transformer_lens' in sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert result.stdout.strip() == "(1, 3, 2) False", result.stderr[-2000:]
