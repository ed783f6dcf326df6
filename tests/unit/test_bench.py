"""`tl-codebook bench`: rows that say what they should, answers that are checked, messages for wrong calls. No time is asserted."""

import json
import statistics

import pytest
import torch

from tests.benchmarks import snap as readme
from tests.tiny import write_hf_folder
from tl_codebook.benchmarks import CASES_CPU, CASES_GPU, PEERS, Case, Settings, Shape, run_case
from tl_codebook.benchmarks.agreement import gradient_error, wrong_rows
from tl_codebook.benchmarks.memory import peak_bytes
from tl_codebook.benchmarks.peers import plain_eager
from tl_codebook.cli import main
from tl_codebook.errors import ConfigError
from tl_codebook.snap import definition

CPU = torch.device("cpu")
EVERYDAY = [name for name in PEERS if name != "compile"]  # a compiler takes half a minute


def bench(tmp_path, *words, shapes=("2x8x40x3", "1x16x30x1")):
    path = tmp_path / "rows.json"
    given = ["bench", "--rows", "20", "--reps", "2", "--no-memory", "--peers", *EVERYDAY, "--json", str(path)]
    assert main([*given, *(["--shapes", *shapes] if shapes else []), *words]) == 0
    return json.loads(path.read_text())


# --- the verb ---


def test_rows(tmp_path, capsys):
    results = bench(tmp_path)
    out = capsys.readouterr()
    assert [row["shape"] for row in results["rows"]] == ["2x8x40x3"] * len(EVERYDAY) + ["1x16x30x1"] * len(EVERYDAY)
    for first in range(0, len(results["rows"]), len(EVERYDAY)):
        rows = {row["peer"]: row for row in results["rows"][first : first + len(EVERYDAY)]}
        assert list(rows) == EVERYDAY
        for name, row in rows.items():
            assert (row["rows"], row["dtype"], row["op"], row["seed"]) == (20, "float32", "forward", 0)
            assert (row["selection"], row["similarity"], row["reduce"]) == ("nearest", "inner_product", "mean")
            assert row["clock"] == "cpu"
            if row["skipped"]:
                assert name in ("eager_tf32", "faiss")
                assert row["seconds"] is row["ratio_to_gemm"] is None
                assert f"not run: {name}, " in out.out
                assert row["skipped"] in out.out
                continue
            assert row["seconds"] > 0
            assert row["wall_seconds"] > 0
            assert len(row["rounds"]) == 2
            assert row["seconds"] == statistics.median(row["rounds"]) == row["cpu_seconds"]
            assert row["ratio_to_gemm"] == pytest.approx(row["seconds"] / rows["gemm"]["seconds"])
            if name != "gemm":
                assert row["wrong_rows"] == 0
                assert row["checked_rows"] == 20 * Shape.parse(row["shape"]).n_groups
        assert rows["gemm"]["ratio_to_gemm"] == 1
        assert rows["gemm"]["note"]
    at = results["where"]
    assert at["threads"] == 1
    assert at["torch"] == torch.__version__
    assert at["cpu"]
    assert {"commit", "device", "cores", "python", "tl_codebook", "triton"} <= set(at)
    assert str(tmp_path) not in json.dumps(results)
    assert "2x8x40x3 nearest inner_product float32 forward, 20 rows: ours" in out.err


@pytest.mark.parametrize("similarity", ["inner_product", "euclidean"])
@pytest.mark.parametrize("selection", ["nearest", "residual"])
@pytest.mark.parametrize("backward", [False, True])
def test_every_peer_answers_right(tmp_path, selection, similarity, backward):
    words = ["--selection", selection, "--similarity", similarity, *(["--backward"] if backward else [])]
    rows = {row["peer"]: row for row in bench(tmp_path, *words, shapes=["3x8x40x4"])["rows"]}
    assert rows["paper"]["skipped"] == ("it has no greedy pursuit" if selection == "residual" else None)
    ran = [row for name, row in rows.items() if not row["skipped"] and name != "gemm"]
    assert {"ours", "definition", "eager"} <= {row["peer"] for row in ran}
    for row in ran:
        assert row["op"] == ("backward" if backward else "forward")
        assert row["wrong_rows"] == 0
        if backward:
            assert row["gradient_error"] < 1e-6


@pytest.mark.slow
def test_the_compiled_peer(tmp_path):
    for words in ([], ["--backward"], ["--selection", "residual"]):
        rows = bench(tmp_path, "--peers", "compile", *words, shapes=["2x8x40x3"])["rows"]
        assert [row["peer"] for row in rows] == ["compile", "gemm"]
        assert rows[0]["skipped"] is None
        assert rows[0]["wrong_rows"] == 0


def test_half_precision_and_threads(tmp_path):
    before = torch.get_num_threads()
    rows = bench(tmp_path, "--dtype", "bfloat16", "--threads", "2", "--peers", "ours", "eager", shapes=["2x8x40x3"])["rows"]
    assert torch.get_num_threads() == before
    assert [row["dtype"] for row in rows] == ["bfloat16"] * 3
    assert rows[0]["wrong_rows"] == 0
    assert {row["clock"] for row in rows} == {"wall"}


def test_memory(tmp_path):
    given = ["bench", "--shapes", "1x8x5000x2", "--rows", "500", "--reps", "1", "--peers", "eager", "--json", str(tmp_path / "rows.json")]
    assert main(given) == 0
    rows = {row["peer"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    if rows["eager"]["peak_bytes"] is None:
        pytest.skip("this system does not tell the peak memory of a process")
    assert 0.9 * 2 < rows["eager"]["peak_bytes"] / (500 * 5000 * 4) < 3  # the products, and the products over the norms
    assert 0.9 < rows["gemm"]["peak_bytes"] / (500 * 5000 * 4) < 1.5


def test_memory_of_a_process_that_fails_is_none():
    assert peak_bytes("no such peer", Case(Shape(1, 4, 8, 1), 4), 1) is None


def test_the_first_set_of_shapes():
    for cases in (CASES_CPU, CASES_GPU):
        assert {case.selection for case in cases} == {"nearest", "residual"}
        assert "12x64x10000x8" in {str(case.shape) for case in cases}
    assert len(CASES_GPU) == len(CASES_CPU) + 2


def test_a_model(tmp_path, capsys):
    folder = write_hf_folder(tmp_path / "base", "gpt2")
    results = bench(tmp_path, "--models", str(folder), "--tokens", "2x8", shapes=())
    assert results["rows"] == []
    rows = results["models"]
    assert [(row["op"], row["codebooks"]) for row in rows] == [
        (op, kind) for op in ("forward", "train_step") for kind in ("none", "residual", "paper")
    ]
    for i, row in enumerate(rows):
        assert row["model"] == "base"
        assert (row["batch"], row["pos"], row["k"]) == (2, 8, 8)
        assert row["seconds"] == statistics.median(row["rounds"])
        assert row["ratio_to_none"] == pytest.approx(row["seconds"] / rows[i // 3 * 3]["seconds"])
    assert str(tmp_path) not in json.dumps(results)
    assert "x without" in capsys.readouterr().out


FAULTS = {
    "shape": (["--shapes", "12x64"], "the shape '12x64' cannot be read"),
    "zero": (["--shapes", "1x0x10x1"], "the shape '1x0x10x1' cannot be read"),
    "k too large": (["--shapes", "1x8x10x11"], "asks for k=11 of 10 codes. Give k <= codes."),
    "device": (["--device", "toaster"], "the device 'toaster' is not known. Choose cpu, cuda"),
    "device of another kind": (["--device", "meta"], "the device 'meta' cannot be measured"),
    "GPU that is not there": (["--device", "cuda:99"], "the device 'cuda:99' was asked for, and this machine has"),
    "peer": (["--peers", "eagre"], "the peer 'eagre' is not known. Did you mean 'eager'"),
    "rows": (["--rows", "0"], "rows=0 was asked for"),
    "reps": (["--reps", "0"], "reps=0 was asked for"),
    "threads": (["--threads", "0"], "threads=0 was asked for"),
    "tokens": (["--tokens", "4"], "--tokens '4' cannot be read"),
    "model": (["--models", "/nowhere/model"], "/nowhere/model"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_one_message(fault, tmp_path, capsys):
    words, message = FAULTS[fault]
    assert main(["bench", *words, "--json", str(tmp_path / "rows.json")]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert "tl-codebook bench: " in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert not (tmp_path / "rows.json").exists()


def test_more_tokens_than_the_context(tmp_path, capsys):
    folder = write_hf_folder(tmp_path / "base", "gpt2")
    assert main(["bench", "--models", str(folder), "--tokens", "1x1000"]) == 1
    assert "Give --tokens 1x48." in capsys.readouterr().err


def test_a_json_file_that_cannot_be(tmp_path, capsys):
    assert main(["bench", "--json", str(tmp_path)]) == 1
    assert "is a folder" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--dtype", "int8"], ["--colour", "red"], ["--rows", "many"], ["--selection", "random"]], ids=str)
def test_wrong_calls(words, capsys):
    with pytest.raises(SystemExit) as done:
        main(["bench", *words])
    assert done.value.code == 2
    assert "usage: tl-codebook bench" in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit) as done:
        main(["bench", "--help"])
    assert done.value.code == 0
    out = capsys.readouterr().out
    assert all(
        f"--{flag}" in out for flag in ("device", "shapes", "models", "rows", "reps", "seed", "threads", "peers", "backward", "json")
    )
    assert all(peer in out for peer in PEERS)


# --- what it rests on ---


@pytest.mark.parametrize("selection", ["nearest", "residual"])
@pytest.mark.parametrize("similarity", ["inner_product", "euclidean"])
def test_wrong_codes_are_seen(selection, similarity):
    case = Case(Shape(2, 8, 30, 3), 10, selection, similarity)
    (x,), codes = case.tensors(CPU)
    choose = definition.residual_codes if selection == "residual" else definition.nearest_codes
    ids = choose(x, codes, 3, similarity)
    assert wrong_rows(case, x, codes, ids) == (0.0, 20)
    worst = definition.scores(x, codes, similarity).argmin(-1)
    for change in (worst[4, 1], -1, 30):
        changed = ids.clone()
        changed[4, 1, 2] = change
        assert wrong_rows(case, x, codes, changed) == (1 / 20, 20)
    if selection == "nearest":
        repeated = ids.clone()
        repeated[0, 0, 2] = repeated[0, 0, 0]
        assert wrong_rows(case, x, codes, repeated) == (1 / 20, 20)
        assert wrong_rows(case, x, codes, ids.flip(-1)) == (0.0, 20)


def test_ties_are_not_wrong():
    case = Case(Shape(1, 8, 30, 1), 10)
    (x,), codes = case.tensors(CPU)
    codes[0, 15:] = codes[0, :15]
    ids = definition.nearest_codes(x, codes, 1, "inner_product")
    assert wrong_rows(case, x, codes, (ids + 15) % 30) == (0.0, 10)


def test_a_wrong_gradient_is_seen():
    case = Case(Shape(2, 8, 30, 3), 10, op="backward")
    (x,), codes = case.tensors(CPU)
    codes.requires_grad_()
    out, ids = plain_eager(x, codes, 3, case.similarity, case.selection)
    upstream = case.upstream(CPU)
    (gradient,) = torch.autograd.grad(out, codes, upstream)
    assert gradient_error(case, gradient, upstream, ids) < 1e-6
    assert gradient_error(case, 2 * gradient, upstream, ids) == pytest.approx(1.0, abs=1e-5)


def test_the_same_seed_gives_the_same_tensors():
    case = Case(Shape(2, 8, 30, 3), 10, seed=3)
    (x,), codes = case.tensors(CPU)
    inputs, again = Case.from_fields(json.loads(json.dumps(case.fields()))).tensors(CPU, n_inputs=3)
    assert torch.equal(codes, again)
    assert torch.equal(x, inputs[0])
    assert len(inputs) == 3
    assert not torch.equal(inputs[0], inputs[1])


def test_a_peer_that_fails_leaves_the_others(monkeypatch):
    def broken(case, codes):
        raise RuntimeError("no compiler here\nand a long story")

    monkeypatch.setitem(PEERS, "eager", type(PEERS["eager"])("broken", broken))
    settings = Settings(CPU, reps=1, memory=False)
    ours, eager, gemm = run_case(Case(Shape(1, 4, 8, 2), 4), ["ours", "eager"], settings)
    assert eager["skipped"] == "RuntimeError: no compiler here"
    assert ours["seconds"] > 0
    assert gemm["seconds"] > 0
    with pytest.raises(ConfigError):
        Case(Shape(1, 4, 8, 9), 4)


# --- the README's tables ---


def test_the_tables_of_the_readme(tmp_path):
    results = bench(tmp_path)
    text = readme.snap_table(results, None)
    assert text.splitlines()[0].startswith("| groups x width x codes x k, rows | GEMM alone | ours |")
    assert "| 2 x 8 x 40 x 3, 20 |" in text
    assert "Ours against float64: 0 of 60 vectors got a code" in text
    assert text.endswith(f"GPU: {readme.NO_GPU}.")
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1
    assert readme.NO_GPU in readme.snap_table(None, None)
    assert readme.NO_GPU in readme.model_table(None, None)
    assert readme.original_table(None) == "Not measured."
    took = {"ref": {"median": 2.0}, "new": {"median": 1.0}, "ratio_per_round": {"ref/new": [1.5, 2.0, 2.5]}}
    check = {f"{name}:ref vs new": {"ids_equal_fraction": 1.0} for name in "ab"}
    text = readme.original_table({"cases": {"a_fwd": took}, "check": check, "where": results["where"], "command": "x"})
    assert "| forward | 2.00 s | 1.00 s | **2.0x** (1.5 to 2.5) |" in text


@pytest.mark.parametrize("name", readme.TABLES)
def test_each_table_can_be_made_from_what_is_committed(name):
    assert readme.TABLES[name]()
