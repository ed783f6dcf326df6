"""Labels and codes in the formats of others: the original library's ``CodeInfo``, and features as Neuronpedia has them; read and written.

What comes from elsewhere is text, whatever it says: control characters in it are written out, and nothing in it is run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tl_codebook.characters import without_hostile
from tl_codebook.convert.original_config import PLACES
from tl_codebook.describe.label_files import CodeLabel, CodeLabels, Kind, replace_inert_json
from tl_codebook.errors import ConfigError, DataError, check_whole, nearest
from tl_codebook.files import target_file
from tl_codebook.names import SITES, Address, Code, CodeLike, as_address, as_code
from tl_codebook.store.counting import slot_of
from tl_codebook.store.sites import stored_code
from tl_codebook.store.text import Vocabulary

__all__ = ["code_info", "imported", "original_name", "write_code_info", "write_neuronpedia"]

_PLACE_OF = {sites[0]: place for place, sites in PLACES.items() if len(sites) == 1} | {"qkv": "qkv"}
"""Our site -> what the original calls it. q, k and v are one codebook there, whose groups lie in another order."""
_ALSO = {"attn": ("attn_out", "z"), "mlp": ("mlp_out", "post"), "qkv": ("qkv",)}
"""What the original may mean by a place: it knows the places inside attention and MLPs by these names too."""
_INFO = ("code", "layer", "head", "cb_at", "pos", "code_pos", "description", "regex", "prec", "recall", "num_acts")
_SOURCE = re.compile(r"(\d{1,6})-([a-z_]+)(?:-(\d{1,9}))?", re.ASCII)
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_SAMPLE = 10_000  # firings of a code among which the best places are looked for


def original_name(address: Address | str) -> str:
    """Return what the original library calls a codebook or a group of one (``convert_to_adv_name``).

    Raises:
        ConfigError: a place at which the original has no codebook.

    >>> original_name("L5.z.2"), original_name("L3.mlp_out")
    ('layer5_attn_preproj_gcb2', 'layer3_mlp')
    """
    place = as_address(address)
    group = "" if place.group is None else f"_gcb{place.group}"
    return f"layer{place.layer}_{_place_of(place)}{group}"


def _place_of(address: Address) -> str:
    if address.layer is None or address.site not in _PLACE_OF:
        raise ConfigError(
            f"{address} was to be named as in codebook-features, which has no codebook there. It has them at: {', '.join(_PLACE_OF)}."
        )
    return _PLACE_OF[address.site]


def code_info(label: CodeLabel) -> dict[str, Any]:
    """Return a label as the fields of the original library's ``CodeInfo``.

    ``num_acts`` are all firings that are known, ``pos`` and ``code_pos``, which are of interventions, have their defaults.

    Raises:
        ConfigError: a code at a place where the original has no codebook.

    >>> info = code_info(CodeLabel("L5.z.2:88", "comma", "regex", 0.95, 0.5, pattern="(,)"))
    >>> info["layer"], info["cb_at"], info["head"], info["code"], info["description"], info["prec"]
    (5, 'attn_preproj', 2, 88, 'comma', 0.95)
    """
    code = label.code
    known = [n for n in (label.n_train, label.n_held_out) if n is not None]
    values = (code.code, code.layer, code.group, _place_of(code.address), None, -1)
    return dict(zip(_INFO, (*values, label.text, label.pattern, label.precision, label.recall, sum(known) if known else None), strict=True))


def write_code_info(labels: Iterable[CodeLabel], path: str | Path, *, overwrite: bool = False) -> None:
    """Write labels as a JSON list whose entries are the fields of the original library's ``CodeInfo``: ``CodeInfo(**entry)`` reads one.

    Args:
        labels: Of codes at places that the original has: z, attn_out, mlp_out, post, resid_post, resid_delta, qkv.
        path: The file.
        overwrite: Replace a file that is there.

    Raises:
        ConfigError: a code at another place.
        CheckpointExistsError: the file exists, and `overwrite` was not said.
        CheckpointError: it cannot be written there.

    Source: codebook-features 0.1.2, ``CodeInfo``.

    >>> from tl_codebook.describe.label_files import read_labels
    >>> write_code_info(CodeLabels.from_texts({"L0.z.1:3": "comma"}), tmp_path / "codes.json")
    >>> read_labels(tmp_path / "codes.json")["L0.z.1:3"].text
    'comma'
    """
    rows = [code_info(label) for label in labels]
    replace_inert_json(target_file(path, overwrite), rows)


def write_neuronpedia(
    store: Any,
    path: str | Path,
    labels: CodeLabels | None = None,
    *,
    codes: Iterable[CodeLike] | None = None,
    model_id: str,
    model: Any = None,
    n_contexts: int = 10,
    before: int = 20,
    after: int = 10,
    n_logits: int = 10,
    seed: int = 0,
    vocabulary: Vocabulary | None = None,
    overwrite: bool = False,
) -> None:
    """Write codes as a JSON list of features, with the names that Neuronpedia gives to the fields. It was not opened on neuronpedia.org.

    Of each code: ``modelId``, ``layer`` (``5-z-2``: layer, site, group), ``index`` (the code, a text as there), ``sourceSetName``,
    ``hookName``, ``frac_nonzero`` (share of the positions of text at which it fires), ``maxActApprox`` (1), ``explanations`` (the label:
    ``description``, ``typeName`` and in ``notes`` its figures) and ``activations``: places at which the code fires, first slots first, with
    ``tokens``, ``values``, ``maxValue``, ``maxValueTokenIndex``, ``minValue``. A value is 1 where the code is in the first slot, 1/k less
    for each slot after it, and 0 where it does not fire. With a model also ``pos_str``, ``pos_values``, ``neg_str`` and ``neg_values``:
    the tokens that the code's vector makes more and less likely by itself, in units of the final norm's scale (`direct_logit_effect`);
    not at q, k and qkv, which write nothing. All values are finite. A token that is a part of a character has U+FFFD in its text.

    Args:
        store: A `CodeStore` with text.
        path: The file.
        labels: Labels, for the explanations.
        codes: Which codes; by default those that have a label.
        model_id: ``modelId``: letters, digits, ``.``, ``_`` and ``-``, at most 64.
        model: The host with the codes of the store, for the logits.
        n_contexts, before, after: Most places of a code, and most tokens before and after each, >= 0.
        n_logits: Tokens up and down, >= 1.
        seed: Of the places, where there are very many.
        vocabulary: For a store that was collected without a tokenizer.
        overwrite: Replace a file that is there.

    Raises:
        ConfigError: an option that cannot be, a hook point outside the site table, or a site from which no way to the logits is known.
        DataError: a store without text, or neither labels nor codes.
        UnknownHookError, LabelError, InvalidCodeError: a code that the store does not have.
        BasisMismatchError: a model with other codes.
        CheckpointExistsError: the file exists, and `overwrite` was not said.
        CheckpointError: it cannot be written there.

    >>> from tl_codebook import attach, collect_codes
    >>> _ = attach(model, "mlp_out", n_codes=1)
    >>> store = collect_codes(model, ["w3 w4 w5"], tmp_path / "store", progress=False)
    >>> write_neuronpedia(store, tmp_path / "features.json", codes=["L0.mlp_out:0"], model_id="tiny", n_contexts=1)
    >>> import json
    >>> (feature,) = json.loads((tmp_path / "features.json").read_text())
    >>> feature["layer"], feature["index"], feature["frac_nonzero"], feature["activations"][0]["values"]
    ('0-mlp_out', '0', 1.0, [1.0, 1.0, 1.0, 1.0])
    """
    if not isinstance(model_id, str) or not _NAME.fullmatch(model_id):
        raise ConfigError(f"model_id={model_id!r:.120} was given. Give 1 to 64 letters, digits, '.', '_' or '-'.")
    for name, number, least in (("n_contexts", n_contexts, 0), ("before", before, 0), ("after", after, 0), ("n_logits", n_logits, 1)):
        check_whole(name, number, least)
    if codes is None and labels is None:
        raise DataError("neither labels nor codes were given. Give those of label_codes, or codes=['L3.mlp_out:417', ...].")
    wanted = [row.code for row in labels or ()] if codes is None else [as_code(code) for code in codes]
    words = vocabulary or store.vocabulary
    if words is None:
        raise DataError("this store has no text: it was collected without a tokenizer. Give vocabulary=vocabulary_of(tokenizer).")
    wanted = [_as_stored(store, code) for code in wanted]
    target = target_file(path, overwrite)
    effects = {} if model is None else _effects(store, model, wanted, n_logits, words)
    features = []
    for code in wanted:
        place = {"modelId": model_id, "layer": _source(code), "index": str(code.code)}
        label = None if labels is None else labels.get(code)
        feature: dict[str, Any] = place | {
            "sourceSetName": place["layer"].partition("-")[2],
            "hookName": code.hook_name,
            "frac_nonzero": store.frequency(code, special=False),
            "maxActApprox": 1.0,
            "explanations": [] if label is None else [place | _explanation(label)],
            "activations": [place | each for each in _activations(store, code, n_contexts, before, after, seed, words)],
        }
        features.append(feature | effects.get(code, {}))
    replace_inert_json(target, features)


def _as_stored(store: Any, code: Code) -> Code:
    """Return a code as labels write it, refusing one that the store does not have."""
    code = stored_code(store.sites, code)
    _source(code)
    return code


def _source(code: Code) -> str:
    if code.layer is None:
        raise ConfigError(f"{code} sits at no site of the table, and a feature of Neuronpedia belongs to a layer. Leave it out.")
    return f"{code.layer}-{code.site}" + ("" if code.group is None else f"-{code.group}")


def _explanation(label: CodeLabel) -> dict[str, Any]:
    figures = {"precision": label.precision, "recall": label.recall, "firings": label.n_held_out}
    notes = ", ".join(f"{name} {value:.4g}" for name, value in figures.items() if value is not None)
    return {"description": label.text, "typeName": f"tl_codebook {label.kind}", "explanationModelName": None, "notes": notes}


def _text(words: Vocabulary, token: int) -> str:
    return words.bytes_of(token).decode(errors="replace") if token < words.n_tokens else f"token {token}"


def _activations(store: Any, code: Code, n: int, before: int, after: int, seed: int, words: Vocabulary) -> list[dict[str, Any]]:
    from tl_codebook.describe.places import Firings

    ids = store.ids(code.hook_name)
    firings = Firings(store, code, _SAMPLE, np.random.default_rng(seed), ids)
    found = []
    for position in firings.sample[firings.best(n)].tolist():
        context = store.context_at(position, before, after)
        here = ids[context.start : context.start + len(context.tokens), code.group or 0]
        slots, k = slot_of(here, code.code), here.shape[1]
        values = np.where(slots >= 0, (k - slots) / k, 0.0).tolist()
        texts = [_text(words, token) for token in context.tokens.tolist()]
        greatest = max(values)
        figures = {"maxValue": greatest, "maxValueTokenIndex": values.index(greatest), "minValue": min(values)}
        found.append({"tokens": texts, "values": values} | figures)
    return found


def _effects(store: Any, model: Any, codes: Sequence[Code], n: int, words: Vocabulary) -> dict[Code, dict[str, Any]]:
    """Return the tokens that codes make more and less likely by themselves, for sites that write something."""
    from tl_codebook.describe.logits import book_of, contribution, extremes
    from tl_codebook.describe.weights import logit_path
    from tl_codebook.describe.words import Words
    from tl_codebook.hosts import as_host

    store.check_model(model)
    host, effects = as_host(model), {}
    writing = [code for code in codes if code.site not in ("q", "k", "qkv")]
    paths = {name: logit_path(host, name) for name in dict.fromkeys(code.hook_name for code in writing)}
    for code in writing:
        _, book = book_of(host, code)
        rows = extremes(paths[code.hook_name].logits(contribution(book, code))[0], n, Words(words))
        effects[code] = {
            f"{sign}_{what}": [_text(words, row.token) if what == "str" else row.logit for row in some]
            for sign, some in zip(("pos", "neg"), rows, strict=True)
            for what in ("str", "values")
        }
    return effects


def imported(entries: Sequence[Any], store: Any = None) -> list[CodeLabel]:
    """Read entries of the original's ``CodeInfo``, or of Neuronpedia's features or explanations, as labels; `read_labels` says how.

    Raises:
        DataError: entries of neither kind, or with values that cannot be.
        LabelError: a code or text that cannot be.

    >>> imported([{"modelId": "m", "layer": "5-z-2", "index": "88", "description": "comma"}])[0].label
    'L5.z.2:88'
    """
    if all(isinstance(entry, dict) and {"layer", "index"} <= entry.keys() for entry in entries):
        return _of_neuronpedia(entries)
    if all(isinstance(entry, dict) and {"layer", "code"} <= entry.keys() for entry in entries):
        return [_of_code_info(number, entry, store) for number, entry in enumerate(entries)]
    raise DataError(
        "labels were expected: what write_labels writes, an object of codes and texts, a list of CodeInfo (code, layer, cb_at, description "
        "...), or features or explanations of Neuronpedia (modelId, layer, index, explanations or description)."
    )


def _one_line(text: Any, what: str) -> str:
    if not isinstance(text, str):
        raise DataError(f"{what} is a {type(text).__name__}, not a text. Correct it.")
    return without_hostile(text.strip())


def _of_neuronpedia(entries: Sequence[Mapping[str, Any]]) -> list[CodeLabel]:
    models = {str(entry.get("modelId"))[:80] for entry in entries}
    if len(models) > 1:
        raise DataError(f"entries of several models were given: {', '.join(sorted(models)[:5])}. Give those of one.")
    texts: dict[Code, list[str]] = {}
    for number, entry in enumerate(entries):
        match = _SOURCE.fullmatch(entry["layer"]) if isinstance(entry["layer"], str) else None
        if match is None or match[2] not in SITES or not re.fullmatch(r"\d{1,9}", str(entry["index"]), re.ASCII):
            raise DataError(
                f"entry {number} is feature {entry['index']!r:.40} of {entry['layer']!r:.80}, which names no code. Its layer has to be as "
                "write_neuronpedia writes it, such as '3-mlp_out' or '5-z-2', and its index a whole number."
            )
        code = Code(int(match[1]), match[2], None if match[3] is None else int(match[3]), int(entry["index"]))
        given = entry.get("explanations", [entry] if "description" in entry else [])
        if not isinstance(given, list) or not all(isinstance(one, dict) and "description" in one for one in given):
            raise DataError(f"the explanations of entry {number} are {given!r:.80}. Give a list of objects with a description.")
        texts.setdefault(code, []).extend(_one_line(one["description"], f"a description of entry {number}") for one in given)
    return [CodeLabel(str(code), "; ".join(dict.fromkeys(some))) for code, some in texts.items() if some]


def _of_code_info(number: int, entry: Mapping[str, Any], store: Any) -> CodeLabel:
    unknown = sorted(str(key)[:80] for key in entry.keys() - set(_INFO))
    if unknown:
        raise DataError(f"entry {number} has {', '.join(unknown)}, which a CodeInfo has not. Its fields are {', '.join(_INFO)}.")
    place, description, pattern = entry.get("cb_at"), entry.get("description"), entry.get("regex")
    if not isinstance(place, str) or place not in PLACES:
        raise DataError(
            f"entry {number} has cb_at {place!r:.80}. {nearest(str(place)[:80], PLACES)}Write where its codebook is: {', '.join(PLACES)}."
        )
    if description is None and pattern is None:
        raise DataError(f"entry {number} has neither a description nor a regex, so it labels nothing. Give it one, or leave it out.")
    text = _one_line(pattern if description is None else description, f"the description of entry {number}")
    where = Address(entry["layer"], _site_of(place, entry["layer"], store), entry.get("head"))
    code, precision, recall = Code(where.layer, where.site, where.group, entry["code"]), entry.get("prec"), entry.get("recall")
    kind: Kind = "other" if pattern is None else "regex"
    label = CodeLabel(str(code), text, kind, precision, recall, None, None, entry.get("num_acts"), pattern)
    if precision is None or recall is None or not precision + recall:
        return label
    return replace(label, f1=2 * precision * recall / (precision + recall))


def _site_of(place: str, layer: Any, store: Any) -> str:
    """Return our site: the first that the original may mean and the store has, without a store the first."""
    meant = _ALSO.get(place, PLACES[place])
    there = [site for site in meant if store is not None and Address(layer, site).hook_name in store.sites]
    return (there or list(meant))[0]
