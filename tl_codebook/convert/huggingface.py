"""Load a Hugging Face causal language model as a TransformerLens host, without weight processing.

TransformerLens takes the configuration of a model from its *name*; here it comes from the model itself, so that a fine-tuned or resized
model loads as what it is. A probe compares the logits of both before anything is returned.
"""

from __future__ import annotations

import copy
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tl_codebook.building import bridge_around, hooked_transformer_class
from tl_codebook.convert.hooked_config import UnrepresentableError, hooked_from_hf
from tl_codebook.convert.pretrained import check_object, is_local, read_model, read_tokenizer
from tl_codebook.errors import CheckpointError, ConfigError

__all__ = ["load_hf", "probe_tokens"]

NO_PLACE: dict[str, dict[str, dict[str, Any]]] = {
    "hooked": {"gpt2": {"add_cross_attention": True}, "llama": {"mlp_bias": True}},
    "bridge": {"gpt2": {"scale_attn_weights": False, "add_cross_attention": True}, "gpt_neox": {"attention_bias": False}},
}
"""Host -> `model_type` -> field and value that TransformerLens does not represent: the names behind a refusal."""

_CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
_ROWS, _LENGTH, _AFFORDABLE = 2, 64, 512
_HOOKS = [f"_{direction}_{when}" for direction in ("forward", "backward") for when in ("hooks", "pre_hooks")] + [
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
]


def load_hf(
    model: Any, tokenizer: Any = None, host: Literal["hooked", "bridge"] | None = None, *, device: str | torch.device | None = None
) -> Any:
    """Load a Hugging Face causal language model as a host, in evaluation mode, whose activations are those of Hugging Face.

    Parameters that the host has and Hugging Face does not are zero and get ``requires_grad=False``, so that training the host trains what
    Hugging Face would train. A HookedTransformer has no dropout, and keeps a tied head apart from the embedding.

    Args:
        model: A folder, a hub name, or a model object; the object is left as it was.
        tokenizer: A tokenizer, or where to load it from; by default the one beside the model.
        host: ``hooked`` = HookedTransformer, ``bridge`` = TransformerBridge; by default HookedTransformer where TransformerLens has it.
        device: Where to put the host; by default where the model is.

    Raises:
        CheckpointError: the folder holds no such model, or TransformerLens cannot represent it.
        ConfigError: an unknown host, HookedTransformer on TransformerLens 4, or something else than a model or tokenizer.

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
    # The folder has to last: TransformerLens reads the tokenizer again from there. What it draws at random is overwritten by weights.
    # Weights that were made in inference mode could never be trained.
    with torch.inference_mode(False), tempfile.TemporaryDirectory(prefix="tlcb-") as scratch, torch.random.fork_rng(devices=[]):
        return _load(model, tokenizer, host, device, Path(scratch))


def _load(model: Any, tokenizer: Any, host: str, device: str | torch.device | None, scratch: Path) -> Any:
    name = None  # on the hub
    if isinstance(model, str | Path):
        source = str(model)
        hf_model = read_model(model)
        name = None if is_local(model) else source
        if device is not None:
            hf_model = hf_model.to(device)
    else:
        check_object(model)
        hf_model = _copy(model, share=host == "hooked").eval()
        source = getattr(model, "name_or_path", "") or type(model).__name__
        name = None if is_local(source) else source
    beside = model if tokenizer is None and isinstance(model, str | Path) else tokenizer
    tokenizer = read_tokenizer(beside, scratch, _vocabulary(hf_model), required=tokenizer is not None)
    probe = probe_tokens(hf_model)
    expected = _logits(hf_model, probe, source)
    try:
        result = hooked_from_hf(hf_model, tokenizer) if host == "hooked" else _bridge(hf_model, tokenizer, name)
        result.eval()
        with torch.no_grad():
            logits = result(probe.to(next(result.parameters()).device)).float()
        _compare(expected, logits, next(hf_model.parameters()).dtype)
    except (CheckpointError, ConfigError):
        raise
    except UnrepresentableError as error:
        raise _refusal(source, hf_model, host, str(error), named=True) from None
    except Exception as error:
        said = str(error).strip()[:300]
        raise _refusal(source, hf_model, host, type(error).__name__ + (f": {said}" if said else ""), named=False) from error
    return result if device is None else result.to(device)


def _copy(model: Any, *, share: bool) -> Any:
    """Copy a model without its hooks; with `share` around the same weights, in parameters of its own.

    Raises:
        CheckpointError: the object holds something that cannot be copied.
    """
    memo: dict[int, Any] = {id(vars(module)[name]): OrderedDict() for module in model.modules() for name in _HOOKS if name in vars(module)}
    kept = [parameter for parameter in model.parameters() if share]
    memo |= {id(p): nn.Parameter(p.clone() if p.is_inference() else p.detach(), requires_grad=False) for p in kept}
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise CheckpointError(
            f"this {type(model).__name__} cannot be copied ({type(error).__name__}: {error}), and load_hf leaves it as it is. Save it with "
            "save_pretrained(folder) and give the folder."
        ) from error
    for module in copied.modules():
        if vars(module).get("_output_capturing_hooks_installed"):  # transformers' own, which it will install again
            module._output_capturing_hooks_installed = False
    return copied


def _bridge(hf_model: Any, tokenizer: Any, name: str | None) -> Any:
    """Wrap a model in a TransformerBridge; a parameter that the Bridge puts where the model has none (3.9: a head's bias) stays zero."""
    absent = [(module, key) for module in hf_model.modules() for key, value in module._parameters.items() if value is None]
    bridge = bridge_around(hf_model, tokenizer, name)
    for module, key in absent:
        parameter = getattr(module, key, None)
        if isinstance(parameter, nn.Parameter):
            parameter.requires_grad_(False)
    return bridge


def _vocabulary(hf_model: Any) -> int:
    return int(hf_model.get_input_embeddings().weight.shape[0])


def probe_tokens(hf_model: Any) -> Tensor:
    """Return rows of tokens that reach beyond every window that is affordable, within what the model can take."""
    config = hf_model.config.get_text_config()
    limit = min(getattr(config, field, None) or _AFFORDABLE for field in _CONTEXT)
    windows = [getattr(config, field, None) or 0 for field in ("window_size", "sliding_window")]
    length = max(_LENGTH, *(window + 4 for window in windows if isinstance(window, int) and window + 4 <= _AFFORDABLE), 1)
    shape = (_ROWS, max(1, min(length, limit)))
    tokens = torch.randint(_vocabulary(hf_model), shape, generator=torch.Generator().manual_seed(0))
    return tokens.to(next(hf_model.parameters()).device)


def _logits(hf_model: Any, probe: Tensor, source: str) -> Tensor:
    with torch.no_grad():
        try:
            logits: Tensor = hf_model(probe).logits.float()
        except Exception as error:
            raise CheckpointError(
                f"{source}: Hugging Face itself cannot run this {type(hf_model).__name__} on {tuple(probe.shape)} tokens "
                f"({type(error).__name__}: {error}). Correct its config or weights."
            ) from error
    if not logits.isfinite().all():
        bad = [name for name, parameter in hf_model.named_parameters() if not parameter.isfinite().all()]
        raise CheckpointError(
            f"{source}: its logits are not finite; "
            + (f"NaN or Inf is in {', '.join(bad[:4])}. Give an undamaged model." if bad else "its weights are, so they are too large.")
        )
    return logits


def _compare(expected: Tensor, logits: Tensor, dtype: torch.dtype) -> None:
    if logits.shape != expected.shape:
        raise UnrepresentableError(f"its logits are {tuple(logits.shape)}, Hugging Face's {tuple(expected.shape)}")
    scale = expected.abs().max().clamp(min=1.0)
    difference = float((logits.to(expected.device) - expected).abs().max() / scale)
    limit = 1e-4 if dtype == torch.float32 else 3e-2
    if not difference <= limit:
        raise UnrepresentableError(f"its logits differ from Hugging Face's by {difference:.2g} of their scale (limit {limit:g})")


def _refusal(source: str, hf_model: Any, host: str, reason: str, *, named: bool) -> CheckpointError:
    """Return the error for a model that a host does not represent: the field behind it, if it is known, and the host that would do."""
    config = hf_model.config

    def culprits(which: str) -> str:
        known = NO_PLACE[which].get(config.model_type, {})
        return " and ".join(f"{field}={value!r}" for field, value in known.items() if getattr(config, field, None) == value)

    other = "bridge" if host == "hooked" else "hooked"
    if culprits(other) or (other == "hooked" and hooked_transformer_class() is None):
        advice = "No host of this TransformerLens does; use a model without it."
    else:
        advice = f"{'Use' if culprits(host) or (named and host == 'hooked') else 'Try'} host={other!r}."
    because = f"{culprits(host)}: {reason}" if culprits(host) else reason
    name = "HookedTransformer" if host == "hooked" else "TransformerBridge"
    return CheckpointError(
        f"{source}: host={host!r} was asked for, and a {name} does not represent this {type(hf_model).__name__} ({because}). {advice}"
    )
