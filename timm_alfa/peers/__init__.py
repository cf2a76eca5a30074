"""The methods that ALFA is compared with, in the same pipeline: one file each, all of them ``timm.task`` tasks.

Example::

    from timm_alfa.peers import AdvPropTask, PixelAttack

    attack = PixelAttack(eps=1, alpha=1, steps=1, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    task = AdvPropTask(model, criterion, attack)  # before the optimizer, which also trains the auxiliary batch norms
    task(images, target)["loss"].backward()
"""

from ..tasks.advprop import AdvPropTask
from ..tasks.distillation import NoiseDistillationTask
from ..tasks.fast_advprop import FastAdvPropTask
from ..tasks.moex import Moex, MoexTask
from ..tasks.noise import NoiseTask
from ..tasks.pgd_at import PgdTask
from ..tasks.pixels import PixelAttack

__all__ = [
    "AdvPropTask",
    "FastAdvPropTask",
    "Moex",
    "MoexTask",
    "NoiseDistillationTask",
    "NoiseTask",
    "PgdTask",
    "PixelAttack",
]
