"""Reading and writing files so that nothing is lost and nothing is believed.

Tensors go to safetensors files named after their content (``codes.3fa2b1c09d5e.safetensors``); a JSON manifest, replaced last and in one
step, says which of them count. A process killed in between leaves the previous checkpoint complete. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tl_codebook.errors import CheckpointError, CheckpointExistsError

__all__ = [
    "as_path",
    "check_writable",
    "made",
    "one_writer",
    "read_json",
    "read_tensors",
    "remove_stale",
    "replace_json",
    "replace_text",
    "resolve",
    "strict_json",
    "target_file",
    "write_folder",
    "write_tensors",
]

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")


def as_path(given: str | Path) -> Path:
    """Return a path with ``~`` expanded, refusing what no file can be called."""
    try:
        if "\0" in str(given):
            raise ValueError("it holds a NUL character")
        path = Path(given).expanduser()
        os.fsencode(path)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{str(given)[:200]!r} is no name of a file or folder ({error}). Choose another.") from error
    return path


def check_writable(folder: str | Path, *, overwrite: bool, create: bool = True) -> Path:
    """Prove that `folder` can be written to, before any work is done for it.

    It is created if need be, or with ``create=False`` the nearest folder above it that is there is tried, and nothing is left behind.
    """
    folder = Path(folder)
    try:
        if folder.is_dir() and any(folder.iterdir()) and not overwrite:
            raise CheckpointExistsError(f"{folder} exists and is not empty. Choose another folder, or say overwrite=True.")
        if create:
            with made(folder):
                _try(folder)
        else:
            _try(next(path for path in (folder, *folder.absolute().parents) if _is_there(path)))
    except CheckpointExistsError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name that no folder can have
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{folder} cannot be written to ({reason}). Choose another folder; nothing was written.") from error
    return folder


def target_file(path: str | Path, overwrite: bool) -> Path:
    """Return a file that may be written, before any work is done for it.

    Raises:
        CheckpointExistsError: the file exists, or a link of this name, wherever it leads; and `overwrite` was not said.
        CheckpointError: no file can be called so, a folder is, or its folder cannot be made or written to.

    >>> target_file(tmp_path / "codes.csv", overwrite=False).name
    'codes.csv'
    """
    target = as_path(path)
    try:
        there = _is_there(target)
    except OSError as error:
        raise CheckpointError(f"{str(target)[:200]!r} is no name of a file ({error.strerror}). Choose another.") from error
    if there and target.is_dir():
        raise CheckpointError(f"{target} is a folder. Give the name of a file.")
    if there and not overwrite:
        raise CheckpointExistsError(f"{target} exists. Choose another name, or say overwrite=True.")
    check_writable(target.parent, overwrite=True)
    return target


def _try(folder: Path) -> None:
    trial = folder / f".trial-{secrets.token_hex(4)}"
    trial.touch()
    trial.unlink()


def _is_there(path: Path) -> bool:
    """Say whether a file or folder or link has this name; unlike `Path.exists`, raise where no file can have it."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


@contextlib.contextmanager
def made(folder: Path) -> Iterator[None]:
    """Create a folder and those above it for what is done inside; where that fails, remove those that are still empty."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for path in new:
                path.rmdir()
        raise


def _atomically(target: Path, write: Callable[[Path], None]) -> None:
    # Of the name only a part, so that where the target's own name is short enough this one is too.
    temporary = target.with_name(f".{target.name[:40]}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise CheckpointError(
            f"{target} could not be written ({error.strerror or error}). What was there before is untouched; free space or choose another "
            "folder."
        ) from error
    except SafetensorError as error:
        raise CheckpointError(f"{target} could not be written ({error}). What was there before is untouched.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Wait until no other process writes a checkpoint to the folder, and keep others waiting.

    Files are named after their content. Of two writers at once, one could otherwise remove as stale what the other has just written under
    the very name that its manifest is about to give. The system ends the lock of a process that was killed.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_tensors(folder: Path, stem: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write tensors to ``<stem>.<hash>.safetensors`` and return its entry for the manifest."""
    apart = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}  # no shared storage, no views
    unnamed = folder / f".{stem}.{os.getpid()}-{secrets.token_hex(4)}.new"
    try:
        _atomically(unnamed, lambda path: save_file(apart, path, metadata={"format": "pt"}))
        digest = _hash(unnamed)
        entry: dict[str, Any] = {"file": f"{stem}.{digest[:12]}.safetensors", "sha256": digest, "bytes": unnamed.stat().st_size}
        os.replace(unnamed, folder / entry["file"])
    finally:
        with contextlib.suppress(OSError):
            unnamed.unlink(missing_ok=True)
    return entry


def write_folder(folder: Path, stem: str, write: Callable[[Path], Any]) -> dict[str, Any]:
    """Let `write` fill a new folder, name it after its content, and return its entry for the manifest."""
    temporary = folder / f".{stem}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    temporary.mkdir()
    try:
        write(temporary)
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        digest = hashlib.sha256("".join(f"{p.relative_to(temporary)}:{_hash(p)};" for p in files).encode()).hexdigest()
        target = folder / f"{stem}.{digest[:12]}"
        if not target.exists():
            os.replace(temporary, target)
    except OSError as error:
        raise CheckpointError(f"{folder / stem} could not be written ({error}). What was there before is untouched.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return {"folder": target.name, "sha256": digest}


def replace_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file in one step: readers see the old one or the new one."""
    replace_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Write a UTF-8 file in one step: readers see the old one or the new one."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    _atomically(path, write)


def remove_stale(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Remove the files that only the previous manifest named. Those of a writer at work beside us are none of ours."""

    def names(manifest: Any) -> set[str]:
        if not isinstance(manifest, Mapping):
            return set()
        own = {str(manifest[key]) for key in ("file", "folder") if isinstance(manifest.get(key), str)}
        return own.union(*(names(value) for value in manifest.values()))

    for name in names(before) - names(now):
        if _FILE_NAME.fullmatch(name):
            path = folder / name
            with contextlib.suppress(OSError):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def strict_json(text: str, source: str | Path, advice: str) -> Any:
    """Return the value of a JSON text without repeated keys, NaN or infinity; errors say where it is from, and what to do.

    Raises:
        CheckpointError: a key that stands twice in an object, or NaN or infinity.
        ValueError, RecursionError: no JSON.

    >>> strict_json('{"k": 8}', "manifest.json", "Copy it again.")
    {'k': 8}
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise CheckpointError(f"{source}: the key {key!r:.80} stands there twice. {advice}")
            found[key] = value
        return found

    def no_constant(name: str) -> Any:
        raise CheckpointError(f"{source}: {name} is no JSON value. {advice}")

    return json.loads(text, object_pairs_hook=unique, parse_constant=no_constant)


def read_json(path: Path, again: str = "Write it again with tl_codebook.save.") -> dict[str, Any]:
    """Read a JSON object strictly: no duplicate keys, no NaN. `again` is what errors advise."""
    try:
        content = strict_json(path.read_text(encoding="utf-8"), path, again)
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} holds no {path.name}. Give a folder written by tl_codebook.save.") from None
    except CheckpointError:
        raise
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, no JSON, a number of thousands of digits
        raise CheckpointError(f"{path} cannot be read as JSON ({error}). It is incomplete or damaged: copy it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not an object. {again}")
    return content


def resolve(folder: Path, name: Any) -> Path:
    """Return the file or folder that a manifest names, refusing whatever lies outside."""
    if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
        raise CheckpointError(
            f"{folder}: its manifest names {name!r}. File names may hold A-Z a-z 0-9 . _ - and be 64 long; do not use it."
        )
    path = folder / name
    if not path.exists():
        raise CheckpointError(f"{path} is missing, though the manifest names it. The copy is incomplete: copy it again.")
    roots = [folder.resolve()]
    if folder.absolute().parent.name == "snapshots":  # the cache of the hub: its folders hold links to ../../blobs
        roots.append(folder.resolve().parent.parent / "blobs")
    try:
        for one in [path, *path.rglob("*")] if path.is_dir() else [path]:
            if not any(one.resolve().is_relative_to(root) for root in roots):
                raise CheckpointError(f"{one} is a link to {one.resolve()}, outside the checkpoint. Copy the file itself.")
    except (OSError, RuntimeError) as error:  # links in a circle
        raise CheckpointError(f"{path} cannot be followed ({error}). Copy the files themselves.") from error
    return path


def read_tensors(folder: Path, entry: Any, expected: Mapping[str, tuple[int, ...]] | None = None) -> dict[str, Tensor]:
    """Read the safetensors file of a manifest entry after checking its size, hash, keys, shapes and dtypes."""
    if not isinstance(entry, dict) or set(entry) != {"file", "sha256", "bytes"}:
        raise CheckpointError(f"{folder}: its manifest has a file entry {entry!r}. It needs file, sha256 and bytes; write it again.")
    path = resolve(folder, entry["file"])
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path} is not a safetensors file, and nothing else is read.")
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise CheckpointError(f"{path} is incomplete: it has {size} bytes, the manifest says {entry['bytes']}. Copy it again.")
    if _hash(path) != entry["sha256"]:
        raise CheckpointError(f"{path} is not the file that was written: its sha256 differs from the manifest's. Copy it again.")
    try:
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
            if expected is not None:
                if keys != set(expected):
                    missing, extra = sorted(set(expected) - keys), sorted(keys - set(expected))
                    raise CheckpointError(f"{path}: missing tensors {missing}, unexpected tensors {extra}. Copy it again.")
                for key, shape in expected.items():
                    found = tuple(file.get_slice(key).get_shape())
                    if found != shape:
                        raise CheckpointError(f"{path}: {key!r} has shape {found}, the manifest says {shape}. Copy it again.")
            tensors = {key: file.get_tensor(key) for key in keys}
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged ({error}). Copy it again.") from error
    except torch.OutOfMemoryError as error:
        raise CheckpointError(f"{path} does not fit the memory ({error}).") from error
    return tensors
