"""The sample rate on clean data again, trained three times as long.

python studies/longer.py run --work runs/studies
python studies/longer.py page
"""

from __future__ import annotations

from sets import faces
from study import Arm, Claim, Study, main

PLAN = """
Planned after the first results of the study of the [rate](rates.md): with a tenth of the classes in
a step, a center is a negative a tenth as often, so the training may only be late. Both arms train
three times as long as there.
"""
STUDY = Study(
    name="longer",
    title="The sample rate, trained longer",
    plan=PLAN,
    arms={"all classes": Arm({"head.sample_rate": 1.0}), "PFC 0.1": Arm({"head.sample_rate": 0.1})},
    figures={"test rank-1": "rank-1", "pairs accuracy": "accuracy of pairs"},
    epochs=15,
    claims=[Claim("PFC 0.1 loses less than one point", "PFC 0.1", "all classes", "test rank-1", by=-0.01)],
    data={"faces": faces},
)

if __name__ == "__main__":
    main(STUDY)
