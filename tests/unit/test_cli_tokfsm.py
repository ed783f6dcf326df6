"""``tl-codebook tokfsm``: one run, cut short, through the command line."""

from __future__ import annotations

import pytest

from tl_codebook import load, sites
from tl_codebook.cli import main
from tl_codebook.experiments.tokfsm.setting import TokFSMSetting


@pytest.fixture
def small(monkeypatch):
    """Make the mini preset small enough for a test; what the options change is left to them."""

    def mini(cls, **changes):
        sizes = dict(n_states=4, n_edges=2, base=2, n_tokens=16, n_layers=1, d_model=16, z_codes=(12,), mlp_codes=(3,), batch_size=4)
        sizes |= dict(base_steps=3, code_steps=2, held_out_rows=8, sampled_rows=4, forced_prefixes=1, dictionary_steps=3)
        return cls(**sizes | changes)

    monkeypatch.setattr(TokFSMSetting, "mini", classmethod(mini))


def test_a_run_writes_model_figures_and_report(small, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["tokfsm", "--seed", "3", "--code_steps", "4", "--quiet"]) == 0
    out = capsys.readouterr().out
    folder = tmp_path / "runs" / "tokfsm-mini-seed3"
    assert {path.name for path in folder.iterdir()} >= {"model", "base", "results.json", "report.html", "experiment.json"}
    assert "published" in out
    assert "no codes" in out
    assert "63.65 %" in out
    assert "With the codes of state" in out
    assert "tl_codebook.load('runs/tokfsm-mini-seed3/model')" in out
    assert len(sites(load(folder / "model"))) == 2
    again = ["tokfsm", "--seed", "3", "--code_steps", "4", "--quiet"]
    assert main(again) == 1
    assert "holds a run. Choose another folder, or resume it (--resume)." in capsys.readouterr().err
    assert main([*again, "--resume"]) == 0
    assert capsys.readouterr().out == out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--preset", "maxi"], "the preset 'maxi' is not known. Choose 'mini' or 'paper'."),
        (["--recipe", "old"], "recipe='old' is not known."),
        (["--code_steps", "0"], "code_steps=0 was asked for."),
        (["--seed", "-1"], "seed=-1 was asked for."),
        (["--compiled"], "there is no C++ compiler (no-such-compiler)"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(argv, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert main(["tokfsm", *argv]) == 1
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
