"""Ahead of time: the checks can fail, machine code is read right, and kernels pass on two targets."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from fastdmd_kernels import aot, aot_resources
from fastdmd_kernels.aot_rules import TARGETS, baseline_of, key, problems

RECORD: dict[str, Any] = {
    "op": "op",
    "kernel": "_kernel",
    "dtype": "bf16",
    "head_dim": 128,
    "triton": "3.7.1",
    "error": "",
    "wants_tensor_cores": True,
    "wants_async_copies": True,
    "registers": 100,
    "spills": 0,
    "shared_bytes": 65536,
    "wgmma": 8,
    "tcgen05": 0,
    "mma": 0,
    "mfma": 0,
    "async_copies": 6,
    "loop_async_copies": 2,
    "code_bytes": 10000,
    "serialized": [],
}
BASELINE = baseline_of([RECORD])


def faults(target="sm_90", baseline: Any = BASELINE, **changed) -> list[str]:
    return [fault.split(": ", 1)[1] for fault in problems(target, [RECORD | changed], baseline)]


# -------------------------------------------------------------------------------------------------- the rules


@pytest.mark.parametrize("target", TARGETS)
def test_a_good_kernel_passes(target):
    assert faults(target) == []
    assert faults(target, baseline=None) == []


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"spills": 4}, "spills 4"),
        ({"error": "RuntimeError: no"}, "does not compile: RuntimeError: no"),
        ({"wgmma": 0}, "no tensor-core instruction"),
        ({"loop_async_copies": 0}, "no asynchronous copy in an inner loop"),
        ({"serialized": ["wgmma serialized"]}, "wgmma serialized"),
    ],
)
def test_absolute_rules(changed, fault):
    assert faults(baseline=None, **changed) == [fault]


@pytest.mark.parametrize(
    ("target", "limit"),
    [("sm_80", 163), ("sm_90", 227), ("sm_100", 227), ("sm_120", 99), ("gfx942", 64), ("gfx950", 160)],
)
def test_shared_memory(target, limit):
    assert faults(target, None, shared_bytes=limit * 1024) == []
    [fault] = faults(target, None, shared_bytes=limit * 1024 + 1)
    assert "shared memory" in fault


@pytest.mark.parametrize("name", ["wgmma", "tcgen05", "mma", "mfma"])
def test_any_tensor_core_will_do(name):
    assert faults(baseline=None, **{"wgmma": 0, name: 1}) == []


def test_what_a_kernel_does_not_want_is_not_asked_of_it():
    assert faults(baseline=None, wgmma=0, wants_tensor_cores=False) == []
    assert faults(baseline=None, loop_async_copies=0, wants_async_copies=False) == []
    assert faults("sm_80", baseline=None, loop_async_copies=0) == []


@pytest.mark.parametrize("name", ["registers", "shared_bytes", "code_bytes"])
def test_five_percent_more_than_the_baseline(name):
    before = RECORD[name]
    assert faults(**{name: before * 104 // 100}) == []
    assert faults(**{name: before // 2}) == []
    assert faults(**{name: before * 106 // 100}) == [f"{name} {before} -> {before * 106 // 100}"]


def test_a_lost_copy_is_worse_than_the_baseline():
    assert faults(loop_async_copies=1) == ["loop_async_copies 2 -> 1"]
    assert faults(loop_async_copies=3) == []


def test_a_new_kernel_needs_a_baseline():
    assert faults(head_dim=64) == ["not in the baseline"]


# ----------------------------------------------------------------------------------------------- the baseline


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Make a folder with one manifest, and a baseline file of its own."""
    (tmp_path / "sm_90").mkdir()
    (tmp_path / "sm_90" / "manifest.json").write_text(json.dumps([RECORD]), encoding="utf-8")
    monkeypatch.setattr(aot, "BASELINE", tmp_path / "baseline.json")
    monkeypatch.setattr(aot.knobs.runtime, "interpret", False)
    return tmp_path


def cli(monkeypatch, folder, *more) -> int:
    monkeypatch.setattr(sys, "argv", ["aot", "--out", str(folder), "--targets", "sm_90", *more])
    return aot.main()


def test_check_of_a_version_without_a_baseline_says_so(folder, monkeypatch, capsys):
    assert cli(monkeypatch, folder, "--check") == 0
    assert "no baseline of triton 3.7.1 for sm_90" in capsys.readouterr().out


def test_check_fails_with_the_kernel_and_the_number(folder, monkeypatch, capsys):
    before = {"3.7.1": {"sm_90": {key(RECORD): BASELINE[key(RECORD)] | {"registers": 90}}}}
    aot.BASELINE.write_text(json.dumps(before), encoding="utf-8")
    assert cli(monkeypatch, folder, "--check") == 1
    assert "sm_90 op _kernel bf16 128: registers 90 -> 100" in capsys.readouterr().out


def test_check_needs_a_manifest(folder, monkeypatch):
    with pytest.raises(SystemExit, match="no manifest of sm_80"):
        cli(monkeypatch, folder, "--targets", "sm_80", "--check")


def test_update_rewrites_this_version_and_target_only(folder, monkeypatch):
    version = aot.triton.__version__
    before = {"1.0": {"sm_90": {"old": {}}}, version: {"sm_80": {"other": {}}, "sm_90": {"gone": {}}}}
    aot.BASELINE.write_text(json.dumps(before), encoding="utf-8")
    monkeypatch.setattr(aot, "compile_all", lambda *_: {"sm_90": [RECORD]})
    assert cli(monkeypatch, folder, "--update-baseline") == 0
    after = json.loads(aot.BASELINE.read_text(encoding="utf-8"))
    assert after == {"1.0": before["1.0"], version: {"sm_80": {"other": {}}, "sm_90": BASELINE}}
    assert cli(monkeypatch, folder, "--update-baseline", "--ops", "op") == 0
    assert json.loads(aot.BASELINE.read_text(encoding="utf-8")) == after


def test_interpreted_kernels_are_not_compiled(folder, monkeypatch):
    monkeypatch.setattr(aot.knobs.runtime, "interpret", True)
    with pytest.raises(SystemExit):
        cli(monkeypatch, folder)


# ------------------------------------------------------------------------------------------- the machine code


def elf(text: bytes) -> bytes:
    """Build the smallest 64-bit ELF with a .text.k section of some size."""
    names = b"\0.shstrtab\0.text.k\0"
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF", 0, 0, 0, 0, 0, 64 + len(names), 0, 64, 0, 0, 64, 2, 0
    )
    sections = [
        struct.pack("<IIQQQQIIQQ", name, 0, 0, 0, 64, size, 0, 0, 0, 0) for name, size in ((1, 19), (11, 70))
    ]
    return header + names + b"".join(sections) + text


SASS = """
.text.k:
  UTMALDG.2D [UR8], [UR4] ;
.L_x_0:
  SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2 ;
  @!P0 BRA `(.L_x_0) ;
.L_x_1:
  HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
.L_x_2:
  SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2 ;
  @!P0 BRA `(.L_x_2) ;
  COPY
  @P1 BRA `(.L_x_1) ;
  EXIT ;
"""
LOG = """ptxas info    : Used 168 registers, used 1 barriers
    0 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
"""
PTX = "wgmma.mma_async.sync.aligned\nwgmma.wait_group\nmma.sync.aligned\ntcgen05.mma.cta_group::1\ntcgen05.ld"


def nvidia(copy="UTMALDG.2D [UR8], [UR4] ;", log=LOG):
    return aot_resources.nvidia(PTX, SASS.replace("COPY", copy), log, elf(b""))


def test_nvidia_report():
    found = nvidia()
    assert (found.registers, found.spills) == (168, 12)
    assert (found.wgmma, found.mma, found.tcgen05, found.mfma) == (1, 1, 1, 0)
    assert (found.async_copies, found.loop_async_copies) == (2, 1)
    assert found.code_bytes == 70
    assert found.serialized == []


def test_a_copy_before_the_loop_is_not_one_in_it():
    found = nvidia(copy="LDG.E.128 R4, [R2.64] ;")
    assert (found.async_copies, found.loop_async_copies) == (1, 0)


def test_a_copy_around_the_inner_loop_is_not_one_in_it():
    outer = ".L_x_9:\n" + SASS.replace("COPY", "").replace("EXIT", "@P2 BRA `(.L_x_9) ;\n EXIT")
    assert aot_resources.nvidia(PTX, outer, LOG, elf(b"")).loop_async_copies == 0


def test_the_loop_that_multiplies_is_the_shortest_one():
    """Neither the waits, of which there are shorter ones, nor what branches back from behind the code."""
    lines = SASS.replace("COPY", "MUFU.EX2 R1, R2 ;").splitlines()
    code = "\n".join(f"        /*{i:04x}*/  {x}" if ";" in x else x for i, x in enumerate(lines))
    behind = code + "\n        /*00ff*/  BRA `(.L_x_0) ;"
    assert aot_resources.multiplying_loop(code) == aot_resources.multiplying_loop(behind) == 5
    assert aot_resources.multiplying_loop(code.replace("HGMMA", "FFMA")) == 0


def test_serialized_wgmma_is_read_from_the_log():
    line = (
        "ptxas info    : (C7510) Potential Performance Loss: "
        "wgmma.mma_async instructions are serialized due to .."
    )
    assert nvidia(log=f"{LOG}{line}\n").serialized == [line]


def test_a_log_without_resources_is_an_error():
    with pytest.raises(ValueError, match="no resources"):
        nvidia(log="")


AMD = """
.LBB0_1:
  v_mfma_f32_16x16x16_bf16 a[0:3], v[0:1], v[2:3], a[0:3]
  buffer_load_dwordx4 v1, s[0:3], 0 offen lds
  s_cbranch_scc1 .LBB0_1
  s_endpgm ; v_mfma_ in a comment
    .private_segment_fixed_size: 16
    .sgpr_spill_count: 2
    .vgpr_count:     332
    .vgpr_spill_count: 3
"""


def test_amd_report():
    found = aot_resources.amd(AMD, elf(b""))
    assert (found.registers, found.spills, found.mfma) == (332, 21, 1)
    assert (found.async_copies, found.loop_async_copies, found.code_bytes) == (1, 1, 70)
    with pytest.raises(ValueError, match="sgpr_spill_count"):
        aot_resources.amd(AMD.replace("sgpr_spill_count", ""), elf(b""))


# ------------------------------------------------------------------------------------------------ the kernels


def test_every_module_with_specs_is_listed():
    pages = Path(aot.__file__).parent.glob("*/triton_*.py")
    with_specs = {
        f"{path.parent.name}.{path.stem}"
        for path in pages
        if "\ndef specs(" in path.read_text(encoding="utf-8")
    }
    assert with_specs == set(aot.MODULES)


def compiled(target: str, out: Path, *ops: str) -> Iterator[str]:
    # not in this process: triton is here with its interpreter
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    kernels = Path(aot.__file__).parents[1]
    command = [
        sys.executable,
        "-m",
        "fastdmd_kernels.aot",
        "--out",
        str(out),
        "--targets",
        target,
        "--jobs",
        "1",
        "--ops",
        *ops,
    ]
    done = subprocess.run(command, env=environment, cwd=kernels, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return aot.check(aot.read([target], out), json.loads(aot.BASELINE.read_text(encoding="utf-8")))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_kernels_pass(target, tmp_path):
    """Compile two ops: all are `make aot`'s, and the largest `make regress`'s."""
    assert list(compiled(target, tmp_path, "vsa_pool", "dmd_loss")) == []
    manifest = json.loads((tmp_path / target / "manifest.json").read_text(encoding="utf-8"))
    assert len(manifest) == len({key(record) for record in manifest}) == 6 + 7
    for record in manifest:
        assert (tmp_path / target / record["file"]).read_bytes()[:4] == b"\x7fELF"
        assert record["registers"] > 0
        assert record["code_bytes"] > 0
