"""Stores of codes: which codes fire where in many texts, collected once, opened in milliseconds; and searches in them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tl_codebook.lazy import loaded_on_use

if TYPE_CHECKING:
    from tl_codebook.store.collect import collect_codes
    from tl_codebook.store.concepts import Matches, concept_positions, match_text
    from tl_codebook.store.counting import CodeCounts, code_counts
    from tl_codebook.store.neurons import CodeBesideNeuron, compare_with_neurons, neuron_activations
    from tl_codebook.store.search import CodeHit, codes_of_example, search_codes
    from tl_codebook.store.store import CodeStore, Context
    from tl_codebook.store.tables import write_csv
    from tl_codebook.store.text import Vocabulary, vocabulary_of

_HOME = {
    "CodeBesideNeuron": "neurons",
    "CodeCounts": "counting",
    "CodeHit": "search",
    "CodeStore": "store",
    "Context": "store",
    "Matches": "concepts",
    "Vocabulary": "text",
    "code_counts": "counting",
    "codes_of_example": "search",
    "collect_codes": "collect",
    "compare_with_neurons": "neurons",
    "concept_positions": "concepts",
    "match_text": "concepts",
    "neuron_activations": "neurons",
    "search_codes": "search",
    "vocabulary_of": "text",
    "write_csv": "tables",
}

__all__ = [
    "CodeBesideNeuron",
    "CodeCounts",
    "CodeHit",
    "CodeStore",
    "Context",
    "Matches",
    "Vocabulary",
    "code_counts",
    "codes_of_example",
    "collect_codes",
    "compare_with_neurons",
    "concept_positions",
    "match_text",
    "neuron_activations",
    "search_codes",
    "vocabulary_of",
    "write_csv",
]

__getattr__, __dir__ = loaded_on_use(__name__, _HOME, globals())
