"""What a training run does beside what `TrainingArguments` says."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

from tl_codebook.errors import ConfigError, check_whole
from tl_codebook.snap.gradients import ESTIMATORS

__all__ = ["CodebookTrainingConfig"]

_NUMBER = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_ORIGINAL_LOSS = re.compile(rf"base|aeloss|(?P<committed>vqvae|fullaeloss)(?:-(?P<weight>{_NUMBER}))?")


@dataclass(frozen=True)
class CodebookTrainingConfig:
    """The training recipe of codes: initialisation, losses, revival. Works with `HfArgumentParser`.

    The defaults are the recipe of this package: k-means on the base's own activations, reconstruction and commitment per dimension
    beside the language-model loss, revival of dead codes at badly fitted inputs. `paper()` is that of Tamkin et al. 2023, `original()` any
    of the losses of its library. Off unless asked for: the rotation trick (`estimator`), a divergence from the base beside the
    language-model loss (`kl_to_base`, which costs a forward pass of the base a step and a copy of the weights that train; `kl_steps` has it
    fade out), and snaps that set in gradually (`ramp_steps`).

    Raises:
        ConfigError: for values out of range.

    Source: Fifty et al. 2024 (arXiv 2410.06424), section 4, for ``rotation``.

    >>> CodebookTrainingConfig.paper().init
    'none'
    """

    codes_learning_rate: float = field(
        default=3e-3, metadata={"help": "Learning rate of the codes (and their LayerNorms); that of the base is --learning_rate."}
    )
    freeze_base: bool = field(default=False, metadata={"help": "Train the codes alone."})
    reconstruction: float = field(default=1.0, metadata={"help": "Weight of |codes - stop(input)|^2."})
    commitment: float = field(default=1.0, metadata={"help": "Weight of |stop(codes) - input|^2."})
    commitment_over_positions: str = field(
        default="mean", metadata={"help": "mean or sum of the commitment over the positions of a batch; sum is the original library's."}
    )
    per_dimension: bool = field(
        default=True, metadata={"help": "Mean over the dimensions of a site in both terms; False sums, as in the paper."}
    )
    lm_gradient_to_codes: bool = field(
        default=True, metadata={"help": "Let the language-model loss move the codes; False is the VQ-VAE estimator."}
    )
    estimator: str = field(
        default="straight_through",
        metadata={"help": "straight_through or rotation: the gradient passes a snap as it is, or turned as the snap turned the vector."},
    )
    kl_to_base: float = field(
        default=0.0,
        metadata={"help": "Weight of KL(base || codebook model) of the next token, in nats; base = no codebooks, weights of the start."},
    )
    kl_steps: int = field(
        default=0, metadata={"help": "Steps over which the weight of kl_to_base falls to 0, in a line; 0 keeps it as it is."}
    )
    ramp_steps: int = field(
        default=0,
        metadata={
            "help": "Steps over which the output of a codebook goes from its input (the normalised one where input_norm is layer_norm, not "
            "the activation) to its codes; 0 snaps from the start."
        },
    )
    init: str = field(
        default="kmeans", metadata={"help": "kmeans (on the base's activations, codebooks that are still noise only) or none."}
    )
    init_tokens: int = field(default=16_384, metadata={"help": "Tokens that k-means looks at."})
    init_iterations: int = field(default=10, metadata={"help": "Lloyd iterations of a k-means stage."})
    revive_every: int = field(default=50, metadata={"help": "Replace codes that have not fired for this many steps; 0 never does."})
    revive_until: float = field(default=0.9, metadata={"help": "Share of the run after which no code is replaced any more."})
    k_start: int | None = field(
        default=None, metadata={"help": "Codes at a time at the first step, falling to the k of each codebook; by default always that k."}
    )
    k_decay_steps: int | None = field(default=None, metadata={"help": "The step, counted from 1, at which k_start has fallen to k."})
    k_decay_power: float = field(default=1.0, metadata={"help": "Shape of the fall: 1 is a line, more falls faster at first."})
    log_sites: bool = field(default=False, metadata={"help": "Add the figures of every site to those of an evaluation."})

    def __post_init__(self) -> None:
        for name in ("codes_learning_rate", "reconstruction", "commitment", "kl_to_base"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")):
                raise ConfigError(f"{name}={value!r} was asked for. Give a number >= 0.")
        for name, least in (("init_tokens", 1), ("init_iterations", 1), ("revive_every", 0), ("kl_steps", 0), ("ramp_steps", 0)):
            check_whole(name, getattr(self, name), least)
        for name in ("freeze_base", "per_dimension", "lm_gradient_to_codes", "log_sites"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r} was asked for. Give True or False.")
        if self.kl_steps and not self.kl_to_base:
            raise ConfigError(f"kl_steps={self.kl_steps} was asked for, and kl_to_base=0 has nothing that could fall. Give kl_to_base too.")
        if not 0 <= self.revive_until <= 1:
            raise ConfigError(f"revive_until={self.revive_until!r} was asked for. Give a share from 0 to 1.")
        if self.init not in ("kmeans", "none"):
            raise ConfigError(f"init={self.init!r} is not known. Choose 'kmeans' or 'none'.")
        if self.estimator not in ESTIMATORS:
            raise ConfigError(f"estimator={self.estimator!r} is not known. Choose 'straight_through' or 'rotation'.")
        if self.commitment_over_positions not in ("mean", "sum"):
            raise ConfigError(f"commitment_over_positions={self.commitment_over_positions!r} is not known. Choose 'mean' or 'sum'.")
        self._check_k_schedule()

    def _check_k_schedule(self) -> None:
        for name in ("k_start", "k_decay_steps"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ConfigError(f"{name}={value!r} was asked for. Give a whole number >= 1, or None for no schedule.")
        power = self.k_decay_power
        if not (isinstance(power, int | float) and not isinstance(power, bool) and 0 < power < float("inf")):
            raise ConfigError(f"k_decay_power={power!r} was asked for. Give a number > 0.")
        if (self.k_start is None) != (self.k_decay_steps is None):
            raise ConfigError(
                f"k_start={self.k_start!r} and k_decay_steps={self.k_decay_steps!r} were asked for. A k schedule needs both; leave both "
                "out for a constant k."
            )

    @classmethod
    def paper(cls, **changes: Any) -> CodebookTrainingConfig:
        """Return the recipe of the original library: codes from noise, summed reconstruction of weight 1, no commitment, no revival.

        Source: Tamkin et al. 2023, section 2 and appendix (loss ``aeloss``).
        """
        return cls.original("aeloss", **changes)

    @classmethod
    def original(cls, loss: str, **changes: Any) -> CodebookTrainingConfig:
        """Return the recipe of the original library with one of its losses; `changes` are fields to set otherwise.

        ==================  ==============================  ============================================
        loss                what moves the codes            what moves their inputs
        ==================  ==============================  ============================================
        ``base``            language model                  language model
        ``aeloss``          language model, reconstruction  language model
        ``vqvae-<b>``       reconstruction                  language model, commitment of weight b
        ``fullaeloss-<b>``  language model, reconstruction  language model, commitment of weight b
        ==================  ==============================  ============================================

        ``-<b>`` is a number >= 0, 0.25 where it is left out. Both terms are sums over the dimensions; over the positions of a forward pass
        the reconstruction is a mean and the commitment, as in the original, a sum, so its weight grows with the batch.

        Raises:
            ConfigError: for another loss, or a weight where there is none, or one that is no number.

        Source: codebook-features 0.1.2, `BaseSnapFunction`.

        >>> CodebookTrainingConfig.original("vqvae-0.5").commitment
        0.5
        """
        match = _ORIGINAL_LOSS.fullmatch(loss) if isinstance(loss, str) else None
        if match is None:
            raise ConfigError(
                f"the loss {loss!r} is none of the original's. Give 'base', 'aeloss', 'vqvae' or 'fullaeloss', the last two with a weight "
                "of the commitment >= 0 if it is not 0.25: 'vqvae-0.5'."
            )
        settings: dict[str, Any] = {
            "codes_learning_rate": 1e-3,
            "reconstruction": 0.0 if loss == "base" else 1.0,
            "commitment": float(match["weight"] or 0.25) if match["committed"] else 0.0,
            "commitment_over_positions": "sum",
            "per_dimension": False,
            "lm_gradient_to_codes": match["committed"] != "vqvae",
            "init": "none",
            "revive_every": 0,
        }
        return cls(**settings | changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return dataclasses.asdict(self)
