"""The training command in processes of its own, forked: torch is imported already, and signals, limits and exit codes
are real. Ranks that compute on an accelerator are started afresh instead, which its driver asks for."""

from __future__ import annotations

import os
import resource
import socket
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from timm_alfa.train import main

CPU = torch.device("cpu")


def call_ranks(
    function: Callable[..., object], arguments: tuple[Any, ...], count: int, device: torch.device = CPU
) -> None:
    """Call ``function(rank, *arguments)`` in ``count`` processes, and raise if one of them did.

    Accelerators have to be as many as ranks; where they are not, the test is skipped.
    """
    if device.type != "cpu":
        found = torch.get_device_module(device).device_count()
        if found < count:
            pytest.skip(f"{count} ranks need {count} {device.type} devices, found {found}")
    method = "fork" if device.type == "cpu" else "spawn"
    with _forking():
        ranks = torch.multiprocessing.start_processes(function, arguments, count, join=False, start_method=method)
    try:
        while not ranks.join():
            pass
    finally:  # after a time-out, too, none is left behind
        for process in ranks.processes:
            process.kill()


def join_group(rank: int, world_size: int, folder: str, device: torch.device) -> torch.device:
    """In a rank: join the group of those that were given the same folder, and return this rank's own device."""
    torch.set_num_threads(1)
    if device.type != "cpu":
        device = torch.device(device.type, rank)
        torch.get_device_module(device).set_device(device)
    backend = dist.get_default_backend_for_device(device)
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    return device


def start(
    arguments: Sequence[str],
    log: Path,
    *,
    environment: dict[str, str] | None = None,
    first: Callable[[], object] = lambda: None,
) -> int:
    """Start the command and return its process id; what it prints goes to ``log``, ``first`` is called before it."""
    with _forking():
        child = os.fork()
    if child:
        return child
    code = 99
    try:
        os.environ.update(environment or {})
        with open(log, "a", buffering=1) as file:
            sys.stdout = sys.stderr = file
            try:
                first()
                main(arguments)
                code = 0
            except SystemExit as error:
                code = int(error.code or 0)
            except BaseException:
                _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
                resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))  # a test's full disk has no room for this
                traceback.print_exc()
    finally:
        os._exit(code)


@contextmanager
def _forking() -> Iterator[None]:
    """Newer Pythons warn where there is another thread, such as that of a progress bar."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*multi-threaded", category=DeprecationWarning)
        yield


def wait(child: int) -> int:
    """The exit code of a process, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def has_ended(child: int) -> bool:
    """Whether a process has ended; ``wait`` still has to be called."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def start_ranks(arguments: Sequence[str], log: Path, count: int) -> list[int]:
    """Start the command in ``count`` processes that find each other, as a launcher does; rank r prints to ``log``-r."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    return [
        start(
            arguments,
            log.with_name(f"{log.name}-{rank}"),
            environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]
