"""The `targetclip` command: transfer a target's essence, find a direction and keep it, see worlds.

Examples:

    targetclip transfer --target examples/joker.png --num-sources 6 --out out
    targetclip transfer --target t.png --sources a.png b.png --out out
    targetclip transfer --target a.png b.png --sources photos/ --out out
    targetclip transfer --target t.png --sources clip.mp4 --out out
    targetclip transfer --target t.png --strip --morph gif --out out
    targetclip optimize --target t.png --out out
    targetclip transfer --target t.png --direction out/direction.safetensors --out other
    targetclip studio
    targetclip world check ffhq1024
"""

import shlex
import sys
from functools import partial
from typing import TYPE_CHECKING

from targetclip import __version__
from targetclip.command import guarded, one_line, parse, say, signals_as_ctrl_c

if TYPE_CHECKING:
    from predictor.cli.flags import Studio

PROG = "targetclip"


def main(args: list[str] | None = None) -> None:
    """Run a command line and end the process; for exit codes see targetclip.command.

    SIGTERM and SIGHUP end a run as Ctrl-C does: the direction so far is kept.

    Args:
        args: None: those of the process.
    """
    with signals_as_ctrl_c():
        code = guarded(partial(run, sys.argv[1:] if args is None else args), PROG)
    sys.exit(code)


def run(args: list[str]) -> int:
    """Parse a command line, check it, and do what it asks; return the exit code.

    Imports come late: Ctrl-C is answered in one line from here on, and torch is imported only for a
    command line that is right.
    """
    if args == ["--version"]:
        say(f"{PROG} {__version__}")
        return 0
    if "" in args:
        raise ValueError(f"expected no empty argument, found one in {shlex.join(args)}")
    from predictor.cli.flags import Asked, Command, Studio, WorldCheck, WorldList

    asked: Asked = parse(Command, PROG, __doc__, args)
    if isinstance(asked, WorldList):
        return list_worlds()
    if isinstance(asked, WorldCheck):
        return check_world(asked.world, asked.download)
    if isinstance(asked, Studio):
        return open_studio(asked)
    from predictor.cli.options import resolve
    from predictor.cli.output import Console

    request = resolve(asked, shlex.join([PROG, *args]))
    console = Console(quiet=request.quiet, json=request.json)
    console.progress(f"loading {request.world.name}")
    from predictor.cli.commands import run as run_request

    return run_request(request, console)


def open_studio(asked: "Studio") -> int:
    """Serve the studio until Ctrl-C."""
    from predictor.cli.options import check_weights
    from targetclip.world import load_world

    check_weights("--mapper", asked.mapper, "mapper")
    worlds = [load_world(name) for name in asked.world]
    say(f"loading {worlds[0].name}", error=True)
    from predictor.studio.server import serve

    opens = not asked.no_browser
    serve(worlds, asked.host, asked.port, asked.device, asked.mapper, opens)
    return 0


def list_worlds() -> int:
    """Print a line for each bundled world; its files are looked for, not read."""
    from targetclip.world import load_world, world_names
    from targetclip.world_files import READY, state_of

    for name in world_names():
        try:
            world = load_world(name)
        except ValueError as error:  # its files have no place where there is no home folder
            say(f"{name}: {one_line(error)}")
            continue
        lacking = [f.role for f in world.files if state_of(f, hashed=False) not in READY]
        state = f"lacks {', '.join(lacking)}: targetclip world check {name}" if lacking else "ready"
        print(": ".join(text for text in (name, world.makes, state) if text))
    return 0


def check_world(name: str, download: bool) -> int:
    """Print a paragraph for each file of a world, after fetching what is missing if asked."""
    from targetclip.world import load_world
    from targetclip.world_files import check_files, fetch_missing

    world = load_world(name)
    if download:
        fetch_missing(world.files)
    lines, ready = check_files(world.files)
    print(*lines, f"{world.name}: {'ready' if ready else 'not ready'}", sep="\n")
    return 0 if ready else 1
