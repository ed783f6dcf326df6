"""load_hf: every site and the logits are Hugging Face's, whatever the configuration; what cannot be represented is refused by name."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import save_file

from tests.tiny import HOSTS, N_CTX, VOCABULARY, make_hf, make_tokenizer, write_hf_folder
from tl_codebook.convert import hooked_config
from tl_codebook.convert.huggingface import NO_PLACE, load_hf
from tl_codebook.convert.layouts import layout_of
from tl_codebook.errors import CheckpointError, ConfigError
from tl_codebook.names import hook_name

CLOSE = 2e-5
TOKENS = torch.stack([(torch.arange(N_CTX) * step + 3) % VOCABULARY for step in (7, 11)])
SMALL = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "hidden_size": 32, "intermediate_size": 48}
SMALL |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": N_CTX}


def rope(kind="default", theta=10000.0, **more):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


YARN = {"factor": 4.0, "original_max_position_embeddings": 12}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 24}
LONG = {"factor": 4.0, "original_max_position_embeddings": 12, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}

CASES = [
    *(("gpt2", {"activation_function": name}) for name in ("relu", "gelu", "silu", "swish", "gelu_fast")),
    *(("gpt2", change) for change in ({}, {"n_inner": None}, {"layer_norm_epsilon": 1e-2}, {"tie_word_embeddings": False})),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}),
    *(("neo", {"window_size": size}) for size in (1, 3, 16, 64)),
    *(("neo", {"intermediate_size": size}) for size in (96, 128)),
    *(("neo", {"attention_types": [[[kind], 2]]}) for kind in ("global", "local")),
    ("neo", {"num_layers": 5, "attention_types": [[["local", "local", "global"], 1], [["local"], 2]]}),
    *(("neo", change) for change in ({"activation_function": "relu"}, {"tie_word_embeddings": False}, {"layer_norm_epsilon": 1e-2})),
    *(("neox", rope(theta=base, partial_rotary_factor=share)) for base, share in ((10.0, 1.0), (500.0, 0.5), (10.0, 0.25), (1e4, 0.3))),
    *(("neox", rope(kind, factor=2.0, partial_rotary_factor=1.0)) for kind in ("linear", "dynamic")),
    *(("neox", {"hidden_act": name}) for name in ("relu", "gelu_new", "gelu_fast")),
    *(("neox", change) for change in ({"use_parallel_residual": False}, {"tie_word_embeddings": True}, {"layer_norm_eps": 1e-2})),
    *(("llama", {"num_key_value_heads": heads}) for heads in (1, 4)),
    *(("llama", rope(theta=100.0)), ("llama", rope("linear", factor=2.0)), ("llama", rope("dynamic", factor=2.0))),
    *(("llama", rope("llama3", **LLAMA3)), ("llama", rope("yarn", **YARN)), ("llama", rope("yarn", **YARN, truncate=False))),
    ("llama", rope("yarn", **YARN, beta_fast=16, beta_slow=2, attention_factor=1.3)),
    *(("llama", change) for change in ({"attention_bias": True}, {"tie_word_embeddings": True}, {"rms_norm_eps": 1e-2}, {"head_dim": 12})),
    ("llama", {"hidden_act": "gelu"}),
    *(("mistral", {"sliding_window": window}) for window in (5, None, 4096)),
    *(("mistral", {"head_dim": 12, "max_position_embeddings": 4000}), ("mistral", rope("yarn", **YARN))),
    *(("qwen2", change) for change in ({}, {"tie_word_embeddings": True}, rope(theta=777.5))),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
]
ONE_HOST = [
    ("hooked", "gpt2", {"scale_attn_weights": False}),
    ("hooked", "neox", {"attention_bias": False}),
    ("bridge", "gpt2", {"activation_function": "mish"}),
    ("bridge", "llama", {"mlp_bias": True}),
    ("bridge", "llama", rope("longrope", **LONG)),
    ("bridge", "mistral", {"sliding_window": 5} | rope("linear", factor=2.0)),
]


def make(architecture, **changes):
    """tests.tiny.make_hf, and what it does not take."""
    if architecture == "neo":
        sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": N_CTX, "vocab_size": VOCABULARY}
        return randomised(hf.GPTNeoConfig(**sizes | {"window_size": 8, "attention_types": [[["global", "local"], 1]]} | changes))
    if architecture in ("mistral", "qwen2"):
        return randomised({"mistral": hf.MistralConfig, "qwen2": hf.Qwen2Config}[architecture](**SMALL | changes))
    return make_hf(architecture, **changes)


def randomised(config):
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.15)
    return model.eval()


def hf_activations(model, tokens):
    """Logits, and the activation at every site under its TransformerLens name, read off the modules of Hugging Face."""
    config, layout, found, handles = model.config, layout_of(model.config.model_type), {}, []
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def first(value):
        return value[0] if isinstance(value, tuple) else value

    def keep(name, module, *, inputs=False):
        def hook(_module, args, kwargs, output):
            found[name] = (args[0] if args else kwargs["hidden_states"]) if inputs else first(output)

        handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def keep_fused(layer, module):
        def hook(_module, _args, output):
            order = (3, -1) if layout.fused.startswith("qkv") else (-1, 3)
            parts = output.reshape(*output.shape[:-1], *order, d_head)
            for letter, part in zip("qkv", parts.unbind(-3 if order[0] == 3 else -2), strict=True):
                found[hook_name(layer, letter)] = part

        handles.append(module.register_forward_hook(hook))

    for layer in range(config.num_hidden_layers):
        block = model.get_submodule(layout.block(layer))
        attention, mlp = block.get_submodule(layout.attn), block.get_submodule(layout.mlp)
        keep(hook_name(layer, "resid_pre"), block, inputs=True)
        keep(hook_name(layer, "resid_post"), block)
        keep(hook_name(layer, "attn_out"), attention)
        keep(hook_name(layer, "mlp_out"), mlp)
        keep(hook_name(layer, "z"), attention.get_submodule(layout.attn_out), inputs=True)
        keep(hook_name(layer, "post"), mlp.get_submodule(layout.mlp_out), inputs=True)
        if layout.fused:
            keep_fused(layer, attention.get_submodule(layout.qkv[0]))
        else:
            for letter, path in zip("qkv", layout.qkv, strict=True):
                keep(hook_name(layer, letter), attention.get_submodule(path))
    with torch.no_grad():
        logits = model(tokens).logits
    for handle in handles:
        handle.remove()
    return logits, found


def assert_equals_hugging_face(host, model, tokens=TOKENS):
    expected, activations = hf_activations(model, tokens)
    with torch.no_grad():
        logits, cache = host.run_with_cache(tokens)
    assert float((logits - expected).abs().max()) < CLOSE
    assert len(activations) == 9 * model.config.num_hidden_layers
    for name, theirs in activations.items():
        assert float((cache[name].reshape(theirs.shape) - theirs).abs().max()) < CLOSE, name


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(("architecture", "changes"), CASES, ids=lambda value: value if isinstance(value, str) else repr(value)[:60])
def test_every_site_equals_hugging_face(architecture, changes, host):
    model = make(architecture, **changes)
    assert_equals_hugging_face(load_hf(model, host=host), model)


@pytest.mark.parametrize(("host", "architecture", "changes"), [case for case in ONE_HOST if case[0] in HOSTS], ids=repr)
def test_what_only_one_host_represents_equals_hugging_face(host, architecture, changes):
    model = make(architecture, **changes)
    assert_equals_hugging_face(load_hf(model, host=host), model)


REFUSED = [
    ("bridge", "gpt2", {"scale_attn_weights": False}, "scale_attn_weights=False"),
    ("bridge", "neox", {"attention_bias": False}, "attention_bias=False"),
    ("bridge", "gpt2", {"add_cross_attention": True}, "add_cross_attention=True"),
    ("hooked", "gpt2", {"add_cross_attention": True}, "add_cross_attention=True"),
    ("hooked", "gpt2", {"activation_function": "mish"}, "activation_function='mish'"),
    ("hooked", "llama", {"mlp_bias": True}, "mlp_bias=True.*gate_proj.bias"),
    ("hooked", "llama", rope("longrope", **LONG), "rope_type='longrope'"),
    ("hooked", "mistral", {"sliding_window": 5} | rope("linear", factor=2.0), "rope_parameters=.*sliding_window"),
]


@pytest.mark.parametrize(("host", "architecture", "changes", "field"), [case for case in REFUSED if case[0] in HOSTS], ids=repr)
def test_what_a_host_cannot_represent_is_refused_by_name(host, architecture, changes, field):
    with pytest.raises(CheckpointError, match=field) as caught:
        load_hf(make(architecture, **changes), host=host)
    other = "bridge" if host == "hooked" else "hooked"
    works = other in HOSTS and "add_cross_attention" not in changes
    assert (f"Use host='{other}'." if works else "No host of this TransformerLens does") in str(caught.value)


def test_the_table_of_refusals_is_covered():
    tested = {(host, field) for host, _, changes, _ in REFUSED for field in changes}
    assert tested >= {(host, field) for host, table in NO_PLACE.items() for fields in table.values() for field in fields}


@pytest.mark.skipif("hooked" not in HOSTS, reason="TransformerLens 4 has no HookedTransformer")
class TestWhatTheProbeSees:
    @pytest.mark.parametrize(
        ("architecture", "changes", "wrong"),
        [
            ("neo", {"window_size": 16}, {"window_size": 17}),
            ("neo", {"window_size": 40}, {"window_size": 256}),
            ("mistral", {"sliding_window": 80, "max_position_embeddings": 100}, {"window_size": 81}),
            ("neox", rope(partial_rotary_factor=1.0), {"rotary_base": 10100}),
            ("neox", {}, {"act_fn": "gelu_new"}),
            ("llama", {}, {"eps": 1e-4}),
        ],
    )
    def test_a_wrong_field_is_refused(self, monkeypatch, architecture, changes, wrong):
        build = hooked_config.hooked_from_config

        def build_wrongly(cfg, tokenizer):
            for field, value in wrong.items():
                setattr(cfg, field, value)
            return build(cfg, tokenizer)

        model = make(architecture, **changes)
        load_hf(model, host="hooked")
        monkeypatch.setattr(hooked_config, "hooked_from_config", build_wrongly)
        with pytest.raises(CheckpointError, match=r"logits differ|other angles"):
            load_hf(model, host="hooked")

    def test_parameters_that_are_zero_are_not_lost(self):
        fresh = hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, mlp_bias=True))
        with pytest.raises(CheckpointError, match="mlp_bias=True"):
            load_hf(fresh, host="hooked")

    @pytest.mark.parametrize("changes", [{}, {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}}])
    def test_far_positions_are_exact(self, changes):
        model = make("llama", max_position_embeddings=1024, **changes)
        tokens = torch.randint(VOCABULARY, (1, 1024), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert float((load_hf(model, host="hooked")(tokens) - model(tokens).logits).abs().max()) < CLOSE

    def test_the_context_is_the_whole_one_and_ends_there(self):
        model = load_hf(make("mistral", max_position_embeddings=4000), host="hooked")
        assert model.cfg.n_ctx == 4000
        with pytest.raises(RuntimeError):
            model(torch.zeros(1, 4001, dtype=torch.long))

    def test_a_temporary_folder_that_transformer_lens_would_misread_is_refused(self, monkeypatch, tmp_path):
        (tmp_path / "my-llama").mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "my-llama"))
        with pytest.raises(ConfigError, match="TMPDIR"):
            load_hf(make_hf("gpt2"), host="hooked")


OLD = {"vocab_size": 61, "bos_token_id": 60, "eos_token_id": 60, "initializer_range": 0.02, "torch_dtype": "float32"}
OLD |= {"transformers_version": "4.34.1", "use_cache": True}
OLD_GPT2 = OLD | {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_ctx": 32, "n_embd": 32, "n_head": 4, "n_inner": None}
OLD_GPT2 |= {"n_layer": 2, "n_positions": 32, "activation_function": "gelu_new", "scale_attn_weights": True, "attn_pdrop": 0.0}
OLD_NEO = OLD | {"model_type": "gpt_neo", "architectures": ["GPTNeoForCausalLM"], "attention_layers": ["global", "local"]}
OLD_NEO |= {"attention_types": [[["global", "local"], 1]], "hidden_size": 32, "intermediate_size": None, "num_heads": 4, "num_layers": 2}
OLD_NEO |= {"max_position_embeddings": 32, "window_size": 5, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-05}
OLD_NEOX = OLD | {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "hidden_act": "gelu", "hidden_size": 32}
OLD_NEOX |= {"intermediate_size": 128, "max_position_embeddings": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
OLD_NEOX |= {"rope_scaling": None, "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False, "layer_norm_eps": 1e-05}
OLD_NEOX |= {"use_parallel_residual": True}
OLD_CONFIGS = {
    "gpt2": OLD_GPT2,
    "gpt2_inner48": OLD_GPT2 | {"n_inner": 48},
    "gpt2_invlayer": OLD_GPT2 | {"scale_attn_by_inverse_layer_idx": True},
    "gpt2_noctx": {key: value for key, value in OLD_GPT2.items() if key != "n_ctx"},
    "gpt2_other_ctx": OLD_GPT2 | {"n_ctx": 16},
    "neo": OLD_NEO,
    "neo_inter128": OLD_NEO | {"intermediate_size": 128},
    "neo_inter96": OLD_NEO | {"intermediate_size": 96},
    "neox": OLD_NEOX,
    "neox_base10": OLD_NEOX | {"rotary_emb_base": 10},
    "neox_pct100": OLD_NEOX | {"rotary_pct": 1.0},
    "neox_relu": OLD_NEOX | {"hidden_act": "relu"},
    "neox_seq": OLD_NEOX | {"use_parallel_residual": False},
}


def write_old_folder(folder: Path, config: dict) -> Path:
    """Write a folder as transformers 4.34 did: old keys, and the masks of attention that GPT-2 saved."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    model = randomised(hf.AutoConfig.from_pretrained(folder))
    tied = model.config.tie_word_embeddings
    tensors = {name: value.clone() for name, value in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    if config["model_type"] == "gpt2":
        tensors |= {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 32, 32).tril().bool() for layer in range(2)}
    if config["model_type"] == "gpt_neox":
        tensors = {name.replace("lm_head", "embed_out"): value for name, value in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", OLD_CONFIGS)
def test_old_folders_load(name, host, tmp_path):
    folder = write_old_folder(tmp_path / f"my-llama-{name}", OLD_CONFIGS[name])
    model = load_hf(folder, host=host)
    assert_equals_hugging_face(model, hf.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager"), TOKENS[:, :32])
    assert model.cfg.n_ctx == 32


def outside(model):
    """Everything of a Hugging Face object that load_hf could disturb."""
    return {
        "config": copy.deepcopy(model.config.to_dict()),
        "attention": model.config._attn_implementation,
        "architectures": copy.copy(model.config.architectures),
        "weights": {name: (id(value), value.data_ptr(), value.clone()) for name, value in model.named_parameters()},
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad": [p.grad for p in model.parameters()],
        "modes": [(name, id(module), type(module), module.training) for name, module in model.named_modules()],
        "hooks": [(name, list(module._forward_hooks.values())) for name, module in model.named_modules()],
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
    }


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("architecture", ["gpt2", "neo", "neox", "llama"])
def test_the_object_is_left_as_it_was(architecture, host):
    model = make(architecture)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    model.set_attn_implementation("sdpa")
    model.train()
    calls = []
    model.register_forward_hook(lambda *_: calls.append("model"))
    model.get_input_embeddings().weight.requires_grad_(False)
    before, generator = outside(model), torch.get_rng_state()
    result = load_hf(model, host=host)
    assert torch.equal(torch.get_rng_state(), generator)
    weights, kept = (after := outside(model)).pop("weights"), before.pop("weights")
    assert after == before
    assert all(weights[name][:2] == kept[name][:2] and torch.equal(weights[name][2], kept[name][2]) for name in kept)
    assert calls == []
    assert not result.training
    theirs = {p.data_ptr() for p in model.parameters()}
    assert not theirs & {p.data_ptr() for p in result.parameters()}
    assert_equals_hugging_face(result, copy.deepcopy(model).eval())
    assert calls == ["model"]  # of the copy just made


def test_an_object_that_cannot_be_copied_is_refused():
    model = make("gpt2")
    model.stream = (line for line in [])
    with pytest.raises(CheckpointError, match=r"cannot be copied.*save_pretrained\(folder\)"):
        load_hf(model)


@pytest.mark.parametrize("host", HOSTS)
def test_lower_precision_loads(host):
    assert next(load_hf(make("llama").to(torch.bfloat16), host=host).parameters()).dtype == torch.bfloat16


ADDED = {
    "gpt2": {"b_U"},
    "neo": {"b_U", "b_Q", "b_K", "b_V"},
    "neox": {"b_U"},
    "llama": {"b_U", "b_Q", "_b_K", "_b_V", "b_O", "b_in", "b_out"},
    "qwen2": {"b_U", "b_O", "b_in", "b_out"},
}


@pytest.mark.skipif("hooked" not in HOSTS, reason="TransformerLens 4 has no HookedTransformer")
@pytest.mark.parametrize("architecture", ADDED)
@pytest.mark.parametrize("fresh", [False, True])
def test_what_hugging_face_would_not_train_is_frozen(architecture, fresh):
    hf_model = make(architecture, tie_word_embeddings=False)
    if fresh:  # biases that are zero are none the less trained
        for name, parameter in hf_model.named_parameters():
            if name.endswith("bias"):
                parameter.data.zero_()
    model = load_hf(hf_model, host="hooked")
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    assert {name.rsplit(".", 1)[-1] for name in frozen} == ADDED[architecture]
    assert not any(bool(p.any()) for p in frozen.values())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(p.numel() for p in hf_model.parameters())
    model(TOKENS, return_type="loss").backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not any(bool(p.any()) for p in frozen.values())


@pytest.mark.parametrize("architecture", ["gpt2", "neo", "neox", "llama"])
def test_a_bridge_gets_no_head_bias_to_train(architecture):
    model = load_hf(make(architecture), host="bridge")
    heads = {name: p for name, p in model.named_parameters() if name.startswith("lm_head") and name.endswith("bias")}
    assert not any(p.requires_grad or bool(p.any()) for p in heads.values())
    assert all(p.requires_grad for name, p in model.named_parameters() if name not in heads)


@pytest.mark.parametrize("host", HOSTS)
class TestTokenizers:
    def test_one_in_memory_stays_as_it_is(self, host):
        tokenizer = make_tokenizer()
        before = (tokenizer.name_or_path, len(tokenizer), dict(tokenizer.init_kwargs))
        model = load_hf(make("gpt2"), tokenizer, host)
        assert (tokenizer.name_or_path, len(tokenizer), dict(tokenizer.init_kwargs)) == before
        assert model.tokenizer is not tokenizer
        assert model.to_tokens("w5 w6", prepend_bos=False).tolist() == [[5, 6]]

    def test_the_one_beside_the_model_is_found(self, host, tmp_path):
        model = load_hf(write_hf_folder(tmp_path / "llama-run", "gpt2"), host=host)
        assert model.to_tokens("w5 w6", prepend_bos=False).tolist() == [[5, 6]]

    @pytest.mark.parametrize("architecture", ["gpt2", "neox", "neo", "llama"])
    def test_none_is_made_up(self, host, architecture, tmp_path):
        make(architecture).save_pretrained(tmp_path)
        assert load_hf(tmp_path, host=host).tokenizer is None
        assert load_hf(make(architecture), host=host).tokenizer is None

    def test_one_with_more_tokens_than_the_model_gets_a_warning(self, host):
        tokenizer = make_tokenizer()
        tokenizer.add_tokens(["<extra>"])
        with pytest.warns(UserWarning, match=r"token 61 \('<extra>'\).*only to 60.*resize_token_embeddings\(62\)"):
            assert len(load_hf(make("gpt2"), tokenizer, host).tokenizer) == 62
