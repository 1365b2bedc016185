"""What a manifest of compiled kernels must hold, and how much worse than its baseline a number may become."""

from collections.abc import Iterator, Mapping
from typing import Any

Record = dict[str, Any]  # a kernel of a manifest

KB = 1024
SHARED_LIMIT = {  # bytes that one program may use
    "sm_80": 163 * KB,
    "sm_90": 227 * KB,
    "sm_100": 227 * KB,
    "sm_120": 99 * KB,
    "gfx942": 64 * KB,
    "gfx950": 160 * KB,
}
TARGETS = tuple(SHARED_LIMIT)
COPIES_MUST_OVERLAP = ("sm_90", "sm_100")
TENSOR_CORES = ("wgmma", "tcgen05", "mma", "mfma")

MORE_IS_WORSE = ("registers", "shared_bytes", "code_bytes")
LESS_IS_WORSE = ("loop_async_copies",)
TOLERANCE = 0.05


def key(record: Record) -> str:
    """Name a record by kernel, op, dtype and head dim (0 where there is none)."""
    return " ".join(str(record[name]) for name in ("op", "kernel", "dtype", "head_dim"))


def broken(target: str, record: Record) -> Iterator[str]:
    """Yield the rules that a kernel breaks, whatever it was before."""
    if record["error"]:
        yield f"does not compile: {record['error']}"
        return
    if record["spills"]:
        yield f"spills {record['spills']}"
    if record["shared_bytes"] > SHARED_LIMIT[target]:
        yield f"{record['shared_bytes']} bytes of shared memory, {target} has {SHARED_LIMIT[target]}"
    if record["wants_tensor_cores"] and not any(record[name] for name in TENSOR_CORES):
        yield "no tensor-core instruction"
    if record["wants_async_copies"] and target in COPIES_MUST_OVERLAP and not record["loop_async_copies"]:
        yield "no asynchronous copy in an inner loop"
    yield from record["serialized"]


def worse(record: Record, before: Mapping[str, int]) -> Iterator[str]:
    """Yield the numbers that are more than 5 % worse than the baseline's."""
    if record["error"]:
        return
    for name in (*MORE_IS_WORSE, *LESS_IS_WORSE):
        now, then = record[name], before[name]
        change = now - then if name in MORE_IS_WORSE else then - now
        if change > TOLERANCE * then:
            yield f"{name} {then} -> {now}"


def problems(
    target: str, manifest: list[Record], baseline: Mapping[str, Mapping[str, int]] | None
) -> Iterator[str]:
    """Yield one line per fault.

    `baseline` is this target's under the manifest's triton, None where there is none.
    """
    for record in manifest:
        for fault in broken(target, record):
            yield f"{target} {key(record)}: {fault}"
        if baseline is None:
            continue
        if (before := baseline.get(key(record))) is None:
            yield f"{target} {key(record)}: not in the baseline"
            continue
        for fault in worse(record, before):
            yield f"{target} {key(record)}: {fault}"


def baseline_of(manifest: list[Record]) -> dict[str, dict[str, int]]:
    names = (*MORE_IS_WORSE, *LESS_IS_WORSE)
    return {key(record): {name: record[name] for name in names} for record in manifest if not record["error"]}
