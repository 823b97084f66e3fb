"""The imports of every file keep to the layers of CONTRIBUTING.md, found by walking its syntax."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What each library file may import besides torch and the standard library. A row is written in
# full: what is not in it is forbidden.
LIBRARY: dict[str, set[str]] = {
    "_schemas": set(),
    "_partials": set(),
    "special": set(),
    "reference": {"_schemas", "_partials", "special", "reference"},
    "triton": {"_schemas", "special", "triton", "<triton>"},
    "_backends": {"_schemas", "special", "reference", "triton"},
    "_ops": {"_schemas", "_backends"},
    "autograd": {"_partials", "special", "_ops"},
    "_checks": {"_schemas", "special"},
    "functional": {"_schemas", "_checks", "special", "reference", "autograd", "functional"},
    "distributions": {"_checks", "special", "functional", "distributions"},
    "proxy_loss": {"_checks", "functional"},
    "losses": {"_schemas", "_checks", "special", "functional", "proxy_loss"},
    "distributed": {"_checks", "_partials", "functional", "proxy_loss", "losses", "distributed"},
    "__main__": {"_backends"},
}
LIBRARY["__init__"] = LIBRARY.keys() - {"__main__", "triton"}
CALLS_OPS = {"_backends", "_ops", "autograd", "functional"}
USERS = ("train", "benchmarks", "examples")

# C++ that knows torch; every other file in csrc compiles without it.
TORCH_CPP = {"checks.h", "parallel.h"}
TORCH_CPP |= {"registration.h", "registration_cpu.cpp", "registration_cuda.cpp"}


def imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Dotted names of all imports, wherever they stand, import_module("...") included."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                parents = package.split(".")[: len(package.split(".")) - level + 1] if level else []
                base = ".".join([*parents, *([module] if module else [])])
                yield from (f"{base}.{alias.name}" for alias in names)
            case ast.Call(
                func=ast.Name(id=called) | ast.Attribute(attr=called),
                args=[ast.Constant(value=str(name)), *_],
            ) if called in ("import_module", "__import__"):
                yield name


def attributes(tree: ast.AST) -> set[str]:
    """Every dotted expression, such as torch.ops.nivmf_fast."""
    return {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def library_layer(path: str) -> str:
    return Path(path).parts[1].removesuffix(".py")


def broken_rules(path: str, source: str) -> list[str]:
    """What the Python file at `path` (relative to the checkout) imports against the rules."""
    tree = ast.parse(source)
    names = list(imports(tree, ".".join(Path(path).parts[:-1])))
    if not path.startswith("nivmf_fast/"):
        reached = [*names, *(name for name in attributes(tree) if name.startswith("nivmf_fast."))]
        return [
            f"{path} reaches for {name}: only public names of nivmf_fast are for it"
            for name in sorted(set(reached))
            if name.startswith("nivmf_fast.") and re.search(r"\._(?!_version__)", name)
        ]

    layer = library_layer(path)
    if layer not in LIBRARY:
        return [f"{path} is in no layer: give it a row in tests/test_layers.py"]
    broken = []
    for name in names:
        top, _, rest = name.partition(".")
        if top == "nivmf_fast":
            target = rest.partition(".")[0]
            allowed = target in LIBRARY[layer]
        else:
            allowed = (
                top == "torch" or top in sys.stdlib_module_names or f"<{top}>" in LIBRARY[layer]
            )
        if not allowed:
            broken.append(f"{path} may not import {name}")
    uses_ops = {
        name for name in [*names, *attributes(tree)] if re.match(r"torch\.(ops|_C)\b", name)
    }
    if uses_ops and layer not in CALLS_OPS:
        broken.append(f"{path} may not use {min(uses_ops)}")
    return broken


def python_files() -> list[str]:
    folders = ("nivmf_fast", *USERS)
    files = (file for folder in folders for file in (ROOT / folder).rglob("*.py"))
    return sorted(file.relative_to(ROOT).as_posix() for file in files)


def test_the_layers_are_the_files_and_the_table_for_contributors() -> None:
    there = {path.stem for path in (ROOT / "nivmf_fast").iterdir() if has_python(path)}
    assert there == LIBRARY.keys()
    table = (ROOT / "CONTRIBUTING.md").read_text().partition("## Layers")[2].partition("\n## ")[0]
    rows = re.findall(r"^\|(.+?)\|.+?\|(.+?)\|$", table, re.MULTILINE)
    told = {
        name: set(re.findall(r"`(\w+)`", allowed))
        for files, allowed in rows
        for name in re.findall(r"`(\w+)(?:\.py|/)`", files)
    }
    for layer in LIBRARY.keys() - {"__init__"}:
        assert told[layer] == {name.strip("<>") for name in LIBRARY[layer]} - {layer}, layer


def has_python(path: Path) -> bool:
    return path.suffix == ".py" or (path / "__init__.py").is_file()


def test_a_triton_module_is_what_its_name_says() -> None:
    package = ast.parse((ROOT / "nivmf_fast/triton/__init__.py").read_text())
    # only a docstring: no name hides a file
    assert [type(node) for node in package.body] == [ast.Expr]


@pytest.mark.parametrize("path", python_files())
def test_imports_keep_to_the_layers(path: str) -> None:
    assert broken_rules(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize("path", sorted((ROOT / "csrc").iterdir()), ids=lambda path: path.name)
def test_csrc_keeps_kernels_and_torch_apart(path: Path) -> None:
    included = re.findall(r'^\s*#\s*include\s*[<"](.+?)[>"]', path.read_text(), re.MULTILINE)
    if path.name not in TORCH_CPP:
        assert not [name for name in included if name.startswith(("torch/", "ATen/", "c10/"))]
    if path.suffix in (".cu", ".cuh"):
        assert not TORCH_CPP.intersection(included)
    assert "triton" not in path.read_text().lower()


# A file is one subject; the reason for each that is longer than a reader takes in at once.
LONGEST = 400
LONGER = {"csrc/vmf_sampler.cu": "forward and backward share the work of four lanes on a sample"}


def sources() -> list[Path]:
    folders = ("csrc", "nivmf_fast", *USERS)
    files = [
        ROOT / "setup.py",
        *(file for folder in folders for file in (ROOT / folder).rglob("*")),
    ]
    return [file for file in files if file.suffix in (".py", ".h", ".cpp", ".cu", ".cuh")]


def test_no_source_file_is_longer_than_a_subject_needs() -> None:
    lines = {file.relative_to(ROOT).as_posix(): file.read_text().count("\n") for file in sources()}
    assert len(lines) > 50
    assert {name for name, count in lines.items() if count > LONGEST} == LONGER.keys()


def option_parameters(file: Path) -> list[str]:
    """Functions of a file that take an option of log-PPK by itself, not within `Options`."""
    if file.suffix == ".py":
        functions = (n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, FUNCTIONS))
        return [
            f"{file.name}: {getattr(function, 'name', 'lambda')}"
            for function in functions
            if {"exact", "projection"}
            & {a.arg for a in (*function.args.args, *function.args.kwonlyargs)}
        ]
    parameter = r"\bbool (?:exact|projection)\b(?=[^;{}]*\))"
    return [f"{file.name}: {found}" for found in re.findall(parameter, file.read_text())]


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def test_the_options_travel_as_one_value(tmp_path: Path) -> None:
    found = [name for file in sources() for name in option_parameters(file)]
    assert 0 < len(found) <= 12, found
    for name, text in {
        "a.py": "def f(x, *, exact=True): ...",
        "b.h": "int f(int, bool exact);",
    }.items():
        (tmp_path / name).write_text(text)
        assert option_parameters(tmp_path / name)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("nivmf_fast/special.py", "from nivmf_fast import reference"),
        ("nivmf_fast/reference/sampler.py", "from nivmf_fast import _ops"),
        ("nivmf_fast/reference/model.py", "import torch\ntorch.ops.nivmf_kernels.vmf_rsample"),
        ("nivmf_fast/reference/model.py", "import torch\ntorch.ops.load_library('_C_cpu.so')"),
        ("nivmf_fast/reference/model.py", "from nivmf_fast.triton import vmf_sampler"),
        ("nivmf_fast/triton/log_ppk.py", "import torch\ntorch.ops.nivmf_kernels.log_ppk"),
        ("nivmf_fast/triton/log_ppk.py", "from nivmf_fast import _ops"),
        ("nivmf_fast/triton/log_ppk.py", "from .. import reference"),
        ("nivmf_fast/_schemas.py", "from nivmf_fast import special"),
        ("nivmf_fast/_ops.py", "from nivmf_fast import functional"),
        ("nivmf_fast/_ops.py", "from nivmf_fast import reference"),
        ("nivmf_fast/autograd.py", "from nivmf_fast import reference"),
        ("nivmf_fast/functional/vmf.py", "from nivmf_fast.losses import ELNivMFLoss"),
        ("nivmf_fast/functional/vmf.py", "from nivmf_fast.triton import log_ppk"),
        ("nivmf_fast/distributions/kl.py", "from nivmf_fast import losses"),
        ("nivmf_fast/proxy_loss.py", "from nivmf_fast import losses"),
        ("nivmf_fast/losses.py", "from nivmf_fast import distributed"),
        ("nivmf_fast/distributed/group.py", "from nivmf_fast import distributions"),
        ("nivmf_fast/losses.py", "import torch\ntorch.ops.nivmf_fast.vmf_rsample"),
        ("nivmf_fast/losses.py", "from torch import ops"),
        ("nivmf_fast/losses.py", "from torch.ops import nivmf_fast"),
        ("nivmf_fast/losses.py", "from nivmf_fast import vmf_rsample"),
        ("nivmf_fast/losses.py", "from . import _ops"),
        ("nivmf_fast/losses.py", "import triton"),
        ("nivmf_fast/losses.py", "def f():\n    import train.loop"),
        ("nivmf_fast/losses.py", "import importlib\nimportlib.import_module('nivmf_fast._ops')"),
        *(
            ("nivmf_fast/losses.py", f"try:\n    import {package}\nexcept ImportError: pass")
            for package in (
                "timm",
                "torchvision",
                "pytorch_metric_learning",
                "sklearn",
                "faiss",
                "matplotlib.pyplot",
                "tensorboard",
                "wandb",
                "numpy",
            )
        ),
        ("nivmf_fast/utils.py", "import torch"),
        ("train/loop.py", "from nivmf_fast import _ops"),
        ("train/loop.py", "from nivmf_fast._ops import backends"),
        ("train/loop.py", "import nivmf_fast\nnivmf_fast._ops.backends()"),
        ("train/loop.py", "from nivmf_fast.functional import _check"),
        ("benchmarks/cases.py", "import nivmf_fast._ops"),
    ],
)
def test_a_broken_rule_is_found(path: str, source: str) -> None:
    assert broken_rules(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("nivmf_fast/special.py", "import math\nfrom torch import Tensor"),
        (
            "nivmf_fast/_backends.py",
            "import torch\nfrom nivmf_fast import reference\ntorch.ops.x.y",
        ),
        ("nivmf_fast/triton/log_ppk.py", "import triton.language as tl\nfrom . import vmf_sampler"),
        ("nivmf_fast/losses.py", "from nivmf_fast.functional import log_ppk"),
        ("nivmf_fast/losses.py", "from nivmf_fast.proxy_loss import ProxyLoss"),
        ("train/loop.py", "import timm\nimport nivmf_fast\nprint(nivmf_fast.__version__)"),
    ],
)
def test_what_is_allowed_passes(path: str, source: str) -> None:
    assert broken_rules(path, source) == []
