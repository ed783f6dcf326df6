"""The whole experiment in a folder: base, codes, figures, report; interrupted anywhere, it goes on from there."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from tl_codebook import files
from tl_codebook.base_model import BASE_MANIFEST, restore_base_, save_base
from tl_codebook.benchmarks.provenance import where
from tl_codebook.checkpoint import MANIFEST, load, save
from tl_codebook.errors import ConfigError, TrainingError
from tl_codebook.experiments.tokfsm.evaluation import evaluate_base, evaluate_codes
from tl_codebook.experiments.tokfsm.model import make_model
from tl_codebook.experiments.tokfsm.setting import TokFSMSetting
from tl_codebook.experiments.tokfsm.stages import held_out_rows, train_base_, train_codes_
from tl_codebook.experiments.tokfsm.tokens import read_states

__all__ = ["RESULTS", "run_experiment"]

RESULTS = "results.json"
_ABOUT = "experiment.json"


def run_experiment(
    setting: TokFSMSetting,
    folder: str | Path,
    *,
    seed: int = 0,
    host: Literal["hooked", "bridge"] | None = None,
    resume: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Train base and codes, measure both, and return the figures; everything is in the folder afterwards.

    ==================  =================================================================
    ``experiment.json`` the setting, the seed, the host, and what each stage took
    ``base/``           the model without codebooks (not with the recipe ``paper``)
    ``training/``       checkpoints of the stages, which `resume` needs; may be removed afterwards
    ``model/``          the codebook model; `tl_codebook.load` reads it
    ``results.json``    all figures (`evaluate_codes`), machine and commit
    ==================  =================================================================

    Args:
        setting: Sizes and steps.
        folder: A new or empty folder, or with `resume` the folder of an interrupted run.
        seed: Of weights, data and texts.
        host: ``hooked`` or ``bridge``; by default HookedTransformer where TransformerLens has it.
        resume: Go on where a run of the same setting, seed and host stopped; a finished run returns its figures.
        progress: Show bars.

    Raises:
        TrainingError: the folder holds a run and `resume` is not set, or it is a run of something else (the differences are listed).
        ConfigError: a negative seed, too few held-out rows for the machine, or training under ``compiled`` without a C++ compiler.
        NonFiniteError: the loss became NaN or infinite; the last checkpoint is untouched.

    Source: the TokFSM experiment of Tamkin et al. 2023, section 3.
    """
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise ConfigError(f"seed={seed!r} was asked for. Give a whole number from 0 to 2**32 - 1.")
    _check_held_out(setting, seed)
    folder = files.as_path(folder)
    if not (folder / "model" / MANIFEST).is_file():  # a finished model is only measured
        _check_compiler(setting)
    folder = files.check_writable(folder, overwrite=True)
    about = _begin(folder, {"setting": setting.to_dict(), "seed": seed, "host": host}, resume)
    if (folder / RESULTS).is_file():
        return files.read_json(folder / RESULTS)
    figures = {}
    model = None
    if "base" in setting.steps:
        model = make_model(setting, seed, host)
        _base(model, setting, folder, about, seed=seed, progress=progress)
        model.to("cpu", print_details=False)
        figures["base"] = evaluate_base(model, setting, seed=seed)
    if "codes" in about["stages"] and (folder / "model" / MANIFEST).is_file():
        model = load(folder / "model")
    else:
        model = make_model(setting, seed, host) if model is None else model
        took = train_codes_(model, setting, folder / "training" / "codes", seed=seed, resume=resume, progress=progress)
        save(model, folder / "model", overwrite=True)
        _note(folder, about, "codes", took)
    base = None
    if "base" in setting.steps:  # that of the codebook model has been trained on
        base = make_model(setting, seed, host)
        restore_base_(base, folder / "base")
    model.to("cpu", print_details=False)  # text is sampled on one device, so that a resumed run has the same figures
    figures["codes"] = evaluate_codes(model, setting, seed=seed, base=base, progress=progress)
    tokens = sum(stage["tokens"] for stage in about["stages"].values())
    device = torch.device(about["stages"]["codes"]["device"])
    results = {**about, "tokens": tokens, **figures, "where": where(device, torch.get_num_threads())}
    files.replace_json(folder / RESULTS, results)
    return files.read_json(folder / RESULTS)


def _check_held_out(setting: TokFSMSetting, seed: int) -> None:
    """Refuse rows in whose first half a state is missing, before hours go into a model that then cannot be measured."""
    machine = setting.machine()
    states = read_states(machine, held_out_rows(setting, seed)[: setting.held_out_rows // 2])
    missing = sorted(set(range(machine.n_states)) - set(states.flatten().tolist()))
    if missing:
        raise ConfigError(
            f"held_out_rows={setting.held_out_rows} was asked for, and {len(missing)} of the {machine.n_states} states do not occur in "
            f"half of them (state {missing[0]}, for one), so their codes could not be chosen. Give more rows, or longer ones."
        )


def _check_compiler(setting: TokFSMSetting) -> None:
    """Refuse to compile without a compiler, which torch would find out at the first step."""
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if setting.compiled and not torch.cuda.is_available() and shutil.which(name) is None:
        raise ConfigError(
            f"compiled=True was asked for, and there is no C++ compiler ({name}), which torch.compile needs on a CPU. Install one, name it "
            "in the variable CXX, or train without (compiled=False, --no-compiled), about one and a half times as long."
        )


def _begin(folder: Path, now: dict[str, Any], resume: bool) -> dict[str, Any]:
    """Claim the folder for a run, or find out how far the run in it got."""
    path = folder / _ABOUT
    if not path.is_file():
        if any(not item.name.startswith(".") for item in folder.iterdir()):  # a killed write leaves a hidden file
            raise TrainingError(f"{folder} is not empty and holds no run of this experiment. Choose another folder.")
        files.replace_json(path, {**now, "stages": {}})
        return files.read_json(path)
    if not resume:
        raise TrainingError(f"{folder} holds a run. Choose another folder, or resume it (--resume).")
    then = files.read_json(path)
    before, fields = _flat(then), _flat(now)
    differing = [f"{name}: {before.get(name)!r} then, {value!r} now" for name, value in fields.items() if before.get(name) != value]
    if differing:
        raise TrainingError(
            f"{folder} holds a run of something else ({'; '.join(differing)}). Resume it as it began, or choose another folder."
        )
    return then


def _flat(about: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides a run, field by field, as JSON has it."""
    setting = dict(about.get("setting") or {})
    training = {f"training.{name}": value for name, value in dict(setting.pop("training", None) or {}).items()}
    fields = {**setting, **training, "seed": about.get("seed"), "host": about.get("host")}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


def _note(folder: Path, about: dict[str, Any], stage: str, took: Any) -> None:
    about["stages"][stage] = took._asdict()
    files.replace_json(folder / _ABOUT, about)


def _base(model: Any, setting: TokFSMSetting, folder: Path, about: dict[str, Any], *, seed: int, progress: bool) -> None:
    if "base" in about["stages"] and (folder / "base" / BASE_MANIFEST).is_file():
        restore_base_(model, folder / "base")
        return
    took = train_base_(model, setting, folder / "training" / "base", seed=seed, resume=True, progress=progress)
    save_base(model, folder / "base")
    _note(folder, about, "base", took)
