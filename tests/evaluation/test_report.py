"""report.html, the table and the montage, from made-up runs."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastdmd.evaluation import chart, film, report
from fastdmd.evaluation.validate import save_webp

PROMPTS = ["a red ring moving left", "<script>alert(\"x\")</script> & a 'quote'"]
SCORES = {
    "teacher": {"oracle": 0.96875, "swd": 0.0131},
    "teacher_few": {"oracle": 0.0104, "swd": 0.2213},
    "student": {"oracle": 0.9375, "swd": 0.0187},
}
NULL = {"oracle": None, "swd": None}
CONFIG = """[run]
output_dir = "runs/<b>"

[method]
name = "dmd"
denoising_timesteps = [1000, 757, 522]

[validation]
teacher_steps = 40
"""
VOID = {"meta", "link", "img"}


def metrics(steps: int = 120) -> list[dict]:
    """Train the student every second step and validate it every fortieth, but not at the end."""
    rows: list[dict] = []
    for step in range(1, steps + 1):
        row = {"step": step, "train/loss_critic": 1 / step, "train/grad_norm_critic": 0.5, "perf/step_s": 1.0}
        if step % 2 == 0:
            row |= {"train/loss_student": 2 / step, "train/grad_norm_student": 1.0 + step}
            row |= {"train/dmd_grad_abs": 0.1, "train/score_gap": 0.2}
        rows.append(row)
        if step % 40 == 0 and step < steps:
            rows.append({"step": step, "valid/oracle": step / steps, "valid/swd": 0.1})
    return rows


def make_run(
    folder: Path, scores=SCORES, rows=None, config=CONFIG, size=(12, 16), who=tuple(SCORES), few=3
) -> Path:
    folder.mkdir(parents=True)
    rows = metrics() if rows is None else rows
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = {"scores": scores, "student_steps": few, "steps": 120, "seconds": 3723.0, "peak_mem_gb": 1.234}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.toml").write_text(config)
    generator = torch.Generator().manual_seed(0)
    for name in who:
        for i in range(len(PROMPTS)):
            video = torch.randint(0, 256, (3, *size, 3), generator=generator, dtype=torch.uint8)
            save_webp(folder / "samples" / name / f"{i:02d}.webp", video)
    return folder


class Page(HTMLParser):
    """A strict reader: every tag is closed in order; keeps tags, attributes and the text outside <style>."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, {key: value or "" for key, value in attrs}))
        assert len(attrs) == len(dict(attrs)), f"an attribute twice in <{tag}>"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data + "\n"

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attrs for name, attrs in self.tags if name == tag]


def read_page(folder: Path, prompts=PROMPTS) -> Page:
    report.write_report(folder, prompts)
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def charts(folder: Path) -> dict[str, list[tuple[str, list[list[float]]]]]:
    """{title: [(CSS class, corners) of every polyline]} of a page."""
    figures = re.findall(r"<figure>.*?</figure>", (folder / "report.html").read_text(encoding="utf-8"), re.S)
    found = {}
    for figure in figures:
        lines = re.findall(r'<polyline class="(\w+)" points="([^"]*)"', figure)
        corners = [
            (style, [[float(n) for n in pair.split(",")] for pair in points.split()])
            for style, points in lines
        ]
        found[re.findall(r"<h3>(.*?)</h3>", figure)[0]] = corners
    return found


def test_page_stands_alone(tmp_path):
    page = read_page(make_run(tmp_path / "tiny"))
    text = (tmp_path / "tiny" / "report.html").read_text(encoding="utf-8")
    assert "http" not in text
    assert "url(" not in text
    assert "@import" not in text
    for tag, attrs in page.tags:
        assert tag != "script"
        assert not any(key.startswith("on") for key in attrs)
        assert all(attrs[key].startswith("data:") for key in ("src", "href") if key in attrs)
    assert not list((tmp_path / "tiny").glob(".*"))  # nothing half-written is left


def test_page_shows_names_scores_and_every_prompt(tmp_path):
    page = read_page(make_run(tmp_path / "tiny <run>"))
    assert page.text.count("tiny <run>") == 2  # title and h1
    for expected in ("0.969", "0.0131", "0.010", "0.2213", "0.938", "0.0187", "1:02:03", "1.23 GB", *PROMPTS):
        assert expected in page.text
    assert 'output_dir = "runs/<b>"' in page.text
    assert [
        head
        for head in ("teacher, 40 steps", "teacher, 3 steps", "student, 3 steps")
        if head not in page.text
    ] == []


def test_pictures_are_the_files_in_the_order_of_the_columns(tmp_path):
    folder = make_run(tmp_path / "tiny")
    images = read_page(folder).all("img")
    files = [folder / "samples" / who / f"{i:02d}.webp" for i in range(2) for who in SCORES]
    names = {
        "teacher": "teacher, 40 steps",
        "teacher_few": "teacher, 3 steps",
        "student": "student, 3 steps",
    }
    assert len(images) == len(files)
    for image, path in zip(images, files, strict=True):
        assert base64.b64decode(image["src"].removeprefix("data:image/webp;base64,")) == path.read_bytes()
        assert image["alt"] == f"{names[path.parent.name]}: {PROMPTS[int(path.stem)]}"
        assert (image["width"], image["height"], image["class"]) == ("192", "144", "pixels")


def test_large_videos_are_reduced(tmp_path):
    folder = make_run(tmp_path / "tiny", size=(240, 2 * report.LIMIT))
    for image in read_page(folder).all("img"):
        with Image.open(io.BytesIO(base64.b64decode(image["src"].split(",")[1]))) as video:
            assert (video.size, video.n_frames) == ((report.LIMIT, 120), 3)
        assert (image["width"], image["class"]) == (str(report.LIMIT), "photo")


def test_curves_have_a_point_for_every_row(tmp_path):
    folder = make_run(tmp_path / "tiny")
    read_page(folder)
    found = charts(folder)
    assert list(found) == ["Oracle", "Sliced Wasserstein", "Loss", "Gradient norm", "Score gap", "Step time"]
    count = {
        title: [len(points) for style, points in lines if style == "raw"] for title, lines in found.items()
    }
    assert count["Loss"] == [
        120
    ]  # of the critic; 60 rows of the student are few enough to be drawn as they are
    assert next(len(points) for style, points in found["Loss"] if style == "line") == 60
    assert count["Step time"] == [120]
    # two levels of the teacher, then the student: two validations and the final score
    assert [len(points) for _, points in found["Oracle"]] == [2, 2, 3]
    levels, (_, student) = [points for _, points in found["Oracle"][:2]], found["Oracle"][2]
    height = chart.BOTTOM - chart.TOP
    assert [points[0][1] for points in levels] == pytest.approx(
        [chart.BOTTOM - height * v for v in (0.96875, 0.0104)], abs=0.1
    )
    assert [y for _, y in student] == pytest.approx(
        [chart.BOTTOM - height * v for v in (1 / 3, 2 / 3, 0.9375)], abs=0.1
    )
    assert [x for x, _ in student] == pytest.approx(
        [chart.LEFT + (chart.RIGHT - chart.LEFT) * v for v in (1 / 3, 2 / 3, 1)], abs=0.1
    )


def test_final_score_is_not_drawn_twice(tmp_path):
    rows = [*metrics(), {"step": 120, "valid/oracle": 0.9375, "valid/swd": 0.0187}]
    folder = make_run(tmp_path / "tiny", rows=rows)
    read_page(folder)
    assert [len(points) for _, points in charts(folder)["Oracle"]] == [2, 2, 3]


def test_everything_drawn_lies_in_the_figure(tmp_path):
    folder = make_run(tmp_path / "tiny")
    read_page(folder)
    for lines in charts(folder).values():
        for _, points in lines:
            assert all(chart.LEFT <= x <= chart.RIGHT and chart.TOP <= y <= chart.BOTTOM for x, y in points)


def test_scores_that_are_null_are_dashes_and_have_no_chart(tmp_path):
    rows = [row for row in metrics() if "valid/oracle" not in row]
    rows.append({"step": 60, "valid/oracle": None, "valid/swd": None})
    folder = make_run(tmp_path / "tiny", scores=dict.fromkeys(SCORES, NULL), rows=rows)
    page = read_page(folder)
    assert page.text.split("\n").count("-") == 6
    assert list(charts(folder)) == ["Loss", "Gradient norm", "Score gap", "Step time"]
    assert len(page.all("img")) == 6  # the teacher was sampled nevertheless


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_what_is_not_finite_is_left_out(tmp_path, odd):
    scores = {**SCORES, "student": {"oracle": 0.0, "swd": odd}}
    folder = make_run(
        tmp_path / "tiny", scores=scores, rows=[{"step": 60, "valid/oracle": 0.0, "valid/swd": odd}]
    )
    read_page(folder)
    assert list(charts(folder)) == ["Oracle"]


def test_run_without_teacher(tmp_path):
    config = '[method]\nname = "flow"\n\n[validation]\nteacher_steps = 50\n'
    scores = {**dict.fromkeys(SCORES, NULL), "student": SCORES["student"]}
    folder = make_run(tmp_path / "tiny", scores=scores, config=config, who=("student",), few=50)
    page = read_page(folder)
    assert "teacher" not in page.text.replace("teacher_steps", "").replace("mean |critic - teacher|", "")
    assert "student, 50 steps" in page.text
    assert len(page.all("img")) == 2
    assert report.table(folder).split("\n")[:3] == [
        "model    steps  oracle  sliced Wasserstein",
        "student     50   0.938              0.0187",
        "",
    ]
    film.comparison(folder, PROMPTS, folder / "comparison.webp")
    with Image.open(folder / "comparison.webp") as montage:
        assert montage.width == 192 + 2 * film.GAP


def test_run_that_has_logged_nothing(tmp_path):
    folder = make_run(tmp_path / "tiny", rows=[])
    read_page(folder)
    assert [len(points) for _, points in charts(folder)["Oracle"]] == [2, 2, 1]  # the final score is a dot


def test_table(tmp_path):
    scores = {**SCORES, "teacher_few": {"oracle": 0.0104, "swd": None}}
    assert report.table(make_run(tmp_path / "tiny", scores=scores)).split("\n") == [
        "model    steps  oracle  sliced Wasserstein",
        "teacher     40   0.969              0.0131",
        "teacher      3   0.010                   -",
        "student      3   0.938              0.0187",
        "",
        "steps        120",
        "seconds      3723.0",
        "peak memory  1.23 GB",
    ]


def test_comparison_moves_every_video_in_its_place(tmp_path):
    folder = make_run(tmp_path / "tiny")
    long = ["a very long prompt " * 20, PROMPTS[1]]
    film.comparison(folder, long, folder / "comparison.webp")
    with Image.open(folder / "comparison.webp") as montage:
        assert montage.n_frames == 3
        assert montage.width == 3 * 192 + 4 * film.GAP
        for t in range(3):
            montage.seek(t)
            sheet = montage.convert("RGB")
            for row in range(2):
                for column, who in enumerate(SCORES):
                    left = film.GAP + column * (192 + film.GAP)
                    top = film.GAP + 2 * film.CAPTION + row * (144 + film.CAPTION + film.GAP)
                    with Image.open(folder / "samples" / who / f"{row:02d}.webp") as video:
                        video.seek(t)
                        expected = video.convert("RGB").resize((192, 144), Image.Resampling.NEAREST)
                    assert sheet.crop((left, top, left + 192, top + 144)).tobytes() == expected.tobytes()


def test_comparison_keeps_time_where_a_video_stands_still(tmp_path):
    """A WebP joins equal frames; the montage has to show a still video beside a moving one."""
    folder = make_run(tmp_path / "tiny")
    still = torch.full((4, 12, 16, 3), 128, dtype=torch.uint8)
    late = still.clone()
    late[2:] = 255
    moving = torch.arange(4, dtype=torch.uint8).mul(60)[:, None, None, None].expand(4, 12, 16, 3).clone()
    for who, video in zip(SCORES, (moving, late, still), strict=True):
        save_webp(folder / "samples" / who / "00.webp", video)
    film.comparison(folder, PROMPTS[:1], folder / "comparison.webp")
    with Image.open(folder / "comparison.webp") as montage:
        y, xs = film.GAP + 2 * film.CAPTION + 70, [film.GAP + i * (192 + film.GAP) + 90 for i in range(3)]
        seen = []
        for t in range(montage.n_frames):
            montage.seek(t)
            seen.append([montage.convert("RGB").getpixel((x, y))[0] for x in xs])
    assert seen == [[0, 128, 128], [60, 128, 128], [120, 255, 128], [180, 255, 128]]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 200, [0, 50, 100, 150, 200]), (-3, 4, [-4, -2, 0, 2, 4])],
)
def test_ticks(low, high, expected):
    assert chart.ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.03, 1.5, [0.02, 0.05, 0.1, 0.2, 0.5, 1, 2]),
        (0.5, 3e6, [0.1, 10, 1e3, 1e5, 1e7]),
        (1, 1e4, [1, 10, 100, 1e3, 1e4]),
    ],
)
def test_log_ticks(low, high, expected):
    assert chart.log_ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    "values", [[0.0], [5.0, 5.0], [-5.0, -5.0], [1e-8, 2e-8], [1.4, 1.5], [-1.0, 300.0], [1e-3, 9.0]]
)
def test_plane_encloses_its_values(values):
    p = chart.plane(values, last=10, bounds=None)
    assert all(chart.TOP <= p.y(value) <= chart.BOTTOM for value in values)


def test_labels_keep_apart():
    assert chart.apart([10, 12, 100], 14, 200) == [10, 24, 100]
    assert chart.apart([190, 195, 200], 14, 200) == [172, 186, 200]


def test_long_curves_are_medians_that_end_at_the_last_step():
    points = [(step, 1000.0 if step % 50 == 0 else float(step)) for step in range(1, 5001)]
    curve = chart.Line("x", "student", points).curve
    assert curve[-1][0] == 5000
    assert len(curve) <= 210
    assert all(value == pytest.approx(step, abs=130) for step, value in curve)
