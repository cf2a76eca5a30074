from __future__ import annotations

import json
from pathlib import Path

import pytest
from training_images import make_image_folder

from timm_alfa.bench import rounding
from timm_alfa.errors import UsageError

FLAGS = "--model test_efficientnet --img-size 32 --num-classes 3 -b 6 --workers 0 --device cpu"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("images"), train=4)


@pytest.mark.parametrize("half", ["--amp --amp-dtype bfloat16", "--model-dtype bfloat16"])
@pytest.mark.parametrize("steps", [0, 3])
def test_shares_are_measured(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], half: str, steps: int
) -> None:
    flags = f"--alfa-blocks blocks.2 @last --sizes 0.5/255 0.1% 2% --plain-steps {steps} {half}"
    flags += f" --report {tmp_path}/rounding"
    rounding.main([*FLAGS.split(), "--data-dir", str(images), *flags.split()])
    table = capsys.readouterr().out
    assert (tmp_path / "rounding.md").read_text() == table
    record = json.loads((tmp_path / "rounding.json").read_text())
    assert (record["half_precision"], record["input"], record["plain_steps"]) == ("bfloat16", [6, 3, 32, 32], steps)
    assert [row["block"] for row in record["rows"]] == ["blocks.2", "blocks.4"]
    for row in record["rows"]:
        assert row["rounded_to"] == "bfloat16"
        assert row["ratio"]["2%"] == pytest.approx(0.02, rel=0.01)
        survives = list(row["survives"].values())
        assert list(row["survives"]) == ["0.5/255", "0.1%", "2%"]
        assert 0 < row["survives"]["0.1%"] < row["survives"]["2%"] <= 1
        assert f"| `{row['block']}` | bfloat16 | " in table
        assert all(0 <= share <= 1 for share in survives)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--alfa-blocks @last", "--amp: expected half precision; add --amp --amp-dtype bfloat16, or --model-dtype"),
        ("--amp --amp-dtype bfloat16", "--alfa-blocks: expected the blocks to perturb, such as @last; add them"),
        ("--amp --plain-steps -1", "--plain-steps -1: expected a whole number of at least 0"),
        ("--amp --sizes 2% x", "--sizes x: expected a number or a fraction such as 0.5/255, found 'x'"),
        ("--amp --sizes 0", "--sizes 0: expected a finite step size above 0, such as 0.5/255 or 2%"),
        ("--amp --roundz 3", "unrecognized arguments: --roundz"),
        ("--amp --noise-blocks @last --method noise", "--alfa-blocks: expected the blocks to perturb"),
    ],
)
def test_mistakes(images: Path, flags: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        rounding.main([*FLAGS.split(), "--data-dir", str(images), *flags.split()])
