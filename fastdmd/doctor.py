"""What `fastdmd doctor` shows: versions, the device, the backend of each op."""

import platform
from importlib import metadata

import torch

from fastdmd.device import pick_device
from fastdmd_kernels import attention, dispatch

PACKAGES = ("torch", "triton", "diffusers", "transformers", "safetensors", "torchao", "tensorboard", "wandb")


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def report() -> str:
    device = pick_device("auto")
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    lines = [f"python        {platform.python_version()}"]
    lines += [f"{package:13} {version(package)}" for package in PACKAGES]
    lines += [f"device        {device} ({name}), {torch.get_num_threads()} threads"]
    ops = dispatch.describe(device) | attention.describe(device)
    lines += [f"{op:13} {backend}" for op, backend in ops.items()]
    return "\n".join(lines)
