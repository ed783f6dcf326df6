"""``tl-codebook collect``."""

import json

import pytest

import tl_codebook as tlc
from tests.tiny import make_host
from tl_codebook.cli import main

TEXTS = ["w5 w6 w7 w8", "w9 w10", "w11 w12 w13"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    model = make_host("native")
    tlc.attach(model, ["z", "mlp_out"], n_codes=16, k=2)
    tlc.save(model, folder / "model")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return folder


def collect(folder, out, *options):
    return main(["collect", str(folder / "model"), str(folder / "a.jsonl"), str(out), "--device", "cpu", *options])


def test_figures_for_machines(folder, tmp_path, capsys):
    assert collect(folder, tmp_path / "out", "--json", "--sites", "L1.z", "mlp_out") == 0
    captured = capsys.readouterr()
    figures, store = json.loads(captured.out), tlc.CodeStore(tmp_path / "out")
    assert "about 12 tokens and" in captured.err
    assert (figures["n_tokens"], figures["n_sequences"], figures["bytes"]) == (12, 3, store.nbytes)
    assert list(figures["sites"]) == ["L1.z", "L0.mlp_out", "L1.mlp_out"]
    for label, site in figures["sites"].items():
        assert site["dead"] == int(store.dead(label).sum())
        assert site["perplexity"] == pytest.approx(float(store.perplexity(label).mean()), abs=1e-3)
        assert (site["n_codes"], site["n_groups"], site["k"]) == (16, 4 if label == "L1.z" else 1, 2)
    assert figures["seconds"] > 0


def test_figures_for_people_and_a_second_time(folder, tmp_path, capsys):
    assert collect(folder, tmp_path / "out", "--n_tokens", "7", "--quiet", "--context_length", "4", "--batch_size", "1") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "7 tokens in 3 sequences" in captured.out
    assert "L0.z" in captured.out
    assert "4 x 16" in captured.out
    assert collect(folder, tmp_path / "out", "--quiet") == 1
    assert capsys.readouterr().err.startswith("tl-codebook collect: ")
    assert tlc.CodeStore(tmp_path / "out").n_tokens == 7
    assert collect(folder, tmp_path / "out", "--quiet", "--overwrite") == 0
    assert tlc.CodeStore(tmp_path / "out").n_tokens == 12
    assert collect(folder, tmp_path / "out", "--quiet", "--resume") == 0


FAULTS = {
    "site": (["--sites", "q"], "no codebook sits at 'q'"),
    "column": (["--column", "story"], "no column 'story'"),
    "device": (["--device", "abacus"], "--device 'abacus' is no device"),
    "tokens": (["--n_tokens", "0"], "n_tokens=0"),
    "both": (["--resume", "--overwrite"], "Give one"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_one_message(folder, tmp_path, fault, capsys):
    options, message = FAULTS[fault]
    assert collect(folder, tmp_path / "out", *options) == 1
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_codes(folder, tmp_path, capsys):
    assert main(["collect", str(tmp_path), str(folder / "a.jsonl"), str(tmp_path / "out")]) == 1
    assert "holds no tl_codebook.json" in capsys.readouterr().err
