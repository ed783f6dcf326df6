"""The figures of a run as text: beside the published ones, and the story of one forced state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from tl_codebook.experiments.tokfsm import published
from tl_codebook.experiments.tokfsm.concepts import RECALLS
from tl_codebook.experiments.tokfsm.machine import DIGITS

__all__ = [
    "FigureRow",
    "dead_published",
    "demonstration_text",
    "figure_at",
    "figure_notes",
    "figure_rows",
    "figure_table",
    "is_of_the_paper",
    "number_text",
    "percent_text",
    "state_name",
]

_NO_CODES, _ANALYSED = published.MODELS[0], published.MODELS[2]
_LOOSE, _STRICT = RECALLS


class FigureRow(NamedTuple):
    """One line of the table: what it is, and its value in three models; empty where there is none.

    A name with spaces before it says more about the row above.
    """

    name: str
    published: str
    base: str
    codes: str
    better: str
    """``up`` or ``down``; empty where neither is."""


def figure_at(tree: Any, *keys: str) -> Any:
    """Return what stands under the keys of nested dictionaries; None where one is missing, or where it is NaN or infinite.

    >>> figure_at({"codes": {"loss": 1.5}}, "codes", "loss"), figure_at({"codes": {}}, "codes", "loss"), figure_at(float("nan"))
    (1.5, None, None)
    """
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def _best(choose: Callable[[list[float]], float], values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return choose(known) if known else None


def percent_text(value: float | None, digits: int = 2) -> str:
    """Return a share in percent; empty where there is none.

    >>> percent_text(0.25), percent_text(None)
    ('25.00 %', '')
    """
    return "" if value is None else f"{100 * value:.{digits}f} %"


def number_text(value: float | None, digits: int = 3) -> str:
    """Return a number with as many decimals; empty where there is none.

    >>> number_text(0.25), number_text(None)
    ('0.250', '')
    """
    return "" if value is None else f"{value:.{digits}f}"


def _nats(value: float | None) -> str:
    return number_text(value, 4)


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def dead_published() -> str:
    """Return the published shares of dead codes as text.

    >>> dead_published()
    '93.5 to 99.7 %'
    """
    least, greatest = published.DEAD_CODES
    return f"{100 * least:.1f} to {100 * greatest:.1f} %"


def figure_rows(results: Mapping[str, Any]) -> list[FigureRow]:
    """Return the figures of `run_experiment`, each beside the published one (attention + MLP, k=1, 10,000 codes).

    What a run did not measure (the recipe ``paper`` has no model without codes) is left empty.
    """
    codes = results["codes"]
    forced = figure_at(codes, "forcing") or {}
    decode = figure_at(codes, "decode", figure_at(codes, "best_site") or "")

    def both(key: str, show: Callable[[Any], str], name: str, given: str, better: str = "up") -> FigureRow:
        return FigureRow(name, given, show(figure_at(results, "base", key)), show(figure_at(codes, key)), better)

    def alone(name: str, given: str, value: str, better: str = "up") -> FigureRow:
        return FigureRow(name, given, "", value, better)

    def of_codes(floor: str, figure: str) -> str:
        return percent_text(figure_at(codes, "state_codes", floor, figure))

    def of_control(name: str, floor: str) -> str:
        return percent_text(figure_at(codes, "state_codes", "controls", f"{name}, {floor}", "precision"))

    def purest(word: str) -> str:
        return percent_text(_best(max, (figure_at(layer, word, "codes") for layer in (figure_at(codes, "purity") or {}).values())))

    def jsd(label: str, to: str = "machine") -> str:
        return number_text(figure_at(forced, label, f"normalised_{to}"))

    one_mlp = _best(min, (figure_at(forced, label, "normalised_machine") for label in forced if label.endswith(".mlp_out")))
    read_off = f"state read off {'one' if figure_at(results, 'setting', 'k') == 1 else 'the first'} code, best MLP"
    return [
        both("loss", _nats, "loss, nats per token", number_text(_ANALYSED.loss), "down"),
        both("excess", _nats, "loss over Bayes", number_text(_ANALYSED.loss - published.BAYES_LOSS), "down"),
        both("accuracy", percent_text, "accuracy", percent_text(_ANALYSED.accuracy)),
        both("valid_transitions", percent_text, "valid transitions in its text", percent_text(_ANALYSED.valid_transitions)),
        both(
            "first_successors_exact",
            percent_text,
            "states whose successors are exactly the most probable",
            percent_text(published.FIRST_TRANSITION),
        ),
        alone("dead codes, of attainable", dead_published(), percent_text(figure_at(codes, "dead", "share")), "down"),
        alone(f"state codes, precision ({_LOOSE})", percent_text(published.STATE_CODE_PRECISION), of_codes(_LOOSE, "precision")),
        alone("  their recall", "", of_codes(_LOOSE, "recall")),
        alone("  best neuron at the same recall", percent_text(published.STATE_NEURON_PRECISION), of_control("best neuron", _LOOSE), ""),
        alone("  TopK dictionary", "", of_control("TopK dictionary", _LOOSE), ""),
        alone(f"state codes, precision ({_STRICT})", "", of_codes(_STRICT, "precision")),
        alone("  states that have such a code", "", of_codes(_STRICT, "covered")),
        alone("  best neuron at the same recall", "", of_control("best neuron", _STRICT), ""),
        alone("  TopK dictionary", "", of_control("TopK dictionary", _STRICT), ""),
        alone(read_off, "", percent_text(figure_at(decode, "accuracy"))),
        alone("  codes that a state takes there", "", number_text(figure_at(decode, "codes_per_state"), 2), "down"),
        alone("purity, best layer, bigrams", percent_text(max(published.PURITY["bigram"])), purest("bigram")),
        alone("purity, best layer, trigrams", percent_text(max(published.PURITY["trigram"])), purest("trigram")),
        alone("forcing, JSD to the machine (none = 1): all MLP", number_text(published.FORCING["mlp_out"]), jsd("all MLP"), "down"),
        alone("  best single MLP", number_text(published.FORCING["L1.mlp_out"]), number_text(one_mlp), "down"),
        alone("  all sites", number_text(published.FORCING["all"]), jsd("all"), "down"),
        alone("  all MLP, codes of a wrong state", "", jsd("all MLP, wrong")),
        alone("  all MLP, random codes", "", jsd("all MLP, random")),
        alone("forcing, JSD to the model's own (none = 1): all MLP", "", jsd("all MLP", "model"), "down"),
        alone("successors after forcing all MLP", "", percent_text(figure_at(forced, "all MLP", "successor_share"))),
        alone("automaton read from the codes, F1", "", number_text(figure_at(codes, "automaton", "f1"))),
        FigureRow(
            "tokens of training",
            _count(published.TOKENS),
            _count(figure_at(results, "stages", "base", "tokens")),
            _count(figure_at(results, "tokens")),
            "down",
        ),
    ]


def is_of_the_paper(setting: Mapping[str, Any], *, model: bool = False) -> bool:
    """Return whether the machine is the paper's (`TokFSM.paper`), and with `model` whether the model is built as the paper's too."""
    same = [setting[name] for name in ("n_states", "n_edges", "machine_seed", "base")] == [100, 10, 42, 10]
    layers = len(published.PURITY["bigram"])
    return same and (not model or (setting["architecture"], setting["n_layers"]) == ("gpt_neox", layers))


def figure_notes(results: Mapping[str, Any]) -> list[str]:
    """Return what has to be known to compare the figures, a sentence or two each."""
    setting = results["setting"]
    minutes = sum(figure_at(stage, "seconds") or 0 for stage in results["stages"].values()) / 60
    bayes = figure_at(results, "codes", "bayes_loss")
    notes = [
        f"Machine of {setting['n_states']} states, {setting['n_edges']} successors each; model {setting['architecture']}, recipe "
        f"{setting['recipe']}, k={setting['k']}, seed {results['seed']}; trained in {minutes:.1f} minutes."
        + (f" The best possible loss is {bayes:.4f}." if bayes is not None else "")
    ]
    if is_of_the_paper(setting):
        notes.append(
            f"The published model without codes: loss {_NO_CODES.loss:.3f}, accuracy {percent_text(_NO_CODES.accuracy)}, "
            f"valid transitions {percent_text(_NO_CODES.valid_transitions)}. Published models are gpt_neox."
        )
    else:
        notes.append("Published figures are those of another machine, the paper's (100 states, 10 successors, seed 42): --preset paper.")
    return notes


def figure_table(results: Mapping[str, Any]) -> str:
    """Return the figures as a table in plain text."""
    head = FigureRow("", "published", "no codes", "codes", "")
    rows = [head, *figure_rows(results)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2, 3))]).rstrip() for row in rows]
    lines.insert(1, "-" * max(len(line) for line in lines))
    return "\n".join([*lines, "", *figure_notes(results)])


def state_name(setting: Mapping[str, Any], state: int) -> str:
    """Return a state as the machine writes it: in its base, with as many digits as the largest state needs.

    >>> state_name({"n_states": 100, "base": 10}, 7), state_name({"n_states": 5, "base": 2}, 3)
    ('07', '011')
    """
    base, text, largest = setting["base"], "", setting["n_states"] - 1
    while largest or not text:
        text = DIGITS[state % base] + text
        state, largest = state // base, largest // base
    return text


def demonstration_text(results: Mapping[str, Any], n_shown: int = 6) -> str:
    """Return what comes after one state, and what after the codes of another are forced there.

    Args:
        results: Of `run_experiment`.
        n_shown: States to show of a distribution, the most probable first.
    """
    story = results["codes"]["demonstration"]

    def name(state: int) -> str:
        return state_name(results["setting"], state)

    def line(probabilities: list[float | None]) -> str:
        known = [(value, state) for state, value in enumerate(map(figure_at, probabilities)) if value is not None]
        order = sorted(known, key=lambda pair: (-pair[0], pair[1]))[:n_shown]
        return "  ".join(f"{name(state)} {100 * value:.1f} %" for value, state in order)

    def states(values: list[int]) -> str:
        return " ".join(name(state) for state in values)

    after = states(story["successors_of_forced"])
    codes = ", ".join(f"{site}:{'+'.join(map(str, ids))}" for site, ids in story["codes"].items())
    return "\n".join(
        [
            f"After state {name(story['state'])} the machine goes to {states(story['successors_of_state'])}.",
            f"  the model says         {line(story['before'])}",
            f"With the codes of state {name(story['forced'])} forced ({codes}), whose successors are {after}:",
            f"  the model says         {line(story['after'])}",
        ]
    )
