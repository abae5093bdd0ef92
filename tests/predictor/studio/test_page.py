"""Tests of the page as programs reach it: its call, hostile uploads and paths, many visitors."""

import io
import json
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from PIL import Image
from studio_runs import studio

from predictor.studio import server
from targetclip.media.images import MAX_FILE_BYTES


@pytest.fixture(scope="module")
def address(
    who_world: Path, reading_mapper: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    temporary = tmp_path_factory.mktemp("temporary")
    with studio(temporary, "--world", who_world, "--mapper", reading_mapper) as address:
        yield address
    assert not [*temporary.glob("targetclip-studio-*")]  # nothing of its visitors stays


def png(size: tuple[int, int] = (40, 40), mode: str = "RGB") -> bytes:
    content = io.BytesIO()
    Image.new(mode, size).save(content, "PNG")
    return content.getvalue()


def encoded(kind: str) -> bytes:
    content = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(content, kind)
    return content.getvalue()


def zipped() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("picture.png", png())
    return content.getvalue()


def declared(width: int, height: int) -> bytes:
    """Return a PNG whose header is changed to a size, with the right checksum."""
    content = bytearray(png())
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
    return bytes(content)


def changed(content: bytes, place: int) -> bytes:
    """Return a file with one byte inverted."""
    return content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :]


SCRIPT = b"<script>document.title = 'run'</script>"
BAD: dict[str, tuple[str, bytes]] = {
    "empty": ("a.png", b""),
    "text": ("a.png", b"no picture"),
    "zeros": ("a.png", bytes(1000)),
    "PNG cut short": ("a.png", png()[:60]),
    "PNG, header alone": ("a.png", png()[:33]),
    "PNG, damaged pixels": ("a.png", changed(encoded("PNG"), 200)),
    "PNG, damaged header": ("a.png", changed(png(), 20)),
    "PNG bomb": ("a.png", declared(60000, 60000)),
    "PNG of 100 megapixels": ("a.png", declared(10000, 10000)),
    "PNG of no width": ("a.png", declared(0, 40)),
    "PNG, wholly transparent": ("a.png", png(mode="RGBA")),
    "JPEG cut short": ("a.jpg", encoded("JPEG")[:700]),
    "JPEG, header alone": ("a.jpg", encoded("JPEG")[:30]),
    "GIF cut short": ("a.gif", encoded("GIF")[:60]),
    "WEBP cut short": ("a.webp", encoded("WEBP")[:60]),
    "BMP cut short": ("a.bmp", encoded("BMP")[:60]),
    "TIFF": ("a.tif", encoded("TIFF")),
    "PDF": ("a.pdf", encoded("PDF")),
    "Photoshop": ("a.psd", b"8BPS" + bytes(100)),
    "HEIC": ("a.heic", b"\0\0\0\x18ftypheic" + bytes(100)),
    "AVIF": ("a.avif", b"\0\0\0\x18ftypavif" + bytes(100)),
    "video": ("a.mp4", b"\0\0\0\x18ftypmp42" + bytes(100)),
    "SVG with a script": (
        "a.svg",
        b"<svg xmlns='http://www.w3.org/2000/svg'>" + SCRIPT + b"</svg>",
    ),
    "SVG named PNG": ("a.png", b"<svg xmlns='http://www.w3.org/2000/svg'>" + SCRIPT + b"</svg>"),
    "HTML": ("a.html", b"<html>" + SCRIPT),
    "archive": ("a.zip", zipped()),
    "program": ("a.exe", b"MZ" + bytes(200)),
    "pickle": ("a.png", b"\x80\x04cos\nsystem\n(S'touch /tmp/run'\ntR."),
    "weights": ("a.png", struct.pack("<Q", 2) + b"{}"),
    "a script for a name": ("<img src=x onerror=alert(1)>.png", b"no picture"),
    "a path for a name": ("..%2f..%2fetc%2fpasswd.png", b"no picture"),
    "a long name": ("n" * 240 + ".png", b"no picture"),
}


def sent(
    address: str, path: str, body: bytes | None = None, kind: str = "application/json"
) -> tuple[int, bytes]:
    """Return status and content of a request; with a body, of a POST."""
    try:
        with urlopen(Request(address + path, body, {"Content-Type": kind}), timeout=120) as reply:
            return reply.status, reply.read()
    except HTTPError as error:
        return error.code, error.read()


def uploaded(address: str, name: str, content: bytes) -> str:
    """Upload a file as a browser does; return its path on the server."""
    head = f'--b\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    body = head.encode() + content + b"\r\n--b--\r\n"
    status, reply = sent(address, "gradio_api/upload", body, "multipart/form-data; boundary=b")
    assert status == 200, reply
    return str(json.loads(reply)[0])


def called(address: str, target: str, source: str, strength: float = 1.0) -> tuple[str, Any]:
    """Call `transfer` with paths on the server; return the kind of its last event and the data."""
    files = [{"path": path, "meta": {"_type": "gradio.FileData"}} for path in (target, source)]
    body = json.dumps({"data": [*files, "", strength]}).encode()
    status, reply = sent(address, "gradio_api/call/transfer", body)
    if status != 200:
        return "error", reply.decode()
    _, stream = sent(address, f"gradio_api/call/transfer/{json.loads(reply)['event_id']}")
    event, data = stream.decode().strip().split("\n\n")[-1].split("\n")
    return event.removeprefix("event: "), json.loads(data.removeprefix("data: "))


@pytest.fixture(scope="module")
def good(address: str, faces: list[Path]) -> list[str]:
    """Paths on the server of a target and a source."""
    return [uploaded(address, path.name, path.read_bytes()) for path in faces[:2]]


def test_a_call_edits_a_source_and_says_how_it_went(address: str, good: list[str]) -> None:
    kind, (picture, facts) = called(address, *good)
    assert kind == "complete"
    assert {"Direction", "Transfer score", "Identity kept", "Strength"} <= {*facts}
    status, content = sent(address, f"gradio_api/file={picture['path']}")
    assert status == 200 and Image.open(io.BytesIO(content)).size == (16, 16)
    _, (unedited, _) = called(address, *good, strength=0.0)
    assert sent(address, f"gradio_api/file={unedited['path']}")[1] != content


def test_only_that_call_is_documented(address: str) -> None:
    described = json.loads(sent(address, "gradio_api/info")[1])
    assert [*described["named_endpoints"]] == ["/transfer"]
    assert not described["unnamed_endpoints"]


def test_bad_uploads_are_answered_by_one_line(address: str, good: list[str]) -> None:
    for what, (name, content) in BAD.items():
        bad = uploaded(address, name, content)
        for pair in ((bad, good[1]), (good[0], bad)):
            kind, said = called(address, *pair)
            assert kind == "error", what
            message = said["error"] if isinstance(said, dict) else said
            assert message and "\n" not in message and "<" not in message, (what, message)
            assert "/" not in message, (what, message)  # no folder of the server
    assert called(address, *good)[0] == "complete"


def test_nothing_outside_of_its_own_folder_is_read(
    address: str, good: list[str], tmp_path: Path
) -> None:
    secret = tmp_path / "secret.png"
    Image.new("RGB", (40, 40), (1, 2, 3)).save(secret)
    served = Path(good[0]).parent
    paths = (
        *(str(secret), "/etc/passwd", f"{served}/../../../../etc/passwd", "pyproject.toml"),
        *("~/.bashrc", "file:///etc/passwd", r"..\..\etc\passwd", f"{served.parent}"),
        f"{address}gradio_api/info",
    )
    for path in paths:
        for start in ("gradio_api/file=", "gradio_api/proxy=", "file=", "gradio_api/stream/"):
            status, content = sent(address, start + path)
            assert status >= 400 and b"root:" not in content, (start, path, status)
        kind, said = called(address, path, path)
        assert kind == "error" and "root:" not in str(said), path


def test_a_file_that_is_too_large_is_not_taken(address: str) -> None:
    with pytest.raises(AssertionError, match="exceeded"):
        uploaded(address, "a.png", bytes(MAX_FILE_BYTES + 1))


def test_fifty_visitors_at_once_all_get_their_own_answers(address: str, good: list[str]) -> None:
    strengths = [i / 50 for i in range(50)]
    with ThreadPoolExecutor(50) as visitors:
        answers = [*visitors.map(lambda strength: called(address, *good, strength), strengths)]
    assert [kind for kind, _ in answers] == ["complete"] * 50
    assert [data[1]["Strength"] for _, data in answers] == [f"{s:.2f}" for s in strengths]


def test_an_address_that_is_taken_is_one_line(address: str) -> None:
    port = int(address.rstrip("/").rsplit(":", 1)[1])
    with pytest.raises(ValueError, match=f"--port {port}: expected an address to listen on"):
        server.check_port("127.0.0.1", port)
    with pytest.raises(ValueError, match=r"--host nowhere\.invalid"):
        server.check_port("nowhere.invalid", 0)


@pytest.mark.skipif(sys.platform != "linux", reason="displays of other systems have no name")
def test_without_a_display_no_browser_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    assert not server.has_browser()
