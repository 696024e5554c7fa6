"""The layers, read from the syntax trees: pipeline → stages → store, and nothing backwards."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for layer in ("pipeline", "stages", "store")
    for path in sorted((ROOT / layer).rglob("*.py"))
}
FAMILIES = [name for name in MODULES if name.startswith("stages.families.")]
MODELS = {"transformers", "peft", "diffusers", "nemo", "snac"}


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def imports(module: str) -> Iterator[str]:
    """Every module that a module imports anywhere, type checking included, in absolute form."""
    tree = tree_of(module)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_there_is_something_to_look_at():
    assert {"pipeline.assembly", "stages.rollout", "store.commit"} <= MODULES.keys()
    assert "stages.families.codec_lm" in FAMILIES
    assert "torch" in set(imports("stages.rollout"))


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_downwards_only(module):
    layer = module.split(".")[0]
    above = {"store": {"stages", "pipeline", "torch"}, "stages": {"pipeline"}, "pipeline": set()}
    roots = {name.split(".")[0] for name in imports(module)}
    assert not roots & above[layer]


@pytest.mark.parametrize("module", MODULES)
def test_families_alone_import_model_packages_and_nothing_imports_a_family(module):
    names = set(imports(module))
    if not module.startswith("stages.families"):
        assert not {name.split(".")[0] for name in names} & MODELS
        assert not {name for name in names if name.startswith("stages.families.")}


def test_only_one_module_finds_what_lives_in_families():
    dynamic = [m for m in MODULES if "importlib" in set(imports(m)) and m.startswith("stages")]
    loading = [m for m in dynamic if "stages.families" in MODULES[m].read_text(encoding="utf-8")]
    assert loading == ["stages.family"]


@pytest.mark.parametrize("module", MODULES)
def test_no_module_bears_a_name_of_the_standard_library_or_of_nothing(module):
    parts = set(module.split("."))
    assert not parts & (set(sys.stdlib_module_names) - {"__main__"} - {"__init__"})
    assert not parts & {"utils", "helpers", "common", "misc"}


def formulas(module: str) -> Iterator[str]:
    """Expressions of the form (1 − a)·x + a·y, whatever the order of sum and products."""
    tree = tree_of(module)

    def is_complement(node: ast.expr, of: str) -> bool:
        return (
            isinstance(node, ast.BinOp)
            and isinstance(node.op, ast.Sub)
            and isinstance(node.left, ast.Constant)
            and node.left.value == 1
            and ast.unparse(node.right) == of
        )

    for node in ast.walk(tree):
        if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Add):
            continue
        sides = [side for side in (node.left, node.right) if isinstance(side, ast.BinOp)]
        products = [side for side in sides if isinstance(side.op, ast.Mult)]
        if len(products) == 2:
            factors = [[product.left, product.right] for product in products]
            for ours, theirs in (factors, factors[::-1]):
                if any(is_complement(a, ast.unparse(b)) for a in ours for b in theirs):
                    yield ast.unparse(node)


def test_the_formula_of_guidance_stands_in_one_place():
    found = {module: list(formulas(module)) for module in MODULES}
    assert found.pop("stages.guidance") == [
        "(1.0 - scale) * _single(uncond) + scale * _single(cond)"
    ]
    # A blend of a cosine schedule is no guidance; nothing else may look like it.
    assert [m for m, expressions in found.items() if any("cond" in e for e in expressions)] == []
    users = {m for m in MODULES if "stages.guidance.guide" in set(imports(m))}
    # Where branches are mixed: while decoding, on the way into a store, out of it, and for the eye.
    elsewhere = {"stages.reduction", "stages.targets", "pipeline.stored_rows"}
    elsewhere |= {"stages.diffusion.parts", "stages.diffusion.row_targets"}
    decoding = {"stages.modules.guided"}
    assert users - set(FAMILIES) == elsewhere | decoding


@pytest.mark.parametrize("module", MODULES)
def test_nothing_catches_everything_and_nothing_prints(module):
    tree = tree_of(module)
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{module}:{node.lineno}"
            caught = ast.unparse(node.type)
            reraises = any(
                isinstance(inner, ast.Raise) and inner.exc is None for inner in ast.walk(node)
            )
            assert caught != "Exception", f"{module}:{node.lineno}"
            assert caught != "BaseException" or reraises, f"{module}:{node.lineno}"
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) != "print", f"{module}:{node.lineno}"


@pytest.mark.parametrize("module", MODULES)
def test_nothing_unpickles(module):
    tree = tree_of(module)
    names = set(imports(module)) - {"pickle", "pickle.UnpicklingError"}  # to catch it, not to read
    assert not {name.split(".")[0] for name in names} & {"pickle", "dill", "joblib", "shelve"}
    used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert {name for name in used if name.startswith("pickle.")} <= {"pickle.UnpicklingError"}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    called = {ast.unparse(call.func) for call in calls}
    assert not called & {"np.load", "numpy.load", "yaml.load", "eval", "exec"}
    for call in (call for call in calls if ast.unparse(call.func) == "torch.load"):
        # What others publish are pickles: two readers take nothing of them but tensors.
        assert module in {"stages.families.weights", "stages.families.magpie_checkpoint"}
        assert "weights_only=True" in {ast.unparse(keyword) for keyword in call.keywords}


def test_configuration_store_and_command_line_come_without_torch():
    script = (
        "import sys; import store, store.synthetic, stages.config, pipeline.config, pipeline.cli;"
        "sys.exit('torch' in sys.modules)"
    )
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_tests_are_flat():
    # The one package: a dependency of NeMo's installs another `tests`, which would come first.
    assert list((ROOT / "tests").rglob("__init__.py")) == [ROOT / "tests" / "__init__.py"]
    folders = {ROOT / "tests", ROOT / "tests" / "faults"}
    assert {path.parent for path in (ROOT / "tests").rglob("test_*.py")} == folders
