"""What `fastdmd doctor` shows: versions, the device, the backend of each op, and what it could be else."""

import platform

import torch

from fastdmd.device import pick_device
from fastdmd_kernels import attention, dispatch, norm
from fastdmd_kernels.trial import installed, listed

PACKAGES = (
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "safetensors",
    "torchao",
    "liger-kernel",
    "xformers",
    "tensorboard",
    "wandb",
)


def report() -> str:
    device = pick_device("auto")
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    lines = [f"python        {platform.python_version()}"]
    lines += [f"{package:13} {installed(package)}" for package in PACKAGES]
    lines += [f"device        {device} ({name}), {torch.get_num_threads()} threads"]
    try_candidates(device)
    ops = dispatch.describe(device) | attention.describe(device) | norm.describe(device)
    lines += [f"{op:13} {backend}" for op, backend in ops.items()]
    for op, module in (("attention", attention), ("norms", norm)):
        lines.append(f"{'candidates':13} on a GPU of {op}: {listed(module.CANDIDATES, module.PACKAGES)}")
    return "\n".join(lines)


def try_candidates(device: torch.device) -> None:
    """Choose by trial on a GPU, as a run does: in bfloat16, of Wan 1.3B's sizes and SDXL's widest norm."""
    attention.prepare(device, torch.bfloat16, 128)
    norm.prepare("rms_norm", device, torch.bfloat16, (1536,))
    norm.prepare("layer_norm", device, torch.float32, (1536,))
    norm.prepare("group_norm", device, torch.bfloat16, (1280, 32))
