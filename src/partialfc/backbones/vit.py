"""ViT T to H: the vision transformers of Partial FC (An et al. 2022, arXiv 2203.15565).

Patches of 9 × 9 pixels, no class token: as in the IResNets, a linear layer over all tokens at their positions gives the
embedding. Pre-norm blocks (Dosovitskiy et al. 2021, arXiv 2010.11929) with 8 heads, no bias on queries, keys and
values, and ReLU6. Training may drop a share of the tokens (token mask) and residual branches of some images (drop path;
Huang et al. 2016, arXiv 1603.09382). Parameters are named as in the published checkpoints.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from partialfc.backbones.layers import full_precision, recomputed
from partialfc.core.errors import InputError
from partialfc.core.keyed_random import bits, derive_key, uniform

PATCH = 9
HEADS = 8
WIDTHS_AND_DEPTHS = {
    "vit_t": (256, 12),
    "vit_s": (512, 12),
    "vit_b": (512, 24),
    "vit_l": (768, 24),
    "vit_h": (1024, 48),
}


def kept_tokens(tokens: int, mask_ratio: float, keys: Tensor) -> Tensor:
    """Positions of the tokens that are kept: int64 (B, floor(tokens × (1 - mask_ratio))), ascending in each row.

    A row is a pure function of its key, so that a sample loses the same tokens on any rank.
    """
    count = int(tokens * (1.0 - mask_ratio))
    positions = torch.arange(tokens, device=keys.device)
    counters = bits(derive_key("masked tokens"), keys)[:, None] + positions
    order = uniform(derive_key("token mask"), counters).argsort(dim=1)
    return order[:, :count].sort(dim=1).values


def drop_branch(branch: Tensor, rate: float, keys: Tensor | None, name: str) -> Tensor:
    """`branch` (B, T, D), set to 0 for a whole image with probability `rate`, else divided by 1 - rate.

    Args:
        keys: int64 (B,); whether an image is dropped is a pure function of its key and the branch's `name`.
    """
    if rate == 0.0 or keys is None:
        return branch
    mask = uniform(derive_key("drop path", name), keys) >= rate
    return branch * (mask.to(branch.dtype) / (1.0 - rate))[:, None, None]


class PatchEmbedding(nn.Module):
    """Images (B, 3, S, S) to tokens (B, T, D), T = (S // 9)²; the last S % 9 pixels of each side are ignored."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH, stride=PATCH)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """softmax(Q Kᵀ / √d) V in each head, then a linear map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(2, (3, HEADS, -1))  # (B, T, 3, heads, d)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind()
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.proj(attended.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x ↦ x + attention(LN(x)), then x ↦ x + MLP(LN(x)), the MLP four times as wide inside."""

    def __init__(self, width: int, drop_path: float, number: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width)
        self.norm2 = nn.LayerNorm(width)
        layers = {"fc1": nn.Linear(width, 4 * width), "act": nn.ReLU6(), "fc2": nn.Linear(4 * width, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.drop_path = drop_path
        self.number = number

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """`keys` are given only where branches are to be dropped."""
        x = x + drop_branch(self.attn(self.norm1(x)), self.drop_path, keys, f"{self.number} attention")
        return x + drop_branch(self.mlp(self.norm2(x)), self.drop_path, keys, f"{self.number} mlp")


class ViT(nn.Module):
    """Images (B, 3, S, S), normalised to [-1, 1], to embeddings (B, embedding_dim), not normalised.

    Args:
        width_and_depth: width of a token, a multiple of 8, and number of blocks.
        embedding_dim: width of the output.
        image_size: S, at least 9.
        mask_ratio: share of the tokens that is dropped in training. `mask_token` replaces them at the end.
        drop_path: rate at which the last block's branches are dropped in training; over the blocks it rises linearly
            from 0.
        checkpointing: recompute each block in the backward pass.

    Raises:
        InputError: `image_size` below 9, or a share outside [0, 1).
    """

    def __init__(
        self,
        width_and_depth: tuple[int, int],
        *,
        embedding_dim: int = 512,
        image_size: int = 112,
        mask_ratio: float = 0.0,
        drop_path: float = 0.0,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        width, depth = width_and_depth
        if image_size < PATCH:
            raise InputError(f"image_size {image_size} does not suit a ViT: choose at least {PATCH}, one patch.")
        tokens = (image_size // PATCH) ** 2
        for name, share in (("mask_ratio", mask_ratio), ("drop_path", drop_path)):
            if not 0.0 <= share < 1.0:
                raise InputError(f"{name} {share} is not a share: choose a number in [0, 1).")
        if int(tokens * (1.0 - mask_ratio)) == 0:
            raise InputError(f"mask_ratio {mask_ratio} leaves none of the {tokens} tokens: choose a smaller one.")
        self.mask_ratio, self.drop_path, self.checkpointing = mask_ratio, drop_path, checkpointing
        self.patch_embed = PatchEmbedding(width)
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, width))
        # Without a mask it is not used, and DistributedDataParallel would wait for its gradient.
        self.mask_token = nn.Parameter(torch.empty(1, 1, width), requires_grad=mask_ratio > 0.0)
        rates = [drop_path * number / max(1, depth - 1) for number in range(depth)]
        self.blocks = nn.ModuleList(Block(width, rate, number) for number, rate in enumerate(rates))
        self.norm = nn.LayerNorm(width)
        self.feature = nn.Sequential(
            nn.Linear(tokens * width, width, bias=False),
            nn.BatchNorm1d(width, eps=2e-5),
            nn.Linear(width, embedding_dim, bias=False),
            nn.BatchNorm1d(embedding_dim, eps=2e-5),
        )
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """Embeddings (B, D) of images (B, 3, S, S); mask and drop path need `keys`, int64 (B,), in training.

        Raises:
            ValueError: `keys` are missing.
        """
        masks = self.training and self.mask_ratio > 0.0
        drops = self.training and self.drop_path > 0.0
        if (masks or drops) and keys is None:
            raise ValueError("token mask and drop path draw from `keys`: call the backbone with one int64 per image")
        x = self.patch_embed(images) + self.pos_embed
        unmasked = kept_tokens(x.shape[1], self.mask_ratio, keys) if masks and keys is not None else None
        if unmasked is not None:
            x = x.gather(1, unmasked[:, :, None].expand(-1, -1, x.shape[2]))
        for block in self.blocks:
            inputs = (x, keys if drops else None)
            x = recomputed(block, *inputs) if self.checkpointing and self.training else block(*inputs)
        # A sum over up to 147,456 features loses too much in 16 bits, so the last layers run without autocast.
        with full_precision(x.device):
            x = self.norm(x.to(self.norm.weight.dtype))
            if unmasked is not None:
                masked = self.mask_token.expand(len(x), self.pos_embed.shape[1], -1)
                x = masked.scatter(1, unmasked[:, :, None].expand_as(x), x)
            return self.feature(x.flatten(1))
