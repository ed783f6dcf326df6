"""TokFSM: a random finite state machine, written in digits, whose every exact figure is known; models of it, and their codes.

Source: Tamkin et al. 2023, section 3 (the TokFSM data set and experiments).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tl_codebook.lazy import loaded_on_use

if TYPE_CHECKING:
    from tl_codebook.experiments.tokfsm.agreement import adjusted_mutual_information, matched_agreement
    from tl_codebook.experiments.tokfsm.automaton import EdgeScores, majority_states, read_automaton, score_edges
    from tl_codebook.experiments.tokfsm.bayes import PositionFigures, bayes_accuracy, bayes_by_position, bayes_loss, bayes_predictions
    from tl_codebook.experiments.tokfsm.concepts import (
        ChosenCodes,
        CodeTable,
        ConceptSummary,
        LabelScores,
        Purity,
        choose_codes,
        code_table,
        codes_per_concept,
        decode_accuracy,
        purity,
        score_codes,
        state_labels,
    )
    from tl_codebook.experiments.tokfsm.dictionary import TopKDictionary, train_topk_dictionary
    from tl_codebook.experiments.tokfsm.evaluation import evaluate_base, evaluate_codes
    from tl_codebook.experiments.tokfsm.experiment import run_experiment
    from tl_codebook.experiments.tokfsm.forced_codes import codes_while_reading, state_codes
    from tl_codebook.experiments.tokfsm.forcing import ForcingFigures, force_states, jensen_shannon, site_sets, state_forcing
    from tl_codebook.experiments.tokfsm.inputs import DeadCodes, attainable_inputs, dead_of_attainable
    from tl_codebook.experiments.tokfsm.machine import TokFSM
    from tl_codebook.experiments.tokfsm.model import make_model
    from tl_codebook.experiments.tokfsm.neurons import NeuronChoice, best_neurons, score_neurons
    from tl_codebook.experiments.tokfsm.original_streams import original_continuations, original_trajectories
    from tl_codebook.experiments.tokfsm.report import write_report
    from tl_codebook.experiments.tokfsm.setting import TokFSMSetting
    from tl_codebook.experiments.tokfsm.stages import StageFigures, held_out_rows, train_base_, train_codes_
    from tl_codebook.experiments.tokfsm.tables import demonstration_text, figure_rows, figure_table
    from tl_codebook.experiments.tokfsm.text_of_model import (
        ModelFigures,
        collect_at,
        first_transitions,
        loss_over_bayes,
        next_state_probabilities,
        sample_text,
    )
    from tl_codebook.experiments.tokfsm.tokens import make_rows, make_tokenizer, read_states, read_text, write_text, write_tokens
    from tl_codebook.experiments.tokfsm.validity import TransitionValidity, successor_match, transition_validity

_HOME = {
    "ChosenCodes": "concepts",
    "CodeTable": "concepts",
    "ConceptSummary": "concepts",
    "DeadCodes": "inputs",
    "EdgeScores": "automaton",
    "ForcingFigures": "forcing",
    "LabelScores": "concepts",
    "ModelFigures": "text_of_model",
    "NeuronChoice": "neurons",
    "PositionFigures": "bayes",
    "Purity": "concepts",
    "StageFigures": "stages",
    "TokFSM": "machine",
    "TokFSMSetting": "setting",
    "TopKDictionary": "dictionary",
    "TransitionValidity": "validity",
    "adjusted_mutual_information": "agreement",
    "attainable_inputs": "inputs",
    "bayes_accuracy": "bayes",
    "bayes_by_position": "bayes",
    "bayes_loss": "bayes",
    "bayes_predictions": "bayes",
    "best_neurons": "neurons",
    "choose_codes": "concepts",
    "code_table": "concepts",
    "codes_per_concept": "concepts",
    "codes_while_reading": "forced_codes",
    "collect_at": "text_of_model",
    "dead_of_attainable": "inputs",
    "decode_accuracy": "concepts",
    "demonstration_text": "tables",
    "evaluate_base": "evaluation",
    "evaluate_codes": "evaluation",
    "figure_rows": "tables",
    "figure_table": "tables",
    "first_transitions": "text_of_model",
    "force_states": "forcing",
    "held_out_rows": "stages",
    "jensen_shannon": "forcing",
    "loss_over_bayes": "text_of_model",
    "majority_states": "automaton",
    "make_model": "model",
    "make_rows": "tokens",
    "make_tokenizer": "tokens",
    "matched_agreement": "agreement",
    "next_state_probabilities": "text_of_model",
    "original_continuations": "original_streams",
    "original_trajectories": "original_streams",
    "purity": "concepts",
    "read_automaton": "automaton",
    "read_states": "tokens",
    "read_text": "tokens",
    "run_experiment": "experiment",
    "sample_text": "text_of_model",
    "score_codes": "concepts",
    "score_edges": "automaton",
    "score_neurons": "neurons",
    "site_sets": "forcing",
    "state_codes": "forced_codes",
    "state_forcing": "forcing",
    "state_labels": "concepts",
    "successor_match": "validity",
    "train_base_": "stages",
    "train_codes_": "stages",
    "train_topk_dictionary": "dictionary",
    "transition_validity": "validity",
    "write_report": "report",
    "write_text": "tokens",
    "write_tokens": "tokens",
}

__all__ = [
    "ChosenCodes",
    "CodeTable",
    "ConceptSummary",
    "DeadCodes",
    "EdgeScores",
    "ForcingFigures",
    "LabelScores",
    "ModelFigures",
    "NeuronChoice",
    "PositionFigures",
    "Purity",
    "StageFigures",
    "TokFSM",
    "TokFSMSetting",
    "TopKDictionary",
    "TransitionValidity",
    "adjusted_mutual_information",
    "attainable_inputs",
    "bayes_accuracy",
    "bayes_by_position",
    "bayes_loss",
    "bayes_predictions",
    "best_neurons",
    "choose_codes",
    "code_table",
    "codes_per_concept",
    "codes_while_reading",
    "collect_at",
    "dead_of_attainable",
    "decode_accuracy",
    "demonstration_text",
    "evaluate_base",
    "evaluate_codes",
    "figure_rows",
    "figure_table",
    "first_transitions",
    "force_states",
    "held_out_rows",
    "jensen_shannon",
    "loss_over_bayes",
    "majority_states",
    "make_model",
    "make_rows",
    "make_tokenizer",
    "matched_agreement",
    "next_state_probabilities",
    "original_continuations",
    "original_trajectories",
    "purity",
    "read_automaton",
    "read_states",
    "read_text",
    "run_experiment",
    "sample_text",
    "score_codes",
    "score_edges",
    "score_neurons",
    "site_sets",
    "state_codes",
    "state_forcing",
    "state_labels",
    "successor_match",
    "train_base_",
    "train_codes_",
    "train_topk_dictionary",
    "transition_validity",
    "write_report",
    "write_text",
    "write_tokens",
]

# The machine and its exact figures need torch alone; what trains models brings Trainer and datasets with it.
__getattr__, __dir__ = loaded_on_use(__name__, _HOME, globals())
