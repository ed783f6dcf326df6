"""The report of a run: one HTML file that tells what was measured, how, beside what was published, and how to do it again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tl_codebook import files
from tl_codebook.experiments.tokfsm import published
from tl_codebook.experiments.tokfsm.charts import DASH, Bar, bar_chart, column_chart, escape
from tl_codebook.experiments.tokfsm.concepts import RECALLS
from tl_codebook.experiments.tokfsm.page import figure, lines, page, table
from tl_codebook.experiments.tokfsm.setting import OPTIONS, RECIPES, TokFSMSetting
from tl_codebook.experiments.tokfsm.tables import (
    dead_published,
    demonstration_text,
    figure_at,
    figure_notes,
    figure_rows,
    is_of_the_paper,
    number_text,
    percent_text,
    state_name,
)

__all__ = ["REPORT", "command_line", "write_report"]

REPORT = "report.html"
_SETS = {"all attention": "z", "all MLP": "mlp_out", "all": "all"}
"""The published name of each set of sites."""
_FLOORS = dict(zip(RECALLS, ("recall above 1 % (the paper's floor)", "recall of 95 % or more"), strict=True))
_MARK = (
    '<span class="legend"><svg role="img" aria-label="mark" viewBox="0 0 18 16"><path class="published" d="M9 1v14m-4 -14h8l-4 5z"/></svg>'
    " published value, k = 1</span>"
)
_OTHER = "The published values are those of another machine or model, and are not marked here."


def write_report(results: Mapping[str, Any], path: Path) -> None:
    """Write the results of `run_experiment` as one HTML file, in one step: no script, no network, everything escaped.

    Raises:
        CheckpointError: the file cannot be written; what was there before is untouched.
    """
    setting = results["setting"]
    title = f"TokFSM: codes of a machine of {setting['n_states']} states, {setting['n_edges']} successors each"
    body = [f"<h1>{escape(title)}</h1>", *_head(results), *_figures(results), *_forcing(results), *_demonstration(results)]
    body += [*_states(results), *_purity(results), *_usage(results), *_end(results)]
    files.replace_text(path, page(title, body))


def command_line(results: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """Return the command that runs the experiment again, and the fields of its setting that no option gives.

    The command is None where the setting is of no preset; then all of its fields are given.

    >>> command_line({"setting": TokFSMSetting.mini(code_steps=900, n_heads=4).to_dict(), "seed": 3})
    ('tl-codebook tokfsm --preset mini --seed 3 --code_steps 900', {'n_heads': 4})
    """
    setting = _plain(results["setting"])
    if setting["name"] not in ("mini", "paper"):
        return None, setting
    recipe = {"recipe": setting["recipe"]} if setting.get("recipe") in RECIPES else {}
    preset = _plain(TokFSMSetting.preset(setting["name"], **recipe).to_dict() | {"recipe": RECIPES[0]})
    changed = {name: value for name, value in setting.items() if name not in preset or preset[name] != value}
    words = ["tl-codebook", "tokfsm", "--preset", setting["name"], "--seed", str(results["seed"])]
    for name in (name for name in OPTIONS if name in changed):
        value = changed.pop(name)
        words += [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    words += ["--host", str(results["host"])] if results.get("host") else []
    return shlex.join(words), changed


def _plain(value: Any) -> Any:
    """Return nested values as JSON gives them back, with None for what is no finite number."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return figure_at(value)


def _number(value: float | None, digits: int = 3) -> str:
    return number_text(value, digits) or DASH


def _percent(value: float | None, digits: int = 1) -> str:
    return percent_text(value, digits) or DASH


def _list(pairs: Mapping[str, str], style: str = "") -> str:
    """Return names and values; the values are HTML already."""
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{value}</dd></div>" for name, value in pairs.items())
    return f'<dl class="{style}">{items}</dl>' if style else f"<dl>{items}</dl>"


def _head(results: Mapping[str, Any]) -> list[str]:
    setting, codes, where = results["setting"], results["codes"], results.get("where") or {}
    analysed = published.MODELS[2]
    forced = figure_at(codes, "forcing", "all MLP", "normalised_machine")
    strict = figure_at(codes, "state_codes", "recall >= 95 %", "precision")
    given = "published" if is_of_the_paper(setting) else "the paper's, on its machine:"

    def key(value: str, beside: str) -> str:
        return f"{escape(value)}<small>{escape(beside)}</small>"

    keys = {
        "loss over the best possible": key(
            _number(figure_at(codes, "excess"), 4), f"nats per token; {given} {analysed.loss - published.BAYES_LOSS:.3f}"
        ),
        "valid transitions in its text": key(
            _percent(figure_at(codes, "valid_transitions"), 2), f"{given} {_percent(analysed.valid_transitions, 2)}"
        ),
        "precision of state codes": key(_percent(strict, 2), "at a recall of 95 % or more; none published"),
        "forcing a state at all MLPs": key(_number(forced), f"JSD to the machine, 1 = no effect; {given} {published.FORCING['mlp_out']}"),
    }
    facts = {
        "recipe": setting["recipe"],
        "codes a position (k)": setting["k"],
        "seed": results["seed"],
        "layers, width, heads": f"{setting['n_layers']}, {setting['d_model']}, {setting['n_heads']}",
        "codes of each head, by layer": ", ".join(map(str, setting["z_codes"])),
        "codes of each MLP, by layer": ", ".join(map(str, setting["mlp_codes"])),
        "commit": where.get("commit"),
        "run on": where.get("cpu") if where.get("device") in (None, "cpu") else where.get("device"),
        "cores, threads": f"{escape(where.get('cores'))}, {escape(where.get('threads'))}",
    }
    named = {"python": "Python", "torch": "PyTorch", "transformer_lens": "TransformerLens", "tl_codebook": "tl-codebook", "cuda": "CUDA"}
    facts["versions"] = ", ".join(f"{name} {where[entry]}" for entry, name in named.items() if where.get(entry)) or None
    for stage, took in results["stages"].items():
        seconds = figure_at(took, "seconds")
        facts[f"training: {stage}"] = (
            f"{took['steps']:,} steps, {took['tokens']:,} tokens, {DASH if seconds is None else f'{seconds / 60:.1f}'} min"
        )
    command, others = command_line(results)
    load = "load the setting from the raw results below with <code>TokFSMSetting.from_dict</code> and call <code>run_experiment</code>"
    if command is None:
        again = f"<p>To run it again: it is no preset of the command line; {load}.</p>"
    else:
        again = f"<p>To run it again:</p>{lines(command)}"
    if command is not None and others:
        differing = ", ".join(f"{name}={json.dumps(value)}" for name, value in others.items())
        again += f"<p>This run differs from the preset in what no option changes, too ({escape(differing)}). For the same, {load}.</p>"
    return [
        f'<p class="lead">Setting {escape(setting["name"])}. A transformer reads the walks of a finite state machine, digit by digit, and '
        "passes every attention head and MLP through a codebook. The machine is known exactly, so what the codes mean can be checked.</p>",
        _list(keys, "key"),
        _list({name: escape(value) for name, value in facts.items()}),
        again,
    ]


def _figures(results: Mapping[str, Any]) -> list[str]:
    caption = "Figures on held-out text: the published model with codes, ours without, ours with codes"
    arrows = {"up": "\u00a0↑", "down": "\u00a0↓", "": ""}
    rows = [(row.name + arrows[row.better], row.published, row.base, row.codes) for row in figure_rows(results)]
    return [
        "<h2>All figures</h2>",
        table(caption, ("figure", "published", "no codes", "codes"), rows),
        '<p class="note">↑ higher is better, ↓ lower is better. Published: attention and MLP, k = 1, 10,000 codes '
        "(Tamkin et al. 2023).</p>",
        *(f'<p class="note">{escape(note)}</p>' for note in figure_notes(results)),
    ]


def _forcing(results: Mapping[str, Any]) -> list[str]:
    forced = figure_at(results, "codes", "forcing") or {}
    apt = is_of_the_paper(results["setting"], model=True)
    rows: list[Bar | str] = []
    groups: dict[str, list[Bar]] = {"one site": [], "several sites": [], "controls: codes of a wrong state, random codes": []}
    for label, values in forced.items():
        if label == "none":
            continue
        value, control = figure_at(values, "normalised_machine"), label.endswith((", wrong", ", random"))
        group = list(groups)[2 if control else 1 if label in _SETS else 0]
        given = published.FORCING.get(_SETS.get(label, label)) if apt else None
        groups[group].append(Bar(label, value, _number(value), "control" if control else "own", given))
    for name, bars in groups.items():
        rows += [name, *bars] if bars else []
    chart = bar_chart("Normalised Jensen-Shannon divergence after forcing a state", rows, reference=(1.0, "nothing forced"))
    raw = figure_at(forced, "none", "jsd_machine")
    n_rows = figure_at(forced, "none", "n_rows")
    caption = [
        "Does the model go on as if it had read another state than it did?",
        f"In {escape(n_rows)} walks of the machine, at the last digit of the last state, the codes at the named sites are replaced by "
        "those that most often stand for another state, the target. The bar is the Jensen-Shannon divergence of the model's next digit "
        f"from the machine's after the target, divided by what it is with nothing forced ({_number(raw, 4)} nats).",
        "0 would be perfect: the model does as the machine does. 1: no effect. The dashed controls should stay near 1 or above it.",
        _MARK if apt else _OTHER,
    ]
    keys = ("jsd_machine", "normalised_machine", "jsd_model", "normalised_model")
    numbers = [
        (label, *(_number(figure_at(values, key), 4) for key in keys), _percent(figure_at(values, "successor_share")))
        for label, values in forced.items()
    ]
    head = ("forced at", "JSD to the machine, nats", "normalised", "JSD to the model's own, nats", "normalised", "successors right")
    about = "Forcing: divergence from the machine after the target, and from the model itself where it has read the target"
    return [
        "<h2>Forcing a state</h2>",
        figure(chart, caption),
        f"<details><summary>All numbers of forcing</summary>{table(about, head, numbers)}</details>",
    ]


def _demonstration(results: Mapping[str, Any]) -> list[str]:
    story, setting = figure_at(results, "codes", "demonstration"), results["setting"]
    if not story:
        return []
    n_states = setting["n_states"]
    names = [state_name(setting, state) for state in range(n_states)]
    source, target = names[story["state"]], names[story["forced"]]
    after_source, after_target = set(story["successors_of_state"]), set(story["successors_of_forced"])

    def of_machine(successors: set[int]) -> list[float | None]:
        return [1 / len(successors) if state in successors else 0.0 for state in range(n_states)]

    panels = [
        (f"The machine, after state {source}", of_machine(after_source), after_source, "second"),
        (f"The model, after state {source}", story["before"], after_source, "own"),
        (f"The model, after state {source}, with the codes of state {target} forced", story["after"], after_target, "own"),
        (f"The machine, after state {target}", of_machine(after_target), after_target, "second"),
    ]
    largest = max((value for panel in panels for value in panel[1] if figure_at(value) is not None), default=1.0)
    top = next((end for end in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8) if largest <= end), 1.0)
    charts = []
    for name, values, marks, kind in panels:
        chart = column_chart(name, values, names, top=top, marked=marks, kind=kind)
        charts.append(f'<div class="panel"><h3>{escape(name)}</h3>{chart}</div>')
    caption = [
        f"One state in full: the text has state {source}, and at its last digit the codes of state {target} are put at every site; at the "
        f"digits of the next state those that they have after state {target}.",
        "Each bar is the probability of a next state. Triangles stand below the successors that the machine has: all of them are equally "
        "probable, and no other state can follow. Perfect: the third picture is the fourth. Before forcing, the second is the first.",
        "One pair of states, chosen before the run; the averages over all states are above.",
    ]
    return [
        "<h2>One state forced</h2>",
        figure("".join(charts), caption),
        lines(demonstration_text(results)),
    ]


def _states(results: Mapping[str, Any]) -> list[str]:
    found = figure_at(results, "codes", "state_codes") or {}
    apt = is_of_the_paper(results["setting"])
    rows: list[Bar | str] = []
    for floor, name in _FLOORS.items():
        rows.append(name)
        given = {"code": published.STATE_CODE_PRECISION, "neuron": published.STATE_NEURON_PRECISION} if apt and "> 1 %" in floor else {}
        for label, kind, scores in (
            ("best code", "own", figure_at(found, floor)),
            ("best neuron", "control", figure_at(found, "controls", f"best neuron, {floor}")),
            ("TopK dictionary", "control", figure_at(found, "controls", f"TopK dictionary, {floor}")),
        ):
            value, recall = figure_at(scores, "precision"), figure_at(scores, "recall")
            bar = Bar(label, value, _percent(value), kind, given.get(label.split()[-1]), f"recall {_percent(recall)}")
            rows.append(bar)
    neurons = figure_at(found, "controls", "neurons")
    caption = [
        "Is there a code that fires where the machine is in a state, and nowhere else?",
        "For each state the code of an MLP site with the best precision (hits of all firings) is chosen on half of the held-out text, "
        "among those above the floor of recall (hits of all occurrences), and scored on the other half. The bar is the mean over all "
        "states; a state without such a code counts 0.",
        f"Beside it, the best of {escape(neurons)} neurons, its threshold set for the code's recall, and the best "
        "latent of a TopK dictionary with as many latents and the same k, trained on the same activations. Perfect: 100 %.",
        _MARK if apt else _OTHER,
    ]
    decode = figure_at(results, "codes", "decode") or {}
    single = results["setting"]["k"] == 1
    told = [
        (site, _number(figure_at(value, "codes_per_state"), 2), _percent(figure_at(value, "accuracy"), 2)) for site, value in decode.items()
    ]
    read = (
        "Reading the state off the one code, at the last digit" if single else "The best code of a state, by site: precision times recall"
    )
    edges = figure_at(results, "codes", "automaton") or {}
    numbers = {name: _percent(figure_at(edges, name), 2) for name in ("precision", "recall")}
    return [
        "<h2>Codes of states</h2>",
        figure(bar_chart("Precision of what stands for a state, mean over states", rows, percent=True), caption),
        table(read, ("site", "codes a state takes", "accuracy" if single else "precision times recall"), told),
        '<p class="note">Codes a state takes: how many cover 95 % of its occurrences, mean over states; 1 would be perfect.</p>',
        f'<p class="note">The machine read back from the codes of {escape(edges.get("site"))} alone: of the edges found '
        f"{numbers['precision']} exist, of those that exist {numbers['recall']} were found (F1 {_number(figure_at(edges, 'f1'))}; 1 would "
        "be the whole machine).</p>",
    ]


def _purity(results: Mapping[str, Any]) -> list[str]:
    layers = figure_at(results, "codes", "purity") or {}
    apt = is_of_the_paper(results["setting"], model=True)
    rows: list[Bar | str] = []
    for layer, (site, words) in enumerate(layers.items()):
        rows.append(site)
        for word, kind in (("bigram", "own"), ("trigram", "second")):
            value = figure_at(words, word, "codes")
            note = f"{escape(figure_at(words, word, 'n_codes'))} codes in use for {escape(figure_at(words, word, 'n_inputs'))} inputs"
            rows.append(Bar(f"{word}s", value, _percent(value), kind, published.PURITY[word][layer] if apt else None, note))
    caption = [
        "How many codes stand for one thing only?",
        "The model reads each state (a bigram where states have two digits), and each state with each digit that can follow (a trigram), "
        "from the beginning of a text. The bar is the share of the codes in use at the last digit that stand for exactly one "
        "of these inputs.",
        "Perfect: 100 %. In a gpt_neox the first MLP sees only the last digit, which many states share, and 0 is what it can do.",
        _MARK if apt else _OTHER,
    ]
    return ["<h2>Purity by layer</h2>", figure(bar_chart("Codes that stand for exactly one input", rows, percent=True), caption)]


def _usage(results: Mapping[str, Any]) -> list[str]:
    dead = figure_at(results, "codes", "dead") or {}
    rows: list[Bar | str] = []
    for site, figures in (figure_at(dead, "sites") or {}).items():
        many = len(figures["used"]) > 1
        for group, (used, attainable, perplexity) in enumerate(
            zip(figures["used"], figures["attainable"], figures["perplexity"], strict=True)
        ):
            value = used / attainable if attainable else None
            note = f"perplexity {_number(figure_at(perplexity), 1)}"
            rows.append(Bar(f"{site} head {group}" if many else site, value, f"{used:,} of {attainable:,}", note=note))
    caption = [
        "How many codes are used, of those that could be?",
        "A code counts as in use where it fires on the held-out text. Attainable is the number of different inputs that reach the codebook "
        "there, at most the number of its codes: the first MLP of a gpt_neox sees a handful of digits, and no more codes than that "
        "can fire. The bar is the share in use. Perfect: every bar full; with several codes a position it can pass 100 %.",
        f"In all, {escape(dead.get('used'))} of {escape(dead.get('attainable'))} attainable codes are in use; "
        f"{_percent(figure_at(dead, 'share'))} are dead. Published: {dead_published()} of all codes dead, by layer.",
    ]
    chart = bar_chart("Codes in use, of those attainable", rows, percent=True)
    return ["<h2>Codes in use</h2>", figure(chart, caption)]


def _end(results: Mapping[str, Any]) -> list[str]:
    raw = json.dumps(_plain(results), indent=2)
    return [
        "<h2>Sources and raw results</h2>",
        "<p>A. Tamkin, M. Taufeeque, N. D. Goodman: Codebook Features: Sparse and Discrete Interpretability for Neural Networks, 2023, "
        "arXiv:2310.17230, section 3 (the machine, loss, state codes and neurons). Purity and forcing: the TokFSM tutorial of "
        "codebook-features 0.1.2. Jensen-Shannon divergence: J. Lin, 1991.</p>",
        f"<details><summary>Raw results (JSON)</summary>{lines(raw)}</details>",
    ]
