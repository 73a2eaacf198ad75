"""Published recipes: each builds its real network with its real class count and says what it takes."""

import pytest

from partialfc.errors import InputError
from partialfc.training.recipes import DATA_SETS, RECIPES, SCORES, describe

PUBLISHED = [name for name in RECIPES if not name.startswith("demo")]


def test_every_recipe_describes_its_real_network_and_head() -> None:
    for name in PUBLISHED:
        facts = describe(name)
        assert facts["memory"]["total"] > facts["memory"]["centers"] > 0, name
        assert facts["command"].startswith("torchrun"), name
        assert "lr" in facts["learning_rate"], name
    assert {name.rsplit("-pfc")[0].rsplit("-", 1)[0] for name in PUBLISHED} == set(DATA_SETS)
    assert set(SCORES) <= set(PUBLISHED)


def test_figures_of_one_plan() -> None:
    facts = describe("wf42m-r200")
    assert facts["score"] == "MFR-ALL 97.70, IJB-C 1e-4 97.97, 1e-5 96.93"
    assert facts["data"].startswith("WebFace42M: 2,059,906 identities")
    assert facts["memory"]["backbone_weights"] == 4 * 118_833_920
    assert facts["memory"]["centers"] == 4 * 512 * 257_489
    assert describe("wf12m-conflict-r50")["data"].startswith("WebFace12M-Conflict: 1,017,970")
    assert describe("ms1mv3-r50")["score"] == "no published figure in our records"


def test_published_settings() -> None:
    flip = RECIPES["wf12m-flip40-r50-pfcstar0.1"]()
    assert (flip.head.sample_rate, flip.head.conflict_threshold, flip.schedule.warmup_epochs) == (0.1, 0.4, 2)
    large = RECIPES["wf42m-vit_l"]()
    assert (large.data.global_batch_size, large.backbone.mask_ratio, large.backbone.checkpointing) == (24576, 0.1, True)
    huge = RECIPES["wf42m-vit_h"]()
    assert (huge.data.micro_batch_size, huge.head.sample_rate, huge.schedule.epochs) == (768, 0.5, 16)
    assert RECIPES["ms1mv2-mbf"]().schedule.epochs == 40
    assert RECIPES["ms1mv2-mbf"]().optimizer.weight_decay == 1e-4


def test_an_unknown_recipe_offers_the_nearest() -> None:
    with pytest.raises(InputError, match=r"no recipe 'wf42m-r20': choose one of demo, .* Did you mean 'wf42m-r200'"):
        describe("wf42m-r20")
