"""Records of a run as values, and the pictures that are drawn of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from timm_alfa.errors import UsageError
from timm_alfa.report.plot import draw, main
from timm_alfa.run_folder.records import read_run

SUMMARY = """epoch,train_loss,train_loss_clean,train_loss_adv,train_delta_l2_layer4,eval_loss,eval_top1,lr
0,3.0,1.4,1.6,nan,1.5,40.0,0.1
1,2.5,1.2,1.3,0.97,,,0.1
2,2.0,0.9,1.1,nan,1.1,60.0,0.1
"""
ARGS = "model: resnet20s\nalfa_blocks: [layer3, layer4]\nalfa_learnable: true\nalfa_steps: 3\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "summary.csv").write_text(SUMMARY)
    (folder / "args.yaml").write_text(ARGS)
    rows = [f"{step},{0.5 - step / 100},{0.5 + step / 100}" for step in range(1, 13)]
    (folder / "eta.csv").write_text("\n".join(["step,layer3,layer4", *rows]) + "\n")
    return folder


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """What is drawn, by the picture's name."""
    saved: dict[str, Figure] = {}
    savefig = Figure.savefig

    def save(figure: Figure, path: Path) -> None:
        saved[Path(path).name] = figure
        savefig(figure, path)

    monkeypatch.setattr(Figure, "savefig", save)
    return saved


def lines(axes: Axes) -> dict[str, tuple[list[float], list[float]]]:
    return {
        str(line.get_label()): (list(map(float, line.get_xdata())), list(map(float, line.get_ydata())))
        for line in axes.get_lines()
    }


def test_records(run: Path) -> None:
    record = read_run(run)
    assert record.args["model"] == "resnet20s"
    assert record.series("train_loss") == ([1, 2, 3], [3.0, 2.5, 2.0])
    assert record.series("eval_top1") == ([1, 3], [40.0, 60.0])  # not every epoch is validated
    assert record.series("train_delta_l2_layer4") == ([2], [0.97])  # NaN: nothing was measured
    assert record.series("no_such_column") == ([], [])
    assert record.eta_blocks == ["layer3", "layer4"]
    assert record.eta[1] == [2, 0.48, 0.52]


def test_pictures_are_written(run: Path) -> None:
    assert draw(run) == [run / "curves.png", run / "eta.png"]
    for name in ("curves.png", "eta.png"):
        with Image.open(run / name) as image:
            assert image.width > 600
            assert image.convert("L").getextrema()[0] < 64  # something is on it


def test_curves(run: Path, figures: dict[str, Figure]) -> None:
    draw(run)
    losses, accuracy = figures["curves.png"].axes
    assert lines(losses) == {
        "training, clean": ([1, 2, 3], [1.4, 1.2, 0.9]),
        "training, adversarial": ([1, 2, 3], [1.6, 1.3, 1.1]),
        "validation": ([1, 3], [1.5, 1.1]),
    }
    assert lines(accuracy) == {"top-1": ([1, 3], [40.0, 60.0])}
    assert figures["curves.png"].get_suptitle() == "resnet20s, L-ALFA, PGD-3"


def test_eta_over_epochs_with_the_last_block_marked(run: Path, figures: dict[str, Figure]) -> None:
    draw(run)
    (axes,) = figures["eta.png"].axes
    drawn = lines(axes)
    epochs = [step / 4 for step in range(1, 13)]  # twelve steps in three epochs
    assert drawn["layer3"][0] == pytest.approx(epochs)
    assert drawn["layer4 (last)"] == (pytest.approx(epochs), pytest.approx([0.5 + step / 100 for step in range(1, 13)]))
    assert drawn["1/2"][1] == [0.5, 0.5]
    assert axes.get_title() == "resnet20s, L-ALFA, PGD-3"


def test_epochs_that_were_not_recorded_count_too(run: Path, figures: dict[str, Figure]) -> None:
    """With --val-interval 3 only the third epoch has a row."""
    header, *rows = SUMMARY.splitlines()
    (run / "summary.csv").write_text(f"{header}\n{rows[2]}\n")
    draw(run)
    assert lines(figures["eta.png"].axes[0])["layer4 (last)"][0][-1] == pytest.approx(3)


def test_a_plain_run_has_curves_only(run: Path, figures: dict[str, Figure]) -> None:
    (run / "eta.csv").unlink()
    (run / "args.yaml").write_text("model: resnet20s\nalfa_blocks: null\n")
    (run / "summary.csv").write_text("epoch,train_loss,eval_loss,eval_top1\n0,2.0,1.5,40.0\n")
    assert draw(run) == [run / "curves.png"]
    losses, _ = figures["curves.png"].axes
    assert lines(losses) == {"training": ([1], [2.0]), "validation": ([1], [1.5])}
    assert figures["curves.png"].get_suptitle() == "resnet20s"


def test_a_run_without_a_finished_epoch(run: Path) -> None:
    (run / "summary.csv").write_text("")
    (run / "args.yaml").unlink()
    assert draw(run) == [run / "curves.png", run / "eta.png"]


def test_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(run), "--output", str(tmp_path / "pictures")])
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "pictures" / name) for name in (
        "curves.png", "eta.png")]  # fmt: skip
    assert (tmp_path / "pictures" / "eta.png").stat().st_size > 0
    assert not (run / "eta.png").exists()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("summary.csv", None, "expected the folder of a run, with a summary.csv in it"),
        ("eta.csv", "step,layer3\n1,abc\n", "cannot be read"),
        ("eta.csv", "", "cannot be read"),
        ("args.yaml", "a: [1\nb: 2", "cannot be read"),
        ("args.yaml", "just a sentence", "cannot be read"),
        ("summary.csv", b"epoch,train_loss\n\xff\xfe", "cannot be read"),
    ],
)
def test_what_is_no_run_is_said_in_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], name: str, content: str | bytes | None, expected: str
) -> None:
    if content is None:
        (run / name).unlink()
    else:
        (run / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit) as caught:
        main([str(run)])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"timm-alfa-plot: error: {run}: ")
    assert expected in error
    assert error.count("\n") == 1


def test_an_output_that_cannot_be_written(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as caught:
        main([str(run), "--output", str(tmp_path / "file")])
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_without_matplotlib(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r'pip install "timm-alfa\[plot\]"'):
        draw(run)
