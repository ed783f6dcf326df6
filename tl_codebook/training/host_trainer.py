"""Hugging Face's `Trainer` for a TransformerLens host, with or without codebooks: data, loss and evaluation."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from tl_codebook import files, hosts
from tl_codebook.errors import TrainingError
from tl_codebook.training.config import CodebookTrainingConfig
from tl_codebook.training.data import collate, tokenize_dataset
from tl_codebook.training.losses import LanguageModel
from tl_codebook.training.metrics import summarise_sums

__all__ = ["HostTrainer"]


class HostTrainer(Trainer):
    """Fine-tune a host as a language model; what `CodebookTrainer` is compared with when the host has no codebooks.

    The arguments and errors are those of `CodebookTrainer`. It writes no checkpoints: a host without codebooks has no file format here.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        config: CodebookTrainingConfig | None = None,
        context_length: int | None = None,
        **kwargs: Any,
    ):
        self.hooked = hosts.as_host(model)
        if getattr(args, "fsdp", None) or getattr(args, "deepspeed", None):
            raise TrainingError("FSDP and DeepSpeed shard the codes away from where they are counted. Use DDP (accelerate launch).")
        files.check_writable(str(args.output_dir), overwrite=True)
        train, held_out = (
            None if data is None else tokenize_dataset(data, self.hooked, context_length=context_length)
            for data in (train_dataset, eval_dataset)
        )
        if train is not None and args.per_device_train_batch_size > len(train):
            warnings.warn(
                f"a batch of {args.per_device_train_batch_size} rows was asked for and the data has {len(train)}: every step sees them all",
                stacklevel=3,
            )
        kwargs.setdefault("data_collator", collate)
        self._sums_only = kwargs.get("compute_metrics") is None
        if self._sums_only:
            kwargs["compute_metrics"] = summarise_sums
        wrapped = LanguageModel(self.hooked, config or CodebookTrainingConfig())
        super().__init__(model=wrapped, args=args, train_dataset=train, eval_dataset=held_out, **kwargs)

    def get_optimizer_cls_and_kwargs(self, args: TrainingArguments, model: Any = None) -> tuple[Any, Any]:  # type: ignore[override]
        """Choose the optimiser as `Trainer` does, but no fused kernel for weights that are strided views: it would update their neighbours.

        A TransformerBridge around GPT-2 has its q, k and v as views of one matrix; fused AdamW takes each for one block of memory.
        """
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if settings.get("fused") and any(p.requires_grad and not p.is_contiguous() for p in self.hooked.parameters()):
            settings = {name: value for name, value in settings.items() if name != "fused"}
        return kind, settings

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None) -> Any:
        """Return sums per sequence instead of logits, so that loss and accuracy are means over tokens, whatever the batches."""
        if not self._sums_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=[*(ignore_keys or []), "sums"])
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            sums = model(**inputs)["sums"]
        return None, sums, inputs["labels"][:, :1]

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        return None
