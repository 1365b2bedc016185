"""The plan at the head of a run on a GPU: three lines, a file beside the run, and a refusal in time."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from fastdmd.config import Config
from fastdmd.files import write_atomic
from fastdmd.plan import report
from fastdmd.plan.estimate import Plan, make_plan
from fastdmd.plan.gpus import GPU, GPUS, NAMES
from fastdmd.plan.levers import in_two_calls, remedies

FILE = "plan.json"


def gpu_of(device: torch.device) -> tuple[str, GPU]:
    """Return the name and the rates of a CUDA device, with its own memory.

    A card that is not in the table has an H100's rates, and its name says so.
    """
    properties = torch.cuda.get_device_properties(device)
    known = next((key for key, name in NAMES.items() if name in properties.name), None)
    name = properties.name if known else f"{properties.name} (times as of an h100)"
    return name, replace(GPUS[known or "h100"], memory=properties.total_memory)


def preflight(config: Config, name: str, gpu: GPU, force: bool) -> Config:
    """Print a run's plan, keep it in its folder, and return the configuration with what the plan decides.

    Raise ValueError for a run that cannot fit, with what would make it smaller, unless `force`.
    """
    config, plan = settled(config, gpu)
    print(*report.lines(config, plan, name, gpu), sep="\n", file=sys.stderr)
    for line in report.warnings(config, plan):
        print(f"warning: {line}", file=sys.stderr)
    if not plan.fits(gpu) and not force:
        changes = "; ".join(remedies(config, plan, gpu))
        raise ValueError(
            f"this run needs {plan.need / 1e9:.1f} GB, and {name} has {gpu.memory / 1e9:.1f}; {changes}. "
            "To try it all the same, use --force"
        )
    text = json.dumps(report.as_json(config, plan, name, gpu), indent=1)
    write_atomic(Path(config.run.output_dir) / FILE, text + "\n")
    return config


def settled(config: Config, gpu: GPU) -> tuple[Config, Plan]:
    """Return a configuration with guidance in two calls where one would not fit, and its plan."""
    plan = make_plan(config)
    if plan.fits(gpu) or config.memory.guidance != "auto":
        return config, plan
    split = in_two_calls(config)
    smaller = make_plan(split)
    if not smaller.fits(gpu):
        return config, plan
    saved = (plan.peak - smaller.peak) / 1e9
    print(f"memory.guidance = 'two_calls', which saves {saved:.1f} GB: one would not fit", file=sys.stderr)
    return split, smaller


def planned_gb(folder: Path) -> float | None:
    """Return the peak that a run's plan said; None for a run without a plan."""
    path = folder / FILE
    return json.loads(path.read_text(encoding="utf-8"))["peak_gb"] if path.is_file() else None
