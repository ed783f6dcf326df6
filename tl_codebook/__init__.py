"""Codebook features for TransformerLens models: every layer and head speaks in integers that can be read, forced and traced.

Importing this package imports neither TransformerLens nor torch: each name is loaded when it is first used (PEP 562).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tl_codebook.lazy import loaded_on_use

if TYPE_CHECKING:
    from tl_codebook.attachment import attach, detach, refresh, sites
    from tl_codebook.basis import fingerprint
    from tl_codebook.checkpoint import Codebooks, load, save
    from tl_codebook.codebook import Codebook, CodebookConfig
    from tl_codebook.contexts import bypassed, count_usage, masked
    from tl_codebook.convert.codebook_features import load_codebook_features
    from tl_codebook.convert.export import export_hf
    from tl_codebook.convert.huggingface import load_hf
    from tl_codebook.convert.inside import attach_hf
    from tl_codebook.describe.labels import label_codes
    from tl_codebook.describe.page import describe_code
    from tl_codebook.graphs.coactivation import coactivation_graph
    from tl_codebook.graphs.flips import flip_rate
    from tl_codebook.graphs.patching import patch_effects
    from tl_codebook.interventions import ban_code, force_code, patch_codes, swap_codes
    from tl_codebook.names import Address, Code
    from tl_codebook.steering import steer
    from tl_codebook.store.collect import collect_codes
    from tl_codebook.store.neurons import compare_with_neurons
    from tl_codebook.store.search import codes_of_example, search_codes
    from tl_codebook.store.store import CodeStore
    from tl_codebook.training import CodebookTrainer, CodebookTrainingConfig, initialise_codes_, load_dataset_from
    from tl_codebook.views.attention import show_attention
    from tl_codebook.views.drawing import show_graph
    from tl_codebook.views.examples import show_examples
    from tl_codebook.views.matrix import show_code_heatmap
    from tl_codebook.views.texts import show_codes
    from tl_codebook.views.view import View

__version__ = "0.1.0"

_HOME = {
    "Address": "names",
    "Code": "names",
    "CodeStore": "store.store",
    "Codebook": "codebook",
    "CodebookConfig": "codebook",
    "CodebookTrainer": "training",
    "CodebookTrainingConfig": "training",
    "Codebooks": "checkpoint",
    "View": "views.view",
    "attach": "attachment",
    "attach_hf": "convert.inside",
    "ban_code": "interventions",
    "bypassed": "contexts",
    "coactivation_graph": "graphs.coactivation",
    "codes_of_example": "store.search",
    "collect_codes": "store.collect",
    "compare_with_neurons": "store.neurons",
    "count_usage": "contexts",
    "describe_code": "describe.page",
    "detach": "attachment",
    "export_hf": "convert.export",
    "fingerprint": "basis",
    "flip_rate": "graphs.flips",
    "force_code": "interventions",
    "initialise_codes_": "training",
    "label_codes": "describe.labels",
    "load": "checkpoint",
    "load_codebook_features": "convert.codebook_features",
    "load_dataset_from": "training",
    "load_hf": "convert.huggingface",
    "masked": "contexts",
    "patch_codes": "interventions",
    "patch_effects": "graphs.patching",
    "refresh": "attachment",
    "save": "checkpoint",
    "search_codes": "store.search",
    "show_attention": "views.attention",
    "show_code_heatmap": "views.matrix",
    "show_codes": "views.texts",
    "show_examples": "views.examples",
    "show_graph": "views.drawing",
    "sites": "attachment",
    "steer": "steering",
    "swap_codes": "interventions",
}

__all__ = [
    "Address",
    "Code",
    "CodeStore",
    "Codebook",
    "CodebookConfig",
    "CodebookTrainer",
    "CodebookTrainingConfig",
    "Codebooks",
    "View",
    "attach",
    "attach_hf",
    "ban_code",
    "bypassed",
    "coactivation_graph",
    "codes_of_example",
    "collect_codes",
    "compare_with_neurons",
    "count_usage",
    "describe_code",
    "detach",
    "export_hf",
    "fingerprint",
    "flip_rate",
    "force_code",
    "initialise_codes_",
    "label_codes",
    "load",
    "load_codebook_features",
    "load_dataset_from",
    "load_hf",
    "masked",
    "patch_codes",
    "patch_effects",
    "refresh",
    "save",
    "search_codes",
    "show_attention",
    "show_code_heatmap",
    "show_codes",
    "show_examples",
    "show_graph",
    "sites",
    "steer",
    "swap_codes",
]

__getattr__, __dir__ = loaded_on_use(__name__, _HOME, globals())
