"""What the machine can do: the ceilings that throughput is measured against, and the memory that was used."""

import resource
import sys

import torch

# dense bfloat16 peak in FLOP/s by name (vendors' data sheets, without sparsity)
BF16_PEAK = {
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "MI300X": 1307e12,
    "MI355X": 2500e12,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the data sheet's peak of a known GPU in bfloat16, and None elsewhere."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for key, peak in BF16_PEAK.items():
            if key in name:
                return peak
    return None


def peak_memory_gb(device: torch.device) -> float:
    """Return the peak memory so far in GB (1e9 bytes).

    It is the allocator's on a GPU, the process's resident set on the CPU.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
