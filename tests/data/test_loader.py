from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import number_of, picture

from partialfc.core.errors import InputError, JobError
from partialfc.data.images import encode_png
from partialfc.data.loader import Batch, Loader, sample_index
from partialfc.data.sources import open_source
from partialfc.data.sources.base import Sample, read_image

Numbered = Callable[..., Path]


class Pictures:
    """A source of numbered pictures, `each` per identity, with every fault that a source can have."""

    format, identities = "pictures", None
    path = Path("pictures")

    def __init__(self, images: int, each: int = 2, broken: tuple[int, ...] = (), size: int = 8) -> None:
        self.images, self.each, self.broken, self.size = images, each, broken, size
        self.num_classes = -(-images // each)
        self.other_label: dict[int, int] = {}
        self.other_size: dict[int, int] = {}
        self.deadly: tuple[int, ...] = ()

    def __len__(self) -> int:
        return self.images

    def name(self, index: int) -> str:
        return f"picture {index}"

    def read(self, index: int) -> Sample:
        if index in self.deadly and torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        size = self.other_size.get(index, self.size)
        encoded = b"broken" if index in self.broken else encode_png(picture(index, size))
        return Sample(encoded, self.other_label.get(index, index // self.each), self.name(index))


def loader(source: Any, **changes: Any) -> Loader:
    return Loader(source, **{"global_batch_size": 8, "micro_batch_size": 8, "seed": 1, **changes})


def numbers(batches: Iterator[Batch]) -> list[int]:
    return [number_of(image) for batch in batches for image in batch.images.numpy()]


class TestSampleIndex:
    @given(st.integers(1, 60), st.integers(0, 5), st.integers(0, 1 << 40))
    @settings(max_examples=60, deadline=None)
    def test_each_epoch_is_a_permutation(self, images: int, epoch: int, seed: int) -> None:
        positions = torch.arange(epoch * images, (epoch + 1) * images)
        assert sample_index(positions, images, seed).sort().values.tolist() == list(range(images))

    def test_it_is_a_function_of_seed_and_position(self) -> None:
        positions = torch.arange(95, 310)
        whole = sample_index(torch.arange(400), 100, 1)
        assert torch.equal(sample_index(positions, 100, 1), whole[95:310])
        assert torch.equal(sample_index(positions.flip(0), 100, 1), whole[95:310].flip(0))
        assert not torch.equal(sample_index(positions, 100, 2), whole[95:310])
        assert not torch.equal(whole[:100], whole[100:200])

    def test_it_is_not_the_order_of_storage(self) -> None:
        """Neighbours in an epoch are far apart in the data: a batch is no run of one identity's images."""
        indices = sample_index(torch.arange(10_000), 10_000, 1)
        assert 3000 < (indices[1:] - indices[:-1]).abs().double().mean() < 3700

    def test_huge_sets(self) -> None:
        indices = sample_index(torch.arange(5_000), 42_474_557, 1)
        assert len(indices.unique()) == 5_000
        assert 0 <= int(indices.min()) < int(indices.max()) < 42_474_557


class TestBatches:
    def test_each_image_once_an_epoch_and_no_partial_batch(self) -> None:
        whole = loader(Pictures(30))
        batches = list(whole.batches(0, 15))
        assert [len(batch.images) for batch in batches] == [8] * 15
        seen = numbers(iter(batches))
        assert len(seen) == 120
        for epoch in range(4):
            assert sorted(seen[epoch * 30 : (epoch + 1) * 30]) == list(range(30))
        assert whole.steps_per_epoch == 3.75
        assert len(whole) == 30

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_batches_are_page_locked_beside_a_gpu(self) -> None:
        (batch,) = loader(Pictures(30)).batches(5, 6)
        assert all(part.is_pinned() for part in (batch.images, batch.labels, batch.positions))

    def test_fields(self) -> None:
        (batch,) = loader(Pictures(30)).batches(5, 6)
        assert (batch.images.dtype, batch.images.shape) == (torch.uint8, (8, 8, 8, 3))
        assert (batch.labels.dtype, batch.positions.dtype) == (torch.int64, torch.int64)
        assert batch.positions.tolist() == list(range(40, 48))
        assert batch.labels.tolist() == [number_of(image) // 2 for image in batch.images.numpy()]
        assert (batch.step, batch.micro_step, batch.unreadable) == (5, 0, {})

    @given(st.integers(1, 40), st.integers(1, 23), st.integers(1, 5), st.integers(1, 7), st.integers(0, 9))
    @settings(max_examples=40, deadline=None)
    def test_ranks_share_the_stream(self, images: int, global_size: int, world: int, micro: int, step: int) -> None:
        source = Pictures(images)
        sizes = {"global_batch_size": global_size, "micro_batch_size": micro}
        (one,) = loader(source, global_batch_size=global_size, micro_batch_size=global_size).batches(step, step + 1)
        ranks = [loader(source, **sizes, rank=rank, world_size=world) for rank in range(world)]
        assert len({rank.micro_steps for rank in ranks}) == 1
        parts = [list(rank.batches(step, step + 1)) for rank in ranks]
        assert all(len(part) == ranks[0].micro_steps for part in parts)
        every = [batch for micro_step in zip(*parts, strict=True) for batch in micro_step]
        assert max(len(batch.labels) for batch in every) <= micro
        for field in ("images", "labels", "positions"):
            assert torch.equal(torch.cat([getattr(batch, field) for batch in every]), getattr(one, field))

    @given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 6))
    @settings(max_examples=30, deadline=None)
    def test_the_counts_of_all_ranks_are_known(self, global_size: int, world: int, micro: int) -> None:
        sizes: dict[str, Any] = {
            "global_batch_size": global_size,
            "micro_batch_size": global_size,
            "micro_steps": micro,
        }
        ranks = [loader(Pictures(12), rank=rank, world_size=world, **sizes) for rank in range(world)]
        steps = [list(each.batches(3, 4)) for each in ranks]
        for number in range(micro):
            assert ranks[0].counts(number) == [len(batches[number].labels) for batches in steps]

    @pytest.mark.parametrize("world", [1, 2, 3, 4])
    def test_a_micro_step_has_the_same_images_at_any_world_size(self, world: int) -> None:
        sizes = {"global_batch_size": 11, "micro_batch_size": 6, "micro_steps": 3}
        ranks = [list(loader(Pictures(30), **sizes, rank=r, world_size=world).batches(2, 3)) for r in range(world)]
        positions = [torch.cat([batch.positions for batch in parts]).tolist() for parts in zip(*ranks, strict=True)]
        assert positions == [list(range(22, 25)), list(range(25, 29)), list(range(29, 33))]

    def test_too_few_micro_steps_are_refused(self) -> None:
        with pytest.raises(InputError, match=r"micro_steps is 1, too few for 8 images on 2 processes.*2 micro-steps"):
            loader(Pictures(30), micro_batch_size=3, micro_steps=1, world_size=2)

    def test_any_step_can_be_the_first(self) -> None:
        source = Pictures(30)
        whole = list(loader(source, micro_batch_size=3).batches(0, 8))
        rest = list(loader(source, micro_batch_size=3).batches(5, 8))
        assert [(batch.step, batch.micro_step) for batch in rest] == [(s, m) for s in (5, 6, 7) for m in range(3)]
        for one, other in zip(whole[15:], rest, strict=True):
            assert torch.equal(one.images, other.images)
            assert torch.equal(one.positions, other.positions)

    def test_nothing_to_do(self) -> None:
        assert list(loader(Pictures(3)).batches(4, 4)) == []

    @pytest.mark.parametrize("layout", ["with_header", "im2rec", "unpacked"])
    def test_real_files(self, layout: str, request: pytest.FixtureRequest) -> None:
        source = open_source(request.getfixturevalue(layout))
        (batch,) = loader(source, global_batch_size=48, micro_batch_size=48).batches(0, 1)
        assert batch.labels.bincount().tolist() == [6] * 8
        index = int(sample_index(torch.tensor([17]), 48, 1))
        sample, image = read_image(source, index)
        assert int(batch.labels[17]) == sample.label
        assert torch.equal(batch.images[17], torch.from_numpy(image))

    def test_swapped_channels_are_swapped_back(self) -> None:
        source = Pictures(30)
        (rgb,) = loader(source).batches(0, 1)
        (bgr,) = loader(source, color_order="bgr").batches(0, 1)
        assert torch.equal(bgr.images, rgb.images.flip(-1))
        with pytest.raises(InputError, match="choose rgb or bgr"):
            loader(source, color_order="rbg")


@pytest.mark.multiprocess
class TestWorkers:
    @pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
    @pytest.mark.parametrize("workers", [1, 3])
    def test_the_same_as_without(self, workers: int, numbered: Numbered) -> None:
        source = open_source(numbered(30, broken=(4,)))
        alone = loader(source, micro_batch_size=3)
        helped = loader(source, micro_batch_size=3, workers=workers)
        for one, other in zip(alone.batches(2, 7), helped.batches(2, 7), strict=True):
            assert torch.equal(one.images, other.images)
            assert torch.equal(one.labels, other.labels)
            assert (one.step, one.micro_step, one.unreadable) == (other.step, other.micro_step, other.unreadable)
        assert alone.unreadable == helped.unreadable != {}

    @pytest.mark.filterwarnings("ignore:This DataLoader will create")
    @pytest.mark.parametrize("workers", [1, 3])
    def test_batches_stay_as_they_were_while_later_ones_are_read(self, workers: int) -> None:
        alone, helped = (list(loader(Pictures(30), workers=count).batches(0, 40)) for count in (0, workers))
        assert all(torch.equal(one.images, other.images) for one, other in zip(alone, helped, strict=True))

    @pytest.mark.parametrize("workers", [0, 1])
    def test_no_global_generator_moves(self, workers: int) -> None:
        before = torch.get_rng_state()
        list(loader(Pictures(30, broken=(3,)), workers=workers).batches(0, 3))
        assert torch.equal(torch.get_rng_state(), before)

    def test_a_mistake_in_a_worker_has_the_same_message(self) -> None:
        source = Pictures(30)
        source.other_label = {7: 99}
        with pytest.raises(InputError, match=r"^The label of picture 7 is 99, outside the range \[0, 15\)"):
            list(loader(source, workers=1).batches(0, 4))

    @pytest.mark.slow  # torch looks for dead workers every five seconds
    def test_a_dead_worker_is_a_failed_job(self) -> None:
        source = Pictures(30)
        source.deadly = (int(sample_index(torch.tensor([20]), 30, 1)),)
        handler = signal.getsignal(signal.SIGCHLD)
        with pytest.raises(JobError, match=r"data died \(worker 0, pid \d+, exit status -9\)"):
            list(loader(source, workers=1).batches(0, 4))
        assert signal.getsignal(signal.SIGCHLD) == handler

    def test_another_thread_may_read(self) -> None:
        seen: list[int] = []
        thread = threading.Thread(target=lambda: seen.extend(numbers(loader(Pictures(8), workers=1).batches(0, 1))))
        thread.start()
        thread.join()
        assert sorted(seen) == list(range(8))

    def test_other_failures_keep_their_traceback(self, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = loader(Pictures(30))
        monkeypatch.setattr(Pictures, "read", lambda self, index: [][index])
        with pytest.raises(IndexError):
            list(whole.batches(0, 1))
        monkeypatch.setattr(Pictures, "read", lambda self, index: index.missing)
        with pytest.raises(AttributeError):
            list(whole.batches(0, 1))


class TestUnreadable:
    def test_they_are_named_counted_and_replaced(self) -> None:
        whole = loader(Pictures(30, broken=(4, 9)))
        batches = list(whole.batches(0, 15))
        assert sorted(whole.unreadable) == ["picture 4", "picture 9"]
        assert whole.unreadable["picture 4"] == "picture 4: no image that Pillow knows"
        assert sum(len(batch.unreadable) for batch in batches) >= 8
        assert [len(batch.labels) for batch in batches] == [8] * 15
        seen = numbers(iter(batches))
        assert not {4, 9} & set(seen)
        labels = torch.cat([batch.labels for batch in batches]).tolist()
        assert labels == [number // 2 for number in seen]

    def test_the_same_replacement_at_any_world_size(self) -> None:
        source = Pictures(12, broken=(0, 3, 5, 7))
        alone = numbers(loader(source).batches(0, 6))
        for world in (2, 3):
            parts = [list(loader(source, rank=rank, world_size=world).batches(0, 6)) for rank in range(world)]
            together = [batch for step in range(6) for part in parts for batch in part if batch.step == step]
            assert numbers(iter(together)) == alone

    def test_replacements_differ(self) -> None:
        """One image does not stand in for all that are lost."""
        good = {1, 8, 20, 33, 47}
        whole = loader(Pictures(50, broken=tuple(set(range(50)) - good)), max_unreadable=50)
        assert set(numbers(whole.batches(0, 7))) == good

    def test_the_cap(self) -> None:
        source = Pictures(30, broken=(1, 2, 3))
        whole = loader(source, max_unreadable=2)
        with pytest.raises(
            InputError, match=r"3 records cannot be read, more than the 2 allowed .* picture [123]: no im"
        ):
            list(whole.batches(0, 4))
        list(loader(source, max_unreadable=3).batches(0, 4))

    def test_one_record_met_often_counts_once(self) -> None:
        whole = loader(Pictures(5, broken=(3,)), max_unreadable=1)
        list(whole.batches(0, 10))
        assert list(whole.unreadable) == ["picture 3"]

    def test_the_default_cap(self) -> None:
        assert loader(Pictures(100)).max_unreadable == 10
        assert loader(Pictures(50_000)).max_unreadable == 50

    def test_nothing_readable(self) -> None:
        with pytest.raises(InputError, match="None of the 3 images of pictures"):
            loader(Pictures(3, broken=(0, 1, 2)))

    def test_nothing_readable_any_more(self) -> None:
        source = Pictures(3)
        whole = loader(source)
        source.broken = (0, 1, 2)
        with pytest.raises(InputError, match="1000 records drawn in a row"):
            list(whole.batches(0, 1))


class TestWrongInput:
    @pytest.mark.parametrize("label", [-1, 15])
    def test_a_label_outside_the_range(self, label: int) -> None:
        source = Pictures(30)
        source.other_label = {12: label}
        with pytest.raises(InputError, match=rf"picture 12 is {label}, outside the range \[0, 15\)"):
            list(loader(source).batches(0, 4))

    def test_the_source_says_the_number_of_classes(self) -> None:
        source = Pictures(30)
        source.num_classes = 14
        with pytest.raises(InputError, match=r"picture 28 is 14, outside the range \[0, 14\)"):
            loader(source)
        source.num_classes = 16
        assert loader(source).num_classes == 16

    def test_an_image_of_another_size(self) -> None:
        source = Pictures(100)
        source.other_size = {13: 9}  # not among those that are looked at before
        with pytest.raises(InputError, match="picture 13 is 9 x 9 and not 8 x 8 like the others"):
            list(loader(source).batches(0, 13))

    @pytest.mark.parametrize("odd", [0, 7])
    def test_the_odd_image_is_named_and_not_the_others(self, odd: int) -> None:
        source = Pictures(16)
        source.other_size = {odd: 16}
        message = rf"picture {odd} is 16 x 16, but 15 of the 16 images looked at are 8 x 8: align all"
        with pytest.raises(InputError, match=message):
            loader(source)

    def test_images_that_are_not_square(self, tmp_path: Path) -> None:
        (tmp_path / "identity").mkdir()
        (tmp_path / "identity" / "a.png").write_bytes(encode_png(picture(0, 8)[:5]))
        with pytest.raises(InputError, match=r"a\.png is 8 x 5, but images must be square"):
            loader(open_source(tmp_path))

    @pytest.mark.parametrize("option", ["global_batch_size", "micro_batch_size", "workers"])
    def test_impossible_numbers(self, option: str) -> None:
        with pytest.raises(InputError, match=f"{option} is -1"):
            loader(Pictures(3), **{option: -1})

    def test_the_size_is_found_behind_damaged_records(self) -> None:
        whole = loader(Pictures(30, broken=(0, 1)))
        assert whole.image_size == 8
        whole = loader(Pictures(100, broken=tuple(set(range(100)) - {5})), max_unreadable=5)
        assert whole.image_size == 8
        assert sorted(whole.unreadable) == [f"picture {number}" for number in range(5)]
