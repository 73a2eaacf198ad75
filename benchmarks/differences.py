"""How far the differences from the published code move the numbers: small trainings of a head, and schedules.

    python benchmarks/differences.py

2,000 classes of 64 dimensions, a tenth of them in each of 1,000 steps of 128 embeddings that lie around the direction
of their class, SGD of rate 0.1 with momentum 0.9 and weight decay 5e-4. Positives are of the first 1,000 classes. Two
heads that differ in one option see the same batches. Writes a table of docs/migrate.md; takes two minutes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from documents import write_between
from partialfc import ArcFace, PartialFC, RowwiseSGD
from partialfc.head.sampling import sample_classes
from partialfc.training.schedule import learning_rate

CLASSES, WIDTH, BATCH, STEPS, POSITIVE = 2_000, 64, 128, 1_000, 1_000
LAST = 100  # steps over which a loss is averaged
CLAMP = 1e-30  # of the published softmax


def trained(unsampled: Any = "freeze", twins: bool = False, **options: Any) -> tuple[float, Tensor]:
    """The mean loss of the last steps, and the centers; with `twins`, each identity has two labels."""
    directions = nn.functional.normalize(torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(1)))
    if twins:
        directions = directions[torch.arange(CLASSES) // 2]
    head = PartialFC(CLASSES, WIDTH, 0.1, scale=32.0, seed=1, **options)
    optimizer = RowwiseSGD(head.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, unsampled=unsampled)
    generator, losses = torch.Generator().manual_seed(2), []
    for _ in range(STEPS):
        labels = torch.randint(POSITIVE, (BATCH,), generator=generator)
        embeddings = directions[labels] + 0.06 * torch.randn(BATCH, WIDTH, generator=generator)
        loss = head(embeddings, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    optimizer.flush()
    return sum(losses[-LAST:]) / LAST, head.centers.detach().clone()


def apart(first: Tensor, second: Tensor) -> str:
    """The mean cosine between the centers of two heads."""
    return f"{float(nn.functional.cosine_similarity(first, second).mean()):.3f}"


def rows() -> list[str]:
    resting, moving = trained(), trained("lazy_dense")
    exact, straight = (trained(margin=ArcFace(0.5, gradient)) for gradient in ("exact", "straight_through"))
    left_out, as_zero = (
        trained(twins=True, conflict_threshold=0.4, conflict_as_zero_logit=zero) for zero in (False, True)
    )
    norms = [f"{float(centers[POSITIVE:].norm(dim=1).mean()):.3f}" for _, centers in (moving, resting)]
    lines = ["| what | published | here |", "|---|---|---|"]
    lines.append(f"| unsampled centers: mean norm of classes that are never positive | {norms[0]} | {norms[1]} |")
    for what, published, here in (
        ("unsampled centers", moving, resting),
        ("ArcFace's gradient", straight, exact),
        ("conflicts, each identity under two labels", as_zero, left_out),
    ):
        both = f"{what}: loss; mean cosine of the centers {apart(published[1], here[1])}"
        lines.append(f"| {both} | {published[0]:.3f} | {here[0]:.3f} |")
    opposite = torch.tensor([-1.0], dtype=torch.float64)
    past = float(ArcFace(0.5).target(opposite, None))  # type: ignore[arg-type]
    lines.append(f"| ArcFace's logit at θ = π | {float(torch.cos(opposite.arccos() + 0.5)):.3f} | {past:.3f} |")
    worst = float(-torch.log(torch.tensor(CLAMP, dtype=torch.float64)))
    lines.append(f"| loss of a sample whose target has cosine −1 and another class 1, s = 64 | {worst:.2f} | 128.00 |")
    warmup, total = 100, 1_000
    ours = [learning_rate(step, base=1.0, total_steps=total, warmup_steps=warmup) for step in range(total)]
    there = [1.0, *(step / warmup for step in range(1, warmup))]
    lines.append(f"| rate of step 0 of a warm-up of {warmup} steps | {there[0]:.2f} | {ours[0]:.2f} |")
    lines.append(f"| mean rate of that warm-up | {sum(there) / warmup:.3f} | {sum(ours[:warmup]) / warmup:.3f} |")
    means = [
        sum(learning_rate(step, base=1.0, total_steps=total, power=power) for step in range(total)) / total
        for power in (1.0, 2.0)
    ]
    lines.append(f"| mean rate of a training, power 1 (latest code) and 2 | {means[0]:.3f} | {means[1]:.3f} |")
    lines.append(f"| {_uneven()} |")
    return lines


def _uneven() -> str:
    """How often a negative of the first of two ranks is drawn, relative to the second, if it has all the positives."""
    positives, half, drawn = torch.arange(64), CLASSES // 2, torch.zeros(CLASSES)
    for step in range(1_000):
        classes = sample_classes(
            positives, step=step, num_classes=CLASSES, sample_rate=0.1, seed=0, start=0, stop=CLASSES
        )
        drawn[classes] += 1
    here = float(drawn[len(positives) : half].mean() / drawn[half:].mean())
    share = CLASSES // 10 // 2  # of each published rank, positives included
    there = (share - len(positives)) / (half - len(positives)) / (share / half)
    what = "draws of a negative on a rank that has all 64 positives, beside the other rank's"
    return f"{what} | {there:.2f} | {here:.2f}"


def main() -> None:
    write_between("migrate.md", "benchmarks/differences.py", rows())


if __name__ == "__main__":
    main()
