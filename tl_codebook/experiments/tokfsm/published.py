"""What was published for the paper's machine: the rows that our figures stand beside."""

from __future__ import annotations

from typing import NamedTuple

__all__ = [
    "BAYES_LOSS",
    "DEAD_CODES",
    "FIRST_TRANSITION",
    "FORCING",
    "MODELS",
    "PURITY",
    "STATE_CODE_PRECISION",
    "STATE_NEURON_PRECISION",
    "TOKENS",
    "PublishedModel",
]

BAYES_LOSS = 1.1748
"""Of the paper's machine, nats per token; exact (`bayes_loss`)."""
TOKENS = 20_000 * 512 * 128
"""Tokens of training: steps, rows of a step, tokens of a row."""


class PublishedModel(NamedTuple):
    """A model of the paper's machine (100 states, 10 successors, 4 layers, width 128), trained on 1.3e9 tokens."""

    name: str
    k: int | None
    n_codes: int | None
    loss: float
    """Nats per token."""
    accuracy: float
    """Of the next token, 0 to 1."""
    valid_transitions: float
    """In text that the model writes, 0 to 1."""


MODELS = (
    PublishedModel("no codebook", None, None, 1.179, 0.4636, 0.9677),
    PublishedModel("attention", 1, 2_000, 1.18, 0.4633, 0.9639),
    PublishedModel("attention and MLP", 1, 10_000, 1.269, 0.4527, 0.6365),
    PublishedModel("attention and MLP", 1, 20_000, 1.254, 0.4556, 0.6381),
    PublishedModel("attention and MLP", 4, 20_000, 1.192, 0.4620, 0.8069),
    PublishedModel("attention and MLP", 16, 20_000, 1.183, 0.4632, 0.9153),
    PublishedModel("attention and MLP", 128, 20_000, 1.178, 0.4638, 0.9582),
)
"""Source: Tamkin et al. 2023, section 3 and appendix."""

PURITY = {"bigram": (0.0, 0.99, 0.96, 0.84), "trigram": (0.0, 0.91, 0.81, 0.66)}
"""Share of codes that stand for one n-gram, by layer. Source: the TokFSM tutorial of codebook-features 0.1.2 (k=1)."""

STATE_CODE_PRECISION, STATE_NEURON_PRECISION = 0.971, 0.705
"""Average over states of the best code with a recall above 1 %, and of the best neuron at that recall. Source: Tamkin et al. 2023."""

FORCING = {"L0.z": 0.86, "L1.mlp_out": 0.71, "z": 0.565, "mlp_out": 0.255, "all": 0.0}
"""Normalised Jensen-Shannon divergence after forcing the codes of a state. Source: the TokFSM tutorial of codebook-features 0.1.2 (k=1)."""

FIRST_TRANSITION = 0.975
"""Share of states whose ten most probable next states are exactly the successors, without text before. Source: the same tutorial."""

DEAD_CODES = (0.935, 0.997)
"""Least and greatest share of dead codes of a layer, of all codes. Source: the released model of codebook-features 0.1.2 (k=1)."""
