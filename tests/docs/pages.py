"""What the pages tell a reader to type: fenced blocks, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    str(path.relative_to(ROOT))
    for path in (
        ROOT / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
        *sorted((ROOT / "examples").rglob("*.md")),
    )
]
SHELL = ("sh", "bash")
_FENCED = re.compile(r"^( *)```(\S*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"`([^`]+)`")
_COMMENT = re.compile(r"(^|\s)#\s.*")


@dataclass(frozen=True)
class Block:
    """A fenced block: where it begins, in which language, what it says."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def commands(self) -> Iterator[Command]:
        """Commands one by one: continued lines joined, comments and empty lines left out."""
        number, begun, text = self.line, 0, ""
        for line in self.text.splitlines():
            number += 1
            begun = begun if text else number
            text += _COMMENT.sub("", line).strip()
            if text.endswith("\\"):
                text = text[:-1]
                continue
            if text:
                yield Command(self.page, begun, text)
            text = ""


@dataclass(frozen=True)
class Command:
    """One command of a page, as it is typed."""

    page: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)

    @property
    def program(self) -> str:
        return self.words[0]

    @property
    def folder(self) -> Path:
        """Where it is typed: in the repository's root, or in the example it belongs to."""
        return (ROOT / self.page).parent if self.page.startswith("examples/") else ROOT


def blocks(page: str, *languages: str) -> list[Block]:
    """Fenced blocks of a page, of these languages or of all."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = [
        Block(page, text.count("\n", 0, match.start()) + 1, match[2], match[3])
        for match in _FENCED.finditer(text)
    ]
    return [block for block in found if not languages or block.language in languages]


def commands(page: str) -> list[Command]:
    """Every command in the page's shell blocks, in order."""
    return [command for block in blocks(page, *SHELL) for command in block.commands()]


def inline(page: str) -> list[Command]:
    """Every piece of code within the text, on one line as it is typed."""
    text = (ROOT / page).read_text(encoding="utf-8")
    prose = _FENCED.sub(lambda match: "\n" * match[0].count("\n"), text)
    return [
        Command(page, prose.count("\n", 0, match.start()) + 1, " ".join(match[1].split()))
        for match in _INLINE.finditer(prose)
    ]


ALL = [command for page in PAGES for command in commands(page)]
