"""Load a Hugging Face causal language model as a TransformerLens host, without weight processing.

TransformerLens takes the configuration of a model from its *name*; here it comes from the model itself, so that a fine-tuned or resized
model loads as what it is. A probe compares the logits of both before anything is returned.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch

from tl_codebook.building import bridge_around, hooked_from_config, hooked_transformer_class
from tl_codebook.errors import CheckpointError, ConfigError

__all__ = ["load_hf"]


def load_hf(
    model: Any, tokenizer: Any = None, host: Literal["hooked", "bridge"] | None = None, *, device: str | torch.device | None = None
) -> Any:
    """Load a Hugging Face causal language model as a host whose activations are those of Hugging Face.

    Args:
        model: A folder, a hub name, or a model object; the object is left as it was.
        tokenizer: A tokenizer, or where to load it from; by default the one beside the model.
        host: ``hooked`` = HookedTransformer, ``bridge`` = TransformerBridge; by default HookedTransformer where TransformerLens has it.
        device: Where to put the host; by default where the model is.

    Raises:
        CheckpointError: the folder holds no such model, or TransformerLens cannot represent it (its logits differ from Hugging Face's).
        ConfigError: an unknown host, or HookedTransformer on TransformerLens 4.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> load_hf(GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_inner=48))).cfg.d_mlp
    48
    """
    hooked = hooked_transformer_class()
    host = host or ("hooked" if hooked is not None else "bridge")
    if host not in ("hooked", "bridge"):
        raise ConfigError(f"host={host!r} is not known. Choose 'hooked' or 'bridge'.")
    if host == "hooked" and hooked is None:
        raise ConfigError("host='hooked' was asked for, but this TransformerLens has no HookedTransformer. Use host='bridge'.")
    with tempfile.TemporaryDirectory(prefix="tlcb-") as scratch:  # it has to last: TransformerLens reads the tokenizer again from there
        return _load(model, tokenizer, host, device, Path(scratch))


def _load(model: Any, tokenizer: Any, host: str, device: str | torch.device | None, scratch: Path) -> Any:
    if isinstance(model, str | Path):
        source = str(model)
        hf_model = _from_folder(source)
        tokenizer = _tokenizer(source if tokenizer is None else tokenizer, scratch, required=tokenizer is not None)
    else:
        hf_model = copy.deepcopy(model) if host == "bridge" else model
        source = getattr(model, "name_or_path", "") or type(model).__name__
        tokenizer = _tokenizer(tokenizer, scratch, required=tokenizer is not None)
    if device is not None and isinstance(model, str | Path):
        hf_model = hf_model.to(device)
    modes = [(module, module.training) for module in hf_model.modules()]
    hf_model.eval()
    probe = _probe_tokens(hf_model)
    with torch.no_grad():
        expected = hf_model(probe).logits.float()
    try:
        result = (
            _hooked(hf_model, tokenizer)
            if host == "hooked"
            else bridge_around(hf_model, tokenizer, None if Path(source).exists() else source)
        )
        result.eval()
        with torch.no_grad():
            logits = result(probe.to(next(result.parameters()).device)).float()
    except (CheckpointError, ConfigError):
        raise
    except Exception as error:
        raise CheckpointError(
            f"{source}: TransformerLens cannot represent a {type(hf_model).__name__} as a {host} host ({type(error).__name__}: {error}). "
            f"Try host={'bridge' if host == 'hooked' else 'hooked'!r}."
        ) from error
    finally:
        if host == "hooked":
            for module, mode in modes:
                module.training = mode
    _compare(expected, logits, source, hf_model, host)
    return result if device is None else result.to(device)


def _from_folder(source: str) -> Any:
    from transformers import AutoModelForCausalLM

    local = Path(source).exists()
    if local and not (Path(source) / "config.json").is_file():
        raise CheckpointError(f"{source} holds no config.json. Give a folder written by save_pretrained, or a hub name.")
    try:
        return AutoModelForCausalLM.from_pretrained(
            source, local_files_only=local, attn_implementation="eager", trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{source}: no causal language model could be loaded from it ({error}).") from error
    except Exception as error:  # safetensors raises a class of its own
        if type(error).__module__.startswith("safetensors"):
            raise CheckpointError(f"{source}: its safetensors file is incomplete or damaged ({error}). Copy it again.") from error
        raise


def _tokenizer(source: Any, scratch: Path, *, required: bool) -> Any:
    """Load a tokenizer; an object goes through a folder, as it is now, since TransformerLens loads it again from where it came from."""
    from transformers import AutoTokenizer

    if source is None:
        return None
    if not isinstance(source, str | Path):
        source.save_pretrained(scratch)
        return AutoTokenizer.from_pretrained(str(scratch))
    try:
        return AutoTokenizer.from_pretrained(str(source), local_files_only=Path(source).exists())
    except (OSError, ValueError) as error:
        if required:
            raise CheckpointError(f"{source}: no tokenizer could be loaded from it ({error}).") from error
        return None


def _probe_tokens(hf_model: Any) -> torch.Tensor:
    vocabulary = int(hf_model.config.get_text_config().vocab_size)
    return (torch.arange(8) * 7 + 1).remainder(vocabulary).reshape(1, 8).to(next(hf_model.parameters()).device)


def _hooked(hf_model: Any, tokenizer: Any) -> Any:
    from transformer_lens import loading_from_pretrained as loading

    device, dtype = next(hf_model.parameters()).device, next(hf_model.parameters()).dtype
    config = copy.deepcopy(hf_model.config)
    if not hasattr(config, "n_ctx") and hasattr(config, "n_positions"):
        config.n_ctx = config.n_positions  # TransformerLens reads it; only old config files of the hub have it
    config.architectures = [type(hf_model).__name__]
    requires_grad = [(p, p.requires_grad) for p in hf_model.parameters()]
    with tempfile.TemporaryDirectory(prefix="tlcb-") as folder:  # TransformerLens matches on words in the path: a name of ours has none
        config.save_pretrained(folder)
        cfg = loading.get_pretrained_model_config(folder, hf_cfg=config.to_dict(), fold_ln=False, device=device, dtype=dtype)
        cfg.model_name = Path(getattr(config, "_name_or_path", "") or type(hf_model).__name__).name
        cfg.tokenizer_name = None
        try:
            weights = loading.get_pretrained_state_dict(folder, cfg, hf_model, dtype=dtype)
        finally:
            for parameter, wanted in requires_grad:
                parameter.requires_grad_(wanted)
    if "blocks.0.mlp.W_in" in weights:
        cfg.d_mlp = weights["blocks.0.mlp.W_in"].shape[-1]  # TransformerLens takes 4 * d_model for GPT-2 and GPT-Neo
    model = hooked_from_config(cfg, tokenizer)
    weights = {name: value.detach().clone() if isinstance(value, torch.Tensor) else value for name, value in weights.items()}
    model.load_and_process_state_dict(weights, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False)
    model.move_model_modules_to_device()
    return model


def _compare(expected: torch.Tensor, logits: torch.Tensor, source: str, hf_model: Any, host: str) -> None:
    if logits.shape != expected.shape:
        raise CheckpointError(f"{source}: the {host} host gives logits {tuple(logits.shape)}, Hugging Face {tuple(expected.shape)}.")
    scale = expected.abs().max().clamp(min=1.0)
    difference = float((logits.to(expected.device) - expected).abs().max() / scale)
    limit = 1e-4 if next(hf_model.parameters()).dtype == torch.float32 else 3e-2
    if not difference <= limit:
        raise CheckpointError(
            f"{source}: as a {host} host its logits differ from Hugging Face's by {difference:.2g} of their scale (limit {limit:g}): "
            f"TransformerLens does not represent this {type(hf_model).__name__}. Try host={'bridge' if host == 'hooked' else 'hooked'!r}."
        )
