"""Several processes that collect one store: who does what, and how none waits for one that has failed."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from tl_codebook.errors import ConfigError, DataError

__all__ = ["Processes"]

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among those that `accelerate launch` (or torchrun) has started; one of one elsewhere."""

    index: int = 0
    count: int = 1

    @classmethod
    def current(cls, device: str = "cpu") -> Processes:
        """Ask accelerate, unless nothing says that this is one of several; `device` is the kind that the model is on.

        Raises:
            ConfigError: several processes were started, and accelerate knows of one: each would collect everything.
        """
        import torch

        started = torch.distributed.is_available() and torch.distributed.is_initialized()
        n_started = int(os.environ.get("WORLD_SIZE", "1") or 1)
        if not started and n_started <= 1:
            return cls()
        from accelerate import PartialState

        state = PartialState(cpu=device == "cpu")
        if state.num_processes < n_started:
            raise ConfigError(
                f"{n_started} processes were started, and accelerate sees {state.num_processes} with the model on {device}. Put the model "
                "on the devices that the processes were started for, or start one."
            )
        return cls(state.process_index, state.num_processes)

    @property
    def main(self) -> bool:
        """Tell whether this is the process that joins what the others collected."""
        return self.index == 0

    def together(self, action: Callable[[], T], *, main_only: bool = False) -> T | None:
        """Do something in every process (or the main one), wait for all, and raise in each what one of them raised.

        Raises:
            CodebookError: this process's own; `DataError` where another one failed.
        """
        result: T | None = None
        failed: Exception | None = None
        try:
            if self.main or not main_only:
                result = action()
        except Exception as error:
            failed = error
        told = self._gathered(None if failed is None else f"process {self.index}: {failed}")
        if failed is not None:
            raise failed
        others = [text for text in told if text is not None]
        if others:
            raise DataError(f"another process failed, so this one stops too ({others[0]}). Mend that, and go on with resume=True.")
        return result

    def _gathered(self, item: Any) -> list[Any]:
        if self.count == 1:
            return [item]
        from accelerate.utils import gather_object

        return list(gather_object([item]))
