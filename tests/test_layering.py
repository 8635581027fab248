"""Imports point down only, modules stay short, and the distribution holds every package."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

MAY_IMPORT = {
    "configs": {"configs"},
    "tokenizer": {"tokenizer", "configs"},
    "prior": {"prior", "configs"},
    "pipelines": {"pipelines", "tokenizer", "prior", "configs"},
    "scripts": {"pipelines", "tokenizer", "prior", "configs"},
}
"""For each layer, the layers of this repository that it may import."""

ONLY_ABOVE_THE_MODELS = {"accelerate", "datasets", "wandb"}
NAMES_OF_NO_IDEA = {"utils", "util", "helpers", "helper", "common", "misc", "shared", "tools"}
MAX_LINES = 300

MODULES = sorted(path for layer in MAY_IMPORT for path in (ROOT / layer).rglob("*.py"))


def imported_modules(source: str, package: str) -> set[str]:
    """Dotted names of all modules that `source`, a module of `package`, imports anywhere, relative ones resolved."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            names.add(".".join([*parents, *([node.module] if node.module else [])]))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "importlib.import_module"):
            names |= {str(a.value) for a in node.args[:1] if isinstance(a, ast.Constant)}
    return names


def top_level_imports(path: Path) -> set[str]:
    package = ".".join(path.relative_to(ROOT).parent.parts)
    return {name.partition(".")[0] for name in imported_modules(path.read_text(), package)}


def each_module(function):
    return pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))(function)


def test_the_scan_sees_every_form_of_import():
    source = """
import torch.nn as nn, os
from configs.layout import CodeLayout
from . import base
from ..quantizers.vq import VectorQuantizer

def late():
    if True:
        from prior import GPT
    return importlib.import_module("wandb")
"""
    found = imported_modules(source, "tokenizer.quantizers")
    assert found == {
        "torch.nn",
        "os",
        "configs.layout",
        "tokenizer.quantizers",
        "tokenizer.quantizers.vq",
        "prior",
        "wandb",
    }


def test_the_scan_finds_modules_in_every_layer():
    assert {path.relative_to(ROOT).parts[0] for path in MODULES} == set(MAY_IMPORT)


@each_module
def test_imports_point_down_only(path):
    layer = path.relative_to(ROOT).parts[0]
    ours = top_level_imports(path) & {*MAY_IMPORT, "tests"}
    assert ours <= MAY_IMPORT[layer], f"{layer} may not import {', '.join(sorted(ours - MAY_IMPORT[layer]))}"


@each_module
def test_only_pipelines_and_scripts_know_accelerate_datasets_and_wandb(path):
    if path.relative_to(ROOT).parts[0] not in ("pipelines", "scripts"):
        assert not top_level_imports(path) & ONLY_ABOVE_THE_MODELS


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.py")), ids=lambda path: path.name)
def test_configs_never_imports_torch_directly(path):
    assert not top_level_imports(path) & {"torch", "torchvision"}


@each_module
def test_a_module_is_named_after_an_idea(path):
    assert not NAMES_OF_NO_IDEA & {path.stem, *path.relative_to(ROOT).parts}


@each_module
def test_a_module_has_at_most_300_lines(path):
    assert len(path.read_text().splitlines()) <= MAX_LINES


@each_module
def test_a_module_starts_by_saying_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


def listed_packages() -> list[str]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]


def test_every_listed_package_is_on_disk():
    for package in listed_packages():
        assert (ROOT / package.replace(".", "/") / "__init__.py").is_file(), package


def test_every_package_on_disk_is_listed():
    folders = {path.parent for path in MODULES if path.relative_to(ROOT).parts[0] != "scripts"}
    assert {".".join(folder.relative_to(ROOT).parts) for folder in folders} == set(listed_packages())


def test_every_preset_is_in_the_distribution():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["configs"]
    shipped = {path for pattern in patterns for path in (ROOT / "configs").glob(pattern)}
    assert shipped == set((ROOT / "configs").rglob("*.yaml"))


def test_no_script_hides_an_installed_library():
    # Python puts the folder of a script first on the path: scripts/datasets.py would be what `import datasets` finds.
    imported = set().union(*(top_level_imports(path) for path in MODULES))
    assert not {path.stem for path in (ROOT / "scripts").glob("*.py")} & imported
