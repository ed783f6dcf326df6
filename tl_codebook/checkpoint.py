"""Save and load codebook models, and codebooks alone.

A checkpoint is a folder: ``tl_codebook.json`` (what is in it), ``codes.<hash>.safetensors``, and for a whole model its weights and its
tokenizer. Codebooks attach to any model in the basis that they were trained in; see `tl_codebook.basis`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelHubMixin
from torch import Tensor

from tl_codebook import files, hosts
from tl_codebook.attachment import attach, sites
from tl_codebook.base_model import build, describe, freeze_, frozen_zeros, put_weights_, weights_of
from tl_codebook.basis import Basis, fingerprint
from tl_codebook.codebook import Codebook, CodebookConfig
from tl_codebook.errors import AttachError, CheckpointError, CheckpointExistsError, ConfigError

__all__ = ["MANIFEST", "Codebooks", "load", "restore_", "save"]

MANIFEST = "tl_codebook.json"
FORMAT_VERSION = 1
_KEYS = {"format", "format_version", "written_by", "sites", "codes", "basis", "model", "tokenizer"}
_HOOK = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_HF_WEIGHTS = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
"""Names that Hugging Face gives to weights; `files.write_tensors` gives none of these."""


class Codebooks(dict[str, Codebook], ModelHubMixin, library_name="tl_codebook", tags=["codebook-features"]):
    """The codebooks of a model by hook name, apart from the model: what is shared, uploaded, and attached to a base model.

    Methods of `ModelHubMixin`: `save_pretrained(folder)`, `from_pretrained(folder or hub name)`, `push_to_hub(hub name)`.

    >>> from tl_codebook import attach, detach
    >>> _ = attach(model, "mlp_out", n_codes=16, k=2)
    >>> Codebooks.of(model).save_pretrained(tmp_path / "codes")
    >>> _ = detach(model)
    >>> books = attach(model, Codebooks.from_pretrained(tmp_path / "codes"))
    >>> list(books)
    ['blocks.0.hook_mlp_out', 'blocks.1.hook_mlp_out']
    """

    def __init__(self, books: Mapping[str, Codebook] | Iterable[tuple[str, Codebook]] = (), basis: Basis | None = None):
        super().__init__(books)
        self.basis = basis

    @classmethod
    def of(cls, model: Any) -> Codebooks:
        """Take the codebooks of a model together with the fingerprint of its activations, as the codes see them."""
        points = sites(model)
        if not points:
            raise AttachError("the model has no codebooks to take. Call attach(model, sites=...) first.")
        offsets = {name: point.offset for name, point in points.items() if point.offset is not None}
        return cls({name: point.codebook for name, point in points.items()}, fingerprint(model).shifted(offsets))

    def save_pretrained(
        self, save_directory: str | Path, *, overwrite: bool = False, repo_id: str | None = None, push_to_hub: bool = False, **kwargs: Any
    ) -> str | None:
        """Write the codebooks to a folder, in one step; an existing one needs ``overwrite=True``."""
        folder = files.check_writable(files.as_path(save_directory), overwrite=overwrite, create=False)
        _write(folder, self)
        if push_to_hub:
            return str(self.push_to_hub(repo_id=repo_id or folder.name, **kwargs))
        return None

    def _save_pretrained(self, save_directory: Path) -> None:
        self.save_pretrained(save_directory, overwrite=True)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        allow_nonfinite: bool = False,
    ) -> Codebooks:
        """Read the codebooks of a folder or of a repository of the hub.

        The method of the mixin asks the hub for a ``config.json`` first, and fails without a network even where everything is in the cache.
        """
        model_id = str(pretrained_model_name_or_path)
        folder = files.as_path(model_id)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            try:
                folder = Path(
                    snapshot_download(
                        model_id,
                        revision=revision,
                        cache_dir=cache_dir,
                        force_download=force_download,
                        local_files_only=local_files_only,
                        token=token,
                        allow_patterns=[MANIFEST, "codes.*.safetensors"],
                    )
                )
            except Exception as error:
                raise CheckpointError(f"{model_id!r} is no folder here, and the hub did not give it ({error}).") from error
        with torch.inference_mode(False):  # or the codes could never be trained
            return _read_books(folder, files.read_json(folder / MANIFEST), allow_nonfinite=allow_nonfinite)


def _tensors_of(books: Codebooks) -> dict[str, Tensor]:
    tensors = {}
    for name, book in books.items():
        for key, value in book.state_dict().items():
            tensors[f"{name}/{key}"] = value
    if books.basis is not None:
        tensors |= books.basis.tensors()
    return tensors


def _write(folder: Path, books: Codebooks, model: Any = None) -> None:
    for name in books:
        if not _HOOK.fullmatch(name):
            raise CheckpointError(f"a codebook sits at {name!r}, which no file may name: A-Z a-z 0-9 . _ - and at most 64 characters.")
    with _told(folder), files.made(folder), files.one_writer(folder):
        _write_alone(folder, books, model)


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(
            f"{folder} could not be written ({error.strerror or error}). What was there before is untouched; choose another folder."
        ) from error


def _write_alone(folder: Path, books: Codebooks, model: Any) -> None:
    before = {}
    if (folder / MANIFEST).is_file():
        try:
            before = files.read_json(folder / MANIFEST)
        except CheckpointError:  # what is being overwritten may be damaged
            before = {}
    basis = books.basis
    manifest: dict[str, Any] = {
        "format": "tl_codebook",
        "format_version": FORMAT_VERSION,
        "written_by": {"tl_codebook": version("tl-codebook"), "transformer_lens": version("transformer-lens"), "torch": torch.__version__},
        "sites": {
            name: {"d_in": book.d_in, "on_nonfinite": book.on_nonfinite, "config": book.config.to_dict()} for name, book in books.items()
        },
        "codes": files.write_tensors(folder, "codes", _tensors_of(books)),
        "basis": None if basis is None else {"processing": basis.processing, "vocabulary": basis.vocabulary},
        "model": None,
        "tokenizer": None,
    }
    if model is not None:
        weights = files.write_tensors(folder, "model", weights_of(model))
        manifest["model"] = describe(model) | {"weights": weights, "frozen": frozen_zeros(model)}
        tokenizer = getattr(model, "tokenizer", None)
        if tokenizer is not None:
            manifest["tokenizer"] = files.write_folder(folder, "tokenizer", lambda path: tokenizer.save_pretrained(path))
    files.replace_json(folder / MANIFEST, manifest)
    files.remove_stale(folder, before, manifest)


def save(model: Any, folder: str | Path, *, overwrite: bool = False) -> None:
    """Save model, tokenizer and codebooks to a folder, so that `load` needs nothing else.

    The manifest is replaced last and in one step: a process killed in between leaves what was there before complete.

    Args:
        model: A host with codebooks.
        folder: Where to; it must be empty or new unless `overwrite`.
        overwrite: Replace a checkpoint that is there.

    Raises:
        CheckpointExistsError: the folder is not empty; or it holds a Hugging Face model, whose weights would stay beside the new codes.
        CheckpointError: it cannot be written to, or the disk is full; what was there before is untouched.

    >>> from tl_codebook import attach
    >>> _ = attach(model, "mlp_out", n_codes=16, k=2)
    >>> save(model, tmp_path / "model")
    >>> torch.equal(load(tmp_path / "model")(torch.tensor([[1, 2, 3]])), model(torch.tensor([[1, 2, 3]])))
    True
    """
    model = hosts.as_host(model)
    books = Codebooks.of(model)
    describe(model)
    _write(check_target(folder, overwrite=overwrite), books, model)


def check_target(folder: str | Path, *, overwrite: bool) -> Path:
    """Refuse where `save` may not write, before any work is done for it and without creating anything; return the path."""
    folder = files.check_writable(files.as_path(folder), overwrite=overwrite, create=False)
    beside = sorted(path.name for path in folder.iterdir() if _HF_WEIGHTS.fullmatch(path.name)) if folder.is_dir() else []
    if beside and not _is_ours(folder):
        raise CheckpointExistsError(
            f"{folder} holds the weights of a Hugging Face model ({beside[0]!r}), which saving would leave beside the codes of another "
            "model. Choose another folder."
        )
    return folder


def _is_ours(folder: Path) -> bool:
    """Say whether `save` wrote a whole model there before."""
    try:
        return files.read_json(folder / MANIFEST).get("model") is not None
    except CheckpointError:
        return False


def load(folder: str | Path, *, device: str | torch.device | None = None, allow_nonfinite: bool = False) -> Any:
    """Load a model that `save` wrote: the same host, weights, tokenizer and codebooks; no network, nothing unpickled.

    Args:
        folder: What `save` wrote.
        device: Where to put the model; the CPU by default.
        allow_nonfinite: Load codes that hold NaN or Inf rather than raise.

    Raises:
        CheckpointError: naming file and cause, for anything missing, damaged, unknown or unsafe.
    """
    with torch.inference_mode(False):  # or the model could never be trained
        model = _load(files.as_path(folder), allow_nonfinite=allow_nonfinite)
        return model if device is None else model.to(device)


def _load(folder: Path, *, allow_nonfinite: bool) -> Any:
    manifest = files.read_json(folder / MANIFEST)
    books = _read_books(folder, manifest, allow_nonfinite=allow_nonfinite)
    about = manifest["model"]
    if about is None:
        raise CheckpointError(
            f"{folder} holds codebooks and no model. Attach them: attach(model, Codebooks.from_pretrained({str(folder)!r}))."
        )
    if not isinstance(about, dict) or set(about) != {"host", "config", "weights", "frozen"} or not isinstance(about["config"], dict):
        raise CheckpointError(
            f"{folder / MANIFEST}: its model entry needs host, config, weights and frozen. Write it again with tl_codebook.save."
        )
    tokenizer = None
    if manifest["tokenizer"] is not None:
        from transformers import AutoTokenizer

        path = files.resolve(folder, manifest["tokenizer"].get("folder") if isinstance(manifest["tokenizer"], dict) else None)
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        except Exception as error:
            raise CheckpointError(f"{path}: no tokenizer can be loaded from it ({type(error).__name__}: {error}).") from error
    model = build(about["host"], about["config"], tokenizer, folder)
    weights = files.read_tensors(folder, about["weights"])
    put_weights_(model, weights, folder)
    freeze_(model, about["frozen"], folder)
    model.eval()
    for book in books.values():
        book.eval()
    attach(model, books)
    return model


def restore_(model: Any, folder: str | Path) -> None:
    """Bring a model that is here, codebooks and all, back to what `save` wrote of it."""
    folder, model = Path(folder), hosts.as_host(model)
    manifest = files.read_json(folder / MANIFEST)
    books = _read_books(folder, manifest, allow_nonfinite=False)
    here = sites(model)
    if {name: book.config for name, book in books.items()} != {name: point.codebook.config for name, point in here.items()}:
        raise CheckpointError(f"{folder} has codebooks at {sorted(books)}, the model at {sorted(here)}, or of another configuration.")
    if not isinstance(manifest["model"], dict):
        raise CheckpointError(f"{folder} holds codebooks and no model, so nothing can be restored from it.")
    put_weights_(model, files.read_tensors(folder, manifest["model"].get("weights")), folder)
    for name, book in books.items():
        here[name].codebook.load_state_dict(book.state_dict())


def _read_books(folder: Path, manifest: Mapping[str, Any], *, allow_nonfinite: bool) -> Codebooks:
    path = folder / MANIFEST
    if manifest.get("format") != "tl_codebook":
        raise CheckpointError(
            f"{path} is of format {manifest.get('format')!r}, not tl_codebook. Give a folder written by tl_codebook.save."
        )
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {manifest.get('format_version')!r}, this tl_codebook reads {FORMAT_VERSION}. Install the release "
            "that wrote it, or a newer one."
        )
    if set(manifest) != _KEYS:
        raise CheckpointError(f"{path}: unknown keys {sorted(set(manifest) - _KEYS)}, missing keys {sorted(_KEYS - set(manifest))}.")
    entries = manifest["sites"]
    if not isinstance(entries, dict) or not entries:
        raise CheckpointError(f"{path}: its sites are {entries!r}. Write it again with tl_codebook.save.")
    tensors = files.read_tensors(folder, manifest["codes"])
    n_values = sum(tensor.numel() for tensor in tensors.values())
    books = {}
    for name, entry in entries.items():
        if not _HOOK.fullmatch(name):
            raise CheckpointError(f"{path}: {name[:80]!r} is no hook name (A-Z a-z 0-9 . _ - and at most 64 characters).")
        if not isinstance(entry, dict) or set(entry) != {"d_in", "on_nonfinite", "config"} or not isinstance(entry["config"], dict):
            raise CheckpointError(f"{path}: the entry of {name!r} needs d_in, on_nonfinite and config, and has {entry!r}.")
        try:
            config = CodebookConfig.from_dict(entry["config"])
            if isinstance(entry["d_in"], int) and entry["d_in"] * config.n_codes > n_values:
                raise ConfigError(f"{config.n_codes} codes of {entry['d_in']} values are more than the file of codes holds.")
            with torch.random.fork_rng(devices=[]):
                books[name] = Codebook(entry["d_in"], config, on_nonfinite=entry["on_nonfinite"])
        except ConfigError as error:
            raise CheckpointError(f"{path}: the codebook at {name!r} cannot be: {error}") from error
    expected = {f"{name}/{key}": tuple(value.shape) for name, book in books.items() for key, value in book.state_dict().items()}
    about = manifest["basis"]
    if about is not None and (
        not isinstance(about, dict)
        or set(about) != {"processing", "vocabulary"}
        or not isinstance(about["processing"], dict)
        or not isinstance(about["vocabulary"], str | None)
    ):
        raise CheckpointError(f"{path}: its basis needs processing and vocabulary, and is {about!r}.")
    basis_keys = {key for key in tensors if key.startswith("basis/")} if about is not None else set()
    if set(expected) != set(tensors) - basis_keys:
        missing, extra = sorted(set(expected) - set(tensors)), sorted(set(tensors) - basis_keys - set(expected))
        raise CheckpointError(f"{folder / manifest['codes']['file']}: missing tensors {missing}, unexpected tensors {extra}.")
    for key, shape in expected.items():
        value = tensors[key]
        if tuple(value.shape) != shape or not value.is_floating_point():
            raise CheckpointError(f"{path}: {key!r} is {value.dtype} {tuple(value.shape)}, expected floating point {shape}. Copy it again.")
        if not allow_nonfinite and not bool(torch.isfinite(value).all()):
            raise CheckpointError(
                f"{path}: {key!r} holds NaN or Inf. The run that wrote it diverged; allow_nonfinite=True loads it anyway."
            )
    for name, book in books.items():
        book.load_state_dict({key: tensors[f"{name}/{key}"] for key in book.state_dict()}, assign=True)
        for parameter in book.parameters():
            parameter.requires_grad_(True)
    basis = None
    if about is not None:
        measured = {key: value for key, value in tensors.items() if key in basis_keys}
        basis = Basis.from_tensors(measured, about, {name: book.d_in for name, book in books.items()}, path)
    return Codebooks(books, basis)
