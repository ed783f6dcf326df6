"""Co-activation graphs against counting by hand, pair by pair."""

import itertools
import math

import networkx as nx
import numpy as np
import pytest

from tests.unit.stored_codes import StoredCodes
from tests.unit.test_graph_statistics import adjusted, exact_tail
from tl_codebook.errors import ConfigError, DataError, UnknownHookError
from tl_codebook.graphs import coactivation_graph
from tl_codebook.graphs.order import fires_before, in_order
from tl_codebook.names import Code

Z, OUT, LATE = "blocks.0.attn.hook_z", "blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"
N_CODES = {Z: 5, OUT: 7, LATE: 6}


def make_store(n=300, seed=0, lengths=(120, 1, 80, 99), special=(0, 120, 121, 201, 250)):
    """Codes of three sites, of which some follow others; with empty slots, repeats within a position, two groups at z."""
    rng = np.random.default_rng(seed)
    z = rng.integers(0, 5, (n, 2, 2))
    out = rng.integers(0, 7, (n, 1, 3))
    late = rng.integers(0, 6, (n, 1, 2))
    out[:, 0, 0] = np.where(rng.random(n) < 0.6, z[:, 1, 0], out[:, 0, 0])
    late[1:, 0, 0] = np.where(rng.random(n - 1) < 0.6, out[:-1, 0, 0] % 6, late[1:, 0, 0])
    out[rng.random(out.shape) < 0.1] = -1
    return StoredCodes({Z: z, OUT: out, LATE: late}, N_CODES, lengths, special)


def tokens_of(store, name):
    """Every (group, code) of each position, as a set."""
    ids = store.ids(name)
    return [{(g, int(c)) for g in range(ids.shape[1]) for c in ids[t, g] if c < N_CODES[name]} for t in range(store.n_tokens)]


def by_hand(store, pairs, lag, least):
    """Every pair of codes of these sites with its counts and p-value, and the number of tests."""
    ends = np.cumsum(store.lengths)
    starts = [
        t
        for t in range(store.n_tokens - lag)
        if not store.special[t] and not store.special[t + lag] and not any(t < end <= t + lag for end in ends)
    ]
    found, n_tests = {}, 0
    for a, b in pairs:
        first, then = tokens_of(store, a), tokens_of(store, b)
        for x, y in itertools.product(np.ndindex(len(store.ids(a)[0]), N_CODES[a]), np.ndindex(len(store.ids(b)[0]), N_CODES[b])):
            n_x, n_y = sum(x in first[t] for t in starts), sum(y in then[t + lag] for t in starts)
            both = sum(x in first[t] and y in then[t + lag] for t in starts)
            n_tests += n_x >= least and n_y >= least
            if both >= least:
                found[(a, *x), (b, *y)] = (both, n_x, n_y, exact_tail(both, n_x, n_y, len(starts)))
    return found, n_tests, len(starts)


def label(end):
    name, group, code = end
    return Code(None, name, group if name == Z else None, code)


@pytest.mark.parametrize(("lag", "least"), [(0, 1), (0, 25), (1, 1), (1, 12), (3, 5), (90, 2)])
def test_every_pair_is_counted_as_by_hand(lag, least):
    store = make_store()
    pairs = [(Z, OUT), (Z, LATE), (OUT, LATE)]
    expected, n_tests, n_places = by_hand(store, pairs, lag, least)
    graph = coactivation_graph(store, lag=lag, min_count=least, fdr=1, progress=False)
    q_values = adjusted([row[3] for row in expected.values()], n_tests)
    assert {(label(a), label(b)) for a, b in expected} == set(graph.edges)
    assert (graph.graph["n_tests"], graph.graph["n_places"]) == (n_tests, n_places)
    for ((a, b), (both, n_a, n_b, p)), q in zip(expected.items(), q_values, strict=True):
        edge = graph.edges[label(a), label(b)]
        assert (edge["count"], edge["earlier_count"], edge["later_count"]) == (both, n_a, n_b)
        assert edge["expected"] == pytest.approx(n_a * n_b / n_places)
        assert edge["p_value"] == pytest.approx(p, rel=1e-9)
        assert edge["q_value"] == pytest.approx(q, rel=1e-9)
        pmi = math.log(both * n_places / (n_a * n_b))
        assert edge["weight"] == pytest.approx(pmi / -math.log(both / n_places) if both < n_places else 1.0)


def test_fdr_keeps_what_the_procedure_keeps():
    store = make_store(900, lengths=(900,))
    expected, n_tests, _ = by_hand(store, [(Z, OUT), (Z, LATE), (OUT, LATE)], 0, 1)
    q_values = adjusted([row[3] for row in expected.values()], n_tests)
    kept = {(label(a), label(b)) for (a, b), q in zip(expected, q_values, strict=True) if q <= 0.05}
    graph = coactivation_graph(store, min_count=1, fdr=0.05, progress=False)
    assert set(graph.edges) == kept
    assert 0 < len(kept) < len(expected)
    assert {str(code) for code in graph} == {str(code) for edge in kept for code in edge}  # no code without an edge
    # What was planted is found: z of head 1 writes the code of mlp_out.
    assert {(Code(0, "z", 1, c), Code(0, "mlp_out", None, c)) for c in range(5)} <= kept
    assert graph.graph["n_significant"] == len(kept)


def test_chance_alone_gives_hardly_an_edge():
    rng = np.random.default_rng(3)
    store = StoredCodes({OUT: rng.integers(0, 40, (4000, 1, 2)), LATE: rng.integers(0, 40, (4000, 1, 2))}, 40)
    graph = coactivation_graph(store, min_count=1, fdr=0.05, progress=False)
    assert graph.graph["n_tests"] == 1600
    assert graph.number_of_edges() <= 2


def test_the_lag_goes_forward_in_time_and_never_across_sequences():
    out, late = np.full((8, 1, 1), -1), np.full((8, 1, 1), -1)
    out[[0, 3, 6], 0, 0] = 2
    late[[1, 4, 7], 0, 0] = 5  # one after each; the second pair lies across two sequences
    store = StoredCodes({LATE: late, OUT: out}, N_CODES | {OUT: 7, LATE: 6}, lengths=[4, 4])
    graph = coactivation_graph(store, lag=1, min_count=1, fdr=1, progress=False)
    (edge,) = graph.edges(data=True)
    assert (str(edge[0]), str(edge[1]), edge[2]["count"], edge[2]["earlier_count"]) == ("L0.mlp_out:2", "L1.mlp_out:5", 2, 2)
    assert (edge[2]["later_count"], graph.graph["n_places"]) == (2, 6)
    assert coactivation_graph(store, lag=0, min_count=1, fdr=1, progress=False).number_of_edges() == 0
    assert coactivation_graph(store, lag=2, min_count=1, fdr=1, progress=False).number_of_edges() == 0
    assert graph.nodes[edge[0]] == {"count": 3, "frequency": 3 / 8}


def test_special_tokens_are_no_text_on_either_end():
    out, late = np.full((6, 1, 1), 1), np.full((6, 1, 1), 2)
    store = StoredCodes({OUT: out, LATE: late}, {OUT: 7, LATE: 6}, special=[0, 3])
    counted = {lag: coactivation_graph(store, lag=lag, min_count=1, fdr=1, progress=False) for lag in (0, 1)}
    assert [graph.graph["n_places"] for graph in counted.values()] == [4, 2]  # 1 2 4 5; 1-2 4-5
    for graph in counted.values():
        ((_, _, edge),) = graph.edges(data=True)
        assert (edge["count"], edge["weight"], edge["p_value"]) == (graph.graph["n_places"], 1.0, 1.0)
        assert {own["count"] for _, own in graph.nodes(data=True)} == {4}


def test_sites_are_chosen_by_any_of_their_names_and_put_in_order():
    store = make_store()
    for sites in ([LATE, Z], ["L1.mlp_out", "z"], ("z", LATE)):
        graph = coactivation_graph(store, sites, min_count=1, fdr=1, progress=False)
        assert graph.graph["sites"] == [Z, LATE]
        assert {(a.hook_name, b.hook_name) for a, b in graph.edges} == {(Z, LATE)}
    every = coactivation_graph(store, min_count=1, fdr=1, progress=False)
    assert {(a.hook_name, b.hook_name) for a, b in every.edges} == {(Z, OUT), (Z, LATE), (OUT, LATE)}
    assert nx.is_directed_acyclic_graph(every)


def test_only_the_strongest_edges_on_request():
    store = make_store()
    every = coactivation_graph(store, min_count=1, fdr=1, statistic="lift", progress=False)
    few = coactivation_graph(store, min_count=1, fdr=1, statistic="lift", max_edges=7, progress=False)
    weights = sorted((weight for *_, weight in every.edges(data="weight")), reverse=True)
    assert sorted((weight for *_, weight in few.edges(data="weight")), reverse=True) == weights[:7]
    assert few.graph["n_significant"] == every.number_of_edges()


def test_pairs_tested_a_few_at_a_time_give_the_same_graph(monkeypatch):
    store = make_store()
    whole = coactivation_graph(store, min_count=1, fdr=0.2, progress=False)
    monkeypatch.setattr("tl_codebook.graphs.coactivation._PAIRS_AT_ONCE", 5)
    parts = coactivation_graph(store, min_count=1, fdr=0.2, progress=False)
    assert nx.utils.graphs_equal(whole, parts)
    assert whole.number_of_edges() > 0


def test_more_than_fits_the_memory_is_refused(monkeypatch):
    store = make_store()
    n = coactivation_graph(store, min_count=1, fdr=1, progress=False).number_of_edges()
    monkeypatch.setattr("tl_codebook.graphs.coactivation._MOST_EDGES", n - 1)
    with pytest.raises(ConfigError, match=rf"^{n} pairs of codes .* Keep the strongest with max_edges= \(at most {n - 1}\)"):
        coactivation_graph(store, min_count=1, fdr=1, progress=False)
    assert coactivation_graph(store, min_count=1, fdr=1, max_edges=n - 1, progress=False).number_of_edges() == n - 1
    monkeypatch.setattr("tl_codebook.graphs.coactivation._PAIRS_AT_ONCE", 5)
    monkeypatch.setattr("tl_codebook.graphs.coactivation._MOST_PAIRS", 20)
    with pytest.raises(ConfigError, match=r"more than 20 pairs of codes .* Give fewer sites, a larger min_count, or a smaller fdr"):
        coactivation_graph(store, min_count=1, fdr=1, progress=False)


@pytest.mark.parametrize("statistic", ["lift", "jaccard", "mi", "cond_prob"])
def test_the_weight_is_the_statistic_asked_for(statistic):
    graph = coactivation_graph(make_store(), [OUT, LATE], lag=1, min_count=1, fdr=1, statistic=statistic, progress=False)
    n = graph.graph["n_places"]
    for _, _, edge in graph.edges(data=True):
        both, a, b = edge["count"], edge["earlier_count"], edge["later_count"]
        if statistic == "mi":
            cells = [(both, a, b), (a - both, a, n - b), (b - both, n - a, b), (n - a - b + both, n - a, n - b)]
            expected = sum(x / n * math.log2(x * n / (p * q)) for x, p, q in cells if x)
        else:
            expected = {"lift": both * n / a / b, "jaccard": both / (a + b - both), "cond_prob": both / a}[statistic]
        assert edge["weight"] == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lag": -1}, "lag=-1 was asked for. Give a whole number >= 0"),
        ({"lag": 1.0}, "lag=1.0 was asked for"),
        ({"min_count": 0}, "min_count=0 was asked for. Give a whole number >= 1"),
        ({"fdr": 0}, "fdr=0 was asked for. Give a share above 0 and at most 1"),
        ({"fdr": 1.01}, "fdr=1.01 was asked for"),
        ({"fdr": float("nan")}, "fdr=nan was asked for"),
        ({"fdr": True}, "fdr=True was asked for"),
        ({"max_edges": 0}, "max_edges=0 was asked for"),
        ({"statistic": "pmi"}, r"statistic='pmi' was asked for. Did you mean 'npmi'"),
        ({"sites": [OUT]}, f"sites {OUT} were asked for, of which none follows another. Give two or more that do"),
        ({"sites": []}, "an empty list of sites"),
    ],
)
def test_options_out_of_range_are_refused(unchecked, options, message):
    with pytest.raises(ConfigError, match=message):
        coactivation_graph(make_store(), **options, progress=False)


def test_an_address_with_a_group_means_the_codes_of_that_group_alone():
    store = make_store()
    whole = coactivation_graph(store, [Z, OUT], min_count=1, fdr=1, progress=False)
    assert whole.graph["addresses"] == ["L0.z", "L0.mlp_out"]
    part = coactivation_graph(store, ["L0.z.1", OUT], min_count=1, fdr=1, progress=False)
    assert (part.graph["addresses"], part.graph["sites"]) == (["L0.z.1", "L0.mlp_out"], [Z, OUT])
    of_group = {(a, b) for a, b in whole.edges if a.group == 1}
    assert 0 < len(of_group) < whole.number_of_edges()
    assert set(part.edges) == of_group
    assert {end.group for edge in part.edges for end in edge} == {1, None}
    assert all(part.edges[edge]["p_value"] == whole.edges[edge]["p_value"] for edge in part.edges)
    # The tests of the other group are not made, and do not count in the q-values. Every code fires.
    assert (whole.graph["n_tests"], part.graph["n_tests"]) == (2 * 5 * 7, 5 * 7)
    later = coactivation_graph(store, ["L0.mlp_out", "L0.z.0", "L1.mlp_out"], lag=1, min_count=1, fdr=1, progress=False)
    assert {code.group for code in later if code.site == "z"} == {0}
    with pytest.raises(UnknownHookError, match=r"the store has no codes of 'L0.z.2'. .*L0.z has 2 groups, 0 to 1"):
        coactivation_graph(store, ["L0.z.2", OUT])
    with pytest.raises(ConfigError, match="of which none follows another"):
        coactivation_graph(store, ["L0.z.0", "L0.z.1"])


def test_a_site_without_codes_and_a_lag_that_is_too_long_are_refused():
    store = make_store()
    with pytest.raises(
        UnknownHookError, match=r"no codes of 'blocks.1.hook_mlp_ou'. Did you mean .*It has codes of: L0.z, L0.mlp_out, L1.mlp_out"
    ):
        coactivation_graph(store, [Z, "blocks.1.hook_mlp_ou"])
    with pytest.raises(UnknownHookError, match=r"the store has no codes of 'L3.mlp_out'"):
        coactivation_graph(store, [Z, "L3.mlp_out"])
    for lag in (120, 10_000):
        with pytest.raises(DataError, match=rf"lag={lag} was asked for, but no sequence of the store has two tokens of text so far apart"):
            coactivation_graph(store, lag=lag, progress=False)


def test_q_k_and_v_do_not_follow_each_other():
    q, k, v = (f"blocks.0.attn.hook_{name}" for name in "qkv")
    store = StoredCodes(dict.fromkeys((k, v, q), np.zeros((4, 1, 1), int)), 2)
    with pytest.raises(ConfigError, match=r"of which none follows another"):
        coactivation_graph(store)
    assert not fires_before(q, v)
    assert fires_before(v, Z)


def test_the_order_of_a_pass():
    order = ["hook_embed", "blocks.0.hook_resid_pre", "blocks.0.attn.hook_q", Z, "blocks.0.hook_attn_out", "blocks.0.hook_resid_mid"]
    order += ["blocks.0.mlp.hook_pre", "blocks.0.mlp.hook_post", OUT, "blocks.0.hook_resid_delta", "blocks.0.hook_resid_post"]
    order += ["blocks.1.attn.hook_v", "blocks.2.hook_mlp_out", "blocks.10.attn.hook_q", "ln_final.hook_normalized"]
    assert in_order(reversed(order)) == order
    assert all(fires_before(a, b) and not fires_before(b, a) for a, b in itertools.combinations(order, 2))
    with pytest.raises(ConfigError, match=r"nobody knows when 'blocks.0.hook_novel' runs among the other sites"):
        in_order(["blocks.0.hook_novel"])


def test_wide_codebooks_take_no_memory_of_their_product():
    import tracemalloc

    rng = np.random.default_rng(0)
    n = 3_000
    store = StoredCodes({name: rng.integers(0, n, (10_000, 1, 2)) for name in (OUT, LATE)}, n)
    store.counts(OUT), store.counts(LATE)
    tracemalloc.start()
    coactivation_graph(store, min_count=3, progress=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6  # a table of single bytes would take 9 MB
