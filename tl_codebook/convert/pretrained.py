"""Read Hugging Face models and tokenizers: nothing in them is executed or unpickled, and no weight or vocabulary is made up.

transformers only logs a warning where tensors are missing, unknown or of another shape, and initialises them at random; here these are
errors. So are weights that would have to be unpickled, code that a file asks for, and models that are no causal language models.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from tl_codebook.codebook import Codebook
from tl_codebook.errors import CheckpointError, ConfigError, nearest

__all__ = ["check_causal", "check_object", "first_line", "is_local", "read_model", "read_tokenizer", "unfilled_model"]

_VOCABULARY_FILES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "tiktoken.model", "tekken.json"),
)
_AGAIN = "Save the model again with save_pretrained"


def read_model(source: str | Path) -> Any:
    """Load a causal language model from a local folder, or from the hub or its cache, in evaluation mode and with eager attention.

    Raises:
        CheckpointError: no such folder, no readable config.json, a request for code, weights that are pickled, damaged, missing, unknown or
            of another shape, or no causal language model.
    """
    from transformers import AutoModelForCausalLM

    local = is_local(source)
    if local:
        source = Path(source).expanduser()
        _check_folder(source)
    factory: Any = AutoModelForCausalLM
    try:
        model, report = factory.from_pretrained(
            str(source),
            local_files_only=local,
            attn_implementation="eager",
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are in the report, by name
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{source}: no causal language model could be loaded from it ({first_line(error)}). {_AGAIN}, or correct its config.json."
        ) from error
    except Exception as error:  # safetensors raises a class of its own
        if type(error).__module__.startswith("safetensors"):
            raise CheckpointError(f"{source}: its safetensors file is incomplete or damaged ({error}). Copy it again.") from error
        raise
    _check_report(source, report)
    return model


def _check_dtypes(path: Path) -> None:
    """Refuse weights that are no plain floating-point numbers: transformers would cast them without a word."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            dtypes = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path}: its safetensors file is incomplete or damaged ({error}). Copy it again.") from error
    for key, dtype in dtypes.items():
        if dtype not in ("F32", "F16", "BF16", "F64") and not key.endswith(("attn.bias", "attention.bias", "masked_bias")):  # old masks
            raise CheckpointError(
                f"{path}: {key!r} is {dtype}. Floating-point weights (32, 16 or 64 bits) were expected: dequantise the model, or copy the "
                "file again."
            )


def is_local(source: str | Path) -> bool:
    """Tell a path (there or not) from the name of a model on the hub."""
    text = str(source)
    return isinstance(source, Path) or Path(text).expanduser().exists() or text.startswith((".", "~", os.sep)) or text.count("/") > 1


def check_object(model: Any) -> None:
    """Raise `ConfigError` for what is no Hugging Face model, and `CheckpointError` for one that is no causal language model in memory."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        advice = " Merge the adapter first: model.merge_and_unload()." if hasattr(model, "merge_and_unload") else ""
        raise ConfigError(
            f"model={type(model).__name__} was given, which is no Hugging Face model. Give a folder written by save_pretrained, a hub "
            f"name, or a causal language model (AutoModelForCausalLM).{advice}"
        )
    if any(isinstance(module, Codebook) for module in model.modules()):
        raise CheckpointError(
            f"this {type(model).__name__} holds codebooks from attach_hf, which a host would not have. Call remove() on what attach_hf "
            "returned, load the model, then attach() its codebooks to the host."
        )
    known = [base.__name__ for base in type(model).__mro__ if base.__module__.startswith("transformers.models.")]
    check_causal("the model that was given", model.config, known[:1] or [type(model).__name__])
    elsewhere = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if elsewhere is not None:
        raise CheckpointError(
            f"{type(model).__name__}: {elsewhere} is on the meta device, so its values are not here. Load the model without offloading."
        )


def check_causal(source: Any, config: Any, architectures: Iterable[str]) -> None:
    """Raise `CheckpointError` for an encoder-decoder, a classifier, a headless model, or anything else that predicts no next token."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    if getattr(config, "is_encoder_decoder", False):
        raise CheckpointError(
            f"{source} is an encoder-decoder (model_type {config.model_type!r}). load_hf takes causal language models only."
        )
    for name in architectures:  # names that transformers does not know are the user's own classes: their tensors are checked
        if name not in CAUSAL.values() and hasattr(transformers, name):
            expected = CAUSAL.get(config.model_type)
            advice = f"Give a {expected}." if expected else "Choose a model with a language model head."
            raise CheckpointError(f"{source} is a {name}, which is no causal language model. {advice}")


def _check_folder(folder: Path) -> None:
    config = _read_config(folder)
    if "auto_map" in config:
        raise CheckpointError(
            f"{folder}/config.json: auto_map asks for the code {_some(_code_of(config['auto_map']))}, and no code of a model is ever run. "
            "Load the model yourself with trust_remote_code=True if you trust it, and give the object; or delete auto_map if the "
            "architecture is one of transformers' own."
        )
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{folder}/adapter_config.json: this is an adapter, and its base would be fetched from elsewhere. Merge it into the base "
            "(merge_and_unload) and save the result."
        )
    _check_type(folder, config)
    _check_weights(folder)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file. Give the folder that it lies in.")
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder. Give a folder written by save_pretrained, or a hub name.")
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no config.json. Give a folder written by save_pretrained, or a hub name.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}). {_AGAIN}.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds a {type(config).__name__}, not an object. {_AGAIN}.")
    return config


def _code_of(auto_map: Any) -> list[str]:
    return [str(value) for value in auto_map.values()] if isinstance(auto_map, dict) else [str(auto_map)]


def _check_type(folder: Path, config: dict[str, Any]) -> None:
    from transformers import CONFIG_MAPPING, AutoConfig, __version__

    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise CheckpointError(
            f"{folder}/config.json: model_type is {kind!r}, which transformers {__version__} does not know. "
            f"{nearest(str(kind), CONFIG_MAPPING)}Correct it, or install the version that the model was saved with."
        )
    try:
        parsed = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers validates fields with classes of its own
        raise CheckpointError(f"{folder}/config.json does not describe a {kind} model ({first_line(error)}). Correct it.") from error
    check_causal(folder, parsed, [name for name in config.get("architectures") or [] if isinstance(name, str)])


def _check_weights(folder: Path) -> None:
    """Accept model.safetensors, or its index with every shard beside it."""
    if (folder / "model.safetensors").is_file():
        _check_dtypes(folder / "model.safetensors")
        return
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl") for path in folder.glob(pattern))
        if pickled:
            raise CheckpointError(
                f"{folder} holds its weights only in {_some(pickled)}, and pickled files are never opened: they can run code. Where you "
                "trust them, load them with transformers and save the model with save_pretrained(folder, safe_serialization=True)."
            )
        raise CheckpointError(f"{folder} holds no model.safetensors. {_AGAIN}(folder, safe_serialization=True).")
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: weight_map cannot be read ({first_line(error)}). {_AGAIN}.") from error
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{index}: weight_map names {shard!r}, which is no safetensors file of this folder. {_AGAIN}.")
        if not (folder / shard).is_file():
            raise CheckpointError(f"{index}: weight_map names {shard}, which is not there. The copy is incomplete: copy it again.")
        _check_dtypes(folder / shard)


def _check_report(source: Any, report: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` with the keys of tensors that transformers would have initialised at random or left out."""
    faults = {
        "missing": sorted(report.get("missing_keys", ())),
        "unknown": sorted(report.get("unexpected_keys", ())),
        "of another shape": [f"{key} {tuple(got)}, not {tuple(want)}" for key, got, want in sorted(report.get("mismatched_keys", ()))],
    }
    said = [f"{len(keys)} {fault}: {_some(keys)}" for fault, keys in faults.items() if keys]
    if report.get("error_msgs"):
        said.append(f"not read: {_some(map(str, report['error_msgs']))}")
    if said:
        raise CheckpointError(
            f"{source}: its tensors are not those that its config.json describes ({'; '.join(said)}). transformers would make them up; "
            f"{_AGAIN[0].lower() + _AGAIN[1:]}, or correct config.json."
        )


def read_tokenizer(source: Any, scratch: Path, vocabulary: int, *, required: bool) -> Any:
    """Load a tokenizer, or return None where a model has none; an object goes through the folder `scratch`, and stays as it is.

    TransformerLens loads a tokenizer again from where it came from, so one in memory needs a folder that outlives the loading.
    A tokenizer with tokens beyond the vocabulary of the model gets a warning.

    Raises:
        CheckpointError: no tokenizer where one was asked for, or a damaged one.
        ConfigError: an object that is no Hugging Face tokenizer.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    if source is None:
        return None
    if isinstance(source, str | Path):
        local = is_local(source)
        folder = Path(source).expanduser() if local else source
        if isinstance(folder, Path) and not any((folder / name).exists() for name in _VOCABULARY_FILES):
            if required:
                raise CheckpointError(
                    f"{folder} holds no tokenizer ({' or '.join(_VOCABULARY_FILES[:3])}). Save one there, or give another."
                )
            return None  # transformers would make up an empty one
    elif isinstance(source, PreTrainedTokenizerBase):
        local, folder = True, scratch
        source.save_pretrained(scratch)
    else:
        raise ConfigError(
            f"tokenizer={type(source).__name__} was given. It is no Hugging Face tokenizer; wrap it in "
            "PreTrainedTokenizerFast(tokenizer_object=...), or give the folder of one."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=local, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exception for a file that it cannot parse
        if not (local or required) and isinstance(error, OSError):
            return None  # a name on the hub without tokenizer files
        raise CheckpointError(
            f"{folder}: its tokenizer could not be loaded ({first_line(error)}). Save it again, or give another."
        ) from error
    if not local and set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # made up: the hub has no files of one
        if required:
            raise CheckpointError(f"{folder} has no tokenizer on the hub. Give another.")
        return None
    _check_vocabulary(tokenizer, "the tokenizer that was given" if required else f"the tokenizer of {folder}", vocabulary)
    return tokenizer


def _check_vocabulary(tokenizer: Any, whose: str, vocabulary: int) -> None:
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", -1))
    if largest >= vocabulary:  # a token that was added for padding, say: all is well as long as no text holds it
        warnings.warn(
            f"{whose} goes up to token {largest} ({token!r}), the vocabulary of the model only to {vocabulary - 1}: text with a token "
            "beyond it cannot be run. Give the tokenizer that the model was trained with, or call "
            f"resize_token_embeddings({largest + 1}) on the model first.",
            stacklevel=5,  # the line that calls load_hf
        )


def first_line(error: BaseException) -> str:
    """Return what an error says in its first line, or its kind where it says nothing; for messages that quote it."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def unfilled_model(config: Any, dtype: torch.dtype) -> Any:
    """Return the causal language model of a configuration without memory for its weights: its names and shapes."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def _some(names: Iterable[str], most: int = 6) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
