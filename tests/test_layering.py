"""Who may import whom, and what may stand nowhere. Every rule is also shown a page that breaks it."""

import ast
import re
import subprocess
import sys
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

from fastdmd.methods import METHODS
from fastdmd.models.families import FAMILIES

REPOSITORY = Path(__file__).parent.parent
KERNELS = REPOSITORY / "kernels"
FILE_LINES, FUNCTION_LINES = 400, 60


def pages_of(root: Path, package: str) -> dict[str, str]:
    """Return the text of each file of a package by its module's name."""
    return {
        ".".join(path.relative_to(root).with_suffix("").parts): path.read_text(encoding="utf-8")
        for path in sorted((root / package).rglob("*.py"))
    }


PAGES = pages_of(REPOSITORY, "fastdmd") | pages_of(KERNELS, "fastdmd_kernels")
BENCH = pages_of(REPOSITORY, "bench")  # held to the sizes alone
TESTS = pages_of(REPOSITORY, "tests")  # held to the size of a file alone


def under(name, *packages):
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def from_import(module, node):
    """Return the full names of `from a import b, c` in a module: a, a.b and a.c."""
    package = module.split(".")[: -node.level] if node.level else []
    name = ".".join([*package, *([node.module] if node.module else [])])
    return [name, *(f"{name}.{alias.name}" for alias in node.names)]


def imported(module, text):
    """Yield the full names that a page imports, wherever it does: `from a import b` gives a and a.b."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from from_import(module, node)


def kernels_import_torch_only(module, text):
    allowed = ("torch", "triton", "fastdmd_kernels", *sys.stdlib_module_names)
    if under(module, "fastdmd_kernels"):
        yield from (name for name in imported(module, text) if not under(name, *allowed))


def methods_are_mathematics(module, text):
    others = [
        f"fastdmd.{name}" for name in ("models", "train", "config", "optim", "parallel", "checkpoint", "cli")
    ]
    if under(module, "fastdmd.methods"):
        yield from (name for name in imported(module, text) if under(name, "torch.distributed", *others))


def models_know_no_method(module, text):
    if under(module, "fastdmd.models"):
        yield from (name for name in imported(module, text) if under(name, "fastdmd.methods"))


OWNED = "|".join(
    # wan2.1 is called Wan, and flow is a word of its own but for the method's name in quotes
    [re.sub(r"[\d.]+$", r"[\\d.]*", name) for name in FAMILIES] + [name for name in METHODS if name != "flow"]
)


def families_and_methods_are_named_by_their_owners(module, text):
    """Let the loop and the configuration ask what a family or a method can do, never which one it is."""
    if under(module, "fastdmd.config", "fastdmd.train"):
        yield from (match.group() for match in re.finditer(rf"(?i)\b({OWNED})\b|(['\"])flow\2", text))
        owners = {method.__module__ for method in METHODS.values()}
        owners |= {type(family).__module__.rpartition(".")[0] for family in FAMILIES.values()}
        yield from (name for name in imported(module, text) if under(name, *owners))


def libraries_of_models_stay_there(module, text):
    if not under(module, "fastdmd.models", "fastdmd.encode"):
        yield from (
            name for name in imported(module, text) if under(name, "diffusers", "transformers", "peft")
        )


def environment_is_read_in_three_places(module, text):
    names = ("os.environ", "os.getenv", "os.putenv")
    if not under(module, "fastdmd.cli", "fastdmd.parallel", "fastdmd_kernels.dispatch"):
        yield from (name for name in imported(module, text) if under(name, *names))
        attributes = (ast.unparse(n) for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Attribute))
        yield from (name for name in attributes if name in names)


def files_are_short(module, text):
    lines = text.count("\n")
    if lines > FILE_LINES:
        yield f"{lines} lines"


def functions_are_short(module, text):
    """From the decorator on; of a kernel, whose pointers and strides have a line each, only the body."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            is_kernel = any("triton.jit" in ast.unparse(each) for each in node.decorator_list)
            first = node.body[0] if is_kernel else [*node.decorator_list, node][0]
            lines = node.end_lineno - first.lineno + 1
            if lines > FUNCTION_LINES:
                yield f"{node.name}: {lines} lines"


def nothing_is_pickled(module, text):
    yield from (
        name for name in imported(module, text) if under(name, "pickle", "dill", "cloudpickle", "torch.load")
    )
    for call in calls(ast.parse(text)):
        if under(call, "pickle") or call in ("torch.load", "torch.save"):
            yield call


def no_option_has_a_second_default(module, text):
    """Keep defaults in their dataclasses: no getattr(config, "x", 1), no config.get("x", 1)."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and (
            (ast.unparse(node.func) == "getattr" and len(node.args) == 3)
            or (ast.unparse(node.func).endswith("config.get") and len(node.args) == 2)
        ):
            yield ast.unparse(node)


def nothing_is_swallowed(module, text):
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ExceptHandler):
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            if any(kind is None or ast.unparse(kind) in ("Exception", "BaseException") for kind in kinds):
                yield f"except in line {node.lineno}"
            elif all(isinstance(statement, ast.Pass) for statement in node.body):
                yield f"pass in line {node.lineno}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
            kinds = {ast.unparse(kind) for kind in node.args}
            yield from (f"suppress({kind})" for kind in kinds & {"Exception", "BaseException"})


# each with pages that break it, (module, text)
RULES = {
    kernels_import_torch_only: [
        ("fastdmd_kernels.losses.api", "from fastdmd.denoiser import guide"),
        ("fastdmd_kernels.__init__", "def f():\n    import numpy.linalg"),
    ],
    methods_are_mathematics: [
        ("fastdmd.methods.dmd", "from fastdmd import optim"),
        ("fastdmd.methods.dmd", "import torch.distributed as dist"),
        ("fastdmd.methods.dmd", "from ..models.wan.net import Wan"),
        ("fastdmd.methods.__init__", "from torch import distributed"),
        ("fastdmd.methods.__init__", "from .. import train"),
    ],
    families_and_methods_are_named_by_their_owners: [
        ("fastdmd.config.schema", 'family: Literal["wan2.1", "x"]'),
        ("fastdmd.config.checks", "# SDXL has no frames"),
        ("fastdmd.config.checks", "'name encoded folders, or use dmd'"),
        ("fastdmd.config.checks", "is_flow = config.method.name == 'flow'"),
        ("fastdmd.config.checks", "from fastdmd.methods import flow"),
        ("fastdmd.config.schema", "from fastdmd.models.wan.layers import Block"),
        ("fastdmd.train", "is_dcm = isinstance(run.method, DCM)"),
    ],
    models_know_no_method: [("fastdmd.models.wan.net", "from fastdmd.methods.dmd import DMD")],
    libraries_of_models_stay_there: [
        ("fastdmd.data.world", "from diffusers import WanPipeline"),
        ("fastdmd.methods.dmd", "import transformers.models"),
        ("fastdmd.train", "import peft"),
    ],
    environment_is_read_in_three_places: [
        ("fastdmd.train", "import os\nrank = os.environ['RANK']"),
        ("fastdmd.train", "from os import environ"),
        ("fastdmd.train", "import os\nos.getenv('RANK')"),
    ],
    files_are_short: [("fastdmd.train", "\n" * (FILE_LINES + 1))],
    functions_are_short: [
        ("fastdmd.train", "def f():\n" + "    pass\n" * FUNCTION_LINES),
        ("fastdmd.train", "class A:\n  async def f():\n" + "    pass\n" * FUNCTION_LINES),
        ("fastdmd.train", "@torch.no_grad()\ndef f():\n" + "    pass\n" * (FUNCTION_LINES - 1)),
        ("fastdmd_kernels.vsa", "@triton.jit\ndef f():\n" + "    pass\n" * (FUNCTION_LINES + 1)),
    ],
    nothing_is_pickled: [
        ("fastdmd.checkpoint", "import torch\ntorch.load('x')"),
        ("fastdmd.checkpoint", "from pickle import dump"),
    ],
    no_option_has_a_second_default: [
        ("fastdmd.evaluation.evaluate", "w = getattr(run.config.method, 'guidance', 1.0)"),
        ("fastdmd.evaluation.evaluate", "w = self.config.get('guidance', 1.0)"),
    ],
    nothing_is_swallowed: [
        ("fastdmd.train", "try:\n    f()\nexcept:\n    raise"),
        ("fastdmd.train", "try:\n    f()\nexcept (ValueError, Exception) as e:\n    print(e)"),
        ("fastdmd.train", "try:\n    f()\nexcept ValueError:\n    pass"),
        ("fastdmd.train", "with contextlib.suppress(Exception):\n    f()"),
    ],
}


SIZES = {files_are_short: PAGES | BENCH | TESTS, functions_are_short: PAGES | BENCH}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_code_keeps_the_rule(rule):
    found = {module: list(rule(module, text)) for module, text in SIZES.get(rule, PAGES).items()}
    assert {module: broken for module, broken in found.items() if broken} == {}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_rule_can_be_broken(rule):
    for module, text in RULES[rule]:
        assert list(rule(module, text)), text


def test_all_pages_are_read():
    some = {"fastdmd.cli", "fastdmd.methods.__init__", "fastdmd.models.wan.net", "fastdmd_kernels.losses.api"}
    assert some <= set(PAGES)
    assert "bench.report" in BENCH
    assert {"tests.test_layering", "tests.kernels.conftest"} <= set(TESTS)


def imports(pages: Mapping[str, str]) -> dict[str, set[str]]:
    """Return which modules of some pages each one imports: inside functions too, and for types alone.

    `from package import name` is an import of the submodule where there is one of that name, else of the
    package.
    """
    modules = {name.removesuffix(".__init__") for name in pages}
    graph = {}
    for name, text in pages.items():
        found = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom):
                package, *names = from_import(name, node)
                found |= {each if each in modules else package for each in names}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
        graph[name.removesuffix(".__init__")] = found & modules
    return graph


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Return modules that import one another in a circle, the first again at the end; [] without a circle."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as e:
        return list(reversed(e.args[1]))  # which names each before its importer
    return []


def test_no_imports_go_in_a_circle():
    """A circle would make the order of imports matter, and a page unreadable by itself."""
    graph = imports(PAGES)
    assert "fastdmd.train" in graph["fastdmd.cli"]  # imported inside a function
    assert circle(graph) == []


CIRCLES = [
    {"a.b": "import a.c", "a.c": "from a.b import f"},
    {"a.b": "from a import c", "a.c": "def f():\n    from a.b import g"},
    {"a.b": "from . import c", "a.c": "if TYPE_CHECKING:\n    from .b import B"},
    {"a.__init__": "from a.b import f", "a.b": "from a import g"},
    {"a.b": "from a.c import f", "a.c": "from a.d import f", "a.d": "from a.b import f", "a.e": ""},
]


@pytest.mark.parametrize("pages", CIRCLES)
def test_a_circle_is_seen(pages):
    found = circle(imports(pages))
    assert len(found) >= 3
    assert found[0] == found[-1]
    assert all(b in imports(pages)[a] for a, b in pairwise(found))


def test_a_submodule_is_not_its_package():
    pages = {
        "a.__init__": "from a.b import f",
        "a.b": "from a import c\nimport torch",
        "a.c": "from torch import nn",
    }
    assert imports(pages) == {"a": {"a.b"}, "a.b": {"a.c"}, "a.c": set()}
    assert circle(imports(pages)) == []


def calls(tree):
    """Return what is called anywhere under a node, as it is written."""
    return [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def function(module, name):
    [found] = [
        n for n in ast.walk(ast.parse(PAGES[module])) if isinstance(n, ast.FunctionDef) and n.name == name
    ]
    return found


def test_from_the_command_line_to_the_loss_in_four_files_and_three_calls():
    """cli.py -> train.py -> methods/dmd.py -> losses.py."""
    assert "fastdmd.train" in imported("fastdmd.cli", PAGES["fastdmd.cli"])
    assert "trainer.train" in calls(function("fastdmd.cli", "train"))
    assert "take_step" in calls(function("fastdmd.train", "train"))
    assert "run.method.loss" in calls(function("fastdmd.train", "take_step"))
    assert "fastdmd_kernels.dmd_loss" in imported("fastdmd.methods.dmd", PAGES["fastdmd.methods.dmd"])
    assert "dmd_loss" in calls(function("fastdmd.methods.dmd", "loss"))
    assert function("fastdmd_kernels.losses.api", "dmd_loss")


def runs(text, length=6):
    """Every run of lines that say something, as they are written."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return {tuple(lines[i : i + length]) for i in range(len(lines) - length + 1)}


def test_sid_repeats_nothing_of_dmd():
    dmd, sid = PAGES["fastdmd.methods.dmd"], PAGES["fastdmd.methods.sid"]
    assert runs(dmd) & runs(sid) == set()
    assert runs(dmd) & runs(f"{sid}\n{dmd}")  # a copy would be seen


def test_the_kernels_folder_is_no_package():
    """It would shadow Hugging Face's package `kernels` for whoever starts Python in the repository."""
    assert not (KERNELS / "__init__.py").exists()


def test_the_kernels_import_alone_and_without_triton():
    code = """
import sys
for name in ("triton", "fastdmd", "diffusers", "transformers"):
    sys.modules[name] = None  # to import it is an ImportError
sys.path.insert(0, sys.argv[1])
from fastdmd_kernels import *
import fastdmd_kernels
assert fastdmd_kernels.__file__.startswith(sys.argv[1])
assert guide(1.0, 2.0, 3.0) == 4.0
"""
    subprocess.run([sys.executable, "-I", "-c", code, str(KERNELS)], check=True)
