"""Labels and codes in the formats of others, there and back."""

import json
import math

import numpy as np
import pytest

from tests.tiny import KINDS, make_host
from tests.unit.test_labels import CONTROL, HOSTILE
from tl_codebook import attach
from tl_codebook.describe.export import code_info, original_name, write_code_info, write_neuronpedia
from tl_codebook.describe.label_files import CodeLabel, CodeLabels, read_labels
from tl_codebook.errors import (
    BasisMismatchError,
    CheckpointError,
    CheckpointExistsError,
    ConfigError,
    DataError,
    InvalidCodeError,
    LabelError,
    UnknownHookError,
)
from tl_codebook.store import collect_codes
from tl_codebook.store.text import Vocabulary

LABELS = CodeLabels(
    [
        CodeLabel("L0.mlp_out:3", "comma", "regex", 0.95, 0.5, 0.655, 40, 38, pattern="(,)"),
        CodeLabel("L1.z.2:4", "token ' it'", "token", 1.0, 0.25, 0.4, 20, 21, tokens=(7,)),
        CodeLabel("L1.z.0:0", "by hand"),
    ]
)


@pytest.fixture(scope="module")
def model():
    host = make_host("native")
    attach(host, ["z", "mlp_out", "q"], n_codes=6, k=3)
    return host


@pytest.fixture(scope="module")
def store(model, tmp_path_factory):
    texts = ["w3 w4 w5 w9 w10", "w6 w7 w3"] * 4
    return collect_codes(model, texts, tmp_path_factory.mktemp("export") / "store", progress=False)


# CodeInfo


def test_fields_of_code_info(tmp_path):
    write_code_info(LABELS, tmp_path / "codes.json")
    first, second, third = json.loads((tmp_path / "codes.json").read_text())
    assert first == {
        "code": 3,
        "layer": 0,
        "head": None,
        "cb_at": "mlp",
        "pos": None,
        "code_pos": -1,
        "description": "comma",
        "regex": "(,)",
        "prec": 0.95,
        "recall": 0.5,
        "num_acts": 78,
    }
    assert (second["cb_at"], second["head"], second["num_acts"], second["prec"]) == ("attn_preproj", 0, None, None)
    assert (third["cb_at"], third["head"], third["regex"]) == ("attn_preproj", 2, None)


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("L5.z.2:1", "layer5_attn_preproj_gcb2"),
        ("L5.attn_out:1", "layer5_attn"),
        ("L5.mlp_out.3:1", "layer5_mlp_gcb3"),
        ("L5.post:1", "layer5_mlp_mid"),
        ("L5.resid_post:1", "layer5_transformer_block"),
        ("L5.resid_delta:1", "layer5_attn_plus_mlp"),
        ("L5.qkv.1:1", "layer5_qkv_gcb1"),
    ],
)
def test_every_place_of_the_original_there_and_back(code, name, tmp_path):
    label = CodeLabel(code, "comma")
    assert original_name(label.code.address) == original_name(code.split(":")[0]) == name
    write_code_info([label], tmp_path / "codes.json")
    assert read_labels(tmp_path / "codes.json")[0].label == code


@pytest.mark.parametrize("code", ["L0.q.1:3", "L0.resid_pre:3", "L0.resid_mid:3", "L0.v.0:1", "blocks.0.mlp.hook_pre:7"])
def test_places_that_the_original_has_not(code, tmp_path):
    with pytest.raises(ConfigError, match=r"no codebook there.*z, attn_out"):
        write_code_info([CodeLabel(code, "comma")], tmp_path / "codes.json")
    assert not list(tmp_path.iterdir())


def test_code_info_there_and_back(store, tmp_path):
    write_code_info(LABELS, tmp_path / "codes.json")
    for stored in (None, store):
        found = read_labels(tmp_path / "codes.json", stored)
        assert [(row.label, row.text) for row in found] == [(row.label, row.text) for row in LABELS]
        first = found["L0.mlp_out:3"]
        assert (first.kind, first.pattern, first.precision, first.recall, first.n_held_out) == ("regex", "(,)", 0.95, 0.5, 78)
        assert first.f1 == pytest.approx(2 * 0.95 * 0.5 / 1.45)
        assert code_info(first) == code_info(LABELS["L0.mlp_out:3"])
    assert found.codes_sha256 == {name: store.manifest["codes_sha256"][name] for name in ("blocks.0.hook_mlp_out", "blocks.1.attn.hook_z")}


def info(**changes):
    return {"code": 3, "layer": 0, "head": None, "cb_at": "mlp", "description": "comma"} | changes


def test_what_the_original_calls_attn_is_what_the_store_has(store, tmp_path):
    """It names what is inside attention by the component alone."""
    path = tmp_path / "codes.json"
    path.write_text(json.dumps([info(cb_at="attn", head=1)]))
    assert read_labels(path)[0].label == "L0.attn_out.1:3"
    assert read_labels(path, store)[0].label == "L0.z.1:3"
    path.write_text(json.dumps([info(cb_at="mlp", head=0)]))
    assert read_labels(path, store)[0].label == "L0.mlp_out:3"  # there is one group


def test_a_regex_is_a_label_where_there_is_no_description(tmp_path):
    path = tmp_path / "codes.json"
    path.write_text(json.dumps([info(description=None, regex="a (b)\n")]))
    (row,) = read_labels(path)
    assert (row.text, row.pattern, row.kind) == ("a (b)", "a (b)\n", "regex")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([info(cb_at="nowhere")], "cb_at 'nowhere'.*attn_preproj"),
        ([info(cb_at=None)], "cb_at None"),
        ([info(cb_at=["mlp"])], "cb_at"),
        ([info(unknown=1)], "unknown, which a CodeInfo has not"),
        ([info(description=None)], "labels nothing"),
        ([info(description=3)], "is a int, not a text"),
        ([info(description=" ")], "one line"),
        ([info(code="3")], "Give a whole number"),
        ([info(code=True)], "is a bool"),
        ([info(code=-1)], "negative"),
        ([info(layer=None)], "neither a site"),
        ([info(layer="0")], "Give a whole number"),
        ([info(head=0.5)], "Give a whole number"),
        ([info(prec=1.5)], "a share from 0 to 1"),
        ([info(num_acts="12")], "whole number"),
        ([info(), info()], "more than one label"),
        ([info(), {"code": 3}], "labels were expected"),
        ([info(), 3], "labels were expected"),
    ],
)
def test_code_infos_that_cannot_be_read(entries, message, tmp_path):
    (tmp_path / "codes.json").write_text(json.dumps(entries))
    with pytest.raises(CheckpointError, match=f"(?s)codes.json: .*{message}"):
        read_labels(tmp_path / "codes.json")


# Neuronpedia


def features(store, path, labels=LABELS, **options):
    write_neuronpedia(store, path, labels, **{"model_id": "tiny"} | options)
    text = path.read_text()
    assert text.isascii()
    assert not set("<>&") & set(text)
    return json.loads(text, parse_constant=lambda value: pytest.fail(f"{value} is no JSON"))


def test_features(store, tmp_path):
    found = features(store, tmp_path / "features.json", n_contexts=3, before=2, after=1)
    assert [(feature["layer"], feature["index"]) for feature in found] == [("0-mlp_out", "3"), ("1-z-0", "0"), ("1-z-2", "4")]
    special = store.is_special()
    for feature, label in zip(found, LABELS, strict=True):
        code = label.code
        fires = (store.ids(code.hook_name)[:, code.group or 0] == code.code).any(-1)
        assert feature["frac_nonzero"] == pytest.approx((fires & ~special).sum() / (~special).sum())
        assert (feature["modelId"], feature["hookName"], feature["sourceSetName"]) == (
            "tiny",
            code.hook_name,
            {"mlp_out": "mlp_out", "z": f"z-{code.group}"}[code.site],
        )
        (explanation,) = feature["explanations"]
        assert (explanation["description"], explanation["layer"], explanation["index"]) == (label.text, feature["layer"], feature["index"])
        assert "pos_str" not in feature
        assert len(feature["activations"]) == min(3, (fires & ~special).sum())
        for activation in feature["activations"]:
            _check_activation(store, code, activation, feature)
    assert "precision 0.95" in found[0]["explanations"][0]["notes"]


def _check_activation(store, code, activation, feature):
    """Find the tokens in the store, and work the values out by hand."""
    assert (activation["layer"], activation["index"]) == (feature["layer"], feature["index"])
    texts = [store.vocabulary.bytes_of(token).decode() for token in store.tokens(0, store.n_tokens).tolist()]
    length, ids = len(activation["tokens"]), store.ids(code.hook_name)[:, code.group or 0]
    values = [next(((3 - slot) / 3 for slot, other in enumerate(row) if other == code.code), 0.0) for row in ids.tolist()]
    there = [
        i for i in range(len(texts)) if (texts[i : i + length], values[i : i + length]) == (activation["tokens"], activation["values"])
    ]
    assert there
    assert length <= 4
    assert activation["maxValue"] == max(activation["values"]) > 0
    assert activation["values"][activation["maxValueTokenIndex"]] == activation["maxValue"]
    assert activation["minValue"] == min(activation["values"])


def test_places_in_the_first_slots_come_first(store, tmp_path):
    for feature in features(store, tmp_path / "features.json", None, codes=[f"L0.mlp_out:{code}" for code in range(6)], before=0, after=0):
        values = [activation["maxValue"] for activation in feature["activations"]]
        assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[-1]])
def test_logits(kind, tmp_path):
    from tl_codebook.describe.logits import direct_logit_effect

    model = make_host(kind)
    attach(model, ["z", "q"], n_codes=6, k=3)
    store = collect_codes(model, ["w3 w4 w5", "w6 w7"], tmp_path / "store", progress=False)
    codes = ["L0.z.1:2", "L1.q.0:3"]
    writes, looks = features(store, tmp_path / "features.json", None, codes=codes, model=model, n_logits=4)
    effect = direct_logit_effect(model, codes[0]).double()
    up, down = effect.topk(4), (-effect).topk(4)
    assert writes["pos_values"] == pytest.approx(up.values.tolist(), rel=1e-5)
    assert writes["neg_values"] == pytest.approx((-down.values).tolist(), rel=1e-5)
    assert writes["pos_str"] == [store.vocabulary.bytes_of(token).decode() for token in up.indices.tolist()]
    assert writes["neg_str"] == [store.vocabulary.bytes_of(token).decode() for token in down.indices.tolist()]
    assert "pos_str" not in looks  # a query writes nothing
    assert all(math.isfinite(value) for value in writes["pos_values"] + writes["neg_values"])


def test_features_there_and_back(store, tmp_path):
    path = tmp_path / "features.json"
    found = features(store, path)
    again = read_labels(path, store)
    assert [(row.label, row.text, row.kind) for row in again] == [(row.label, row.text, "other") for row in LABELS]
    path.write_text(json.dumps(found[1]))  # one feature alone, as the site serves it
    assert [row.label for row in read_labels(path)] == ["L1.z.0:0"]
    lines = path.with_suffix(".jsonl")
    lines.write_text("\n".join(json.dumps(one) for feature in found for one in feature["explanations"]) + "\n")
    assert read_labels(lines, store) == again
    one = features(store, path, codes=["L0.mlp_out.0:3", "L0.mlp_out:5"], overwrite=True)
    assert [(feature["layer"], len(feature["explanations"])) for feature in one] == [("0-mlp_out", 1), ("0-mlp_out", 0)]
    assert len(read_labels(path, store)) == 1


def test_several_explanations_of_one_feature(tmp_path):
    explanations = [{"description": text} for text in ("comma\n", "comma", "pause \x1b[1m")]
    feature = {"modelId": "m", "layer": "0-mlp_out", "index": 3, "explanations": explanations, "whatever": float(1)}
    (tmp_path / "features.json").write_text(json.dumps([feature]))
    assert read_labels(tmp_path / "features.json")["L0.mlp_out:3"].text == r"comma; pause \x1b[1m"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": "6-res-jb"}, "names no code"),
        ({"layer": "6-res_jb"}, "names no code"),
        ({"layer": 6}, "names no code"),
        ({"layer": "z-2"}, "names no code"),
        ({"layer": "1-z-2-3"}, "names no code"),
        ({"layer": "../../1-z"}, "names no code"),
        ({"index": "x"}, "names no code"),
        ({"index": -1}, "names no code"),
        ({"index": 3.0}, "names no code"),
        ({"index": "٣"}, "names no code"),
        ({"explanations": "comma"}, "explanations of entry 0"),
        ({"explanations": [{}]}, "explanations of entry 0"),
        ({"explanations": [{"description": 3}]}, "not a text"),
        ({"explanations": [{"description": ""}]}, "one line"),
        ({"explanations": [{"description": "x" * 3000}]}, "one line"),
    ],
)
def test_features_that_cannot_be_read(changes, message, tmp_path):
    entry = {"modelId": "m", "layer": "0-mlp_out", "index": "3", "explanations": [{"description": "comma"}]}
    path = tmp_path / "features.json"
    path.write_text(json.dumps([entry]))
    assert len(read_labels(path)) == 1
    path.write_text(json.dumps([entry | changes]))
    with pytest.raises(CheckpointError, match=message):
        read_labels(path)
    path.write_text(json.dumps([entry, entry | {"modelId": "other", "index": "4"}]))
    with pytest.raises(CheckpointError, match="several models"):
        read_labels(path)


@pytest.mark.parametrize("text", [*HOSTILE, *CONTROL])
def test_hostile_tokens_and_labels(text, store, tmp_path, monkeypatch):
    pieces = [store.vocabulary.bytes_of(token) for token in range(store.vocabulary.n_tokens)]
    pieces[3] = text.encode("utf-8", "replace") + b"\xe2\x80"  # and a part of a character
    words = Vocabulary.of_pieces(pieces)
    labels = CodeLabels([CodeLabel("L0.mlp_out:3", text)]) if text in HOSTILE else None
    found = features(store, tmp_path / "features.json", labels, codes=["L0.mlp_out:3"], vocabulary=words, n_contexts=50)
    tokens = {token for activation in found[0]["activations"] for token in activation["tokens"]}
    assert text.encode("utf-8", "replace").decode() + "\ufffd" in tokens
    if labels is not None:
        assert read_labels(tmp_path / "features.json")["L0.mlp_out:3"].text == text
        write_code_info(labels, tmp_path / "codes.json")
        assert read_labels(tmp_path / "codes.json")["L0.mlp_out:3"].text == text


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "error"),
    [
        *[({"model_id": name}, ConfigError) for name in ("", "../x", "/abs", "a\0b", "x" * 65, "-x", "a\nb", "<script>", None, "é")],
        ({"n_contexts": -1}, ConfigError),
        ({"n_logits": 0}, ConfigError),
        ({"before": 1.5}, ConfigError),
        ({"labels": None}, DataError),
        ({"codes": ["L0.mlp_out:6"]}, InvalidCodeError),
        ({"codes": ["L0.z:0"]}, LabelError),
        ({"codes": ["L0.post:0"]}, UnknownHookError),
        ({"codes": ["nonsense"]}, LabelError),
    ],
)
def test_options_that_cannot_be(options, error, store, tmp_path):
    with pytest.raises(error):
        write_neuronpedia(store, tmp_path / "features.json", **{"labels": LABELS, "model_id": "m"} | options)
    assert not list(tmp_path.iterdir())


def test_what_the_file_needs(store, tmp_path):
    other = make_host("native")
    books = attach(other, ["z", "mlp_out", "q"], n_codes=6, k=3)
    books["blocks.0.hook_mlp_out"].codes.data += 1
    with pytest.raises(BasisMismatchError):
        write_neuronpedia(store, tmp_path / "features.json", LABELS, model_id="m", model=other)
    for write in (lambda path: write_neuronpedia(store, path, LABELS, model_id="m"), lambda path: write_code_info(LABELS, path)):
        (tmp_path / "there.json").write_text("old")
        with pytest.raises(CheckpointExistsError):
            write(tmp_path / "there.json")
        for path in (tmp_path, tmp_path / "a\0b", tmp_path / ("x" * 300)):
            with pytest.raises(CheckpointError):
                write(path)
    assert (tmp_path / "there.json").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_store_without_text(tmp_path):
    model = make_host("native")
    attach(model, "mlp_out", n_codes=2)
    tokens = np.array([[3, 4, 5, 6]])
    model.tokenizer = None
    store = collect_codes(model, tokens.tolist(), tmp_path / "store", progress=False)
    with pytest.raises(DataError, match="vocabulary_of"):
        write_neuronpedia(store, tmp_path / "features.json", codes=["L0.mlp_out:0"], model_id="m")
