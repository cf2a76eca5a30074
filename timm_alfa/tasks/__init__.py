"""One file per training method, each a ``timm.task``: ALFA and its baselines."""
