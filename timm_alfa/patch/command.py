"""``python -m timm_alfa.patch train.py``: ALFA inside a copy of timm's own training script, in five inserted lines.

Every inserted line calls :mod:`timm_alfa.script`, and no other line is touched, so that taking these lines out gives
the script back, whatever else was changed in it since.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import UsageError
from ..utils.files import write_file
from .places import find_insertions, source_encoding

__all__ = ["main", "patch", "show_diff", "unpatch"]

_OURS = b"timm_alfa.script"
_INSERTED = re.compile(
    rb"\s*(import X|X\.add_arguments\(N\)|X\.check_arguments\(N\)|N = X\.wrap_task\(N, N(, N)?\)"
    rb"|N\.update\(X\.epoch_metrics\(N, N, N\)\))\s*".replace(b"X", re.escape(_OURS)).replace(b"N", rb"[\w\x80-\xff]+")
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        argv: Arguments without the program's name; None takes those of the process.

    Raises:
        SystemExit: 2 after one sentence, where the file is not understood; nothing is written then.
    """
    parser = argparse.ArgumentParser(
        prog="python -m timm_alfa.patch",
        description="Put ALFA into a copy of timm's train.py (v1.0.27 or newer). Without an option only show the diff.",
    )
    parser.add_argument("script", type=Path, metavar="train.py", help="the script")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--write", action="store_true", help="insert the lines; the file as it was is kept as *.orig")
    action.add_argument("--revert", action="store_true", help="take the lines out again")
    args = parser.parse_args(argv)
    try:
        print(_run(args.script, write=args.write, revert=args.revert), file=sys.stderr)
    except UsageError as error:
        print(f"{parser.prog}: error: {args.script}: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"{parser.prog}: error: {error.filename or args.script}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)


def patch(source: bytes) -> bytes:
    """The script with ALFA's lines in it; a script that has them is returned as it is.

    Args:
        source: Of a training script like timm's.

    Raises:
        UsageError: A place is not found, or some but not all of the lines are there.
    """
    plain = unpatch(source)
    lines = plain.splitlines(keepends=True)
    for number, line in sorted(find_insertions(plain).items(), reverse=True):
        lines.insert(number, line)
    patched = b"".join(lines)
    if source not in (plain, patched):
        raise UsageError("has some of the lines that call timm_alfa, or has them elsewhere; --revert takes them out")
    return patched


def unpatch(source: bytes) -> bytes:
    """The script without ALFA's lines.

    Args:
        source: The patched script.

    Raises:
        UsageError: There are calls of them in a form that was not inserted by :func:`patch`.
    """
    lines = source.splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if _OURS in line and not _INSERTED.fullmatch(line):
            raise UsageError(f"line {number} names {_OURS.decode()} in words of its own; take that out by hand first")
    return b"".join(line for line in lines if _OURS not in line)


def show_diff(before: bytes, after: bytes, name: str) -> str:
    """A unified diff without context between a script and its patched form, in either direction.

    Args:
        before: The one.
        after: The other.
        name: Of the file, in the diff's header.
    """
    forward = len(after) > len(before)
    longer = after if forward else before
    text = [f"For the file with sha256 {hashlib.sha256(before).hexdigest()}\n", f"--- {name}\n", f"+++ {name}\n"]
    ours = 0
    for number, line in enumerate(longer.splitlines(keepends=True), start=1):
        if _OURS in line:
            ours += 1
            nothing = f"{number - ours},0"
            text.append(f"@@ -{nothing} +{number} @@\n+" if forward else f"@@ -{number} +{nothing} @@\n-")
            text.append(line.decode(source_encoding(longer)))
    return "".join(text)


def _run(script: Path, *, write: bool, revert: bool) -> str:
    """Do what was asked for; returns what to tell."""
    path = script.resolve()  # the file behind a link is the one to replace
    source = path.read_bytes()
    target = unpatch(source) if revert else patch(source)
    if target == source:
        return f"{script}: {'has no lines of timm_alfa' if revert else 'has ALFA in it already'}; nothing to do"
    backup = path.with_name(path.name + ".orig")
    kept = backup.read_bytes() if backup.exists() else None
    if write and kept not in (None, source):
        raise UsageError(f"{backup.name} is there already and holds something else; move that away first")
    print(show_diff(source, target, script.name), end="", flush=True)
    if revert:
        _replace(path, target, mode=path.stat().st_mode)
        if kept == target:
            backup.unlink()
        return f"{script}: reverted"
    if write:
        _replace(backup, source, mode=path.stat().st_mode)
        _replace(path, target, mode=path.stat().st_mode)
        return f"{script}: written; the file as it was is {backup.name}"
    return f"{script}: not changed; --write inserts these lines"


def _replace(path: Path, content: bytes, *, mode: int) -> None:
    write_file(path, lambda file: file.write(content))
    path.chmod(mode)
