"""Search in a store, as the original has it: positions of a regex, precision and recall of codes, tokens of codes, best neurons."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from tests.parity.golden import SITES, place_of
from tests.unit.search_store import MemoryStore
from tl_codebook.names import Address, Code, codes_hook
from tl_codebook.store.concepts import match_text
from tl_codebook.store.counting import code_counts
from tl_codebook.store.neurons import compare_with_neurons
from tl_codebook.store.search import CodeHit, search_codes
from tl_codebook.store.text import check_text, vocabulary_of

CASES = ["ascii_group_attn", "ascii_vanilla_mlp"]


class Golden:
    """A case as a store, and what the original says of it."""

    def __init__(self, folder):
        from transformers import AutoTokenizer

        with np.load(folder / "cache.npz", allow_pickle=False) as arrays:
            self.arrays = dict(arrays)
        self.folder = folder
        self.case = self.read("case")
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        acts = {key.removeprefix("acts/"): value for key, value in self.arrays.items() if key.startswith("acts/")}
        self.places = {key: place_of(key) for key in acts}
        by_site = {}
        for key, place in self.places.items():
            by_site.setdefault(place.hook_name, []).append(acts[key].reshape(-1, acts[key].shape[-1]))
        ids = {site: np.stack(groups, axis=1) for site, groups in by_site.items()}
        self.store = MemoryStore(self.arrays["tokens"].tolist(), ids, self.case["num_codes"], vocabulary_of(self.tokenizer))
        self.length = self.arrays["tokens"].shape[1]

    def read(self, name):
        return json.loads((self.folder / f"{name}.json").read_text())

    def pairs(self, positions):
        return [[int(position) // self.length, int(position) % self.length] for position in positions]

    def found(self, search):
        """Find the pattern of a search; the original's ``at_odd_even`` keeps matches that begin at an even or odd character."""
        matches = match_text(self.store, search["pattern"])
        if search["at_odd_even"] != -1:
            matches = matches.where(matches.start % 2 == search["at_odd_even"])
        return matches

    def place_of_base_name(self, name):
        """Read the original's ``layer0_head1`` or ``layer1``."""
        layer, _, head = name.removeprefix("layer").partition("_head")
        return next(p for p in self.places.values() if p.layer == int(layer) and p.group == (int(head) if head else None))


@pytest.fixture(scope="module", params=CASES)
def golden(request, shared):
    return Golden(shared(f"golden/search/{request.param}"))


def test_the_text_of_tokens(golden):
    texts = [golden.store.vocabulary.text(row).text for row in golden.arrays["tokens"]]
    assert texts == golden.arrays["tokens_text"].tolist()
    for row, ends in zip(golden.arrays["tokens"], golden.arrays["token_byte_pos"], strict=True):
        check_text(golden.store.vocabulary, golden.tokenizer, row)
        assert golden.store.vocabulary.join(row)[1].tolist() == ends.tolist()


def test_matches_and_their_tokens(golden):
    searches = golden.read("searches")
    assert len(searches) == 17
    for search in searches:
        matches = golden.found(search)
        assert np.stack([matches.sequence, matches.start], axis=1).tolist() == search["char_matches"], search["pattern"]
        assert golden.pairs(matches.first) == search["token_pos_exact"], search["pattern"]


def test_counts_of_codes(golden):
    for name, counts in golden.arrays.items():
        if name.startswith("act_count/"):
            place = golden.place_of_base_name(name.removeprefix("act_count/"))
            ours = code_counts(golden.store, place.hook_name, np.zeros(0, np.int64)).activations
            assert ours[place.group or 0].tolist() == counts.tolist()


def test_precision_and_recall(golden):
    """The original asks for a precision above its threshold, and its order of equals is not defined."""
    n_compared = 0
    for search in golden.read("searches"):
        if not search["reference_is_exact"]:
            continue
        matches = golden.found(search)
        for query in search["queries"]:
            assert len(matches.positions()) == query["re_token_matches"]
            for name, wanted in query["codes"].items():
                place = golden.place_of_base_name(name)
                threshold = float(np.nextafter(query["prec_threshold"], 1))
                hits = search_codes(golden.store, matches, sites=str(place), by="precision", min_precision=threshold, n=None)
                got = [(hit.code.code, hit.precision, hit.recall, hit.activations) for hit in hits]
                assert [row[1] for row in got[: query["topk"]]] == pytest.approx([row[1] for row in wanted], abs=1e-12)
                assert {tuple(row) for row in wanted} <= set(got)
                n_compared += len(wanted)
    assert n_compared > 100


def test_whole_tables_of_precision_and_recall(golden):
    for search in golden.read("searches"):
        matches = golden.found(search)
        for key, table in search.get("precision_recall_tables", {}).items():
            hits = search_codes(golden.store, matches, sites=str(golden.places[key]), by="precision", n=None)
            rows = sorted((hit.code.code, hit.precision, hit.recall, hit.activations) for hit in hits)
            assert rows == sorted(zip(*table["with_counts"], strict=True))
            assert [(row[0], row[2]) for row in rows] == sorted(zip(*table["without_counts"][::2], strict=True))


def test_tokens_of_codes(golden):
    """Also with a rank: code 31 as the first of the k, code 32 as one of the first two."""
    spec = golden.read("features_to_tokens")
    place = golden.places[spec["codebook"]]

    def fires(code, n_slots=None):
        ids = golden.store.ids(place.hook_name)[:, place.group or 0, :n_slots]
        return (ids == code).any(-1)

    for code, wanted in enumerate(spec["all"]):
        assert golden.pairs(np.flatnonzero(fires(code))) == wanted
    for n_slots, code in ((1, "31"), (2, "32")):
        wanted = spec["code31_topk1_code32_topk2"][code]
        assert golden.pairs(np.flatnonzero(fires(int(code), n_slots))) == wanted
        counts = code_counts(golden.store, place.hook_name, np.zeros(0, np.int64), n_slots=n_slots)
        assert counts.activations[place.group or 0, int(code)] == len(wanted)


def test_the_best_neuron(golden):
    """The original rounds recall times matches down, where we reach the recall."""
    with np.load(golden.folder / "neurons.npz", allow_pickle=False) as arrays:
        acts = arrays["neuron_acts_by_ex"]
    n_examples, length, n_layers, n_places, n_neurons = acts.shape
    flat = acts.reshape(n_examples * length, n_layers, n_places, n_neurons)
    activations = {f"{layer}.{place}": flat[:, layer, place] for layer in range(n_layers) for place in range(n_places)}
    store, spec = golden.store, golden.read("neurons")
    better = []
    for query, info in zip(spec["queries"], spec["compare"]["infos"], strict=True):
        matches = match_text(store, query["pattern"])
        positions = matches.positions()
        assert len(positions) == query["matches"]
        needed = int(query["recall"] * len(positions))
        hits = [_code_that_finds(golden, needed, len(positions))]
        (row,) = compare_with_neurons(store, matches, activations, hits=hits)
        assert row.neuron_precision == pytest.approx(query["best_prec"], abs=1e-6)
        layer, place, neuron = query["best_neuron_idx"]
        assert row.neuron == f"{layer}.{place}[{neuron}]"
        fires = np.flatnonzero(activations[f"{layer}.{place}"][:, neuron] >= row.threshold)
        assert golden.pairs(fires) == query["best_neuron_acts"]
        better.append(info["prec"] > row.neuron_precision)
    assert np.mean(better) == spec["compare"]["fraction_better"]


def _code_that_finds(golden, hits, occurrences):
    """Make the row of a code with as many hits; its other figures do not reach the neurons."""
    place = next(iter(golden.places.values()))
    label = str(Code(place.layer, place.site, place.group, 0))
    return CodeHit(label, place.layer, place.site, place.group, 0.6, hits / occurrences, 0.0, 0.0, hits, hits, occurrences)


def test_names_of_places(shared):
    """The original's places, layers and heads are ours, by another name; it takes attn_plus_mlp for attn, and qkv for mlp."""
    expected = json.loads((shared("golden/utils/names") / "expected.json").read_text())
    for place, layer, head, key in expected["get_cb_hook_key"]:
        address = Address(layer, SITES[place], head)
        read = re.fullmatch(r"blocks\.(\d+)\.(\w+)\.codebook_layer(?:\.codebook\.(\d+))?\.hook_codebook_ids", key)
        assert [address.layer, address.group] == [int(read[1]), None if read[3] is None else int(read[3])]
        assert codes_hook(address.hook_name).startswith(f"blocks.{layer}.")
    for full, base in expected["convert_to_base_name"]:
        place = place_of(full)
        assert base == f"layer{place.layer}" + ("" if place.group is None else f"_head{place.group}")
    for full, layer_head in expected["get_layer_head_from_adv_name"]:
        assert [place_of(full).layer, place_of(full).group] == layer_head


def test_codes_that_are_written_out(shared):
    expected = json.loads((shared("golden/utils/names") / "expected.json").read_text())
    topic = [info for infos in expected["parse_topic_codes_string"].values() for info in infos]
    written = [(text, info) for text, _, info, _ in expected["CodeInfo.from_str"]]
    written += list(zip(expected["topic_string"].strip().splitlines(), topic, strict=False))
    assert len(written) == 8
    for text, info in written:
        numbers = {name.lower(): int(number) for name, number in re.findall(r"(layer|head|code): (\d+)", text, re.IGNORECASE)}
        code = Code(numbers["layer"], SITES[info["cb_at"]], numbers.get("head"), numbers["code"])
        assert (code.layer, code.group, code.code) == (info["layer"], info["head"], info["code"])
        assert Code.parse(str(code)) == code
