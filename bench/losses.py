"""dmd_loss and sid_loss against their definitions, eager and under torch.compile."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from bench.case import Case, Tensors, Work, random, upcast
from bench.sizes import Loss, Plan, loss_bytes
from fastdmd_kernels import dispatch, dmd_loss, sid_loss

LOSSES: dict[str, tuple[Callable[..., tuple[Tensor, object]], int]] = {  # how many inputs get a gradient
    "dmd_loss": (dmd_loss, 1),
    "sid_loss": (partial(sid_loss, alpha=1.0), 5),
}


def inputs_of(shape: Loss, dtype: str, device: torch.device) -> Tensors:
    """Draw x0_g, z, F_fake, F_c, F_u."""
    names = ("float32", "float32", "bfloat16", "bfloat16", "bfloat16") if dtype == "mixed" else (dtype,) * 5
    dtypes = (getattr(torch, name) for name in names)
    return [random(*shape.shape, dtype=d, device=device, seed=i) for i, d in enumerate(dtypes)]


def _work(op: str, variant: str, of: str, shape: Loss, dtype: str, device: torch.device) -> Work:
    inputs = inputs_of(shape, dtype, device)
    loss, gradients = LOSSES[op]
    coefficients = torch.linspace(0.2, 0.8, shape.shape[0], device=device)
    call = partial(loss, a=torch.ones_like(coefficients), b=-coefficients, w=4.0)
    backend = dispatch.backend(device) if variant == "ours" else "torch"

    def run_on(given: Tensors) -> Tensor:
        return call(*given)[0]

    forward = torch.compile(run_on) if variant == "reference, compiled" else run_on

    def evaluate(given: Tensors, run: Callable[[Tensors], Tensor]) -> Tensors:
        value = run(given)
        if of == "forward":
            return [value.detach()]
        return [value.detach(), *torch.autograd.grad(value, given[:gradients])]

    def with_gradients(given: Tensors) -> Tensors:
        return [x.requires_grad_() if i < gradients else x for i, x in enumerate(given)]

    ready = with_gradients(inputs)

    def run() -> Tensors:
        with dispatch.use(backend):
            return evaluate(ready, forward)

    def exact() -> Tensors:
        with dispatch.use("torch"):
            return evaluate(with_gradients([upcast(x) for x in inputs]), run_on)

    written = inputs[:gradients] if of == "both" else []
    return Work(run, run, exact, bytes=loss_bytes(inputs, written), kernels=(op,))


def cases(plan: Plan, device: torch.device) -> Iterator[Case]:
    # on a CPU the definition is the implementation
    variants = ["ours", *(["reference"] if device.type == "cuda" else [])]
    variants += ["reference, compiled"] if plan.compiled else []
    for shape in plan.losses:
        for dtype in shape.dtypes:
            for op in LOSSES:
                for of in ("forward", "both"):
                    for variant in variants:
                        build = partial(_work, op, variant, of, shape, dtype)
                        yield Case(
                            op, variant, of, shape, dtype, build, ours=variant == "ours", captured=True
                        )
