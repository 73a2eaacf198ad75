"""A long tail: most identities have two to four images; does the sampled head wear out their centers less?

python studies/tails.py run --work runs/studies
python studies/tails.py page
"""

from __future__ import annotations

from study import Arm, Claim, Study, main

PLAN = """
A tenth of the identities stay whole, and 2 to 4 images of each other remain, in the manner of the
paper's WebFace12M-Longtail. The small network trains with all classes and with a tenth of them (PFC)
in each step. With all classes the center of a rare identity is pushed away by every image of every
other one in each epoch; a sampled head pushes it a tenth as often.
"""
TAIL = {"kind": "long-tail", "fraction": 0.1}
STUDY = Study(
    name="tails",
    title="A long tail",
    plan=PLAN,
    arms={
        "all classes": Arm({"head.sample_rate": 1.0}, TAIL),
        **{f"PFC {rate}": Arm({"head.sample_rate": rate}, TAIL) for rate in (0.3, 0.1, 0.05)},
        "PFC* 0.1": Arm({"head.conflict_threshold": 0.4}, TAIL),
    },
    figures={"test rank-1": "rank-1", "pairs accuracy": "accuracy of pairs"},
    claims=[
        Claim("PFC 0.1 is better than all classes", "PFC 0.1", "all classes", "test rank-1"),
        Claim("PFC 0.3 is better than all classes", "PFC 0.3", "all classes", "test rank-1"),
    ],
)

if __name__ == "__main__":
    main(STUDY)
