"""`tl-codebook convert`: in from codebook-features, back to Hugging Face, and in again; what it says, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tl_codebook as tlc
from tests.tiny import HOSTS, write_hf_folder
from tests.unit.test_files import listing
from tl_codebook.cli import main
from tl_codebook.errors import CheckpointError

CASES = Path(__file__).resolve().parents[1] / "parity" / "cases"
CASE = CASES / "neox_attn_and_mlp_bin"


def convert(*arguments):
    return main(["convert", *map(str, arguments)])


@pytest.mark.parametrize("host", HOSTS)
def test_there_and_back_again(tmp_path, capsys, host):
    data = load_file(CASE / "data.safetensors")
    assert convert(CASE / "checkpoint", tmp_path / "ours", "--base", CASE / "base", "--host", host) == 0
    told = capsys.readouterr().out
    assert "codebook-features checkpoint, trained with loss 'aeloss'" in told
    assert "base          gpt_neox, 2 layers, 2 heads, d_model 8, vocabulary 23" in told
    assert "codes         attn_out of layers 0, 1: 9 codes, k=4, inner_product, nearest, mean" in told
    assert "codes         mlp_out of layers 0, 1: 4 groups of 9 codes, k=1, inner_product, nearest, mean" in told
    assert "100.00% of the ids equal" in told
    model = tlc.load(tmp_path / "ours")
    logits, cache = model.run_with_cache(data["input_ids"])
    torch.testing.assert_close(logits, data["logits"], rtol=0, atol=1e-4)
    assert cache["blocks.1.hook_attn_out.hook_codes"].tolist() == data["ids/layer1_attn"].tolist()

    assert convert(tmp_path / "ours", tmp_path / "hf") == 0
    assert "saved by tl_codebook" in capsys.readouterr().out
    from transformers import AutoModelForCausalLM

    hf_model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with tlc.attach_hf(hf_model, tmp_path / "hf") as inside, torch.no_grad():
        torch.testing.assert_close(hf_model(data["input_ids"]).logits, data["logits"], rtol=0, atol=1e-4)
    assert inside.ids["blocks.0.hook_attn_out"].tolist() == data["ids/layer0_attn"].tolist()

    assert convert(tmp_path / "hf", tmp_path / "again", "--host", host) == 0
    assert "written by export_hf" in capsys.readouterr().out
    again = tlc.load(tmp_path / "again")
    torch.testing.assert_close(again(data["input_ids"]), logits, rtol=0, atol=1e-5)


def test_what_never_ran_is_named_once(tmp_path, capsys, recwarn):
    case = CASES / "gpt2_idle_mlp"
    assert convert(case / "checkpoint", tmp_path / "ours", "--base", case / "base") == 0
    assert "left out      transformer.h.1.mlp.codebook_layer: it never runs in the original" in capsys.readouterr().out
    assert not [warning for warning in recwarn if "never run" in str(warning.message)]


def test_a_target_that_exists(tmp_path, capsys):
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "mine.txt").write_text("keep")
    assert convert(CASE / "checkpoint", tmp_path / "ours", "--base", CASE / "base") == 1
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "ours").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("options", [["--base", str(CASE / "base")], ["--host", "bridge"]])
def test_options_that_mean_nothing_on_the_way_back(tmp_path, capsys, options):
    assert convert(CASE / "checkpoint", tmp_path / "ours", "--base", CASE / "base") == 0
    assert convert(tmp_path / "ours", tmp_path / "hf", *options) == 1
    assert f"{options[0]} was given" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


def test_no_base(tmp_path, capsys):
    assert convert(CASE / "checkpoint", tmp_path / "ours") == 1
    assert "Add --base" in capsys.readouterr().err


def test_a_plain_model(tmp_path, capsys):
    assert convert(write_hf_folder(tmp_path / "plain", "gpt2"), tmp_path / "ours") == 1
    assert "without codes, so there is nothing to convert" in capsys.readouterr().err


def test_a_damaged_checkpoint_writes_nothing(tmp_path, capsys):
    folder = Path(shutil.copytree(CASE / "checkpoint", tmp_path / "checkpoint"))
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    assert convert(folder, tmp_path / "ours", "--base", CASE / "base") == 1
    assert "pytorch_model.bin" in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


def test_a_config_that_is_no_json(tmp_path, capsys):
    folder = Path(shutil.copytree(CASE / "checkpoint", tmp_path / "checkpoint"))
    (folder / "config.json").write_text("[")
    assert convert(folder, tmp_path / "ours", "--base", CASE / "base") == 1
    assert "cannot be read as JSON" in capsys.readouterr().err


def test_a_checkpoint_without_codebooks(tmp_path, capsys):
    folder = Path(shutil.copytree(CASES / "gpt2_qkv" / "checkpoint", tmp_path / "checkpoint"))
    config = json.loads((folder / "config.json").read_text()) | {"layers_to_snap": []}
    (folder / "config.json").write_text(json.dumps(config))
    weights = {name.replace("module_layer.", ""): value for name, value in load_file(folder / "model.safetensors").items()}
    from safetensors.torch import save_file

    save_file({name: value for name, value in weights.items() if "codebook" not in name}, folder / "model.safetensors")
    assert convert(folder, tmp_path / "ours", "--base", CASES / "gpt2_qkv" / "base") == 1
    assert "no codebook that runs" in capsys.readouterr().err


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of each kind: of tl_codebook.save, and of export_hf."""
    folder = tmp_path_factory.mktemp("made")
    assert convert(CASE / "checkpoint", folder / "ours", "--base", CASE / "base") == 0
    assert convert(folder / "ours", folder / "hf") == 0
    return folder


def test_a_whole_model_beside_one_of_hugging_face_is_read_as_ours(made, tmp_path, capsys):
    """Its own weights count, not the stale ones beside them."""
    mixed = Path(shutil.copytree(made / "ours", tmp_path / "mixed"))
    weights = {name: value + 1 for name, value in load_file(made / "hf" / "model.safetensors").items()}
    shutil.copy(made / "hf" / "config.json", mixed)
    from safetensors.torch import save_file

    save_file(weights, mixed / "model.safetensors", metadata={"format": "pt"})
    assert convert(mixed, tmp_path / "hf") == 0
    assert "saved by tl_codebook" in capsys.readouterr().out
    expected = load_file(made / "hf" / "model.safetensors")
    assert all(torch.equal(value, expected[name]) for name, value in load_file(tmp_path / "hf" / "model.safetensors").items())


@pytest.mark.parametrize("kind", ["ours", "hf"])
def test_out_is_in(made, tmp_path, capsys, monkeypatch, kind):
    folder = Path(shutil.copytree(made / kind, tmp_path / "it"))
    (tmp_path / "link").symlink_to(folder)
    before = listing(folder)
    monkeypatch.chdir(folder)
    for out in (folder, tmp_path / "link", "../it", "."):
        assert convert(folder, out, "--overwrite") == 1
        assert "is IN itself, which converting would destroy. Choose another folder" in capsys.readouterr().err
    assert listing(folder) == before


def test_a_model_of_hugging_face_is_not_overwritten(made, tmp_path, capsys):
    folder = write_hf_folder(tmp_path / "plain", "gpt2")
    before = listing(folder)
    for case in ([CASE / "checkpoint", folder, "--base", CASE / "base"], [made / "hf", folder], [made / "ours", folder]):
        assert convert(*case, "--overwrite") == 1
        told = capsys.readouterr()
        assert "Choose another folder" in told.err
        assert "proof" not in told.out
        assert listing(folder) == before


@pytest.mark.parametrize("kind", ["original", "ours", "hf"])
def test_a_conversion_that_fails_leaves_no_folder(made, tmp_path, capsys, monkeypatch, kind):
    def refuse(*_, **__):
        raise CheckpointError("they differ")

    for module in ("tl_codebook.convert.proof", "tl_codebook.convert.export"):
        monkeypatch.setattr(f"{module}.compare_with_hf", refuse)
    case = [CASE / "checkpoint", "--base", CASE / "base"] if kind == "original" else [made / kind]
    assert convert(case[0], tmp_path / "new/out", *case[1:]) == 1
    assert "they differ" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_base_for_what_is_one(made, tmp_path, capsys):
    assert convert(made / "hf", tmp_path / "out", "--base", CASE / "base") == 1
    assert "--base was given, but" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["./absent", "~/absent", "a/b/absent", "{}/absent"])
def test_an_in_that_is_nowhere(tmp_path, capsys, name):
    assert convert(name.format(tmp_path), tmp_path / "out") == 1
    assert "there is no such folder. Give a folder, or a hub name" in capsys.readouterr().err


def test_an_in_that_may_be_on_the_hub_a_file_or_empty(tmp_path, capsys, monkeypatch):
    assert convert("owner/model", tmp_path / "out") == 1
    assert "owner/model is no folder here; as a hub name it should be a checkpoint of codebook-features" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert convert(tmp_path / "file", tmp_path / "out") == 1
    assert "is a file. Give the folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert convert(tmp_path / "empty", tmp_path / "out") == 1
    assert "holds neither tl_codebook.json nor config.json" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["config.json", "tl_codebook.json"])
@pytest.mark.parametrize("text", ["[" * 100_000, "{" + chr(34) + "a" + chr(34) + ":" + "[" * 100_000, "[]", "{"])
def test_json_that_cannot_be_read(tmp_path, capsys, name, text):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_text(text)
    assert convert(tmp_path / "in", tmp_path / "out") == 1
    assert name in capsys.readouterr().err


def test_names_that_cannot_be(made, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for names in ([made / "ours", "a\0b"], ["a\0b", "out"], [made / "ours", "x" * 300], ["x" * 300, "out"]):
        assert convert(*names) == 1
        assert capsys.readouterr().err.startswith("tl-codebook convert: ")
    assert list(tmp_path.iterdir()) == []


def test_the_home_folder(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made / "ours", tmp_path / "ours")
    assert convert("~/ours", "~/hf") == 0
    assert convert("~/hf", "~/again") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "hf", "ours"]
