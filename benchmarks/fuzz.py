"""Coverage-guided fuzzing of everything that reads data from outside: each file format, verification pairs, images.

    pip install atheris
    python benchmarks/fuzz.py [--minutes 10] [--targets tar lmdb ...]

The minutes are shared by the targets, each in a process of its own, from the real files in tests/fixtures. A damaged
file may end in an InputError or an UnreadableImage, and nothing else: no other exception, no crash, no more than 10
seconds, no more than 2 GiB. What broke that rule is kept in fuzz-findings/ for `--replay TARGET FILE`. Exit status 1 if
there is such a file.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import lzma
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image

FIXTURES = Path(__file__).parent.parent / "tests" / "fixtures"
FINDINGS = Path("fuzz-findings")
SECONDS, MEGABYTES, LARGEST = 10, 2048, 1 << 16


def open_and_read(name: str, others: str | None = None) -> Callable[[bytes], None]:
    """A target that opens the bytes as a file of this name and reads a few samples.

    With `others`, the name of a file of the fixtures' insightface/ set, that file is there too, as `train.rec`.
    """
    from partialfc.data.sources import open_source
    from partialfc.data.sources.base import read_image

    def target(data: bytes) -> None:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            path = Path(folder) / name
            path.write_bytes(data)
            if others is not None:
                (Path(folder) / others).write_bytes((FIXTURES / "insightface" / others).read_bytes())
            source = open_source(path if others is None else Path(folder))
            source.labels()
            for index in range(min(len(source), 4)):
                with contextlib.suppress(_unreadable()):
                    read_image(source, index)

    return target


def _unreadable() -> type[Exception]:
    from partialfc.data.images import UnreadableImage

    return UnreadableImage


def read_verification(name: str) -> Callable[[bytes], None]:
    from partialfc.data.pair_files import read_pairs

    def target(data: bytes) -> None:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            path = Path(folder) / name
            path.write_bytes(data)
            read_pairs(path)

    return target


def decode(data: bytes) -> None:
    from partialfc.data.images import decode_image

    decode_image(data)


def targets() -> dict[str, tuple[Callable[[], Callable[[bytes], None]], list[bytes]]]:
    """By name: what makes the target, and the files to begin with, of at most `LARGEST` bytes."""

    def files(pattern: str) -> list[bytes]:
        return [path.read_bytes()[:LARGEST] for path in sorted(FIXTURES.glob(pattern))]

    pairs = files("verification/*.bin")
    return {
        "rec": (lambda: open_and_read("train.rec"), files("*/train.rec")),
        "idx": (lambda: open_and_read("train.idx", "train.rec"), files("insightface/train.idx")),
        "tar": (lambda: open_and_read("train.tar"), files("webdataset/*.tar")),
        "parquet": (lambda: open_and_read("train.parquet"), files("parquet/*.parquet")),
        "arrow": (lambda: open_and_read("train.arrow"), files("arrow/*.arrow")),
        "lst": (lambda: open_and_read("train.lst"), files("*/train.lst")),
        "lmdb": (lambda: open_and_read("train.lmdb"), files("lmdb/*.lmdb")),
        "overlay": (lambda: open_overlay, []),
        "mixture": (lambda: open_and_read("mixture.yaml"), [b"sources: [{path: a, weight: 2}]\nidentities: merged\n"]),
        "bin": (lambda: read_verification("a.bin"), pairs),
        "xz": (lambda: read_verification("a.bin.xz"), [lzma.compress(content) for content in pairs]),
        "image": (lambda: decode, drawings()),
    }


def drawings() -> list[bytes]:
    """One small drawing in each format that Pillow is allowed to open."""
    from partialfc.data.images import FORMATS

    found = []
    for name in FORMATS:
        stream = io.BytesIO()
        Image.linear_gradient("L").resize((24, 24)).convert("RGB").save(stream, name)
        found.append(stream.getvalue())
    return found


def open_overlay(data: bytes) -> None:
    from partialfc.data.sources.overlay import read_overlay

    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = Path(folder) / "a.overlay"
        path.write_bytes(data)
        read_overlay(path)


def fuzz(name: str, seconds: int) -> None:
    """Run one target in this process until the time is over; libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["partialfc.data"]):
        make, seeds = targets()[name]
        target = make()
    from partialfc.core.errors import InputError

    def guarded(data: bytes) -> None:
        with contextlib.suppress(InputError, _unreadable()):
            target(data)

    corpus = Path(tempfile.mkdtemp())
    for number, seed in enumerate(seeds):
        (corpus / str(number)).write_bytes(seed)
    limits = [f"-timeout={SECONDS}", f"-rss_limit_mb={MEGABYTES}", f"-max_len={LARGEST}"]
    found = f"-artifact_prefix={FINDINGS}/{name}-"
    atheris.Setup([sys.argv[0], str(corpus), f"-max_total_time={seconds}", *limits, found], guarded)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--targets", nargs="+", choices=targets(), default=list(targets()), metavar="NAME")
    parser.add_argument("--seconds", type=int, help=argparse.SUPPRESS)  # of the one target of a child process
    parser.add_argument("--replay", nargs=2, metavar=("TARGET", "FILE"), help="run one file, with its traceback")
    options = parser.parse_args()
    if options.replay:
        targets()[options.replay[0]][0]()(Path(options.replay[1]).read_bytes())
        return
    FINDINGS.mkdir(exist_ok=True)
    if options.seconds is not None:
        fuzz(options.targets[0], options.seconds)
        return
    each = max(1, round(60 * options.minutes / len(options.targets)))
    broken = []
    for name in options.targets:
        command = [sys.executable, __file__, "--targets", name, "--seconds", str(each)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        runs = [line for line in done.stderr.splitlines() if line.startswith("Done ")]
        print(f"{name}: {runs[0] if runs else 'BROKEN'}", flush=True)
        if done.returncode:
            broken.append(name)
            print(done.stderr[-2000:])
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
