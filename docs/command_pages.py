"""Put what `--help` prints into docs/commands.md while the site is built, so that it cannot age.

A line `<!-- help: targetclip transfer -->` or `<!-- help: python -m data.build -->` becomes that
command's help. An mkdocs hook: mkdocs.yml names it.
"""

import os
import re
from contextlib import redirect_stdout, suppress
from importlib import import_module
from io import StringIO
from unittest.mock import patch

from mkdocs.structure.pages import Page

from targetclip.command import parse

PAGE = "commands.md"
MARK = re.compile(r"^<!-- help: (.+) -->$", re.MULTILINE)
COLUMNS = "78"  # fits the site's column
RULE = re.compile(r"^\s*[-─]+\s*\n", re.MULTILINE)


def help_of(command: str) -> str:
    """Return what a command prints for --help. ModuleNotFoundError: there is no such command."""
    words = command.split()
    if words[0] == "targetclip":
        cli = import_module("predictor.cli")
        kind, description = import_module("predictor.cli.flags").Command, cli.__doc__
        prog, args = "targetclip", [*words[1:], "--help"]
    else:
        module = import_module(words[2])
        kind, description = module.Config, module.__doc__
        prog, args = command, ["--help"]
    page = StringIO()
    with patch.dict(os.environ, COLUMNS=COLUMNS), redirect_stdout(page), suppress(SystemExit):
        parse(kind, prog, description, args)
    return RULE.sub("", page.getvalue()).rstrip()


def on_page_markdown(markdown: str, page: Page, **kwargs: object) -> str:
    """Fill in the help texts; called by mkdocs for every page."""
    if page.file.src_uri != PAGE:
        return markdown
    return MARK.sub(lambda found: f"```text\n{help_of(found[1])}\n```", markdown)
