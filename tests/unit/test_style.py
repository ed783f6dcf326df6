"""Rules that a linter does not know, for every file of the package."""

import ast
from pathlib import Path

import pytest

import tl_codebook

PACKAGE = Path(tl_codebook.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def is_true(node):
    return isinstance(node, ast.Constant) and node.value is True


def unsafe(source):
    """Return what in the source reads or writes pickles, or runs code that came with a file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [f"import {alias.name}" for alias in node.names if alias.name.split(".")[0] in PICKLES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PICKLES:
            found.append(f"from {node.module}")
        elif isinstance(node, ast.ImportFrom) and node.module == "torch":
            found += [f"from torch import {alias.name}" for alias in node.names if alias.name in ("load", "save")]
        elif isinstance(node, ast.Call):
            arguments = {keyword.arg: keyword.value for keyword in node.keywords}
            if ast.unparse(node.func) == "torch.load" and not is_true(arguments.get("weights_only")):
                found.append("torch.load without weights_only=True")
            if ast.unparse(node.func) == "torch.save":
                found.append("torch.save")
            found += [f"{name}=" for name in ("allow_pickle", "trust_remote_code") if name in arguments and is_true(arguments[name])]
        elif isinstance(node, ast.Dict):
            keys = {key.value: value for key, value in zip(node.keys, node.values, strict=True) if isinstance(key, ast.Constant)}
            found += [f"{name}:" for name in ("allow_pickle", "trust_remote_code") if is_true(keys.get(name))]
    return found


@pytest.mark.parametrize(
    ("source", "is_unsafe"),
    [
        ("import pickle", True),
        ("import os, cloudpickle as c", True),
        ("from pickle import loads", True),
        ("from torch import load", True),
        ("torch.load(path)", True),
        ("torch.load(path, weights_only=False)", True),
        ("torch.load(path, weights_only=flag)", True),
        ("torch.load(path, map_location='cpu', weights_only=True)", False),
        ("torch.save(x, path)", True),
        ("np.load(path, allow_pickle=True)", True),
        ("np.load(path, allow_pickle=False)", False),
        ("AutoModel.from_pretrained(name, trust_remote_code=True)", True),
        ("options = {'trust_remote_code': True}", True),
        ("AutoModel.from_pretrained(name)", False),
        ("text = 'import pickle'", False),
    ],
)
def test_the_check_finds_what_it_looks_for(source, is_unsafe):
    assert bool(unsafe(source)) == is_unsafe


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_each_file(path):
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 400, "a file that passes 400 lines is asking to be two"
    assert unsafe(source) == []
    assert path.name not in ("utils.py", "util.py", "helpers.py", "common.py", "misc.py")
    module = ast.parse(source)
    assert ast.get_docstring(module), "a file says what it is"


def test_there_are_files_to_check():
    assert {"__init__.py", "codebook.py", "names.py", "snap/definition.py"} <= {path.relative_to(PACKAGE).as_posix() for path in FILES}
    assert (PACKAGE / "py.typed").exists()
    assert not [path for path in PACKAGE.rglob("*") if path.is_dir() and path.name in ("utils", "helpers", "common")]
