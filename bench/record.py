"""A line of results: what was measured, on what, with what, from which commit."""

import importlib
import json
import platform
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from fastdmd_kernels import dispatch

REPOSITORY = Path(__file__).parent.parent
PACKAGES = ("torch", "triton", "diffusers", "torchao", "xformers", "pytest-benchmark")
NAMES = {"float32": "fp32", "mixed": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    return models[0].strip() if models else platform.processor() or platform.machine()


def file_name(device: torch.device) -> str:
    """Return the device's name as that of a file: nvidia-h200.jsonl."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-") + ".jsonl"


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git(*arguments: str) -> str | None:
    """Return what git prints, None outside a checkout."""
    try:
        done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def machine(device: torch.device, module: str = "pytest") -> dict[str, object]:
    """Return what is the same in all lines of a session, whose command is `python -m` a module."""
    changes = git("status", "--porcelain")
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "versions": {
            "python": platform.python_version(),
            **{package: installed(package) for package in PACKAGES},
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
        },
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def launch(
    kernels: tuple[str, ...], device: torch.device, dtype: str, K: int | None
) -> dict[str, object] | None:
    """Return the configurations that triton kernels were launched with.

    The torch backend has none: None.
    """
    if dispatch.backend(device) != "triton":
        return None
    if K is None:
        return importlib.import_module("fastdmd_kernels.losses.triton_shared").OPTIONS
    table = importlib.import_module("fastdmd_kernels.triton_config")
    target = table.device_target(device)
    return {kernel: table.config(kernel, target, NAMES[dtype], K) for kernel in kernels}


def append(folders: list[Path], name: str, line: dict[str, object]) -> None:
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("a", encoding="utf-8") as f:
            f.write(json.dumps(line) + "\n")
