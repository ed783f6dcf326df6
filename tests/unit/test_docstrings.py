"""The examples in docstrings run; `model` is a fresh tiny model, `torch` and `tmp_path` are there."""

import doctest
import importlib.util
import pkgutil

import pytest
import torch

import tl_codebook
from tests.tiny import make_host


def examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    for info in pkgutil.walk_packages(tl_codebook.__path__, "tl_codebook."):
        if info.name.endswith("__main__") or (".triton_" in info.name and importlib.util.find_spec("triton") is None):
            continue
        module = importlib.import_module(info.name)
        yield from (test for test in finder.find(module) if test.examples)


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.name.removeprefix("tl_codebook."))
def test_example(example, tmp_path, capsys):
    needs_model = any("model" in e.source or "load_hf" in e.source for e in example.examples)
    example.globs |= {"torch": torch, "tmp_path": tmp_path} | ({"model": make_host("native")} if needs_model else {})
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    result = runner.run(example, clear_globs=False)
    assert result.failed == 0, capsys.readouterr().out
