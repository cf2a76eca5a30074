from __future__ import annotations

import argparse
import errno
import os
import resource

import pytest
import torch
from timm.task import ClassificationTask
from timm.utils import CheckpointSaver, NativeScaler

from timm_alfa.errors import UsageError
from timm_alfa.train.checkpoints.saver import (
    CheckpointError,
    TrainCheckpointSaver,
    find_resume,
    gather_random_states,
    read_checkpoint,
)

METRICS = [50.0, 40.0, 70.0, 30.0, 60.0, 60.0, 10.0]


class Killed(BaseException):
    """Stands for a signal: nothing after it may be relied on."""


def make_saver(folder, cls=TrainCheckpointSaver, *, max_history=2, decreasing=False):
    torch.manual_seed(0)
    model = torch.nn.Linear(100, 100)
    task = ClassificationTask(model, torch.nn.CrossEntropyLoss(), verbose=False)
    task.setup_ema(decay=0.9)
    os.makedirs(folder, exist_ok=True)
    return cls(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        args=argparse.Namespace(model="tiny", lr=0.1),
        amp_scaler=NativeScaler(device="cpu"),
        checkpoint_dir=str(folder),
        recovery_dir=str(folder),
        decreasing=decreasing,
        max_history=max_history,
        task=task,
    )


def files(folder):
    return sorted(os.listdir(folder))


def epoch_of(path):
    return read_checkpoint(path)["epoch"]


def resumed(folder):
    saver = make_saver(folder)
    assert saver.load_state_dict_from_checkpoint(str(folder / "last.pth.tar"))
    return saver


@pytest.mark.parametrize("decreasing", [False, True])
def test_writes_what_timm_writes(tmp_path, decreasing):
    folders = tmp_path / "timm", tmp_path / "ours"
    savers = [
        make_saver(folder, cls, decreasing=decreasing)
        for folder, cls in zip(folders, (CheckpointSaver, TrainCheckpointSaver), strict=True)
    ]
    for epoch, metric in enumerate(METRICS):
        results = [saver.save_checkpoint(epoch, metric=metric) for saver in savers]
        assert results[0] == results[1]
        for saver in savers:
            saver.save_recovery(epoch, batch_idx=5)
        assert files(folders[0]) == files(folders[1])
    for saver in savers:
        saver.save_milestone(7)
    assert files(folders[0]) == files(folders[1])
    assert len(files(folders[1])) == 7  # last, model_best, two ranked, two recoveries, the milestone
    for name in files(folders[0]):
        theirs, ours = (read_checkpoint(folder / name) for folder in folders)
        assert theirs.keys() == ours.keys()
        for key in theirs.keys() - {"state_dict", "state_dict_ema", "optimizer"}:
            assert theirs[key] == ours[key], key
        for key in ("state_dict", "state_dict_ema"):
            torch.testing.assert_close(theirs[key], ours[key], rtol=0, atol=0)


def test_random_states_are_in_every_kind_of_file(tmp_path):
    saver = make_saver(tmp_path)
    saver.random_states = gather_random_states()
    saver.save_checkpoint(0, metric=1.0)
    saver.save_recovery(1, batch_idx=2)
    for name in ("last", "model_best", "checkpoint-0", "recovery-1-2"):
        states = read_checkpoint(tmp_path / f"{name}.pth.tar")["random_states"]
        assert torch.equal(states[0]["torch"], saver.random_states[0]["torch"])


def test_history_goes_on_after_a_resume(tmp_path):
    unbroken = make_saver(tmp_path / "unbroken")
    for epoch, metric in enumerate(METRICS):
        unbroken.save_checkpoint(epoch, metric=metric)
    for epoch, metric in enumerate(METRICS):  # a new process for every epoch
        saver = resumed(tmp_path / "broken") if epoch else make_saver(tmp_path / "broken")
        saver.save_checkpoint(epoch, metric=metric)
    assert files(tmp_path / "broken") == files(tmp_path / "unbroken")
    names = [(os.path.basename(path), metric) for path, metric in unbroken.checkpoint_files]
    assert [(os.path.basename(path), metric) for path, metric in saver.checkpoint_files] == names
    assert (saver.best_epoch, saver.best_metric) == (2, 70.0)
    assert epoch_of(tmp_path / "broken" / "model_best.pth.tar") == 2


def kill_at(monkeypatch, step):
    """Makes the ``step``-th call that touches the disk raise; the count of such calls is in the returned list."""
    calls = []

    def guarded(function):
        def call(*args, **kwargs):
            calls.append(function)
            if len(calls) > step:  # all later ones too: a killed process does not clean up
                raise Killed
            return function(*args, **kwargs)

        return call

    for name in ("fsync", "replace", "link", "unlink", "remove"):
        monkeypatch.setattr(os, name, guarded(getattr(os, name)))
    return calls


def test_a_kill_at_any_moment_leaves_a_checkpoint_to_resume(tmp_path, monkeypatch):
    seen = set()
    for step in range(100):
        folder = tmp_path / str(step)
        saver = make_saver(folder)
        saver.save_checkpoint(0, metric=METRICS[0])
        saver.save_checkpoint(1, metric=METRICS[1])
        with monkeypatch.context() as patch:
            calls = kill_at(patch, step)
            try:
                saver.save_checkpoint(2, metric=METRICS[2])
            except Killed:
                killed = True
            else:
                killed = False
        last = epoch_of(folder / "last.pth.tar")
        saver = resumed(folder)
        best = 2 if last == 2 else 0
        assert (saver.best_epoch, saver.best_metric) == (best, METRICS[best])
        assert epoch_of(folder / "model_best.pth.tar") == best
        for epoch in range(last + 1, 5):
            saver.save_checkpoint(epoch, metric=METRICS[epoch])
        ranked = [os.path.basename(path) for path, _ in saver.checkpoint_files]
        assert ranked == ["checkpoint-2.pth.tar", "checkpoint-4.pth.tar"]
        seen.add(last)
        if not killed:
            break
    assert seen == {1, 2}
    assert step == len(calls) > 8


def test_full_disk_leaves_earlier_checkpoints(tmp_path):
    saver = make_saver(tmp_path)
    saver.save_checkpoint(0, metric=1.0)
    before = files(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))  # a checkpoint has 160 kB
    try:
        with pytest.raises(CheckpointError, match=r"checkpoint .*tmp\.pth\.tar: File too large; .* intact"):
            saver.save_checkpoint(1, metric=2.0)
        with pytest.raises(CheckpointError, match=r"recovery_tmp\.pth\.tar: File too large"):
            saver.save_recovery(1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(tmp_path) == before
    assert epoch_of(tmp_path / "last.pth.tar") == epoch_of(tmp_path / "model_best.pth.tar") == 0
    saver.save_checkpoint(1, metric=2.0)
    assert epoch_of(tmp_path / "model_best.pth.tar") == 1


@pytest.mark.parametrize(("step", "name"), [("fsync", "tmp"), ("replace", "tmp"), ("link", "checkpoint-1")])
def test_errors_of_the_file_system_name_the_file(tmp_path, monkeypatch, step, name):
    saver = make_saver(tmp_path)
    saver.save_checkpoint(0, metric=1.0)

    def fail(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        if step == "link":  # the copy in its place fails as well
            patch.setattr("shutil.copyfileobj", fail)
        with pytest.raises(CheckpointError, match=rf"{name}\.pth\.tar: No space left on device"):
            saver.save_checkpoint(1, metric=2.0)
    assert epoch_of(tmp_path / "last.pth.tar") == (1 if step == "link" else 0)
    assert epoch_of(tmp_path / "model_best.pth.tar") == 0
    assert not [file for file in files(tmp_path) if file.endswith(".tmp")]


def test_ranked_copies_are_links(tmp_path):
    saver = make_saver(tmp_path)
    saver.save_checkpoint(0, metric=1.0)
    assert (tmp_path / "checkpoint-0.pth.tar").samefile(tmp_path / "last.pth.tar")
    assert (tmp_path / "model_best.pth.tar").samefile(tmp_path / "last.pth.tar")


def test_resuming_from_elsewhere_leaves_the_folder_alone(tmp_path):
    make_saver(tmp_path / "old").save_checkpoint(0, metric=1.0)
    saver = make_saver(tmp_path / "new")
    assert saver.load_state_dict_from_checkpoint(str(tmp_path / "old" / "last.pth.tar"))
    assert files(tmp_path / "new") == []


def test_find_resume(tmp_path):
    folder = tmp_path / "run"
    assert find_resume("", str(tmp_path), "run") == ""
    assert find_resume("auto", str(tmp_path), "run") == ""
    folder.mkdir()
    for name in ("recovery-2-50", "recovery-10-5", "recovery-10-30", "recovery-1-99", "recovery-x"):
        (folder / f"{name}.pth.tar").touch()
    assert find_resume("auto", str(tmp_path), "run") == str(folder / "recovery-10-30.pth.tar")
    last = folder / "last.pth.tar"
    last.touch()
    assert find_resume("auto", str(tmp_path), "run") == str(last)
    assert find_resume(str(last), "", "") == str(last)


def test_find_resume_in_the_default_output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output/train/run").mkdir(parents=True)
    (tmp_path / "output/train/run/last.pth.tar").touch()
    assert os.path.samefile(find_resume("auto", "", "run"), tmp_path / "output/train/run/last.pth.tar")


def test_find_resume_errors(tmp_path):
    with pytest.raises(UsageError, match="--resume auto needs --experiment"):
        find_resume("auto", str(tmp_path), "")
    with pytest.raises(UsageError, match=r"--resume .*none\.pth: no such file"):
        find_resume(str(tmp_path / "none.pth"), "", "")
    with pytest.raises(UsageError, match=r"a folder, expected a checkpoint file such as .*last\.pth\.tar"):
        find_resume(str(tmp_path), "", "")
