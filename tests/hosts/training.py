"""What the tests of training share: rows of tokens that can be learned, short runs, and the state of a model after one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

import tl_codebook as tlc
from tests.tiny import HOSTS, make_host, make_native_bridge
from tl_codebook.training import CodebookTrainer, CodebookTrainingConfig

TRAINED = ["hooked-gpt2"] * ("hooked" in HOSTS) + ["bridge-gpt2", "bridge-neox", "native"] + ["native-bridge"] * ("hooked" in HOSTS)
"""Hosts that are trained: both, GPT-2 with its fused q, k, v, NeoX whose fused weights a Bridge copies, TransformerLens' own."""
MLP = "blocks.1.hook_mlp_out"


def host_of(kind: str) -> Any:
    return make_native_bridge() if kind == "native-bridge" else make_host(kind)


def with_books(kind: str, sites: Any = ("z", "mlp_out"), n_codes: int = 16, k: int = 2, **config: Any) -> Any:
    """A tiny host with codebooks, the same every time."""
    model = host_of(kind)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        tlc.attach(model, sites, n_codes=n_codes, k=k, **config)
    return model


def rows(n: int = 16, length: int = 12, seed: int = 1) -> list[dict[str, list[int]]]:
    """Rows that count up from a random token: each token tells the next."""
    starts = torch.randint(0, 58, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [{"input_ids": [3 + (start + i) % 58 for i in range(length)], "attention_mask": [1] * length} for start in starts]


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    """Arguments of a short run on a CPU, without a progress bar, reports or checkpoints."""
    quiet: dict[str, Any] = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(folder), **quiet | settings)


def trainer_of(model: Any, folder: Path, config: CodebookTrainingConfig | None = None, **settings: Any) -> CodebookTrainer:
    """A trainer on `rows()`; settings that `CodebookTrainer` takes itself go to it, the others to the arguments."""
    own = {name: settings.pop(name) for name in ("train_dataset", "eval_dataset", "callbacks", "context_length") if name in settings}
    own.setdefault("train_dataset", rows())
    config = config or CodebookTrainingConfig(init_iterations=2)
    return CodebookTrainer(model, arguments(folder, **settings), config=config, **own)


def weights(model: Any) -> dict[str, torch.Tensor]:
    """Every parameter by name, codes included, as it is now."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def base_weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value for name, value in weights(model).items() if ".codebook." not in name}


def codes(model: Any) -> dict[str, torch.Tensor]:
    return {name: point.codebook.codes.detach().clone() for name, point in tlc.sites(model).items()}


def assert_equal(after: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> None:
    """Bit for bit the same tensors."""
    assert list(after) == list(before)
    differing = [name for name in before if not torch.equal(after[name], before[name])]
    assert not differing, differing
