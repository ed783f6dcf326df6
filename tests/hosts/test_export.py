"""The way back to Hugging Face: round trips, after training too, what is refused, and a target that is whole at every moment."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

import tl_codebook as tlc
from tests.hosts.test_inside import MLP, REACHABLE, TOKENS, host_ids, with_codes
from tests.tiny import HOSTS, make_hf, make_host, make_native_bridge, make_tokenizer
from tl_codebook.checkpoint import Codebooks
from tl_codebook.convert import export, proof
from tl_codebook.convert.export import export_hf
from tl_codebook.convert.huggingface import load_hf
from tl_codebook.convert.inside import attach_hf
from tl_codebook.errors import CheckpointError, CheckpointExistsError, ConfigError, UnknownHookError

KINDS = [f"{host}-{architecture}" for architecture in ("gpt2", "neox", "neo", "llama") for host in HOSTS]
HOOKED = [kind for kind in KINDS if kind.startswith("hooked")]
only_hooked = pytest.mark.skipif("hooked" not in HOSTS, reason="TransformerLens 4 has no HookedTransformer")


def reload(folder):
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    return model.eval()


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_same(model, folder, tolerance=1e-4):
    """The folder, loaded by Hugging Face alone, computes what the host does: without codes, and with them."""
    hf_model = reload(folder)
    expected, ids = host_ids(model)
    with torch.no_grad(), tlc.bypassed(model):
        torch.testing.assert_close(hf_model(TOKENS).logits, model(TOKENS), rtol=0, atol=tolerance)
    with torch.no_grad(), attach_hf(hf_model, folder) as inside:
        torch.testing.assert_close(hf_model(TOKENS).logits, expected, rtol=0, atol=tolerance)
    for name, chosen in inside.ids.items():
        assert torch.equal(chosen, ids[name]), name
    return hf_model


def train(model, steps=3, learning_rate=0.05):
    """A few large steps of AdamW on everything that requires a gradient, the codes included."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=learning_rate, fused=False)
    for _ in range(steps):
        logits = model(TOKENS)
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
        optimiser.step()
        optimiser.zero_grad()


def freeze(model, *endings):
    """Freeze what Hugging Face has no place for."""
    frozen = [name for name, p in model.named_parameters() if name.endswith(endings)]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return frozen


@pytest.mark.parametrize("kind", KINDS)
def test_a_round_trip(kind, tmp_path):
    model = with_codes(kind)
    before = {name: value.clone() for name, value in model.named_parameters()}
    usage = {name: point.codebook.usage.counts.clone() for name, point in tlc.sites(model).items()}
    export_hf(model, tmp_path / "model")
    assert {name.partition(".")[0] for name in content(tmp_path / "model")} == {
        "codes", "config", "generation_config", "model", "tl_codebook", "tl_codebook_export", "tokenizer", "tokenizer_config"
    }  # fmt: skip
    assert os.listdir(tmp_path) == ["model"]
    assert_same(model, tmp_path / "model")
    text = (tmp_path / "model" / "config.json").read_text() + (tmp_path / "model" / "tokenizer_config.json").read_text()
    assert "/tmp" not in text
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"], config["vocab_size"]) == (1, 2, 0, 61)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert all(torch.equal(point.codebook.usage.counts, usage[name]) for name, point in tlc.sites(model).items())
    again = load_hf(tmp_path / "model", host=kind.partition("-")[0])
    tlc.attach(again, Codebooks.from_pretrained(tmp_path / "model"))
    torch.testing.assert_close(again(TOKENS), model(TOKENS), rtol=0, atol=1e-5)
    assert again.tokenizer.get_vocab() == model.tokenizer.get_vocab()


@pytest.mark.parametrize("kind", [f"{host}-{architecture}" for host, architecture in zip(HOSTS, ("neo", "llama"), strict=False)])
def test_a_round_trip_with_every_site(kind, tmp_path):
    model = with_codes(kind, REACHABLE)
    export_hf(model, tmp_path / "model")
    assert_same(model, tmp_path / "model")


def test_paper_codebooks_keep_their_norms(tmp_path):
    model = with_codes(KINDS[0], selection="nearest", input_norm="layer_norm", similarity="inner_product")
    export_hf(model, tmp_path / "model")
    assert_same(model, tmp_path / "model")


@pytest.mark.parametrize("kind", KINDS)
def test_after_training(kind, tmp_path):
    model = with_codes(kind)
    start = model(TOKENS).detach()
    absent = {
        "gpt2": ("unembed.b_U", "lm_head._original_component.bias"),
        "neox": ("unembed.b_U", "lm_head._original_component.bias"),
        "neo": ("unembed.b_U", "lm_head._original_component.bias", "attn.b_Q", "attn.b_K", "attn.b_V"),
        "llama": (
            "unembed.b_U",
            "lm_head._original_component.bias",
            *(f"attn.{b}" for b in ("b_Q", "b_O", "_b_K", "_b_V")),
            "mlp.b_in",
            "mlp.b_out",
        ),
    }
    freeze(model, *absent[kind.partition("-")[2]])
    train(model)
    assert (model(TOKENS) - start).abs().max() > 0.5
    export_hf(model, tmp_path / "model")
    assert_same(model, tmp_path / "model")


@only_hooked
def test_the_embedding_stays_tied_only_while_it_is_the_same(tmp_path):
    model = make_host("hooked-gpt2")
    export_hf(model, tmp_path / "tied")
    hf_model = reload(tmp_path / "tied")
    assert hf_model.config.tie_word_embeddings
    assert hf_model.lm_head.weight is hf_model.transformer.wte.weight
    with torch.no_grad():
        model.unembed.W_U[0, 0] += 1
    export_hf(model, tmp_path / "untied")
    hf_model = reload(tmp_path / "untied")
    assert not hf_model.config.tie_word_embeddings
    assert torch.equal(hf_model.lm_head.weight, model.W_U.T)
    assert torch.equal(hf_model.transformer.wte.weight, model.W_E)


@pytest.mark.parametrize("kind", [f"{host}-neox" for host in HOSTS])
def test_a_model_without_codebooks_is_the_base_alone(kind, tmp_path):
    model = make_host(kind)
    export_hf(model, tmp_path / "model")
    assert [name for name in content(tmp_path / "model") if "codes" in name or "codebook" in name] == ["tl_codebook_export.json"]
    torch.testing.assert_close(reload(tmp_path / "model")(TOKENS).logits, model(TOKENS), rtol=0, atol=1e-4)


@only_hooked
@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"act_fn": "gelu"}, "gpt2"),
        (
            {"act_fn": "gelu_new", "use_attn_scale": False, "use_local_attn": True, "window_size": 6, "attn_types": ["local", "global"]},
            "gpt_neo",
        ),
        ({"act_fn": "gelu", "positional_embedding_type": "rotary", "rotary_dim": 4, "parallel_attn_mlp": True}, "gpt_neox"),
        ({"act_fn": "gelu", "positional_embedding_type": "rotary", "rotary_base": 5000}, "gpt_neox"),
        (
            {
                "act_fn": "silu",
                "positional_embedding_type": "rotary",
                "normalization_type": "RMS",
                "gated_mlp": True,
                "n_key_value_heads": 2,
            },
            "llama",
        ),
        (
            {"act_fn": "silu", "positional_embedding_type": "rotary", "normalization_type": "RMS", "gated_mlp": True, "final_rms": True}
            | {"original_architecture": "MistralForCausalLM", "use_local_attn": True, "window_size": 7, "attn_types": ["local", "local"]},
            "mistral",
        ),
    ],
)
def test_a_model_from_a_configuration_finds_its_architecture(settings, kind, tmp_path):
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    sizes = {"n_layers": 2, "d_model": 32, "n_ctx": 48, "d_head": 8, "n_heads": 4, "d_mlp": 40, "d_vocab": 61, "seed": 0, "device": "cpu"}
    model = HookedTransformer(HookedTransformerConfig(**sizes | settings), make_tokenizer())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(("b_U", "b_Q", "b_K", "b_V", "b_O", "b_in", "b_out")):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    tlc.attach(model, "mlp_out", n_codes=16, k=2)
    export_hf(model, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == kind
    assert_same(model, tmp_path / "model")


@pytest.mark.parametrize("host", HOSTS)
def test_qwen2_keeps_its_biases_and_mistral_its_window(host, tmp_path):
    import transformers as hf

    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 48}
    configs = [hf.Qwen2Config(**sizes), hf.MistralConfig(**sizes, sliding_window=6)]
    for config in configs:
        hf_model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        with torch.no_grad():
            for parameter in hf_model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.15)
        model = load_hf(hf_model, make_tokenizer(), host=host)
        tlc.attach(model, ["z", "v"], n_codes=16, k=2)
        export_hf(model, tmp_path / config.model_type)
        torch.testing.assert_close(reload(tmp_path / config.model_type)(TOKENS).logits, hf_model(TOKENS).logits, rtol=0, atol=1e-4)
        assert_same(model, tmp_path / config.model_type)


@only_hooked
def test_a_neox_without_biases_in_its_attention(tmp_path):
    model = load_hf(make_hf("neox", attention_bias=False), make_tokenizer(), host="hooked")
    tlc.attach(model, ["q", "mlp_out"], n_codes=16, k=2)
    export_hf(model, tmp_path / "model")
    assert_same(model, tmp_path / "model")


@pytest.mark.parametrize("kind", [f"{host}-llama" for host in HOSTS])
def test_half_precision(kind, tmp_path):
    model = with_codes(kind).to(torch.bfloat16)
    export_hf(model, tmp_path / "model")
    hf_model = reload(tmp_path / "model")
    assert hf_model.dtype == torch.bfloat16
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_users_hooks_and_switches_are_left_alone_and_out_of_it(tmp_path):
    model = with_codes(KINDS[0])
    point = tlc.sites(model)[MLP]
    point.codebook.count_when = "always"
    model.add_hook(MLP, lambda value, hook: value * 0)
    model.train()
    expected = model(TOKENS)
    before = point.codebook.usage.counts.clone()
    with tlc.bypassed(model):
        export_hf(model, tmp_path / "model")
    assert torch.equal(point.codebook.usage.counts, before)
    assert point.enabled
    assert model.training
    assert torch.equal(model(TOKENS), expected)
    model.reset_hooks()
    model.eval()
    assert_same(model, tmp_path / "model")


def refused(error, pattern, model, folder):
    with pytest.raises(error, match=pattern):
        export_hf(model, folder)
    assert not folder.exists()
    assert not [name for name in os.listdir(folder.parent) if name.startswith(".")]


@only_hooked
@pytest.mark.parametrize(
    ("kind", "name"),
    [("gpt2", "unembed.b_U"), ("neo", "blocks.1.attn.b_K"), ("llama", "blocks.0.attn._b_V"), ("llama", "blocks.1.mlp.b_out")],
)
def test_trained_biases_that_hugging_face_lacks_are_named(kind, name, tmp_path):
    model = with_codes(f"hooked-{kind}")
    with torch.no_grad():
        dict(model.named_parameters())[name].flatten()[3] = 1e-3
    refused(CheckpointError, f"no place for '{name}'.*requires_grad_", model, tmp_path / "model")


def test_what_only_the_bridge_has_is_named(tmp_path):
    model = with_codes("bridge-neox")
    head = model.original_model.lm_head._original_component
    if "bias" not in head._parameters or head.bias is None:  # TransformerLens 3.9 adds one
        head.bias = torch.nn.Parameter(torch.zeros(61))
    export_hf(model, tmp_path / "zero")
    with torch.no_grad():
        head.bias[5] = 0.1
    refused(CheckpointError, r"no place for 'lm_head.bias'.*is not zero", model, tmp_path / "model")


def test_processed_weights_are_refused(tmp_path):
    bridge = make_host("bridge-gpt2")
    bridge.enable_compatibility_mode()
    refused(CheckpointError, "enable_compatibility_mode", bridge, tmp_path / "model")
    if "hooked" in HOSTS:
        model = make_host("hooked-gpt2")
        model.cfg.normalization_type = "LNPre"
        refused(CheckpointError, "fold_ln", model, tmp_path / "model")


def test_other_architectures_and_sites_are_refused(tmp_path):
    refused(ConfigError, "type 'opt'.*Known: gpt2", make_host("bridge-opt"), tmp_path / "model")
    refused(CheckpointError, "boot_native", make_native_bridge(), tmp_path / "model")
    refused(UnknownHookError, "resid_mid", with_codes("bridge-gpt2", "resid_mid"), tmp_path / "model")
    if "hooked" in HOSTS:
        model = make_host("hooked-gpt2")
        model.cfg.original_architecture = "PhiForCausalLM"
        refused(ConfigError, "PhiForCausalLM", model, tmp_path / "model")
        model.cfg.original_architecture, model.cfg.use_qk_norm = "GPT2LMHeadModel", True
        refused(CheckpointError, "no word for use_qk_norm", model, tmp_path / "model")


@only_hooked
def test_a_model_that_hugging_face_would_compute_otherwise_is_refused(tmp_path):
    model = with_codes("hooked-gpt2")
    model.cfg.act_fn = "relu"  # the blocks compute gelu_new
    refused(CheckpointError, "without codebooks Hugging Face's logits differ from the host's by ", model, tmp_path / "model")


def test_codes_that_hugging_face_would_choose_otherwise_are_refused(tmp_path, monkeypatch):
    model = with_codes(KINDS[0])
    run = proof._run

    def other_ids(*arguments, codes):
        logits, ids = run(*arguments, codes=codes)
        return logits, {name: value if name == MLP else value.flip(-1) for name, value in ids.items()}  # a sum does not mind the order

    monkeypatch.setattr(proof, "_run", other_ids)
    refused(CheckpointError, "only .* of the codes are those of the host", model, tmp_path / "model")
    monkeypatch.setattr(proof, "_run", lambda *a, codes: (run(*a, codes=codes)[0], {n: 0 * v for n, v in run(*a, codes=codes)[1].items()}))
    refused(CheckpointError, "with the host's codes Hugging Face's logits differ", model, tmp_path / "model")


def test_only_an_earlier_export_is_replaced(tmp_path):
    model, target = with_codes(KINDS[0]), tmp_path / "model"
    export_hf(model, target)
    first = content(target)
    with torch.no_grad():
        tlc.sites(model)[MLP].codebook.codes.mul_(1.5)
    with pytest.raises(CheckpointExistsError, match=r"not empty.*overwrite=True"):
        export_hf(model, target)
    assert content(target) == first
    export_hf(model, target, overwrite=True)
    assert {name for name in content(target) if name.startswith("codes")} != {name for name in first if name.startswith("codes")}
    assert len(content(target)) == len(first)
    assert_same(model, target)
    (target / "diary.txt").write_text("mine")
    second = content(target)
    with pytest.raises(CheckpointExistsError, match=r"holds 'diary.txt'.*no export wrote"):
        export_hf(model, target, overwrite=True)
    assert content(target) == second
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointExistsError, match="is a file"):
        export_hf(model, tmp_path / "file", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["file", "model"]


@pytest.mark.parametrize("beside", [False, True], ids=["the base", "the base with codes beside it"])
def test_a_model_that_no_export_wrote_is_not_replaced(beside, tmp_path):
    model, target = _cached(), tmp_path / "base"
    make_hf("gpt2").save_pretrained(target)
    if beside:
        Codebooks.of(model).save_pretrained(target, overwrite=True)
    before = content(target)
    with pytest.raises(CheckpointExistsError, match=r"holds no tl_codebook_export\.json, so no export wrote it.*Choose another"):
        export_hf(model, target, overwrite=True)
    assert content(target) == before
    assert os.listdir(tmp_path) == ["base"]


@pytest.mark.parametrize("below", [".", "deeper/still"])
def test_the_working_directory_is_not_replaced(below, tmp_path, monkeypatch):
    model, target = make_host(KINDS[0]), tmp_path / "model"
    export_hf(model, target)
    first = content(target)
    (target / below).mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(target / below)
    for folder in (target, os.path.relpath(target)):
        with pytest.raises(CheckpointExistsError, match=r"the folder that this process works in.*Choose another"):
            export_hf(model, folder, overwrite=True)
    assert content(target) == first
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(CheckpointExistsError, match="works in"):
        export_hf(model, ".")
    export_hf(model, "below")
    assert (tmp_path / "empty/below/model.safetensors").is_file()


def test_a_refusal_touches_nothing_beside_the_folder(tmp_path):
    model, target = _cached(), tmp_path / "model"
    for name in (".model.before", ".model.tl_codebook-before", ".model.999999999-01234567.tmp", "model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text(name)
    before = content(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(CheckpointExistsError):
            export_hf(model, target, overwrite=overwrite)
    assert content(tmp_path) == before
    (target / "mine.txt").unlink()
    export_hf(model, target)
    assert sorted(os.listdir(tmp_path)) == [".model.before", "model"]


def test_what_killed_processes_left_is_removed_and_what_living_ones_write_is_not(tmp_path):
    kept = [f".model.{os.getpid()}-01234567.tmp", ".model.1-01234567.tmp", ".other.999999999-01234567.tmp", ".model.999999999-0123456.tmp"]
    for name in [*kept, ".model.999999999-01234567.tmp", f".model.{10**30}-01234567.tmp"]:
        (tmp_path / name).mkdir()
    export_hf(make_host(KINDS[0]), tmp_path / "model")
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "model"])


def test_an_export_that_was_set_aside_is_brought_back_and_then_counts(tmp_path):
    model, target = make_host(KINDS[0]), tmp_path / "model"
    export_hf(model, target)
    first = content(target)
    os.rename(target, tmp_path / ".model.tl_codebook-before")
    with pytest.raises(CheckpointExistsError, match="not empty"):
        export_hf(model, target)
    assert content(target) == first
    assert os.listdir(tmp_path) == ["model"]


def test_a_refused_export_leaves_no_folders(tmp_path, monkeypatch):
    model = make_host(KINDS[0])

    def refuse(*_):
        raise CheckpointError("no")

    for step in ("hf_model_of", "_prove"):
        with monkeypatch.context() as patch:
            patch.setattr(export, step, refuse)
            with pytest.raises(CheckpointError, match="no"):
                export_hf(model, tmp_path / "new/deeper/model")
        assert os.listdir(tmp_path) == []
    export_hf(model, tmp_path / "new/deeper/model")
    assert (tmp_path / "new/deeper/model/config.json").is_file()


def test_home_and_names_that_cannot_be(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    export_hf(make_host(KINDS[0]), "~/model")
    assert os.listdir(tmp_path) == ["model"]
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("a\0b", "loop", "loop/below", "x" * 300, "x" * 245):
        with pytest.raises(CheckpointError, match=r"is no name of|cannot be written to .*Choose another"):
            export_hf(make_host(KINDS[0]), name)
    assert sorted(os.listdir(tmp_path)) == ["loop", "model"]


def test_a_link_to_the_folder_stays_a_link(tmp_path):
    model = make_host(KINDS[0])
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    export_hf(model, tmp_path / "link")
    export_hf(model, tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "model.safetensors").is_file()


@pytest.mark.parametrize("step", ["hf_model_of", "_write", "_prove", "_sync", "_put_in_place"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "interrupted"])
def test_a_failure_at_any_step_leaves_the_earlier_export(step, error, tmp_path, monkeypatch):
    model, target = _cached(), tmp_path / "model"
    export_hf(model, target)
    first = content(target)
    original = getattr(export, step)

    def fail(*arguments):
        if step == "_write":
            original(*arguments)  # everything is there but the end
        raise error

    monkeypatch.setattr(export, step, fail)
    known = step != "hf_model_of" and isinstance(error, OSError)
    with pytest.raises(CheckpointError if known else type(error), match="No space left.*untouched" if known else None):
        export_hf(model, target, overwrite=True)
    assert content(target) == first
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("exchange", [True, False], ids=["one step", "two renames"])
def test_a_kill_while_the_folders_change_places(exchange, tmp_path, monkeypatch):
    """A process killed after each of the calls that change the two folders leaves the old export or the new, complete."""
    model, target = _cached(), tmp_path / "model"
    export_hf(model, target)
    old = content(target)
    codebook = tlc.sites(model)[MLP].codebook
    kept = codebook.codes.detach().clone()
    outcomes = []
    try:
        codebook.codes.data.mul_(2)
        for after in range(5):
            process = os.fork()
            if not process:
                try:
                    _kill_after(after, exchange)
                    export_hf(model, target, overwrite=True)
                finally:
                    os._exit(0)
            _, status = os.waitpid(process, 0)
            killed = os.WIFSIGNALED(status)
            export._recover(target)  # what the next export begins with
            now = content(target)
            outcomes.append("old" if now == old else "new")
            assert len(now) == len(old)
            assert now["model.safetensors"] == old["model.safetensors"]
            hf_model = reload(target)
            with torch.no_grad(), attach_hf(hf_model, target) as inside:
                hf_model(TOKENS)
            assert set(inside.ids) == set(tlc.sites(model))
            if not killed:
                break
        assert not killed
        assert outcomes[-1] == "new"
        assert outcomes[0] == ("new" if exchange else "old")
    finally:
        codebook.codes.data.copy_(kept)


def _kill_after(calls, exchange):
    """Let the process die by SIGKILL once so many changes of places are done."""
    left = [calls]

    def counted(function):
        def call(*arguments, **settings):
            result = function(*arguments, **settings)
            if ".model." in str(arguments[0]) or str(arguments[0]).endswith("/model"):
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
            return result

        return call

    export._exchange = counted(export._exchange) if exchange else (lambda *_: False)
    export.os.rename, export.shutil.rmtree = counted(os.rename), counted(export.shutil.rmtree)


def test_a_process_killed_while_it_writes_leaves_the_earlier_export(tmp_path):
    script = (
        "import os, signal, sys\n"
        "from tests.hosts.test_inside import with_codes\n"
        "from tl_codebook.convert import export\n"
        f"model = with_codes({KINDS[0]!r})\n"
        "export.export_hf(model, sys.argv[1])\n"
        "export._prove = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "export.export_hf(model, sys.argv[1], overwrite=True)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "model")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr[-2000:]
    assert len(os.listdir(tmp_path)) == 2  # what it was writing lies beside, under a name of its own
    assert_same(with_codes(KINDS[0]), tmp_path / "model")
    export_hf(make_host(KINDS[0]), tmp_path / "model", overwrite=True)
    assert os.listdir(tmp_path) == ["model"]


_models = []


def _cached():
    if not _models:
        _models.append(with_codes(KINDS[0]))
    return _models[0]
