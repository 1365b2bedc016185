"""Dense attention: each implementation that there is, and the one that `attention` chooses."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from bench.case import Case, Tensors, Work, upcast, values
from bench.sizes import Attention, Plan, dense_flops
from bench.sparse import given, timed
from fastdmd_kernels import attention as dense

ROWS = 256  # queries of one head that are checked: scores of all would not fit


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("blnk,bmnk->bnlm", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bnlm,bmnk->blnk", torch.softmax(scores, dim=-1), v)


def run_with(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if name == "ours":
        return dense.attention(q, k, v)
    with dense.use(name):
        return dense.attention(q, k, v)


def _work(name: str, shape: Attention, dtype: torch.dtype, of: str, device: torch.device) -> Work:
    q, k, v, _, dout, _ = given(shape, dtype, device)
    run = partial(run_with, name)
    some = [x.detach()[:, :rows, -1:].requires_grad_() for x, rows in ((q, ROWS), (k, None), (v, None))]
    d_some = dout[:, :ROWS, -1:]

    def results(_: Tensors) -> Tensors:
        return values(run, some, d_some)

    def exact() -> Tensors:
        return values(plain, [upcast(x) for x in some], d_some.float())

    return timed(run, [q, k, v], dout, of, results, exact, dense_flops(shape))


def cases(plan: Plan, device: torch.device) -> Iterator[Case]:
    gpu = device.type == "cuda"
    for shape in plan.attention:
        names = ["ours", *(["cudnn", "flash", "efficient", "xformers"] if gpu else ["flash"])]
        names += ["math"] if shape.holds_all_scores else []
        for dtype in shape.dtypes:
            flex = ["flex"] if gpu and shape.flex and dtype == shape.dtypes[0] else []
            for of in ("forward", "backward"):
                for name in (*names, *flex):
                    yield Case(
                        "attention",
                        name,
                        of,
                        shape,
                        str(dtype).removeprefix("torch."),
                        partial(_work, name, shape, dtype, of),
                        ours=name == "ours",
                    )
