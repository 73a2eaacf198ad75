"""Conflicts as they come: one shape under several labels. Which head keeps its centers together?

python studies/natural.py run --work runs/studies
python studies/natural.py page
"""

from __future__ import annotations

from collections import defaultdict
from itertools import combinations
from pathlib import Path

import torch
import trained
from sets import Prepared, equal_characters, example
from study import Arm, Claim, Study, main

PLAN = """
Unicode has characters twice: a compatibility ideograph is drawn as its unified one is. The training
set has all of them, each under its own label, as it comes, and nothing is cut. "Equals" is the mean
cosine of the centers of two labels that Unicode's normal form (NFKC) takes for one; "stranger" is the
mean over all centers of the cosine to the nearest center that is none of its equals, and "beyond" is by
how much equals are closer than that; "closest pairs" is the share of equals among as many pairs of
centers as there are equals, the closest ones. The paper argues that a head which sees both as negatives
of each other in every step pulls them apart, a sampled one does so more seldom, and PFC* stops once
they are close.

"Stranger" and "beyond", with two claims, were added after the first runs, to tell sparing equals from
sparing all that is close.
"""

READING = """
All classes push the centers of one shape furthest apart. A sampled head pushes them less, and strangers
nearly as much, as the paper argues. PFC* keeps equals closer still, but strangers by as much: its
threshold does not tell a second label from a look-alike. So the closest pairs of PFC without a threshold
are the best list of such labels in one's own data; those of PFC* are a little worse than those of all
classes (by 19 of 1,357 pairs in each of three seeds, hence the interval of zero). The test resolves no
difference; the characters in it have no second label.
"""


def measure(run: Path, prepared: Prepared, arm: Arm) -> dict[str, float]:
    """How close the centers of equal characters are, and whether closeness finds them."""
    centers = trained.centers(run)
    names = prepared.source(arm.damage).identities
    assert names is not None
    labels = defaultdict(list)
    for label, name in enumerate(names):
        labels[example.canonical(int(name.removeprefix("U+"), 16))].append(label)
    pairs = torch.tensor([pair for group in labels.values() for pair in combinations(group, 2)])
    cosines = centers @ centers.T
    is_equal = torch.zeros_like(cosines, dtype=torch.bool)
    is_equal[pairs[:, 0], pairs[:, 1]] = True
    is_stranger = ~(is_equal | is_equal.T).fill_diagonal_(True)
    closest = cosines.triu(1).flatten().topk(len(pairs)).indices
    equals = cosines[is_equal].mean().item()
    stranger = cosines.masked_fill(~is_stranger, -1.0).amax(1).mean().item()
    return {
        "equals": equals,
        "stranger": stranger,
        "beyond": equals - stranger,
        "closest pairs": is_equal.flatten()[closest].double().mean().item(),
    }


STUDY = Study(
    name="natural",
    title="One character under several labels",
    plan=PLAN,
    arms={
        "all classes": Arm({"head.sample_rate": 1.0}),
        "PFC 0.1": Arm({}),
        "PFC* 0.1": Arm({"head.conflict_threshold": 0.4}),
    },
    figures={
        "equals": "equals",
        "stranger": "stranger",
        "beyond": "beyond",
        "closest pairs": "closest pairs",
        "test rank-1": "rank-1",
        "pairs accuracy": "accuracy of pairs",
    },
    claims=[
        Claim("PFC keeps equals closer than all classes do", "PFC 0.1", "all classes", "equals"),
        Claim("PFC* keeps equals closer than PFC", "PFC* 0.1", "PFC 0.1", "equals"),
        Claim("PFC spares equals more than strangers", "PFC 0.1", "all classes", "beyond"),
        Claim("PFC* spares equals more than strangers, beside PFC", "PFC* 0.1", "PFC 0.1", "beyond"),
        Claim(
            "The closest pairs of PFC* are rather equals than those of all classes",
            "PFC* 0.1",
            "all classes",
            "closest pairs",
        ),
    ],
    epochs=3,
    measure=measure,
    reading=READING,
    data={"characters": equal_characters},
)

if __name__ == "__main__":
    main(STUDY)
