"""Stores of codes: which codes fire where in many texts, collected once, opened in milliseconds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tl_codebook.lazy import loaded_on_use

if TYPE_CHECKING:
    from tl_codebook.store.collect import collect_codes
    from tl_codebook.store.store import CodeStore, Context

_HOME = {"CodeStore": "store", "Context": "store", "collect_codes": "collect"}

__all__ = ["CodeStore", "Context", "collect_codes"]

__getattr__, __dir__ = loaded_on_use(__name__, _HOME, globals())
