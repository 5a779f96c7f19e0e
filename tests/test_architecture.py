"""The house rules that a reader relies on: who imports whom, and that kernels stay apart."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A module may import these of ours, and no others. The order is the reading order: an arrow never points to a later file.
ARROWS = {
    "nf4": {"kernels"},
    "double_quant": {"kernels"},
    "linear4bit": {"nf4", "double_quant", "kernels"},
    "lora": set(),
    "qlora": {"nf4", "linear4bit", "lora"},
    "falcon": set(),
    "load": {"nf4", "linear4bit", "falcon", "qlora"},
    "data": set(),
    "optim": set(),
    "progress": set(),
    "train": {"data", "progress"},
    "generate": {"fast_decode"},    # on its `is_cuda` line alone, as nf4 takes its kernel; a test below keeps it off the top
    "plan": {"falcon", "activations"},
    "activations": {"falcon"},
    "fast_product": {"lora", "kernels"},
    "fast": {"falcon", "lora", "fast_product", "kernels"},
    "fast_loss": {"falcon", "fast", "kernels"},
    "fast_decode": {"falcon", "generate", "lora", "kernels"},
    "parallel": {"qlora", "train"},
}


def imports(path):
    """Names that a module imports, with whether the import stands at the top level: [('minqlora.nf4', True), ...]."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                yield node.module, id(node) in top
            elif node.module:
                yield f"minqlora.{node.module}", id(node) in top
            else:
                yield from ((f"minqlora.{alias.name}", id(node) in top) for alias in node.names)


def ours(path):
    return {name.split(".")[1] for name, _ in imports(path) if name.startswith("minqlora.")}


@pytest.mark.parametrize("module", [path.stem for path in sorted((ROOT / "minqlora").glob("*.py")) if path.stem != "__init__"])
def test_a_module_imports_only_what_the_reading_order_allows(module):
    assert module in ARROWS, f"{module}.py has no place in the reading order yet"
    extra = ours(ROOT / "minqlora" / f"{module}.py") - ARROWS[module]
    assert not extra, f"{module}.py imports {sorted(extra)}"


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda path: path.stem)
def test_a_kernel_knows_torch_and_triton_alone(path):
    allowed = {"torch", "triton", "minqlora"} | set(sys.stdlib_module_names)
    assert {name.split(".")[0] for name, _ in imports(path)} <= allowed
    assert ours(path) <= {"kernels"}


def test_triton_is_imported_only_where_a_kernel_is_launched():
    for path in (ROOT / "minqlora").glob("*.py"):
        for name, at_top in imports(path):
            assert not name.startswith("triton"), f"{path.name} imports triton itself"
            assert not (at_top and name.startswith("minqlora.kernels")), f"{path.name} imports kernels at its top"


def test_sampling_takes_its_pair_for_a_gpu_only_where_there_is_one():
    assert ("minqlora.fast_decode", False) in set(imports(ROOT / "minqlora" / "generate.py"))
    assert not {name for name, at_top in imports(ROOT / "minqlora" / "generate.py") if at_top and name.startswith("minqlora")}


def test_importing_minqlora_does_not_import_triton():
    # In a process of its own: the other tests load Triton's interpreter.
    code = "import sys, minqlora; assert 'triton' not in sys.modules, 'triton was imported'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT / "tests")
