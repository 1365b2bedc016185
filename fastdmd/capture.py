"""torch.compile in a run: which parts of a step are one graph each, and what is counted of it.

"blocks": each block of a network; blocks of a kind share their graphs, one for each role, grad mode, batch
size and what learns. "step": forward, loss and gradient of a whole phase, one for each exit of a rollout.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves

from fastdmd.methods.method import Loss, Method
from fastdmd.models.net import Net
from fastdmd.optim import Optimizer

Mode = Literal["off", "blocks", "step"]
BACKEND = "inductor"
COMPILED = ("cuda", "cpu")  # the devices that the compiler makes code for
GRAPHS = 64  # of one code object; dynamo's own limit, 8, is a crash in DMD, where roles share one
CACHED = ("hit", "miss", "bypass")
READS = ("_local_scalar_dense", "nonzero", "equal", "item")  # ops that wait for the device


@dataclass(frozen=True, kw_only=True)
class Config:
    """The table [compile]."""

    mode: Mode = "off"


def mode_on(config: Config, device: torch.device) -> Mode:
    """Return what is compiled on a device: nothing where the compiler makes no code for it."""
    return config.mode if device.type in COMPILED else "off"


def notice(config: Config, device: torch.device) -> str | None:
    """Return what a run's first lines say of its compilation."""
    if config.mode == "off":
        return None
    if mode_on(config, device) == "off":
        return f"compile.mode = '{config.mode}': the compiler does not support {device.type}; running eager"
    if config.mode == "blocks":
        return "compile.mode = 'blocks': the first cycle compiles, and takes a minute or more"
    return (
        "compile.mode = 'step': each phase compiles at its first exit, minutes for a network of many blocks"
    )


def set_up(step: bool = False) -> None:
    """Set the compiler's options of this process; it takes a second to import, so not before."""
    import torch._dynamo
    import torch._inductor.config

    torch._dynamo.config.recompile_limit = GRAPHS
    if step:
        torch._dynamo.config.trace_autograd_ops = True  # the gradient of a phase, inside its graph
    # results are rounded where eager rounds them: adapters of zeros change no bit in bfloat16
    torch._inductor.config.emulate_precision_casts = True


def compile_blocks(net: Net) -> None:
    """Compile the units of a network in place: names of a state dict stay as they are."""
    set_up()
    for unit in net.units:
        unit.compile(fullgraph=True, dynamic=False, backend=BACKEND)


class Capture:
    """How a run's phases are computed, and what was compiled for them."""

    def __init__(self, mode: Mode, method: Method, warm_up: int) -> None:
        """Begin to count. warm_up: steps of a cycle, in which graphs are made."""
        self.mode = mode
        self.warm_up = warm_up
        self.graphs = self.recompiles = 0
        self.breaks_before = breaks() if mode != "off" else 0
        self.kinds: set[Any] = set()  # of phases that have a graph: by phase and exit
        self.method = method
        if mode == "step":
            set_up(step=True)
            self.phase: Callable[..., Any] = torch.compile(
                self.gradients, fullgraph=True, dynamic=False, backend=BACKEND
            )

    def gradients(
        self, phase: str, nets: Any, batch: Any, draws: Any, carry: Any, parameters: list[Tensor], parts: int
    ) -> tuple[Loss, tuple[Tensor | None, ...]]:
        """Return a phase's loss, and its gradients to the parameters as one of `parts` micro-batches."""
        loss, metrics = self.method.loss(phase, nets, batch, draws, carry)
        found = torch.autograd.grad(loss / parts, parameters, allow_unused=True)
        return (loss.detach(), metrics), found

    def backward(
        self,
        phase: str,
        nets: Mapping[str, Any],
        optimizers: Mapping[str, Optimizer],
        batch: Any,
        draws: Any,
        carry: Any,
        parts: int,
    ) -> Loss:
        """Return a phase's loss by its graph, after adding its gradients to those of its roles."""
        every = [(each, name) for each in optimizers.values() for name in each.params]
        learning = [(each, name) for each, name in every if each.params[name].requires_grad]
        parameters = [each.params[name] for each, name in learning]
        self.kinds.add((phase, kind_of(draws)))
        found, grads = self.phase(phase, nets, batch, draws, carry, parameters, parts)
        for (optimizer, name), grad in zip(learning, grads, strict=True):
            if grad is not None:
                optimizer.accumulate(name, grad)
        return found

    @contextmanager
    def step(self) -> Iterator[None]:
        """Count the graphs of a step, and warn of one that comes after the first cycle."""
        if self.mode == "off":
            yield
            return
        before, kinds = graphs(), len(self.kinds)
        yield
        new = graphs() - before
        self.graphs += new
        if self.warm_up > 0:
            self.warm_up -= 1
        elif new > len(self.kinds) - kinds:  # an exit that is met for the first time has a graph of its own
            self.recompiles += new
            print(f"warning: {new} graphs compiled after the first cycle: {last_guard()}", file=sys.stderr)

    def summary(self) -> dict[str, Any]:
        """Return what summary.json says."""
        met = breaks() - self.breaks_before if self.mode != "off" else 0
        return {"mode": self.mode, "graphs": self.graphs, "breaks": met, "recompiles": self.recompiles}


def kind_of(draws: Any) -> Any:
    """Return what of a phase's draws decides on its graph: their structure and all but the tensors."""
    leaves, structure = tree_flatten(draws)
    return structure, tuple(x for x in leaves if not isinstance(x, Tensor))


def graphs() -> int:
    """Return how many graphs this process has compiled."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def cached() -> Counter[str]:
    """Return how many graphs this process has found in torch's cache on disk, or compiled into it.

    By "hit" and "miss", and "bypass" of those that the cache does not take.
    """
    from torch._dynamo.utils import counters

    return Counter({kind: counters["aot_autograd"][f"autograd_cache_{kind}"] for kind in CACHED})


def breaks() -> int:
    """Return how many graph breaks this process has met."""
    from torch._dynamo.utils import counters

    return sum(counters["graph_break"].values())


def last_guard() -> str:
    """Return why the last graph was compiled anew: the guard that failed, with its line of code."""
    from torch._dynamo.utils import get_compilation_metrics

    reasons = [each.recompile_reason for each in get_compilation_metrics() if each.recompile_reason]
    return " ".join(reasons[-1].split()) if reasons else "code that was not met before"


class Transfers(TorchDispatchMode):
    """Count reads of the device by the host, and copies of host data to it, of a step on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()
        self.constants: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        name = func.overloadpacket.__name__
        if name in READS:
            self.reads[name] += 1
        from_host = any(x.device.type == "cpu" and x.ndim for x in given) or not given
        if name in ("_to_copy", "copy_") and from_host:
            self.constants[name] += sum(x.is_meta for x in made)
        return out
