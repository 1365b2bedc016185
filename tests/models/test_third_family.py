"""Test that a family costs a folder and a row: third_family.py is all that fastdmd learns of one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import DMD, FLOW, rows

FAMILY = Path(__file__).with_name("third_family.py")
DOTS = {"wan2.1": "dots", "frames = 3\n": "", "[8, 8]": "[12, 12]"}


def of_dots(text: str, here: Path, **changes: str) -> str:
    for old, new in {**DOTS, **changes}.items():
        assert old in text
        text = text.replace(old, new)
    return text.format(here=here)


def fastdmd(*arguments: str) -> str:
    """Run the command line with the family, and return what it prints."""
    done = subprocess.run([sys.executable, FAMILY, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(*arguments: str) -> list[str]:
    done = subprocess.run([sys.executable, FAMILY, *arguments], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    return done.stderr.splitlines()


@pytest.mark.slow
def test_a_new_family_is_trained_and_distilled(tmp_path):
    """From random weights to a teacher, to a student with GAN heads, to samples, scores and an export."""
    scratch = of_dots(FLOW, tmp_path, **{'path = "{here}/wan"': "", "{here}/run": "{here}/teacher"})
    (tmp_path / "flow.toml").write_text(scratch + "[model.architecture]\nwidth = 8\n")
    fastdmd("train", str(tmp_path / "flow.toml"))
    assert "DotsPipeline.from_pretrained" in fastdmd(
        "export", str(tmp_path / "teacher"), "--out", str(tmp_path / "wan")
    )
    assert json.loads((tmp_path / "wan" / "dots" / "config.json").read_text())["width"] == 8

    (tmp_path / "dmd.toml").write_text(of_dots(DMD, tmp_path))
    gan = ("method.gan_weight=0.1", "method.gan_layers=[0]", "optim.disc.lr=1e-3")
    assert "teacher" in fastdmd("train", str(tmp_path / "dmd.toml"), *gan)
    assert rows(tmp_path / "run")[-1]["step"] == 6
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert all(scores["swd"] > 0 for scores in summary["scores"].values())
    fastdmd("sample", str(tmp_path / "run"), "--out", str(tmp_path / "videos"), "--prompt", "a red ring")
    assert (tmp_path / "videos" / "00.webp").is_file()


@pytest.mark.slow
@pytest.mark.campaign
def test_a_new_family_is_distilled_on_prompts(tmp_path):
    scratch = of_dots(FLOW, tmp_path, **{'path = "{here}/wan"': ""})
    (tmp_path / "prompts.txt").write_text("a red ring\na blue square\n")
    (tmp_path / "flow.toml").write_text(scratch + "[model.architecture]\nwidth = 8\n")
    fastdmd("train", str(tmp_path / "flow.toml"), "run.max_steps=1")
    fastdmd("export", str(tmp_path / "run"), "--out", str(tmp_path / "wan"))
    (tmp_path / "dmd.toml").write_text(of_dots(DMD, tmp_path))
    prompts = f'data.sources=["{tmp_path}/prompts.txt"]'
    other = f'run.output_dir="{tmp_path}/free"'
    fastdmd("train", str(tmp_path / "dmd.toml"), prompts, other, "run.max_steps=1")


def test_its_table_and_its_sizes_are_checked_as_any_family_s(tmp_path):
    (tmp_path / "bad.toml").write_text(
        of_dots(FLOW, tmp_path, **{'path = "{here}/wan"': "", "[12, 12]": "[12, 13]", "flow_shift = 3.0": ""})
        + "[model.architecture]\nwidth = 0\nheads = 2\ntext_dim = 16\n"
    )
    text = "\n".join(refused("train", str(tmp_path / "bad.toml")))
    for line in (
        "model.architecture.width: 0 is not positive; use 1 or more",
        "model.architecture.heads: unknown key; known are width, in_channels, out_channels, text_dim",
        "schedule.flow_shift: missing; write flow_shift = <a number>",
    ):
        assert line in text
    (tmp_path / "bad.toml").write_text(of_dots(FLOW, tmp_path, dots="dotz"))
    assert (
        "'dotz' is not one of wan2.1, sdxl, dots; did you mean 'dots'?"
        in refused("train", str(tmp_path / "bad.toml"))[0]
    )


def test_the_family_is_a_page():
    """It takes no more than eighty lines, its network included."""
    assert len([line for line in FAMILY.read_text().splitlines() if line.strip()]) <= 80
