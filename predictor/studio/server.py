"""The server of the studio: its own folder, its limits, and its end.

Knows processes, ports and files; nothing of what the page shows. It listens on this machine alone
unless it is told otherwise, serves only files of its own folder, which it removes at its end, and
asks nothing of the network.
"""

import os
import shutil
import socket
import sys
import tempfile
import threading
import webbrowser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from targetclip.command import say
from targetclip.media.images import MAX_FILE_BYTES
from targetclip.world import DEFAULT_WORLD, World

MAX_WAITING = 100  # visitors' requests
SESSIONS = 200  # whose results are kept at once
INSTALL = "pip install 'targetclip[studio]', or from a clone: pip install -e '.[studio]'"
TARGETS = ("joker", "star", "professor", "sailor", "rocker", "captain", "poet", "gamer", "king")
SOURCES = ("ada", "bruno", "chen", "dora")


def example_pictures(names: Sequence[str], into: Path) -> list[Path]:
    """Copy example pictures into a folder that is served, and return them: those of an installed
    package or of a clone. None where there are neither."""
    package = Path(__file__).parent
    folders = (package / "examples", package.parents[1] / "examples")
    paths = [folder / f"{name}.png" for folder in folders for name in names]
    return [Path(shutil.copy(path, into)) for path in paths if path.is_file()]


def check_port(host: str, port: int) -> None:
    """Raise a ValueError for a host and port that nothing can listen on."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise ValueError(
            f"--host {host} --port {port}: expected an address to listen on, found "
            f"{error.strerror or error}: choose another port"
        ) from error


@contextmanager
def own_folder() -> Iterator[Path]:
    """Make a folder for uploads and results, tell Gradio of it, and remove it at the end."""
    folder = Path(tempfile.mkdtemp(prefix="targetclip-studio-"))
    before = {
        name: os.environ.get(name) for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED")
    }
    os.environ |= {"GRADIO_TEMP_DIR": str(folder), "GRADIO_ANALYTICS_ENABLED": "False"}
    try:
        yield folder
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        shutil.rmtree(folder, ignore_errors=True)


def has_browser() -> bool:
    """Tell whether a browser can open a window here; one in the terminal would take it over."""
    if sys.platform.startswith("linux") and not (
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    ):
        return False
    try:
        webbrowser.get()
    except webbrowser.Error:
        return False
    return True


@contextmanager
def serving(
    worlds: Sequence[World],
    host: str = "127.0.0.1",
    port: int = 7860,
    device: str | None = None,
    mapper: Path | None = None,
) -> Iterator[str]:
    """Serve the studio within the block; the value is its address.

    Args:
        worlds: to choose from, the first by default.
        port: 0: any that is free.
        mapper: of the first world, in the place of its own.

    Raises:
        FileNotFoundError, ValueError: Gradio is not installed; the address is taken; two worlds of
            one name; the first one cannot be loaded.
    """
    check_port(host, port)
    if len({world.name for world in worlds}) < len(worlds):
        names = ", ".join(world.name for world in worlds)
        raise ValueError(f"--world: expected worlds of different names, found {names}")
    with own_folder() as folder:
        try:
            from predictor.studio.page import CSS, Page, Worlds
        except ImportError as error:
            raise ValueError(f"the studio needs Gradio ({error}): {INSTALL}") from error
        bundled = any(world.name == DEFAULT_WORLD for world in worlds)
        page = Page(
            Worlds({world.name: world for world in worlds}, device, mapper),
            folder,
            example_pictures(TARGETS, folder) if bundled else (),
            example_pictures(SOURCES, folder) if bundled else (),
        )
        page.blocks.queue(max_size=MAX_WAITING)
        _, address, _ = page.blocks.launch(
            server_name=host,
            server_port=port or None,
            prevent_thread_lock=True,
            share=False,
            ssr_mode=False,
            run_history=False,
            quiet=True,
            max_file_size=MAX_FILE_BYTES,
            state_session_capacity=SESSIONS,
            footer_links=["api"],
            css=CSS,
        )
        try:
            yield address
        finally:
            page.blocks.close(verbose=False)


def serve(
    worlds: Sequence[World],
    host: str,
    port: int,
    device: str | None,
    mapper: Path | None,
    opens_browser: bool,
) -> None:
    """Serve the studio until Ctrl-C; raises as `serving`."""
    with serving(worlds, host, port, device, mapper) as address:
        say(f"the studio is at {address} (Ctrl-C ends it)")
        if opens_browser and has_browser():
            webbrowser.open(address)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            say("the studio has ended; what it kept for its visitors is removed", error=True)
