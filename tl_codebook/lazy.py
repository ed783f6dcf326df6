"""Names of a package that are loaded when they are first used (PEP 562)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["loaded_on_use"]


def loaded_on_use(package: str, home: Mapping[str, str], space: dict[str, Any]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the ``__getattr__`` and ``__dir__`` of a package whose names live in submodules.

    Args:
        package: Its ``__name__``.
        home: The submodule of each name.
        space: Its ``globals()``, which keep what was loaded.

    >>> loaded, listed = loaded_on_use("tl_codebook", {"Code": "names"}, {})
    >>> loaded("Code").__name__, listed()
    ('Code', ['Code'])
    """

    def loaded(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        space[name] = getattr(importlib.import_module(f"{package}.{home[name]}"), name)
        return space[name]

    def listed() -> list[str]:
        return sorted(space.keys() | home.keys())

    return loaded, listed
