"""Which device a run is on."""

import torch


def present() -> list[str]:
    """Return the devices of this machine, best first. ROCm calls itself cuda."""
    devices = []
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if gpus:
        devices += ["cuda", *gpus]
    if torch.backends.mps.is_available():
        devices.append("mps")
    return [*devices, "cpu"]


def pick_device(name: str) -> torch.device:
    """Return the named device, for "auto" the best one; raise ValueError when it is not there."""
    if name != "auto" and name not in present():
        raise ValueError(f"run.device = '{name}' is not on this machine; use 'auto'")
    return torch.device(present()[0] if name == "auto" else name)
