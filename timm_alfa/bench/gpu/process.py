"""A part in a process of its own, cut off when its time is up."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch._dynamo.config

from .. import step
from ..common import run
from .parts import TESTS, Part


@dataclass(frozen=True)
class Outcome:
    """What became of a part.

    Args:
        name: The part's.
        state: ``done``, ``refused`` (exit code 2: what was asked for cannot be), ``failed``, ``cut off`` at its own
            limit, or ``left`` for the next call.
        seconds: It took.
        detail: The last line that it printed, if it tells something.
    """

    name: str
    state: str
    seconds: float = 0.0
    detail: str = ""


def run_part(part: Part, log: Path, output: Path, seconds: float, *, smoke: bool = False) -> Outcome:
    """Run a part for at most ``seconds`` and at most its limit.

    The process comes from a server that has imported torch and timm once and never touches the GPU: a part starts at
    once.

    Args:
        part: What to run.
        log: Where everything that it prints goes.
        output: Where ``bench step`` writes its record.
        seconds: What is left of the whole.
        smoke: Compile nothing, whatever is asked for, and take no notice of the limit.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([step.__name__])
    argv = part.argv if part.group == "tests" else (*part.argv, "--output", str(output))
    process = context.Process(target=_work, args=(part.group == "tests", argv, str(log), smoke))
    limit = seconds if smoke else part.limit
    start = time.monotonic()
    process.start()
    try:
        process.join(min(limit, seconds))
        ended = process.exitcode is not None
    finally:
        _end(process)
        process.join()
    took = time.monotonic() - start
    if not ended:
        return Outcome(part.name, "cut off" if limit < seconds else "left", took, f"after {took:.0f} s")
    state = {0: "done", 2: "refused"}.get(process.exitcode or 0, "failed")
    if part.group == "tests" and state == "refused":
        state = "failed"  # pytest's code of an interrupted run
    return Outcome(part.name, state, took, "" if state == "done" and part.group != "tests" else _last_line(log))


def _work(tests: bool, argv: Sequence[str], log: str, smoke: bool) -> None:
    """In the new process, which leads a group of its own: its children end with it."""
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if tests:
        os.chdir(TESTS.parent)
        os.execv(sys.executable, [sys.executable, "-m", "pytest", *argv])
    torch._dynamo.config.disable = smoke
    run("step", step.main, argv)


def _end(process: BaseProcess) -> None:
    """A process and its children, whatever is left of them."""
    assert process.pid is not None  # it was started
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()  # it may not lead a group yet


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""
