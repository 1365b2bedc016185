"""bench.proof: what goes side by side, what it records, and what it does when a run fails."""

import json
import sys
from pathlib import Path

import pytest
from tiny import write_toml

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench import record
from bench.proof import report as proof_report
from bench.proof import run as proof
from fastdmd.config import ConfigError


def paths(*names):
    return [Path(f"configs/tiny_{name}.toml") for name in names]


def test_chains_put_the_longest_first_and_a_start_before_its_successor():
    seconds = {"tiny_dmd": 10.0, "tiny_sid": 30.0, "tiny_dcm_semantic": 20.0, "tiny_dcm_detail": 15.0}
    work = proof.chains(paths("dmd", "dcm_detail", "sid", "lcm", "dcm_semantic"), seconds)
    assert work == [paths("lcm"), paths("dcm_semantic", "dcm_detail"), paths("sid"), paths("dmd")]


def test_a_successor_alone_is_a_chain():
    assert proof.chains(paths("dcm_detail"), {}) == [paths("dcm_detail")]


def test_every_configuration_of_the_proof_is_there():
    folder = record.REPOSITORY / "configs"
    assert all((folder / f"tiny_{name}.toml").is_file() for name in proof_report.ORDER)
    for name, start in proof.STARTS_FROM.items():
        text = (folder / f"{name}.toml").read_text(encoding="utf-8")
        assert f'"runs/{start}/{proof.EXPORT}"' in text


@pytest.mark.parametrize(
    ("config", "few", "start", "student", "short"),
    [
        ("tiny_dmd_gan", 0.0, 0.0, 0.74, False),
        ("tiny_selfforcing_sid", 0.0, 0.0, 0.73, True),
        ("tiny_lcm", 0.0, 0.0, 0.69, False),
        ("tiny_lcm", 0.0, 0.0, 0.67, True),
        ("tiny_lcm", 0.5, 0.0, 0.74, True),
        ("tiny_lcm", 0.5, 0.0, 0.76, False),
        ("tiny_lcm", 0.0, 0.5, 0.74, True),
    ],
)
def test_a_student_must_be_near_its_teacher_and_far_above_few_steps_of_it(config, few, start, student, short):
    """92 % of 0.8 is 0.736, and 85 % 0.68."""
    scores = {"teacher": 0.8, "teacher_few": few, "start": start, "student": student}
    line = {"config": config, "scores": {who: {"oracle": score} for who, score in scores.items()}}
    assert (proof_report.shortfall(line) is not None) == short


def test_a_proof_records_each_run_and_tells_which_failed(tmp_path, monkeypatch, capsys):
    """The good run's line, picture and table are there although the other one, in its own process, fails."""
    good = write_toml(tmp_path, "dmd").rename(tmp_path / "tiny_dmd.toml")
    good.write_text(
        good.read_text(encoding="utf-8").replace("[validation]", "[validation]\nevery = 3"), encoding="utf-8"
    )
    bad = tmp_path / "tiny_sid.toml"
    bad.write_text(good.read_text(encoding="utf-8").replace('"dmd"', '"did"'), encoding="utf-8")
    arguments = [str(good), str(bad), "--jobs", "2", "--results", str(tmp_path / "results")]
    monkeypatch.setattr(sys, "argv", ["proof", *arguments])
    scores = {who: {"oracle": 0.5, "swd": 1.0} for who in proof_report.WHO}
    # short, and not of this call
    old = {"config": "tiny_lcm", "scores": scores, "student_steps": 4, "seconds": 60.0}
    record.append([tmp_path / "results"], "proof.jsonl", old)
    with pytest.raises(SystemExit, match=r"(?s)^tiny_sid: .*'did'.*tiny_dmd: .*; asked") as e:
        proof.main()
    assert "tiny_lcm: " not in str(e.value)
    _, line = map(json.loads, (tmp_path / "results" / "proof.jsonl").read_text(encoding="utf-8").splitlines())
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert line["config"] == "tiny_dmd"
    assert line["jobs"] == 2
    start = line["scores"].pop("start")
    assert {key: line[key] for key in summary} == summary
    assert start["swd"] != summary["scores"]["student"]["swd"]
    assert "student" in (tmp_path / "run" / "proof.log").read_text(encoding="utf-8")
    assert "dmd, " in (tmp_path / "results" / "proof.svg").read_text(encoding="utf-8")
    assert capsys.readouterr().out.splitlines()[1].startswith("tiny_dmd ")


def test_a_chain_exports_for_its_successor(tmp_path, monkeypatch):
    """Each configuration of a chain is recorded when it ends; a run of another recipe is refused."""
    monkeypatch.setattr(proof, "STARTS_FROM", {"tiny_lcm": "tiny_dmd"})
    for name in ("dmd", "lcm"):
        text = write_toml(tmp_path, name).read_text(encoding="utf-8").replace("/run", f"/{name}")
        (tmp_path / f"tiny_{name}.toml").write_text(text.replace("[validation]", "[validation]\nevery = 3"))
    chain = [tmp_path / "tiny_dmd.toml", tmp_path / "tiny_lcm.toml"]
    edited = chain[1].read_text(encoding="utf-8")
    chain[1].write_text(edited.replace('"lcm"', '"lcn"'), encoding="utf-8")
    with pytest.raises(ConfigError, match="'lcn'"):
        proof.prove(chain, 1, {}, tmp_path)
    assert (tmp_path / "dmd" / proof.EXPORT / "transformer" / "config.json").is_file()
    chain[1].write_text(edited, encoding="utf-8")
    proof.prove(chain, 1, {}, tmp_path)
    assert [line["config"] for line in proof_report.newest(tmp_path)] == ["tiny_dmd", "tiny_lcm"]
    chain[1].write_text(edited.replace("max_steps = 6", "max_steps = 5"), encoding="utf-8")
    with pytest.raises(ValueError, match="is a run of another configuration"):
        proof.prove(chain, 1, {}, tmp_path)


def test_a_chain_that_fails_is_told_by_its_names(tmp_path, monkeypatch):
    """And the reason is not lost where there is nothing to draw."""
    chain = [tmp_path / f"tiny_dcm_{expert}.toml" for expert in ("semantic", "detail")]
    for path in chain:
        path.write_text(f"[run]\noutput_dir = '{tmp_path / 'run'}'\nmax_steps = 6\n", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["proof", *map(str, chain), "--results", str(tmp_path / "results")])
    with pytest.raises(SystemExit, match=r"(?s)^tiny_dcm_semantic -> tiny_dcm_detail: .*method"):
        proof.main()


def test_only_configurations_of_the_proof_are_taken(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["proof", "configs/tiny_flow.toml"])
    with pytest.raises(SystemExit, match="2"):
        proof.main()
    assert "tiny_flow: not of the proof" in capsys.readouterr().err
