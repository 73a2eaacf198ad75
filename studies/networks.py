"""The claims for two networks: a ViT beside the convolutional one of the other studies.

python studies/networks.py run --work runs/studies
python studies/networks.py page
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import conflicts
from study import Arm, Claim, Study, main

from partialfc.backbones import BACKBONES
from partialfc.backbones.vit import ViT

PLAN = """
The paper trains CNNs and ViTs alike. Here the convolutional network of the other studies and a ViT with
patches of 9 pixels as the paper's, but 128 wide and 4 blocks deep and with half the learning rate, train
for as long on the clean set and on the one of the study of [conflicts](conflicts.md), whose identities
are cut into three labels. "Alike" means that the verdicts are the same.

The ViT was to be compared with the study of the [rate](rates.md) at first. Its runs are shorter and its
characters others, so the arms of the CNN were added here, after the first runs of the ViT.
"""
READING = """
With cut identities the two networks agree. On characters PFC gains 8.4 points with either, and PFC* nine
to ten more; on faces all classes are better with either, and what a threshold adds is not resolved. On
clean sets both lose with the rate, the ViT a little less. Where a verdict differs, by the CNN "not
resolvable" and by the ViT "not confirmed", the losses are alike and their spread is not.
"""
BACKBONES["vit_128x4"] = partial(ViT, (128, 4))
NETWORKS = {"CNN": {}, "ViT": {"backbone.name": "vit_128x4", "optimizer.lr": 0.001}}
CUT = conflicts.STUDY.arms
ARMS = {
    "all classes": CUT["all classes, not cut"],
    "PFC 0.3": Arm({"head.sample_rate": 0.3}),
    "PFC 0.1": CUT["PFC 0.1, not cut"],
    "cut, all classes": CUT["all classes"],
    "cut, PFC 0.1": CUT["PFC 0.1"],
    "cut, PFC* 0.1": CUT["PFC* 0.1, above 0.4"],
}


def _claims(network: str) -> list[Claim]:
    def claim(text: str, better: str, than: str, by: float = 0.0) -> Claim:
        return Claim(f"{network}: {text}", f"{network}, {better}", f"{network}, {than}", "test rank-1", by=by)

    return [
        claim("PFC 0.3 loses less than one point of rank-1", "PFC 0.3", "all classes", by=-0.01),
        claim("PFC 0.1 loses less than one point of rank-1", "PFC 0.1", "all classes", by=-0.01),
        claim("PFC is better than all classes on cut identities", "cut, PFC 0.1", "cut, all classes"),
        claim("PFC* is better than PFC on cut identities", "cut, PFC* 0.1", "cut, PFC 0.1"),
    ]


STUDY = Study(
    name="networks",
    title="A CNN and a ViT",
    plan=PLAN,
    arms={
        f"{network}, {name}": replace(arm, values={**arm.values, **values})
        for network, values in NETWORKS.items()
        for name, arm in ARMS.items()
    },
    figures={"test rank-1": "rank-1", "pairs accuracy": "accuracy of pairs"},
    reading=READING,
    claims=[claim for pair in zip(*map(_claims, NETWORKS), strict=True) for claim in pair],
)

if __name__ == "__main__":
    main(STUDY)
