"""IResNet 18 to 200: the convolutional backbones of ArcFace and Partial FC.

Pre-activation residual blocks (He et al. 2016, arXiv 1603.05027; Han et al. 2017, arXiv 1610.02915; Duta et al. 2020,
arXiv 2004.04989) without early pooling: the input keeps its full size until the first stage, every stage halves it, and
a linear layer over the flattened last map gives the embedding, because positions matter in an aligned face. Parameters
and buffers are named as in the published checkpoints.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from partialfc.backbones.layers import check_image_size, full_precision, recomputed, shortcut
from partialfc.core.errors import InputError
from partialfc.core.keyed_random import bits, derive_key, uniform

WIDTHS = (64, 128, 256, 512)
BLOCKS = {
    "r18": (2, 2, 2, 2),
    "r34": (3, 4, 6, 3),
    "r50": (3, 4, 14, 3),
    "r100": (3, 13, 30, 3),
    "r200": (6, 26, 60, 6),
}


def keyed_dropout(x: Tensor, rate: float, keys: Tensor | None) -> Tensor:
    """Zero each entry of x (B, F) with probability `rate` and scale the rest by 1 / (1 - rate).

    Args:
        keys: int64 (B,), one random number per sample. The mask is a pure function of it, so that a sample has the same
            mask on any rank and after a resume.

    Raises:
        ValueError: `keys` is missing.
    """
    if keys is None:
        raise ValueError("dropout in training mode draws from `keys`: call the backbone with one int64 per image")
    counters = bits(derive_key("dropout"), keys)[:, None] + torch.arange(x.shape[1], device=x.device)
    mask = uniform(derive_key("dropout mask"), counters) >= rate
    return x * mask / (1.0 - rate)


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """A 3 × 3 convolution without bias, which keeps the size at stride 1."""
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


class Block(nn.Module):
    """x ↦ shortcut(x) + BN(conv(PReLU(BN(conv(BN(x)))))); the second convolution has the stride."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv3x3(in_channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.prelu = nn.PReLU(channels)
        self.conv2 = conv3x3(channels, channels, stride)
        self.bn3 = nn.BatchNorm2d(channels)
        self.downsample = shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        return self.bn3(self.conv2(x)) + shortcut


def stage(in_channels: int, channels: int, blocks: int) -> nn.Sequential:
    """`blocks` blocks; the first halves the size."""
    first = Block(in_channels, channels, stride=2)
    return nn.Sequential(first, *(Block(channels, channels, stride=1) for _ in range(blocks - 1)))


class IResNet(nn.Module):
    """Images (B, 3, S, S), normalised to [-1, 1], to embeddings (B, embedding_dim), not normalised.

    Args:
        blocks: residual blocks in each of the four stages.
        embedding_dim: D, the width of the output.
        image_size: S, a multiple of 16.
        dropout: share of the flattened features that is dropped in training.
        checkpointing: recompute each block in the backward pass.

    Raises:
        InputError: `image_size` is not a positive multiple of 16, or `dropout` is outside [0, 1).
    """

    def __init__(
        self,
        blocks: tuple[int, int, int, int],
        *,
        embedding_dim: int = 512,
        image_size: int = 112,
        dropout: float = 0.0,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        check_image_size(image_size, "an IResNet")
        if not 0.0 <= dropout < 1.0:
            raise InputError(f"dropout {dropout} is not a share: choose a number in [0, 1).")
        self.dropout, self.checkpointing = dropout, checkpointing
        self.conv1 = conv3x3(3, WIDTHS[0])
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.prelu = nn.PReLU(WIDTHS[0])
        self.layer1 = stage(WIDTHS[0], WIDTHS[0], blocks[0])
        self.layer2 = stage(WIDTHS[0], WIDTHS[1], blocks[1])
        self.layer3 = stage(WIDTHS[1], WIDTHS[2], blocks[2])
        self.layer4 = stage(WIDTHS[2], WIDTHS[3], blocks[3])
        self.bn2 = nn.BatchNorm2d(WIDTHS[3])
        self.fc = nn.Linear(WIDTHS[3] * (image_size // 16) ** 2, embedding_dim)
        self.features = nn.BatchNorm1d(embedding_dim)
        self.features.weight.requires_grad_(False)  # the cosine ignores the embedding's scale, so it stays 1
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.1)

    def forward(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """Embeddings (B, D) of images (B, 3, S, S); only dropout in training needs `keys`, int64 (B,)."""
        x = self.prelu(self.bn1(self.conv1(images)))
        for blocks in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in blocks:
                x = recomputed(block, x) if self.checkpointing and self.training else block(x)
        x = self.bn2(x).flatten(1)
        # A sum over up to 25,088 features loses too much in 16 bits, so the last two layers run without autocast.
        with full_precision(x.device):
            x = x.to(self.fc.weight.dtype)
            if self.training and self.dropout > 0.0:
                x = keyed_dropout(x, self.dropout, keys)
            return self.features(self.fc(x))
