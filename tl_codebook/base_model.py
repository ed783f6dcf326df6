"""The base model inside a checkpoint: its configuration, its weights, and how it is built again from both.

A model without codebooks, in training or trained, has a folder of its own: ``tl_codebook_base.json`` and ``model.<hash>.safetensors``.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_codebook import files, hosts
from tl_codebook.building import bridge_around, hooked_from_config, native_bridge
from tl_codebook.errors import CheckpointError, ConfigError

__all__ = ["BASE_MANIFEST", "build", "describe", "freeze_", "frozen_zeros", "put_weights_", "restore_base_", "save_base", "weights_of"]

BASE_MANIFEST = "tl_codebook_base.json"
_BASE_FORMAT = "tl_codebook base"
_BESIDE_THE_COMPUTATION = frozenset(
    (
        *("device", "n_devices", "seed", "init_mode", "init_weights", "initializer_range", "n_params"),
        *("model_name", "original_architecture", "_name_or_path", "architectures", "transformers_version", "trust_remote_code"),
        *("from_checkpoint", "checkpoint_index", "checkpoint_label_type", "checkpoint_value"),
        *("tokenizer_name", "tokenizer_prepends_bos", "tokenizer_appends_eos", "default_prepend_bos", "default_padding_side"),
        *("bos_token_id", "eos_token_id", "id2label", "label2id", "problem_type"),
        *("use_attn_result", "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in", "use_hook_tokens"),
        *("output_attentions", "output_hidden_states", "return_dict", "use_cache"),
    )
)
"""Fields of a host's configuration that say where it came from, how it started and what is shown of it."""


def _parameters(model: Any) -> dict[str, Tensor]:
    return {name: value for name, value in model.named_parameters() if ".codebook." not in name}


def frozen_zeros(model: Any) -> list[str]:
    """Return the base parameters that are zero and not trained: those that TransformerLens adds to what Hugging Face has (`load_hf`)."""
    return [name for name, value in _parameters(model).items() if not value.requires_grad and not bool(value.any())]


def weights_of(model: Any) -> dict[str, Tensor]:
    """Return the weights of the base model, without codebooks and without what its configuration already says."""
    if hosts.is_bridge(model):
        return {name: value for name, value in model.state_dict().items() if ".codebook." not in name}
    return _parameters(model)


def _plain(value: Any) -> Any:
    """Turn a configuration into JSON values; what JSON has no word for is left out and decided anew on loading."""
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)


def _unplain(value: Any, folder: Path) -> Any:
    if isinstance(value, dict) and set(value) == {"dtype"}:
        dtype = getattr(torch, str(value["dtype"]), None)
        if not isinstance(dtype, torch.dtype):
            raise CheckpointError(f"{folder}: the model configuration names the dtype {value['dtype']!r}, which torch does not have.")
        return dtype
    return value


def describe(model: Any) -> dict[str, Any]:
    """Return the kind of host and its configuration as JSON values; refuse what no file can hold."""
    if not hosts.is_bridge(model):
        fields = {key: value for key, value in model.cfg.to_dict().items() if key not in ("device", "tokenizer_name")}
        return {"host": "hooked", "config": _plain(fields)}
    inner = model.original_model
    if type(inner).__name__ == "NativeModel":
        return {"host": "native", "config": _plain({key: value for key, value in model.cfg.to_dict().items() if key != "device"})}
    if getattr(model, "_weights_processed", False):
        raise CheckpointError(
            "the weights of this TransformerBridge were processed (enable_compatibility_mode), and no file format of theirs exists. Save "
            "the codes alone: Codebooks.of(model).save_pretrained(folder)."
        )
    dtype = next(iter(weights_of(model).values())).dtype  # a model that was cast keeps the old one in its configuration
    return {"host": "bridge", "config": _plain(inner.config.to_dict() | {"dtype": dtype})}


def build(host: Any, fields: Mapping[str, Any], tokenizer: Any, folder: Path) -> Any:
    """Build a model with fresh weights from what `describe` said of it."""
    config = {key: _unplain(value, folder) for key, value in fields.items()}
    try:
        with torch.random.fork_rng(devices=[]):
            if host == "hooked":
                return hooked_from_config(config | {"device": "cpu"}, tokenizer)
            if host == "native":
                return native_bridge(config | {"device": "cpu"}, tokenizer)
            if host == "bridge":
                from transformers import CONFIG_MAPPING, AutoModelForCausalLM

                kind = str(config.get("model_type"))
                if kind not in CONFIG_MAPPING or "auto_map" in config:
                    raise CheckpointError(
                        f"{folder}: the model configuration is of type {kind!r}"
                        f"{' and asks for code of its own (auto_map)' if 'auto_map' in config else ''}. Only types that transformers has "
                        "are loaded, and no code."
                    )
                hf_config = CONFIG_MAPPING[kind].from_dict(config)
                dtype = getattr(hf_config, "dtype", None) or torch.float32
                hf_model = AutoModelForCausalLM.from_config(hf_config, attn_implementation="eager", dtype=dtype)
                return bridge_around(hf_model, tokenizer)
    except (CheckpointError, ConfigError):
        raise
    except Exception as error:
        raise CheckpointError(
            f"{folder}: no {host} model can be built from its configuration ({type(error).__name__}: {error})."
        ) from error
    raise CheckpointError(f"{folder}: its host is {host!r}. Known hosts: hooked, bridge, native.")


@torch.no_grad()
def put_weights_(model: Any, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Fill the weights of a model in; nothing may be missing or left over."""
    own = weights_of(model)
    if set(own) != set(weights):
        missing, extra = sorted(set(own) - set(weights)), sorted(set(weights) - set(own))
        raise CheckpointError(f"{folder}: the weights lack {missing[:5]} and have {extra[:5]} too many for this TransformerLens' model.")
    for name, value in own.items():
        if value.shape != weights[name].shape:
            raise CheckpointError(f"{folder}: {name!r} has shape {tuple(weights[name].shape)}, the model needs {tuple(value.shape)}.")
    for name, value in own.items():
        value.copy_(weights[name])


def freeze_(model: Any, names: Any, folder: Path) -> None:
    """Freeze what `load_hf` froze: zeros that TransformerLens adds, and that a model trained further must not move if it is to go back."""
    own = _parameters(model)
    if not isinstance(names, list) or not all(isinstance(name, str) and name in own for name in names):
        raise CheckpointError(f"{folder}: its frozen parameters are {names!r:.200}, and not all are in the model. Copy it again.")
    for name in names:
        own[name].requires_grad_(False)


def save_base(model: Any, folder: Path, **about: Any) -> None:
    """Write the weights of a host, without codebooks, and what else is to be known about them (JSON values); `restore_base_` reads it.

    The manifest is replaced last and in one step, so a process killed in between leaves what was there before.
    """
    with files.made(folder), files.one_writer(folder):
        before: dict[str, Any] = {}
        with contextlib.suppress(CheckpointError):  # none there, or what is being overwritten is damaged
            before = files.read_json(folder / BASE_MANIFEST)
        manifest = {
            "format": _BASE_FORMAT,
            "format_version": 1,
            "model": _described(model),
            "weights": files.write_tensors(folder, "model", weights_of(model)),
            **about,
        }
        files.replace_json(folder / BASE_MANIFEST, manifest)
        files.remove_stale(folder, before, manifest)


def _described(model: Any) -> dict[str, Any] | None:
    """Return what `describe` says, as a file gives it back; None where it cannot say, for the weights can be kept all the same."""
    try:
        return json.loads(json.dumps(describe(model), allow_nan=False))
    except Exception:  # processed weights, or a configuration of someone else's making
        return None


def restore_base_(model: Any, folder: Path, *, again: str = "Train it again.") -> dict[str, Any]:
    """Bring the weights of a host back to what `save_base` wrote, and return the manifest. `again` is what errors advise.

    Raises:
        CheckpointError: the folder holds none, or of another model or dtype, or it is damaged; the model is as it was.
    """
    if not (folder / BASE_MANIFEST).is_file():
        raise CheckpointError(f"{folder} holds no {BASE_MANIFEST}, so no base can be restored from it. {again}")
    manifest = files.read_json(folder / BASE_MANIFEST, again=again)
    if (manifest.get("format"), manifest.get("format_version")) != (_BASE_FORMAT, 1):
        raise CheckpointError(f"{folder / BASE_MANIFEST} is of a format that is not read. Use the release that wrote it.")
    weights = files.read_tensors(folder, manifest.get("weights"))
    own = weights_of(model)
    rounded = [name for name in own if name in weights and own[name].dtype != weights[name].dtype]
    if rounded:
        then, now = (str(of[rounded[0]].dtype).removeprefix("torch.") for of in (weights, own))
        raise CheckpointError(
            f"{folder} holds {rounded[0]!r} in {then}, the model has it in {now} ({len(rounded)} weights differ so): one would be rounded "
            f"to the other. Restore into a model in {then}: model.to(torch.{then})."
        )
    if "model" in manifest:  # not in what was written before there was a description
        differing = _differences(manifest["model"], _described(model))
        if differing:
            raise CheckpointError(
                f"{folder} holds the weights of another model ({'; '.join(differing)}). Restore into a model of the configuration it had."
            )
    put_weights_(model, weights, folder)
    return manifest


def _differences(then: Any, now: dict[str, Any] | None) -> list[str]:
    """List in what computation two descriptions of hosts differ; a field that only one has is of another release."""
    if not isinstance(then, dict) or now is None:  # weight processing, which no description can name, computes something else
        return [] if then == now else [f"a description: {'none' if then is None else 'one'} then, {'none' if now is None else 'one'} now"]
    if then.get("host") != now["host"] or not isinstance(then.get("config"), dict):
        return [f"host: {then.get('host')!r} then, {now['host']!r} now"]
    before, after = then["config"], now["config"]
    asked = sorted((before.keys() & after.keys()) - _BESIDE_THE_COMPUTATION)
    return [f"{key}: {before[key]!r} then, {after[key]!r} now" for key in asked if before[key] != after[key]]
