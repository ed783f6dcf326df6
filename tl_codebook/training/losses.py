"""The language model with its codebooks as one trainable module, and its loss."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_codebook.attachment import sites
from tl_codebook.codebook import Codebook
from tl_codebook.contexts import masked
from tl_codebook.errors import TrainingError
from tl_codebook.training.config import CodebookTrainingConfig
from tl_codebook.training.schedule import kl_at_step
from tl_codebook.training.teacher import BaseTeacher, divergence

__all__ = ["LanguageModel", "codebook_loss", "parameter_groups"]


def codebook_loss(books: Iterable[Codebook], config: CodebookTrainingConfig) -> Float[Tensor, ""]:
    """Weigh and add up the loss terms that the codebooks kept of the last forward pass in training mode.

    >>> from tl_codebook.codebook import Codebook, CodebookConfig
    >>> book = Codebook(4, CodebookConfig(n_codes=2)).train()
    >>> book.codes.data = torch.tensor([[[0.0, 0, 0, 0], [9.0, 9, 9, 9]]])
    >>> _ = book(torch.tensor([[1.0, 1, 1, 1]]))
    >>> codebook_loss([book], CodebookTrainingConfig(reconstruction=1.0, commitment=0.5)).item()
    1.5
    """
    total: Tensor | float = 0.0
    for book in books:
        if book.terms is None:
            raise TrainingError(
                f"{book.label or 'a codebook'} has no loss terms: its last forward pass was not in training mode, or ran under reentrant "
                "gradient checkpointing, which keeps no graph. Call model.train(), or checkpoint with use_reentrant=False."
            )
        scale = 1.0 / book.d_in if config.per_dimension else 1.0
        commitment = book.terms.commitment * (book.terms.n_positions if config.commitment_over_positions == "sum" else 1)
        total = total + scale * (config.reconstruction * book.terms.reconstruction + config.commitment * commitment)
    return total if isinstance(total, Tensor) else torch.tensor(total)


class LanguageModel(nn.Module):
    """A host as HF's `Trainer` wants a model: labels in, loss out; the codebooks' loss terms are part of it."""

    accepts_loss_kwargs = True  # Trainer then says how many tokens the whole batch has, over steps and processes

    def __init__(self, hooked: Any, config: CodebookTrainingConfig):
        super().__init__()
        self.hooked = hooked
        self.training_config = config
        self.teacher: BaseTeacher | None = None
        """The base that `kl_to_base` compares with; the trainer sets it for as long as it trains."""
        self.kl_weight = torch.tensor(float(config.kl_to_base))
        """Of the divergence at this step. A tensor: were it a number, a compiled model would be compiled anew at every step."""
        self.compares = config.kl_to_base > 0

    def set_step(self, step: int) -> None:
        """Weigh the divergence from the base as the configuration has it for a step, counted from 0."""
        weight = kl_at_step(step, self.training_config.kl_to_base, self.training_config.kl_steps)
        self.kl_weight.fill_(weight)
        self.compares = weight > 0

    def to(self, *args: Any, **kwargs: Any) -> LanguageModel:
        """Move the host by its own method, which knows more than `Module.to` (its config, its registry)."""
        self.hooked.to(*args, **kwargs, print_details=False)
        return self

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Trade time for memory, where the host can; `TrainingArguments(gradient_checkpointing=True)` comes here."""
        inner = getattr(self.hooked, "original_model", None)
        if inner is None or not hasattr(inner, "gradient_checkpointing_enable"):
            raise TrainingError(
                "gradient_checkpointing=True was asked for, and this host has none. Use a TransformerBridge, or smaller batches."
            )
        if (gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise TrainingError(
                "reentrant checkpointing keeps no loss terms of the codebooks. Use gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        inner.gradient_checkpointing_enable({**(gradient_checkpointing_kwargs or {}), "use_reentrant": False}, **kwargs)

    def forward(
        self,
        input_ids: Int[Tensor, "batch pos"],
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        labels: Int[Tensor, "batch pos"] | None = None,
        num_items_in_batch: Any = None,
    ) -> dict[str, Tensor]:
        """Return the loss (language model plus codebooks), per-sequence sums (loss, tokens, correct) and the logits."""
        # With padding on the right a causal model needs no mask; hosts differ in what they do with one.
        left_padded = attention_mask is not None and bool((attention_mask[:, 0] == 0).any())
        kwargs = {"attention_mask": attention_mask} if left_padded else {}
        base = self._base_logits(input_ids, **kwargs) if self.training and labels is not None else None
        with masked(self.hooked, None if attention_mask is None else attention_mask.bool()):
            logits = self.hooked(input_ids, return_type="logits", **kwargs)
        if labels is None:
            return {"logits": logits}
        targets = labels[:, 1:]
        losses = nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")
        losses = losses.view(targets.shape)
        valid = targets != -100
        n_targets = valid.sum()
        loss = losses.sum() / n_targets.clamp(min=1)
        if self.training:
            loss = loss + codebook_loss((p.codebook for p in sites(self.hooked).values() if p.enabled), self.training_config)
        if base is not None:
            kl = divergence(base[:, :-1][valid], logits[:, :-1][valid]) / n_targets.clamp(min=1)
            loss = loss + self.kl_weight * kl
        if num_items_in_batch is not None:
            loss = loss * n_targets / num_items_in_batch
        correct = (logits[:, :-1].argmax(-1) == targets) & valid
        sums = torch.stack([losses.sum(-1), valid.sum(-1).float(), correct.sum(-1).float()], dim=-1).detach()
        return {"loss": loss, "sums": sums, "logits": logits}

    def _base_logits(self, input_ids: Tensor, **kwargs: Any) -> Tensor | None:
        if not self.compares:
            return None
        if self.teacher is None:
            raise TrainingError(
                f"kl_to_base={self.training_config.kl_to_base} was asked for, and there is no base to compare with. Train with "
                "CodebookTrainer.train, which keeps one, or set kl_to_base=0."
            )
        return self.teacher.logits(input_ids, **kwargs)


def parameter_groups(model: Any, *, codes_learning_rate: float, learning_rate: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Split the trainable parameters into those of the codebooks (no weight decay) and those of the base.

    Source: the optimiser groups of the original library, with every live parameter in its group.

    >>> from tl_codebook import attach
    >>> _ = attach(model, "mlp_out", n_codes=16)
    >>> [len(group["params"]) for group in parameter_groups(model, codes_learning_rate=1e-3, learning_rate=5e-4)][0]
    2
    """
    own = [p for point in sites(model).values() for p in point.codebook.parameters() if p.requires_grad]
    ids = {id(p) for p in own}
    base = [p for p in model.parameters() if p.requires_grad and id(p) not in ids]
    groups = [{"params": own, "lr": codes_learning_rate, "weight_decay": 0.0}]
    if base:
        groups.append({"params": base, "lr": learning_rate, "weight_decay": weight_decay})
    return groups
