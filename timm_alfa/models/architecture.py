"""Residual networks for 32x32 images, on top of timm's ResNet.

He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016), https://arxiv.org/abs/1512.03385. Two families:

* ``SmallCifarResNet`` (``resnet20s`` to ``resnet110s``), section 4.2: three stages of 16, 32 and 64 channels, basic
  blocks, shortcuts without parameters (option A).
* ``CifarResNet`` (``resnet18_cifar`` to ``resnet152_cifar``): table 1's four stages behind a 3x3 stride-1 stem without
  max-pooling, so that a 32x32 image reaches the classifier as a 4x4 map. Module names are those of timm's ResNet.

Unlike timm's ResNet both start with all batch norm scales at one (``zero_init_last=False``): neither He et al. nor the
code that ALFA's authors released zeroes the last scale of each residual branch, a later recipe for large ImageNet
batches. Otherwise weights are drawn as timm draws them (convolutions He-normal by fan-out, the classifier by torch's
default); the released ResNet-56s draws both He-normal by fan-in.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerType
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

__all__ = ["CifarResNet", "PadShortcut", "SmallCifarResNet"]


class PadShortcut(nn.Module):
    """The option-A shortcut: every ``stride``-th pixel, and zeros for the channels that are new. No parameters.

    ``[B, in_chs, H, W] -> [B, out_chs, ceil(H / stride), ceil(W / stride)]``. The zeros are split evenly before and
    after the input's channels (an odd one goes after), as in the code that ALFA's authors released. He et al. leave
    their place open, and it makes no difference to training: weights are drawn alike for every channel.

    Raises:
        ValueError: ``out_chs`` is smaller than ``in_chs``.
    """

    def __init__(self, in_chs: int, out_chs: int, stride: int = 1) -> None:
        super().__init__()
        if out_chs < in_chs:
            raise ValueError(f"out_chs must be at least in_chs ({in_chs}) for a padding shortcut, got {out_chs}")
        self.stride = stride
        self.before = (out_chs - in_chs) // 2
        self.after = out_chs - in_chs - self.before

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The shortcut of ``x``, [B, in_chs, H, W]."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))

    def extra_repr(self) -> str:
        """Stride and padding."""
        return f"stride={self.stride}, pad=({self.before}, {self.after})"


class CifarResNet(ResNet):
    """timm's ResNet with a single 3x3 stride-1 convolution as its stem and no max-pooling.

    Args:
        block: Residual block class of timm's ResNet.
        layers: Number of blocks per stage.
        channels: Width per stage, before the block's expansion. The stem is as wide as the first (an even number).
        num_classes: Number of classes, 0 for pooled features.
        in_chans: Number of input channels.
        output_stride: Largest total stride, 2, 4 or 8; stages beyond it are dilated instead.
        global_pool: Kind of pooling: 'avg', 'max', 'avgmax', 'catavgmax', or '' for none.
        act_layer: Activation.
        norm_layer: Normalisation.
        drop_rate: Dropout probability before the classifier.
        drop_path_rate: Stochastic depth probability of the last block, growing linearly from 0 at the first.
        drop_block_rate: DropBlock probability, from the third stage on.
        zero_init_last: Start with the last norm scale of each residual branch at zero.
        block_args: Further arguments of the block class.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        ValueError: ``output_stride`` is not 2, 4 or 8.
    """

    feature_info: list[dict[str, Any]]

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: tuple[int, ...],
        channels: tuple[int, ...] = (64, 128, 256, 512),
        num_classes: int = 10,
        in_chans: int = 3,
        output_stride: int = 8,
        global_pool: str = "avg",
        act_layer: LayerType = nn.ReLU,
        norm_layer: LayerType = nn.BatchNorm2d,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        drop_block_rate: float = 0.0,
        zero_init_last: bool = False,
        block_args: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if output_stride not in (2, 4, 8):
            raise ValueError(f"output_stride must be 2, 4 or 8 (the stem does not stride), got {output_stride}")
        super().__init__(
            block,  # type: ignore[arg-type]  # timm's annotation asks for an instance
            layers,
            num_classes=num_classes,
            in_chans=in_chans,
            output_stride=4 * output_stride,  # timm counts the stem and the max-pooling, of stride 2 each
            global_pool=global_pool,
            stem_type="deep",  # the one stem whose width can be chosen; replaced below
            stem_width=channels[0] // 2,
            channels=channels,
            act_layer=act_layer,
            norm_layer=norm_layer,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            drop_block_rate=drop_block_rate,
            zero_init_last=zero_init_last,
            block_args=block_args,
            device=device,
            dtype=dtype,
        )
        stem, *stages = self.feature_info
        conv = nn.Conv2d(in_chans, stem["num_chs"], 3, padding=1, bias=False, device=device, dtype=dtype)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")  # as the other convolutions
        self.add_module("conv1", conv)
        self.add_module("maxpool", nn.Identity())
        stem["reduction"] = 1
        for stage in stages:
            stage["reduction"] //= 4

    def init_weights(self, zero_init_last: bool = False) -> None:
        """Draw the convolutions anew as He et al. (2015) do; ``zero_init_last`` as in the constructor."""
        super().init_weights(zero_init_last=zero_init_last)


class SmallCifarResNet(CifarResNet):
    """The three-stage CIFAR network of He et al. (2016), section 4.2, with option-A shortcuts.

    With n basic blocks per stage it has 6n + 2 weighted layers.

    Args:
        block: Residual block class of timm's ResNet.
        layers: Number of blocks of each of the three stages.
        channels: Width of each stage, before the block's expansion.
        kwargs: The other arguments of ``CifarResNet``.

    Raises:
        ValueError: There are not three stages, a stage is narrower than the one before, or ``output_stride`` is not 2,
            4 or 8.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: tuple[int, ...],
        channels: tuple[int, ...] = (16, 32, 64),
        **kwargs: Any,
    ) -> None:
        if len(layers) != 3 or len(channels) != 3:
            raise ValueError(f"layers and channels must have three entries each, got {layers} and {channels}")
        super().__init__(block, layers, channels, **kwargs)
        del self.maxpool
        for stage in self._stages():
            first: Any = stage[0]
            if first.downsample is not None:
                conv = first.downsample[0]
                first.downsample = PadShortcut(conv.in_channels, conv.out_channels, conv.stride[0])

    def _stages(self) -> list[nn.Sequential]:
        return [self.layer1, self.layer2, self.layer3]

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images ``x`` [B, in_chans, H, W] to the last stage's features [B, num_features, H / 4, W / 4]."""
        x = self.act1(self.bn1(self.conv1(x)))
        if self.grad_checkpointing:
            return checkpoint_seq(self._stages(), x, flatten=True)  # block by block, as timm's ResNet does
        return self.layer3(self.layer2(self.layer1(x)))

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Run the features and collect those of ``feature_info`` on the way.

        Args:
            x: Images, [B, in_chans, H, W].
            indices: The last n features if an integer, those listed if a sequence, all if None.
            norm: Without effect, there is no final norm.
            stop_early: Skip the stages after the last chosen one.
            output_fmt: Only 'NCHW'.
            intermediates_only: Leave out the final features.

        Returns:
            The final features and the list of intermediate ones, or that list alone.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        take, last = feature_take_indices(len(self.feature_info), indices)
        x = self.act1(self.bn1(self.conv1(x)))
        intermediates = [x] if 0 in take else []
        for index, stage in enumerate(self._stages(), start=1):
            if stop_early and index > last:
                break
            x = checkpoint_seq(stage, x) if self.grad_checkpointing else stage(x)
            if index in take:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Empty the stages after the last chosen feature, and drop the classifier where it no longer fits.

        Args:
            indices: Chosen features, as in ``forward_intermediates``.
            prune_norm: Without effect, there is no final norm.
            prune_head: Drop pooling and classifier even if all stages stay.

        Returns:
            The chosen features' indices, counted from the first.
        """
        take, last = feature_take_indices(len(self.feature_info), indices)
        cut = last + 1 < len(self.feature_info)
        for info in self.feature_info[last + 1 :]:
            setattr(self, info["module"], nn.Sequential())
        if cut:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if cut or prune_head:
            self.reset_classifier(0, "")
        return take
