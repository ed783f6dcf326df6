"""A codebook: a layer that replaces a vector by the sum or the mean of a few learned codes.

Axes: ``batch pos group code k d_in d_group layer head``; ``*lead`` stands for any leading axes (usually ``batch pos``).
One class serves plain and grouped codebooks: plain is one group, per-head is one group per attention head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_codebook.errors import ConfigError, NonFiniteError, ShapeError, check_whole
from tl_codebook.snap import decode, select, snap, through
from tl_codebook.usage import Usage

__all__ = ["Codebook", "CodebookConfig", "SnapTerms"]

_CHOICES: dict[str, tuple[Any, ...]] = {
    "similarity": ("inner_product", "euclidean"),
    "selection": ("nearest", "residual"),
    "input_norm": ("none", "layer_norm"),
    "reduce": ("sum", "mean", None),
}


@dataclass(frozen=True)
class CodebookConfig:
    """What a codebook is, apart from its weights.

    Args:
        n_codes: Codes in each group, >= 1.
        k: Codes chosen per group and position, 1 <= k <= n_codes.
        n_groups: Codebooks side by side; None = one per attention head at z, q, k, v and one elsewhere.
        similarity: What "most similar" means: minus the Euclidean distance, or the inner product with the normalised code.
        selection: ``nearest`` = the k most similar codes; ``residual`` = greedy pursuit, each code the best for what the ones before left.
        input_norm: ``layer_norm`` = one LayerNorm per group before the snap, as in the paper; the output is not scaled back.
        reduce: How chosen codes become a vector; None = ``sum`` with residual selection, ``mean`` with nearest.

    Raises:
        ConfigError: for a combination that cannot be.

    >>> CodebookConfig(n_codes=1024, k=8)
    CodebookConfig(n_codes=1024, k=8, n_groups=None, similarity='euclidean', selection='residual', input_norm='none', reduce='sum')
    """

    n_codes: int
    k: int = 1
    n_groups: int | None = None
    similarity: Literal["inner_product", "euclidean"] = "euclidean"
    selection: Literal["nearest", "residual"] = "residual"
    input_norm: Literal["none", "layer_norm"] = "none"
    reduce: Literal["sum", "mean"] | None = None

    def __post_init__(self) -> None:
        for field in ("n_codes", "k", "n_groups"):
            value = getattr(self, field)
            if value is None and field == "n_groups":
                continue
            check_whole(field, value, 1)
        if self.k > self.n_codes:
            raise ConfigError(f"k={self.k} codes were asked for, but there are n_codes={self.n_codes}. Give k <= n_codes.")
        for field, known in _CHOICES.items():
            if getattr(self, field) not in known:
                raise ConfigError(f"{field}={getattr(self, field)!r} is not known. Choose one of {[c for c in known if c]}.")
        if self.reduce is None:
            object.__setattr__(self, "reduce", "sum" if self.selection == "residual" else "mean")
        if self.selection == "residual" and self.reduce == "mean":
            raise ConfigError(
                "selection='residual' with reduce='mean' was asked for. Greedy pursuit adds up its codes: use reduce='sum', or "
                "selection='nearest'."
            )

    @classmethod
    def paper(cls, n_codes: int, k: int = 1, n_groups: int | None = None) -> CodebookConfig:
        """Return the configuration of Tamkin et al. 2023: cosine ranking, LayerNorm first, mean of the k nearest.

        >>> CodebookConfig.paper(10_000, k=8).reduce
        'mean'
        """
        return cls(n_codes, k, n_groups, "inner_product", "nearest", "layer_norm", "mean")

    def with_groups(self, n_groups: int) -> CodebookConfig:
        """Return the same configuration with the number of groups decided."""
        return dataclasses.replace(self, n_groups=n_groups)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> CodebookConfig:
        """Build a configuration from JSON values; unknown and missing keys raise."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown, missing = sorted(set(fields) - known), sorted(known - set(fields))
        if unknown or missing:
            raise ConfigError(f"a codebook configuration has unknown keys {unknown} and lacks {missing}. Its keys are {sorted(known)}.")
        return cls(**fields)


class SnapTerms(NamedTuple):
    """The loss terms of one forward pass, each a mean over positions of a sum over dimensions."""

    reconstruction: Float[Tensor, ""]
    """|q - stop(y)|^2: moves the codes to the input."""
    commitment: Float[Tensor, ""]
    """|stop(q) - y|^2: moves the input to the codes."""
    d_in: int
    """Dimensions summed over, for those who want a mean."""
    n_positions: Int[Tensor, ""] | int
    """Positions averaged over, without those that `masked` leaves out, at least 1; for those who want a sum."""


class Codebook(nn.Module):
    """Replace each vector by the sum or the mean of its k best codes, per group.

    Args:
        d_in: Width of the input, a multiple of ``config.n_groups``.
        config: What the codebook is.
        on_nonfinite: ``raise`` on NaN or Inf in the input, or ``propagate`` it: ids -1 and NaN out, never a valid code.

    Codes start as standard normal noise (as in the original library); see `tl_codebook.training` for k-means.

    >>> book = Codebook(64, CodebookConfig(n_codes=32, k=2, n_groups=8))
    >>> book.codes.shape, book.encode(torch.randn(5, 64)).shape, book(torch.randn(5, 64)).shape
    (torch.Size([8, 32, 8]), torch.Size([5, 8, 2]), torch.Size([5, 64]))
    """

    codes: Float[Tensor, "group code d_group"]
    norm_weight: Float[Tensor, "group d_group"] | None
    norm_bias: Float[Tensor, "group d_group"] | None

    def __init__(self, d_in: int, config: CodebookConfig, *, on_nonfinite: Literal["raise", "propagate"] = "raise"):
        super().__init__()
        if on_nonfinite not in ("raise", "propagate"):
            raise ConfigError(f"on_nonfinite={on_nonfinite!r} is not known. Choose 'raise' or 'propagate'.")
        self.d_in = d_in
        self.config = config if config.n_groups is not None else config.with_groups(1)
        n_groups = self.n_groups
        check_whole("d_in", d_in, 1)
        if d_in % n_groups:
            near = sorted((d for d in range(1, d_in + 1) if d_in % d == 0), key=lambda d: abs(d - n_groups))[:2]
            raise ConfigError(
                f"d_in={d_in} cannot be split into n_groups={n_groups} equal groups. Divisors near {n_groups}: "
                f"{', '.join(map(str, sorted(near)))}. For one group per attention head use the site 'z' and leave n_groups out."
            )
        self.on_nonfinite = on_nonfinite
        self.label = ""
        self.fresh = True
        """True while the codes are the noise that they start as; k-means, training and loading end it."""
        self.lm_gradient_to_codes = True
        """False detaches the codes from what comes after (the VQ-VAE estimator); their only gradient is the reconstruction term."""
        self.k_now: int | None = None
        """Codes chosen instead of the configured k while a k schedule trains; None = the configured k. No part of a checkpoint."""
        self.estimator = "straight_through"
        """How the gradient passes the snap, see `tl_codebook.snap.through`; the trainer sets it while it trains. Not in checkpoints."""
        self.strength = 1.0
        """How far from the input to the codes the output lies while a ramp trains, 0 to 1; 1 = the codes. No part of a checkpoint."""
        self.count_when: Literal["train", "always", "never"] = "train"
        self.token_mask: Bool[Tensor, "*lead"] | None = None
        self._mask_of_forward: Tensor | None = None
        self.terms: SnapTerms | None = None
        self.keep_inputs = False
        self.last_inputs: tuple[Tensor, Tensor] | None = None
        self.usage = Usage(n_groups, config.n_codes, d_in // n_groups)
        self.codes = nn.Parameter(torch.randn(n_groups, config.n_codes, d_in // n_groups))
        if config.input_norm == "layer_norm":
            self.norm_weight = nn.Parameter(torch.ones(n_groups, d_in // n_groups))
            self.norm_bias = nn.Parameter(torch.zeros(n_groups, d_in // n_groups))
        else:
            self.register_parameter("norm_weight", None)
            self.register_parameter("norm_bias", None)

    @property
    def label(self) -> str:
        """The site that `attach` or `attach_hf` put the codebook at, empty elsewhere; it opens the messages of errors."""
        return self._label

    @label.setter
    def label(self, label: str) -> None:
        self._label, self._labelled = label, id(self)

    @property
    def at_work(self) -> bool:
        """Tell whether a model holds this very codebook; a copy of it takes the label along, and is held by none."""
        return bool(self._label) and self._labelled == id(self)

    @property
    def n_groups(self) -> int:
        """Return the number of groups."""
        return self.config.n_groups or 1

    @property
    def d_group(self) -> int:
        """Return the width of one group."""
        return self.d_in // self.n_groups

    @property
    def n_codes(self) -> int:
        """Return the number of codes in each group."""
        return self.config.n_codes

    @property
    def k(self) -> int:
        """Return how many codes are chosen per group and position: `config.k`, or `k_now` while a schedule sets it."""
        return self.config.k if self.k_now is None else self.k_now

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.fresh = False

    def extra_repr(self) -> str:
        """Describe the codebook in the printed module tree."""
        c = self.config
        return f"d_in={self.d_in}, n_codes={c.n_codes}, k={c.k}, n_groups={c.n_groups}, {c.similarity}, {c.selection}, {c.reduce}"

    def __getstate__(self) -> dict[str, Any]:
        # Loss terms hang on the graph of the last forward: they can be neither copied nor pickled, and mean nothing to a copy.
        return {**self.__dict__, "terms": None, "last_inputs": None, "token_mask": None, "_mask_of_forward": None}

    def grouped(self, x: Float[Tensor, "*lead d_in"]) -> Float[Tensor, "*lead group d_group"]:
        """Split the last axis into groups, and refuse what is not a batch of vectors of this width."""
        where = f"{self.label}: " if self.label else ""
        if not x.is_floating_point() or x.is_complex() or x.layout is not torch.strided or x.is_meta:
            raise ShapeError(
                f"{where}a codebook was given a {x.dtype} {x.layout} tensor on {x.device}. Give dense floating-point activations."
            )
        if x.ndim < 2 or x.shape[-1] != self.d_in:
            raise ShapeError(
                f"{where}a codebook of d_in={self.d_in} was given {tuple(x.shape)}. Give [..., {self.d_in}] with a batch axis."
            )
        if x.device != self.codes.device:
            raise ShapeError(
                f"{where}the activation is on {x.device}, the codes are on {self.codes.device}. Call model.to({str(x.device)!r})."
            )
        return rearrange(x, "... (group d_group) -> ... group d_group", group=self.n_groups)

    def normalise(self, x: Float[Tensor, "*lead group d_group"]) -> Float[Tensor, "*lead group d_group"]:
        """Bring the input to the dtype of the codes and, where the configuration says so, apply the LayerNorm of each group."""
        x = x.to(self.codes.dtype)
        if self.norm_weight is None or self.norm_bias is None:
            return x
        with torch.autocast(device_type=x.device.type, enabled=False):
            return torch.nn.functional.layer_norm(x, (self.d_group,), eps=1e-5) * self.norm_weight + self.norm_bias

    def choose(
        self, y: Float[Tensor, "*lead group d_group"], disabled: Bool[Tensor, "*#lead group code"] | None = None
    ) -> Int[Tensor, "*lead group k"]:
        """Choose the codes of normalised inputs; NaN or Inf raises, or gives ids of -1 where ``on_nonfinite="propagate"``."""
        c = self.config
        ids = select(y, self.codes, self.k, similarity=c.similarity, selection=c.selection, disabled=disabled)
        self._refuse_nonfinite(y, ids)
        return ids

    def snap(self, y: Float[Tensor, "*lead group d_group"]) -> tuple[Float[Tensor, "*lead group d_group"], Int[Tensor, "*lead group k"]]:
        """Choose and decode in one go: the numbers of `decode` of `choose`, bit for bit, in one pass over the input."""
        c = self.config
        q, ids = snap(y, self.codes, self.k, similarity=c.similarity, selection=c.selection, reduce=c.reduce or "sum", through=False)
        self._refuse_nonfinite(y, ids)
        return q, ids

    def _refuse_nonfinite(self, y: Tensor, ids: Tensor) -> None:
        # A vector with NaN or Inf has ids of -1. Looking at the ids is cheaper than looking at the vectors.
        if self.on_nonfinite == "propagate":
            return
        if torch.compiler.is_compiling():
            torch._assert_async((ids >= 0).all(), "NaN or Inf reached a codebook")
        elif (ids < 0).any() and (bad := int((~torch.isfinite(y)).any(-1).sum())):
            raise NonFiniteError(
                f"{self.label or 'a codebook'}: {bad} of {y[..., 0].numel()} vectors hold NaN or Inf, which a snap would turn into a "
                "valid code. Find where they come from (a lower learning rate or fp32 often cures it), or set on_nonfinite='propagate' to "
                "get NaN out."
            )

    def emit(
        self,
        y: Float[Tensor, "*lead group d_group"],
        ids: Int[Tensor, "*lead group slot"],
        q: Float[Tensor, "*lead group d_group"] | None = None,
    ) -> Float[Tensor, "*lead group d_group"]:
        """Decode ids (unless `snap` has, and gave `q`), differentiable in `y`; keep this forward's loss terms and count what fired."""
        if q is None:
            q = self.decode(ids)
            if self.on_nonfinite == "propagate":
                q = torch.where(torch.isfinite(y).all(-1, keepdim=True), q, torch.nan)
        recomputing = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1  # gradient checkpointing
        # Recomputing happens in the backward pass, when `masked` has ended: it has to take the same path as the forward pass did.
        mask = self._mask_of_forward if recomputing else self._mask_for(y)
        self._mask_of_forward = mask
        terms = self._terms(y, q, mask) if self.training and torch.is_grad_enabled() else None
        if not recomputing:
            self.terms = terms
            if self.count_when == "always" or (self.count_when == "train" and self.training):
                with torch.no_grad():
                    self.usage.add(y, q, ids, mask)
            if self.keep_inputs:
                flat = (y.detach().flatten(0, -3), q.detach().flatten(0, -3))
                self.last_inputs = flat if mask is None else (flat[0][mask.reshape(-1)], flat[1][mask.reshape(-1)])
        return through(y, q, to_codes=self.lm_gradient_to_codes, estimator=self.estimator, strength=self.strength)

    def _mask_for(self, y: Tensor) -> Tensor | None:
        if self.token_mask is None:
            return None
        mask = self.token_mask.to(y.device)
        if mask.numel() != y[..., 0, 0].numel():
            raise ShapeError(
                f"{self.label or 'a codebook'}: the padding mask is {tuple(mask.shape)}, the activations are "
                f"{tuple(y.shape[:-2])}. Give one value a position."
            )
        return mask.bool()

    def _terms(self, y: Tensor, q: Tensor, mask: Tensor | None) -> SnapTerms:
        n_positions = y.shape[:-2].numel() if mask is None else mask.sum().clamp(min=1)

        def mean_square(difference: Tensor) -> Tensor:
            if mask is not None:
                difference = difference.masked_fill(~mask.reshape(*difference.shape[:-2], 1, 1), 0.0)  # NaN * 0 would be NaN
            return difference.float().square().sum() / n_positions

        return SnapTerms(mean_square(q - y.detach()), mean_square(q.detach() - y), self.d_in, n_positions)

    def encode(self, x: Float[Tensor, "*lead d_in"]) -> Int[Tensor, "*lead group k"]:
        """Return the ids of the chosen codes, most similar first."""
        return self.choose(self.normalise(self.grouped(x)))

    def decode(self, ids: Int[Tensor, "*lead group slot"]) -> Float[Tensor, "*lead group d_group"]:
        """Turn ids into vectors; -1 is an empty slot (zero), -2 is no slot."""
        return decode(ids, self.codes, self.config.reduce or "sum")

    def forward(self, x: Float[Tensor, "*lead d_in"]) -> Float[Tensor, "*lead d_in"]:
        """Snap `x`: the output has its shape and dtype."""
        y = self.normalise(self.grouped(x))
        q, ids = self.snap(y)
        return rearrange(self.emit(y, ids, q), "... group d_group -> ... (group d_group)").to(x.dtype)
