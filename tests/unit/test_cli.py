"""`tl-codebook`: from a folder and texts to a trained model and its figures; errors without a traceback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import tl_codebook as tlc
from tests.tiny import write_hf_folder
from tl_codebook.cli import VERBS, main

REPOSITORY = Path(__file__).resolve().parents[2]
TEXTS = [" ".join(f"w{3 + (start + i) % 58}" for i in range(24)) for start in range(0, 40, 2)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_hf_folder(tmp_path_factory.mktemp("base"), "gpt2")


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "stories.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture(autouse=True)
def _hub_cache_of_its_own(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def arguments(base, data, output, **settings):
    values = {
        "model": base,
        "dataset": data,
        "output_dir": output,
        "n_codes": 16,
        "k": 2,
        "max_steps": 4,
        "context_length": 12,
        "per_device_train_batch_size": 4,
        "init_iterations": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    given = ["train"]
    for name, value in (values | settings).items():
        if value is not None:
            given += [f"--{name}", *(str(item) for item in (value if isinstance(value, list) else [value]))]
    return given


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


# --- the frame ---


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]], ids=str)
def test_help(argv, capsys):
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: tl-codebook <verb> [options]")
    assert all(f"  {verb} " in out and what in out for verb, what in VERBS.items())


@pytest.mark.parametrize("argv", [["--version"], ["-V"]], ids=str)
def test_version(argv, capsys):
    assert main(argv) == 0
    assert capsys.readouterr().out == f"tl-codebook {tlc.__version__}\n"


def test_an_unknown_verb(capsys):
    assert main(["trian"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("tl-codebook: no verb 'trian'.")


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb(verb, capsys):
    with pytest.raises(SystemExit) as done:
        main([verb, "--help"])
    assert done.value.code == 0
    says = {
        "tokfsm": "mini (20 states, 2 layers; minutes) or paper (100 states, 4 layers; hours on a CPU)",
        "train": "Hugging Face folder or hub name",
        "collect": "folder that tl_codebook.save (or tl-codebook train) wrote",
        "search": "the codes fire on its group",
        "describe": "label of a code, such as L3.mlp_out:417",
        "graph": "for Gephi, Cytoscape or networkx",
        "convert": "the model that codebook-features wrapped: folder or hub name",
        "bench": "Groups, width of a group, codes, k: 12x64x10000x8",
    }
    assert says[verb] in " ".join(capsys.readouterr().out.split())


def test_a_wrong_call_of_a_verb(capsys):
    with pytest.raises(SystemExit) as done:
        main(["train"])
    assert done.value.code == 2
    assert "required" in capsys.readouterr().err
    with pytest.raises((SystemExit, ValueError)) as done:
        main(["train", "--model", "x", "--dataset", "y", "--colour", "red"])
    assert "Traceback" not in capsys.readouterr().err
    assert isinstance(done.value, SystemExit)


@pytest.mark.slow
def test_as_a_program(base, stories, tmp_path):
    """The installed way: exit status, no traceback, no network."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    run = [sys.executable, "-m", "tl_codebook"]

    def call(argv):
        return subprocess.run(run + argv, env=environment, cwd=REPOSITORY, capture_output=True, text=True)

    good = call(arguments(base, stories, tmp_path / "run"))
    assert good.returncode == 0, good.stderr
    assert "saved to" in good.stdout
    bad = call(arguments(base, tmp_path / "none.jsonl", tmp_path / "other"))
    assert bad.returncode == 1
    assert "Traceback" not in bad.stderr
    assert "tl-codebook train: no dataset could be loaded" in bad.stderr


# --- train ---


@pytest.mark.parametrize("recipe", ["default", "paper"])
def test_train(base, stories, tmp_path, recipe, capsys):
    assert main(arguments(base, stories, tmp_path / "run", recipe=recipe)) == 0
    results, out = results_of(tmp_path / "run"), capsys.readouterr().out
    assert results["recipe"] == recipe
    assert results["steps"] == 4
    assert results["tokens"] == 4 * 4 * 12
    assert results["seed"] == 42
    assert results["device"] == "cpu"
    assert set(results["base"]) == {"loss", "accuracy"}
    assert set(results["codes_at_start"]) == set(results["trained"]) == {
        "loss", "accuracy", "dead_codes", "code_perplexity", "unexplained_variance"
    }  # fmt: skip
    assert 0 < results["trained"]["loss"] < 20
    assert f"{results['trained']['loss']:.4f}" in out
    assert "tl_codebook.load(" in out
    model = tlc.load(tmp_path / "run/model")
    assert sorted({name.split(".", 2)[2] for name in tlc.sites(model)}) == ["attn.hook_z", "hook_mlp_out"]
    config = tlc.sites(model)["blocks.0.hook_mlp_out"].codebook.config
    assert config == (tlc.CodebookConfig.paper(16, 2, 1) if recipe == "paper" else tlc.CodebookConfig(16, 2, 1))
    assert model.to_tokens("w5 w6").shape[0] == 1


def test_groups_and_selection(base, stories, tmp_path):
    changes = {"n_groups": [0, 4], "selection": "nearest", "max_steps": 1}
    assert main(arguments(base, stories, tmp_path / "run", **changes)) == 0
    model = tlc.load(tmp_path / "run/model")
    books = {name.split(".", 2)[2]: point.codebook.config for name, point in tlc.sites(model).items()}
    assert books["attn.hook_z"] == tlc.CodebookConfig(16, 2, model.cfg.n_heads, selection="nearest")
    assert books["hook_mlp_out"] == tlc.CodebookConfig(16, 2, 4, selection="nearest")


def test_the_figures_are_those_of_the_saved_model(base, stories, tmp_path):
    assert main(arguments(base, stories, tmp_path / "run", eval_dataset=stories)) == 0
    results, model = results_of(tmp_path / "run"), tlc.load(tmp_path / "run/model")
    stream = [token for text in TEXTS for token in [1, *(int(word[1:]) for word in text.split())]]
    rows = [stream[start : start + 12] for start in range(0, len(stream), 12)]
    total, count = 0.0, 0
    for row in rows:
        if len(row) > 1:
            with torch.no_grad():
                log_probs = model(torch.tensor([row]))[0, :-1].double().log_softmax(-1)
            total -= float(log_probs.gather(-1, torch.tensor(row)[1:, None]).sum())
            count += len(row) - 1
    assert results["trained"]["loss"] == pytest.approx(total / count, abs=2e-4)


def test_train_without_codebooks(base, stories, tmp_path, capsys):
    assert main(arguments(base, stories, tmp_path / "run", recipe="none")) == 0
    results, out = results_of(tmp_path / "run"), capsys.readouterr().out
    assert set(results["base"]) == set(results["trained"]) == {"loss", "accuracy"}
    assert "codes_at_start" not in results
    assert results["trained"]["loss"] < results["base"]["loss"]
    assert "tl_codebook.load" not in out
    assert not (tmp_path / "run/model").exists()


def test_the_command_line_wins_over_the_config_file(base, stories, tmp_path):
    settings = {"model": str(base), "dataset": str(stories), "max_steps": 3, "seed": 5, "sites": ["mlp_out"], "n_codes": 8, "k": [2]}
    more = {"context_length": 12, "init_iterations": 2, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "host": None}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings | more))
    out = tmp_path / "run"
    assert main(["train", "--config", str(path), "--output_dir", str(out), "--max_steps", "2", "--n_codes", "12"]) == 0
    assert results_of(out)["steps"] == 2
    assert results_of(out)["seed"] == 5
    model = tlc.load(out / "model")
    assert [point.codebook.n_codes for point in tlc.sites(model).values()] == [12, 12]
    assert list(tlc.sites(model)) == ["blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"]


def test_sizes_for_each_site_and_layers(base, stories, tmp_path):
    given = arguments(base, stories, tmp_path / "run", sites=["z", "mlp_out"], n_codes=[6, 20], k=[1, 3], layers=[1])
    assert main(given) == 0
    sizes = {name: (p.codebook.n_codes, p.codebook.k) for name, p in tlc.sites(tlc.load(tmp_path / "run/model")).items()}
    assert sizes == {"blocks.1.attn.hook_z": (6, 1), "blocks.1.hook_mlp_out": (20, 3)}


def test_texts_in_one_file(base, tmp_path):
    (tmp_path / "train.txt").write_text("\n".join(TEXTS))
    (tmp_path / "eval.txt").write_text(TEXTS[3])
    given = arguments(base, tmp_path / "train.txt", tmp_path / "run", eval_dataset=tmp_path / "eval.txt")
    assert main(given) == 0
    assert results_of(tmp_path / "run")["steps"] == 4


def test_resume(base, stories, tmp_path):
    """Two steps, then two more, are the four steps of one run; a run that is finished is not overwritten."""
    saving = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant", "warmup_steps": 0}
    assert main(arguments(base, stories, tmp_path / "whole", **saving)) == 0
    assert main(arguments(base, stories, tmp_path / "parts", **saving, max_steps=2)) == 0
    assert main(arguments(base, stories, tmp_path / "parts", **saving)) == 1
    assert results_of(tmp_path / "parts")["steps"] == 2
    assert main(arguments(base, stories, tmp_path / "parts", **saving, resume=True)) == 0
    assert results_of(tmp_path / "parts")["steps"] == 4
    whole, parts = tlc.load(tmp_path / "whole/model"), tlc.load(tmp_path / "parts/model")
    for (name, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert torch.equal(a, b), name


FAULTS = {
    "count of n_codes": ({"n_codes": [1, 2, 3]}, "--n_codes has 3 values for 2 sites"),
    "count of k": ({"k": [1, 2, 3]}, "--k has 3 values for 2 sites"),
    "k too large": ({"k": 99}, "k=99 codes were asked for"),
    "count of n_groups": ({"n_groups": [1, 2, 3]}, "--n_groups has 3 values for 2 sites"),
    "groups that do not divide": ({"n_groups": [0, 7]}, "cannot be split into n_groups=7 equal groups"),
    "selection of the paper": ({"selection": "residual", "recipe": "paper"}, "--selection residual and --recipe paper were asked for"),
    "dataset": ({"dataset": "/nowhere/data.jsonl"}, "no dataset could be loaded from '/nowhere/data.jsonl'"),
    "model": ({"model": "/nowhere/model"}, "/nowhere/model"),
    "recipe": ({"recipe": "soup"}, "recipe='soup' is not known"),
    "site": ({"sites": ["mlpout"]}, "mlpout"),
    "layer": ({"layers": [7]}, "no layer 7"),
    "negative rate": ({"codes_learning_rate": -1}, "codes_learning_rate=-1"),
    "init": ({"init": "magic"}, "init='magic' is not known"),
    "context": ({"context_length": 1000}, "rows of 1000 tokens were asked for"),
    "resume": ({"resume": True}, "checkpoint"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_one_message(base, stories, tmp_path, fault, capsys):
    changes, message = FAULTS[fault]
    assert main(arguments(base, stories, tmp_path / "run", **changes)) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.splitlines()[-1].startswith("tl-codebook train: ") or message in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not (tmp_path / "run/results.json").exists()


def test_an_output_directory_that_cannot_be_written_to(base, stories, tmp_path, capsys):
    (tmp_path / "run").write_text("mine")
    assert main(arguments(base, stories, tmp_path / "run")) == 1
    assert "cannot be written to" in capsys.readouterr().err
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.parametrize(
    ("text", "message"), [(None, "cannot be read as YAML"), ("- a\n- b", "holds a list"), ("a: [", "cannot be read as YAML")]
)
def test_a_config_file_that_is_wrong(tmp_path, text, message, capsys):
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    assert main(["train", "--config", str(path)]) == 1
    assert message in capsys.readouterr().err
    assert main(["train", "--config"]) == 1
    assert "--config was given without a file" in capsys.readouterr().err
