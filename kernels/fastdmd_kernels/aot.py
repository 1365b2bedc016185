"""Compile every kernel ahead of time for every GPU target, without a GPU: `python -m fastdmd_kernels.aot`.

<out>/<target>/ gets the binaries and manifest.json, a list with one object per kernel. `--check` reads the
manifests that are there and exits with 1 where a rule of aot_rules is broken or a number is worse than in
kernels/aot_baseline.json.
"""

import argparse
import contextlib
import importlib
import io
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.compiler import ASTSource

from fastdmd_kernels import aot_resources
from fastdmd_kernels.aot_rules import TARGETS, Record, baseline_of, key, problems
from fastdmd_kernels.aot_spec import Spec, gpu_target

MODULES = (
    "vsa.triton_pool",
    "vsa.triton_select",
    "vsa.triton_invert",
    "vsa.triton_fwd",
    "vsa.triton_bwd",
    "losses.triton_dmd",
    "losses.triton_sid",
)
BASELINE = Path(__file__).parents[1] / "aot_baseline.json"

Job = tuple[str, str, int]  # target, module, index of its spec


@cache
def specs(target: str, module: str) -> list[Spec]:
    return list(importlib.import_module(f"fastdmd_kernels.{module}").specs(target))


def compile_spec(spec: Spec, target: str) -> tuple[bytes, Record]:
    """Return the binary of one kernel, and what the manifest says of it."""
    names = spec.kernel.arg_names
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if name not in spec.unaligned
        and (spec.signature[name][0] == "*" or spec.signature[name] in ("i32", "i64"))
    }
    source = ASTSource(
        spec.kernel,
        signature={name: spec.signature[name] for name in names},
        constexprs=dict(spec.constexprs),
        attrs=aligned,
    )
    gpu = gpu_target(target)
    log = io.StringIO()
    # in a cache of its own: a kernel that is found there brings no log of ptxas
    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope(), knobs.nvidia.scope():
        knobs.cache.dir, knobs.nvidia.dump_ptxas_log = folder, True
        with contextlib.redirect_stdout(log):
            compiled = triton.compile(source, target=gpu, options=dict(spec.options))
        if gpu.backend == "cuda":
            binary = compiled.asm["cubin"]
            resources = aot_resources.nvidia(compiled.asm["ptx"], disassemble(binary), log.getvalue(), binary)
        else:
            binary = compiled.asm["hsaco"]
            resources = aot_resources.amd(compiled.asm["amdgcn"], binary)
    return binary, {"error": "", "shared_bytes": compiled.metadata.shared, **resources.as_dict()}


def disassemble(cubin: bytes) -> str:
    """Return the machine code of an NVIDIA binary as text."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = knobs.nvidia.nvdisasm.path
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout


def run_job(job: Job, out: Path) -> Record:
    """Compile one kernel into <out>/<target>/ and return its record.

    One that does not compile has a record too, with its error.
    """
    target, module, index = job
    spec = specs(target, module)[index]
    record: Record = {
        "op": spec.op,
        "kernel": spec.kernel.__name__,
        "dtype": spec.dtype,
        "head_dim": spec.head_dim,
        "triton": triton.__version__,
        "wants_tensor_cores": spec.tensor_cores,
        "wants_async_copies": spec.async_copies,
    }
    record["file"] = key(record).replace(" ", "-") + (".cubin" if target.startswith("sm_") else ".hsaco")
    try:
        binary, found = compile_spec(spec, target)
    except (triton.TritonError, RuntimeError, ValueError) as e:
        return {**record, "error": f"{type(e).__name__}: {e}"}
    (out / target / record["file"]).write_bytes(binary)
    return {**record, **found}


def compile_all(targets: list[str], ops: list[str] | None, out: Path, jobs: int) -> dict[str, list[Record]]:
    """Compile the kernels, write a manifest per target and return them; progress goes to stderr."""
    work = [
        (target, module, i)
        for target in targets
        for module in MODULES
        for i, spec in enumerate(specs(target, module))
        if ops is None or spec.op in ops
    ]
    for target in targets:
        (out / target).mkdir(parents=True, exist_ok=True)
    manifests: dict[str, list[Record]] = {target: [] for target in targets}
    for job, record in _progress(zip(work, _run(work, out, jobs), strict=True), len(work)):
        manifests[job[0]].append(record)
    for target, manifest in manifests.items():
        manifest.sort(key=key)
        (out / target / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifests


def _run(work: list[Job], out: Path, jobs: int) -> Iterator[Record]:
    if jobs == 1:
        yield from (run_job(job, out) for job in work)
        return
    # spawn: torch has threads, which a fork would lose
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(run_job, work, [out] * len(work))


def _progress(results: Iterator[tuple[Job, Record]], total: int) -> Iterator[tuple[Job, Record]]:
    """Pass the results on, and print a line every two seconds."""
    start = shown = time.monotonic()
    for done, (job, record) in enumerate(results, 1):
        if (now := time.monotonic()) - shown > 2 or done == total:
            print(
                f"{done:4d}/{total} {now - start:4.0f} s  {job[0]} {key(record)}", file=sys.stderr, flush=True
            )
            shown = now
        yield job, record


def read(targets: list[str], out: Path) -> dict[str, list[Record]]:
    """Read the manifests of an earlier compilation; exit where one is missing."""
    missing = [target for target in targets if not (out / target / "manifest.json").is_file()]
    if missing:
        raise SystemExit(f"no manifest of {', '.join(missing)} in {out}; compile first, without --check")
    return {
        target: json.loads((out / target / "manifest.json").read_text(encoding="utf-8")) for target in targets
    }


def table(manifests: dict[str, list[Record]]) -> str:
    """Lay out one row per kernel and one column per target: registers / spills / KB of shared memory."""
    cells: dict[str, dict[str, str]] = {}
    for target, manifest in manifests.items():
        for r in manifest:
            cell = (
                "failed" if r["error"] else f"{r['registers']}/{r['spills']}/{r['shared_bytes'] / 1024:.0f}"
            )
            cells.setdefault(key(r), {})[target] = cell
    width = max(map(len, cells), default=0)
    rows = [" " * width + "".join(f"{target:>11}" for target in manifests)]
    for name, row in sorted(cells.items()):
        rows.append(f"{name:{width}}" + "".join(f"{row.get(target, '-'):>11}" for target in manifests))
    return "\n".join([f"triton {triton.__version__}: registers/spills/KB of shared memory", *rows])


def check(manifests: dict[str, list[Record]], baseline: dict[str, Any]) -> list[str]:
    """Return one line per fault.

    A triton without a baseline is reported, and held to the absolute rules only.
    """
    found = []
    for target, manifest in manifests.items():
        versions = {record["triton"] for record in manifest}
        for version in versions:
            before = baseline.get(version, {}).get(target)
            if before is None:
                print(f"no baseline of triton {version} for {target}: absolute rules only")
            found += problems(target, [record for record in manifest if record["triton"] == version], before)
    return found


def update(manifests: dict[str, list[Record]], baseline: dict[str, Any], partial: bool) -> None:
    """Put the numbers of these manifests in the baseline; with `partial`, keep those of other kernels."""
    mine = baseline.setdefault(triton.__version__, {})
    for target, manifest in manifests.items():
        before = mine.get(target, {}) if partial else {}
        mine[target] = dict(sorted((before | baseline_of(manifest)).items()))
    text = json.dumps(baseline, indent=1, sort_keys=True)
    BASELINE.write_text(text + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fastdmd_kernels.aot", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/aot"))
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="TARGET")
    parser.add_argument("--ops", nargs="+", metavar="OP", help="only these")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--check", action="store_true", help="compile nothing, check what is there")
    parser.add_argument(
        "--update-baseline", action="store_true", help=f"compile, then rewrite {BASELINE.name}"
    )
    args = parser.parse_args()
    if knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: nothing would be compiled")
    baseline = json.loads(BASELINE.read_text(encoding="utf-8")) if BASELINE.is_file() else {}
    if args.check:
        manifests = read(args.targets, args.out)
    else:
        manifests = compile_all(args.targets, args.ops, args.out, args.jobs)
    print(table(manifests))
    if args.update_baseline:
        update(manifests, baseline, partial=args.ops is not None)
        return 0
    if not args.check:
        return 0
    problems = check(manifests, baseline)
    print(f"{sum(map(len, manifests.values()))} kernels, {len(problems)} problems", *problems, sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
