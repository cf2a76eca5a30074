"""What a user sees of a run: averages of losses, perturbation norms and eta."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..engine.core import Engine
from ..engine.size_sweep import rise_of
from ..pgd import l2_norms, linf_norms
from ..run_folder.eta_history import EtaHistory
from ..utils.distributed import mean_over_ranks


class LossMonitor:
    """Collects losses on the device, so that no step waits; every readout is one transfer.

    Args:
        names: Keys of a step's result, each a scalar; there may be none.
        device: Of the processes' exchange, where nothing was measured.
    """

    def __init__(self, names: Sequence[str], device: torch.device):
        self.names = list(names)
        self._device = device
        self._losses = _Mean()

    def add(self, result: Mapping[str, Any]) -> None:
        """One training step."""
        if self.names:
            self._losses.add(torch.stack([result[name] for name in self.names]).float())

    def text(self) -> str:
        """The last step's losses, in brackets their averages since the last :meth:`take`."""
        if self._losses.last is None:
            return ""
        last, mean = self._losses.last.tolist(), self._losses.value(len(self.names)).tolist()
        titles = [name.removeprefix("loss_").capitalize() for name in self.names]
        return "  ".join(f"{t}: {value:#.3g} ({m:#.3g})" for t, value, m in zip(titles, last, mean, strict=True))

    def take(self) -> dict[str, float]:
        """Averages since the last call, over all ranks; every rank has to call. NaN where nothing was measured."""
        names, values = self._readings()
        device = next((value.device for value in values if value.device.type != "cpu"), self._device)
        mean = mean_over_ranks(torch.cat([value.to(device) for value in values]))
        return dict(zip(names, mean.tolist(), strict=True))

    def _readings(self) -> tuple[list[str], list[Tensor]]:
        """Names and averages, which start anew."""
        return list(self.names), [self._losses.take(len(self.names))]


class FeatureMonitor(LossMonitor):
    """Also per block: its adversarial loss, the size of its perturbation, and eta if it is learned.

    Args:
        names: Keys of a step's result, each a scalar.
        device: Of the processes' exchange, where nothing was measured.
        engine: Whose blocks, eta and step count are shown.
        divergence: Whether adversarial losses are divergences, which are a rise of the loss by themselves.
    """

    NORM_INTERVAL = 10
    """Norms of the perturbations are taken in every tenth step since the last :meth:`take`, from its first: they read
    every feature once more."""

    def __init__(self, names: Sequence[str], device: torch.device, engine: Engine, *, divergence: bool = False):
        super().__init__(names, device)
        self.divergence = divergence
        self.engine = engine
        self._by_block = {block: _Mean() for block in engine.blocks}
        self._norms = {block: _Mean() for block in engine.blocks}
        self._survives = {block: _Mean() for block in engine.blocks}
        self._half = False  # whether half precision was met
        self.history = EtaHistory(engine.blocks)

    @property
    def norms_due(self) -> bool:
        """Whether the next step is one whose norms are taken."""
        return self._losses.count % self.NORM_INTERVAL == 0

    def add(self, result: Mapping[str, Any]) -> None:
        """One training step.

        Args:
            result: Of the task; ``observed`` has what :func:`norms` returned for some blocks, ``survives`` the share of
                the perturbation that half precision leaves, [].
        """
        super().add(result)
        for block, loss in result["loss_adv_by_block"].items():
            self._by_block[block].add(loss.float().reshape(1))
        for block, norms in result["observed"].items():
            self._norms[block].add(norms)
        for block, share in result["survives"].items():
            self._survives[block].add(share.float().reshape(1))
        if "eta" in result:
            self.history.add(self.engine.passes, result["eta"])

    def text(self) -> str:
        """The losses, and eta if it is learned."""
        text = super().text()
        if text and self.engine.eta.learnable:
            text += "  Eta: " + " ".join(f"{value:.4f}" for value in self.engine.eta.values.tolist())
        return text

    def take(self) -> dict[str, float]:
        """Averages since the last call, over all ranks; every rank has to call.

        Returns:
            ``loss_clean``, ``loss_adv``; per block ``loss_adv_<block>`` (if there are several), ``loss_rise_<block>``
            (by how much of itself the loss rises), ``delta_l2_<block>``, ``delta_linf_<block>`` (means over images) and
            ``delta_ratio_<block>`` (rms(delta) / rms(f)); in half precision, once it was met,
            ``delta_survives_<block>`` (the share of delta that is not rounded away); for L-ALFA ``eta_<block>``. Always
            the same keys; NaN where nothing was measured.
        """
        metrics = super().take()
        shares = [f"delta_survives_{block}" for block in self.engine.blocks]
        self._half = self._half or not all(math.isnan(metrics[name]) for name in shares)  # alike on all ranks
        if not self._half:
            for name in shares:
                del metrics[name]
        for block in self.engine.blocks:
            adversarial, clean = metrics[f"loss_rise_{block}"], metrics["loss_clean"]
            metrics[f"loss_rise_{block}"] = rise_of(clean, adversarial if self.divergence else adversarial - clean)
        if self.engine.eta.learnable:
            values = self.engine.eta.values.tolist()
            metrics |= {f"eta_{block}": value for block, value in zip(self.engine.blocks, values, strict=True)}
        return metrics

    def _readings(self) -> tuple[list[str], list[Tensor]]:
        names, values = super()._readings()
        for block in self.engine.blocks:
            by_block = self._by_block[block].take(1)
            if len(self.engine.blocks) > 1:
                names.append(f"loss_adv_{block}")
                values.append(by_block)
            names += [f"loss_rise_{block}", f"delta_l2_{block}", f"delta_linf_{block}", f"delta_ratio_{block}"]
            names.append(f"delta_survives_{block}")
            values += [by_block, self._norms[block].take(3), self._survives[block].take(1)]
        return names, values


def norms(delta: Sequence[Tensor], feature: Sequence[Tensor]) -> Tensor:
    """[3]: mean over the batch of ||delta||_2 and ||delta||_inf, and rms(delta) / rms(f)."""
    l2 = l2_norms(delta)
    total = torch.stack([part.detach().float().square().sum() for part in feature]).sum()
    ratio = l2.square().sum().sqrt() / total.sqrt()
    return torch.stack([l2.mean(), linf_norms(delta).mean(), ratio.to(l2)]).float()


class _Mean:
    """A running mean of vectors."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.last: Tensor | None = None
        self.count = 0

    def add(self, value: Tensor) -> None:
        self.last = value
        self.total = value if self.total is None else self.total + value
        self.count += 1

    def value(self, size: int) -> Tensor:
        return torch.full((size,), torch.nan) if self.total is None else self.total / self.count

    def take(self, size: int) -> Tensor:
        """The mean, and start anew."""
        value = self.value(size)
        self.total = self.last = None
        self.count = 0
        return value
