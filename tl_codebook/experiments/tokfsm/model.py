"""The language model of the experiment: a small GPT-NeoX with parallel blocks, as the paper's."""

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

    Source: GPT-NeoX with parallel blocks and rotary positions as in Tamkin et al. 2023, section 3; weights as Hugging Face draws them.

    >>> model = make_model(TokFSMSetting.mini())
    >>> model.cfg.n_layers, model.cfg.d_model, model.cfg.parallel_attn_mlp, model.to_string(torch.tensor([0, 4]))
    (2, 64, True, '04')
    """
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    from tl_codebook.convert.huggingface import load_hf

    machine = setting.machine()
    config = GPTNeoXConfig(
        vocab_size=machine.n_vocabulary,
        hidden_size=setting.d_model,
        num_hidden_layers=setting.n_layers,
        num_attention_heads=setting.n_heads,
        intermediate_size=4 * setting.d_model,
        max_position_embeddings=setting.n_tokens,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0},
        bos_token_id=machine.bos,
        eos_token_id=machine.bos,
        pad_token_id=machine.bos,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPU's as well, and not put it back
        model = GPTNeoXForCausalLM(config)
    return load_hf(model, make_tokenizer(machine), host)
