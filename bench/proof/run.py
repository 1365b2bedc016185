"""Put every method on the tiny worlds beside its teacher: `python -m bench.proof [CONFIG.toml ..]`.

Trains each configuration, or goes on with its run, N at a time (absent: one a core); what a run prints goes
into proof.log in its folder. Appends summary.json, the configuration's name, versions and commit to
bench/results/proof.jsonl; draws bench/results/proof.svg; prints the table. Of a configuration the last line
counts. Fails when a run does, or when a student is worse than `bench.proof.report.shortfall` allows.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tomllib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import redirect_stderr
from pathlib import Path
from traceback import format_exception

import torch

from bench.proof.report import ORDER, RESULTS, Line, newest, picture, shortfall, table
from bench.record import REPOSITORY, append, machine
from fastdmd import config as configs
from fastdmd import train as trainer
from fastdmd.device import pick_device
from fastdmd.export import export_student
from fastdmd.log import Progress, read_metrics

STARTS_FROM = {"tiny_dcm_detail": "tiny_dcm_semantic"}  # a student that is another's export
EXPORT = "student"  # where, in the other's run


def chains(paths: Sequence[Path], seconds: dict[str, float]) -> list[list[Path]]:
    """Group the configurations into chains that can run side by side, the longest first by `seconds`.

    Those that are not known come before all. In a chain each configuration starts from the one before it.
    """
    by_name = {path.stem: path for path in paths}
    later = {name: first for name, first in STARTS_FROM.items() if {name, first} <= set(by_name)}
    groups = {name: [path] for name, path in by_name.items() if name not in later}
    for name, first in later.items():
        groups[first].append(by_name[name])
    return sorted(
        groups.values(), key=lambda chain: -sum(seconds.get(path.stem, float("inf")) for path in chain)
    )


def prove(chain: Sequence[Path], threads: int, here: Line, results: Path) -> None:
    """Train (or finish) the configurations of a chain, in a process of its own, and append their lines."""
    torch.set_num_threads(threads)
    for path in chain:
        config = configs.load(path)
        folder = Path(config.run.output_dir)
        refuse_other_recipe(folder, config)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "proof.log").open("a", encoding="utf-8") as log, redirect_stderr(log):
            trainer.train(config)
        if path.stem in STARTS_FROM.values():
            export_student(folder, folder / EXPORT, force=True)  # of the same run, made anew
        line = {
            "config": path.stem,
            **json.loads((folder / "summary.json").read_text(encoding="utf-8")),
            **here,
        }
        start = read_metrics(folder / "metrics.jsonl", 0)[0]
        line["scores"]["start"] = {name: start[f"valid/{name}"] for name in ("oracle", "swd")}
        append([results], "proof.jsonl", {**line, "command": f"python -m bench.proof configs/{path.name}"})


def refuse_other_recipe(folder: Path, config: configs.Config) -> None:
    """Raise ValueError where a run of an older recipe stands in the way.

    Finished, it would be recorded as one of this recipe.
    """
    if (path := folder / "config.toml").exists() and path.read_text(encoding="utf-8") != configs.dump(config):
        raise ValueError(f"{folder} is a run of another configuration; remove it")


def watch(running: Mapping[Future[None], Sequence[Path]], runs: Sequence[Line]) -> list[str]:
    """Show how far all are together until all are done.

    Returns the names and the traceback of each chain that failed.
    """
    total = sum(run["max_steps"] for run in runs)

    def steps() -> int:
        """Count the steps that are done, all but one at most: the last is the scores."""
        rows = [read_metrics(Path(run["output_dir"]) / "metrics.jsonl") for run in runs]
        return min(sum(found[-1]["step"] for found in rows if found), total - 1)

    with Progress("step", total, steps()) as progress:
        while wait(running, timeout=2).not_done:
            progress.show(steps(), f"{sum(not future.done() for future in running)} to go")
    errors = {
        " -> ".join(path.stem for path in chain): future.exception() for future, chain in running.items()
    }
    return [f"{names}: {''.join(format_exception(error))}" for names, error in errors.items() if error]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.proof", description=__doc__.splitlines()[0])
    known = [REPOSITORY / "configs" / f"tiny_{name}.toml" for name in ORDER]
    parser.add_argument("configs", type=Path, nargs="*", default=known, help="default: configs/tiny_*.toml")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="runs at a time; default: one a core"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of proof.jsonl and proof.svg")
    arguments = parser.parse_args()
    paths, results = arguments.configs, arguments.results
    if strange := [path.stem for path in paths if path.stem.removeprefix("tiny_") not in ORDER]:
        parser.error(f"{', '.join(strange)}: not of the proof, which is of tiny_{', tiny_'.join(ORDER)}")
    runs = [tomllib.loads(path.read_text(encoding="utf-8"))["run"] for path in paths]
    results.mkdir(parents=True, exist_ok=True)
    work = chains(paths, {line["config"]: line["seconds"] for line in newest(results)})
    jobs = max(1, min(arguments.jobs, len(work)))
    threads = max(1, torch.get_num_threads() // jobs)
    here = {**machine(pick_device("auto")), "threads": threads, "jobs": jobs}
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            failed = watch({pool.submit(prove, chain, threads, here, results): chain for chain in work}, runs)
        finally:  # interrupted: what has not begun does not begin
            pool.shutdown(cancel_futures=True)
    lines = newest(results)
    (results / "proof.svg").write_text(picture(lines), encoding="utf-8")
    print(table(lines))
    mine = {path.stem for path in paths}
    short = [shortfall(line) for line in lines if line["config"] in mine]
    failed += [text for text in short if text is not None]
    if failed:
        sys.exit("\n".join(failed))
