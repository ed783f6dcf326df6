"""The two stages of training, base and codes, each of which goes on where it was interrupted."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from tl_codebook import files
from tl_codebook.attachment import attach
from tl_codebook.errors import TrainingError
from tl_codebook.experiments.tokfsm.bayes import bayes_loss
from tl_codebook.experiments.tokfsm.setting import TokFSMSetting
from tl_codebook.experiments.tokfsm.tokens import make_rows, write_tokens
from tl_codebook.training.config import CodebookTrainingConfig
from tl_codebook.training.host_trainer import HostTrainer
from tl_codebook.training.trainer import CodebookTrainer

__all__ = ["STREAMS", "StageFigures", "held_out_rows", "sample_rows", "train_base_", "train_codes_"]

STREAMS = {"base": 1, "codes": 2, "held out": 3, "dictionary": 4}
"""Numbers of the random streams of a seed; no two share a row but by chance."""
_CHECKPOINTS = 10


class StageFigures(NamedTuple):
    """What a stage of training took."""

    steps: int
    tokens: int
    seconds: float
    """Of all parts of a resumed stage, each up to the checkpoint that the next began with."""
    device: str


def _stream(seed: int, name: str) -> np.random.Generator:
    return np.random.default_rng([seed, STREAMS[name]])


def sample_rows(setting: TokFSMSetting, stream: str, n_rows: int, seed: int) -> Int[Tensor, "sequence pos"]:
    """Sample rows of text from one of the random streams of a seed (`STREAMS`).

    >>> sample_rows(TokFSMSetting.mini(), "dictionary", 3, seed=0).shape
    torch.Size([3, 128])
    """
    machine = setting.machine()
    return write_tokens(machine, machine.sample(n_rows, machine.states_in_row(setting.n_tokens), _stream(seed, stream)))


def held_out_rows(setting: TokFSMSetting, seed: int) -> Int[Tensor, "sequence pos"]:
    """Sample the rows that figures are measured on; training sees other ones.

    >>> held_out_rows(TokFSMSetting.mini(held_out_rows=2), seed=0).shape
    torch.Size([2, 128])
    """
    return sample_rows(setting, "held out", setting.held_out_rows, seed)


def train_base_(
    model: Any, setting: TokFSMSetting, folder: str | Path, *, seed: int, resume: bool = False, progress: bool = True
) -> StageFigures:
    """Train the model without codebooks for the steps of its stage, on rows that each come once.

    Args:
        model: What `make_model` built.
        setting: The experiment.
        folder: Where checkpoints go, ten over the run; the last two stay.
        seed: Of the data.
        resume: Go on from the last checkpoint of the folder, if there is one; the weights end up the same, bit for bit, on a CPU.
        progress: Show a bar.

    Raises:
        NonFiniteError: the loss is no number; the last checkpoint is untouched.
        TrainingError: the folder holds checkpoints and `resume` is not set, or they are of another run.
    """
    data = _rows(setting, "base", seed)
    args = _arguments(setting, folder, setting.steps["base"], setting.base_learning_rate, seed)
    return _run(HostTrainer(model, args, train_dataset=data), setting, "base", resume, progress)


def train_codes_(
    model: Any, setting: TokFSMSetting, folder: str | Path, *, seed: int, resume: bool = False, progress: bool = True
) -> StageFigures:
    """Attach the codebooks of the setting and train them and the model together; arguments and errors are those of `train_base_`.

    With the recipe ``default`` codes start by k-means on the model's activations; with ``paper`` from noise.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the noise that codes start as, and stay as with the recipe `paper`
        attach(model, setting.codebooks())
    data = _rows(setting, "codes", seed)
    rate = setting.learning_rate
    args = _arguments(setting, folder, setting.steps["codes"], rate, seed, constant=setting.recipe == "paper")
    config = CodebookTrainingConfig.paper(codes_learning_rate=rate) if setting.recipe == "paper" else setting.training
    return _run(CodebookTrainer(model, args, train_dataset=data, config=config), setting, "codes", resume, progress)


def _rows(setting: TokFSMSetting, stage: str, seed: int) -> Any:
    return make_rows(setting.machine(), setting.steps[stage] * setting.batch_size, setting.n_tokens, _stream(seed, stage))


def _arguments(
    setting: TokFSMSetting, folder: str | Path, steps: int, learning_rate: float, seed: int, *, constant: bool = False
) -> TrainingArguments:
    return TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=setting.batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="constant" if constant else "cosine",
        warmup_steps=0 if constant else min(100, steps // 10),
        weight_decay=0.0,
        adam_beta2=0.999 if constant else setting.adam_beta2,
        max_grad_norm=1.0,
        seed=seed,
        report_to="none",
        save_steps=max(1, math.ceil(steps / _CHECKPOINTS)),
        save_total_limit=2,
        logging_steps=10,
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        torch_compile=setting.compiled,
    )


def _run(trainer: Any, setting: TokFSMSetting, stage: str, resume: bool, progress: bool) -> StageFigures:
    begun = trainer.has_checkpoint()
    if begun and not resume:
        raise TrainingError(f"{trainer.args.output_dir} holds checkpoints of a run. Resume it (resume=True), or choose another folder.")
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_Bar(stage, bayes_loss(setting.machine(), setting.n_tokens), progress))
    clock = _Clock(Path(str(trainer.args.output_dir)) / "seconds.json")
    trainer.add_callback(clock)
    state = trainer.train(resume_from_checkpoint=True if begun else None)
    if not clock.begun:  # all steps had been taken already
        clock.go_on_from(state.global_step)
    trainer.hooked.eval()
    tokens = state.global_step * setting.batch_size * setting.n_tokens
    return StageFigures(state.global_step, tokens, round(clock.seconds(), 1), str(trainer.args.device))


class _Clock(TrainerCallback):
    """Keeps the seconds that a stage took up to each checkpoint, so that those of a resumed one are those of all its parts."""

    def __init__(self, path: Path):
        self.path = path
        self.before, self.started, self.begun = 0.0, time.perf_counter(), False

    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.started

    def go_on_from(self, step: int) -> None:
        known = files.read_json(self.path) if step and self.path.is_file() else {}
        self.before = float(known.get(str(step), 0.0))

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun = True
        self.go_on_from(state.global_step)

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        known = files.read_json(self.path) if self.path.is_file() else {}
        files.replace_json(self.path, {**known, str(state.global_step): round(self.seconds(), 1)})


class _Bar(TrainerCallback):
    """One progress bar, with the loss beside the least that there can be."""

    def __init__(self, stage: str, least: float, shown: bool):
        self.stage, self.least, self.shown = stage, least, shown
        self.bar: Any = None

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        done, total = state.global_step, state.max_steps
        self.bar = tqdm(total=total, initial=done, desc=f"training {self.stage}", unit="step", disable=not self.shown)

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update()

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.bar.set_postfix_str(f"loss {logs['loss']:.3f}, at best {self.least:.3f}")

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()
