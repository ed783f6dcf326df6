"""What a training run does beside what `TrainingArguments` says."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from tl_codebook.errors import ConfigError

__all__ = ["CodebookTrainingConfig"]


@dataclass(frozen=True)
class CodebookTrainingConfig:
    """The training recipe of codes: initialisation, losses, revival. Works with `HfArgumentParser`.

    The defaults are the recipe of this package: k-means on the base's own activations, reconstruction and commitment per dimension
    beside the language-model loss, revival of dead codes at badly fitted inputs. `paper()` is that of Tamkin et al. 2023.

    Raises:
        ConfigError: for values out of range.

    >>> CodebookTrainingConfig.paper().init
    'none'
    """

    codes_learning_rate: float = field(
        default=3e-3, metadata={"help": "Learning rate of the codes (and their LayerNorms); that of the base is --learning_rate."}
    )
    freeze_base: bool = field(default=False, metadata={"help": "Train the codes alone."})
    reconstruction: float = field(default=1.0, metadata={"help": "Weight of |codes - stop(input)|^2."})
    commitment: float = field(default=1.0, metadata={"help": "Weight of |stop(codes) - input|^2."})
    per_dimension: bool = field(
        default=True, metadata={"help": "Mean over the dimensions of a site in both terms; False sums, as in the paper."}
    )
    lm_gradient_to_codes: bool = field(
        default=True, metadata={"help": "Let the language-model loss move the codes; False is the VQ-VAE estimator."}
    )
    init: str = field(
        default="kmeans", metadata={"help": "kmeans (on the base's activations, codebooks that are still noise only) or none."}
    )
    init_tokens: int = field(default=16_384, metadata={"help": "Tokens that k-means looks at."})
    init_iterations: int = field(default=10, metadata={"help": "Lloyd iterations of a k-means stage."})
    revive_every: int = field(default=50, metadata={"help": "Replace codes that have not fired for this many steps; 0 never does."})
    revive_until: float = field(default=0.9, metadata={"help": "Share of the run after which no code is replaced any more."})

    def __post_init__(self) -> None:
        for name in ("codes_learning_rate", "reconstruction", "commitment"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")):
                raise ConfigError(f"{name}={value!r} was asked for. Give a number >= 0.")
        for name, least in (("init_tokens", 1), ("init_iterations", 1), ("revive_every", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"{name}={value!r} was asked for. Give a whole number >= {least}.")
        for name in ("freeze_base", "per_dimension", "lm_gradient_to_codes"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r} was asked for. Give True or False.")
        if not 0 <= self.revive_until <= 1:
            raise ConfigError(f"revive_until={self.revive_until!r} was asked for. Give a share from 0 to 1.")
        if self.init not in ("kmeans", "none"):
            raise ConfigError(f"init={self.init!r} is not known. Choose 'kmeans' or 'none'.")

    @classmethod
    def paper(cls, **changes: Any) -> CodebookTrainingConfig:
        """Return the recipe of the original library: codes from noise, summed reconstruction of weight 1, no commitment, no revival.

        Source: Tamkin et al. 2023, section 2 and appendix (loss ``aeloss``).
        """
        settings: dict[str, Any] = {
            "codes_learning_rate": 1e-3,
            "commitment": 0.0,
            "per_dimension": False,
            "init": "none",
            "revive_every": 0,
        }
        return cls(**settings | changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return dataclasses.asdict(self)
