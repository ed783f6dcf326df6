"""``tl-codebook convert``: bring checkpoints of codebook-features in, and trained models back to Hugging Face, with a proof of either."""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_codebook.errors import CheckpointError, CheckpointWarning, ConfigError

if TYPE_CHECKING:
    from tl_codebook.codebook import Codebook
    from tl_codebook.convert.proof import Agreement

__all__ = ["run"]


def run(argv: Sequence[str]) -> int:
    """Parse the arguments, tell what IN is, convert it, prove it, and write OUT."""
    from tl_codebook.files import as_path

    asked = _parser().parse_args(list(argv))
    folder, asked.output = as_path(asked.input), as_path(asked.output)
    _check_places(folder, asked)
    kind = _kind(folder)
    if kind == "tl_codebook":
        return _to_hugging_face(folder, asked)
    if kind == "exported":
        return _exported(folder, asked)
    return _from_original(folder, asked)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tl-codebook convert",
        description="Convert a codebook-features checkpoint, or a folder that export_hf wrote, into a hooked model with codebooks "
        "(tl_codebook.load reads it); or a folder that tl_codebook.save wrote into a plain Hugging Face folder with the codes beside it.",
    )
    parser.add_argument("input", metavar="IN", help="folder (or hub name of a codebook-features checkpoint)")
    parser.add_argument("output", metavar="OUT", help="folder to write, new or empty")
    parser.add_argument("--base", help="the model that codebook-features wrapped: folder or hub name; only its configuration is used")
    parser.add_argument(
        "--host", choices=["hooked", "bridge"], help="HookedTransformer, where TransformerLens has it, or TransformerBridge"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier conversion wrote to OUT")
    return parser


def _check_places(folder: Path, asked: argparse.Namespace) -> None:
    """Refuse an IN that is nowhere and an OUT that is IN, before any work is done."""
    from tl_codebook.convert.pretrained import is_local

    try:
        if folder.is_dir():
            if asked.output.resolve() == folder.resolve():
                raise ConfigError(f"OUT {asked.output} is IN itself, which converting would destroy. Choose another folder.")
        elif folder.exists():
            raise CheckpointError(f"{asked.input} is a file. Give the folder that it lies in.")
        elif is_local(asked.input):
            raise CheckpointError(f"{asked.input!r}: there is no such folder. Give a folder, or a hub name (owner/model).")
    except (OSError, RuntimeError) as error:  # a name too long, a loop of links
        raise CheckpointError(f"{asked.input} and {asked.output} cannot be told apart ({error}). Give other folders.") from error


def _kind(folder: Path) -> str:
    """Say what IN is, by its manifest where it has one: a folder may hold a whole model of ours beside one of Hugging Face."""
    from tl_codebook.files import read_json

    config = folder / "config.json"
    if (folder / "tl_codebook.json").is_file():
        whole = read_json(folder / "tl_codebook.json").get("model") is not None
        return "exported" if not whole and config.is_file() else "tl_codebook"
    if folder.is_dir() and not config.is_file():
        raise CheckpointError(f"{folder} holds neither tl_codebook.json nor config.json, so there is nothing to convert. Copy all of it.")
    if config.is_file():
        kind = read_json(config, again="Copy it again.").get("model_type")
        if kind != "codebook":
            raise CheckpointError(
                f"{folder} is a plain Hugging Face model ({kind}) without codes, so there is nothing to convert. Load it with "
                "tl_codebook.load_hf, or train codes on it with tl-codebook train."
            )
    return "original"


def _from_original(folder: Path, asked: argparse.Namespace) -> int:
    if asked.base is None:
        what = "is" if folder.is_dir() else "is no folder here; as a hub name it should be"
        raise ConfigError(
            f"{asked.input} {what} a checkpoint of codebook-features, which does not say which model it wrapped. Add --base: the folder or "
            "hub name of that model."
        )
    from tl_codebook import attach, load_hf, save
    from tl_codebook.checkpoint import check_target
    from tl_codebook.convert.codebook_features import read_codebook_features
    from tl_codebook.convert.proof import compare_with_hf

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointWarning)  # said below, one line each
        original = read_codebook_features(asked.input, asked.base)
    config = original.hf_model.config
    print(f"{asked.input}: codebook-features checkpoint, trained with loss {original.config.loss!r}")
    print(f"base          {_architecture(config)}")
    _print_books(original.books)
    for name in original.idle:
        print(f"left out      {name}: it never runs in the original")
    if not original.books:
        raise CheckpointError(f"{asked.input} has no codebook that runs. Load its base with tl_codebook.load_hf.")
    check_target(asked.output, overwrite=asked.overwrite)
    model = load_hf(original.hf_model, original.tokenizer, asked.host)
    apart = copy.deepcopy(original.books)
    attach(model, original.books)
    _print_agreement(compare_with_hf(model, original.hf_model, apart))
    save(model, asked.output, overwrite=asked.overwrite)
    print(f"saved to {asked.output}; load it with tl_codebook.load({str(asked.output)!r})")
    return 0


def _exported(folder: Path, asked: argparse.Namespace) -> int:
    from tl_codebook import Codebooks, attach, load_hf, save
    from tl_codebook.checkpoint import check_target
    from tl_codebook.convert.pretrained import read_model
    from tl_codebook.convert.proof import compare_with_hf

    if asked.base is not None:
        raise ConfigError(f"--base was given, but {folder} is a Hugging Face model with codes, and the base itself. Leave it out.")
    books = Codebooks.from_pretrained(folder)
    check_target(asked.output, overwrite=asked.overwrite)
    model = load_hf(folder, host=asked.host)
    print(f"{folder}: Hugging Face folder with codes, written by export_hf")
    _print_books(attach(model, books))
    _print_agreement(compare_with_hf(model, read_model(folder), folder))
    save(model, asked.output, overwrite=asked.overwrite)
    print(f"saved to {asked.output}; load it with tl_codebook.load({str(asked.output)!r})")
    return 0


def _to_hugging_face(folder: Path, asked: argparse.Namespace) -> int:
    from tl_codebook import export_hf, load, sites

    for option in ("base", "host"):
        if getattr(asked, option) is not None:
            raise ConfigError(f"--{option} was given, but {folder} was written by tl_codebook.save and goes to Hugging Face. Leave it out.")
    model = load(folder)
    print(f"{folder}: saved by tl_codebook")
    _print_books({name: point.codebook for name, point in sites(model).items()})
    _print_agreement(export_hf(model, asked.output, overwrite=asked.overwrite))
    print(
        f"saved to {asked.output}: transformers loads the base from it, tl_codebook.attach_hf(hf_model, {str(asked.output)!r}) puts the "
        "codes in"
    )
    return 0


def _architecture(config: Any) -> str:
    return (
        f"{config.model_type}, {config.num_hidden_layers} layers, {config.num_attention_heads} heads, d_model {config.hidden_size}, "
        f"vocabulary {config.vocab_size}"
    )


def _print_books(books: Mapping[str, Codebook]) -> None:
    """Print one line for each site, the layers that share a configuration together."""
    from tl_codebook.names import split_hook_name

    layers: dict[tuple[str, Any], list[int | None]] = {}
    for name, book in books.items():
        layer, site = split_hook_name(name)
        layers.setdefault((site, book.config), []).append(layer)
    for (site, config), at in layers.items():
        where = "" if at == [None] else f" of layers {', '.join(map(str, at))}" if len(at) > 1 else f" of layer {at[0]}"
        groups = f"{config.n_groups} groups of {config.n_codes} codes" if config.n_groups > 1 else f"{config.n_codes} codes"
        print(f"codes         {site}{where}: {groups}, k={config.k}, {config.similarity}, {config.selection}, {config.reduce}")


def _print_agreement(found: Agreement) -> None:
    where = f"{found.logits:.1e} of their scale on {found.n_tokens} tokens"
    ids = "" if found.ids is None else f", {found.ids:.2%} of the ids equal"
    print(f"proof         logits of Hugging Face and of the hooked model agree to {where}{ids}")
