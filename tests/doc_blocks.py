"""Code blocks and commands of the README and of the pages in docs, as the tests see them.

A bash block is run, or at least parsed. A line `<!-- parsed only: REASON -->` before a block says
that it cannot be run here.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md")))
BLOCK = re.compile(
    r"(?:^<!-- parsed only: (?P<reason>.+) -->\n)?"
    r"^(?P<indent> *)```(?P<language>[^\n]*)\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
INLINE = re.compile(r"(?<!`)`((?:targetclip|python -m|accelerate launch) [^`\n]*--[^`\n]+)`(?!`)")
SETTING = re.compile(r"[A-Z_]+=\S+")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    reason: str | None
    """Why it is parsed only; None: it is run."""


def blocks_of(page: str, language: str | None = None) -> list[Block]:
    """Return the blocks of a page, or those of one language."""
    text = (ROOT / page).read_text("utf-8")
    found = [Block(m["language"].strip(), m["text"], m["reason"]) for m in BLOCK.finditer(text)]
    return [block for block in found if language in (None, block.language)]


def words_of(line: str) -> list[str]:
    """Return the words of a command without settings of the environment and the folder of the
    virtual environment."""
    words = shlex.split(line, comments=True)
    while words and SETTING.fullmatch(words[0]):
        words.pop(0)
    return [words[0].removeprefix(".venv/bin/"), *words[1:]] if words else []


def commands_of(block: Block) -> Iterator[list[str]]:
    """Return the commands of a bash block, each as its words."""
    for line in block.text.replace("\\\n", " ").splitlines():
        for command in line.split(" && "):
            if words := words_of(command):
                yield words


def inline_commands(page: str) -> list[list[str]]:
    """Return the commands with flags that stand within the text of a page."""
    text = BLOCK.sub("", (ROOT / page).read_text("utf-8"))
    return [words_of(command) for command in INLINE.findall(text)]
