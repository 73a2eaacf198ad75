"""MobileFaceNet and its large form (Chen et al. 2018, arXiv 1804.07573), as wide as in the Partial FC experiments.

Inverted bottlenecks of depth-wise convolutions; a depth-wise convolution over the whole last map replaces pooling.
Parameters and buffers are named as in the published checkpoints.
"""

from __future__ import annotations

from torch import Tensor, nn

from partialfc.backbones.layers import check_image_size, full_precision

# Blocks of the four stages, and the factor on the width of the maps between bottlenecks.
BLOCKS_AND_SCALE = {
    "mbf": ((1, 4, 6, 2), 2),
    "mbf_large": ((2, 8, 12, 4), 4),
}
LAST = 512


class Convolution(nn.Module):
    """Convolution without bias, BN and, unless `linear`, PReLU; padded to keep the size unless `whole`."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel: int = 1,
        *,
        stride: int = 1,
        groups: int = 1,
        linear: bool = False,
        whole: bool = False,
    ) -> None:
        super().__init__()
        padding = 0 if whole else kernel // 2
        layers: list[nn.Module] = [
            nn.Conv2d(in_channels, channels, kernel, stride, padding, groups=groups, bias=False),
            nn.BatchNorm2d(channels),
        ]
        self.layers = nn.Sequential(*layers, *([] if linear else [nn.PReLU(channels)]))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Bottleneck(nn.Module):
    """1 × 1 to `inner` channels, depth-wise 3 × 3 with the stride, linear 1 × 1; plus x where `residual`."""

    def __init__(self, in_channels: int, channels: int, inner: int, *, stride: int, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        self.layers = nn.Sequential(
            Convolution(in_channels, inner),
            Convolution(inner, inner, 3, stride=stride, groups=inner),
            Convolution(inner, channels, linear=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


class Stage(nn.Module):
    """`blocks` residual bottlenecks that keep size and width."""

    def __init__(self, channels: int, inner: int, blocks: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(Bottleneck(channels, channels, inner, stride=1, residual=True) for _ in range(blocks))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Embedding(nn.Module):
    """A weight for each position and channel of the last map, then a linear layer and BN."""

    def __init__(self, side: int, embedding_dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            Convolution(LAST, LAST, side, groups=LAST, linear=True, whole=True),
            nn.Flatten(),
            nn.Linear(LAST, embedding_dim, bias=False),
            nn.BatchNorm1d(embedding_dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class MobileFaceNet(nn.Module):
    """Images (B, 3, S, S), normalised to [-1, 1], to embeddings (B, embedding_dim), not normalised.

    Args:
        blocks_and_scale: residual bottlenecks of the four stages, and the factor on widths.
        embedding_dim: D, the width of the output.
        image_size: S, a multiple of 16.

    Raises:
        InputError: `image_size` is not a positive multiple of 16.
    """

    def __init__(
        self,
        blocks_and_scale: tuple[tuple[int, int, int, int], int],
        *,
        embedding_dim: int = 512,
        image_size: int = 112,
    ) -> None:
        super().__init__()
        check_image_size(image_size, "a MobileFaceNet")
        blocks, scale = blocks_and_scale
        narrow, wide = 64 * scale, 128 * scale
        # The small network starts with one grouped convolution (64 groups), the large one with a stage.
        first = Convolution(narrow, narrow, 3, groups=64) if blocks[0] == 1 else Stage(narrow, 128, blocks[0])
        self.layers = nn.ModuleList(
            [
                Convolution(3, narrow, 3, stride=2),
                first,
                Bottleneck(narrow, narrow, 128, stride=2, residual=False),
                Stage(narrow, 128, blocks[1]),
                Bottleneck(narrow, wide, 256, stride=2, residual=False),
                Stage(wide, 256, blocks[2]),
                Bottleneck(wide, wide, 512, stride=2, residual=False),
                Stage(wide, 256, blocks[3]),
            ]
        )
        self.conv_sep = Convolution(wide, LAST)
        self.features = Embedding(image_size // 16, embedding_dim)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """Embeddings (B, D) of images (B, 3, S, S); `keys`, which every backbone accepts, is not used."""
        x = images
        for layer in self.layers:
            x = layer(x)
        with full_precision(x.device):
            return self.features(self.conv_sep(x.to(next(self.conv_sep.parameters()).dtype)))
