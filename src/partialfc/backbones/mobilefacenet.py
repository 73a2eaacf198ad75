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


class Layers(nn.Module):
    """Layers in sequence, as one member `layers`, after which the published checkpoints name parameters."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Residual(Layers):
    """x ↦ x + layers(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def convolution(
    in_channels: int, channels: int, kernel: int = 1, *, stride: int = 1, groups: int = 1, linear: bool = False
) -> Layers:
    """Convolution without bias, BN and, unless `linear`, PReLU; padded to keep the size."""
    convolve = nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    return Layers(convolve, nn.BatchNorm2d(channels), *([] if linear else [nn.PReLU(channels)]))


def bottleneck(in_channels: int, channels: int, inner: int, *, stride: int, residual: bool = False) -> Layers:
    """1 × 1 to `inner` channels, depth-wise 3 × 3 with the stride, linear 1 × 1; plus x where `residual`."""
    return (Residual if residual else Layers)(
        convolution(in_channels, inner),
        convolution(inner, inner, 3, stride=stride, groups=inner),
        convolution(inner, channels, linear=True),
    )


def stage(channels: int, inner: int, blocks: int) -> Layers:
    """`blocks` residual bottlenecks that keep size and width."""
    return Layers(*(bottleneck(channels, channels, inner, stride=1, residual=True) for _ in range(blocks)))


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
        first = convolution(narrow, narrow, 3, groups=64) if blocks[0] == 1 else stage(narrow, 128, blocks[0])
        self.layers = nn.ModuleList(
            [
                convolution(3, narrow, 3, stride=2),
                first,
                bottleneck(narrow, narrow, 128, stride=2),
                stage(narrow, 128, blocks[1]),
                bottleneck(narrow, wide, 256, stride=2),
                stage(wide, 256, blocks[2]),
                bottleneck(wide, wide, 512, stride=2),
                stage(wide, 256, blocks[3]),
            ]
        )
        self.conv_sep = convolution(wide, LAST)
        # A weight for each position and channel of the last map, then a linear layer and BN.
        weigh = nn.Conv2d(LAST, LAST, image_size // 16, groups=LAST, bias=False)
        self.features = Layers(
            Layers(weigh, nn.BatchNorm2d(LAST)),
            nn.Flatten(),
            nn.Linear(LAST, embedding_dim, bias=False),
            nn.BatchNorm1d(embedding_dim),
        )
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
