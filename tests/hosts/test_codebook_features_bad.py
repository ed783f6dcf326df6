"""Checkpoints of codebook-features that are damaged, hostile, or of another base: an error that names file, key and fix; nothing runs."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tl_codebook import load_codebook_features
from tl_codebook.errors import CheckpointError, CheckpointWarning

CASES = Path(__file__).resolve().parents[1] / "parity" / "cases"
BASE = CASES / "gpt2_heads_and_mlp" / "base"
CODES = "model.transformer.h.0.mlp.codebook_layer.codebook.weight"


@pytest.fixture
def checkpoint(tmp_path):
    return Path(shutil.copytree(CASES / "gpt2_heads_and_mlp" / "checkpoint", tmp_path / "checkpoint"))


@pytest.fixture
def base(tmp_path):
    return Path(shutil.copytree(BASE, tmp_path / "base"))


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")


def refused(checkpoint, base, *texts) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_codebook_features(checkpoint, base)
    for text in texts:
        assert re.search(text, str(caught.value)), (text, str(caught.value))


class Canary:
    """A pickle that makes a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_hostile_pickle_is_not_run(checkpoint, base, tmp_path, how):
    (checkpoint / "model.safetensors").unlink()
    canary = tmp_path / "canary"
    if how == "torch":
        torch.save({"model.transformer.wte.weight": Canary(canary)}, checkpoint / "pytorch_model.bin")
    else:
        (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Canary(canary)}))
    refused(checkpoint, base, r"pytorch_model\.bin", "Nothing of it was run", "safe_serialization=True")
    assert not canary.exists()
    pickle.loads(pickle.dumps(Canary(canary)))  # noqa: S301 - the bait works
    assert canary.exists()


def test_safetensors_win_over_a_pickle_beside_them(checkpoint, base, tmp_path):
    (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    _, books = load_codebook_features(checkpoint, base)
    assert len(books) == 4
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("size", [0, 7, 400, 6000])
def test_a_truncated_file(checkpoint, base, size):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refused(checkpoint, base, r"model\.safetensors", rf"{size} bytes", "Copy it again")


def test_a_truncated_bin(base):
    refused(CASES, base, "holds no config.json")


@pytest.mark.parametrize("size", [0, 100, 9000])
def test_a_truncated_pickle(tmp_path, size):
    case = CASES / "neox_attn_and_mlp_bin"
    folder = Path(shutil.copytree(case / "checkpoint", tmp_path / "checkpoint"))
    path = folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:size])
    refused(folder, case / "base", r"pytorch_model\.bin", rf"{size} bytes")


def test_a_header_that_lies(checkpoint, base):
    header = json.dumps({CODES: {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}}).encode()
    (checkpoint / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    refused(checkpoint, base, r"model\.safetensors", "damaged")


def test_no_weights_at_all(checkpoint, base):
    (checkpoint / "model.safetensors").unlink()
    refused(checkpoint, base, "holds no model.safetensors and no pytorch_model.bin")


@pytest.mark.parametrize(
    ("change", "texts"),
    [
        (lambda t: t.pop(CODES), [r"'mlp' of layer 0", r"missing tensors \['codebook\.weight'\]"]),
        (lambda t: t.pop("model.transformer.ln_f.weight"), [r"missing tensors \['transformer\.ln_f\.weight'\]"]),
        (lambda t: t.update({"model.transformer.extra": torch.zeros(2)}), [r"unexpected tensors \['transformer\.extra'\]"]),
        (lambda t: t.update({"stray": torch.zeros(2)}), ["'stray'.*'model.'"]),
        (lambda t: t.update({"model.transformer.h.7.ln_1.weight": torch.zeros(8)}), ["layer 7", "2 layers"]),
        (lambda t: t.update({CODES: torch.zeros(9, 5)}), ["'mlp' of layer 0", "do not fit each other"]),
        (lambda t: t.update({CODES: torch.zeros(7, 8)}), [r"\(1, 7, 8\)", r"\(1, 9, 8\)"]),
        (lambda t: t.update({CODES: torch.zeros(9, 8, dtype=torch.long)}), ["int64", "Floating-point"]),
        (lambda t: t[CODES].fill_(float("nan")), ["NaN or Inf", "allow_nonfinite=True"]),
        (lambda t: t.update({"model.transformer.ln_f.weight": torch.zeros(3)}), [r"'transformer\.ln_f\.weight' has shape \(3,\)"]),
        (lambda t: [t.pop(k) for k in list(t) if "h.1.mlp.codebook_layer" in k], [r"missing \(layer, place\) \[\(1, 'mlp'\)\]"]),
        (
            lambda t: t.update({f"model.transformer.h.0.codebook_layer.{k}": torch.zeros(s) for k, s in
                                (("codebook.weight", (9, 8)), ("ln.weight", 8), ("ln.bias", 8))}),
            [r"unexpected \[\(0, 'attn_plus_mlp'\)\]"],
        ),
    ],
)  # fmt: skip
def test_wrong_tensors(checkpoint, base, change, texts):
    edit_weights(checkpoint, change)
    refused(checkpoint, base, r"model\.safetensors", *texts)


@pytest.mark.parametrize(
    ("changes", "texts"),
    [
        ({"auto_map": {"AutoModel": "evil.Model"}}, ["'auto_map' asks for code"]),
        ({"class": "os.system"}, ["'class' asks for code"]),
        ({"surprise": 1}, [r"unknown keys \['surprise'\]"]),
        ({"k_codebook": [3]}, ["k_codebook has 1 values for 2 places"]),
        ({"k_codebook": [3, "2"]}, ["k_codebook holds '2'"]),
        ({"k_codebook": [3, 10]}, ["k=10", "n_codes=9"]),
        ({"num_codes": [9, 0]}, ["num_codes=0"]),
        ({"num_codebooks": [3, 1]}, [r"config\.json and the base say \(3, 9, 2\)"]),
        ({"codebook_type": ["compositional", "vanilla"]}, ["'compositional'"]),
        ({"similarity_metric": "cosine"}, ["'cosine'"]),
        ({"layers_to_snap": [0, 5]}, ["layer 5", "2 layers"]),
        ({"layers_to_snap": "some"}, ["'some' names no layers"]),
        ({"codebook_at": ["attn", "mlp"]}, ["missing .*'attn'", "unexpected .*'attn_preproj'"]),
        ({"codebook_kwargs": {"soft_snap": True}}, ["soft_snap"]),
        ({"model_type": "gpt2"}, ["not 'codebook'", "load_hf"]),
    ],
)
def test_a_wrong_config(checkpoint, base, changes, texts):
    edit_config(checkpoint, **changes)
    with pytest.raises(CheckpointError) as caught:
        load_codebook_features(checkpoint, base)
    for text in texts:
        assert re.search(text, str(caught.value)), (text, str(caught.value))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": "codebook", "model_type": "gpt2"}', '{"model_type": NaN}', "{" * 100_000])
def test_a_config_that_is_no_json_object(checkpoint, base, text):
    (checkpoint / "config.json").write_text(text)
    refused(checkpoint, base, r"config\.json")


def test_another_base(checkpoint):
    refused(checkpoint, CASES / "neox_heads_qkv" / "base", "GPTNeoXForCausalLM", "Give the base that was wrapped")


def test_a_base_of_another_size(checkpoint, base):
    edit_config(base, vocab_size=30)
    refused(checkpoint, base, r"'transformer\.wte\.weight' has shape \(23, 8\), the base has \(30, 8\)")


def test_a_base_with_another_rotary_base(tmp_path):
    case = CASES / "neox_attn_and_mlp_bin"
    other = Path(shutil.copytree(case / "base", tmp_path / "base"))
    edit_config(other, rotary_pct=1.0)
    refused(case / "checkpoint", other, "inv_freq", "rotary")


@pytest.mark.parametrize("base", ["nowhere/at-all", 7, None])
def test_a_base_that_is_none(checkpoint, base):
    refused(checkpoint, base, "base")


def test_an_architecture_that_the_original_does_not_wrap(checkpoint, base):
    edit_config(base, model_type="opt")
    refused(checkpoint, base, "opt", "gpt2, gpt_neox, gpt_neo")


def test_a_link_out_of_the_folder(checkpoint, base, tmp_path):
    outside = tmp_path / "outside.safetensors"
    shutil.move(checkpoint / "model.safetensors", outside)
    (checkpoint / "model.safetensors").symlink_to(outside)
    refused(checkpoint, base, "outside the checkpoint")


def test_shards_that_name_files_elsewhere(checkpoint, base):
    names = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").rename(checkpoint.parent / "model.safetensors")
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, "../model.safetensors")}))
    refused(checkpoint, base, r"'\.\./model\.safetensors'")


def test_two_codebooks_at_one_place():
    case = CASES / "gpt2_mlp_mid_twice"
    refused(case / "checkpoint", case / "base", "2 codebooks at 'mlp_mid'", "No site holds two")


def test_a_missing_codebook_beside_an_idle_one(tmp_path):
    case = CASES / "gpt2_idle_mlp"
    folder = Path(shutil.copytree(case / "checkpoint", tmp_path / "checkpoint"))
    edit_weights(folder, lambda t: [t.pop(name) for name in list(t) if name.startswith("model.transformer.h.0.codebook_layer")])
    refused(folder, case / "base", r"missing \(layer, place\) \[\(0, 'transformer_block'\)\]")


def test_a_place_that_the_original_skips_is_said(checkpoint, base):
    edit_config(checkpoint, codebook_at=["attn_preproj", "mlp", "nowhere"], k_codebook=[3, 2, 1], num_codes=[9, 9, 9],
                num_codebooks=[2, 1, 1], codebook_type=["group", "vanilla", "vanilla"])  # fmt: skip
    with pytest.warns(CheckpointWarning, match="'nowhere', which the original does not know and skips"):
        _, books = load_codebook_features(checkpoint, base)
    assert len(books) == 4


@pytest.mark.parametrize(
    "name",
    [
        "model.transformer.h.0.mlp",
        "model.transformer.h.0.attn.c_proj.weight.x",
        "model.transformer.h.0.attn.codebook_layer",
        "model.transformer.h.0.mlp.codebook_layer.codebook",
        "model.transformer.h.0.mlp.module_layer.act",
        "model.transformer.h.0.mlp.module_layer.act.codebook_layer",
        "model.transformer.h.0.module_layer",
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_name_that_is_tensor_and_folder(checkpoint, base, name, first):
    def add(tensors):
        others = dict(tensors)
        tensors.clear()
        tensors.update({name: torch.zeros(2)} | others if first else others | {name: torch.zeros(2)})

    edit_weights(checkpoint, add)
    refused(checkpoint, base, r"model\.safetensors")


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("which", ["model.transformer.wte.weight", "model.transformer.h.1.ln_1.weight", CODES])
def test_weights_that_are_no_floats(checkpoint, base, dtype, which):
    edit_weights(checkpoint, lambda t: t.update({which: t[which].to(dtype)}))
    refused(checkpoint, base, r"model\.safetensors", "Floating-point weights")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"n_head": 3}, "n_heads|divisible|num_heads"),
        ({"n_head": 0}, "num_attention_heads=0"),
        ({"n_layer": "x"}, "n_layer|num_hidden_layers"),
        ({"n_embd": -8}, "hidden_size=-8"),
        ({"vocab_size": 10**12}, r"the base has \(1000000000000, 8\)"),
        ({"activation_function": "foo"}, "foo"),
        ({"layer_norm_epsilon": None}, "layer_norm_epsilon|base"),
        ({"model_type": "llama"}, "'llama'"),
    ],
)
def test_a_base_that_cannot_be(checkpoint, base, changes, text):
    edit_config(base, **changes)
    refused(checkpoint, base, "base", text)


def test_the_checkpoint_as_its_own_base(checkpoint):
    refused(checkpoint, checkpoint, "is a checkpoint of codebook-features itself")


@pytest.mark.parametrize("name", [Path("nowhere"), "~/nowhere/at/all", "x" * 300, "a\0b"])
def test_a_checkpoint_that_is_not_there(base, name):
    refused(name, base, "folder")


def test_loaded_under_inference_mode_it_can_be_trained(checkpoint, base):
    with torch.inference_mode():
        model, books = load_codebook_features(checkpoint, base)
    model.train()(torch.tensor([[3, 4, 5]]), return_type="loss").backward()
    assert all(book.codes.grad.abs().sum() > 0 for book in books.values())


def test_shards(checkpoint, base):
    tensors = load_file(checkpoint / "model.safetensors")
    halves = [dict(list(tensors.items())[::2]), dict(list(tensors.items())[1::2])]
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name, half in zip(shards, halves, strict=True):
        save_file(half, checkpoint / name)
    whole, _ = load_codebook_features(checkpoint, base)
    (checkpoint / "model.safetensors").unlink()
    index = {key: name for name, half in zip(shards, halves, strict=True) for key in half}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    sharded, _ = load_codebook_features(checkpoint, base)
    tokens = torch.tensor([[3, 5, 7, 9]])
    assert torch.equal(sharded(tokens), whole(tokens))


def test_half_precision_stays_half(checkpoint, base):
    edit_weights(checkpoint, lambda t: t.update({name: value.bfloat16() for name, value in t.items()}))
    model, books = load_codebook_features(checkpoint, base)
    assert {p.dtype for p in model.parameters() if p.numel() > 1} == {torch.bfloat16}
    assert {book.codes.dtype for book in books.values()} == {torch.bfloat16}
