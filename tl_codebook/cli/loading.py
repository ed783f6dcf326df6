"""Load the model that a verb of the command line names, with nothing but the verb's own words on standard output."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

__all__ = ["load_model"]


def load_model(folder: str) -> Any:
    """Load a folder that `tl_codebook.save` wrote."""
    from tl_codebook import load

    with contextlib.redirect_stdout(sys.stderr):  # TransformerLens prints there what it does
        return load(folder)
