"""What `import tl_codebook` brings, and what it does not."""

import ast
import builtins
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tl_codebook
from tl_codebook import errors

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ["torch", "transformer_lens", "transformers", "datasets", "accelerate", "circuitsvis", "networkx", "triton"]
PUBLIC = tl_codebook.__all__


def in_fresh_python(program):
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("statement", "brings"),
    [
        ("import tl_codebook; dir(tl_codebook); tl_codebook.__version__", []),
        ("import tl_codebook.names, tl_codebook.errors; tl_codebook.Code.parse('L5.z.2:88')", []),
        ("import tl_codebook.codebook, tl_codebook; tl_codebook.Codebook", ["torch"]),
    ],
)
def test_an_import_brings_no_more_than_it_needs(statement, brings):
    assert in_fresh_python(f"import json, sys\n{statement}\nprint(json.dumps([m for m in {HEAVY} if m in sys.modules]))") == brings


def test_the_public_names():
    assert sorted(PUBLIC) == PUBLIC
    assert len(set(PUBLIC)) == len(PUBLIC)
    assert set(tl_codebook._HOME) == set(PUBLIC)
    assert {"Code", "Codebook", "CodebookConfig", "attach", "ban_code", "detach", "force_code", "patch_codes", "steer"} <= set(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_each_public_name_is_the_one_of_its_module(name):
    value = getattr(tl_codebook, name)
    home = sys.modules[f"tl_codebook.{tl_codebook._HOME[name]}"]
    assert value is getattr(home, name)
    assert value.__module__.startswith(home.__name__)
    assert name in home.__all__
    assert value.__doc__


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(tl_codebook.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {alias.asname or alias.name: node.module for node in block.body for alias in node.names}
    assert seen == {name: f"tl_codebook.{home}" for name, home in tl_codebook._HOME.items()}


def test_dir_lists_the_public_names():
    assert set(PUBLIC) <= set(dir(tl_codebook))
    assert dir(tl_codebook) == sorted(dir(tl_codebook))
    assert in_fresh_python(f"import json, tl_codebook\nprint(json.dumps(sorted(set({PUBLIC}) - set(dir(tl_codebook)))))") == []


def test_an_unknown_name_is_an_attribute_error():
    for name in ("atach", "_secret", "forward"):
        with pytest.raises(AttributeError, match=f"module 'tl_codebook' has no attribute '{name}'"):
            getattr(tl_codebook, name)
    with pytest.raises(ImportError, match="atach"):
        exec("from tl_codebook import atach")


def test_a_star_import_brings_the_public_names():
    space = {}
    exec("from tl_codebook import *", space)
    assert set(space) - {"__builtins__"} == set(PUBLIC)


def test_no_submodule_has_a_public_name():
    """Importing a submodule sets it as an attribute of the package, over a function of the same name."""
    modules = {info.name for info in pkgutil.iter_modules(tl_codebook.__path__)}
    assert {"names", "codebook", "attachment"} <= modules
    assert not modules & set(PUBLIC)


def test_attach_is_the_function_whatever_is_imported_first():
    program = f"""
import importlib, json, sys, types
order = ["attachment", "interventions", "steering", "names", "codebook"]
found = []
for names in (order, order[::-1]):
    for module in [module for module in sys.modules if module.split(".")[0] == "tl_codebook"]:
        del sys.modules[module]
    modules = {{name: importlib.import_module("tl_codebook." + name) for name in names}}
    import tl_codebook
    found += [name for name in {PUBLIC} if isinstance(getattr(tl_codebook, name), types.ModuleType)]
    found += [tl_codebook.attach is modules["attachment"].attach, tl_codebook.steer is modules["steering"].steer]
print(json.dumps(found))
"""
    assert in_fresh_python(program) == [True, True, True, True]


TREE = dict(re.findall(r"[├└]── (\w+) +(\w+)", errors.__doc__))
EXCEPTIONS = [name for name in errors.__all__ if isinstance(getattr(errors, name), type)]


def test_the_exception_tree_in_the_docstring_is_complete():
    assert errors.__all__ == sorted(errors.__all__)
    public = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert public == set(EXCEPTIONS)
    warnings = {name for name in EXCEPTIONS if issubclass(getattr(errors, name), Warning)}
    assert set(TREE) == set(EXCEPTIONS) - warnings - {"CodebookError"}
    assert all(issubclass(getattr(errors, name), UserWarning) for name in warnings)


@pytest.mark.parametrize("name", TREE)
def test_each_exception_is_also_the_builtin_that_people_catch(name):
    kind, builtin = getattr(errors, name), getattr(builtins, TREE[name])
    assert issubclass(kind, errors.CodebookError)
    assert issubclass(kind, builtin)
    assert not issubclass(kind, KeyError)  # its message prints escaped
    assert kind.__doc__
    message = "what was asked.\nWhat is true, what to do."
    for caught in (errors.CodebookError, builtin):
        with pytest.raises(caught) as raised:
            raise kind(message)
        assert str(raised.value) == message
