"""Log lines, and a progress bar where a person is watching."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import NoReturn

from timm.utils.distributed import world_info_from_env
from tqdm import tqdm


class _TerminalHandler(logging.Handler):
    """Writes records to stderr without breaking a progress bar: information bare, the rest with its level."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
            if record.levelno != logging.INFO:
                text = f"{record.levelname}: {text}"
            tqdm.write(text, file=sys.stderr)
        except Exception:
            self.handleError(record)


def setup_logging(*, primary: bool) -> None:
    """Sends log lines to stderr; of several processes only the primary one tells more than warnings.

    A program that has set up logging of its own keeps it.
    """
    # 4 workers are timm's default, on small machines too
    warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
    if not logging.root.handlers:
        logging.root.addHandler(_TerminalHandler())
        logging.root.setLevel(logging.INFO if primary else logging.WARNING)


def is_first_process() -> bool:
    """Whether this is the process, of several or alone, that tells what all of them find; before they have joined."""
    return bool(world_info_from_env()[1] == 0)


def progress_bar(total: int, description: str, *, primary: bool) -> tqdm[NoReturn]:
    """Return a bar over ``total`` batches; disabled (``bar.disable``) unless the primary process has a terminal."""
    return tqdm(
        total=total,
        desc=description,
        disable=not (primary and sys.stderr.isatty()),
        file=sys.stderr,
        leave=False,
        dynamic_ncols=True,
    )
