"""Runs as processes, several at a time, each resumable, with one line of JSON per finished run."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...run_folder.records import read_run

try:
    import fcntl
except ImportError:  # not on Windows, where two programs must not share an output folder
    fcntl = None  # type: ignore[assignment]

RESULTS = "results.jsonl"


@dataclass
class Job:
    """A run with a seed.

    Args:
        run: Name of the run.
        seed: Of training.
        setting: What all runs were given besides their own flags, such as ``--epochs 30``; results of different
            settings are never compared.
        arguments: Of the training command, all that decides about the result: where images and outputs are is not in.
        places: The rest of the command, the output folder excepted.
    """

    run: str
    seed: int
    setting: str
    arguments: tuple[str, ...]
    places: tuple[str, ...]
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    started: float = 0.0
    epochs_before: int = 0

    @property
    def name(self) -> str:
        """Of the run's folder; other arguments give another one."""
        digest = hashlib.sha256("\0".join(self.arguments).encode()).hexdigest()[:8]
        return f"{self.run}-seed{self.seed}-{digest}"

    def command(self, output: Path) -> list[str]:
        """What is started."""
        where = ["--output", str(output), "--experiment", self.name, "--resume", "auto"]
        return [sys.executable, "-m", "timm_alfa.train", *self.arguments, *self.places, *where]

    def shown(self, output: Path) -> str:
        """The command as one would type it."""
        return shlex.join(["python", *self.command(output)[1:]])


def read_results(output: Path) -> list[dict[str, Any]]:
    """All finished runs of a folder; a line that a crash cut short is left out."""
    try:
        lines = (output / RESULTS).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def append_result(output: Path, record: dict[str, Any]) -> None:
    """Add one line, in one write, on a line of its own even after one that was cut short."""
    path = output / RESULTS
    torn = path.exists() and path.stat().st_size > 0 and path.read_bytes()[-1:] != b"\n"
    data = ("\n" if torn else "") + json.dumps(record) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, data.encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def unfinished(jobs: Sequence[Job], output: Path) -> list[Job]:
    """Those without a result."""
    done = {tuple(record["arguments"]) for record in read_results(output)}
    return [job for job in jobs if job.arguments not in done]


def run_all(jobs: Sequence[Job], output: Path, *, at_once: int) -> list[Job]:
    """Train what has no result yet; an interrupted run goes on from its last epoch.

    A run that another program is training is left alone.

    Args:
        jobs: All of them.
        output: Gets the runs' folders, ``logs``, and the results.
        at_once: Processes at the same time.

    Returns:
        Jobs that are still without a result: failed, or being trained elsewhere.
    """
    (output / "logs").mkdir(parents=True, exist_ok=True)
    waiting = unfinished(jobs, output)
    running: list[Job] = []
    left: list[Job] = []
    total, done = len(waiting), 0
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                job = waiting.pop(0)
                if _start(job, output, at_once):
                    running.append(job)
                else:
                    print(f"{job.name}: another program is training it", flush=True)
                    left.append(job)
            for job in list(_ended(running)):
                running.remove(job)
                done += 1
                if not _collect(job, output, f"[{done}/{total}]", at_once):
                    left.append(job)
    finally:
        for job in running:  # an exception or an interrupt: their checkpoints are kept
            assert job.process is not None
            job.process.send_signal(signal.SIGTERM)
            job.process.wait()
    return left


def _start(job: Job, output: Path, at_once: int) -> bool:
    """Start the process; False where another holds the log, which is open, and locked, as long as a run is alive."""
    environment = dict(os.environ)
    # the child must find the package that runs here, installed or not
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [_package_root(), environment.get("PYTHONPATH", "")]))
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // at_once)))
    with open(output / "logs" / f"{job.name}.log", "ab") as log:
        if fcntl is not None:
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return False
        job.epochs_before = _epochs_done(output / job.name)
        job.started = time.monotonic()
        job.process = subprocess.Popen(job.command(output), stdout=log, stderr=log, env=environment)
    return True


def _package_root() -> str:
    return str(Path(__file__).resolve().parents[2])


def _ended(running: Sequence[Job]) -> Iterator[Job]:
    time.sleep(0.2 if running else 0)
    return (job for job in running if job.process is not None and job.process.poll() is not None)


def _collect(job: Job, output: Path, position: str, at_once: int) -> bool:
    """Record what a process that ended has left; False where it has left no result."""
    assert job.process is not None
    folder = output / job.name
    seconds = time.monotonic() - job.started
    try:
        if job.process.returncode:
            raise ValueError(f"ended with code {job.process.returncode}")
        tested = json.loads((folder / "test.json").read_text())
    except (OSError, ValueError) as error:
        log = output / "logs" / f"{job.name}.log"
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        print(f"{position} {job.name}: failed, {error}: {' '.join(last)} (see {log})", flush=True)
        return False
    epochs = _epochs_done(folder) - job.epochs_before
    append_result(output, {
        "run": job.run, "seed": job.seed, "setting": job.setting, "top1": tested["top1"], "loss": tested["loss"],
        "validation": tested["validation"], "best_epoch": tested["epoch"], "delta_ratio": _delta_ratios(folder),
        "seconds_per_epoch": seconds / epochs if epochs > 0 else None,
        "machine": _machine(folder) + (f", {at_once} runs at a time" if at_once > 1 else ""),
        "folder": folder.name, "command": job.shown(output), "arguments": job.arguments,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    })  # fmt: skip
    print(f"{position} {job.name}: {tested['top1']:.2f} ({seconds:.0f} s)", flush=True)
    return True


def _machine(folder: Path) -> str:
    """Hardware and versions as the run has them: with several at a time it computes with fewer threads than we."""
    recorded = read_run(folder).environment
    return ", ".join([recorded["hardware"], *(f"{name} {recorded[name]}" for name in ("torch", "timm", "timm-alfa"))])


def _epochs_done(folder: Path) -> int:
    rows = _summary(folder)  # with --val-interval not every epoch has one
    return int(rows[-1]["epoch"]) + 1 if rows else 0


def _delta_ratios(folder: Path) -> dict[str, float]:
    """The perturbations' rms over the features', by block, in the last epoch; empty without perturbed blocks."""
    prefix = "train_delta_ratio_"
    last = _summary(folder)[-1]
    return {key.removeprefix(prefix): float(value) for key, value in last.items() if key.startswith(prefix)}


def _summary(folder: Path) -> list[dict[str, str]]:
    """Rows of ``summary.csv``, one per epoch that was validated."""
    try:
        with open(folder / "summary.csv", newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        return []
