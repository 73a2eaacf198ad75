"""The sample rate on clean data: does a tenth of the classes in each step lose anything?

python studies/rates.py run --work runs/studies
python studies/rates.py page
"""

from __future__ import annotations

import cost
from sets import DATA, many_characters
from study import Arm, Claim, Study, main

PLAN = """
The small network trains on a clean set with all classes in each step, with a part of them, and with
the positives of the batch alone. The paper finds no loss at rates of 0.1 to 0.3, here within one
point, and a loss without negatives beyond the batch. The characters are four times as many as in the
other studies. Three epochs of them, 37 images of each, stand beside five of faces, 45 images of each;
either has about 30,000 pairs. These sets are too small for the rate to matter in time
or memory, so the last column says what a step of the head takes with a million identities, from the
study of the [cost](cost.md).

The claims on pairs were not planned: they were added when the faces had run, and when the first run on
characters had shown that their test is nearly solved.
"""
READING = """
With 14,946 characters a rate of 0.3, which leaves 4,484 classes in a step, loses less than a point of
rank-1; 0.1 and 0.05 lose one to two, and positives only four. With 3,000 faces every rate below 1 costs
more, in the order of what it leaves: 900, 300, 150, and the 128 of the batch. The two sets differ in
more than their size, so that this is a pattern and no proof of its cause. A tenth of the paper's sets is
20,000 identities and more. `train` points to the rate 1 where a set is as small as the faces here; where
a lower rate pays is a matter of [what an identity costs](cost.md).
"""
RATES = (0.3, 0.1, 0.05)
PAIRS = "pairs accuracy"
WAYS = {
    "all classes": "model parallel",
    **{f"PFC {rate}": f"Partial FC {rate}" for rate in RATES},
    "positives only": "positives only",
}
STUDY = Study(
    name="rates",
    title="The sample rate on clean data",
    plan=PLAN,
    arms={
        "all classes": Arm({"head.sample_rate": 1.0}),
        **{f"PFC {rate}": Arm({"head.sample_rate": rate}) for rate in RATES},
        "positives only": Arm({"head.sample_rate": 0.0}),
    },
    figures={"test rank-1": "rank-1", PAIRS: "accuracy of pairs"},
    epochs=5,
    beside=lambda arm: cost.cells(WAYS[arm], 1_000_000),
    data={**DATA, "characters": many_characters},
    reading=READING,
    claims=[
        *(
            Claim(
                f"PFC {rate} loses less than one point of rank-1", f"PFC {rate}", "all classes", "test rank-1", by=-0.01
            )
            for rate in RATES
        ),
        # The test of the characters is nearly solved by all classes, the pairs are not.
        *(
            Claim(
                f"PFC {rate} loses less than one point of pair accuracy", f"PFC {rate}", "all classes", PAIRS, by=-0.01
            )
            for rate in (0.3, 0.1)
        ),
        Claim("PFC 0.1 is better than positives only", "PFC 0.1", "positives only", "test rank-1"),
    ],
)

if __name__ == "__main__":
    main(STUDY)
