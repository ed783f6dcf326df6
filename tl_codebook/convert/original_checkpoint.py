"""Read the folders that codebook-features 0.1.2 writes (``save_pretrained``), without any of its classes.

The original wraps modules of the base model, so that its tensors are called ``h.0.mlp.module_layer.c_fc.weight`` and
``h.0.mlp.codebook_layer.codebook.weight``. Which codebooks run follows from that tree alone: a codebook that was put on a module which
another wrapper had already hidden is in the file, and never runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tl_codebook import files
from tl_codebook.convert.layouts import Layout
from tl_codebook.convert.original_config import OriginalConfig
from tl_codebook.errors import CheckpointError, ConfigError

__all__ = ["Parts", "check_dtype", "read_config", "read_weights", "split_weights"]

_HUGGING_FACE = frozenset(
    {
        "add_cross_attention",
        "architectures",
        "bad_words_ids",
        "begin_suppress_tokens",
        "bos_token_id",
        "chunk_size_feed_forward",
        "cross_attention_hidden_size",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "dtype",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "eos_token_id",
        "exponential_decay_length_penalty",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "id2label",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "length_penalty",
        "max_length",
        "min_length",
        "model_type",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "pad_token_id",
        "prefix",
        "problem_type",
        "pruned_heads",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict",
        "return_dict_in_generate",
        "sep_token_id",
        "suppress_tokens",
        "task_specific_params",
        "temperature",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tie_word_embeddings",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "typical_p",
        "use_bfloat16",
        "vocab_size",
    }
)
"""What Hugging Face's ``PretrainedConfig`` writes beside the original's own keys (transformers 4 and 5)."""

_BUFFERS = re.compile(r"\.attention\.(bias|masked_bias)$|\.attn\.(bias|masked_bias)$|\.rotary_emb\.\w+$")
"""Masks and rotary tables: older releases of transformers saved them, and they follow from the configuration."""

Tree = dict[str, Any]


def read_config(folder: Path) -> OriginalConfig:
    """Read ``config.json``, strictly.

    Raises:
        CheckpointError: it is missing or damaged, is not one of codebook-features, asks for code, or says what cannot be.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no config.json. Give a folder that codebook-features wrote with save_pretrained.")
    given = files.read_json(path, again="Copy it again.")
    code = [key for key in given if key in ("auto_map", "trust_remote_code", "custom_pipelines") or key.endswith("class")]
    code = [key for key in code if key != "tokenizer_class"]
    if code:
        raise CheckpointError(
            f"{path}: the key {code[0]!r} asks for code, and none is run from a checkpoint. Take it out if you trust the rest."
        )
    if given.get("model_type") != "codebook":
        raise CheckpointError(
            f"{path} is of model_type {given.get('model_type')!r}, not 'codebook': codebook-features did not write it. Load a plain "
            "Hugging Face model with load_hf, and one saved by this package with load."
        )
    own = {"replace_codes", *OriginalConfig.__dataclass_fields__}
    unknown = sorted(key for key in given if key not in own and key not in _HUGGING_FACE and not key.startswith("_"))
    if unknown:
        raise CheckpointError(f"{path}: unknown keys {unknown}. Known ones: {sorted(own)}. Take the others out, or copy the file again.")
    try:
        return OriginalConfig.from_dict(given)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def read_weights(folder: Path) -> tuple[dict[str, Tensor], Path]:
    """Read all tensors of a folder, in one file or in shards; of a ``pytorch_model.bin`` nothing is run (``weights_only=True``).

    Returns:
        The tensors by name, and the file that they (or the list of shards) are in.
    """
    for name in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"):
        path = folder / name
        if not path.exists():
            continue
        if path.suffix != ".json":
            return _read_file(files.resolve(folder, name)), path
        shards = files.read_json(path, again="Copy it again.").get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise CheckpointError(f"{path} has no weight_map. Copy it again.")
        tensors: dict[str, Tensor] = {}
        for shard in sorted(set(map(str, shards.values()))):
            tensors |= _read_file(files.resolve(folder, shard))
        if set(tensors) != set(shards):
            raise CheckpointError(f"{path}: its shards lack {sorted(set(shards) - set(tensors))[:5]}. Copy them again.")
        return tensors, path
    raise CheckpointError(
        f"{folder} holds no model.safetensors and no pytorch_model.bin. Copy the whole folder that save_pretrained wrote."
    )


def _read_file(path: Path) -> dict[str, Tensor]:
    size = path.stat().st_size
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                tensors: Any = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise CheckpointError(f"{path} ({size} bytes) is incomplete or damaged ({error}). Copy it again.") from error
    except Exception as error:  # what a damaged or hostile pickle raises is not one class
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it names {named[1]}" if named else type(error).__name__  # torch's own advice is how to run it all the same
        raise CheckpointError(
            f"{path} ({size} bytes) is no file of tensors alone: it is damaged, or holds objects that could run code ({reason}). Nothing "
            "of it was run. Copy it again, or have its owner save it with safe_serialization=True."
        ) from error
    if not isinstance(tensors, Mapping) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in tensors.items()):
        raise CheckpointError(f"{path} is no table of tensors by name. Copy it again.")
    return dict(tensors)


@dataclass(frozen=True)
class Parts:
    """A checkpoint taken apart."""

    base: dict[str, Tensor]
    """The tensors of the base model, by their Hugging Face names."""
    codebooks: dict[tuple[int, str], dict[str, Tensor]]
    """Layer and place -> ``codes`` [group code d_group], ``norm_weight`` and ``norm_bias`` [group d_group]."""
    idle: dict[str, tuple[int, tuple[str, ...]]]
    """Codebooks that are in the file and never run, because a wrapper put on earlier hides the module that they were put on: the name of
    each -> its layer, and the places that it may have been meant for."""
    rotary: dict[str, Tensor]
    """Saved tables of rotary frequencies, by name."""


def split_weights(tensors: Mapping[str, Tensor], layout: Layout, n_layers: int, path: Path) -> Parts:
    """Separate the base model from the codebooks, and the codebooks that run from those that do not.

    Raises:
        CheckpointError: tensors whose names fit neither, two codebooks at one place, or a codebook with a part missing.
    """
    blocks = re.compile(rf"{re.escape(layout.blocks)}\.(\d+)\.(.+)")
    trees: dict[int, Tree] = {layer: {} for layer in range(n_layers)}
    base: dict[str, Tensor] = {}
    rotary: dict[str, Tensor] = {}
    foreign = sorted(name for name in tensors if not name.startswith("model."))
    if foreign:
        raise CheckpointError(f"{path}: {foreign[:3]} do not start with 'model.', as the tensors of codebook-features do. Copy it again.")
    for full, tensor in tensors.items():
        name = full.removeprefix("model.")
        match = blocks.fullmatch(name)
        if _BUFFERS.search(name) and "codebook_layer" not in name:
            if name.endswith("inv_freq"):
                rotary[name.replace("module_layer.", "")] = tensor
        elif match is None:
            base[name] = tensor
        elif int(match[1]) >= n_layers:
            raise CheckpointError(
                f"{path}: {full!r} belongs to layer {match[1]}, the base has {n_layers} layers. Give the base it was trained on."
            )
        else:
            _put(trees[int(match[1])], match[2].split("."), tensor, f"{path}: {full!r}")
    books: dict[tuple[int, str], dict[str, Tensor]] = {}
    idle: dict[str, tuple[int, tuple[str, ...]]] = {}
    for layer, tree in trees.items():
        running, rest = _open_block(tree, layout)
        for place, found in running.items():
            if len(found) > 1:
                raise CheckpointError(
                    f"{path}: layer {layer} has {len(found)} codebooks at {place!r}, one on top of the other. No site holds two."
                )
            books[layer, place] = _stack(found[0], f"{path}: the codebook at {place!r} of layer {layer}")
        for inner, tensor in _leaves(rest):
            if "codebook_layer" in inner:
                module = inner.partition("codebook_layer")[0]
                idle[f"{layout.block(layer)}.{module}codebook_layer"] = layer, _meant_for(module, layout)
            else:  # what an idle wrapper holds is the very tensor that the running module has: one of the two names was saved
                base.setdefault(f"{layout.block(layer)}.{inner.replace('module_layer.', '')}", tensor)
    return Parts(base, books, idle, rotary)


def _meant_for(module: str, layout: Layout) -> tuple[str, ...]:
    """Return the places that the codebook of a module, named by its path in the block, may have been meant for."""
    places = {
        "": ("transformer_block", "attn_plus_mlp"),
        layout.attn: ("attn", "attn_preproj"),
        f"{layout.attn}.{layout.qkv[0]}": ("qkv",),
        layout.mlp: ("mlp",),
        f"{layout.mlp}.act": ("mlp_mid",),
    }
    return places.get(module.replace("module_layer.", "").rstrip("."), ())


def check_dtype(tensor: Tensor, what: str) -> None:
    """Raise `CheckpointError` for a tensor that holds no plain floating-point numbers."""
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise CheckpointError(f"{what} is {tensor.dtype}. Floating-point weights (32, 16 or 64 bits) were expected: copy the file again.")


def _put(tree: Tree, steps: list[str], tensor: Tensor, what: str) -> None:
    for step in steps[:-1]:
        tree = tree.setdefault(step, {})
        if not isinstance(tree, dict):
            raise CheckpointError(f"{what} lies under {step!r}, which is a tensor itself. Copy the file again.")
    if steps[-1] in tree:
        raise CheckpointError(f"{what} is a tensor, and other tensors lie under its name. Copy the file again.")
    tree[steps[-1]] = tensor


def _child(node: Tree, name: str) -> Tree:
    child = node.get(name)
    return child if isinstance(child, dict) else {}


def _unwrap(node: Tree) -> tuple[Tree, list[Any]]:
    """Return the module inside the wrappers, and their codebooks, the innermost (which runs first) first; both leave the tree."""
    met: list[Any] = []
    while isinstance(node.get("module_layer"), dict):
        if "codebook_layer" in node:
            met.insert(0, node.pop("codebook_layer"))
        node = node["module_layer"]
    return node, met


def _open_block(tree: Tree, layout: Layout) -> tuple[dict[str, list[Any]], Tree]:
    """Take the codebooks that run out of the tree of a block, by place; return them and what is left."""
    found: dict[str, list[Any]] = {}
    block, found["transformer_block"] = _unwrap(tree)
    found["attn_plus_mlp"] = [block.pop("codebook_layer")] if "codebook_layer" in block else []
    attn, found["attn"] = block, []
    for step in layout.attn.split("."):
        attn, found["attn"] = _unwrap(_child(attn, step))
    found["attn_preproj"] = [attn.pop("codebook_layer")] if "codebook_layer" in attn else []
    if layout.fused is not None:
        _, found["qkv"] = _unwrap(_child(attn, layout.qkv[0]))
    mlp, found["mlp"] = _unwrap(_child(block, layout.mlp))
    act, found["mlp_mid"] = _unwrap(_child(mlp, "act"))
    if "codebook_layer" in act:  # the activation has no tensors, so the innermost wrapper has nothing called module_layer
        found["mlp_mid"].insert(0, act.pop("codebook_layer"))
    return {place: books for place, books in found.items() if books}, tree


def _leaves(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    # Running modules first: they come before idle wrappers of the same tensor.
    for name in sorted(tree, key=lambda step: step != "module_layer"):
        value = tree[name]
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _stack(book: Any, what: str) -> dict[str, Tensor]:
    """Return the tensors of one codebook, the groups of a grouped one stacked."""
    if not isinstance(book, dict):
        raise CheckpointError(f"{what} is a tensor itself. Copy it again.")
    inner = _child(book, "codebook")
    plain = "ln" in book or not inner
    groups = [book] if plain else [inner.get(str(i)) for i in range(len(inner))]
    flat = [dict(_leaves(group)) if isinstance(group, dict) else {} for group in groups]
    names = {"codes": "codebook.weight", "norm_weight": "ln.weight", "norm_bias": "ln.bias"}
    for i, group in enumerate(flat):
        if set(group) != set(names.values()):
            missing, extra = sorted(set(names.values()) - set(group)), sorted(set(group) - set(names.values()))
            raise CheckpointError(f"{what}, group {i}: missing tensors {missing}, unexpected tensors {extra}. Copy it again.")
    if not flat or len({tuple((n, tuple(g[n].shape)) for n in names.values()) for g in flat}) != 1:
        raise CheckpointError(f"{what} has groups of different shapes. Copy it again.")
    tensors = {ours: torch.stack([group[theirs] for group in flat]) for ours, theirs in names.items()}
    _, _, d_group = tensors["codes"].shape if tensors["codes"].ndim == 3 else (0, 0, -1)
    if tensors["norm_weight"].shape[1:] != (d_group,) or tensors["norm_bias"].shape[1:] != (d_group,):
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise CheckpointError(f"{what} has tensors that do not fit each other: {shapes}. Copy it again.")
    for name, tensor in tensors.items():
        check_dtype(tensor, f"{what}: {names[name]}")
    return tensors
