"""Graphs of codes: which fire together in a text, which carry the difference between two runs, and which make others appear.

Each name is loaded when it is first used: what reads a store needs no TransformerLens.
"""

from typing import TYPE_CHECKING

from tl_codebook.lazy import loaded_on_use

if TYPE_CHECKING:
    from tl_codebook.graphs.analysis import CodePath, Hub, code_communities, code_paths, ego_graph, hubs
    from tl_codebook.graphs.coactivation import coactivation_graph
    from tl_codebook.graphs.export import circuit_tracer_graph, write_circuit_tracer, write_graphml
    from tl_codebook.graphs.flips import FlipRate, FlipRates, flip_rate
    from tl_codebook.graphs.patching import PatchEffects, patch_effects
    from tl_codebook.graphs.statistics import association, benjamini_hochberg, hypergeometric_tail

_HOME = {
    "CodePath": "analysis",
    "FlipRate": "flips",
    "FlipRates": "flips",
    "Hub": "analysis",
    "PatchEffects": "patching",
    "association": "statistics",
    "benjamini_hochberg": "statistics",
    "circuit_tracer_graph": "export",
    "coactivation_graph": "coactivation",
    "code_communities": "analysis",
    "code_paths": "analysis",
    "ego_graph": "analysis",
    "flip_rate": "flips",
    "hubs": "analysis",
    "hypergeometric_tail": "statistics",
    "patch_effects": "patching",
    "write_circuit_tracer": "export",
    "write_graphml": "export",
}

__all__ = [
    "CodePath",
    "FlipRate",
    "FlipRates",
    "Hub",
    "PatchEffects",
    "association",
    "benjamini_hochberg",
    "circuit_tracer_graph",
    "coactivation_graph",
    "code_communities",
    "code_paths",
    "ego_graph",
    "flip_rate",
    "hubs",
    "hypergeometric_tail",
    "patch_effects",
    "write_circuit_tracer",
    "write_graphml",
]

__getattr__, __dir__ = loaded_on_use(__name__, _HOME, globals())
