"""The code and the commands in Markdown documents."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(path for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")] if "_build" not in path.parts)

_BLOCK = re.compile(
    r"(?:<!-- (?:not run: (?P<reason>[^\n]+)|(?P<processes>\d+) process(?:es)?) -->\n)?"
    r"(?P<indent> *)```(?P<language>[a-z]+)\n(?P<code>.*?)\n(?P=indent)```",
    re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A code block.

    Attributes:
        not_run: the reason in the comment `<!-- not run: REASON -->` above it, None without one.
        processes: how many run it as a script, as in the comment `<!-- 2 processes -->` above it; 0 without one.
    """

    document: str
    language: str
    code: str
    not_run: str | None
    processes: int

    @property
    def commands(self) -> list[list[str]]:
        """The arguments of each `partialfc` command in a block of shell, `torchrun -m partialfc` included."""
        lines = self.code.replace("\\\n", " ").splitlines() if self.language == "sh" else []
        words = [shlex.split(line, comments=True) for line in lines]
        return [line[line.index("partialfc") + 1 :] for line in words if "partialfc" in line]


def blocks(path: Path) -> list[Block]:
    """The code blocks of a document, in order."""
    text = path.read_text(encoding="utf-8")
    name = str(path.relative_to(ROOT))
    return [
        Block(name, block["language"], block["code"], block["reason"], int(block["processes"] or 0))
        for block in _BLOCK.finditer(text)
    ]
