"""Whether head, sampler and loader are as fast as they were: the working tree compared with an earlier commit.

    python benchmarks/check.py [--base COMMIT] [--pairs 5] [--only head-100k head-1m sampler loader]

The commit, by default the parent of HEAD, is checked out into a temporary folder. Each side measures in a process of
its own, and the two take turns (A B, B A, A B, ...), so that a slow moment of the machine affects both. A figure is the
median of the ratios of the pairs. Exit status 1 if one is more than 10 % slower, and still is when measured again.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 1.10
IMAGES, IMAGE_SIZE, BATCH = 1024, 112, 128
HEADS = {"head-100k": 100_000, "head-1m": 1_000_000}
NAMES = (*HEADS, "sampler", "loader")


def head_turn(classes: int) -> Callable[[], None]:
    """One training step of the head: rate 0.1, deferred update, batch 128, D 512."""
    from partialfc import CosFace, PartialFC, RowwiseSGD

    head = PartialFC(classes, 512, sample_rate=0.1, margin=CosFace(0.4), update="deferred")
    optimizer = RowwiseSGD(head.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(0)

    def turn() -> None:
        embeddings = torch.randn(BATCH, 512, generator=generator).requires_grad_()
        labels = torch.randint(classes, (BATCH,), generator=generator)
        head(embeddings, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return turn


def sampler_turn() -> Callable[[], None]:
    """The sample of a step: 10 million classes, rate 0.1."""
    from partialfc.head.sampling import sample_classes

    classes = 10_000_000
    positives = torch.arange(0, classes, classes // BATCH)
    step = 0

    def turn() -> None:
        nonlocal step
        sample_classes(positives, num_classes=classes, sample_rate=0.1, seed=0, step=step, start=0, stop=classes)
        step += 1

    return turn


def loader_turn(path: Path) -> Callable[[], None]:
    """A batch that this process reads and decodes itself; worker processes would go on during the other side's turn."""
    from partialfc.data.loader import Loader
    from partialfc.data.sources import open_source

    loader = Loader(open_source(path), global_batch_size=BATCH, micro_batch_size=BATCH, seed=0, workers=0)
    batches = iter(loader.batches(0, 10**6))

    def turn() -> None:
        next(batches)

    return turn


def probe(name: str, source: Path, path: Path) -> None:
    """Measure on demand: for each line on standard input, run that many turns and print their median seconds."""
    import partialfc

    assert Path(partialfc.__file__).is_relative_to(source), f"{partialfc.__file__} is not below {source}"
    turn = head_turn(HEADS[name]) if name in HEADS else sampler_turn() if name == "sampler" else loader_turn(path)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            start = time.perf_counter()
            turn()
            seconds.append(time.perf_counter() - start)
        print(statistics.median(seconds), flush=True)


@dataclass(frozen=True)
class Side:
    """One side's process, which measures when asked to."""

    asked: IO[str]
    answers: IO[str]

    def median_seconds(self, turns: int) -> float:
        print(turns, file=self.asked, flush=True)
        answer = self.answers.readline()
        if not answer:
            raise SystemExit("a measuring process ended: its error stands above.")
        return float(answer)


@contextmanager
def side(name: str, tree: Path, images: Path) -> Iterator[Side]:
    """The process of a side, with the sources of `tree`."""
    command = [sys.executable, __file__, "--probe", name, str(tree / "src"), str(images)]
    environment = os.environ | {"PYTHONPATH": str(tree / "src")}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield Side(process.stdin, process.stdout)
        finally:
            process.stdin.close()


@contextmanager
def checkout(base: str, folder: Path) -> Iterator[Path]:
    """A commit in a folder of its own."""
    subprocess.run(["git", "-C", ROOT, "worktree", "add", "--quiet", "--detach", folder, base], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", folder], check=True)


def compare(name: str, base: Path, images: Path, pairs: int, turns: int) -> tuple[float, float, float]:
    """Median seconds of the base and of the working tree, and the median ratio of their pairs."""
    before: list[float] = []
    now: list[float] = []
    with side(name, base, images) as old, side(name, ROOT, images) as new:
        for process in (old, new):
            process.median_seconds(2)  # loads libraries and compiles kernels
        for pair in range(pairs):
            order = [(old, before), (new, now)]
            for measured, seconds in order if pair % 2 == 0 else reversed(order):
                seconds.append(measured.median_seconds(turns))
    ratios = [second / first for first, second in zip(before, now, strict=True)]
    return statistics.median(before), statistics.median(now), statistics.median(ratios)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="HEAD^", help="the commit to compare with")
    parser.add_argument("--pairs", type=int, default=7, help="pairs of measurements of each figure")
    parser.add_argument("--turns", type=int, default=5, help="steps, samples or batches of one measurement")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="these figures")
    parser.add_argument("--probe", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.probe:
        name, source, path = options.probe
        probe(name, Path(source), Path(path))
        return 0
    from loader import write_images

    slower = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        base = stack.enter_context(checkout(options.base, folder / "base"))
        images = folder / "train.rec"
        write_images(images, IMAGES, IMAGE_SIZE)
        print(f"{'':<12}{'base':>12}{'now':>12}{'ratio':>9}", flush=True)
        for name in options.only:
            for attempt in ("", "  measured again"):
                before, now, ratio = compare(name, base, images, options.pairs, options.turns)
                print(f"{name:<12}{1000 * before:>9.1f} ms{1000 * now:>9.1f} ms{ratio:>9.3f}{attempt}", flush=True)
                if ratio <= LIMIT:
                    break
            else:
                slower.append(name)
    print(f"slower than {LIMIT:.2f} x the base: {', '.join(slower) or 'none'}", file=sys.stderr)
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
