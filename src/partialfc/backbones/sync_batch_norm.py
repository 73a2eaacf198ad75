"""Batch normalisation with the statistics of all ranks' images, on a CPU too (torch's own needs a GPU).

Ioffe and Szegedy 2015, arXiv 1502.03167. A rank computes mean and variance of its own images; one all-reduce of counts
and moments in float64 yields those of all images, however unevenly they are distributed. So a network gives the same
embeddings and gradients at any world size, for the same set of images in one pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from partialfc.core.errors import InputError
from partialfc.distributed.collectives import all_reduce


class SyncBatchNorm(_BatchNorm):
    """nn.BatchNorm1d or 2d, for (N, C) or (N, C, H, W), with statistics over the images of all ranks in training.

    In training the forward pass takes one collective and the backward pass another; a rank without images must call it
    too. Gradients of weight and bias are this rank's part, as DistributedDataParallel expects.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim not in (2, 4):
            raise ValueError(f"SyncBatchNorm takes (N, C) or (N, C, H, W), not {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        count, mean, variance = _statistics(input.detach())
        if self.track_running_stats:
            self._track(count, mean, variance)
        weight, bias = (self.weight, self.bias) if self.affine else (torch.ones_like(mean), torch.zeros_like(mean))
        normalised: Tensor = _Normalise.apply(input, weight, bias, count, mean, variance, self.eps)
        return normalised

    @torch.no_grad()
    def _track(self, count: Tensor, mean: Tensor, variance: Tensor) -> None:
        """Update the running statistics, with the unbiased variance, as torch's BatchNorm does."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        unbiased = variance * count / (count - 1).clamp_min(1)
        for running, value in ((self.running_mean, mean), (self.running_var, unbiased)):
            weight: Any = self.momentum
            if weight is None:
                weight = self.num_batches_tracked.to(running.dtype).reciprocal()
            running.lerp_(value.to(running.dtype), weight)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values per channel (), mean (C,) and biased variance (C,) over all ranks, float64. One collective."""
    axes, channels = _axes(x), x.shape[1]
    count = x.numel() // channels
    moments = torch.zeros(2 * channels + 1, dtype=torch.float64, device=x.device)
    if count:
        local_variance, local_mean = torch.var_mean(_wide(x), axes, correction=0)
        mean = local_mean.double()
        moments[:channels] = count * mean
        moments[channels:-1] = count * (local_variance.double() + mean.square())
        moments[-1] = count
    all_reduce(moments)
    total = moments[-1]
    mean, square = (moments[:-1] / total).split(channels)
    return total, mean, (square - mean.square()).clamp_min(0)


class _Normalise(torch.autograd.Function):
    """(x − mean) / √(variance + eps) · weight + bias, with the gradient through mean and variance of all ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        count: Tensor,
        mean: Tensor,
        variance: Tensor,
        eps: float,
    ) -> Tensor:
        dtype = _wide(x).dtype
        inverse = (variance + eps).rsqrt()
        ctx.save_for_backward(x, weight, count, mean, inverse)
        scale = inverse.to(dtype) * weight.to(dtype)
        result = (_wide(x) - _as_channels(mean.to(dtype), x)) * _as_channels(scale, x)
        return (result + _as_channels(bias.to(dtype), x)).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, count, mean, inverse = ctx.saved_tensors
        axes, dtype = _axes(x), _wide(x).dtype
        gradient = _wide(gradient)
        normalised = (_wide(x) - _as_channels(mean.to(dtype), x)) * _as_channels(inverse.to(dtype), x)
        sums = torch.cat([gradient.sum(axes), (gradient * normalised).sum(axes)]).double()
        bias_gradient, weight_gradient = sums.clone().split(len(mean))
        offset, slope = (all_reduce(sums) / count).to(dtype).split(len(mean))
        scale = inverse.to(dtype) * weight.to(dtype)
        # Section 3 of the paper, with the two means over all ranks.
        result = gradient - _as_channels(offset, x) - normalised * _as_channels(slope, x)
        result = (result * _as_channels(scale, x)).to(x.dtype)
        return result, weight_gradient.to(weight.dtype), bias_gradient.to(weight.dtype), *[None] * 4


def _axes(x: Tensor) -> list[int]:
    return [axis for axis in range(x.ndim) if axis != 1]


def _wide(x: Tensor) -> Tensor:
    """x in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _as_channels(values: Tensor, x: Tensor) -> Tensor:
    """(C,) in a shape that broadcasts over `x`."""
    return values.view(1, -1, *[1] * (x.ndim - 2))


def synchronise_batch_norm(network: nn.Module) -> None:
    """Replace each BatchNorm1d and 2d by a `SyncBatchNorm` with the same parameters and buffers; their keys stay.

    Raises:
        InputError: the network has no batch normalisation, or one of another kind.
    """
    norms = [(name, module) for name, module in network.named_modules() if isinstance(module, _BatchNorm)]
    if not norms:
        raise InputError("backbone.sync_batch_norm is set, but the network has no batch normalisation: leave it out.")
    for name, module in norms:
        if type(module) not in (nn.BatchNorm1d, nn.BatchNorm2d):
            raise InputError(
                f"backbone.sync_batch_norm cannot replace {name}, a {type(module).__name__}: leave it out."
            )
        parent = network.get_submodule(name.rpartition(".")[0])
        norm = SyncBatchNorm(
            module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats
        )
        norm._parameters, norm._buffers, norm.training = module._parameters, module._buffers, module.training
        setattr(parent, name.rpartition(".")[2], norm)
