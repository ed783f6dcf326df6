"""What a code stands for: where it fires, what it does, and labels for many codes at once.

Each name is loaded when it is first used: what reads a store alone loads no model.
"""

from typing import TYPE_CHECKING

from tl_codebook.lazy import loaded_on_use

if TYPE_CHECKING:
    from tl_codebook.describe.association import CodeRow, TokenRow
    from tl_codebook.describe.export import write_code_info, write_neuronpedia
    from tl_codebook.describe.labels import CodeLabel, CodeLabels, label_codes, read_labels, write_labels
    from tl_codebook.describe.logits import LogitRow, direct_logit_effect
    from tl_codebook.describe.measured import ForcingEffect
    from tl_codebook.describe.page import CodeDescription, SimilarCode, describe_code
    from tl_codebook.describe.patterns import PATTERNS
    from tl_codebook.describe.places import CodeContext

_HOME = {
    "PATTERNS": "patterns",
    "CodeContext": "places",
    "CodeDescription": "page",
    "CodeLabel": "labels",
    "CodeLabels": "labels",
    "CodeRow": "association",
    "ForcingEffect": "measured",
    "LogitRow": "logits",
    "SimilarCode": "page",
    "TokenRow": "association",
    "describe_code": "page",
    "direct_logit_effect": "logits",
    "label_codes": "labels",
    "read_labels": "labels",
    "write_code_info": "export",
    "write_labels": "labels",
    "write_neuronpedia": "export",
}

__all__ = [
    "PATTERNS",
    "CodeContext",
    "CodeDescription",
    "CodeLabel",
    "CodeLabels",
    "CodeRow",
    "ForcingEffect",
    "LogitRow",
    "SimilarCode",
    "TokenRow",
    "describe_code",
    "direct_logit_effect",
    "label_codes",
    "read_labels",
    "write_code_info",
    "write_labels",
    "write_neuronpedia",
]

__getattr__, __dir__ = loaded_on_use(__name__, _HOME, globals())
