"""TokFSM: a random finite state machine, written in digits, whose every exact figure is known.

Source: Tamkin et al. 2023, section 3 (the TokFSM data set).
"""

from tl_codebook.experiments.tokfsm.automaton import EdgeScores, majority_states, read_automaton, score_edges
from tl_codebook.experiments.tokfsm.bayes import PositionFigures, bayes_accuracy, bayes_by_position, bayes_loss, bayes_predictions
from tl_codebook.experiments.tokfsm.machine import TokFSM
from tl_codebook.experiments.tokfsm.original_streams import original_continuations, original_trajectories
from tl_codebook.experiments.tokfsm.tokens import make_rows, make_tokenizer, read_states, read_text, write_text, write_tokens
from tl_codebook.experiments.tokfsm.validity import TransitionValidity, successor_match, transition_validity

__all__ = [
    "EdgeScores",
    "PositionFigures",
    "TokFSM",
    "TransitionValidity",
    "bayes_accuracy",
    "bayes_by_position",
    "bayes_loss",
    "bayes_predictions",
    "majority_states",
    "make_rows",
    "make_tokenizer",
    "original_continuations",
    "original_trajectories",
    "read_automaton",
    "read_states",
    "read_text",
    "score_edges",
    "successor_match",
    "transition_validity",
    "write_text",
    "write_tokens",
]
