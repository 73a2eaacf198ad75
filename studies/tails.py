"""A long tail: most identities have two to four images; does the sampled head wear out their centers less?

python studies/tails.py run --work runs/studies
python studies/tails.py page
"""

from __future__ import annotations

from pathlib import Path

import trained
from sets import Prepared
from study import Arm, Claim, Study, main

PLAN = """
A tenth of the identities stay whole, and 2 to 4 images of each other remain, in the manner of the
paper's long-tailed set. The small network trains with all classes and with a tenth of them (PFC)
in each step. With all classes the center of a rare identity is pushed away by every image of every
other one in each epoch; a sampled head pushes it only in the steps that sample it. "Passive updates" are
the steps of the whole training that changed the center of a rare identity without an image of it. "Found" is
the share of training images whose nearest center is their own, for rare identities and for whole ones.
"""
READING = """
Passive updates fall with the sample rate by construction, further than the rate itself, since the
positives of a batch fill a good part of the sample. That they harm is not seen. With all classes nearly
every training image of a rare identity finds its own center, so there is little left to protect, and
what remains is the price of fewer negatives, which on faces rare identities pay above all: a tenth of
these classes is a few hundred, a tenth of the paper's is 60,000 and more. These sets are too small for
the claim, in classes and in what their tails cost; the verdicts are about these sets.
"""
TAIL = {"kind": "long-tail", "fraction": 0.1}
_RARE = 4  # images at most


def measure(run: Path, prepared: Prepared, arm: Arm) -> dict[str, float]:
    """Passive updates of rare centers, and the training images that find their own center."""
    found = trained.read(run, prepared, arm.damage, shown=8192)
    rare = found.images <= _RARE
    hits = ((found.embeddings @ found.centers.T).argmax(1).numpy() == found.labels).astype(float)
    of_rare = rare[found.labels]
    return {
        "passive updates": float(found.passive[rare].mean()),
        "found, rare": float(hits[of_rare].mean()),
        "found, whole": float(hits[~of_rare].mean()),
    }


STUDY = Study(
    name="tails",
    title="A long tail",
    plan=PLAN,
    arms={
        "all classes": Arm({"head.sample_rate": 1.0}, TAIL),
        **{f"PFC {rate}": Arm({"head.sample_rate": rate}, TAIL) for rate in (0.3, 0.1, 0.05)},
        "PFC* 0.1": Arm({"head.conflict_threshold": 0.4}, TAIL),
    },
    figures={
        "test rank-1": "rank-1",
        "pairs accuracy": "accuracy of pairs",
        "passive updates": "passive updates of a rare center",
        "found, rare": "found, rare",
        "found, whole": "found, whole",
    },
    claims=[
        Claim("PFC 0.1 is better than all classes", "PFC 0.1", "all classes", "test rank-1"),
        Claim("PFC 0.3 is better than all classes", "PFC 0.3", "all classes", "test rank-1"),
    ],
    counts=frozenset({"passive updates"}),
    measure=measure,
    reading=READING,
)

if __name__ == "__main__":
    main(STUDY)
