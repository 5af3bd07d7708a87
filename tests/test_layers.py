"""Imports run one way, and each outside library is imported only where the design says."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# package -> our packages that its files may import (besides itself)
MAY_IMPORT: dict[str, set[str]] = {
    "models": set(),
    "calibration": {"models"},
    "quant": {"models", "calibration"},
    "reap": {"models", "calibration"},
    "runtime": {"models", "calibration", "quant"},
    "evals": {"models", "calibration", "quant", "runtime", "reap"},  # it reads plans and saliency
    "cli": {"models", "calibration", "quant", "reap", "runtime", "evals"},
}

# outside library -> folders or files that may import it; nothing else may
ONLY_IN: dict[str, tuple[str, ...]] = {
    "click": ("cli/",),
    "rich": ("cli/",),
    "triton": ("quant/kernels/", "runtime/kernels/", "models/kernels/", "reap/kernels/"),
    "transformers": (
        "models/",
        "calibration/",
        "reap/score.py",
        "quant/whole_model.py",
        "runtime/",
    ),
    "datasets": ("calibration/", "quant/whole_model.py"),
    "huggingface_hub": ("models/location.py", "calibration/", "cli/publish.py"),
    "llmcompressor": ("quant/whole_model.py",),
    "compressed_tensors": ("quant/",),
    "lm_eval": ("evals/lm_harness.py",),
    "matplotlib": ("evals/pictures.py",),
    "accelerate": ("runtime/placement.py",),
    "numba": ("runtime/vector_code.py",),
    "llvmlite": ("runtime/vector_code.py",),
    "vllm": (),
}


def product_files() -> list[Path]:
    return sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))


@cache
def imports(path: Path) -> tuple[tuple[int, str], ...]:
    """Line and top-level name of every import, those inside functions included."""
    return tuple(found(path))


def found(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            yield node.lineno, (node.module or "").split(".")[0]


def at(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def test_there_is_something_to_check() -> None:
    assert len(product_files()) > 30


def test_our_packages_import_one_way() -> None:
    wrong = []
    for path in product_files():
        package = path.relative_to(ROOT).parts[0]
        allowed = {package, *MAY_IMPORT[package]}
        wrong += [
            f"{at(path, line)} imports {name}"
            for line, name in imports(path)
            if name in MAY_IMPORT and name not in allowed
        ]
    assert wrong == []


@pytest.mark.parametrize("library", ONLY_IN)
def test_library_is_imported_where_the_design_says(library: str) -> None:
    wrong = [
        at(path, line)
        for path in product_files()
        if not path.relative_to(ROOT).as_posix().startswith(ONLY_IN[library] or ("-",))
        for line, name in imports(path)
        if name == library
    ]
    assert wrong == []


def test_product_imports_no_tests_or_benchmarks() -> None:
    wrong = [
        at(path, line)
        for path in product_files()
        for line, name in imports(path)
        if name in ("tests", "benchmarks", "demo", "pytest")
    ]
    assert wrong == []


def test_packages_are_plain() -> None:
    """An `__init__.py` holds a docstring and nothing else."""
    for package in MAY_IMPORT:
        tree = ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8"))
        assert [type(node) for node in tree.body] == [ast.Expr], package
        assert ast.get_docstring(tree), package


def test_no_file_is_named_for_leftovers() -> None:
    bad = {"utils", "util", "common", "helpers", "misc"}
    assert [path for path in product_files() if path.stem in bad] == []
