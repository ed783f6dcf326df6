"""Tiny models of four architectures on both hosts, from configurations alone: no network, no downloaded weights."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch

from tl_codebook.building import hooked_transformer_class
from tl_codebook.convert.huggingface import load_hf

D_MODEL, N_LAYERS, N_HEADS, VOCABULARY, N_CTX = 32, 2, 4, 61, 48
ARCHITECTURES = ("gpt2", "neox", "neo", "llama")
HOSTS = ("hooked", "bridge") if hooked_transformer_class() is not None else ("bridge",)
KINDS = [f"{host}-{architecture}" for host in HOSTS for architecture in ARCHITECTURES]
"""What `make_host` takes, plus ``native``: a Bridge (or, where there is one, a HookedTransformer) from a TransformerLens config."""
ODD_ARCHITECTURES = {"opt": "OPTConfig", "mixtral": "MixtralConfig", "granite": "GraniteConfig", "olmo2": "Olmo2Config"}
"""Architectures that lay their hook points out in a way of their own, each with its configuration class; tested as a Bridge."""

logging.getLogger().setLevel(logging.ERROR)  # TransformerLens logs through the root logger


@functools.cache
def tokenizer_folder() -> str:
    """Write a word-level tokenizer with the vocabulary w3 ... w60 and return its folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = mkdtemp(prefix="tiny-tokenizer-")
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>").save_pretrained(folder)
    return folder


def make_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_folder())


def make_hf(architecture: str, **changes: Any) -> Any:
    """Build a tiny Hugging Face model with random weights, the same every time."""
    import transformers as hf

    common: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if architecture == "gpt2":
        sizes = dict(n_embd=D_MODEL, n_layer=N_LAYERS, n_head=N_HEADS, n_positions=N_CTX, n_inner=48)
        config = hf.GPT2Config(**sizes | common | changes)
    elif architecture == "neox":
        sizes = {"hidden_size": D_MODEL, "intermediate_size": 64, "num_hidden_layers": N_LAYERS, "num_attention_heads": N_HEADS}
        config = hf.GPTNeoXConfig(**sizes | dict(max_position_embeddings=N_CTX) | common | changes)
    elif architecture == "neo":
        config = hf.GPTNeoConfig(
            hidden_size=D_MODEL,
            num_layers=N_LAYERS,
            num_heads=N_HEADS,
            max_position_embeddings=N_CTX,
            window_size=8,
            attention_types=[[["global", "local"], N_LAYERS // 2]],
            **common | changes,
        )
    elif architecture == "llama":
        sizes = {"hidden_size": D_MODEL, "intermediate_size": 48, "num_hidden_layers": N_LAYERS, "num_attention_heads": N_HEADS}
        config = hf.LlamaConfig(**sizes | dict(num_key_value_heads=2, max_position_embeddings=N_CTX) | common | changes)
    elif architecture in ODD_ARCHITECTURES:
        sizes = {"hidden_size": D_MODEL, "num_hidden_layers": N_LAYERS, "num_attention_heads": N_HEADS, "max_position_embeddings": N_CTX}
        if architecture == "opt":
            sizes |= {"ffn_dim": 48, "word_embed_proj_dim": D_MODEL, "dropout": 0.0}
        else:
            sizes |= {"intermediate_size": 48, "num_key_value_heads": 2}
        if architecture == "mixtral":
            sizes |= {"num_local_experts": 2, "num_experts_per_tok": 1}
        config = getattr(hf, ODD_ARCHITECTURES[architecture])(**sizes, **common | changes)
    else:
        raise ValueError(architecture)
    for name in ("attn_pdrop", "resid_pdrop", "embd_pdrop", "attention_dropout", "resid_dropout", "embed_dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        for parameter in model.parameters():  # biases and norms are constant at first, and would hide mistakes
            parameter.data.add_(torch.randn_like(parameter) * 0.15)
    return model.eval()


def make_host(kind: str) -> Any:
    """Build a tiny host: ``hooked-gpt2``, ``bridge-llama`` and so on, or ``native``."""
    if kind == "native":
        host = HOSTS[0]
        settings = {
            "n_layers": 2,
            "d_model": 32,
            "n_ctx": N_CTX,
            "d_head": 8,
            "n_heads": 4,
            "d_mlp": 64,
            "d_vocab": VOCABULARY,
            "act_fn": "gelu",
            "seed": 0,
        }
        if host == "hooked":
            from transformer_lens import HookedTransformer, HookedTransformerConfig

            return HookedTransformer(HookedTransformerConfig(**settings, device="cpu"), make_tokenizer()).eval()
        return make_native_bridge(**settings)
    host, _, architecture = kind.partition("-")
    return load_hf(make_hf(architecture), make_tokenizer(), host=host)


def make_native_bridge(**settings: Any) -> Any:
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    sizes = {
        "n_layers": 2,
        "d_model": 32,
        "n_ctx": N_CTX,
        "d_head": 8,
        "n_heads": 4,
        "d_mlp": 64,
        "d_vocab": VOCABULARY,
        "act_fn": "gelu",
        "seed": 0,
    }
    return TransformerBridge.boot_native(TransformerBridgeConfig(**sizes | settings), make_tokenizer()).eval()


def write_hf_folder(folder: Path, architecture: str = "llama", **changes: Any) -> Path:
    """Write a tiny model and its tokenizer as an ordinary Hugging Face folder."""
    make_hf(architecture, **changes).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
