"""Hugging Face's `Trainer` for a TransformerLens host, with or without codebooks: data, loss and evaluation."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from tl_codebook import files, hosts
from tl_codebook.base_model import BASE_MANIFEST, restore_base_, save_base
from tl_codebook.errors import CheckpointError, NonFiniteError, TrainingError
from tl_codebook.training.config import CodebookTrainingConfig
from tl_codebook.training.data import collate, tokenize_dataset
from tl_codebook.training.losses import LanguageModel
from tl_codebook.training.metrics import summarise_sums

__all__ = ["HostTrainer"]


class HostTrainer(Trainer):
    """Train a host as a language model; what `CodebookTrainer` is compared with when the host has no codebooks.

    The arguments and errors are those of `CodebookTrainer`. Its checkpoints hold the weights (`save_base`) and what `Trainer` needs to go
    on; only `train(resume_from_checkpoint=...)` reads them.
    """

    complete_with: tuple[str, ...] = (BASE_MANIFEST, TRAINER_STATE_NAME)
    """Files without which a checkpoint folder was not written to its end."""

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

    # --- running and resuming ---

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer` does; ``resume_from_checkpoint=True`` takes the newest checkpoint that is complete."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._last_complete()
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        except NonFiniteError as error:
            raise NonFiniteError(f"step {self.state.global_step + 1}: {error} The last checkpoint is untouched.") from error

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Take a step as `Trainer` does; stop where the loss is no number, before the optimiser spreads it and a checkpoint keeps it."""
        loss = super().training_step(*args, **kwargs)
        if not bool(torch.isfinite(loss)):
            raise NonFiniteError(
                f"the loss is {loss.item()} though no activation stopped the forward pass. A lower learning rate or fp32 often cures it."
            )
        return loss

    def has_checkpoint(self) -> bool:
        """Tell whether the output directory holds a complete checkpoint to resume from."""
        return bool(self._complete())

    def _complete(self) -> list[Path]:
        folders = [path for path in Path(str(self.args.output_dir)).glob("checkpoint-*") if path.name.split("-", 1)[1].isdigit()]
        complete = [path for path in folders if all((path / name).is_file() for name in self.complete_with)]
        return sorted(complete, key=lambda path: int(path.name.split("-", 1)[1]))

    def _last_complete(self) -> str:
        """Return the newest checkpoint of the output directory that was written to its end."""
        if not self.has_checkpoint():
            raise TrainingError(
                f"{self.args.output_dir} holds no complete checkpoint to resume from. Start without resume, or wait for a save."
            )
        return str(self._complete()[-1])

    # --- checkpoints ---

    def _run(self) -> dict[str, Any]:
        """Describe what a resumed run must share with the one that it continues."""
        return {
            "data": _digest(self.train_dataset),
            "rows": len(self.train_dataset) if self.train_dataset is not None else 0,  # type: ignore[arg-type]
            "seed": self.args.seed,
            "learning_rate": self.args.learning_rate,
            "weight_decay": self.args.weight_decay,
            "optim": str(self.args.optim),
            "batch": self.args.per_device_train_batch_size * self.accelerator.num_processes * self.args.gradient_accumulation_steps,
        }

    def _check_run(self, folder: Path, then: dict[str, Any]) -> None:
        """Refuse to continue a run of something else.

        Raises:
            TrainingError: the differences are listed.
        """
        now = self._run()
        differing = [f"{key}: {then.get(key)!r} then, {now[key]!r} now" for key in now if then.get(key) != now[key]]
        if differing:
            raise TrainingError(f"{folder} belongs to another run ({'; '.join(differing)}). Resume with the settings it began with.")

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        save_base(self.hooked, Path(output_dir or str(self.args.output_dir)), run=self._run())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        if not (folder / BASE_MANIFEST).is_file():
            raise CheckpointError(f"{folder} is no complete checkpoint of a run. Give a checkpoint-<step> folder of the output directory.")
        then = files.read_json(folder / BASE_MANIFEST, again="Resume from an earlier checkpoint.").get("run")
        if not isinstance(then, dict):
            raise CheckpointError(f"{folder / BASE_MANIFEST} does not say which run it is of. Resume from an earlier checkpoint.")
        self._check_run(folder, then)
        restore_base_(self.hooked, folder)


def _digest(data: Any, n_rows: int = 256) -> str | None:
    """Hash the first and the last rows of a dataset: enough to tell another one, however long it is."""
    if data is None:
        return None
    rows = [*range(min(n_rows, len(data))), *range(max(n_rows, len(data) - n_rows), len(data))]
    return hashlib.sha256(repr([list(data[row]["input_ids"]) for row in rows]).encode()).hexdigest()[:16]
