"""Documents are wrapped, and the code and its documents use the field's words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from markdown_blocks import DOCUMENTS, ROOT

COLUMNS = 100
SOURCES = sorted(ROOT.glob("src/**/*.py"))
PROSE = [path for path in DOCUMENTS if path.is_relative_to(ROOT / "docs") or path.parent == ROOT]

# Identifiers and file names that have a standard name.
IDENTIFIERS = re.findall(
    r"\S+",
    """
    Liveness Sign Card Everyone RowGradients Loan CatchUp Peer.came Peer.sign
    silence_seconds takes_padding in_threads choose_path sum_by_row take_in _on_their_way bring_up
    alone_if compiled_for _pass_of_nothing settle_exchange waits_in_every_pass hold_frozen evaluation_owed
    _exchange_news nothing_to_save is_split own_part part_like self.leads dice as_dense bf16 fp16
    liveness meeting judge row_gradients catch_up softmax_chunked softmax_cpu softmax_triton kernels_cpu kernels_triton
    face_model face_draws face_settings checkpoint_io metrics_log
""",
)
OF_THE_PUBLISHED_CODE = [ROOT / "src/partialfc/config/published.py", ROOT / "docs/migrate.md"]  # they name its settings
# Uses in the code of names that are ordinary words elsewhere.
CODE = """
    def settle(  .settle(  def look(  .look(  .lend(  def over(  .over(  link.step  link:  .pull  def forget(
    everyone:  everyone=  everyone.  nowhere:  nowhere=  def news(  news()  report.course  report.facts
    def verdict(  class Path  softmax.Path
""".splitlines()
CODE = [use.strip() for line in CODE for use in line.split("  ") if use.strip()]
PHRASES = """
    sign of life
    signs of life
    give a sign
    gives a sign
    whoever
    is told
    are told
    gets on
    not get on
    to blame
    make up for
    makes up for
    made up for
    in vain
    one after the other
    the endless order
    endless order
    a word of their own
    what a network eats
    that nobody waits for
    where and how rows
    which the device knows alone
    only the first keeps anything
    nothing if they agree
    takes its parts
    nothing of its own to tell
    asks for the end
    was put off
    they draw from its number
""".strip().splitlines()


def _here(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", DOCUMENTS, ids=_here)
def test_markdown_is_wrapped(path: Path) -> None:
    long = [
        f"{number}: {line}"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > COLUMNS and not line.lstrip().startswith("|") and "](" not in line and "://" not in line
    ]
    assert long == []


@pytest.mark.parametrize("path", [*SOURCES, *PROSE], ids=_here)
def test_private_words_are_gone(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    names = [name for name in IDENTIFIERS if not (name == "fp16" and path in OF_THE_PUBLISHED_CODE)]
    found = [name for name in names if re.search(rf"\b{re.escape(name)}\b", text)]
    if path.suffix == ".py":
        found += [use for use in CODE if re.search(rf"(?<!\w){re.escape(use)}(?!\w)", text)]
    prose = " ".join(re.sub(r"^\s*#", "", line) for line in text.splitlines())
    prose = " ".join(prose.split()).lower()
    found += [phrase.strip() for phrase in PHRASES if re.search(rf"\b{re.escape(phrase.strip())}\b", prose)]
    assert found == []


def test_one_version_of_ruff() -> None:
    (pinned,) = re.findall(r"^ruff==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert f"rev: v{pinned}\n" in (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
