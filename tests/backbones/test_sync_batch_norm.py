"""Synchronised batch normalisation: torch's own on one process, and equal to it on three with uneven batches."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_workers import run_ranks
from torch import Tensor, nn

from partialfc.backbones import create_backbone
from partialfc.backbones.layers import recomputed
from partialfc.backbones.sync_batch_norm import SyncBatchNorm, synchronise_batch_norm
from partialfc.core.errors import InputError

SHAPES = {"(N, C)": (7, 3), "(N, C, H, W)": (7, 3, 2, 5)}
COUNTS = [0, 4, 3]  # images of the three ranks


class Net(nn.Module):
    """One normalisation between two products, so that its input's gradient counts."""

    def __init__(self, dimensions: int, momentum: float | None = 0.1) -> None:
        super().__init__()
        norm = nn.BatchNorm1d if dimensions == 2 else nn.BatchNorm2d
        self.norm = norm(3, momentum=momentum)
        nn.init.uniform_(self.norm.weight)
        nn.init.uniform_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x * 1.5 + 20.0).sin()


def results(net: nn.Module, x: Tensor, slope: Tensor, *, recompute: bool = False) -> dict[str, Any]:
    """Output, gradients and buffers after one pass."""
    x = x.clone().requires_grad_()
    out = recomputed(net, x) if recompute else net(x)
    (out * slope).sum().backward()
    parameters = {name: each.grad for name, each in net.named_parameters()}
    return {
        "out": out.detach(),
        "x": x.grad,
        **parameters,
        **{name: each.clone() for name, each in net.named_buffers()},
    }


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(shape, generator=generator, dtype=dtype), torch.randn(shape, generator=generator, dtype=dtype)


def nets(shape: tuple[int, ...], dtype: torch.dtype, momentum: float | None = 0.1) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(1)
    plain = Net(len(shape), momentum).to(dtype)
    synchronised = copy.deepcopy(plain)
    synchronise_batch_norm(synchronised)
    return plain, synchronised


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("recompute", [False, True])
def test_one_process_is_torchs_own(shape: tuple[int, ...], momentum: float | None, recompute: bool) -> None:
    plain, synchronised = nets(shape, torch.float64, momentum)
    assert isinstance(synchronised.norm, SyncBatchNorm)
    x, slope = inputs(shape)
    expected, actual = results(plain, x, slope), results(synchronised, x, slope, recompute=recompute)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(synchronised.eval()(x), plain.eval()(x))


def test_bfloat16_under_autocast_stays_bfloat16_and_is_as_near_as_torchs() -> None:
    plain, synchronised = nets((7, 3), torch.float32)
    x, _ = inputs((7, 3))
    exact = copy.deepcopy(plain).double()(x)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = synchronised(x.bfloat16()), plain(x.bfloat16())
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert (ours - exact).abs().max() <= 1.5 * (theirs - exact).abs().max() + 1e-3


def on_each_rank(rank: int, folder: Path) -> None:
    found: dict[str, Any] = {}
    start = sum(COUNTS[:rank])
    for name, shape in SHAPES.items():
        x, slope = inputs(shape)
        own = slice(start, start + COUNTS[rank])
        for recompute in (False, True):
            _, net = nets(shape, torch.float64)
            found[f"{name} {recompute}"] = results(net, x[own], slope[own], recompute=recompute)
    torch.save(found, folder / f"{rank}.pt")


@pytest.mark.slow
def test_three_ranks_with_uneven_batches_are_one_process(tmp_path: Path) -> None:
    run_ranks(3, on_each_rank, tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(3)]
    for name, shape in SHAPES.items():
        plain, _ = nets(shape, torch.float64)
        expected = results(plain, *inputs(shape))
        for recompute in (False, True):
            parts = [rank[f"{name} {recompute}"] for rank in ranks]
            for key in ("out", "x"):
                torch.testing.assert_close(torch.cat([part[key] for part in parts]), expected[key])
            for key in ("norm.weight", "norm.bias"):
                torch.testing.assert_close(sum(part[key] for part in parts), expected[key])
            for key in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
                torch.testing.assert_close(parts[1][key], expected[key])
                assert all(torch.equal(part[key], parts[0][key]) for part in parts)


@pytest.mark.parametrize("name", ["r18", "vit_t", "mbf", "mini"])
def test_keys_and_tensors_of_a_network_stay(name: str) -> None:
    network = create_backbone(name, embedding_dim=16, image_size=16)
    before = network.state_dict(keep_vars=True)
    synchronise_batch_norm(network)
    after = network.state_dict(keep_vars=True)
    assert list(before) == list(after)
    assert all(before[key] is after[key] for key in before)
    assert not any(type(module) in (nn.BatchNorm1d, nn.BatchNorm2d) for module in network.modules())


def test_networks_without_it_or_with_another_kind_are_refused() -> None:
    with pytest.raises(InputError, match="no batch normalisation"):
        synchronise_batch_norm(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(InputError, match="cannot replace 1, a BatchNorm3d"):
        synchronise_batch_norm(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm3d(2)))
