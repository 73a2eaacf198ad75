"""Gradients that are not finite: the loss scale that keeps float16 in range, and the images behind a skipped step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from partialfc.data.loader import Loader
from partialfc.distributed.collectives import Group, gather_json

MOST_NAMED = 24  # images that a rank names
Where = Literal["embeddings", "gradient of the embeddings", "gradient"]
_GROWTH_INTERVAL = 2000
_SMALLEST_SCALE, _LARGEST_SCALE = 2.0**-14, 2.0**24


@dataclass
class LossScale:
    """The factor that keeps small gradients out of float16's underflow (Micikevicius et al., ICLR 2018, 1710.03740).

    It acts between head and backbone: the head computes in float32 and needs none, so only the backbone's gradient is
    scaled and divided again, and never that of the centers. It is a power of two, which changes no digits, and the
    same on all ranks, since it follows from what they agreed on.

    Attributes:
        value: the factor.
        good_steps: finite steps since it last changed; it doubles after 2,000 of them, and halves after a step that is
            not finite.
    """

    value: float = 2.0**16
    good_steps: int = 0

    def update(self, finite: bool) -> None:
        """Adjust the factor after a step that was finite on all ranks, or was not."""
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.value = max(_SMALLEST_SCALE, self.value / 2)
        elif self.good_steps == _GROWTH_INTERVAL:
            self.value, self.good_steps = min(_LARGEST_SCALE, self.value * 2), 0


def scale_gradient(embeddings: Tensor, factor: float) -> Tensor:
    """The same values; the backward pass multiplies their gradient by `factor`."""
    scaled: Tensor = _ScaleGradient.apply(embeddings, factor)
    return scaled


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return embeddings.view_as(embeddings)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


def locate(outputs: list[tuple[Tensor, Tensor]]) -> tuple[Where, list[int]]:
    """Look for what is not finite in this rank's part of a step.

    Args:
        outputs: (positions (B,), output of the backbone (B, D) with its gradient retained) of each micro-step done.

    Returns:
        What was not finite here, "gradient" if only its sum over the ranks shows it; and the positions in the sample
        stream of the images whose rows were not finite, or of all images of this rank.
    """
    values = [(positions, output.detach()) for positions, output in outputs]
    gradients = [(positions, output.grad) for positions, output in outputs if output.grad is not None]
    if positions := _not_finite(values):
        return "embeddings", positions
    if positions := _not_finite(gradients):
        return "gradient of the embeddings", positions
    return "gradient", [position for positions, _ in outputs for position in positions.tolist()]


def _not_finite(parts: list[tuple[Tensor, Tensor]]) -> list[int]:
    """The positions of the rows that are not finite."""
    masks = [(positions, ~torch.isfinite(rows).all(dim=1).to(positions.device)) for positions, rows in parts]
    return [position for positions, mask in masks for position in positions[mask].tolist()]


def describe_skip(
    where: Where, positions: list[int], step: int, loader: Loader, group: Group | None
) -> tuple[dict[str, Any], str]:
    """The line of metrics about a skipped step, and a sentence, from all ranks. Two collectives.

    The ranks on which something was not finite name their images, at most `MOST_NAMED` each. A gradient of weights is
    checked only after its sum over the ranks: if no rank finds the cause in its embeddings, all ranks name theirs.

    Args:
        where, positions: of this rank.
        step: optimizer steps done, the skipped one included.
        loader: knows the names of the images.
        group: all ranks.
    """
    named = positions[:MOST_NAMED]
    own = {"where": where, "positions": named, "images": len(positions), "samples": loader.names(named)}
    reports = gather_json(own, group=group)
    ranks = [rank for rank, report in enumerate(reports) if report["where"] != "gradient"]
    reports = [reports[rank] for rank in ranks] or reports
    line = {
        "kind": "skipped_step",
        "step": step,
        "where": reports[0]["where"],
        "ranks": ranks,
        "images": sum(report["images"] for report in reports),
        "positions": [position for report in reports for position in report["positions"]],
        "samples": [name for report in reports for name in report["samples"]],
    }
    place = f"on rank {', '.join(map(str, ranks))}" if ranks else "on a rank that its sum does not tell"
    sentence = (
        f"step {step:,} is skipped: {line['where']} not finite {place}, {line['images']:,} images such as "
        f"{', '.join(line['samples'][:3])}; metrics.jsonl names more"
    )
    return line, sentence
