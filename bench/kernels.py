"""Time every op beside its reference and its peers: `python -m pytest bench/kernels.py`.

The repository's root and `kernels` have to be on the path. What is wrong is not timed. Lines go to
results/<device>.jsonl, for `python -m bench.report`.
"""

import gc
import time

import pytest
import torch
import torch._functorch.config

from bench import clock, dense, losses, record, sparse
from bench.case import Case, Work, check
from bench.conftest import DEVICE, Session
from bench.sizes import PLANS, Attention

torch._dynamo.config.recompile_limit = 64  # one function, many shapes
torch._functorch.config.donated_buffer = False  # a backward is run many times over one forward

# what a peer raises that is not installed, not made for this GPU or dtype, out of memory, or wrong
REFUSALS = (ImportError, OSError, RuntimeError, ValueError, TypeError, AssertionError)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    plan = PLANS[metafunc.config.getoption("--plan")]
    # shape by shape: inputs are made once
    order = {shape.name: i for i, shape in enumerate((*plan.losses, *plan.attention))}
    cases = [case for module in (losses, sparse, dense) for case in module.cases(plan, DEVICE)]
    metafunc.parametrize(
        "case", sorted(cases, key=lambda case: (order[case.shape.name], case.dtype)), ids=str
    )


@pytest.fixture(autouse=True)
def empty_handed():
    """Free what the last benchmark held."""
    yield
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


@pytest.mark.benchmark(timer=clock.timer, disable_gc=True)
def test_kernel(case: Case, benchmark, session: Session) -> None:
    if time.monotonic() > session.ends:
        pytest.skip("out of time (--minutes)")
    try:
        work = case.build(session.device)
        error = check(work)
    except REFUSALS as e:
        if case.ours:
            raise
        pytest.skip(f"{case.variant}: {str(e).splitlines()[0] if str(e) else type(e).__name__}")
    graph = case.captured and session.device.type == "cuda"
    run = clock.captured(work.run) if graph else work.run
    memory = clock.peak_memory_gb(work.run, session.device)
    low, high = session.plan.rounds
    rounds = min(high, max(low, int(session.plan.budget / clock.seconds(run, 1, session.flush))))
    benchmark.pedantic(run, setup=session.flush, rounds=rounds, warmup_rounds=1)
    session.write(line_of(case, work, sorted(benchmark.stats.stats.data), session, memory, error, graph))


def line_of(
    case: Case,
    work: Work,
    times: list[float],
    session: Session,
    memory: float | None,
    error: float,
    graph: bool,
) -> dict[str, object]:
    p20, p50, p80 = (times[round(p * (len(times) - 1))] for p in (0.2, 0.5, 0.8))
    tflops = work.flops / p50 / 1e12 if work.flops else None
    gb_s = work.bytes / p50 / 1e9 if work.bytes else None
    matmul = session.ceilings.get(f"matmul_{case.dtype}_tflops")
    K = case.shape.K if isinstance(case.shape, Attention) else None
    return {
        "op": case.op,
        "variant": case.variant,
        "ours": case.ours,
        "of": case.of,
        "shape": case.shape.row(),
        "dtype": case.dtype,
        "p20": p20,
        "p50": p50,
        "p80": p80,
        "rounds": len(times),
        "graph": graph,
        "flops": work.flops,
        "bytes": work.bytes,
        "tflops": tflops,
        "gb_s": gb_s,
        "of_matmul": tflops / matmul if tflops and matmul else None,
        "of_copy": gb_s / session.ceilings["copy_gb_s"] if gb_s else None,
        "peak_memory_gb": memory,
        "error": error,
        "launch": record.launch(work.kernels, session.device, case.dtype, K)
        if case.ours and work.kernels
        else None,
    }
