"""The exceptions of tl_codebook.

Each is a `CodebookError` and also the builtin that people already catch (the warnings are `UserWarning`)::

    CodebookError
    ├── ConfigError          ValueError        a configuration that cannot be
    │   └── SearchTimeoutError  TimeoutError        a regular expression that takes longer than it may
    ├── LabelError           ValueError        a label or address that cannot be read
    ├── InvalidCodeError     ValueError        a code id that the codebook does not have
    ├── ShapeError           ValueError        a tensor that does not fit where it was put
    ├── PositionError        IndexError        a position outside the sequence
    ├── NonFiniteError       ArithmeticError   NaN or Inf at a codebook
    ├── UnknownHookError     LookupError       a hook point or site that the model does not have
    ├── AttachError          RuntimeError      a hook point that cannot take or lose a codebook now
    ├── HookNeverFiredError  RuntimeError      a hook or site that nothing ever reached
    ├── BasisMismatchError   ValueError        codes trained in another basis than the model's
    ├── CheckpointError      ValueError        files that are incomplete, wrong or unsafe
    │   └── CheckpointExistsError  FileExistsError   a target that would be overwritten
    ├── DataError            ValueError        a dataset or a text that cannot be used
    └── TrainingError        RuntimeError      a run that cannot start or go on

A message has three parts: what was asked, what is true, what to do. It is raised before anything is changed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "AttachError",
    "BasisMismatchError",
    "BasisWarning",
    "CheckpointError",
    "CheckpointExistsError",
    "CheckpointWarning",
    "CodebookError",
    "ConfigError",
    "DataError",
    "EmptyInterventionWarning",
    "HookNeverFiredError",
    "InvalidCodeError",
    "LabelError",
    "NonFiniteError",
    "PositionError",
    "SearchTimeoutError",
    "ShapeError",
    "TrainingError",
    "UnknownHookError",
    "check_whole",
    "nearest",
]


class CodebookError(Exception):
    """Base of everything that tl_codebook raises on purpose."""


class ConfigError(CodebookError, ValueError):
    """A configuration that cannot be."""


class SearchTimeoutError(ConfigError, TimeoutError):
    """A regular expression that takes longer than it may."""


class LabelError(CodebookError, ValueError):
    """A code label or site address that cannot be read."""


class InvalidCodeError(CodebookError, ValueError):
    """A code id that the codebook does not have."""


class ShapeError(CodebookError, ValueError):
    """A tensor that does not fit where it was put."""


class PositionError(CodebookError, IndexError):
    """A position outside the sequence."""


class NonFiniteError(CodebookError, ArithmeticError):
    """NaN or Inf at a codebook: quantisation would launder it into a valid code."""


class UnknownHookError(CodebookError, LookupError):
    """A hook point or site that the model does not have."""


class AttachError(CodebookError, RuntimeError):
    """A hook point that cannot take, or lose, a codebook now."""


class HookNeverFiredError(CodebookError, RuntimeError):
    """A hook or site that nothing ever reached."""


class BasisMismatchError(CodebookError, ValueError):
    """Codes that were trained in another basis than the model they are attached to."""


class CheckpointError(CodebookError, ValueError):
    """Files that are incomplete, wrong or unsafe."""


class CheckpointExistsError(CheckpointError, FileExistsError):
    """A target that exists already and would be overwritten."""


class DataError(CodebookError, ValueError):
    """A dataset or a text that cannot be used."""


class TrainingError(CodebookError, RuntimeError):
    """A training run that cannot start or go on."""


class BasisWarning(UserWarning):
    """The activations at a site differ from those that the codes were trained on."""


class CheckpointWarning(UserWarning):
    """A checkpoint holds something that has no effect."""


class EmptyInterventionWarning(UserWarning):
    """An intervention that was asked to change nothing."""


def nearest(asked: str, known: Iterable[str], n: int = 3) -> str:
    """Return the advice ``Did you mean ...? `` (with a space to go on after) for a name that does not exist, or an empty string.

    >>> nearest("blocks.3.hook_mlpout", ["blocks.3.hook_mlp_out", "hook_embed"])
    "Did you mean 'blocks.3.hook_mlp_out'? "
    """
    close = difflib.get_close_matches(asked, list(known), n=n, cutoff=0.6)
    if not close:
        return ""
    return "Did you mean " + " or ".join(repr(name) for name in close) + "? "


def check_whole(name: str, value: object, least: int) -> None:
    """Raise unless a value is a whole number, `least` or more; a bool is none.

    Raises:
        ConfigError: it is not.

    >>> check_whole("k", 8, least=1)
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}={value!r} was asked for. Give a whole number >= {least}.")
