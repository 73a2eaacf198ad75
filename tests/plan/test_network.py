"""What a backbone costs, counted without values, beside the same with values and beside known figures."""

from __future__ import annotations

import pytest
import torch
from workloads import changed, workload

from partialfc.backbones import BACKBONES, create_backbone
from partialfc.core.errors import InputError
from partialfc.plan.network import LiveBytes, network_flops, network_pass, network_size

SMALL = workload(100, 6, backbone__name="r18", precision="float32")


@pytest.mark.parametrize("backbone", ["r18", "vit_t", "mbf", "mini"])
@pytest.mark.slow
def test_tensors_without_values_take_what_real_ones_do(backbone: str) -> None:
    asked = changed(SMALL, backbone__name=backbone)
    network = create_backbone(backbone, embedding_dim=64, image_size=32)
    with LiveBytes(network) as live:
        embeddings = network(torch.zeros(6, 3, 32, 32), torch.zeros(6, dtype=torch.int64)).float()
        saved = live.now
        embeddings.backward(torch.ones_like(embeddings))
    counted = network_pass(asked)
    assert counted.saved_bytes == pytest.approx(saved, rel=0.001)
    assert counted.peak_bytes == pytest.approx(live.peak, rel=0.001)
    assert counted.working_bytes == pytest.approx(live.working_peak, rel=0.001)
    assert saved <= live.working_peak <= live.peak <= live.working_peak + 4 * network_size(asked).trained


def test_live_bytes_are_those_of_storages_that_live() -> None:
    module = torch.nn.Linear(2, 2)
    with LiveBytes(module) as live:
        module.weight.detach()  # not made here
        first = torch.zeros(1000)
        view = first.view(10, 100)
        assert live.now == 4000
        second = torch.zeros(500) + 1  # one temporary beside it
        assert (live.now, live.peak) == (6000, 8000)
        del first
        assert live.now == 6000  # the view holds it
        del view, second
        assert live.now == 0


def test_sizes_of_published_networks() -> None:
    published = changed(SMALL, image_size=112, backbone__embedding_dim=512)
    assert network_size(changed(published, backbone__name="r100")).parameters == 65_156_160
    size = network_size(changed(published, backbone__name="r50"))
    assert size.parameters - size.trained == 512
    assert size.largest == 512 * 25_088


@pytest.mark.parametrize(
    "backbone",
    [name if name in ("r18", "mini") else pytest.param(name, marks=pytest.mark.slow) for name in BACKBONES],
)
def test_every_backbone_is_counted(backbone: str) -> None:
    small = workload(100, 2, backbone__name=backbone, image_size=48)
    counted = network_pass(small)
    assert 0 < counted.saved_bytes <= counted.peak_bytes
    assert network_flops(small) > 1e6


@pytest.mark.slow
def test_what_lowers_the_memory_of_activations() -> None:
    asked = changed(SMALL, image_size=64)
    full, recomputed = (network_pass(changed(asked, backbone__checkpointing=c)) for c in (False, True))
    assert recomputed.saved_bytes < full.saved_bytes / 2
    assert network_pass(changed(asked, precision="bfloat16")).saved_bytes < 0.8 * full.saved_bytes


def test_an_option_that_the_backbone_does_not_take() -> None:
    with pytest.raises(InputError, match="mini does not take the option 'checkpointing'"):
        network_size(changed(SMALL, backbone__name="mini", backbone__checkpointing=True))
