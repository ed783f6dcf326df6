"""Load the checkpoints of codebook-features 0.1.2 as hooked models with codebooks."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tl_codebook import files
from tl_codebook.attachment import attach
from tl_codebook.codebook import Codebook, CodebookConfig
from tl_codebook.convert.huggingface import load_hf
from tl_codebook.convert.layouts import Layout, layout_of
from tl_codebook.convert.original_checkpoint import Parts, check_dtype, read_config, read_weights, split_weights
from tl_codebook.convert.original_config import PLACES, OriginalConfig
from tl_codebook.convert.pretrained import first_line, is_local, read_tokenizer, unfilled_model
from tl_codebook.errors import CheckpointError, CheckpointWarning, ConfigError
from tl_codebook.names import hook_name

__all__ = ["OriginalModel", "load_codebook_features", "read_codebook_features"]

_WRAPPED = ("gpt2", "gpt_neox", "gpt_neo")
_REPLACED_BY = {"attn_preproj": ("attn", "qkv"), "attn_plus_mlp": tuple(PLACES)}
"""A place listed later in `codebook_at` makes a new module, and with it drops the codebooks that were put on the old one."""


@dataclasses.dataclass(frozen=True)
class OriginalModel:
    """A checkpoint of codebook-features, read: a Hugging Face model with its weights, and codebooks by hook name."""

    config: OriginalConfig
    hf_model: Any
    tokenizer: Any
    books: dict[str, Codebook]
    idle: tuple[str, ...]
    """Codebooks in the file that never run, by the original's names."""


def load_codebook_features(
    checkpoint: str | Path,
    base: Any,
    host: Literal["hooked", "bridge"] | None = None,
    *,
    tokenizer: Any = None,
    device: str | torch.device | None = None,
    allow_nonfinite: bool = False,
) -> tuple[Any, dict[str, Codebook]]:
    """Load a checkpoint of codebook-features as a hooked model; return it and its codebooks by hook name.

    The weights all come from the checkpoint; the base says what the original's ``config.json`` does not, its architecture. A
    ``pytorch_model.bin`` is read with ``weights_only=True``: nothing in it runs.

    Args:
        checkpoint: A folder that ``save_pretrained`` wrote, or a hub name.
        base: The Hugging Face model that was wrapped: a folder, a hub name, or an object. Only its configuration is used.
        host: As for `load_hf`.
        tokenizer: A tokenizer, or where to load it from; by default the one beside the checkpoint, or beside the base.
        device: Where to put the model; the CPU by default.
        allow_nonfinite: Load codes that hold NaN or Inf rather than raise.

    Raises:
        CheckpointError: naming file, key and fix, for what is missing, damaged, of another base, or unsafe.

    Source: Tamkin et al. 2023; codebook-features 0.1.2.
    """
    with torch.inference_mode(False):  # or what is loaded could never be trained
        original = read_codebook_features(checkpoint, base, tokenizer=tokenizer, allow_nonfinite=allow_nonfinite)
        model = load_hf(original.hf_model, original.tokenizer, host, device=device)
        if original.books:
            attach(model, original.books)
    return model, original.books


def read_codebook_features(checkpoint: str | Path, base: Any, *, tokenizer: Any = None, allow_nonfinite: bool = False) -> OriginalModel:
    """Read a checkpoint of codebook-features without hooking it; see `load_codebook_features`."""
    folder = _local(checkpoint)
    config = read_config(folder)
    hf_config = _config_of(base)
    layout = layout_of(hf_config.model_type)
    n_layers, n_heads = hf_config.num_hidden_layers, hf_config.num_attention_heads
    tensors, path = read_weights(folder)
    parts = split_weights(tensors, layout, n_layers, path)
    hf_model = _model_of(hf_config, parts, path)
    try:
        layers, groups = config.layers(n_layers), config.groups(n_heads)
    except ConfigError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error
    _check_places(config, layers, parts, path)
    books: dict[str, Codebook] = {}
    last = {place: at for at, place in enumerate(config.codebook_at)}  # of a place listed twice, the second codebook replaced the first
    for (layer, place), found in sorted(parts.codebooks.items()):
        at = last[place]
        what = f"{path}: the codebook at {place!r} of layer {layer}"
        n_groups = groups[at] * (3 if place == "qkv" else 1)
        width = _width(place, hf_config, layout, parts, layer)
        expected = (n_groups, config.num_codes[at], width // n_groups)
        if width % n_groups or tuple(found["codes"].shape) != expected:
            raise CheckpointError(
                f"{what} has codes {tuple(found['codes'].shape)}, config.json and the base say {expected} (group, code, d_group). Give the "
                "base and the config.json that belong to the file."
            )
        if not allow_nonfinite and not all(bool(torch.isfinite(value).all()) for value in found.values()):
            raise CheckpointError(f"{what} holds NaN or Inf. The run that wrote it diverged; allow_nonfinite=True loads it anyway.")
        settings = dataclasses.replace(CodebookConfig.paper(config.num_codes[at]), similarity=config.similarity_metric)  # type: ignore[arg-type]
        try:
            settings = dataclasses.replace(settings, k=config.k_codebook[at])
        except ConfigError as error:
            raise CheckpointError(f"{folder / 'config.json'}: {error}") from error
        for site, part in _by_site(place, found, layout, n_heads).items():
            books[hook_name(layer, site)] = _book(part, settings)
    if parts.idle:
        warnings.warn(
            f"{path} holds {len(parts.idle)} codebooks that never run in the original, because another codebook was put around their "
            f"modules first: {', '.join(parts.idle)}. They are left out, so the model computes what the original computes.",
            CheckpointWarning,
            stacklevel=3,
        )
    if tokenizer is None:
        places = [place for place in (folder, base) if isinstance(place, str | Path)]
        found_there = (read_tokenizer(place, folder, int(hf_config.vocab_size), required=False) for place in places)
        tokenizer = next((one for one in found_there if one is not None), None)
    return OriginalModel(config, hf_model, tokenizer, books, tuple(parts.idle))


def _local(checkpoint: Any) -> Path:
    if not isinstance(checkpoint, str | Path):
        raise CheckpointError(
            f"the checkpoint is a {type(checkpoint).__name__}. Give the folder that save_pretrained wrote, or a hub name."
        )
    folder = files.as_path(checkpoint)
    try:
        if folder.is_dir():
            return folder
        there = folder.exists()
    except OSError as error:  # a name longer than a file system has
        raise CheckpointError(f"{str(checkpoint)[:80]!r} is no name of a folder ({error}).") from error
    if there or is_local(checkpoint):
        raise CheckpointError(f"{checkpoint} is {'a file' if there else 'not there'}. Give the folder that save_pretrained wrote.")
    from huggingface_hub import snapshot_download

    try:
        wanted = ["config.json", "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "*.bin.index.json", "tokenizer*"]
        return Path(snapshot_download(str(checkpoint), allow_patterns=[*wanted, "vocab*", "merges.txt", "special_tokens_map.json"]))
    except Exception as error:
        raise CheckpointError(f"{str(checkpoint)!r} is no folder here, and the hub did not give it ({error}).") from error


def _config_of(base: Any) -> Any:
    """Return the configuration of the base: of a type that codebook-features wraps, its sizes whole numbers."""
    if not isinstance(base, str | Path):
        config = getattr(base, "config", base)
        if not hasattr(config, "model_type"):
            raise CheckpointError(f"the base is a {type(base).__name__}. Give a Hugging Face model, its folder, or its hub name.")
        config = copy.deepcopy(config)
    else:
        config = _read_base(base)
    if config.model_type not in _WRAPPED:
        whose = base if isinstance(base, str | Path) else f"a {type(base).__name__}"
        raise CheckpointError(
            f"the base, {whose}, is of type {config.model_type!r}, and codebook-features wraps {', '.join(_WRAPPED)}. Give the model that "
            "was wrapped."
        )
    for name in ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size"):
        value = getattr(config, name, None)
        if not isinstance(value, int) or value < 1:
            raise CheckpointError(f"the base says {name}={value!r}. Give the model that was wrapped, with the config.json it had.")
    return config


def _read_base(base: str | Path) -> Any:
    from transformers import AutoConfig

    folder = Path(base).expanduser()
    local = is_local(base)
    if local and not (folder / "config.json").is_file():
        raise CheckpointError(f"the base {base} holds no config.json. Give a folder written by save_pretrained, or a hub name.")
    if local and files.read_json(folder / "config.json", again="Copy it again.").get("model_type") == "codebook":
        raise CheckpointError(f"the base {base} is a checkpoint of codebook-features itself. Give the model that it wrapped.")
    try:
        return AutoConfig.from_pretrained(str(folder if local else base), local_files_only=local, trust_remote_code=False)
    except Exception as error:  # what a wrong value raises is not one class
        raise CheckpointError(
            f"the base {base}: no configuration could be loaded from it ({first_line(error)}). Correct its config.json."
        ) from error


def _model_of(config: Any, parts: Parts, path: Path) -> Any:
    """Return the base model with the weights of the checkpoint; nothing missing, nothing left over."""
    from transformers import AutoModelForCausalLM

    weights = dict(parts.base)
    dtype = torch.float32
    for i, (name, value) in enumerate(weights.items()):
        check_dtype(value, f"{path}: {name!r}")
        dtype = torch.promote_types(dtype, value.dtype) if i else value.dtype
    try:
        model = unfilled_model(config, dtype)  # a wrong base might ask for any amount of memory
    except Exception as error:
        raise CheckpointError(
            f"the base: no model can be built from its configuration ({first_line(error)}). Give the base that was wrapped."
        ) from error
    own = dict(model.named_parameters(remove_duplicate=False))
    if "embed_out.weight" in weights and "embed_out.weight" not in own:  # GPT-NeoX: transformers 5 calls it lm_head
        weights["lm_head.weight"] = weights.pop("embed_out.weight")
    shared = model.get_input_embeddings().weight
    if shared is model.get_output_embeddings().weight and (head := weights.pop("lm_head.weight", None)) is not None:
        embedding = next(name for name, value in own.items() if value is shared)
        kept = weights.setdefault(embedding, head)
        if kept is not head and not torch.equal(kept, head):
            raise CheckpointError(
                f"{path}: its lm_head differs from its embedding, and the base ties them. Give a base with tie_word_embeddings=False."
            )
    needed = {name for name, _ in model.named_parameters()}
    if set(weights) != needed:
        missing, extra = sorted(needed - set(weights)), sorted(set(weights) - needed)
        raise CheckpointError(
            f"{path}: missing tensors {missing[:6]}, unexpected tensors {extra[:6]} ({len(missing)} and {len(extra)} in all) for a "
            f"{type(model).__name__}. Give the base that was wrapped, or copy the file again."
        )
    for name in sorted(needed):
        if weights[name].shape != own[name].shape:
            raise CheckpointError(
                f"{path}: {name!r} has shape {tuple(weights[name].shape)}, the base has {tuple(own[name].shape)}. Give the base that was "
                "wrapped."
            )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype)
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    _check_rotary(model, parts.rotary, path)
    return model.eval()


def _check_rotary(model: Any, rotary: Mapping[str, Tensor], path: Path) -> None:
    """Compare the saved rotary frequencies with those of the base: the only trace of a wrong base that its weights fit."""
    here = next((value for name, value in model.named_buffers() if name.endswith("rotary_emb.inv_freq")), None)
    for name, saved in rotary.items():
        if here is not None and (saved.shape != here.shape or not torch.allclose(saved.float(), here.float(), rtol=1e-2)):
            raise CheckpointError(
                f"{path}: {name!r} is {saved.flatten()[:3].tolist()} ..., the base has {here.flatten()[:3].tolist()} ...: another rotary "
                "base or rotary_pct. Give the base that was wrapped."
            )


def _check_places(config: OriginalConfig, layers: tuple[int, ...], parts: Parts, path: Path) -> None:
    unknown = [place for place in config.codebook_at if place not in PLACES]
    if unknown:
        warnings.warn(
            f"config.json beside {path} puts codebooks at {', '.join(map(repr, unknown))}, which the original does not know and skips, as "
            f"is done here. It knows {', '.join(PLACES)}.",
            CheckpointWarning,
            stacklevel=4,
        )
    expected = {(layer, place) for place in config.codebook_at if place in PLACES for layer in layers}
    extra = sorted(set(parts.codebooks) - expected)
    idle = {(layer, place) for layer, places in parts.idle.values() for place in places}
    missing = []
    for layer, place in sorted(expected - set(parts.codebooks) - idle):
        later = config.codebook_at[config.codebook_at.index(place) + 1 :]
        if not any(place in _REPLACED_BY.get(other, ()) for other in later):
            missing.append((layer, place))
    if extra or missing:
        raise CheckpointError(
            f"{path}: config.json puts codebooks at {', '.join(config.codebook_at)} in layers {list(layers)}; missing (layer, place) "
            f"{missing[:4]}, unexpected {extra[:4]}. Copy both files again."
        )


def _width(place: str, hf_config: Any, layout: Layout, parts: Parts, layer: int) -> int:
    d_model = int(hf_config.hidden_size)
    if place != "mlp_mid":
        return d_model * (3 if place == "qkv" else 1)
    rows, columns = parts.base[f"{layout.block(layer)}.{layout.mlp}.{layout.mlp_out}.weight"].shape
    return int(rows * columns // d_model)


def _by_site(place: str, found: dict[str, Tensor], layout: Layout, n_heads: int) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each of our sites.

    The original's qkv is one codebook over the fused projection. Here it is one at each of q, k and v, unless its groups span several.
    """
    sites = PLACES[place]
    if place != "qkv":
        return {sites[0]: found}
    n_groups = found["codes"].shape[0] // 3
    if layout.fused == "qkv head d_head":
        index = torch.arange(3 * n_groups).reshape(3, n_groups)
    elif n_groups % n_heads == 0:  # head qkv d_head: every group lies within the q, k or v of one head
        index = torch.arange(3 * n_groups).reshape(n_heads, 3, -1).transpose(0, 1).reshape(3, n_groups)
    else:
        return {"qkv": found}
    return {site: {name: tensor[rows] for name, tensor in found.items()} for site, rows in zip(sites, index, strict=True)}


def _book(tensors: Mapping[str, Tensor], settings: CodebookConfig) -> Codebook:
    n_groups, _, d_group = tensors["codes"].shape
    with torch.random.fork_rng(devices=[]):
        book = Codebook(n_groups * d_group, settings.with_groups(n_groups))
    book = book.to(tensors["codes"].dtype)
    book.load_state_dict(dict(tensors))
    return book.eval()
