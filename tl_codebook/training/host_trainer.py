"""Hugging Face's `Trainer` for a TransformerLens host: data, loss, evaluation, and runs that go on.

It trains hosts without codebooks and evaluates any; `CodebookTrainer`, which is built on it, trains the others.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import TrainOutput

from tl_codebook import files, hosts
from tl_codebook.attachment import sites
from tl_codebook.base_model import BASE_MANIFEST, restore_base_, save_base
from tl_codebook.errors import CheckpointError, CheckpointWarning, NonFiniteError, TrainingError
from tl_codebook.training.config import CodebookTrainingConfig
from tl_codebook.training.data import collate, tokenize_dataset
from tl_codebook.training.losses import LanguageModel
from tl_codebook.training.metrics import summarise_sums

__all__ = ["HostTrainer"]

_LATER = frozenset(
    (
        *("optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
        *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    )
)
"""What descriptions of runs did not say at first: a run that says nothing of them is taken for one of theirs."""
_WITHOUT_END = frozenset(("constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau", "greedy"))
"""Schedules of the learning rate that do not ask how many steps there will be."""


class HostTrainer(Trainer):
    """Train a host without codebooks as a language model, which `CodebookTrainer` is compared with; evaluate a host with or without them.

    The arguments and errors are those of `CodebookTrainer`, except that here `train` refuses a host with codebooks: a checkpoint holds the
    weights of the base (`save_base`) and what `Trainer` needs to go on, and no codes. Only `train(resume_from_checkpoint=...)` reads it.
    """

    kind_of_run = "a run"
    """What a message calls it."""
    keeps_codes = False
    """Whether checkpoints hold codebooks, so that a host with them can be trained."""
    complete_with: tuple[str, ...] = (BASE_MANIFEST, TRAINER_STATE_NAME)
    """JSON files without which, each whole, a checkpoint folder was not written to its end."""
    _steps_then: int | None = None
    """Of how many steps the run was that is being resumed."""

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
        """Train as `Trainer` does; ``resume_from_checkpoint=True`` takes the newest checkpoint that is complete.

        Raises:
            NonFiniteError: loss or gradients hold NaN or Inf; no weight has moved by them.
            TrainingError: the host has codebooks, which only `CodebookTrainer` keeps; or the run that is resumed is another.
            CheckpointError: the checkpoint is incomplete or damaged.
        """
        books = [] if self.keeps_codes else list(sites(self.hooked))
        if books:
            raise TrainingError(
                f"the host has codebooks (at {', '.join(books[:3])}{' ...' if len(books) > 3 else ''}), and the checkpoints of a "
                f"{type(self).__name__} hold none. Train it with CodebookTrainer, or without them: tl_codebook.detach(model)."
            )
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._last_complete()
        self._steps_then = None
        if resume_from_checkpoint and (done := self._already_done(resume_from_checkpoint)):
            return done
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        except NonFiniteError as error:
            kept = " The last checkpoint is untouched." if self.has_checkpoint() else ""
            raise NonFiniteError(f"step {self.state.global_step + 1}: {error}{kept}") from error

    def _already_done(self, checkpoint: str) -> TrainOutput | None:
        """Take over a checkpoint of the last step, after which `Trainer` would take one step more; None where there are steps left."""
        folder = self._opened(checkpoint)
        state = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
        self._steps_then = state.max_steps
        if not 0 < self.args.max_steps <= state.global_step:
            return None
        self._load_from_checkpoint(checkpoint)
        self.state = state
        return TrainOutput(state.global_step, 0.0, {})

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Take a step as `Trainer` does; stop where loss or gradients are no numbers, before the optimiser spreads them."""
        loss = super().training_step(*args, **kwargs)
        if not bool(torch.isfinite(loss)):
            raise NonFiniteError(
                f"the loss is {loss.item()} though no activation stopped the forward pass. A lower learning rate or fp32 often cures it."
            )
        self._check_gradients()
        return loss

    def _check_gradients(self) -> None:
        """Raise where the optimiser would step with NaN or Inf; before gradients are clipped, for clipping spreads NaN to all of them."""
        scaler = getattr(self.accelerator, "scaler", None)
        scaled = scaler is not None and scaler.is_enabled()  # it tries large scales, and itself skips the steps where they were too large
        if scaled or not self.accelerator.sync_gradients:  # the last of the batches that add up to a step has the gradients of all
            return
        gradients = [parameter.grad for parameter in self.hooked.parameters() if parameter.grad is not None]
        if bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients))):
            return
        books = {id(p): point.codebook.label or site for site, point in sites(self.hooked).items() for p in point.codebook.parameters()}
        wrong = {
            books.get(id(p), name): id(p) in books
            for name, p in self.hooked.named_parameters()
            if p.grad is not None and not bool(torch.isfinite(p.grad).all())
        }
        if not wrong:  # finite, only their norm is too large for its dtype
            return
        names = sorted(wrong, key=lambda name: not wrong[name])  # codebooks first
        others = f" (and of {len(names) - 4} more)" if len(names) > 4 else ""
        raise NonFiniteError(
            f"the gradients of {', '.join(names[:4])}{others} hold NaN or Inf though the loss is finite. A lower learning rate or fp32 "
            "often cures it."
        )

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make the schedule as `Trainer` does; warn where a resumed run is of another length and its learning rates hang on that."""
        then, kind = self._steps_then, _value(self.args.lr_scheduler_type)
        relative = 0 < (self.args.warmup_steps or 0) < 1 and kind != "constant"
        if then not in (None, num_training_steps) and (relative or kind not in _WITHOUT_END):
            warnings.warn(
                f"the run that is resumed was one of {then} steps, and this one is of {num_training_steps}. With the schedule {kind!r} the "
                "steps already taken had other learning rates than a run of that length gives them, so the result is that of neither. "
                "Resume with the length it began with, or begin anew; under a constant schedule a run can be made longer.",
                stacklevel=2,
            )
        return super().create_scheduler(num_training_steps, optimizer)

    def has_checkpoint(self) -> bool:
        """Tell whether the output directory holds a complete checkpoint to resume from."""
        return any(self._unfinished(folder) is None for folder in self._folders())

    def _folders(self) -> list[Path]:
        """Return the checkpoints of the output directory, complete or not, in the order of their steps."""
        folders = [path for path in Path(str(self.args.output_dir)).glob("checkpoint-*") if path.name.split("-", 1)[1].isdigit()]
        return sorted(folders, key=lambda path: int(path.name.split("-", 1)[1]))

    def _last_complete(self) -> str:
        """Return the newest checkpoint of the output directory that was written to its end; name those that were not."""
        passed_over: list[str] = []
        for folder in reversed(self._folders()):
            reason = self._unfinished(folder)
            if reason is None:
                if passed_over:
                    warnings.warn(
                        f"passed over {'; '.join(passed_over)}. The run goes on from {folder}, the newest complete checkpoint.",
                        CheckpointWarning,
                        stacklevel=3,
                    )
                return str(folder)
            passed_over.append(f"{folder.name}: {reason}")
        reasons = f" ({'; '.join(passed_over)})" if passed_over else ""
        raise TrainingError(
            f"{self.args.output_dir} holds no complete checkpoint to resume from{reasons}. Start without resume, or wait for a save."
        )

    def _unfinished(self, folder: Path) -> str | None:
        """Say what shows that a checkpoint was not written to its end, or has been damaged since; None where nothing does."""
        for name in self.complete_with:
            try:
                content = json.loads((folder / name).read_text(encoding="utf-8"))  # not read_json: Trainer may write NaN into its log
            except FileNotFoundError:
                return f"it holds no {name}"
            except (OSError, ValueError, RecursionError) as error:  # Trainer writes its state last, and not in one step
                return f"{name} is incomplete or damaged ({error})"
            if not isinstance(content, dict):
                return f"{name} is damaged (a {type(content).__name__}, not an object)"
        return None

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
            "optim_args": self.args.optim_args,
            "adam_beta1": self.args.adam_beta1,
            "adam_beta2": self.args.adam_beta2,
            "adam_epsilon": self.args.adam_epsilon,
            "max_grad_norm": self.args.max_grad_norm,
            "lr_scheduler_type": _value(self.args.lr_scheduler_type),
            "lr_scheduler_kwargs": json.dumps(self.args.lr_scheduler_kwargs or {}, sort_keys=True, default=str),
            "warmup_steps": self.args.warmup_steps,
            "batch": self.args.per_device_train_batch_size * self.accelerator.num_processes * self.args.gradient_accumulation_steps,
        }

    def _check_run(self, folder: Path, then: dict[str, Any]) -> None:
        """Refuse to continue a run of something else.

        Raises:
            TrainingError: the differences are listed.
        """
        now = self._run()
        asked = [key for key in now if key in then or key not in _LATER]
        differing = [f"{key}: {then.get(key)!r} then, {now[key]!r} now" for key in asked if then.get(key) != now[key]]
        if differing:
            raise TrainingError(f"{folder} belongs to another run ({'; '.join(differing)}). Resume with the settings it began with.")

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        save_base(self.hooked, Path(output_dir or str(self.args.output_dir)), run=self._run())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = self._opened(resume_from_checkpoint)
        then = files.read_json(folder / BASE_MANIFEST, again="Resume from an earlier checkpoint.").get("run")
        if not isinstance(then, dict):
            raise CheckpointError(f"{folder / BASE_MANIFEST} does not say which run it is of. Resume from an earlier checkpoint.")
        self._check_run(folder, then)
        restore_base_(self.hooked, folder, again="Resume from an earlier checkpoint.")

    def _opened(self, folder: str) -> Path:
        """Return the path of a checkpoint to resume from, which is complete.

        Raises:
            CheckpointError: it was not written to its end, or is damaged.
        """
        path = Path(folder)
        reason = self._unfinished(path)
        if reason is not None:
            raise CheckpointError(
                f"{path} is no complete checkpoint of {self.kind_of_run}: {reason}. Give another checkpoint-<step> folder of the output "
                "directory."
            )
        return path

    def _load_best_model(self) -> None:
        restore_base_(self.hooked, Path(str(self.state.best_model_checkpoint)))


def _value(of: Any) -> str:
    """Return the name of a schedule, which `TrainingArguments` has as a string or as a member of an enumeration."""
    return str(getattr(of, "value", of))


def _digest(data: Any, n_rows: int = 256) -> str | None:
    """Hash the first and the last rows of a dataset: enough to tell another one, however long it is."""
    if data is None:
        return None
    rows = [*range(min(n_rows, len(data))), *range(max(n_rows, len(data) - n_rows), len(data))]
    return hashlib.sha256(repr([list(data[row]["input_ids"]) for row in rows]).encode()).hexdigest()[:16]
