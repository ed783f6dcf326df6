"""What a TokFSM experiment is: machine, model, codebooks, training. Two presets, `mini` and `paper`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tl_codebook.codebook import CodebookConfig
from tl_codebook.errors import ConfigError, check_whole
from tl_codebook.experiments.tokfsm.machine import TokFSM
from tl_codebook.training.config import CodebookTrainingConfig

__all__ = ["ARCHITECTURES", "OPTIONS", "RECIPES", "TokFSMSetting"]

ARCHITECTURES = ("gpt2", "gpt_neox")
"""``gpt2``: learned positions, MLP after attention. ``gpt_neox``: rotary positions, parallel blocks, as in Tamkin et al. 2023."""

OPTIONS = ("recipe", "architecture", "base_steps", "code_steps", "batch_size", "compiled")
"""Fields of a setting that the command line can change, each by an option of its name."""

RECIPES = ("default", "paper")
"""``default``: the base first, then codes from its activations. ``paper``: both at once, from scratch, as Tamkin et al. 2023 trained."""


@dataclass(frozen=True)
class TokFSMSetting:
    """A TokFSM experiment, complete but for the seed. Nothing in it is special to this machine: it only names sizes and steps.

    Raises:
        ConfigError: sizes that cannot be: more edges than states, rows that are no multiple of the digits of a state, a width that heads
            do not divide, as many codes as no codebook may have, an unknown recipe. Before anything is built.

    >>> TokFSMSetting.mini().machine()
    TokFSM(n_states=20, n_edges=80, base=10, n_digits=2)
    >>> TokFSMSetting.mini(n_edges=30)
    Traceback (most recent call last):
    tl_codebook.errors.ConfigError: n_edges=30 was asked for, ...
    """

    name: str = "mini"
    n_states: int = 20
    n_edges: int = 4
    machine_seed: int = 42
    base: int = 10
    n_tokens: int = 128
    """Tokens of a row, BOS counted."""
    architecture: str = "gpt_neox"
    """``gpt2`` or ``gpt_neox``. Which digit of a state comes next is a matter of position: learned positions tell it, whereas with rotary
    ones, none of which turns by half a circle a token, the model works it out from the text, and now and then goes wrong by a digit."""
    n_layers: int = 2
    d_model: int = 64
    n_heads: int = 2
    z_codes: tuple[int, ...] = (128, 128)
    """Codes of each head, layer by layer."""
    mlp_codes: tuple[int, ...] = (16, 128)
    """Codes of each MLP, layer by layer. With ``gpt_neox`` that of layer 0 sees the token alone: ``base + 1`` inputs at most."""
    k: int = 1
    similarity: Literal["euclidean", "inner_product"] = "euclidean"
    input_norm: Literal["none", "layer_norm"] = "none"
    recipe: str = "default"
    batch_size: int = 64
    base_steps: int = 600
    """Steps of the model without codebooks; with the recipe ``paper`` there is no such stage and its steps go to the other."""
    code_steps: int = 400
    base_learning_rate: float = 3e-3
    learning_rate: float = 1e-3
    """Of the base's weights while the codes train."""
    adam_beta2: float = 0.99
    compiled: bool = False
    """Train under `torch.compile`, which needs a C++ compiler on a CPU."""
    training: CodebookTrainingConfig = field(default_factory=CodebookTrainingConfig)
    held_out_rows: int = 400
    """Rows that all figures are measured on; codes are chosen for concepts on the first half, and scored on the second."""
    sampled_rows: int = 1000
    """Rows of text that the model writes, whose transitions are checked."""
    forced_prefixes: int = 10
    """Random texts that each state is forced into."""
    dictionary_steps: int = 1000
    """Training steps of the TopK dictionaries that the codes are compared with."""

    def __post_init__(self) -> None:
        for name in ("n_layers", "d_model", "n_heads", "k", "batch_size", "code_steps", "forced_prefixes", "dictionary_steps"):
            check_whole(name, getattr(self, name), 1)
        for name in ("n_states", "held_out_rows", "sampled_rows"):
            check_whole(name, getattr(self, name), 2)
        for name in ("n_edges", "base", "machine_seed", "n_tokens", "base_steps"):
            check_whole(name, getattr(self, name), 0)
        machine = self.machine()  # checks edges and digits
        if machine.states_in_row(self.n_tokens) < 3:
            raise ConfigError(
                f"n_tokens={self.n_tokens} was asked for, in which a model writes no two complete states after BOS. Give "
                f"{3 * machine.n_digits} or more."
            )
        if self.d_model % self.n_heads or self.d_model // self.n_heads % 2:
            raise ConfigError(
                f"d_model={self.d_model} with n_heads={self.n_heads} was asked for, but each head gets an equal, even share (rotary). "
                f"Give a multiple of {2 * self.n_heads}."
            )
        for name in ("z_codes", "mlp_codes"):
            values = getattr(self, name)
            if not isinstance(values, tuple) or len(values) != self.n_layers:
                raise ConfigError(f"{name}={values!r} was given for {self.n_layers} layers. Give a tuple of one number for each layer.")
        for name in ("base_learning_rate", "learning_rate"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
                raise ConfigError(f"{name}={value!r} was asked for. Give a number > 0.")
        beta = self.adam_beta2
        if not isinstance(beta, int | float) or isinstance(beta, bool) or not 0 <= beta < 1:
            raise ConfigError(f"adam_beta2={beta!r} was asked for. Give a number from 0 to below 1.")
        if not isinstance(self.compiled, bool) or not isinstance(self.training, CodebookTrainingConfig):
            raise ConfigError(
                f"compiled={self.compiled!r} and training={self.training!r:.80} were asked for. Give True or False, and a "
                "CodebookTrainingConfig."
            )
        self._check_recipe()
        self.codebooks()  # checks codes and k

    def _check_recipe(self) -> None:
        for name, known in (("recipe", RECIPES), ("architecture", ARCHITECTURES)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not known. Choose one of {list(known)}.")
        if self.recipe == "default" and self.base_steps < 1:
            raise ConfigError("base_steps=0 was asked for, and the recipe 'default' trains the base first. Give 1 or more.")
        own = {"similarity": "euclidean", "input_norm": "none", "training": CodebookTrainingConfig()}
        changed = [name for name, value in own.items() if getattr(self, name) != value]
        if self.recipe == "paper" and changed:
            raise ConfigError(f"{', '.join(changed)} and recipe='paper' were asked for, which has its own. Leave them out.")

    @classmethod
    def mini(cls, **changes: Any) -> TokFSMSetting:
        """Return the small preset: 20 states, 2 layers, width 64; a few minutes on two cores."""
        return cls(**changes)

    @classmethod
    def paper(cls, **changes: Any) -> TokFSMSetting:
        """Return the paper's machine and a model of its size (100 states, 4 layers, width 128), at most 1,024 codes a codebook, k=1.

        Source: Tamkin et al. 2023, section 3; their codebooks have 10,000 codes, and their model is a ``gpt_neox``.
        """
        settings: dict[str, Any] = {
            "name": "paper",
            "n_states": 100,
            "n_edges": 10,
            "architecture": "gpt2",
            "n_layers": 4,
            "d_model": 128,
            "n_heads": 4,
            "z_codes": (1024, 1024, 1024, 1024),
            "mlp_codes": (1024, 1024, 1024, 1024),
            "batch_size": 16,
            "base_steps": 6000,
            "code_steps": 5000,
            "base_learning_rate": 1.5e-3,
            "compiled": True,
        }
        if changes.get("recipe") != "paper":  # which has its own training
            settings["training"] = CodebookTrainingConfig(estimator="rotation", kl_to_base=4.0, kl_steps=2500)
        return cls(**settings | changes)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> TokFSMSetting:
        """Return a preset by its name, ``mini`` or ``paper``.

        Raises:
            ConfigError: another name.

        >>> TokFSMSetting.preset("paper").d_model
        128
        """
        presets = {"mini": cls.mini, "paper": cls.paper}
        if name not in presets:
            raise ConfigError(f"the preset {name!r} is not known. Choose 'mini' or 'paper'.")
        return presets[name](**changes)

    def machine(self) -> TokFSM:
        """Build the machine."""
        return TokFSM.random(self.n_states, self.n_edges, seed=self.machine_seed, base=self.base)

    def codebooks(self) -> dict[str, CodebookConfig]:
        """Return the configuration of every codebook by its address, as `attach` takes them."""
        configs = {}
        for layer in range(self.n_layers):
            for site, n_codes in (("z", self.z_codes[layer]), ("mlp_out", self.mlp_codes[layer])):
                if self.recipe == "paper":
                    configs[f"L{layer}.{site}"] = CodebookConfig.paper(n_codes, self.k)
                else:
                    selection: Any = "nearest" if self.k == 1 else "residual"  # of one code they are the same; nearest is the faster
                    configs[f"L{layer}.{site}"] = CodebookConfig(n_codes, self.k, None, self.similarity, selection, self.input_norm)
        return configs

    @property
    def steps(self) -> dict[str, int]:
        """Steps of each stage, in order: ``base`` and ``codes``, or ``codes`` alone where both train from scratch together."""
        if self.recipe == "paper":
            return {"codes": self.base_steps + self.code_steps}
        return {"base": self.base_steps, "codes": self.code_steps}

    @property
    def training_tokens(self) -> int:
        """Tokens seen in all stages, BOS counted."""
        return sum(self.steps.values()) * self.batch_size * self.n_tokens

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> TokFSMSetting:
        """Build a setting from what `to_dict` returned.

        Raises:
            ConfigError: unknown or missing fields.

        >>> TokFSMSetting.from_dict(TokFSMSetting.mini().to_dict()) == TokFSMSetting.mini()
        True
        """
        known = {item.name for item in dataclasses.fields(cls)}
        unknown, missing = sorted(set(fields) - known), sorted(known - set(fields))
        if unknown or missing:
            raise ConfigError(f"a TokFSM setting has unknown fields {unknown} and lacks {missing}. Its fields are {sorted(known)}.")
        own: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
        return cls(**own | {"training": CodebookTrainingConfig(**fields["training"])})
