"""Error against the share discarded, against a loop."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partialfc.core.errors import InputError
from partialfc.evaluation.statistics.quality import discard_curve

quality = st.integers(0, 5).map(float)


@given(pairs=st.lists(st.tuples(st.booleans(), quality, quality), min_size=1, max_size=30))
@settings(max_examples=40, deadline=None)
def test_the_curve_equals_discarding_pair_by_pair(pairs: list[tuple[bool, float, float]]) -> None:
    scores = [0.5 if matched else 0.4 for matched, *_ in pairs]
    curve = discard_curve(scores, [both for _, *both in pairs], 0.5)
    levels = sorted({min(both) for _, *both in pairs})
    for place, level in enumerate(levels):
        left = [matched for matched, *both in pairs if min(both) >= level]
        assert curve.discarded[place] == pytest.approx(1 - len(left) / len(pairs))
        assert curve.fnmr[place] == pytest.approx(1 - sum(left) / len(left))
    assert len(curve.discarded) == len(levels)
    fine = (np.arange(500) + 0.5) / 500
    for share in (1.0, 0.3):
        expected = np.mean([curve.fnmr_without(at * share) for at in fine])
        assert curve.area(share) == pytest.approx(expected, abs=0.02)


def test_a_quality_that_tells_the_misses_has_the_smaller_area() -> None:
    scores = np.repeat([0.1, 0.9], [20, 80])
    telling = discard_curve(scores, np.repeat(np.arange(100)[:, None], 2, axis=1), 0.5)
    misleading = discard_curve(scores, np.repeat(np.arange(100, 0, -1)[:, None], 2, axis=1), 0.5)
    assert telling.fnmr_without(0.2) == 0.0
    assert telling.fnmr_without(0.0) == misleading.fnmr_without(0.0) == pytest.approx(0.2)
    assert telling.area(0.2) < 0.2 < misleading.area(0.2)


def test_wrong_input_is_refused() -> None:
    with pytest.raises(InputError, match="two for each of 1 pairs"):
        discard_curve([0.5], [1.0], 0.1)
    with pytest.raises(InputError, match="NaN"):
        discard_curve([0.5], [[1.0, np.nan]], 0.1)
