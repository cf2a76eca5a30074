"""Other people's error messages, made fit for a one-line error of ours."""

from __future__ import annotations


def one_line(error: BaseException) -> str:
    """Returns the message of `error` without line breaks, 300 characters at most; its class if it has no message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
