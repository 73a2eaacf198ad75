"""The claims for another network: a ViT instead of the convolutional one of the other studies.

python studies/networks.py run --work runs/studies
python studies/networks.py page
"""

from __future__ import annotations

from functools import partial

import conflicts
from study import Arm, Claim, Study, main

from partialfc.backbones import BACKBONES
from partialfc.backbones.vit import ViT

PLAN = """
The paper trains CNNs and ViTs alike. Here a ViT with patches of 9 pixels as the paper's, but 128 wide
and 4 blocks deep, trains on the clean set and on the one of the study of conflicts, whose identities
are cut into three labels. The claims are those of the studies of the [rate](rates.md) and of
[conflicts](conflicts.md) on the convolutional network; "alike" means that the verdicts are the same.
"""
BACKBONES["vit_study"] = partial(ViT, (128, 4))
NETWORK = {"backbone.name": "vit_study", "optimizer.lr": 0.001}
STUDY = Study(
    name="networks",
    title="A ViT instead of a CNN",
    plan=PLAN,
    arms={
        "all classes": Arm({**NETWORK, "head.sample_rate": 1.0}),
        "PFC 0.3": Arm({**NETWORK, "head.sample_rate": 0.3}),
        "PFC 0.1": Arm(NETWORK),
        "cut, all classes": Arm({**NETWORK, "head.sample_rate": 1.0}, conflicts.CUT),
        "cut, PFC 0.1": Arm(NETWORK, conflicts.CUT),
        "cut, PFC* 0.1": Arm({**NETWORK, "head.conflict_threshold": 0.4}, conflicts.CUT),
    },
    figures={"test rank-1": "rank-1", "pairs accuracy": "accuracy of pairs"},
    claims=[
        Claim("PFC 0.3 loses less than one point", "PFC 0.3", "all classes", "test rank-1", by=-0.01),
        Claim("PFC 0.1 loses less than one point", "PFC 0.1", "all classes", "test rank-1", by=-0.01),
        Claim("PFC is better than all classes on cut identities", "cut, PFC 0.1", "cut, all classes", "test rank-1"),
        Claim("PFC* is better than PFC on cut identities", "cut, PFC* 0.1", "cut, PFC 0.1", "test rank-1"),
    ],
)

if __name__ == "__main__":
    main(STUDY)
