"""Every figure of the experiment, of one model, in one nested dictionary of JSON values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_codebook.attachment import sites
from tl_codebook.contexts import count_usage
from tl_codebook.experiments.tokfsm.automaton import majority_states, read_automaton, score_edges
from tl_codebook.experiments.tokfsm.concepts import (
    RECALLS,
    ChosenCodes,
    CodeTable,
    LabelScores,
    choose_codes,
    code_table,
    codes_per_concept,
    decode_accuracy,
    purity,
    score_codes,
    state_labels,
)
from tl_codebook.experiments.tokfsm.dictionary import train_topk_dictionary
from tl_codebook.experiments.tokfsm.forced_codes import codes_while_reading, hooks_while_reading, state_codes, state_hooks
from tl_codebook.experiments.tokfsm.forcing import state_forcing
from tl_codebook.experiments.tokfsm.inputs import attainable_inputs, dead_of_attainable
from tl_codebook.experiments.tokfsm.machine import TokFSM
from tl_codebook.experiments.tokfsm.neurons import best_neurons, score_neurons
from tl_codebook.experiments.tokfsm.setting import TokFSMSetting
from tl_codebook.experiments.tokfsm.stages import held_out_rows, sample_rows
from tl_codebook.experiments.tokfsm.text_of_model import (
    collect_at,
    first_transitions,
    loss_over_bayes,
    next_state_probabilities,
    sample_text,
)
from tl_codebook.experiments.tokfsm.tokens import read_states, write_tokens
from tl_codebook.experiments.tokfsm.validity import successor_match, transition_validity
from tl_codebook.names import Address, codes_hook, input_hook

__all__ = ["evaluate_base", "evaluate_codes"]

EDGE_SHARE = 0.2
"""Of what each edge of a state gets: transitions seen more rarely are no edge of the automaton read from the codes."""
DICTIONARY_ROWS = 2000
"""Rows that a TopK dictionary learns from."""


def evaluate_base(model: Any, setting: TokFSMSetting, *, seed: int = 0) -> dict[str, Any]:
    """Measure what the model predicts and writes: loss over Bayes, valid transitions, successors after the first state.

    The codebooks of the model, if it has any, are at work.
    """
    machine = setting.machine()
    rows = held_out_rows(setting, seed)
    text = sample_text(model, machine, setting.sampled_rows, setting.n_tokens, seed=seed)
    valid = transition_validity(machine, read_states(machine, text))
    match = successor_match(machine, first_transitions(model, machine))
    return {
        **loss_over_bayes(model, machine, rows)._asdict(),
        "held_out_rows": len(rows),
        "valid_transitions": valid.share,
        "first_valid": valid.first_share,
        "n_transitions": valid.n_transitions,
        "n_sequences": valid.n_sequences,
        "first_successors": float(match.mean()),
        "first_successors_exact": float((match == 1).double().mean()),
    }


def evaluate_codes(model: Any, setting: TokFSMSetting, *, seed: int = 0, base: Any = None, progress: bool = True) -> dict[str, Any]:
    """Measure the codes of a model against the machine; codes are chosen on the first half of the held-out rows, scored on the second.

    =====================  ===========================================================================================
    ``dead``               per site and group: codes in use, codes that the inputs could bring to use, perplexity
    ``state_codes``        precision and recall of the best code for each state, of all sites and of each, for each floor of
                           `RECALLS`, beside the best neuron at the same recall and TopK dictionaries on what the MLP codes see
    ``decode``             per MLP site: accuracy of reading the state off the first code; codes that a state takes
    ``best_site``          where that is most accurate on the first half
    ``purity``             per MLP site: codes that stand for one state (bigram), or one state and the digit after it (trigram)
    ``automaton``          edges read from the codes of the best site
    ``forcing``            `state_forcing`
    ``demonstration``      next states before and after one state is forced, with those of the machine
    =====================  ===========================================================================================

    Args:
        model: The codebook model.
        setting: The experiment.
        seed: As in training: it decides which rows are held out.
        base: The model without codebooks, whose neurons are the control; those of `model` itself by default.
        progress: Show a bar.
    """
    machine = setting.machine()
    rows = held_out_rows(setting, seed)
    half = len(rows) // 2
    bar = tqdm(total=7, desc="measuring codes", unit="part", disable=not progress)
    result = evaluate_base(model, setting, seed=seed)
    bar.update()
    with count_usage(model) as usages:
        ids = collect_at(model, rows, {name: codes_hook(name) for name in sites(model)})
    result["dead"] = _dead(dead_of_attainable(usages, attainable_inputs(model, rows)))
    bar.update()
    labels = state_labels(machine, rows)
    mlp = [name for name in ids if Address.parse(name).site == "mlp_out"]
    n_codes = {name: point.codebook.n_codes for name, point in sites(model).items()}
    halves = [
        {name: code_table(ids[name][part], labels[part], n_codes[name], machine.n_states) for name in ids}
        for part in (slice(0, half), slice(half, None))
    ]
    chosen = {name: choose_codes(halves[0], floor) for name, floor in RECALLS.items()}
    result["state_codes"] = {name: _summary(score_codes(codes, halves[1])) for name, codes in chosen.items()}
    result["state_codes"]["sites"] = {
        str(Address.parse(site)): {
            name: _summary(score_codes(choose_codes(halves[0][site], floor), halves[1][site])) for name, floor in RECALLS.items()
        }
        for site in ids
    }
    bar.update()
    neurons = base if base is not None else model
    result["state_codes"]["controls"] = _controls(model, neurons, setting, rows, labels, chosen, mlp, n_codes, seed)
    bar.update()
    result["decode"], best = _decode(ids, labels, half, {name: n_codes[name] for name in mlp}, machine.n_states)
    result["best_site"] = str(Address.parse(best))
    result["purity"] = _purity(model, machine, mlp)
    result["automaton"] = _automaton(machine, ids[best], labels, half, n_codes[best]) | {"site": str(Address.parse(best))}
    bar.update()
    codes, while_reading = state_codes(model, machine, rows), codes_while_reading(model, machine, rows)
    forced = state_forcing(
        model,
        machine,
        codes,
        n_prefixes_per_state=setting.forced_prefixes,
        prefix_states=machine.states_in_row(setting.n_tokens) - 2,
        seed=seed,
        n_successor_prefixes=1,
        while_reading=while_reading,
    )
    result["forcing"] = {
        label: {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in figures._asdict().items()}
        for label, figures in forced.items()
    }
    bar.update()
    result["demonstration"] = _demonstration(model, machine, codes, while_reading)
    bar.update()
    bar.close()
    return result


def _dead(dead: Mapping[str, Any]) -> dict[str, Any]:
    by_site = {
        str(Address.parse(name)): {field: value.tolist() for field, value in figures._asdict().items()} for name, figures in dead.items()
    }
    pairs = [pair for site in by_site.values() for pair in zip(site["used"], site["attainable"], strict=True)]
    # With k > 1 a group can use more codes than it has inputs; that must not make up for dead codes elsewhere.
    used, attainable = sum(min(pair) for pair in pairs), sum(possible for _, possible in pairs)
    return {"share": 1 - used / attainable, "used": used, "attainable": attainable, "sites": by_site}


def _summary(scores: LabelScores) -> dict[str, float]:
    return scores.summary()._asdict()


def _controls(
    model: Any,
    base: Any,
    setting: TokFSMSetting,
    rows: Tensor,
    labels: Tensor,
    chosen: Mapping[str, ChosenCodes],
    mlp: list[str],
    n_codes: Mapping[str, int],
    seed: int,
) -> dict[str, Any]:
    """Score the best neurons at the codes' recall, and dictionaries with as many latents and the same k on what the codes see.

    Neurons and latents are chosen on the first half of the rows and scored on the second, as codes are. The dictionaries are trained on
    rows of their own.
    """
    result: dict[str, Any] = {}
    halves = (slice(0, len(rows) // 2), slice(len(rows) // 2, None))
    activations = _neurons(base, rows)
    parts = [(activations[half].flatten(0, 1), labels[half].flatten()) for half in halves]
    for name, floor in RECALLS.items():
        neurons = best_neurons(*parts[0], chosen[name].recall.clamp(min=floor))
        result[f"best neuron, {name}"] = _summary(score_neurons(neurons, *parts[1]))
    result["neurons"] = activations.shape[-1]
    del activations, parts
    inputs = {name: input_hook(name) for name in mlp}
    train = collect_at(model, sample_rows(setting, "dictionary", DICTIONARY_ROWS, seed), inputs)
    seen = collect_at(model, rows, inputs)
    tables: list[dict[str, CodeTable]] = [{}, {}]
    for name in mlp:
        dictionary = train_topk_dictionary(
            train.pop(name).flatten(0, 1), n_codes[name], setting.k, steps=setting.dictionary_steps, seed=seed
        )
        ids = dictionary.encode(seen[name].flatten(0, 1)).unflatten(0, rows.shape)
        for table, half in zip(tables, halves, strict=True):
            table[name] = code_table(ids[half], labels[half], n_codes[name], setting.n_states)
    for name, floor in RECALLS.items():
        result[f"TopK dictionary, {name}"] = _summary(score_codes(choose_codes(tables[0], floor), tables[1]))
    return result


def _neurons(model: Any, rows: Tensor) -> Float[Tensor, "sequence pos neuron"]:
    """Return all attention neurons (z, before W_O) and MLP neurons (post); of a codebook model, before the codes are chosen."""
    own = sites(model)
    hooks: dict[str, str] = {}
    for layer in range(model.cfg.n_layers):
        z = f"blocks.{layer}.attn.hook_z"
        hooks |= {z: input_hook(z) if z in own else z, f"blocks.{layer}.mlp.hook_post": f"blocks.{layer}.mlp.hook_post"}
    found = collect_at(model, rows, hooks)
    return torch.cat([value.flatten(2) for value in found.values()], dim=-1)


def _decode(ids: Mapping[str, Tensor], labels: Tensor, half: int, n_codes: Mapping[str, int], n_states: int) -> tuple[dict[str, Any], str]:
    """Return the figures of the first code of each MLP site, and the site at which, on the first half, the state is read best."""
    figures: dict[str, dict[str, Any]] = {}
    chosen: dict[str, float] = {}
    for name, size in n_codes.items():
        first = ids[name][..., :1]
        learnt, scored = (code_table(first[part], labels[part], size, n_states) for part in (slice(0, half), slice(half, None)))
        chosen[name] = float(decode_accuracy(learnt, learnt).max())
        needed = codes_per_concept(scored)
        occurring = needed[needed > 0].double()
        figures[name] = {
            "accuracy": float(decode_accuracy(learnt, scored).max()),
            "codes_per_state": float(occurring.mean()) if len(occurring) else None,
        }
    best = max(chosen, key=lambda name: chosen[name])
    return {str(Address.parse(name)): value for name, value in figures.items()}, best


def _purity(model: Any, machine: TokFSM, mlp: list[str]) -> dict[str, Any]:
    """Run each state right after BOS, and each state with each digit that can follow, and look at the codes of the last position."""
    states = torch.arange(machine.n_states)
    bigrams = write_tokens(machine, states[:, None], keep_last=True)
    digits = [torch.unique(write_tokens(machine, machine.successors(state)[:, None], keep_last=True)[:, 1]) for state in states.tolist()]
    lengths = torch.tensor([len(values) for values in digits])
    trigrams = torch.cat([bigrams.repeat_interleave(lengths, 0), torch.cat(digits)[:, None]], dim=1)
    result: dict[str, Any] = {}
    for word, rows in (("bigram", bigrams), ("trigram", trigrams)):
        ids = collect_at(model, rows, {name: codes_hook(name) for name in mlp})
        for name, value in ids.items():
            result.setdefault(str(Address.parse(name)), {})[word] = purity(value[:, -1, 0])._asdict() | {"n_inputs": len(rows)}
    return result


def _automaton(machine: TokFSM, ids: Tensor, labels: Tensor, half: int, n_codes: int) -> dict[str, Any]:
    digits = machine.n_digits
    at_states, states = ids[:, digits::digits, 0], labels[:, digits::digits]
    meaning = majority_states(at_states[:half], states[:half], n_codes, machine.n_states)
    counts = read_automaton(at_states[half:], n_codes)
    min_share = EDGE_SHARE / int(machine.n_successors.max())
    return score_edges(machine, counts, meaning, min_share=min_share)._asdict() | {"min_share": min_share}


def _demonstration(
    model: Any, machine: TokFSM, codes: Mapping[str, Tensor], while_reading: Sequence[Mapping[str, Tensor]]
) -> dict[str, Any]:
    """Put the codes of one state in the place of another's at every site, and read the next state before and after.

    They are put at the last digit of the state, and at the digits of the next one, where the model may read the state again. The states
    are the first that can be reached, and of those the first with the fewest successors in common with it.
    """
    reached = machine.adjacency.any(0).nonzero().flatten()
    source = int(reached[0])
    common = (machine.adjacency[reached] & machine.adjacency[source]).sum(1)
    target = int(reached[common.argmin()])
    row = write_tokens(machine, torch.tensor([[source]]), keep_last=True)
    one, last = torch.tensor([target]), row.shape[1] - 1
    hooks, later = state_hooks(codes, one, codes, last), hooks_while_reading(while_reading, one, codes, last, machine.base)
    before = next_state_probabilities(model, machine, row)[0]
    after = next_state_probabilities(model, machine, row, fwd_hooks=hooks, hooks_after=later)[0]
    return {
        "state": source,
        "forced": target,
        "codes": {str(Address.parse(name)): codes[name][target].flatten().tolist() for name in codes},
        "before": [round(value, 6) for value in before.tolist()],
        "after": [round(value, 6) for value in after.tolist()],
        "successors_of_state": machine.successors(source).tolist(),
        "successors_of_forced": machine.successors(target).tolist(),
    }
