"""Test the project's files: what is imported is declared, and CI skips no test for want of a package."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml  # huggingface-hub needs it
from packaging.requirements import Requirement  # pytest needs it

REPOSITORY = Path(__file__).parent.parent
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DISTRIBUTIONS = {"PIL": "pillow"}  # where it is not the module's name
EXTRAS = {"wandb", "torchao"}  # of fastdmd[wandb] and [quant]; what is imported without it says so
# no line imports them: `Tensor.numpy` needs numpy, which torch does not bring; without accelerate peft
# does not import, and diffusers refuses a Wan transformer: an exported student's
OF_OTHERS = {"numpy", "accelerate"}


def names(requirements: list[str]) -> set[str]:
    """Return the names of requirements, without versions, extras and markers."""
    return {re.split(r"[^\w-]", requirement, maxsplit=1)[0] for requirement in requirements}


def imported(folder: Path) -> set[str]:
    """Return the distributions that a folder's files import, wherever they do."""
    modules = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules.add(str(node.module).partition(".")[0])
    ours = {"fastdmd", "fastdmd_kernels"}
    theirs = modules - ours - sys.stdlib_module_names
    return {DISTRIBUTIONS.get(name, name.replace("_", "-")) for name in theirs}


def test_what_is_imported_is_declared_and_nothing_else():
    found = imported(REPOSITORY / "fastdmd") | imported(REPOSITORY / "kernels")
    needed = found - EXTRAS - {"triton"}  # which comes with torch
    assert needed | OF_OTHERS == names(PROJECT["dependencies"])
    assert found & EXTRAS == EXTRAS


def test_diffusers_opens_no_wan_without_accelerate(tmp_path):
    """As long as this holds it is a dependency."""
    code = """
import sys
sys.modules["accelerate"] = sys.modules["peft"] = None  # to import one is an ImportError
from diffusers import WanTransformer3DModel
net = WanTransformer3DModel(
    num_attention_heads=1, attention_head_dim=12, num_layers=1, ffn_dim=8, text_dim=8, freq_dim=8
)
net.save_pretrained(sys.argv[1])
WanTransformer3DModel.from_pretrained(sys.argv[1])
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert "ValueError: `low_cpu_mem_usage` cannot be False" in done.stderr


def test_a_tool_that_judges_is_pinned():
    exact = {name for name in PROJECT["optional-dependencies"]["dev"] if "==" in name}
    assert {"ruff", "pyright"} <= names(sorted(exact))


def test_the_project_s_own_torch_is_installed_first_and_is_one_that_it_takes():
    """Of the newest one a registry may have no build without CUDA."""
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    [own] = re.findall(r"^TORCH \?= (\S+)$", makefile, re.MULTILINE)
    [torch] = [Requirement(line) for line in PROJECT["dependencies"] if line.startswith("torch")]
    assert torch.specifier.contains(own)
    assert makefile.index("$(PIP) torch==$(TORCH)\n") < makefile.index("$(PIP) --editable .\n")


def ci() -> list[str]:
    return (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def test_ci_requires_what_tests_would_be_skipped_without():
    command, last = ci()[-2:]
    assert command == 'make test PYTEST="--require=triton,torchao,liger_kernel,tensorboard,wandb"'
    assert last == "make regress"


def test_workflows_run_what_there_is():
    """A push is held to what CI runs here; a GPU's runner to the kernels and their times."""
    found = {}
    for path in sorted((REPOSITORY / ".github" / "workflows").glob("*.yml")):
        [job] = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values()
        found[path.stem] = [step["run"] for step in job["steps"] if "run" in step]
    assert found == {"cpu": [".ci/run"], "gpu": ["make gpu", ".venv/bin/python -m bench.regress --times"]}
    targets = re.findall(r"^(\w+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    made = [line.split()[1] for line in (*ci(), *found["gpu"]) if line.startswith("make ")]
    assert {"test", "regress", "gpu"} == set(made) <= set(targets)
    assert (REPOSITORY / ".ci" / "run").stat().st_mode & 0o100


@pytest.mark.parametrize(("required", "code"), [("json,torch", 0), ("json,no_such_module", 4)])
def test_a_required_module_that_is_missing_stops_the_tests(required, code):
    command = ["-m", "pytest", "-q", f"--require={required}", "--collect-only", "tests/test_rng.py"]
    done = subprocess.run([sys.executable, *command], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    assert ("--require=no_such_module: No module named" in done.stderr) == (code == 4)
