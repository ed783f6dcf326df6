"""The whole experiment in a folder: base, codes, figures, report; interrupted anywhere, it goes on from there."""

from __future__ import annotations

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
from tl_codebook.experiments.tokfsm.stages import train_base_, train_codes_

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
        ConfigError: a negative seed.
        NonFiniteError: the loss became NaN or infinite; the last checkpoint is untouched.

    Source: the TokFSM experiment of Tamkin et al. 2023, section 3.
    """
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise ConfigError(f"seed={seed!r} was asked for. Give a whole number from 0 to 2**32 - 1.")
    folder = files.check_writable(files.as_path(folder), overwrite=True)
    about = _begin(folder, {"setting": setting.to_dict(), "seed": seed, "host": host}, resume)
    if (folder / RESULTS).is_file():
        return files.read_json(folder / RESULTS)
    figures = {}
    model = None
    if "base" in setting.steps:
        model = make_model(setting, seed, host)
        _base(model, setting, folder, about, seed=seed, progress=progress)
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
    figures["codes"] = evaluate_codes(model, setting, seed=seed, base=base, progress=progress)
    tokens = sum(stage["tokens"] for stage in about["stages"].values())
    results = {**about, "tokens": tokens, **figures, "where": where(torch.device("cpu"), torch.get_num_threads())}
    files.replace_json(folder / RESULTS, results)
    return files.read_json(folder / RESULTS)


def _begin(folder: Path, now: dict[str, Any], resume: bool) -> dict[str, Any]:
    """Claim the folder for a run, or find out how far the run in it got."""
    path = folder / _ABOUT
    if not path.is_file():
        if any(folder.iterdir()):
            raise TrainingError(f"{folder} is not empty and holds no run of this experiment. Choose another folder.")
        files.replace_json(path, {**now, "stages": {}})
        return files.read_json(path)
    if not resume:
        raise TrainingError(f"{folder} holds a run. Choose another folder, or resume it (--resume).")
    then = files.read_json(path)
    fields = {**now["setting"], "seed": now["seed"], "host": now["host"]}
    before = {**then.get("setting", {}), "seed": then.get("seed"), "host": then.get("host")}
    differing = [f"{name}: {before.get(name)!r} then, {value!r} now" for name, value in _plain(fields).items() if before.get(name) != value]
    if differing:
        raise TrainingError(
            f"{folder} holds a run of something else ({'; '.join(differing)}). Resume it as it began, or choose another folder."
        )
    return then


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


def _note(folder: Path, about: dict[str, Any], stage: str, took: Any) -> None:
    about["stages"][stage] = {**took._asdict(), "seconds": round(took.seconds, 1)}
    files.replace_json(folder / _ABOUT, about)


def _base(model: Any, setting: TokFSMSetting, folder: Path, about: dict[str, Any], *, seed: int, progress: bool) -> None:
    if "base" in about["stages"] and (folder / "base" / BASE_MANIFEST).is_file():
        restore_base_(model, folder / "base")
        return
    took = train_base_(model, setting, folder / "training" / "base", seed=seed, resume=True, progress=progress)
    save_base(model, folder / "base")
    _note(folder, about, "base", took)
