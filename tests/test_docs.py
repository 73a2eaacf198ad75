"""What the documents show works as it stands: code, commands, links and the names of files."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import draw_architecture
import pytest
from markdown_blocks import DOCUMENTS, ROOT, Block, blocks

from partialfc.cli import build_parser

GUIDES = [path for path in DOCUMENTS if path.is_relative_to(ROOT / "docs")]
BLOCKS = [block for path in GUIDES for block in blocks(path)]
PROGRAMS = [block for block in BLOCKS if block.language == "python" and block.not_run is None]
COMMANDS = [(block.document, command) for block in BLOCKS for command in block.commands]
# What documents name is looked for in these folders. The records of decisions have the names of their time.
PLACES = (ROOT, ROOT / "src" / "partialfc", ROOT / "src" / "partialfc" / "head", ROOT / "tests" / "training")
OF_THEIR_TIME = ("docs/decisions.md", "CHANGELOG.md")


def _name(block: Block) -> str:
    return f"{block.document}: {block.code.splitlines()[0]}"


@pytest.fixture
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_elsewhere")
@pytest.mark.parametrize("block", [block for block in PROGRAMS if not block.processes], ids=_name)
def test_python_runs(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("document")  # dataclasses look their module up
    monkeypatch.setitem(sys.modules, "document", module)
    exec(compile(block.code, block.document, "exec"), module.__dict__)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("block", [block for block in PROGRAMS if block.processes], ids=_name)
def test_scripts_run(block: Block, tmp_path: Path) -> None:
    """With torchrun; what they need beside the package is in the extra `dev`."""
    for module in re.findall(r"^from (lightning_fabric|accelerate) ", block.code, re.MULTILINE):
        pytest.importorskip(module)
    (tmp_path / "script.py").write_text(block.code, encoding="utf-8")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(block.processes)]
    done = subprocess.run([sys.executable, *launch, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("document", "command"), COMMANDS, ids=[f"{document}: {' '.join(command)}" for document, command in COMMANDS]
)
def test_a_command_has_only_options_that_exist(document: str, command: list[str]) -> None:
    options = build_parser().parse_args(command)
    assert options.run.__module__.startswith("partialfc.cli.")  # of a command, not of a group of commands


@pytest.mark.slow
@pytest.mark.usefixtures("_elsewhere")
@pytest.mark.parametrize("block", [block for block in BLOCKS if block.commands and block.not_run is None], ids=_name)
def test_commands_run(block: Block) -> None:
    for command in block.commands:
        done = subprocess.run([sys.executable, "-m", "partialfc", *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_every_block_that_is_not_run_says_why() -> None:
    assert {block.language for block in BLOCKS} <= {"python", "sh", "json", "text", "{eval-rst}", "yaml"}
    assert all(len(block.not_run.split()) > 2 for block in BLOCKS if block.not_run is not None)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), target
        if anchor:
            assert anchor in _anchors(linked), target


def _anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_named_files_exist(path: Path) -> None:
    if str(path.relative_to(ROOT)) in OF_THEIR_TIME:
        return
    named = re.findall(r"`((?:[\w.-]+/)+[\w-]+\.(?:py|md|toml|sbatch|yaml))`", path.read_text(encoding="utf-8"))
    assert [name for name in named if not any((place / name).exists() for place in PLACES)] == []


def test_the_picture_of_the_floors_is_that_of_the_contract() -> None:
    assert draw_architecture.PICTURE.read_text(encoding="utf-8") == draw_architecture.draw()
