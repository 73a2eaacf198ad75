"""Centers and momentum in bfloat16, rounded stochastically; state kept apart from the parameter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from partialfc.core.errors import InputError
from partialfc.head.margins import CosFace
from partialfc.head.optim import RowwiseAdamW, RowwiseSGD
from partialfc.head.partial_fc import PartialFC
from partialfc.head.rows import Rows, round_stochastically


def test_rounding_takes_a_neighbour_and_is_right_on_average() -> None:
    torch.manual_seed(0)
    values = torch.randn(1, 37)
    drawn = torch.stack([round_stochastically(values, key, torch.tensor([5]))[0] for key in range(4000)]).double()
    bits = values.view(torch.int32) & -0x10000
    towards_zero, away = bits.view(torch.float32).double(), (bits + 0x10000).view(torch.float32).double()
    assert bool(((drawn == towards_zero) | (drawn == away)).all())
    share = (drawn == away).double().mean(dim=0)
    wanted = ((values.double() - towards_zero) / (away - towards_zero))[0]
    # Five standard deviations of a mean of 4,000 draws.
    assert float((share - wanted).abs().max()) < 5 * 0.5 / 4000**0.5


def test_rounding_depends_on_key_row_and_column_only() -> None:
    values = torch.full((4, 6), 1.0 + 2.0**-9)
    rows = torch.tensor([3, 9, 1 << 40, 7])
    whole = round_stochastically(values, 1, rows)
    parts = torch.cat([round_stochastically(values[k : k + 1], 1, rows[k : k + 1]) for k in range(4)])
    assert torch.equal(whole, parts)
    assert not torch.equal(whole, round_stochastically(values, 2, rows))
    many = round_stochastically(torch.full((64, 64), 1.0 + 2.0**-9), 1, torch.arange(64)) > 1
    assert len({tuple(row) for row in many.tolist()}) == 64
    assert len({tuple(column) for column in many.T.tolist()}) == 64


def test_what_is_not_finite_stays_so() -> None:
    values = torch.tensor([[float("nan"), float("inf"), -float("inf"), 0.0, -0.0]])
    rounded = round_stochastically(values, 0, torch.tensor([0]))
    assert torch.equal(rounded.float().nan_to_num(7), values.nan_to_num(7))


@pytest.mark.parametrize("optimizer", [RowwiseSGD, RowwiseAdamW])
def test_state_in_integers_is_refused(optimizer: type) -> None:
    with pytest.raises(InputError, match=r"state_dtype is torch\.int8; it is floating point"):
        optimizer(PartialFC(20, 12, 1.0).parameters(), state_dtype=torch.int8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_bfloat16_table_is_rounded_stochastically_whatever_computes(dtype: torch.dtype) -> None:
    table = torch.zeros(64, 64, dtype=torch.bfloat16)
    values = torch.full((64, 64), 1.0 + 2.0**-9, dtype=dtype)  # to nearest, all would become 1
    Rows(torch.arange(64), dtype, None).write(table, "momentum_buffer", values)
    assert float(table.double().mean()) == pytest.approx(1.0 + 2.0**-9, abs=3e-4)


def repeat_one_batch(head: PartialFC, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    generator = torch.Generator().manual_seed(1)
    embeddings = torch.randn(16, 12, generator=generator)
    labels = torch.randint(200, (16,), generator=generator)
    for _ in range(steps):
        loss = head(embeddings.clone().requires_grad_(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def test_bfloat16_centers_learn_what_float32_centers_learn() -> None:
    """Steps far below half a unit in the last place, which rounding to nearest would lose altogether."""
    gains = []
    for dtype in (torch.float32, torch.bfloat16):
        head = PartialFC(200, 12, 0.3, CosFace(0.1), 8.0, dtype=dtype)
        losses = repeat_one_batch(head, RowwiseAdamW(head.parameters(), lr=2e-6, weight_decay=0.0), 100)
        gains.append(losses[0] - losses[-1])
    assert gains[0] > 1e-3
    assert abs(gains[1] - gains[0]) < 0.25 * gains[0]


@pytest.mark.parametrize("optimizer", [RowwiseSGD, RowwiseAdamW])
def test_state_of_its_own_dtype_survives_saving(optimizer: type) -> None:
    def build() -> tuple[PartialFC, RowwiseSGD | RowwiseAdamW]:
        head = PartialFC(200, 12, 0.3, CosFace(0.1), 8.0)
        return head, optimizer(head.parameters(), lr=0.01, state_dtype=torch.bfloat16, state_on_host=True)

    head, trained = build()
    repeat_one_batch(head, trained, 5)
    other, loaded = build()
    other.load_state_dict(head.state_dict())
    other.step = head.step
    loaded.load_state_dict(trained.state_dict())
    for name, value in loaded.row_state(other.centers).items():
        assert value.dtype == (torch.int32 if name == "step" else torch.bfloat16)
        assert torch.equal(value, trained.row_state(head.centers)[name])
    assert repeat_one_batch(head, trained, 3) == repeat_one_batch(other, loaded, 3)


def test_rounding_does_not_depend_on_the_shard() -> None:
    """Two halves of the centers, each with its own optimizer, round as the whole does."""

    def halves(values: Tensor) -> Tensor:
        return torch.cat(
            [
                round_stochastically(values[:100], 3, torch.arange(100)),
                round_stochastically(values[100:], 3, torch.arange(100) + 100),
            ]
        )

    values = torch.randn(200, 12)
    assert torch.equal(halves(values), round_stochastically(values, 3, torch.arange(200)))
