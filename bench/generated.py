"""Generate the compiler's code for a GPU on a machine that has none, and count the launches of that code.

A function is traced on fake tensors of the CPU, at its full size. Before inductor sees the graph its tensors
are renamed to those of an H100, so that it fuses, splits and orders as it does there. Nothing is compiled
further: the Python code that would launch the kernels runs on the meta device, with kernels that only count.
"""

import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map

from bench.launches import Counting, Launches
from fastdmd.plan.work import moved

GPU = torch.device("cuda", 0)
H100 = {  # what inductor asks a device for
    "major": 9,
    "minor": 0,
    "multi_processor_count": 132,
    "warp_size": 32,
    "regs_per_multiprocessor": 65536,
    "max_threads_per_multi_processor": 2048,
}


@dataclass
class Code:
    """The code of one graph, and its inputs on the meta device."""

    text: str
    inputs: list[Tensor] = field(default_factory=list)


@contextmanager
def generating() -> Iterator[list[Code]]:
    """Let inductor generate code for an H100 inside; yield the list of what it generated, in order.

    Compile with `backend=compiler` inside of a FakeTensorMode. What is compiled gives fake tensors.
    """
    import torch._functorch.config
    import torch._inductor.config
    from torch._inductor import compile_fx, graph, scheduler
    from torch._inductor.runtime.hints import DeviceProperties
    from torch.utils import _triton

    codes: list[Code] = []
    names = ("multi_processor_count", "major", "regs_per_multiprocessor", "max_threads_per_multi_processor")
    properties = DeviceProperties(
        type="cuda", index=0, cc=90, warp_size=H100["warp_size"], **{name: H100[name] for name in names}
    )
    replaced = (
        (graph.GraphLowering, "compile_to_module", partial_method(keep_code, codes)),
        (torch.cuda, "get_device_properties", lambda device=None: SimpleNamespace(**H100)),
        (compile_fx, "_check_triton_bf16_support", lambda graph: None),
        (scheduler, "has_triton", lambda: True),
        (_triton, "triton_hash_with_backend", lambda: "none"),
        (DeviceProperties, "create", lambda device: properties),
    )
    with ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(patch.object(owner, name, value))
        # one thread: a pool would begin to compile kernels as they are generated
        options: dict[str, Any] = {
            "compile_threads": 1,
            "fx_graph_cache": False,
            "emulate_precision_casts": True,
        }
        stack.enter_context(torch._inductor.config.patch(options))
        stack.enter_context(torch._functorch.config.patch(enable_autograd_cache=False))
        torch._dynamo.reset()
        yield codes
    torch._dynamo.reset()


def partial_method(function: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
    """Return a function that is bound to its instance after `arguments`."""
    return lambda self: function(*arguments, self)


def keep_code(codes: list[Code], graph: Any) -> SimpleNamespace:
    """Generate a graph's code and keep it; stand in for the module that would be made of it."""
    inputs = [x for x in graph.example_inputs if isinstance(x, Tensor)]
    assert len(inputs) == len(graph.example_inputs), "a graph of fixed sizes has tensors alone"
    shapes = [(tuple(x.shape), x.stride(), x.dtype) for x in inputs]
    text = graph.codegen()[0].value
    codes.append(Code(text, [torch.empty_strided(a, b, dtype=c, device="meta") for a, b, c in shapes]))

    outputs = graph.orig_gm.graph.output_node()

    def call(arguments: list[Any]) -> Any:
        arguments.clear()
        return fake_like([node and node.meta["val"] for node in outputs.args[0]])

    return SimpleNamespace(call=call, __file__="generated")


def compiler(module: fx.GraphModule, inputs: Sequence[Tensor]) -> Any:
    """Compile a graph of the CPU's fake tensors as if they were the GPU's."""
    from torch._inductor import compile_fx

    return compile_fx.compile_fx(module, inputs, inner_compile=inner_compiler)


def inner_compiler(module: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
    """Rename the devices of one graph, forward or backward, and hand it to inductor."""
    from torch._inductor import compile_fx

    for node in module.graph.nodes:
        tree_map(on_gpu, node.meta.get("val"))
        node.args = tree_map(on_gpu, node.args)
        node.kwargs = tree_map(on_gpu, node.kwargs)
    return compile_fx.compile_fx_inner(module, [on_gpu(x) for x in inputs], **options)


def on_gpu(x: Any) -> Any:
    """Return a device as the GPU, and a fake tensor with its device renamed."""
    if isinstance(x, torch.device):
        return GPU
    if isinstance(x, FakeTensor):
        x.fake_device = GPU
    return x


# --------------------------------------------------------------------------------------- running the code


@dataclass
class Kernel:
    """Stand in for a generated kernel: count its launches."""

    pointers: list[str]  # the names of its first arguments
    found: Launches

    def run(self, *arguments: Any, stream: int) -> None:
        """Count a launch, in which a tensor is read or written once, and one in place both."""
        sizes: dict[int, int] = {}
        for name, x in zip(self.pointers, arguments, strict=False):
            if isinstance(x, Tensor):
                sizes[id(x)] = moved(x) * (2 if name.startswith("in_out") else 1)
        self.found.add("elementwise", sum(sizes.values()))


def count(code: Code) -> Launches:
    """Return the launches of generated code."""
    counting = Counting()
    kernels = re.findall(r"^(\w+) = async_compile\.triton\('\w+', '''(.*?)'''", code.text, re.S | re.M)
    names: dict[str, Any] = {
        name: Kernel(pointers_of(name, source), counting.found) for name, source in kernels
    }
    body = re.search(r"^class Runner.*?(?=^runner = )", code.text, re.S | re.M)
    assert body, "the code has no class Runner"
    text = body[0].replace("with torch.cuda._DeviceGuard(0):", "with nullcontext():")
    scope = STAND_INS | names
    exec(
        compile(textwrap.dedent(text.replace("torch.cuda.set_device(0)", "pass")), "generated", "exec"), scope
    )
    with torch.no_grad(), counting:
        scope["Runner"](partitions=[]).call(list(code.inputs))
    return counting.found


def pointers_of(name: str, source: str) -> list[str]:
    """Return the names of a kernel's arguments."""
    signature = re.search(rf"def {name}\((.*?)\)", source, re.S)
    assert signature, f"{name} has no signature"
    return [argument.split(":")[0].strip() for argument in signature[1].split(",")]


def view(x: Tensor, size: Sequence[int], stride: Sequence[int], offset: int = 0) -> Tensor:
    return torch.as_strided(x, size, stride, x.storage_offset() + offset)


def scaled_mm(*arguments: Any, out: Tensor, **options: Any) -> Tensor:
    """Take a product of eight bits into a tensor, which the meta device has no op for."""
    return torch._scaled_mm(*arguments, **options)  # pyright: ignore[reportPrivateUsage]


def nothing(*_: Any) -> None:
    """Stand in for a check."""


# what generated code calls beside its kernels; another name is an error
STAND_INS: dict[str, Any] = {
    "torch": torch,
    "aten": torch.ops.aten,
    "nullcontext": nullcontext,
    "extern_kernels": SimpleNamespace(
        mm=torch.mm, addmm=torch.addmm, bmm=torch.bmm, baddbmm=torch.baddbmm, _scaled_mm=scaled_mm
    ),
    "reinterpret_tensor": view,
    "empty_strided_cuda": lambda size, stride, dtype: torch.empty_strided(
        size, stride, dtype=dtype, device="meta"
    ),
    "get_raw_stream": lambda device: 0,
    "copy_if_misaligned": lambda x: x,
    "assert_size_stride": nothing,
    "assert_alignment": nothing,
}


def fake_like(values: Any, device: str = "cpu") -> Any:
    """Return tensors in any structure as fakes of a device; inside a FakeTensorMode."""

    def like(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        fake = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
        return fake.requires_grad_(x.requires_grad)

    return tree_map(like, values)
