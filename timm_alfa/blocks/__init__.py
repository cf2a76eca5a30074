"""Which modules a name such as ``layer4``, ``blocks.*``, ``@last`` or ``@stages`` stands for."""

from .resolve import BlockInfo, list_blocks, resolve_blocks

__all__ = ["BlockInfo", "list_blocks", "resolve_blocks"]
