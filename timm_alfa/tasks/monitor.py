"""What a user sees of a run: averages of losses, perturbation norms and eta."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..run_folder.eta_history import EtaHistory
from ..utils.distributed import mean_over_ranks
from ..wrapper import AlfaWrapper


class Monitor:
    """Collects on the device, so that no step waits; every readout is one transfer.

    Args:
        alfa: Whose blocks, eta and step count are shown.
    """

    NORM_INTERVAL = 10
    """Norms of the perturbations are taken in every tenth step since the last :meth:`take`, from its first: they read
    every feature once more."""

    def __init__(self, alfa: AlfaWrapper):
        self.alfa = alfa
        self._losses = _Mean()
        self._by_block = {name: _Mean() for name in alfa.blocks}
        self._norms = {name: _Mean() for name in alfa.blocks}
        self.history = EtaHistory(alfa.blocks)

    @property
    def norms_due(self) -> bool:
        """Whether the next step is one whose norms are taken."""
        return self._losses.count % self.NORM_INTERVAL == 0

    def add(self, result: Mapping[str, Any], observed: Mapping[str, Tensor]) -> None:
        """One training step: the task's result, and [3] norms for some blocks."""
        self._losses.add(torch.stack([result["loss_clean"], result["loss_adv"]]).float())
        for name, loss in result["loss_adv_by_block"].items():
            self._by_block[name].add(loss.float().reshape(1))
        for name, norms in observed.items():
            self._norms[name].add(norms)
        if "eta" in result:
            self.history.add(self.alfa.passes, result["eta"])

    def text(self) -> str:
        """The last step's losses, in brackets their averages since the last :meth:`take`, and eta if it is learned."""
        if self._losses.last is None:
            return ""
        last, mean = self._losses.last.tolist(), self._losses.value(2).tolist()
        text = f"Clean: {last[0]:#.3g} ({mean[0]:#.3g})  Adv: {last[1]:#.3g} ({mean[1]:#.3g})"
        if self.alfa.eta.learnable:
            text += "  Eta: " + " ".join(f"{value:.4f}" for value in self.alfa.eta.values.tolist())
        return text

    def take(self) -> dict[str, float]:
        """Averages since the last call, over all ranks; every rank has to call.

        Returns:
            ``loss_clean``, ``loss_adv``; per block ``loss_adv_<block>`` (if there are several), ``delta_l2_<block>``,
            ``delta_linf_<block>`` (means over images) and ``delta_ratio_<block>`` (rms(delta) / rms(f)); for L-ALFA
            ``eta_<block>``. Always the same keys; NaN where nothing was measured.
        """
        names, values = ["loss_clean", "loss_adv"], [self._losses.value(2)]
        several = len(self.alfa.blocks) > 1
        for name in self.alfa.blocks:
            if several:
                names.append(f"loss_adv_{name}")
                values.append(self._by_block[name].value(1))
            names += [f"delta_l2_{name}", f"delta_linf_{name}", f"delta_ratio_{name}"]
            values.append(self._norms[name].value(3))
        device = self.alfa.eta.values.device
        mean = mean_over_ranks(torch.cat([value.to(device) for value in values]))
        for average in (self._losses, *self._by_block.values(), *self._norms.values()):
            average.clear()
        metrics = dict(zip(names, mean.tolist(), strict=True))
        if self.alfa.eta.learnable:
            metrics |= {
                f"eta_{name}": value
                for name, value in zip(self.alfa.blocks, self.alfa.eta.values.tolist(), strict=True)
            }
        return metrics


class _Mean:
    """A running mean of vectors."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.total: Tensor | None = None
        self.last: Tensor | None = None
        self.count = 0

    def add(self, value: Tensor) -> None:
        self.last = value
        self.total = value if self.total is None else self.total + value
        self.count += 1

    def value(self, size: int) -> Tensor:
        return torch.full((size,), torch.nan) if self.total is None else self.total / self.count
