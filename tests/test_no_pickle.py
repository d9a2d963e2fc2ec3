"""No file of the project can run code that a file hands it: nothing unpickles, evaluates or instantiates by name."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "torch.serialization"}
BUILTINS = {"eval", "exec", "__import__"}
# Functions that read or write pickles, or build what a name in data says. `save` too: its files ask for a `load`.
FUNCTIONS = {
    "torch.save",
    "torch.load",
    "torch.jit.load",
    "torch.hub.load",
    "torch.hub.load_state_dict_from_url",
    "torch.package.PackageImporter",
    "torch.distributed.checkpoint.load",
    "numpy.save",
    "numpy.savez",
    "pandas.read_pickle",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "hydra.utils.instantiate",
    "hydra.utils.call",
    "hydra.utils.get_class",
    "hydra.utils.get_method",
    "hydra.utils.get_object",
}


def dotted(node: ast.AST, aliases: dict[str, str]) -> str | None:
    """The full name of `a.b.c`, with what `a` was imported as."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        base = dotted(node.value, aliases)
        return None if base is None else f"{base}.{node.attr}"
    return None


def imported_names(tree: ast.AST) -> dict[str, str]:
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                aliases[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return aliases


def findings(source: str) -> Iterator[str]:
    """Name every forbidden import, use and argument in a program."""
    tree = ast.parse(source)
    aliases = imported_names(tree)
    for node in ast.walk(tree):
        names: list[str | None] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Attribute | ast.Name):
            names = [dotted(node, aliases)]
        elif isinstance(node, ast.keyword):
            if node.arg == "allow_pickle" and not (isinstance(node.value, ast.Constant) and node.value.value is False):
                yield f"line {node.value.lineno}: allow_pickle"
            if node.arg == "weights_only":
                yield f"line {node.value.lineno}: weights_only belongs to torch.load"
        for name in names:
            is_builtin = isinstance(node, ast.Name) and name in BUILTINS
            if name is not None and (name in FUNCTIONS or name in MODULES or is_builtin):
                yield f"line {node.lineno}: {name}"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "from _pickle import loads",
        "import os, marshal",
        "def f():\n    import shelve",
        "import torch\ntorch.load('x')",
        "import torch as t\nt.load('x')",
        "from torch import load\nload('x')",
        "from torch import save as keep",
        "import torch\nread = torch.load",
        "import torch.serialization",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import numpy as np\nnp.load('x', allow_pickle=maybe)",
        "import numpy as np\nnp.save('x', y)",
        "eval('1')",
        "[exec][0]('1')",
        "__import__('pickle')",
        "from hydra.utils import instantiate",
        "import hydra\nhydra.utils.instantiate(config)",
        "import yaml\nyaml.load('x')",
    ],
)
def test_what_is_forbidden_is_found(source: str) -> None:
    assert list(findings(source))


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "import triton.language as tl\ntl.load(p)",
        "import torch\nx = torch.zeros(1)\nstate.save(path)",
        "import numpy as np\nnp.load('x')\nnp.load('x', allow_pickle=False)",
        "import json\njson.load(file)",
        "import yaml\nyaml.safe_load(file)",
        "import re\nre.compile('x')",
        "from safetensors.torch import save_file, load_file",
    ],
)
def test_what_is_allowed_is_not(source: str) -> None:
    assert not list(findings(source))


def test_no_file_of_the_project_does_any_of_it() -> None:
    paths = [
        path
        for folder in ("kernels", "neurogen", "scripts", "benchmarks", "tests")
        for path in (ROOT / folder).rglob("*.py")
    ]
    assert len(paths) > 10
    found = [
        f"{path.relative_to(ROOT)} {finding}"
        for path in paths
        for finding in findings(path.read_text(encoding="utf-8"))
    ]
    assert not found, found
