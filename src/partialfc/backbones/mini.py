"""Mini: a small residual network for training on a CPU in minutes.

As an aligned face suggests, its embedding comes from the flattened last map. Its operations are those that a CPU does
fast: plain 3 × 3 convolutions on small maps, after a stem that folds each 4 × 4 patch into channels.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from partialfc.backbones.layers import check_image_size, full_precision, shortcut


class Block(nn.Module):
    """x ↦ ReLU(shortcut(x) + BN(conv(ReLU(BN(conv(x)))))); the first convolution has the stride.

    It has ReLU rather than IResNet's PReLU, whose backward pass alone takes 14 % of a training step on a CPU.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(x)) + shortcut, inplace=True)


class Mini(nn.Module):
    """Images (B, 3, S, S), normalised to [-1, 1], to embeddings (B, embedding_dim), not normalised.

    Args:
        embedding_dim: D, the width of the output.
        image_size: S, a multiple of 16.

    Raises:
        InputError: `image_size` is not a positive multiple of 16.
    """

    def __init__(self, *, embedding_dim: int = 512, image_size: int = 112) -> None:
        super().__init__()
        check_image_size(image_size, "the mini network")
        self.stem = nn.Conv2d(3, 48, 4, stride=4, bias=False)
        self.bn = nn.BatchNorm2d(48)
        self.layer1 = Block(48, 48, stride=1)
        self.layer2 = Block(48, 96, stride=2)
        self.layer3 = Block(96, 192, stride=2)
        self.fc = nn.Linear(192 * (image_size // 16) ** 2, embedding_dim)
        self.features = nn.BatchNorm1d(embedding_dim)
        self.features.weight.requires_grad_(False)  # the cosine ignores the embedding's scale, so it stays 1

    def forward(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """Embeddings (B, D) of images (B, 3, S, S); `keys`, which every backbone accepts, is not used."""
        x = F.relu(self.bn(self.stem(images)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        x = x.flatten(1)
        with full_precision(x.device):
            return self.features(self.fc(x.to(self.fc.weight.dtype)))
