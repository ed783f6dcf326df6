"""Models with codebooks, built once for all tests that only hang hooks on them and take them off again."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch

import tl_codebook as tlc
from tests.hosts.state import TOKENS
from tests.tiny import HOSTS, make_host
from tl_codebook import CodebookConfig

N_CODES, K, LENGTH = 12, 3, TOKENS.shape[1]
LAST, LAST_Z = "blocks.1.hook_mlp_out", "blocks.1.attn.hook_z"  # a change at LAST changes no other codes
CONFIGS = {
    "residual": CodebookConfig(N_CODES, K),
    "nearest": CodebookConfig(N_CODES, K, selection="nearest"),
    "paper": CodebookConfig.paper(N_CODES, K),
    "sum": CodebookConfig(N_CODES, K, selection="nearest", reduce="sum"),
}
MODELS = [f"{host}-{architecture}" for architecture in ("gpt2", "llama") for host in HOSTS]
PAIRS = [(kind, config) for kind in (MODELS[0], MODELS[-1]) for config in CONFIGS]


@functools.cache
def prepared(kind: str, config: str = "residual") -> Any:
    """A model with codebooks at z and mlp_out, the codebooks, and the cache of a run without hooks."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = make_host(kind)
        books = tlc.attach(model, dict.fromkeys(("z", "mlp_out"), CONFIGS[config]))
    return SimpleNamespace(model=model, books=books, config=CONFIGS[config], before=run(model))


def run(model: Any, *hooks: Any, tokens: Any = TOKENS) -> Any:
    """The cache of a run with these hooks: codes and sites as they were after them."""
    with torch.no_grad(), model.hooks(fwd_hooks=list(hooks)):
        return model.run_with_cache(tokens)[1]


def ids_of(cache: Any, name: str = LAST) -> torch.Tensor:
    return cache[f"{name}.hook_codes"]


def decoded(book: Any, ids: torch.Tensor) -> torch.Tensor:
    """What the site must carry for ids [batch pos (group) slot], written down a second time."""
    ids = ids if ids.ndim == 4 else ids.unsqueeze(2)
    rows = []
    for group in range(book.n_groups):
        vectors = book.codes[group].detach()[ids[:, :, group].clamp(min=0)]
        total = (vectors * (ids[:, :, group] >= 0).unsqueeze(-1)).sum(-2)
        if book.config.reduce == "mean":
            total = total / (ids[:, :, group] != -2).sum(-1, keepdim=True)
        rows.append(total)
    return torch.stack(rows, 2)


def assert_site_carries(cache: Any, book: Any, name: str = LAST) -> None:
    expected = decoded(book, ids_of(cache, name))
    torch.testing.assert_close(cache[name].reshape(expected.shape), expected, rtol=1e-6, atol=1e-6)


def unused(ids: torch.Tensor) -> int:
    """A code that was chosen nowhere in these ids."""
    return min(set(range(N_CODES)) - set(ids.flatten().tolist()))
