"""The HTML page of a run: one file that loads nothing, shows every figure, and escapes whatever a run is called."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from timm_alfa.report.chart import Line, line_chart
from timm_alfa.report.page import main, write_report
from timm_alfa.report.settings import differing_settings, split_settings
from timm_alfa.train.arguments.command_line import parse_args

HOSTILE = '"><script>alert(1)</script>&amp;\x07'
VOID = {"meta", "br"}
SHAPES = {"svg", "title", "g", "line", "text", "polyline", "circle"}


class Page(HTMLParser):
    """Reads a page, and fails where elements are not closed in order."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.cells: list[list[str]] = []
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1].append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def polylines(self) -> list[list[tuple[float, ...]]]:
        return [
            [tuple(map(float, point.split(","))) for point in value.split()]
            for name, value in self.attributes if name == "points" and value
        ]  # fmt: skip


def make_run(folder: Path, *, learnable: bool = True, accuracy: float = 60.0, **args: object) -> Path:
    folder.mkdir(parents=True)
    blocks = ["layer3", "layer4"] if learnable else []
    norms = {f"train_delta_{kind}_{block}": 0.5 for block in blocks for kind in ("l2", "linf", "ratio")}
    rows = [
        {"epoch": epoch, "train_loss": 3.0 - epoch, "train_step_time": 0.25, "train_images_per_second": 128.0, **norms,
         "eval_loss": 1.5, "eval_top1": accuracy - 5 * abs(epoch - 1), "eval_top5": 90.0, "lr": 0.1}
        for epoch in range(3)
    ]  # fmt: skip
    lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    (folder / "summary.csv").write_text("\n".join(lines) + "\n")
    flags = ["--alfa-blocks", *blocks, "--alfa-learnable"] if learnable else []
    config = vars(parse_args(["--model", "resnet18", "--lr", "0.25", *flags])) | args
    (folder / "args.yaml").write_text(yaml.safe_dump(config))
    (folder / "environment.yaml").write_text(yaml.safe_dump({"command": "train_alfa.py --lr 0.25", "torch": "2.15.0"}))
    if learnable:
        steps = [f"{step},{0.5 - step / 100},{0.5 + step / 100}" for step in range(1, 13)]
        (folder / "eta.csv").write_text("\n".join(["step,layer3,layer4", *steps]) + "\n")
    return folder


def test_one_run(tmp_path: Path) -> None:
    path = write_report([make_run(tmp_path / "run")])
    assert path == tmp_path / "run" / "report.html"
    page = Page(path)
    figures = [
        "validation accuracy (%)", "loss", "learning rate", "eta", "delta: l2 norm per image", "delta: largest entry",
        "delta: rms relative to the feature's", "images per second",
    ]  # fmt: skip
    assert page.tags.count("figure") == len(figures)
    labels = [value or "" for name, value in page.attributes if name == "aria-label"]
    assert [label for label in labels if label.startswith("Line chart")] == [
        label for figure in figures for label in labels if label.startswith(f"Line chart of {figure} by epoch: ")
    ]
    assert "Line chart of validation accuracy (%) by epoch: top-1 from 55 to 55; top-5 from 90 to 90" in labels
    assert ["layer3", "0.5", "0.5", "0.5"] in page.cells
    for expected in (
        "resnet18, L-ALFA, PGD-1",
        "best top-1, epoch 2",
        "60 %",
        "0.25 s",
        "3 of 300",
        "--lr",
        "2.15.0",
        "train_alfa.py --lr 0.25",
        "flags at their defaults",
        "layer4 (last)",
    ):
        assert expected in page.text
    assert ["2", "2", "0.25", "128", "1.5", "60", "90", "0.1"] in page.cells  # every epoch, as a table too


def test_a_run_in_half_precision(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    header, *rows = (folder / "summary.csv").read_text().splitlines()
    added = [f"{header},train_delta_survives_layer3", *(f"{row},0.375" for row in rows)]
    (folder / "summary.csv").write_text("\n".join(added) + "\n")
    page = Page(write_report([folder]))
    titles = ["l2 norm per image", "largest entry", "rms relative to the feature's"]
    assert ["block", *titles, "share of delta that half precision leaves"] in page.cells
    assert ["layer3", "0.5", "0.5", "0.5", "0.375"] in page.cells


def test_nothing_is_loaded_or_run(tmp_path: Path) -> None:
    path = write_report([make_run(tmp_path / "run"), make_run(tmp_path / "other")])
    page = Page(path)
    assert not {"script", "link", "img", "iframe", "object", "base", "form", "a"} & set(page.tags)
    assert not {"src", "href", "xlink:href", "action", "srcset"} & {name for name, _ in page.attributes}
    assert not any(name.startswith("on") for name, _ in page.attributes)
    text = path.read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert not any(word in text for word in ("http://", "https://", "@import", "url("))
    assert len(text) < 100_000


def test_hostile_names_are_text(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "<img src=x onerror=alert(1)>", model=HOSTILE, experiment=HOSTILE, **{HOSTILE: 1})
    for name in ("eta.csv", "summary.csv"):
        (folder / name).write_text((folder / name).read_text().replace("layer3", "<b>layer3"))
    (folder / "environment.yaml").write_text(yaml.safe_dump({"command": HOSTILE}))
    for runs in ([folder], [folder, make_run(tmp_path / "plain", learnable=False)]):
        page = Page(write_report(runs, tmp_path / "page.html"))
        assert not {"script", "img", "b"} & set(page.tags)
        assert "\x07" not in page.text
        assert '"><script>alert(1)</script>&amp;\N{REPLACEMENT CHARACTER}' in page.text
        assert "<b>layer3" in page.text
        assert "onerror=alert(1)" in page.text


def test_several_runs(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a" / "run"), make_run(tmp_path / "plain", learnable=False, accuracy=50.0, seed=7)]
    path = write_report(runs)
    assert path == tmp_path / "report.html"
    page = Page(path)
    assert page.tags.count("figure") == 6  # four curves, eta of the one that has it, speed
    assert ["run", "resnet18, L-ALFA, PGD-1", "60", "2", "55", "1.5", "128", "1", "3 of 300"] in page.cells
    assert ["plain", "resnet18", "50", "2", "45", "1.5", "128", "1", "3 of 300"] in page.cells
    assert ["--seed", "42", "7"] in page.cells
    assert ["--alfa-blocks", "layer3 layer4", "none"] in page.cells
    assert "--lr" not in [row[0] for row in page.cells if row]  # the same in both
    assert len(page.polylines()) > 12


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    page = Page(write_report([make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run")]))
    assert {str(tmp_path / "a" / "run"), str(tmp_path / "b" / "run")} < {row[0] for row in page.cells if row}


def test_a_run_without_records_beyond_timms(tmp_path: Path) -> None:
    """Such as one of timm's own script."""
    (tmp_path / "summary.csv").write_text("epoch,train_loss,eval_loss,eval_top1,lr\n0,2.0,1.5,40.0,0.1\n")
    page = Page(write_report([tmp_path]))
    assert page.tags.count("figure") == 3
    assert "40 %" in page.text


def test_a_run_without_a_finished_epoch(tmp_path: Path) -> None:
    (tmp_path / "summary.csv").write_text("")
    page = Page(write_report([tmp_path]))
    assert "No epoch of this run has been recorded yet." in page.text
    assert "figure" not in page.tags


def test_a_long_run_of_many_blocks_stays_small(tmp_path: Path) -> None:
    blocks = [f"layer{index}.conv" for index in range(20)]
    names = [f"train_{kind}_{block}" for block in blocks for kind in ("eta", "delta_l2", "delta_linf", "delta_ratio")]
    header = ",".join(["epoch", "train_loss", "eval_loss", "eval_top1", "eval_top5", "lr", *names])
    rows = [",".join([str(epoch), *[f"{0.123456789 + epoch}"] * (5 + len(names))]) for epoch in range(200)]
    (tmp_path / "summary.csv").write_text("\n".join([header, *rows]) + "\n")
    steps = [",".join([str(step), *["0.0512345"] * 20]) for step in range(1, 20_001)]
    (tmp_path / "eta.csv").write_text("\n".join([",".join(["step", *blocks]), *steps]) + "\n")
    assert write_report([tmp_path]).stat().st_size < 300_000


@pytest.mark.parametrize(
    ("values", "kept"), [([1.0, float("inf"), 3.0], 2), ([2.0, 2.0, 2.0], 3), ([1e-9, 5.0, 1e9], 3)]
)
@pytest.mark.parametrize("log", [False, True])
def test_curves_stay_within_the_picture(tmp_path: Path, values: list[float], kept: int, log: bool) -> None:
    figure = line_chart("title", [Line("label", [1, 2, 3], values, hue=0, strong=True)], log=log)
    (curve,) = [item for item in figure.iter("polyline") if item.get("points") != "0,5 24,5"]
    points = [tuple(map(float, point.split(","))) for point in curve.get("points").split()]
    assert len(points) == kept
    assert all(0 <= x <= 360 and 0 <= y <= 230 for x, y in points)
    heights = [y for _, y in points]
    assert heights == sorted(heights, reverse=True)  # larger values are higher up
    assert {item.tag for item in figure.iter()} <= SHAPES | {"figure", "figcaption", "ul", "li"}


def test_nothing_to_draw_is_no_figure() -> None:
    assert line_chart("title", [Line("label", [1], [float("nan")], hue=0), Line("empty", [], [], hue=0)]) is None


def test_settings() -> None:
    alfa = vars(parse_args(["--lr", "0.5", "--alfa-blocks", "@last", "--alfa-steps", "1", "--model-ema"]))
    changed, rest = split_settings({**alfa, "from_a_later_version": [1, 2], "empty": ""})
    assert changed == {
        "--lr": "0.5", "--alfa-blocks": "@last", "--model-ema": "yes", "--method": "alfa",
        "--from-a-later-version": "1 2"}  # fmt: skip
    assert rest["--alfa-alpha"] == "0.00196078"
    assert rest["--empty"] == ""
    assert split_settings(vars(parse_args([])))[0] == {}
    assert differing_settings([{"a": 1, "b": 2}, {"a": 1}]) == {"--b": ["2", "none"]}


@pytest.mark.parametrize("case", ["no run", "twice", "unwritable"])
def test_mistakes_are_one_line(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(make_run(tmp_path / "run"))
    (tmp_path / "file").write_text("")
    argv, expected = {
        "no run": ([run, str(tmp_path / "nowhere")], "expected the folder of a run"),
        "twice": ([run, f"{run}/."], "named 2 times; expected each run once"),
        "unwritable": ([run, "--output", str(tmp_path / "file" / "page.html")], "cannot be written"),
    }[case]
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("timm-alfa-report: error: ")
    assert expected in error
    assert error.count("\n") == 1
    assert not list(tmp_path.rglob("*.html"))


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(make_run(tmp_path / "run")), "--output", str(tmp_path)])
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
    assert (tmp_path / "report.html").stat().st_size > 1000
