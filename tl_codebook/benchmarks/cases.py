"""What is measured: a shape, a number of rows, a way to choose, and whether the gradient of the codes is measured too."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_codebook.codebook import CodebookConfig
from tl_codebook.errors import ConfigError

__all__ = ["CASES_CPU", "CASES_GPU", "DTYPES", "Case", "Shape"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Shape:
    """Groups, width of a group, codes of a group, codes chosen.

    >>> Shape.parse("12x64x10000x8")
    Shape(n_groups=12, d_group=64, n_codes=10000, k=8)
    """

    n_groups: int
    d_group: int
    n_codes: int
    k: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Read ``12x64x10000x8``."""
        parts = text.lower().split("x")
        if len(parts) != 4 or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
            raise ConfigError(
                f"the shape {text!r} cannot be read. Give groups, width of a group, codes and k, all >= 1, such as 12x64x10000x8."
            )
        shape = cls(*(int(part) for part in parts))
        if shape.k > shape.n_codes:
            raise ConfigError(f"the shape {text!r} asks for k={shape.k} of {shape.n_codes} codes. Give k <= codes.")
        return shape

    def __str__(self) -> str:
        return f"{self.n_groups}x{self.d_group}x{self.n_codes}x{self.k}"


@dataclass(frozen=True)
class Case:
    """One comparison: every peer gets the same tensors of it."""

    shape: Shape
    rows: int
    selection: str = "nearest"
    similarity: str = "inner_product"
    dtype: str = "float32"
    op: str = "forward"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ConfigError(f"rows={self.rows} was asked for. Give a number >= 1.")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype={self.dtype!r} is not known. Choose one of {', '.join(DTYPES)}.")
        config: Any = {"similarity": self.similarity, "selection": self.selection}
        CodebookConfig(self.shape.n_codes, self.shape.k, self.shape.n_groups, **config)

    @property
    def reduce(self) -> str:
        """Return how codes add up: greedy pursuit sums, the nearest are averaged."""
        return "sum" if self.selection == "residual" else "mean"

    @property
    def name(self) -> str:
        """Return the case in words, for progress lines."""
        return f"{self.shape} {self.selection} {self.similarity} {self.dtype} {self.op}, {self.rows} rows"

    def tensors(
        self, device: torch.device | str, n_inputs: int = 1
    ) -> tuple[list[Float[Tensor, "row group d_group"]], Float[Tensor, "group code d_group"]]:
        """Draw inputs and codes from a standard normal; the same ones on every device."""
        generator = torch.Generator().manual_seed(self.seed)
        s, dtype = self.shape, DTYPES[self.dtype]
        codes = torch.randn(s.n_groups, s.n_codes, s.d_group, generator=generator).to(device, dtype)
        x = torch.randn(self.rows, s.n_groups, s.d_group, generator=generator).to(device, dtype)
        return [x, *(x.roll(i, 0) for i in range(1, n_inputs))], codes

    def upstream(self, device: torch.device | str) -> Float[Tensor, "row group d_group"]:
        """Draw the gradient that comes from above."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        s = self.shape
        return torch.randn(self.rows, s.n_groups, s.d_group, generator=generator).to(device, DTYPES[self.dtype])

    def fields(self) -> dict[str, Any]:
        """Return the case as plain JSON values, the shape in its written form."""
        return {**{field.name: getattr(self, field.name) for field in dataclasses.fields(self)}, "shape": str(self.shape)}

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Case:
        """Read what `fields` wrote."""
        return cls(**fields | {"shape": Shape.parse(fields["shape"])})


def _cases(rows: int, rows_of_largest: int, nearest: list[str], residual: list[str]) -> list[Case]:
    cases = [Case(Shape.parse(text), rows_of_largest if text == "1x3072x16384x64" else rows) for text in nearest]
    return cases + [Case(Shape.parse(text), rows, "residual", "euclidean") for text in residual]


_NEAREST = ["12x64x10000x8", "16x64x1000x1", "1x512x1000x1", "1x768x10000x100", "1x3072x16384x64"]
_RESIDUAL = ["12x64x1024x8", "1x768x1024x8"]

CASES_CPU = _cases(2048, 1024, _NEAREST, _RESIDUAL)
CASES_GPU = _cases(16384, 16384, [*_NEAREST, "32x128x8192x1", "1x4096x65536x64"], _RESIDUAL)
