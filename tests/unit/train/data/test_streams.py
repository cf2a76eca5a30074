"""``wds/`` shards: what is wrong with them is found before anything is written, in one line."""

from __future__ import annotations

import gc
import io
import json
import pickle
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from timm_alfa.errors import DataError, UsageError
from timm_alfa.robust.command import main as robust
from timm_alfa.train import main
from timm_alfa.train.arguments.command_line import build_parser
from timm_alfa.train.data.datasets import check_class_count, check_data_arguments, create_datasets
from timm_alfa.train.data.loaders import create_loaders

pytest.importorskip("webdataset")  # the test extra has it
pytestmark = pytest.mark.filterwarnings(
    "ignore:unclosed file:ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore:.*use of fork:DeprecationWarning",
)  # webdataset leaves its files to the garbage collector
CONFIG = {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.2,) * 3, "interpolation": "bilinear", "crop_pct": 1}


@pytest.fixture(autouse=True)
def _collect() -> Iterator[None]:
    yield
    gc.collect()  # here, where the warnings about files are expected


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


def sample(label: int, **others: bytes) -> dict[str, bytes]:
    """The files of one sample, by their endings."""
    return {"png": encoded(Image.new("RGB", (16, 16), (20 * label,) * 3)), "cls": str(label).encode(), **others}


def write_shards(root: Path, split: str, *shards: list[dict[str, bytes]]) -> Path:
    root.mkdir(exist_ok=True)
    for number, samples in enumerate(shards):
        with tarfile.open(root / f"{split}-{number}.tar", "w") as archive:
            for index, files in enumerate(samples):
                for ending, data in files.items():
                    item = tarfile.TarInfo(f"{number}-{index:03}.{ending}")
                    item.size = len(data)
                    archive.addfile(item, io.BytesIO(data))
    return root


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of training with 6 images each, one of validation with 6; labels are 0 to 2."""
    root = tmp_path_factory.mktemp("shards")
    write_shards(root, "train", [sample(index % 3) for index in range(6)], [sample(index % 3) for index in range(6)])
    return write_shards(root, "val", [sample(index % 3) for index in range(6)])


def parse(root: Path, *flags: object, **known: Any) -> Any:
    args = build_parser().parse_args([
        "--dataset", "wds/", "--data-dir", str(root), "--train-split", "train-{0..1}.tar|12", "--val-split",
        "val-{0..0}.tar|6", "--workers", "0", "--batch-size", "4", *map(str, flags)])  # fmt: skip
    args.prefetcher, args.distributed, args.num_classes = True, False, 3
    for name, value in known.items():
        setattr(args, name, value)
    return args


def datasets_of(args: Any) -> tuple[Any, Any]:
    check_data_arguments(args)
    datasets = create_datasets(args, CONFIG)
    check_class_count(args, *datasets)
    return datasets


def loaders_of(args: Any, datasets: tuple[Any, Any]) -> tuple[Any, Any]:
    return create_loaders(
        args, CONFIG, *datasets, device=torch.device("cpu"), img_dtype=torch.float32, collate_fn=None
    )[:2]


def refused(*arguments: Any, **known: Any) -> str:
    with pytest.raises(UsageError) as caught:
        datasets_of(parse(*arguments, **known))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_go_through_to_batches(shards: Path, workers: int):
    args = parse(shards, "--no-aug", workers=workers)
    train, held_out = loaders_of(args, datasets_of(args))
    assert len(train) * 4 == 12 + 4 * (workers == 2)  # each worker fills its batches
    for loader, count in ((train, len(train) * 4), (held_out, 6)):
        labels = []
        for images, target in loader:
            expected = (20 * target / 255 - 0.5) / 0.2
            torch.testing.assert_close(images, expected.view(-1, 1, 1, 1).expand(-1, 3, 16, 16))
            labels += target.tolist()
        assert len(labels) == count
        assert set(labels) == {0, 1, 2}


def test_wrong_keys(shards: Path, tmp_path: Path):
    message = refused(shards, "--input-key", "jpeg;tiff")
    assert message == "--train-split train-{0..1}.tar|12: its samples have cls, png, none of --input-key jpeg;tiff"
    message = refused(shards, "--target-key", "label")
    assert message.endswith("its samples have cls, png, expected 'json', which --target-key label looks in")
    root = write_shards(tmp_path, "train", [sample(0, json=b'{"name": 1}')] * 6, [sample(0)])
    message = refused(root, "--target-key", "label")
    assert "Target key(s) ['label'] not found in the json sidecar of sample" in message
    root = write_shards(tmp_path / "a", "train", [{"png": b"", "label": b"0"}] * 6, [sample(0)])
    assert refused(root).endswith("its samples have label, png, expected 'cls', the class index")
    root = write_shards(tmp_path / "b", "train", [sample(0, cls=b"cat")] * 6, [sample(0)])
    assert "no sample of train-0.tar can be used: Handling webdataset error (ValueError(" in refused(root)
    root = write_shards(tmp_path / "c", "train", [sample(0, png=b"no image")] * 6, [sample(0)])
    assert "no sample of train-0.tar can be used: Handling webdataset error (UnidentifiedImageError(" in refused(root)


def test_missing_shards(shards: Path, tmp_path: Path):
    message = refused(shards, "--train-split", "train-{0..3}.tar|12")
    assert message == (
        f"--train-split train-{{0..3}}.tar|12: 2 of 4 shards are missing, such as {shards / 'train-2.tar'}"
    )
    assert "--val-split other-{0..0}.tar|6: 1 of 1 shards are missing" in refused(
        shards, "--val-split", "other-{0..0}.tar|6"
    )
    assert "split train not found in info" in refused(shards, "--train-split", "train")
    root = write_shards(tmp_path, "train", [], [])
    assert "no samples in its 2 shards, such as " in refused(root)
    (tmp_path / "train-0.tar").write_bytes(b"no tar file" * 1000)
    assert "the first shard cannot be read: " in refused(root)


def test_the_number_of_images_is_missing(shards: Path):
    message = refused(shards, "--val-split", "val-{0..0}.tar")
    assert message == (
        "--val-split val-{0..0}.tar: does not say how many images it has; expected --val-num-samples N, "
        "or the split with '|N'"
    )
    assert "num_samples not specified in train mode" in refused(shards, "--train-split", "train-{0..1}.tar")
    datasets_of(parse(shards, "--val-split", "val-{0..0}.tar", "--val-num-samples", 6))


def test_splits_of_an_info_file(shards: Path, tmp_path: Path):
    root = write_shards(tmp_path, "train", [sample(1)] * 6)
    split: dict[str, Any] = {"name": "train", "num_samples": 6, "filenames": ["train-0.tar"], "shard_lengths": [6]}
    info = {"splits": {"train": split}}
    (root / "_info.json").write_text(json.dumps(info))
    train, _ = datasets_of(parse(root, "--train-split", "train", "--val-split", ""))
    assert len(train) == 8  # in full batches
    split["filenames"] = []
    (root / "_info.json").write_text(json.dumps(info))
    assert refused(root, "--train-split", "train", "--val-split", "") == "--train-split train: names no shards"


def test_more_workers_than_shards(shards: Path):
    args = parse(shards, workers=3)
    with pytest.raises(UsageError) as caught:
        loaders_of(args, datasets_of(args))
    assert str(caught.value) == (
        "--workers 3: --train-split train-{0..1}.tar|12 has 2 shards for 3 data workers in 1 processes, each of which "
        "needs one; expected at most --workers 2"
    )
    args = parse(shards, workers=2, distributed=True, world_size=2)
    with pytest.raises(UsageError, match="2 shards for 4 data workers in 2 processes"):
        loaders_of(args, datasets_of(parse(shards)))


def test_class_maps(shards: Path, tmp_path: Path):
    (tmp_path / "map.txt").write_text("cat\ndog\neel\n")
    message = refused(shards, "--class-map", tmp_path / "map.txt")
    assert message == (
        "--train-split train-{0..1}.tar|12: the label 0 is not in --class-map, which has 'cat', 'dog', 'eel', ..."
    )
    (tmp_path / "map.pkl").write_bytes(pickle.dumps({0: 2, 1: 1, 2: 0}))
    args = parse(shards, "--class-map", tmp_path / "map.pkl")
    assert [target for _, target in datasets_of(args)[1]] == [2, 1, 0] * 2
    (tmp_path / "map.pkl").write_bytes(pickle.dumps({0: 0, 1: 1}))
    _, held_out = datasets_of(parse(shards, "--class-map", tmp_path / "map.pkl"))
    with pytest.raises(DataError, match=r"--val-split .*: the label 2 is not in --class-map, which has 0, 1, "):
        list(held_out)
    assert "--class-map none.txt: no such file" in refused(shards, "--class-map", "none.txt")


def test_labels_beyond_the_models_outputs(shards: Path, tmp_path: Path):
    _, held_out = datasets_of(parse(shards, num_classes=2))
    with pytest.raises(DataError) as caught:
        list(held_out)
    assert str(caught.value) == (
        "--val-split val-{0..0}.tar|6: a label is 2, --num-classes 2 ends at 1; expected at least 3 classes"
    )
    root = write_shards(tmp_path, "train", [sample(5)], [sample(0)])
    assert "a label is 5, --num-classes 3 ends at 2; expected at least 6 classes" in refused(root)
    several = [sample(0, json=b'{"label": [0, 2]}')] * 2
    root = write_shards(tmp_path / "a", "train", several, several)
    assert "a label is [0, 2], expected the index of one class" in refused(root, "--target-key", "label")


@pytest.mark.parametrize("in_chans", [1, 3])
def test_images_of_16_bits(tmp_path: Path, in_chans: int):
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    grey = [sample(0, png=encoded(Image.fromarray(values)))] * 2
    root = write_shards(tmp_path, "train", grey, grey)
    args = parse(root, "--val-split", "")
    train, _ = create_datasets(args, {**CONFIG, "input_size": (in_chans, 16, 16)})
    image = next(iter(train))[0]
    assert image.mode == ("L" if in_chans == 1 else "RGB")
    assert np.asarray(image).reshape(4, -1)[:, 0].tolist() == [0, 1, 128, 255]
    unbounded = [sample(0, png=encoded(Image.fromarray(np.array([[0, 70000]], dtype=np.int32)), "TIFF"))] * 2
    root = write_shards(tmp_path / "a", "train", unbounded, unbounded)
    assert "image 0 of a data worker: a 32-bit image with values from 0 to 70000, expected" in refused(root)


def test_the_command_trains_on_shards_or_ends_in_one_line(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    command = ["--dataset", "wds/", "--data-dir", str(shards), "--train-split", "train-{0..1}.tar|12", "--val-split",
               "val-{0..0}.tar|6", "--workers", "0", "--batch-size", "4", "--model", "test_resnet", "--img-size", "32",
               "--epochs", "1", "--lr", "0.01", "--output", str(tmp_path), "--experiment", "run"]  # fmt: skip
    for extra, code, message in (
        (["--num-classes", "3", "--input-key", "jpg"], 2, "none of --input-key jpg"),
        (["--num-classes", "3", "--val-split", "none-{0..0}.tar|6"], 2, "1 of 1 shards are missing"),
        (["--num-classes", "1"], 1, "a label is "),  # some image further on
    ):
        with pytest.raises(SystemExit) as caught:
            main([*command, *extra])
        error = capsys.readouterr().err
        assert (caught.value.code, error.count("\n")) == (code, 1)
        assert message in error
    assert not (tmp_path / "run" / "last.pth.tar").exists()
    main([*command, "--num-classes", "3"])
    weights = str(tmp_path / "run-1" / "model.safetensors")
    found = robust([*command[:-4], "--num-classes", "3", "--initial-checkpoint", weights, "--eval-pgd", "1"])
    assert found["images"] == 6  # each once, and no batch filled up
    names = json.loads((tmp_path / "run-1" / "config.json").read_text()).get("label_names")
    assert names is None  # shards do not say
