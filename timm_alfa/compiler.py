"""Settings of ``torch.compile`` that several walks through one graph need."""

from __future__ import annotations

import torch._functorch.config
import torch._inductor.config
import torch.compiler.config

_CACHE_TAG = "+buffers-kept"


def allow_second_walks() -> None:
    """Compiled code must not give its buffers away in its first backward: the clean graph may be walked twice.

    Read when a backward is compiled, which is later and elsewhere; so it is set for good. The compiler's cache on disk
    does not tell such code from code that does give its buffers away, and would return gradients computed from
    overwritten ones: hence a tag of our own in its keys.
    """
    torch._functorch.config.donated_buffer = False
    tag = getattr(torch.compiler.config, "cache_key_tag", None)
    if tag is None:  # torch before 2.7
        torch._inductor.config.force_disable_caches = True
    elif _CACHE_TAG not in tag:
        torch.compiler.config.cache_key_tag = tag + _CACHE_TAG
