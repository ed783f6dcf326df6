"""The language model of the experiment: a small GPT-2, or a GPT-NeoX with parallel blocks as the paper's."""

from __future__ import annotations

from typing import Any, Literal

import torch

from tl_codebook.experiments.tokfsm.setting import TokFSMSetting
from tl_codebook.experiments.tokfsm.tokens import make_tokenizer

__all__ = ["make_model"]


def make_model(setting: TokFSMSetting, seed: int = 0, host: Literal["hooked", "bridge"] | None = None) -> Any:
    """Build the model of a setting with random weights, the same for a seed on every host, in evaluation mode, with its tokenizer.

    Args:
        setting: Sizes of the model, and the machine whose digits it reads.
        seed: Of the weights; the global random stream is left as it was.
        host: ``hooked`` or ``bridge``; by default HookedTransformer where TransformerLens has it.

    Source: the sizes, and the architecture ``gpt_neox`` (parallel blocks, rotary positions), are those of Tamkin et al. 2023, section 3;
    weights as Hugging Face draws them.

    >>> model = make_model(TokFSMSetting.mini())
    >>> model.cfg.n_layers, model.cfg.d_model, model.cfg.positional_embedding_type, model.to_string(torch.tensor([0, 4]))
    (2, 64, 'rotary', '04')
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from tl_codebook.convert.huggingface import load_hf

    machine = setting.machine()
    sizes: dict[str, Any] = {
        "vocab_size": machine.n_vocabulary,
        "hidden_size": setting.d_model,
        "num_hidden_layers": setting.n_layers,
        "num_attention_heads": setting.n_heads,
        "max_position_embeddings": setting.n_tokens,
    }
    of_architecture: dict[str, dict[str, Any]] = {
        "gpt2": {"n_inner": 4 * setting.d_model, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
        "gpt_neox": {
            "intermediate_size": 4 * setting.d_model,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0},
        },
    }
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), machine.bos)
    config = AutoConfig.for_model(setting.architecture, **sizes, **of_architecture[setting.architecture], **special)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPU's as well, and not put it back
        model = AutoModelForCausalLM.from_config(config)
    return load_hf(model, make_tokenizer(machine), host)
