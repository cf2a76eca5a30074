"""What every test shares: a fixed seed, the device under test, and property tests with fixed examples and no clock."""

from __future__ import annotations

import os
from typing import Any

# Tests run in several processes on few cores, where threads of one process wait for those of another.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import settings

settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")

_deselected = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where tests with the fixture `device` compute; with cuda, the others are left out (default: cpu)",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("device") != "cuda":
        return
    if not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: there is no CUDA device here; leave the flag out to test on the CPU")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats its results only so


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On an accelerator only the tests that compute there."""
    if config.getoption("device") == "cpu":
        return
    left_out = [item for item in items if "device" not in getattr(item, "fixturenames", ())]
    config.stash[_deselected] = len(left_out)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if "device" in getattr(item, "fixturenames", ())]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``@pytest.mark.ranks(2, 4)``: with so many processes; on an accelerator also with one, for which any machine has
    devices enough."""
    mark = metafunc.definition.get_closest_marker("ranks")
    if mark is not None:
        alone = [] if metafunc.config.getoption("device") == "cpu" else [1]
        metafunc.parametrize("world_size", [*alone, *mark.args])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Each of several processes collects for itself; the last one to end tells the terminal."""
    if "deselected" in node.workeroutput:
        node.config.stash[_deselected] = node.workeroutput["deselected"]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput") and _deselected in session.config.stash:
        session.config.workeroutput["deselected"] = session.config.stash[_deselected]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if _deselected in config.stash:
        terminalreporter.write_line(
            f"--device {config.getoption('device')}: {config.stash[_deselected]} tests that do not compute there "
            "were left out"
        )


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(0)
    if request.config.getoption("device") == "cuda":
        repeat_results()


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the test computes, by ``--device``: its models, batches, criteria and generators are there."""
    return torch.device(request.config.getoption("device"))


def repeat_results() -> None:
    """The same kernels give the same bits, and float32 is float32; the training command sets some of this otherwise."""
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
