"""`CodebookTrainer`: Hugging Face's `Trainer` for a TransformerLens host with codebooks.

What `Trainer` brings (progress bar, resume, `report_to`, accelerate, DDP) stays as it is. Added: codes from k-means before the first
step, the codebooks' loss terms, their own learning rate, revival of dead codes, a k schedule, a ramp, a divergence from the base,
checkpoints that `tl_codebook.load` reads, and metrics of the codes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from tl_codebook import files, hosts
from tl_codebook.attachment import sites
from tl_codebook.checkpoint import MANIFEST, check_target, restore_, save
from tl_codebook.contexts import count_usage
from tl_codebook.errors import CheckpointError, TrainingError
from tl_codebook.training.config import CodebookTrainingConfig
from tl_codebook.training.data import collate
from tl_codebook.training.host_trainer import HostTrainer
from tl_codebook.training.initialisation import initialise_codes_
from tl_codebook.training.losses import parameter_groups
from tl_codebook.training.metrics import site_figures, summarise_codes
from tl_codebook.training.revival import Reviver
from tl_codebook.training.schedule import Schedule, schedules
from tl_codebook.training.teacher import BaseTeacher
from tl_codebook.usage import Usage

__all__ = ["CodebookTrainer"]

_STATE = "tl_codebook_training.json"
_LATER = {"estimator": "straight_through", "kl_to_base": 0.0, "kl_steps": 0, "ramp_steps": 0}  # what runs did before these could be chosen


class CodebookTrainer(HostTrainer):
    """Train the codebooks of a host, and the host with them unless the base is frozen.

    Args:
        model: A HookedTransformer or TransformerBridge with codebooks (`attach`).
        args: Hugging Face's `TrainingArguments`; `learning_rate` is that of the base.
        train_dataset, eval_dataset: A dataset with a ``text`` or ``input_ids`` column, texts, or rows; texts are packed to rows of
            `context_length` tokens.
        config: The recipe of the codes, `CodebookTrainingConfig.paper()` for the original's.
        context_length: Tokens in a row; the model's context, at most 512, by default.
        kwargs: Passed on to `Trainer` (callbacks, optimizers, compute_metrics ...).

    Raises:
        TrainingError: the model has no codebooks, or the arguments ask for what does not work with them (FSDP, DeepSpeed).
        CheckpointError: the output directory cannot be written to, before anything is trained.
        DataError: an empty or wrong dataset, before anything is trained.
        ConfigError: a `k_start` that a codebook cannot have, before anything is trained.

    With `kl_to_base` the base is the model as it is when `train` is called, so a run is resumed with the base that it began with: a model
    loaded from one of its checkpoints is another.

    Source: Tamkin et al. 2023, section 2; initialisation and revival as listed in `tl_codebook.training.config`.

    >>> from tl_codebook import attach
    >>> from transformers import TrainingArguments
    >>> _ = attach(model, "mlp_out", n_codes=16, k=2)
    >>> args = TrainingArguments(str(tmp_path), max_steps=2, report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True)
    >>> trainer = CodebookTrainer(model, args, train_dataset=["w3 w4 w5 w6 w7 w8"] * 12, context_length=8)
    >>> trainer.train().global_step
    {'train_runtime'...}
    2
    """

    kind_of_run = "a codebook run"
    keeps_codes = True
    complete_with = (MANIFEST, _STATE, TRAINER_STATE_NAME)

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
        self.training_config = config or CodebookTrainingConfig()
        if not sites(hosts.as_host(model)):
            raise TrainingError("the model has no codebooks to train. Call attach(model, sites=..., n_codes=...) first.")
        check_target(str(args.output_dir), overwrite=True)  # a checkpoint must not end beside the weights of another model
        super().__init__(model, args, train_dataset, eval_dataset, config=self.training_config, context_length=context_length, **kwargs)
        self.schedules: list[Schedule] = schedules(self.hooked, self.training_config)
        self.reviver: Reviver | None = None
        self.add_callback(_CodebookCallback(self))

    # --- the model and its parameters ---

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Build the optimiser of `args.optim` over two groups: codes (own rate, no decay) and base."""
        if self.optimizer is None:
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args)
            groups = parameter_groups(
                self.hooked,
                codes_learning_rate=self.training_config.codes_learning_rate,
                learning_rate=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
            )
            self.optimizer = optimizer_class(groups, **settings)
        return self.optimizer

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Start the codes if they are noise, then train; see `Trainer.train`."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._last_complete()  # here already: a run that goes on does not start its codes
        books = [point.codebook for point in sites(self.hooked).values()]
        wanted = [(parameter, parameter.requires_grad) for parameter in self.hooked.parameters()]
        own = {id(parameter) for book in books for parameter in book.parameters()}
        language_model: Any = self.model
        routes = [(book, book.lm_gradient_to_codes, book.estimator) for book in books]
        try:
            for parameter, required in wanted:
                parameter.requires_grad_(id(parameter) in own or (required and not self.training_config.freeze_base))
            for book in books:
                book.lm_gradient_to_codes = self.training_config.lm_gradient_to_codes
                book.estimator = self.training_config.estimator
            if not resume_from_checkpoint:
                self.start_codes()
            if self.training_config.kl_to_base:
                self._move_model_to_device(self.model_wrapped, self.args.device)
                language_model.teacher = BaseTeacher(self.hooked)
            self.schedules = schedules(self.hooked, self.training_config)  # of the codebooks that are here now
            self.reviver = Reviver(self.hooked, self._gather_rows, seed=self.args.seed)
            result = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            for parameter, required in wanted:
                parameter.requires_grad_(required)
            for book, to_codes, estimator in routes:
                book.lm_gradient_to_codes, book.estimator = to_codes, estimator
            self._at_rest()
            language_model.teacher = None
            if self.reviver is not None:
                self.reviver.watch(False)
        for book in books:
            book.fresh = False
        return result

    def _at_rest(self) -> None:
        """Have the codebooks snap as they are configured, whatever the last step changed: for an evaluation, a checkpoint, the end."""
        for schedule in self.schedules:
            schedule.restore()

    def start_codes(self) -> None:
        """Set codes that are still noise by k-means on the first rows of the training data; on every process the same."""
        fresh = [name for name, point in sites(self.hooked).items() if point.codebook.fresh]
        if self.training_config.init == "none" or not fresh or self.train_dataset is None:
            return
        if self.accelerator.is_main_process:
            rows, n_tokens = [], 0
            for row in self.train_dataset:  # type: ignore[union-attr]
                rows.append(row)
                n_tokens += sum(row["attention_mask"]) if row.get("attention_mask") is not None else len(row["input_ids"])
                if n_tokens >= self.training_config.init_tokens:
                    break
            batch = collate(rows)
            self._move_model_to_device(self.model_wrapped, self.args.device)
            initialise_codes_(
                self.hooked,
                batch["input_ids"],
                mask=batch["attention_mask"].bool(),
                names=fresh,
                n_iterations=self.training_config.init_iterations,
                seed=self.args.seed,
                progress=not self.args.disable_tqdm,
            )
        if self.accelerator.num_processes > 1:
            for name, point in sites(self.hooked).items():
                if name in fresh:
                    value = point.codebook.codes.data.to(self.args.device)
                    torch.distributed.broadcast(value, src=0)
                    point.codebook.codes.data.copy_(value)
                    point.codebook.fresh = False

    def _gather_rows(self, rows: Tensor) -> Tensor:
        """Concatenate the rows of all processes, in their order; processes may have different numbers of them."""
        if self.accelerator.num_processes == 1:
            return rows
        if not rows.is_floating_point():
            return self.accelerator.gather(rows)
        padded = self.accelerator.pad_across_processes(rows.contiguous(), dim=0, pad_index=torch.nan)
        everything = self.accelerator.gather(padded)
        return everything[~everything.flatten(1)[:, 0].isnan()]

    # --- evaluation ---

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as `Trainer` does, and add what the codes did: dead codes, perplexity, unexplained variance."""
        with count_usage(self.hooked) as usages:
            output = super().evaluation_loop(*args, **kwargs)
            prefix = kwargs.get("metric_key_prefix", "eval")
            (output.metrics or {}).update({f"{prefix}_{key}": value for key, value in self._figures(usages).items()})
        return output

    def _figures(self, usages: dict[str, Usage]) -> dict[str, float]:
        figures = summarise_codes(usages, self._summed)
        if self.training_config.log_sites:
            books = {name: point.codebook for name, point in sites(self.hooked).items()}
            for site, values in site_figures(usages, books, self._summed).items():
                figures |= {f"codes/{site}/{key}": value for key, value in values.items()}
        return figures

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as `Trainer` does, and beside the loss of a step what schedules set for it: the number of codes, the strength of a ramp."""
        if "loss" in logs:
            for schedule in self.schedules:
                logs |= schedule.figures(self.state.global_step - 1)
            if self.training_config.kl_steps:
                language_model: Any = self.model
                logs["kl_weight"] = float(language_model.kl_weight)
        super().log(logs, *args, **kwargs)

    def _summed(self, tensor: Tensor) -> Tensor:
        return tensor if self.accelerator.num_processes == 1 else self.accelerator.reduce(tensor.to(self.args.device), "sum")

    # --- checkpoints ---

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save(self.hooked, folder, overwrite=True)

    def _save_rng_state(self, output_dir: str) -> None:
        """Save the counts of the reviver beside the RNG state; `Trainer` calls this on every process, just before its own state."""
        super()._save_rng_state(output_dir)
        counts = {} if self.reviver is None else self.reviver.counts()
        if self.args.should_save:
            folder = Path(output_dir)
            usage = {
                f"{name}/{key}": value
                for name, point in sites(self.hooked).items()
                for key, value in point.codebook.usage.tensors().items()
            }
            entry = files.write_tensors(folder, "training", usage | {f"{name}/since": value for name, value in counts.items()})
            files.replace_json(folder / _STATE, {"format_version": 1, "counts": entry, "run": self._run()})

    def _run(self) -> dict[str, Any]:
        """Describe what a resumed run must share with the one that it continues."""
        teacher: BaseTeacher | None = getattr(self.model, "teacher", None)
        config = {name: value for name, value in self.training_config.to_dict().items() if name != "log_sites"}
        return ({} if teacher is None else {"base": teacher.digest}) | {"config": config} | super()._run()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = self._opened(resume_from_checkpoint)
        about = files.read_json(folder / _STATE, again="Resume from an earlier checkpoint.")
        if about.get("format_version") != 1 or not isinstance(about.get("run"), dict) or "counts" not in about:
            raise CheckpointError(f"{folder / _STATE} is of a format that is not read. Resume with the release that wrote it.")
        then = about["run"]
        if isinstance(then.get("config"), dict):
            then["config"] = _LATER | then["config"]
        self._check_run(folder, then)
        restore_(self.hooked, folder)
        tensors = files.read_tensors(folder, about["counts"])
        main = self.accelerator.is_main_process
        for name, point in sites(self.hooked).items():
            for key, value in point.codebook.usage.tensors().items():
                value.copy_(tensors[f"{name}/{key}"]) if main else value.zero_()
            point.codebook.fresh = False
        if self.reviver is not None:
            self.reviver.restore({name: tensors[f"{name}/since"] for name in sites(self.hooked)}, main=main)

    def _load_best_model(self) -> None:
        restore_(self.hooked, Path(str(self.state.best_model_checkpoint)))


class _CodebookCallback(TrainerCallback):
    """Sets what schedules say of a step (k, strength, the weight of the divergence), and revives dead codes after it."""

    def __init__(self, trainer: CodebookTrainer):
        self.trainer = trainer

    def _due(self, args: TrainingArguments, step: int, max_steps: int) -> bool:
        every = self.trainer.training_config.revive_every
        return bool(every) and step % every == 0 and step <= self.trainer.training_config.revive_until * max_steps

    def on_step_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        language_model: Any = self.trainer.model
        language_model.set_step(state.global_step)
        for schedule in self.trainer.schedules:
            schedule.set_(state.global_step)
        if self.trainer.reviver is not None and self._due(args, state.global_step + 1, state.max_steps):
            self.trainer.reviver.watch(True)

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._at_rest()  # an evaluation or a checkpoint that follows is of the codebooks as they are configured
        if self.trainer.reviver is not None and self._due(args, state.global_step, state.max_steps):
            optimizer = kwargs.get("optimizer")
            self.trainer.reviver.revive_(state.global_step, getattr(optimizer, "optimizer", optimizer))
            self.trainer.reviver.watch(False)
