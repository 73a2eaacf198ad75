"""Which images stand behind a step that was skipped: what a rank knows of it, and what all of them say together."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from partialfc.data.loader import Loader
from partialfc.distributed.collectives import Group, gather_json

MOST_NAMED = 24  # images that a rank names

Where = Literal["embeddings", "gradient of the embeddings", "gradient"]


@dataclass(frozen=True)
class Skip:
    """What one rank knows of a step that was skipped.

    Attributes:
        where: what was not finite here; "gradient" if only its sum over the ranks shows it.
        positions: places in the endless order of the images whose rows were not finite, or of all of this rank's.
    """

    where: Where
    positions: list[int]


def locate(outputs: list[tuple[Tensor, Tensor]]) -> Skip:
    """Look for what is not finite in this rank's part of a step.

    Args:
        outputs: (positions (B,), output of the backbone (B, D) with its gradient kept) of each micro-step done.
    """
    rows = [(positions, ~_finite_rows(output.detach())) for positions, output in outputs]
    found = _chosen(rows)
    if found:
        return Skip("embeddings", found)
    rows = [(positions, ~_finite_rows(output.grad)) for positions, output in outputs if output.grad is not None]
    found = _chosen(rows)
    if found:
        return Skip("gradient of the embeddings", found)
    return Skip("gradient", [place for positions, _ in outputs for place in positions.tolist()])


def describe_skip(skip: Skip, step: int, loader: Loader, group: Group | None) -> tuple[dict[str, Any], str]:
    """A line of metrics about a skipped step, and a sentence, of all ranks. Two collectives.

    The ranks on which something was not finite name their images, at most `MOST_NAMED` each. A gradient that is not
    finite is known after its sum over the ranks only: if no rank finds the cause in its embeddings, all name theirs.

    Args:
        skip: of this rank.
        step: optimizer steps done, the skipped one included.
        loader: knows the names.
        group: all ranks.
    """
    named = skip.positions[:MOST_NAMED]
    own = {**asdict(skip), "positions": named, "images": len(skip.positions), "samples": loader.names(named)}
    ranks = list(enumerate(gather_json(own, group=group)))
    guilty = [(rank, told) for rank, told in ranks if told["where"] != "gradient"]
    accused = guilty or ranks
    line = {
        "kind": "skipped_step",
        "step": step,
        "where": accused[0][1]["where"],
        "ranks": [rank for rank, _ in guilty],
        "images": sum(told["images"] for _, told in accused),
        "positions": [place for _, told in accused for place in told["positions"]],
        "samples": [name for _, told in accused for name in told["samples"]],
    }
    place = f"on rank {', '.join(map(str, line['ranks']))}" if guilty else "on a rank that its sum does not tell"
    sentence = (
        f"step {step:,} is skipped: {line['where']} not finite {place}, {line['images']:,} images such as "
        f"{', '.join(line['samples'][:3])}; metrics.jsonl names more"
    )
    return line, sentence


def _finite_rows(values: Tensor) -> Tensor:
    return torch.isfinite(values).all(dim=1)


def _chosen(rows: list[tuple[Tensor, Tensor]]) -> list[int]:
    return [place for positions, chosen in rows for place in positions[chosen.to(positions.device)].tolist()]
