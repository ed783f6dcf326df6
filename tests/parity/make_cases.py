"""Make the small cases beside this file by running the original library, codebook-features 0.1.2.

In an environment of its own (transformers 4.34, transformer-lens 1.7, codebook-features 0.1.2)::

    HF_HUB_OFFLINE=1 python tests/parity/make_cases.py

A case is a folder: ``base/config.json`` (the model that was wrapped), ``checkpoint/`` (what ``save_pretrained`` wrote) and
``data.safetensors`` (tokens in; logits, loss and ids per codebook out).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import transformers
from codebook_features import mod_model_classes, models
from safetensors.torch import save_file

CASES = Path(__file__).with_name("cases")
VOCABULARY = 23
COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
NEOX = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "rotary_pct": 0.5,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}
BASES = {
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=8, n_layer=2, n_head=2, n_positions=16, n_inner=12, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **COMMON
    ),
    "neox": lambda: transformers.GPTNeoXConfig(**NEOX, **COMMON),
    "neox_sequential": lambda: transformers.GPTNeoXConfig(
        **NEOX, use_parallel_residual=False, rotary_emb_base=100, hidden_act="relu", **COMMON
    ),
    "neo": lambda: transformers.GPTNeoConfig(
        hidden_size=8,
        num_layers=2,
        num_heads=2,
        intermediate_size=20,
        max_position_embeddings=16,
        window_size=4,
        attention_types=[[["global", "local"], 1]],
        resid_dropout=0.0,
        embed_dropout=0.0,
        attention_dropout=0.0,
        **COMMON,
    ),
}
HEADS = {"codebook_type": ["group", "vanilla"], "num_codebooks": [-1, 1]}
RECIPES = {
    "gpt2_heads_and_mlp": ("gpt2", dict(codebook_at=["attn_preproj", "mlp"], k_codebook=[3, 2], **HEADS)),
    "gpt2_qkv": ("gpt2", dict(codebook_at="qkv", k_codebook=2)),
    "gpt2_attn_plus_mlp_euclidean": ("gpt2", dict(codebook_at="attn_plus_mlp", k_codebook=3, similarity_metric="euclidean")),
    "gpt2_idle_mlp": ("gpt2", dict(codebook_at=["transformer_block", "mlp"], k_codebook=2)),
    "gpt2_replaced_attn": ("gpt2", dict(codebook_at=["attn", "attn_preproj"], k_codebook=[1, 2])),
    "gpt2_heads_twice": ("gpt2", dict(codebook_at=["attn_preproj", "attn_preproj"], k_codebook=[1, 3])),
    "gpt2_mlp_mid_twice": ("gpt2", dict(codebook_at=["mlp_mid", "mlp_mid"], k_codebook=[1, 2])),
    "gpt2_last_layer_mlp_mid_bin": ("gpt2", dict(codebook_at=["mlp_mid", "mlp"], k_codebook=2, layers_to_snap=[-1])),
    "gpt2_left_padding": ("gpt2", dict(codebook_at="mlp", k_codebook=2)),
    "neox_heads_qkv": ("neox", dict(codebook_at="qkv", codebook_type="group", num_codebooks=2, k_codebook=2)),
    "neox_joint_qkv": ("neox", dict(codebook_at=["qkv", "mlp"], k_codebook=2)),
    "neox_attn_and_mlp_bin": (
        "neox",
        dict(codebook_at=["attn", "mlp"], codebook_type=["vanilla", "group"], num_codebooks=[1, 4], k_codebook=[4, 1]),
    ),
    "neox_sequential_attn_plus_mlp": ("neox_sequential", dict(codebook_at=["attn_plus_mlp", "transformer_block"], k_codebook=2)),
    "neox_left_padding": ("neox", dict(codebook_at="attn", k_codebook=2)),
    "neo_heads_and_block": ("neo", dict(codebook_at=["attn_preproj", "transformer_block"], k_codebook=2, **HEADS)),
    "neo_left_padding": ("neo", dict(codebook_at="mlp", k_codebook=2)),
}


def take_position_ids() -> None:
    """Let the original's block for ``attn_plus_mlp`` take the position_ids that transformers 4.34 passes on; it predates them."""
    block = mod_model_classes.PreResidualCodebookGPTNeoXBlock
    inner = block.forward

    def forward(self, *args, position_ids=None, **kwargs):
        attention = self.attention

        class WithPositions(torch.nn.Module):
            def forward(self, *args, **kwargs):
                return attention(*args, position_ids=position_ids, **kwargs)

        self._modules["attention"] = WithPositions()
        try:
            return inner(self, *args, **kwargs)
        finally:
            self._modules["attention"] = attention

    block.forward = forward


def make(name: str, seed: int) -> None:
    base, kwargs = RECIPES[name]
    folder = CASES / name
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(seed)
    hf_model = transformers.AutoModelForCausalLM.from_config(BASES[base]())
    for parameter in hf_model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.3)
    hf_model.config.architectures = [type(hf_model).__name__]
    hf_model.config.save_pretrained(folder / "base")
    config = models.CodebookModelConfig(**{"num_codes": 9, "layers_to_snap": "all", **kwargs})
    model = models.wrap_codebook(hf_model, config)
    for key, parameter in model.named_parameters():
        if ".ln." in key and "codebook_layer" in key:
            parameter.data = torch.randn_like(parameter) * 0.3 + (1.0 if key.endswith("weight") else 0.0)
    model.eval()
    model.model.eval()
    tokens = torch.randint(3, VOCABULARY, (2, 12))
    data, inputs = {"input_ids": tokens}, {}
    if "left_padding" in name:  # positions counted from the first real token, as generate() does
        inputs["attention_mask"] = torch.ones_like(tokens)
        inputs["attention_mask"][0, :4] = 0
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        data["attention_mask"] = inputs["attention_mask"]
    fired = {}
    for module in model.modules():
        if isinstance(module, models.CodebookLayer):
            module.hook_fn = lambda key, ids: fired.setdefault(key, torch.tensor(ids))
    with torch.no_grad():
        out = model(tokens, labels=tokens, **inputs)
    data |= {"logits": out.logits, "loss": out.loss.reshape(1)} | {f"ids/{key}": ids for key, ids in fired.items()}
    model.save_pretrained(folder / "checkpoint", safe_serialization=not name.endswith("_bin"))
    save_file({key: value.contiguous().clone() for key, value in data.items()}, folder / "data.safetensors")
    (folder / "checkpoint" / "generation_config.json").unlink(missing_ok=True)
    for path in folder.rglob("*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()), indent=1) + "\n")
    print(name, sorted(fired))


if __name__ == "__main__":
    take_position_ids()
    for number, name in enumerate(RECIPES):
        make(name, seed=number)
