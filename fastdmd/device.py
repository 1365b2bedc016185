"""Which device a run is on."""

import torch


def present() -> list[str]:
    """The devices of this machine, best first. ROCm calls itself cuda."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return [
        *(["cuda", *gpus] if gpus else []),
        *(["mps"] if torch.backends.mps.is_available() else []),
        "cpu",
    ]


def pick_device(name: str) -> torch.device:
    """ "auto" is the best one. ValueError when a named device is not there."""
    if name != "auto" and name not in present():
        raise ValueError(f"run.device = '{name}' is not on this machine; use 'auto'")
    return torch.device(present()[0] if name == "auto" else name)
