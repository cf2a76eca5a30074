"""Datasets that are read in order (``wds/``, ``hfids/``, ``tfds/``), and mistakes in them, found early if possible."""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

from timm.data import IterableImageDataset

from ...errors import DataError, UsageError
from ...utils.text import one_line
from .image_modes import PixelRangeError, convert_image

__all__ = ["StreamedImages", "check_shards", "check_workers"]

_TROUBLES = (LookupError, ValueError, RuntimeError, TypeError, AttributeError, AssertionError, OSError)


class StreamedImages(IterableImageDataset):
    """A ``timm.data.IterableImageDataset`` of images as ``convert_image`` makes them, ending on what is wrong with it.

    Args:
        dataset: The dataset to read as; its reader and transforms are taken over.
        mode: PIL mode of the images.
        num_classes: Number of the model's outputs; None leaves labels unchecked.
        where: How the user named the split; errors start with it.

    Raises:
        DataError: While it is read: a label is none of the classes, not in the class map or not what
            ``target_transform`` takes, an image has values without
            a known range, the reader fails, or a whole epoch of training has no images.
    """

    def __init__(self, dataset: IterableImageDataset, *, mode: str, num_classes: int | None, where: str) -> None:
        super().__init__(
            root=None, reader=dataset.reader, transform=dataset.transform, target_transform=dataset.target_transform
        )
        if type(self.reader).__name__ != "ReaderTfds":  # which decodes by itself, to 8 bits
            self.reader.input_img_mode = ""  # as they are; the conversion is here
        self.mode = mode
        self.num_classes = num_classes
        self.where = where

    def __iter__(self) -> Generator[tuple[Any, Any], None, None]:
        samples = iter(self.reader)
        count = 0
        while True:
            try:
                image, target = next(samples)
            except StopIteration:
                break
            except KeyError as error:
                raise DataError(f"{self.where}: {_missing(self.reader, error)}") from error
            except _TROUBLES as error:
                raise DataError(f"{self.where}: {one_line(error)}") from error
            target = self._encoded(target)
            try:
                image = convert_image(image, self.mode)
            except PixelRangeError as error:
                name = getattr(image, "filename", "") or f"image {count} of a data worker"
                raise DataError(f"{self.where}: {name}: {error}") from error
            count += 1
            if self.transform is not None:
                image = self.transform(image)
            yield image, target
        if not count and getattr(self.reader, "is_training", False):
            raise DataError(f"{self.where}: a data worker finds no images in its share, the warnings above say why")

    def _encoded(self, target: Any) -> Any:
        """A label, checked, or what ``target_transform`` makes of the labels of an image."""
        if self.target_transform is None:
            self._check_label(target)
            return target
        try:
            return self.target_transform(target)
        except (ValueError, TypeError) as error:
            raise DataError(f"{self.where}: the labels of an image are {target!r}: {one_line(error)}") from error

    def _check_label(self, target: Any) -> None:
        if self.num_classes is None:
            return
        if not _is_index(target):
            raise DataError(f"{self.where}: a label is {target!r}, expected the index of one class")
        if target < 0:
            raise DataError(f"{self.where}: a label is {target}, expected none below 0")
        if target >= self.num_classes:
            raise DataError(
                f"{self.where}: a label is {target}, --num-classes {self.num_classes} ends at "
                f"{self.num_classes - 1}; expected at least {target + 1} classes"
            )


def check_shards(dataset: StreamedImages) -> None:
    """Look for the files of a ``wds/`` split and read its first sample.

    Raises:
        UsageError: A file is missing, the split does not say how many images it has, or its first sample lacks an image
            or label of the names asked for.
    """
    reader, where = dataset.reader, dataset.where
    shards = [os.path.join(reader.root, name) for name in reader.split_info.filenames]
    if not shards:
        raise UsageError(f"{where}: names no shards")
    local = [path for path in shards if "://" not in path and "pipe:" not in path]
    missing = [path for path in local if not os.path.isfile(path)]
    if missing:
        raise UsageError(f"{where}: {len(missing)} of {len(shards)} shards are missing, such as {missing[0]}")
    if not reader.num_samples:
        flag = "--train-num-samples" if reader.is_training else "--val-num-samples"
        raise UsageError(f"{where}: does not say how many images it has; expected {flag} N, or the split with '|N'")
    raw = _first_sample(where, shards)
    names = sorted(name for name in raw if not name.startswith("__"))
    if not raw.keys() & set(reader.input_key.split(";")):
        raise UsageError(f"{where}: its samples have {', '.join(names)}, none of --input-key {reader.input_key}")
    needed = "json" if reader.target_key or reader.split_info.alt_label else "cls"
    if needed not in raw:
        remedy = f"which --target-key {reader.target_key} looks in" if reader.target_key else "the class index"
        raise UsageError(f"{where}: its samples have {', '.join(names)}, expected '{needed}', {remedy}")
    _try_sample(dataset, shards.index(raw["__url__"]))


def _first_sample(where: str, shards: Sequence[str]) -> dict[str, Any]:
    import webdataset

    stream = webdataset.DataPipeline(webdataset.SimpleShardList(list(shards)), webdataset.tarfile_to_samples())
    try:
        found: dict[str, Any] | None = next(iter(stream), None)
    except Exception as error:  # tarfile, gopen and the network raise what they like
        raise UsageError(f"{where}: the first shard cannot be read: {one_line(error)}") from error
    if found is None:
        raise UsageError(f"{where}: no samples in its {len(shards)} shards, such as {shards[0]}")
    return found


def _try_sample(dataset: StreamedImages, shard: int) -> None:
    """Reads the first image that can be read as validation would; the dataset's own reader is for workers to set up."""
    trial, reader = copy.copy(dataset), copy.copy(dataset.reader)
    name = reader.split_info.filenames[shard]
    reader.split_info = dataclasses.replace(reader.split_info, filenames=(name,))
    reader.is_training, reader.num_workers, reader.dist_num_replicas, reader.dist_rank = False, 1, 1, 0
    trial.reader, trial.transform = reader, None
    with _warnings_of(type(reader).__module__) as warnings:
        try:
            with closing(iter(trial)) as samples:
                found = next(samples, None)
        except DataError as error:
            raise UsageError(str(error)) from error
    if found is None:
        reason = f": {one_line(ValueError(warnings[0]))}" if warnings else ""
        raise UsageError(f"{dataset.where}: no sample of {name} can be used{reason}")


@contextmanager
def _warnings_of(module: str) -> Iterator[list[str]]:
    """Collects what a module logs, which then is not printed."""
    found: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        found.append(record.getMessage())
        return False

    logger = logging.getLogger(module)
    logger.addFilter(keep)
    try:
        yield found
    finally:
        logger.removeFilter(keep)


def check_workers(where: str, reader: Any, *, workers: int, processes: int) -> None:
    """Check that every data worker of training has shards of its own: one without would leave its images out.

    Raises:
        UsageError: There are fewer shards than workers of all processes.
    """
    shards = len(reader.split_info.filenames)
    needed = max(1, workers) * processes
    if shards < needed:
        raise UsageError(
            f"--workers {workers}: {where} has {shards} shards for {needed} data workers in {processes} "
            f"processes, each of which needs one; expected at most --workers {shards // processes}"
        )


def _missing(reader: Any, error: KeyError) -> str:
    label = error.args[0] if error.args else "?"
    if getattr(reader, "remap_class", False):
        known = ", ".join(map(repr, list(reader.class_to_idx)[:3]))
        return f"the label {label!r} is not in --class-map, which has {known}, ..."
    return f"its records have no {label!r} (--input-key, --target-key)"


def _is_index(target: Any) -> bool:
    return hasattr(target, "__index__") and not getattr(target, "ndim", 0)
