"""The way back: a host as an ordinary Hugging Face folder, with its codes beside the weights.

The folder is built and proven under another name and then takes its place in one step, so a process killed at any moment leaves what was
there before, or the new folder, complete.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tl_codebook import files, hosts
from tl_codebook.attachment import sites
from tl_codebook.checkpoint import FORMAT_VERSION, MANIFEST, Codebooks
from tl_codebook.convert.back_to_hf import hf_model_of
from tl_codebook.convert.inside import refuse_sites
from tl_codebook.convert.pretrained import read_model
from tl_codebook.convert.proof import Agreement, compare_with_hf
from tl_codebook.errors import CheckpointError, CheckpointExistsError

__all__ = ["export_hf"]

_MARKER = "tl_codebook_export.json"
"""A file of every export: only a folder that holds it is ever replaced."""
_EXPORTED = re.compile(
    r"(generation_)?config\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|tl_codebook(_export)?\.json|"
    r"codes\.[0-9a-f]+\.safetensors|tokenizer.*\.(json|model)|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt|"
    r"chat_template\.(jinja|json)"
)
"""Names of files that an export may have written: with others beside them, a folder is not replaced."""


def export_hf(model: Any, folder: str | Path, *, overwrite: bool = False) -> Agreement:
    """Write the base as an ordinary Hugging Face folder with the tokenizer and the codes beside it, proven before it is put there.

    ``AutoModelForCausalLM.from_pretrained(folder)`` reads the base, ``Codebooks.from_pretrained(folder)`` the codes, and
    ``attach_hf(hf_model, folder)`` brings both together without TransformerLens. The folder is loaded again and compared with the host,
    with codebooks and without; what differs is not written. Returns how far the two agree.

    Args:
        model: A host with or without codebooks: gpt2, gpt_neox, gpt_neo, llama, mistral or qwen2, its weights not processed.
        folder: Where to; it must be empty or new unless `overwrite`.
        overwrite: Replace an earlier export. A folder that no export wrote, or that holds other things too, is never replaced.

    Raises:
        CheckpointExistsError: the folder is not empty, or holds what no export wrote, or the process works in it.
        CheckpointError: processed weights, weights that Hugging Face has no place for (named), logits that differ, a full disk.
        UnknownHookError: a codebook where no hook of Hugging Face reaches (resid_mid).
        ConfigError: an architecture that is not in the table.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from tl_codebook import attach, load_hf
    >>> model = load_hf(GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=48, n_embd=32, n_layer=2, n_head=4)))
    >>> _ = attach(model, "mlp_out", n_codes=16, k=2)
    >>> export_hf(model, tmp_path / "exported").ids
    1.0
    >>> sorted(path.name.partition(".")[0] for path in (tmp_path / "exported").iterdir())
    ['codes', 'config', 'generation_config', 'model', 'tl_codebook', 'tl_codebook_export']
    """
    model = hosts.as_host(model)
    refuse_sites(sites(model))
    shifted = [name for name, point in sites(model).items() if point.offset is not None]
    if shifted:
        raise CheckpointError(
            f"the codes at {shifted[0]!r} were trained on weights processed otherwise than this model's, and an offset holds them in "
            "place, which a Hugging Face folder has no room for. Attach them to the model that they were trained on, and export that."
        )
    target = _replaceable(files.as_path(folder), overwrite=overwrite)
    hf_model = hf_model_of(model)
    if hosts.is_bridge(model) and getattr(model.original_model, "generation_config", None) is not None:
        hf_model.generation_config = copy.deepcopy(model.original_model.generation_config)
    staging = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with files.made(target.parent), _removed(staging):
            _remove_stale(target)
            _write(model, hf_model, staging)
            del hf_model
            agreement = _prove(model, staging)
            _sync(staging)
            _put_in_place(staging, target)
            return agreement
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{target} could not be written ({error.strerror or error}). What was there before is untouched; free space or choose another "
            "folder."
        ) from error


def _replaceable(folder: Path, *, overwrite: bool) -> Path:
    """Refuse a target before any work is done for it; return where it is in truth (a link to a folder stays a link)."""
    try:
        return _checked(folder, overwrite=overwrite)
    except CheckpointError:
        raise
    except (OSError, RuntimeError) as error:  # a loop of links, a name too long, a working directory that was removed
        raise CheckpointError(f"{folder} cannot be written to ({error}). Choose another folder; nothing was written.") from error


def _checked(folder: Path, *, overwrite: bool) -> Path:
    target = folder.resolve()
    if _here().is_relative_to(target):
        raise CheckpointExistsError(
            f"{folder} is the folder that this process works in, or above it, and replacing it would leave the process without one. Choose "
            "another folder, or change to another one first."
        )
    files.check_writable(target.parent, overwrite=True, create=False)
    if target.exists() and not target.is_dir():
        raise CheckpointExistsError(f"{folder} is a file. Choose another folder.")
    _recover(target)
    content = sorted(path.name for path in target.iterdir()) if target.is_dir() else []
    if content and not overwrite:
        raise CheckpointExistsError(f"{folder} exists and is not empty. Choose another folder, or say overwrite=True.")
    foreign = [name for name in content if not _EXPORTED.fullmatch(name)]
    if foreign:
        raise CheckpointExistsError(
            f"{folder} holds {', '.join(map(repr, foreign[:5]))}{' and others' if len(foreign) > 5 else ''}, which no export wrote and "
            "replacing the folder would delete. Choose another folder, or move them away."
        )
    if content and _MARKER not in content:
        raise CheckpointExistsError(
            f"{folder} is not empty and holds no {_MARKER}, so no export wrote it and replacing it would delete its model. Choose another "
            "folder."
        )
    return target


def _here() -> Path:
    with contextlib.suppress(FileNotFoundError):  # it was removed
        return Path.cwd()
    return Path()


def _write(model: Any, hf_model: Any, staging: Path) -> None:
    staging.mkdir()
    try:
        hf_model.save_pretrained(staging)
        tokenizer = getattr(model, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        if sites(model):
            Codebooks.of(model).save_pretrained(staging, overwrite=True)
        files.replace_json(staging / _MARKER, {"format": "tl_codebook_export", "format_version": FORMAT_VERSION})
    except (CheckpointError, OSError):
        raise
    except Exception as error:
        if type(error).__module__.startswith("safetensors"):
            raise CheckpointError(f"the weights could not be written ({error}). What was there before is untouched.") from error
        raise


def _prove(model: Any, staging: Path) -> Agreement:
    """Load what was written and compare it with the host."""
    hf_model = read_model(staging).to(hosts.home_device(model, "hook_embed"))
    return compare_with_hf(model, hf_model, staging if (staging / MANIFEST).is_file() else None)


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        if path.is_file() or os.name == "posix":  # only POSIX opens folders
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


@contextlib.contextmanager
def _removed(staging: Path) -> Iterator[None]:
    try:
        yield
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.tl_codebook-before")


def _recover(target: Path) -> None:
    """Bring back the export that a process killed in the middle of `_put_in_place` had set aside; nothing is removed."""
    if not target.exists() and (_aside(target) / _MARKER).is_file():
        os.rename(_aside(target), target)


def _remove_stale(target: Path) -> None:
    """Remove what killed processes left beside the folder: an export that has been replaced, and those that were never finished."""
    if _aside(target).is_dir():
        shutil.rmtree(_aside(target), ignore_errors=True)
    unfinished = re.compile(rf"\.{re.escape(target.name)}\.(\d+)-[0-9a-f]{{8}}\.tmp")
    for path in target.parent.iterdir():
        found = unfinished.fullmatch(path.name)
        if found and not path.is_symlink() and not _is_alive(int(found[1])):
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(process: int) -> bool:
    if os.name != "posix":  # where signal 0 is not a question
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        return True
    return True


def _put_in_place(staging: Path, target: Path) -> None:
    """Give the new folder the name of the old one, and remove the old one."""
    if not target.exists():
        os.rename(staging, target)
    elif _exchange(staging, target):
        shutil.rmtree(staging, ignore_errors=True)
    else:  # no exchange in one step here: between two renames the old folder has the name that `_recover` looks for
        os.rename(target, _aside(target))
        try:
            os.rename(staging, target)
        except BaseException:
            os.rename(_aside(target), target)
            raise
        shutil.rmtree(_aside(target), ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step, where the system can (Linux)."""
    if not sys.platform.startswith("linux"):
        return False
    with contextlib.suppress(AttributeError, OSError):
        rename = ctypes.CDLL(None, use_errno=True).renameat2
        here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        return bool(rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)
    return False
