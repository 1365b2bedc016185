"""What a change must not make more of, counted exactly and without a GPU: under a minute on one core.

Each function returns numbers by name. None depends on values, times or the machine; those that depend on the
version of torch or triton say so.
"""

import contextlib
import importlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from bench import block
from bench.record import REPOSITORY, installed
from fastdmd import capture, train
from fastdmd import config as configs
from fastdmd.batch import Batch
from fastdmd.capture import Transfers
from fastdmd.config import Config
from fastdmd.denoiser import Denoiser
from fastdmd.methods.method import cycle
from fastdmd.models.wan.layers import WanConfig
from fastdmd.plan.estimate import make_plan
from fastdmd.plan.step import ExitRng
from fastdmd.run import build
from fastdmd.warm import empty_cond, nets_on_meta

Counts = Mapping[str, float]
PEAKS = ("wan14b_dmd_24gb", "wan1_3b_dmd")  # recipes for one card
ARCHITECTURES = {
    "Wan2.1-T2V-1.3B-Diffusers": replace(block.WIDTH_1_3B, num_layers=30),
    "Wan2.1-T2V-14B-Diffusers": WanConfig(
        num_attention_heads=40, attention_head_dim=128, num_layers=40, ffn_dim=13824
    ),
}
CYCLES = (
    "tiny_flow",
    "tiny_dmd",
    "tiny_dmd_vsa",
    "tiny_sid",
    "tiny_lcm",
    "tiny_dcm_semantic",
    "tiny_selfforcing_dmd",
)
GRAPHS = "tiny_dmd"
TARGETS = ("sm_90", "sm_100")
KERNELS = ("vsa.triton_fwd", "vsa.triton_bwd")  # in bfloat16, of head dim 128
PAIRS = 64 * 64  # of a query and a key, in a step of a kernel's loop over tiles


@dataclass(frozen=True)
class Part:
    """Counts of one kind, and the package whose version they depend on."""

    count: Callable[[], Counts]
    package: str | None = None
    digits: int = 2  # of its version that matter

    @property
    def version(self) -> str | None:
        """Return the version that counts are comparable with, as torch 2.13; None where all are."""
        if self.package is None:
            return None
        numbers = (installed(self.package) or "none").split("+")[0].split(".")
        return f"{self.package} {'.'.join(numbers[: self.digits])}"


# ----------------------------------------------------------------------------------------------------- blocks


def eager_blocks() -> Counts:
    """Count launches and bytes of a dense and a sparse block of 1.3B's width, both directions."""
    found: dict[str, float] = {}
    for name, sparsity in (("dense", None), ("sparse", block.SPARSITY)):
        found |= of_passes(name, block.eager(block.Shape(sparsity=sparsity)))
    return found


def compiled_blocks() -> Counts:
    """Count launches and bytes of a dense block's compiled code, where all its weights learn."""
    return of_passes("dense", block.compiled(block.Shape()))


def of_passes(name: str, passes: block.Passes) -> Counts:
    """Return the numbers of a block's directions by name."""
    return {
        f"{name}, {direction}: {key}": n
        for direction, launches in (("forward", passes.forward), ("backward", passes.backward))
        for key, n in launches.as_counts().items()
    }


# ----------------------------------------------------------------------------------------------------- cycles


class Answered(Transfers):
    """Count a read of the meta device, and go on with a zero where it would be refused."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            self.reads["_local_scalar_dense"] += 1
            return torch.zeros((), dtype=args[0].dtype).item()
        return super().__torch_dispatch__(func, types, args, kwargs)


def cycles() -> Counts:
    """Count network calls and samples of each role, host reads and constants, of a cycle of each method."""
    found: dict[str, float] = {}
    with contextlib.chdir(REPOSITORY):
        for name in CYCLES:
            counts = of_cycle(configs.load(f"configs/{name}.toml"))
            found |= {f"{name}: {key}": n for key, n in counts.items()}
    return found


def of_cycle(config: Config) -> Counts:
    """Count one cycle, with one block a network and rollouts to their last step."""
    method = config.make_method()
    nets = nets_on_meta(config, method, 1)
    for role, denoiser in nets.items():
        if config.vsa and config.role_options(role).tile:
            denoiser.keep(config.vsa.sparsity, config.latent_shape())
    B, shape = config.run.batch_size, config.latent_shape()
    with torch.device("meta"):
        cond = empty_cond(B, config.family, nets["student"].net.config, config.data.resolution)
        batch = Batch(cond, cond, shape, torch.empty(B, *shape))
    watch = Answered()
    with counted_calls(nets) as calls:
        for step, phases in enumerate(cycle(method)):
            carry: dict[str, Any] = {}
            for index, phase in enumerate(phases):
                for role, denoiser in nets.items():
                    denoiser.learn(role in method.trains(phase))
                rng = ExitRng(config.run.seed, step, f"{phase}{index}", range(B), "cpu")
                rng.last = True
                draws = method.draw(phase, rng, shape, carry)
                with watch:
                    loss, _ = method.loss(phase, nets, batch, draws, carry)
                    loss.backward()
    reads, constants = watch.reads.total(), watch.constants.total()
    return {**calls, "host reads": reads, "constants": constants}


@contextlib.contextmanager
def counted_calls(nets: Mapping[str, Denoiser]) -> Iterator[Counter[str]]:
    """Count the calls of each role's network, and the samples in them."""
    calls: Counter[str] = Counter()
    roles = {id(denoiser): role for role, denoiser in nets.items()}
    call = Denoiser._call

    def counted(self: Denoiser, x_t: Tensor, *arguments: Any) -> Any:
        calls[f"calls, {roles[id(self)]}"] += 1
        calls[f"samples, {roles[id(self)]}"] += len(x_t)
        return call(self, x_t, *arguments)

    with patch.object(Denoiser, "_call", counted):
        yield calls


def graphs() -> Counts:
    """Count the graphs of a run's first cycle by blocks, and its graph breaks."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(REPOSITORY):
        keys = ["run.batch_size=1", "run.grad_accum=1", "run.device='cpu'", "compile.mode='blocks'"]
        config = configs.load(f"configs/{GRAPHS}.toml", [*keys, f"run.output_dir='{folder}'"])
        torch._dynamo.reset()
        with patch.object(capture, "BACKEND", "aot_eager"):
            run = build(config)
            for _ in cycle(run.method):
                with run.capture.step():
                    train.take_step(run)
        torch._dynamo.reset()
    found = run.capture.summary()
    return {f"{GRAPHS}: {key}": found[key] for key in ("graphs", "breaks", "recompiles")}


# ------------------------------------------------------------------------------------------------------ peaks


def peaks() -> Counts:
    """Return the planned peaks of recipes, in bytes; a network's architecture is all that a plan takes."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for name, architecture in ARCHITECTURES.items():
            path = Path("models") / name / "transformer"
            path.mkdir(parents=True)
            keys = {"_class_name": "WanTransformer3DModel", **vars(architecture)}
            (path / "config.json").write_text(json.dumps(keys), encoding="utf-8")
        recipes = {
            name: configs.load(REPOSITORY / "configs" / f"{name}.toml", elsewhere=True) for name in PEAKS
        }
        return {name: make_plan(config, check=False).peak for name, config in recipes.items()}


# ---------------------------------------------------------------------------------------------------- kernels


def kernels() -> Counts:
    """Count registers, spills and instructions of the sparse attention's kernels, compiled for two GPUs."""
    aot = importlib.import_module("fastdmd_kernels.aot")  # it needs triton
    resources = importlib.import_module("fastdmd_kernels.aot_resources")
    found: dict[str, float] = {}
    for target in TARGETS:
        for spec in (spec for module in KERNELS for spec in aot.specs(target, module)):
            if (spec.dtype, spec.head_dim) != ("bf16", 128):
                continue
            binary, record = aot.compile_spec(spec, target)
            threads = 32 * spec.options["num_warps"]
            instructions = resources.multiplying_loop(aot.disassemble(binary)) * threads / PAIRS
            name = f"{target} {spec.kernel.__name__}"
            found |= {f"{name}: {key}": record[key] for key in ("registers", "spills")}
            found[f"{name}: instructions per pair"] = instructions
    return found


PARTS = {
    "eager block": Part(eager_blocks, "torch"),
    "compiled block": Part(compiled_blocks, "torch"),
    "cycle": Part(cycles),
    "graphs": Part(graphs, "torch"),
    "planned peak": Part(peaks, "torch"),
    "kernels": Part(kernels, "triton", digits=3),
}
