"""Every figure of the experiment, of one model, in one nested dictionary of JSON values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_codebook.attachment import sites
from tl_codebook.contexts import count_usage
from tl_codebook.experiments.tokfsm.automaton import majority_states, read_automaton, score_edges
from tl_codebook.experiments.tokfsm.concepts import (
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
from tl_codebook.experiments.tokfsm.forcing import state_codes, state_forcing
from tl_codebook.experiments.tokfsm.inputs import attainable_inputs, dead_of_attainable
from tl_codebook.experiments.tokfsm.machine import TokFSM
from tl_codebook.experiments.tokfsm.neurons import best_neurons, score_neurons
from tl_codebook.experiments.tokfsm.setting import TokFSMSetting
from tl_codebook.experiments.tokfsm.stages import held_out_rows
from tl_codebook.experiments.tokfsm.text_of_model import (
    first_transitions,
    loss_over_bayes,
    next_state_probabilities,
    run_batches,
    sample_text,
)
from tl_codebook.experiments.tokfsm.tokens import read_states, write_tokens
from tl_codebook.experiments.tokfsm.validity import successor_match, transition_validity
from tl_codebook.interventions import patch_codes
from tl_codebook.names import Address, codes_hook, input_hook

__all__ = ["collect_at", "evaluate_base", "evaluate_codes"]

RECALLS = {"recall > 1 %": 0.01, "recall >= 95 %": 0.95 - 1e-9}
"""The paper's floor under the recall of a state code, and ours."""
MIN_SHARE = 0.02
"""Of the transitions of a state: those seen more rarely are no edge of the automaton read from the codes."""


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
    ``state_codes``        precision and recall of the best code for each state (MLP sites), for each floor of `RECALLS`,
                           beside the best neuron at the same recall and a TopK dictionary of the same size
    ``decode``             per MLP site: accuracy of reading the state off the one code; codes that a state takes
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
        {name: code_table(ids[name][part], labels[part], n_codes[name], machine.n_states) for name in mlp}
        for part in (slice(0, half), slice(half, None))
    ]
    result["state_codes"] = _state_codes(halves)
    bar.update()
    neurons = base if base is not None else model
    result["state_codes"]["controls"] = _controls(neurons, setting, rows, labels, halves, mlp, n_codes, seed)
    bar.update()
    result["decode"], best = _decode(halves, setting.k)
    result["purity"] = _purity(model, machine, mlp)
    result["automaton"] = _automaton(machine, ids[best], labels, half, n_codes[best]) | {"site": str(Address.parse(best))}
    bar.update()
    codes = state_codes(model, machine, rows)
    prefix_states = machine.states_in_row(setting.n_tokens) - 2
    forced = state_forcing(
        model, machine, codes, n_prefixes_per_state=setting.forced_prefixes, prefix_states=prefix_states, seed=seed, n_successor_prefixes=1
    )
    result["forcing"] = {
        label: {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in figures._asdict().items()}
        for label, figures in forced.items()
    }
    bar.update()
    result["demonstration"] = _demonstration(model, machine, codes, mlp)
    bar.update()
    bar.close()
    return result


@contextmanager
def _capturing(hooks: Mapping[str, str]) -> Iterator[tuple[dict[str, list[Tensor]], list[Any]]]:
    found: dict[str, list[Tensor]] = {key: [] for key in hooks}

    def keep(key: str) -> Any:
        def hook(value: Tensor, hook: Any) -> None:
            found[key].append(value.detach().cpu())

        return hook

    yield found, [(name, keep(key)) for key, name in hooks.items()]


def collect_at(model: Any, tokens: Int[Tensor, "sequence pos"], hooks: Mapping[str, str], batch_size: int = 100) -> dict[str, Tensor]:
    """Run rows and return what passes hook points, on the CPU, under the keys that they are asked for by.

    >>> collect_at(model, torch.tensor([[1, 2, 3]]), {"middle": "blocks.1.hook_resid_pre"})["middle"].shape
    torch.Size([1, 3, 32])
    """
    with _capturing(hooks) as (found, pairs):
        for _ in run_batches(model, tokens, batch_size, pairs):
            pass
    return {key: torch.cat(parts) for key, parts in found.items()}


def _dead(dead: Mapping[str, Any]) -> dict[str, Any]:
    by_site = {
        str(Address.parse(name)): {field: value.tolist() for field, value in figures._asdict().items()} for name, figures in dead.items()
    }
    used = sum(sum(site["used"]) for site in by_site.values())
    attainable = sum(sum(site["attainable"]) for site in by_site.values())
    return {"share": max(0.0, 1 - used / attainable), "used": used, "attainable": attainable, "sites": by_site}


def _summary(scores: LabelScores) -> dict[str, float]:
    return scores.summary()._asdict()


def _state_codes(halves: list[dict[str, CodeTable]]) -> dict[str, Any]:
    return {name: _summary(score_codes(choose_codes(halves[0], floor), halves[1])) for name, floor in RECALLS.items()}


def _controls(
    model: Any,
    setting: TokFSMSetting,
    rows: Tensor,
    labels: Tensor,
    halves: list[dict[str, CodeTable]],
    mlp: list[str],
    n_codes: Mapping[str, int],
    seed: int,
) -> dict[str, Any]:
    """Score the best neurons at the codes' recall, and dictionaries of as many latents and the same k, trained on the first half."""
    result: dict[str, Any] = {}
    half = len(rows) // 2
    flat = [labels[:half].flatten(), labels[half:].flatten()]
    activations = _neurons(model, rows)
    parts = [activations[:half].flatten(0, 1), activations[half:].flatten(0, 1)]
    for name, floor in RECALLS.items():
        chosen = choose_codes(halves[0], floor)
        neurons = best_neurons(parts[0], flat[0], chosen.recall.clamp(min=floor))
        result[f"best neuron, {name}"] = _summary(score_neurons(neurons, parts[1], flat[1]))
    result["neurons"] = activations.shape[-1]
    del activations, parts
    with_books = bool(sites(model))
    inputs = collect_at(model, rows, {name: input_hook(name) if with_books else name for name in mlp})
    tables: list[dict[str, CodeTable]] = [{}, {}]
    for name, x in inputs.items():
        train = x[:half].flatten(0, 1)
        dictionary = train_topk_dictionary(train, n_codes[name], setting.k, steps=setting.dictionary_steps, seed=seed)
        ids = dictionary.encode(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        for table, part in zip(tables, (slice(0, half), slice(half, None)), strict=True):
            table[name] = code_table(ids[part], labels[part], n_codes[name], setting.n_states)
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


def _decode(halves: list[dict[str, CodeTable]], k: int) -> tuple[dict[str, Any], str]:
    """Return the figures of each MLP site, and the site at which the state is read best."""
    figures: dict[str, dict[str, Any]] = {}
    for name in halves[0]:
        if k == 1:
            accuracy = decode_accuracy(halves[0][name], halves[1][name])
            needed = codes_per_concept(halves[1][name])
            occurring = needed[needed > 0].double()
            figures[name] = {"accuracy": float(accuracy.max()), "codes_per_state": float(occurring.mean()) if len(occurring) else None}
        else:
            best = _summary(score_codes(choose_codes(halves[0][name], RECALLS["recall > 1 %"]), halves[1][name]))
            figures[name] = {"accuracy": best["precision"] * best["recall"], "codes_per_state": None}
    best_site = max(figures, key=lambda name: figures[name]["accuracy"])
    return {str(Address.parse(name)): value for name, value in figures.items()}, best_site


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
    return score_edges(machine, counts, meaning, min_share=MIN_SHARE)._asdict() | {"min_share": MIN_SHARE}


def _demonstration(model: Any, machine: TokFSM, codes: Mapping[str, Tensor], mlp: list[str]) -> dict[str, Any]:
    """Take one state for another at all MLP sites, and read the next state before and after."""
    source, target = 0, 1
    row = write_tokens(machine, torch.tensor([[source]]), keep_last=True)
    pos = row.shape[1] - 1
    hooks = [patch_codes(codes[name][target][None, None], name, pos=pos, source_pos=0) for name in mlp]
    before = next_state_probabilities(model, machine, row)[0]
    after = next_state_probabilities(model, machine, row, fwd_hooks=hooks)[0]
    return {
        "state": source,
        "forced": target,
        "codes": {str(Address.parse(name)): codes[name][target].flatten().tolist() for name in mlp},
        "before": [round(value, 6) for value in before.tolist()],
        "after": [round(value, 6) for value in after.tolist()],
        "successors_of_state": machine.successors(source).tolist(),
        "successors_of_forced": machine.successors(target).tolist(),
    }
