"""What codebooks cost a whole model: a forward pass and a training step, with and without them, in one interleaved run."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_codebook.attachment import attach, sites
from tl_codebook.benchmarks.measure import interleave
from tl_codebook.benchmarks.runner import Settings, threads_set
from tl_codebook.building import bridge_around, hooked_from_config, hooked_transformer_class
from tl_codebook.codebook import CodebookConfig
from tl_codebook.convert.huggingface import load_hf
from tl_codebook.errors import ConfigError
from tl_codebook.training import CodebookTrainingConfig
from tl_codebook.training.losses import LanguageModel, parameter_groups

__all__ = ["GPT2_SMALL", "run_model"]

GPT2_SMALL = "gpt2-small"
_N_CODES = {"z": 256, "mlp_out": 1024}
_K = 8
_RECIPES: dict[str, tuple[Any, CodebookTrainingConfig] | None] = {
    "none": None,
    "residual": (CodebookConfig, CodebookTrainingConfig()),
    "paper": (CodebookConfig.paper, CodebookTrainingConfig.paper()),
}
"""Without codebooks; with the default ones (Euclidean, greedy pursuit); with the paper's (LayerNorm, cosine, mean of the nearest)."""


def _build(name: str, seed: int) -> Any:
    torch.manual_seed(seed)
    if name != GPT2_SMALL:
        return load_hf(name)
    if hooked_transformer_class() is not None:
        sizes = {"n_layers": 12, "d_model": 768, "n_heads": 12, "d_head": 64, "d_mlp": 3072, "n_ctx": 1024, "d_vocab": 50257}
        return hooked_from_config({**sizes, "act_fn": "gelu_new", "seed": seed, "device": "cpu"}, None)
    from transformers import GPT2Config, GPT2LMHeadModel

    return bridge_around(GPT2LMHeadModel(GPT2Config()), None)


def run_model(
    name: str, batch_and_pos: tuple[int, int], settings: Settings, seed: int = 0, tell: Callable[[str], None] = lambda line: None
) -> list[dict[str, Any]]:
    """Return a row for each operation and kind of codebooks; `name` is a Hugging Face folder or hub name, or ``gpt2-small``.

    ``gpt2-small`` has random weights, and its shapes only. The step is forward, loss, backward and AdamW, with the usage counts and loss
    terms that training has; codes are noise, and the time does not depend on their values.
    """
    with threads_set(settings.threads):
        models: dict[str, Any] = {}
        for kind, recipe in _RECIPES.items():
            tell(f"{name}: building, codebooks: {kind}")
            models[kind] = _build(name, seed)
            if recipe is not None:
                attach(models[kind], {site: recipe[0](n_codes, _K) for site, n_codes in _N_CODES.items()})
            models[kind].to(settings.device, print_details=False)
        cfg = models["none"].cfg
        batch, pos = batch_and_pos
        if pos > cfg.n_ctx:
            raise ConfigError(
                f"rows of {pos} tokens were asked for; the context of {name} has {cfg.n_ctx}. Give --tokens {batch}x{cfg.n_ctx}."
            )
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(cfg.d_vocab, (batch, pos), generator=generator).to(settings.device)
        rows = []
        for op, calls in (("forward", _forwards(models)), ("train_step", _steps(models))):
            tell(f"{name}: {settings.reps} rounds of {op}")
            times = interleave(calls, [tokens], settings.reps)
            floor = times["none"].median(settings.clock)
            for kind, took in times.items():
                seconds = took.median(settings.clock)
                rows.append(
                    {
                        "model": name if name == GPT2_SMALL else Path(name).name,
                        "op": op,
                        "codebooks": kind,
                        "batch": batch,
                        "pos": pos,
                        "k": _K,
                        "n_codes": _N_CODES,
                        "seed": seed,
                        "clock": settings.clock,
                        "seconds": seconds,
                        "ratio_to_none": seconds / floor,
                        "wall_seconds": took.median("wall"),
                        "rounds": took.cpu if settings.clock == "cpu" and took.cpu is not None else took.wall,
                    }
                )
        models.clear()
        gc.collect()
        return rows


def _forwards(models: dict[str, Any]) -> dict[str, Callable[[Tensor], object]]:
    def make(model: Any) -> Callable[[Tensor], object]:
        def call(tokens: Tensor) -> object:
            with torch.no_grad():
                return model(tokens, return_type="logits")

        return call

    for model in models.values():
        model.eval()
    return {kind: make(model) for kind, model in models.items()}


def _steps(models: dict[str, Any]) -> dict[str, Callable[[Tensor], object]]:
    def make(model: Any, config: CodebookTrainingConfig) -> Callable[[Tensor], object]:
        whole = LanguageModel(model, config).train()
        rates = {"codes_learning_rate": 1e-6, "learning_rate": 1e-6}  # small: a diverging model would end the measurement
        groups = parameter_groups(model, **rates) if sites(model) else [{"params": list(model.parameters()), "lr": 1e-6}]
        optimizer = torch.optim.AdamW(groups)

        def call(tokens: Tensor) -> None:
            optimizer.zero_grad()
            whole(tokens, labels=tokens)["loss"].backward()
            optimizer.step()

        return call

    configs = {kind: recipe[1] if recipe is not None else CodebookTrainingConfig() for kind, recipe in _RECIPES.items()}
    return {kind: make(model, configs[kind]) for kind, model in models.items()}
