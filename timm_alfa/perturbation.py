"""What is added to a feature: delta of PGD (Eq. 4), or Gaussian noise.

A perturbation is a strategy: the engine hands it a block's feature and a function that gives the loss's gradient at a
delta, and gets delta back. A new one needs nothing else, see :class:`Perturbation`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from torch import Tensor, nn

from . import pgd
from .engine.randomness import step_generator
from .pgd import INITS, NORMS, Init, Norm
from .sizes import Relative, Size, checked_size, describe_size, parse_size

__all__ = ["Gaussian", "Moments", "Perturbation", "Pgd"]

Space = Literal["values", "moments"]
SPACES: tuple[Space, ...] = ("values", "moments")

GradientAt: TypeAlias = Callable[[list[Tensor]], list[Tensor]]


class Perturbation(Protocol):
    """Finds delta for one block."""

    @property
    def starts_from_clean(self) -> bool:
        """Whether its first gradient is that of the clean pass, which costs no tail replay."""
        ...

    def find(
        self,
        feature: Sequence[Tensor],
        gradient_at: GradientAt,
        first_gradient: Sequence[Tensor] | None,
        *,
        step: int,
        index: int,
    ) -> list[Tensor]:
        """Delta, one detached tensor for each of the feature, at least float32.

        Args:
            feature: The block's floating-point tensors, [B, ...] each.
            gradient_at: d crit(T_i(f_i + delta), y) / d delta, by one tail replay.
            first_gradient: The same at delta = 0, where it is known.
            step: Training step, counted from 1: random draws differ from step to step.
            index: Of the block among the perturbed ones.
        """
        ...

    def describe(self) -> str:
        """In a few words, for the log."""
        ...


@dataclass(frozen=True)
class Pgd:
    """``steps`` times Eq. 4: delta <- Proj[delta + alpha * sgn(g)].

    Attributes:
        alpha: Step size, above 0, in units of the feature, or a share of it such as ``"2%"``.
        steps: K, at least 1.
        eps: Radius of the ball that delta stays in, at least 0, a number or a share; ``None`` for no bound.
        norm: ``"linf"`` steps along sgn(g), ``"l2"`` along g / ||g||_2 per sample; also the norm of the ball.
        init: Delta starts at 0 (``"zero"``), or uniform in [-eps, eps] (``"uniform"``).

    Raises:
        ValueError, TypeError: One is out of its range.
    """

    alpha: Size | str = 0.5 / 255
    steps: int = 1
    eps: Size | str | None = None
    norm: Norm = "linf"
    init: Init = "zero"

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps: expected a whole number of at least 1, found {self.steps}")
        if self.init == "uniform" and self.eps is None:
            raise ValueError("init: 'uniform' starts in [-eps, eps] and needs eps, found eps=None")
        expected = "a finite step size above 0, such as 0.5/255"
        object.__setattr__(self, "alpha", checked_size("alpha", self.alpha, expected, positive=True))
        if self.eps is not None:
            expected = "a finite radius of at least 0, or None for no bound"
            object.__setattr__(self, "eps", checked_size("eps", self.eps, expected))
        if self.norm not in NORMS:
            raise ValueError(f"norm: expected one of {', '.join(NORMS)}, found {self.norm!r}")
        if self.init not in INITS:
            raise ValueError(f"init: expected one of {', '.join(INITS)}, found {self.init!r}")

    @property
    def starts_from_clean(self) -> bool:
        """From 0, the clean pass has the first gradient."""
        return self.init == "zero"

    def find(
        self,
        feature: Sequence[Tensor],
        gradient_at: GradientAt,
        first_gradient: Sequence[Tensor] | None,
        *,
        step: int,
        index: int,
    ) -> list[Tensor]:
        """Delta after K steps; finite, whatever the gradients are.

        Args:
            feature: The block's floating-point tensors, [B, ...] each.
            gradient_at: d crit(T_i(f_i + delta), y) / d delta, by one tail replay.
            first_gradient: The same at delta = 0, where it is known.
            step: Training step, counted from 1.
            index: Of the block among the perturbed ones.
        """
        return pgd.follow(self.search(feature, first_gradient, step=step, index=index), gradient_at)

    def search(
        self, feature: Sequence[Tensor], first_gradient: Sequence[Tensor] | None, *, step: int, index: int
    ) -> pgd.Search:
        """As :meth:`find`, but asks for gradients by yielding deltas: several blocks can search in step.

        Args:
            feature: The block's floating-point tensors, [B, ...] each.
            first_gradient: d crit(T_i(f_i + delta), y) / d delta at delta = 0, where it is known.
            step: Training step, counted from 1.
            index: Of the block among the perturbed ones.
        """
        alpha = pgd.absolute(parse_size(self.alpha), feature)
        eps = None if self.eps is None else pgd.absolute(parse_size(self.eps), feature)
        return self._climb(feature, first_gradient, alpha, eps, step)

    def _climb(
        self,
        like: Sequence[Tensor],
        first_gradient: Sequence[Tensor] | None,
        alpha: pgd.Scale,
        eps: pgd.Scale | None,
        step: int,
    ) -> pgd.Search:
        """K steps from 0, of which the first is known if its gradient is, or from a random start."""
        if first_gradient is not None:
            delta = pgd.pgd_step(None, first_gradient, alpha=alpha, norm=self.norm, eps=eps)
        elif self.init == "uniform":
            assert eps is not None
            delta = pgd.uniform(like, eps, step_generator(step, like[0].device))
        else:
            delta = pgd.zeros(like)
        steps = self.steps - (first_gradient is not None)
        return pgd.climb(delta, steps=steps, alpha=alpha, norm=self.norm, eps=eps)

    def describe(self) -> str:
        """Steps, step size, norm and bound."""
        bound = "unbounded"
        if self.eps is not None:
            bound = f"eps {self.eps}" if isinstance(self.eps, Relative) else f"eps {self.eps:.4g}"
        return f"PGD-{self.steps}, alpha {describe_size(parse_size(self.alpha))}, {self.norm}, {bound}"


@dataclass(frozen=True)
class Moments(Pgd):
    """PGD on the mean and the deviation of every channel: f' = (1 + m) mean + (1 + s) (f - mean).

    m and s are found per sample and channel by Eq. 4; the feature's delta is m mean + s (f - mean). alpha and eps are
    shares of mean and deviation, ``0.05`` or ``"5%"``. In ``l2`` a step has the length of one in ``linf``. As AdvBN,
    but per sample, and with the clean moments detached.

    Attributes:
        alpha: Step size, above 0, a share of mean and deviation.
        steps: K, at least 1.
        eps: Bound of the shares, or of their norm; ``None`` for none.
        norm: ``"linf"`` or ``"l2"``, over all shares of a sample.
        init: The shares start at 0, or uniform in [-eps, eps].
        channels_last: Whether 4-dimensional features are [B, H, W, C]; sequences [B, N, C] always are.
    """

    channels_last: bool = False

    def search(
        self, feature: Sequence[Tensor], first_gradient: Sequence[Tensor] | None, *, step: int, index: int
    ) -> pgd.Search:
        """Delta of the feature after K steps on its moments, see :meth:`Pgd.search`.

        Args:
            feature: The block's floating-point tensors, [B, ...] each.
            first_gradient: d crit(T_i(f_i + delta), y) / d delta at delta = 0, where it is known.
            step: Training step, counted from 1.
            index: Of the block among the perturbed ones.
        """
        parts = [self._split(tensor) for tensor in feature]

        def delta_of(shares: Sequence[Tensor]) -> list[Tensor]:
            pairs = zip(shares[::2], shares[1::2], parts, strict=True)
            return [m * mean + s * centred for m, s, (mean, centred, _) in pairs]

        def at_shares(gradients: Sequence[Tensor]) -> list[Tensor]:
            found = []
            for gradient, (mean, centred, dims) in zip(gradients, parts, strict=True):
                wide = gradient.to(mean.dtype)
                found += [_sum(wide * mean, dims), _sum(wide * centred, dims)]
            return found

        like = [mean for mean, _, _ in parts for _ in range(2)]
        search = self._climb(
            like,
            None if first_gradient is None else at_shares(first_gradient),
            _per_sample(self.alpha, like),
            None if self.eps is None else _per_sample(self.eps, like),
            step,
        )
        gradients: Sequence[Tensor] | None = None
        while True:
            try:
                shares = next(search) if gradients is None else search.send(at_shares(gradients))
            except StopIteration as found:
                return delta_of(found.value)
            gradients = yield delta_of(shares)

    def describe(self) -> str:
        """As PGD's, on moments."""
        return f"{super().describe()}, on moments"

    def _split(self, tensor: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        """The channels' means, what is left of the feature without them, and the dimensions of the mean."""
        values = tensor.detach().to(pgd.working_dtype(tensor.dtype))
        last = values.dim() == 3 or (values.dim() > 3 and self.channels_last)
        dims = tuple(range(1, values.dim() - 1)) if last else tuple(range(2, values.dim()))
        mean = values.mean(dim=dims, keepdim=True) if dims else values
        return mean, values - mean, dims


def pgd_in(
    space: Space, model: nn.Module, alpha: Size | str, steps: int, eps: Size | str | None, norm: Norm, init: Init
) -> Pgd:
    """PGD on a feature's values or on its moments.

    Args:
        space: Which.
        model: Says, as timm's models do in ``output_fmt``, whether channels come last.
        alpha: Step size.
        steps: How many.
        eps: Radius of the ball.
        norm: Geometry of step and ball.
        init: Where to start.

    Raises:
        ValueError: There is no such space.
    """
    if space not in SPACES:
        raise ValueError(f"space: expected one of {', '.join(SPACES)}, found {space!r}")
    if space == "values":
        return Pgd(alpha, steps, eps, norm, init)
    return Moments(alpha, steps, eps, norm, init, str(getattr(model, "output_fmt", "")).endswith("NHWC"))


def _per_sample(size: Size | str, shares: Sequence[Tensor]) -> pgd.PerSample:
    """The same size for every entry; in ``l2`` the length of a vector with such entries."""
    size = parse_size(size)
    share = size.share if isinstance(size, Relative) else size
    samples = min(len(part) for part in shares)
    entries = sum(part.numel() for part in shares) / samples
    parts = [part.new_full((1,) * part.dim(), share) for part in shares]
    return pgd.PerSample(parts, shares[0].new_full((samples,), share * entries**0.5))


def _sum(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    return values.sum(dim=dims, keepdim=True) if dims else values


@dataclass(frozen=True)
class Gaussian:
    """N(0, sigma^2), drawn anew in every step and for every block; the global random state stays as it is.

    Attributes:
        sigma: Standard deviation, at least 0, in units of the feature, or a share of its rms such as ``"2%"``.

    Raises:
        ValueError, TypeError: It is out of its range.
    """

    sigma: Size | str = 0.5 / 255

    def __post_init__(self) -> None:
        size = checked_size("sigma", self.sigma, "a finite standard deviation of at least 0")
        object.__setattr__(self, "sigma", size)

    @property
    def starts_from_clean(self) -> bool:
        """Noise needs no gradient."""
        return False

    def find(
        self,
        feature: Sequence[Tensor],
        gradient_at: GradientAt,
        first_gradient: Sequence[Tensor] | None,
        *,
        step: int,
        index: int,
    ) -> list[Tensor]:
        """The noise.

        Args:
            feature: The block's floating-point tensors, [B, ...] each.
            gradient_at: d crit(T_i(f_i + delta), y) / d delta, by one tail replay.
            first_gradient: The same at delta = 0, where it is known.
            step: Training step, counted from 1.
            index: Of the block among the perturbed ones.
        """
        generator = step_generator(step, feature[0].device, stream=index)
        noise = [part.normal_(0, 1, generator=generator) for part in pgd.zeros(feature)]
        return pgd.scaled(noise, pgd.absolute(parse_size(self.sigma), feature))

    def describe(self) -> str:
        """Its size."""
        return f"sigma {describe_size(parse_size(self.sigma))}"
