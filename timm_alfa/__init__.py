"""Adversarial feature augmentation (ALFA and L-ALFA) for timm models.

ALFA perturbs the features of a late block in the direction that raises the loss, and trains on clean and perturbed
features together::

    from timm_alfa import AlfaLoss, AlfaWrapper

    alfa = AlfaWrapper(model, criterion, blocks=["layer4"])  # any timm model, any nn.Module
    loss_fn = AlfaLoss(criterion)

    result = loss_fn(alfa(images, target), target)  # was: loss = criterion(model(images), target)
    result.loss.backward()

``AlfaTask`` is the same as a ``timm.task``. Importing this package also registers the CIFAR ResNets of the paper
(``resnet20s``, ``resnet18_cifar``, ...) with timm.
"""

from .utils.timm_version import require_timm

require_timm()

from . import models
from .blocks.resolve import BlockInfo, list_blocks, resolve_blocks
from .errors import BlockError, UsageError
from .eta import project_hyperplane, project_simplex
from .loss import AlfaLoss, AlfaLossOutput
from .tasks.alfa import AlfaTask
from .tasks.distillation import AlfaDistillationTask
from .wrapper import AlfaOutput, AlfaWrapper

__version__ = "0.1.0"

__all__ = [
    "AlfaDistillationTask",
    "AlfaLoss",
    "AlfaLossOutput",
    "AlfaOutput",
    "AlfaTask",
    "AlfaWrapper",
    "BlockError",
    "BlockInfo",
    "UsageError",
    "list_blocks",
    "models",
    "project_hyperplane",
    "project_simplex",
    "resolve_blocks",
]
