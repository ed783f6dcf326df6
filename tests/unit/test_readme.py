"""The README: its code runs, its tables are those of the committed results."""

import json
import re
from pathlib import Path

import pytest
import torch

import tl_codebook as tlc
from tests.benchmarks import snap, store, stories, tokfsm, tokfsm_ablation
from tests.tiny import write_hf_folder

README = Path(__file__).resolve().parents[2] / "README.md"
TEXT = README.read_text(encoding="utf-8")
TABLES = {
    "store": lambda: store.table(json.loads(store.RESULTS.read_text())),
    "stories": lambda: stories.table(json.loads(stories.RESULTS.read_text())),
    "tokfsm": tokfsm.table,
    "tokfsm_ablation": lambda: tokfsm_ablation.table(json.loads(tokfsm_ablation.RESULTS.read_text())),
    **snap.TABLES,
}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.S)


def test_the_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_hf_folder(tmp_path / "base", "llama", num_hidden_layers=5)
    code = blocks("python")[0]
    # the same lines, on a model and texts small enough for a test
    code = code.replace("path/to/a/huggingface/model", "base").replace("max_steps=300", "max_steps=2, use_cpu=True, disable_tqdm=True")
    code = code.replace("Once upon a time", "w3 w4 w5 w6").replace("She went to the", "w3 w4")
    code = code.replace("n_codes=256", "n_codes=96")
    names = {"stories": ["w5 w6 w7 w8 w9 w10"] * 60}
    exec(compile(code, "README.md", "exec"), names)
    assert names["cache"]["blocks.3.hook_mlp_out.hook_codes"].shape == (1, names["tokens"].shape[1], 8)
    assert set(tlc.sites(names["model"])) == {f"blocks.{i}.{site}" for i in range(5) for site in ("attn.hook_z", "hook_mlp_out")}
    assert torch.isfinite(names["logits"]).all()


def test_the_code_for_models_from_elsewhere_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_hf_folder(tmp_path / "base", "llama")
    case = README.parent / "tests" / "parity" / "cases" / "gpt2_heads_and_mlp"
    code = blocks("python")[1].replace("path/to/a/huggingface/model", "base")
    code = code.replace("path/to/a/checkpoint", str(case / "checkpoint")).replace("path/to/the/base", str(case / "base"))
    names = {"tlc": tlc, "torch": torch}
    exec(compile(code, "README.md", "exec"), names)
    assert set(names["books"]) == {f"blocks.{i}.{site}" for i in range(2) for site in ("attn.hook_z", "hook_mlp_out")}
    assert names["inside"].ids["blocks.0.hook_mlp_out"].shape == (1, 1, 2)  # the last of five steps with a KV cache


def test_the_code_that_reads_codes_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    write_hf_folder(tmp_path / "base", "llama", num_hidden_layers=5)
    model = tlc.load_hf("base")
    tlc.attach(model, ["z", "mlp_out"], n_codes=16, k=2)
    story = {"text": " ".join(f"w{5 + i % 7}" for i in range(40))}
    (tmp_path / "stories.jsonl").write_text(f"{json.dumps(story)}\n" * 20)
    tokens = model.to_tokens("w3 w4 w5 w6")
    names = {"tlc": tlc, "torch": torch, "model": model, "tokens": tokens}
    names |= {"clean": tokens, "corrupt": model.to_tokens("w3 w9 w5 w6"), "metric": lambda logits: logits[:, -1, 7].mean()}
    code = blocks("python")[2].replace("Lily", "w6").replace("n_tokens=1_000_000", "n_tokens=600, progress=False")
    exec(compile(code, "README.md", "exec"), names)
    assert names["hits"][0].precision > 0.1
    assert names["before"][0].occurrences == names["hits"][0].occurrences
    assert names["page"].effect.n_places > 0
    assert names["effects"].into_corrupt.shape == (5, 5)
    assert 0 <= names["rates"].flipped.item() <= 1
    assert names["labels"].n_codes == 5 * (4 * 16 + 16)
    assert "L1.mlp_out" in (tmp_path / "graph.html").read_text()


def test_the_install_commands_name_files_that_are_there():
    commands = "\n".join(blocks("bash"))
    for name in re.findall(r"-c (\S+)", commands):
        assert (README.parent / name).is_file(), name
    for link in re.findall(r"\]\(((?!http)[^)#]+)\)", TEXT):
        assert (README.parent / link).exists(), link


@pytest.mark.parametrize("name", re.findall(r"<!-- table: (\w+) -->", TEXT))
def test_tables_are_those_of_the_committed_results(name):
    table = re.search(rf"<!-- table: {name} -->\n(.*?)\n<!-- end -->", TEXT, flags=re.S)
    assert table, f"the README has no table {name}"
    assert table[1].strip() == TABLES[name]()
