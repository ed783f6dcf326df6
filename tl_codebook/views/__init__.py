"""Codes shown in a notebook or in one HTML file: without a network, without scripts first, and safe whatever the tokens say.

Each name is loaded when it is first used: what shows a store needs no TransformerLens.
"""

from typing import TYPE_CHECKING

from tl_codebook.lazy import loaded_on_use

if TYPE_CHECKING:
    from tl_codebook.views.attention import show_attention
    from tl_codebook.views.drawing import show_graph
    from tl_codebook.views.examples import show_examples
    from tl_codebook.views.matrix import show_code_heatmap
    from tl_codebook.views.texts import show_codes
    from tl_codebook.views.view import View

_HOME = {
    "View": "view",
    "show_attention": "attention",
    "show_code_heatmap": "matrix",
    "show_codes": "texts",
    "show_examples": "examples",
    "show_graph": "drawing",
}

__all__ = ["View", "show_attention", "show_code_heatmap", "show_codes", "show_examples", "show_graph"]

__getattr__, __dir__ = loaded_on_use(__name__, _HOME, globals())
