"""Downloads are whole and right, or one line says why not. The hub is a server on 127.0.0.1 with bad habits."""

import hashlib
import io
import re
import tarfile
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_prepare_data import as_ids, failure, stories, tokens, write

import prepare_data
from prepare_data import SEPARATOR, main

pytestmark = pytest.mark.usefixtures("elsewhere")
TINY = ["tinystories", "--out", "o", "--tokenizer", "bytes"]
OWT = ["openwebtext", *TINY[1:]]


class Hub(BaseHTTPRequestHandler):
    """A small hub: /datasets/... redirects, with size and sha256, to /cdn/..., where Range is honoured."""

    def do_GET(self):
        self.server.asked.append((self.path, self.headers["Range"]))
        habit, n = self.server.habit, sum("/cdn/" in path for path, _ in self.server.asked)
        data = self.server.files.get(self.path.partition("datasets/")[2])
        if data is None:
            return self.answer(404)
        if not self.path.startswith("/cdn/"):
            headers = {"X-Linked-Size": len(data), "X-Linked-ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
            return self.answer(302, Location="/cdn" + self.path, **(headers if habit != "portal" else {}))
        if habit[:3].isdigit():  # "503 3600": with the header Retry-After
            code, _, after = habit.partition(" ")
            return self.answer(int(code), **{"Retry-After": after})
        if habit == "hang":
            return time.sleep(0.5)
        if habit in ("web page", "portal"):
            return self.answer(200, b"<!DOCTYPE html><p>please log in</p>", None if habit == "portal" else 0)
        if habit == "wrong bytes":
            data = data[:-1] + b"?"
        begin, end, status = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1]), len(data), 206
        if begin >= len(data):
            return self.answer(416)
        if habit == "drip":  # four requests without a new byte, one with some
            end = begin + 300 * (n % 5 == 0)
        if habit == "no range":  # and cut again and again
            begin, end, status = 0, 500 + 500 * (n % 2), 200 if n < 50 else 404
        self.answer(status, data[begin:end], len(data) - begin)

    def answer(self, status, body=b"", length=0, **headers):
        self.send_response(status)
        if length is not None:
            headers["Content-Length"] = length or len(body)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        with suppress(OSError):  # the client may have seen enough
            self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    """The server, with TinyStories: what it does is its habit, what it was asked in asked, and pauses in waited."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.habit, server.asked, server.waited = "", [], []
        server.files = {prepare_data.TINYSTORIES.format(split).removeprefix("datasets/"):
                        f"\n{SEPARATOR}\n".join(stories(n, seed=n)).encode()
                        for split, n in (("train", 200), ("valid", 20))}
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/mirror/")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(prepare_data, "time", SimpleNamespace(sleep=server.waited.append))
        monkeypatch.setattr(prepare_data.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1e12))
        yield server
        server.shutdown()


def test_tinystories_comes_from_the_pinned_commit(hub, capsys):
    """Its files become the two splits, and are not asked for again; what is no UTF-8 becomes a replacement sign."""
    hub.files = {name: data + b" \xff\0" for name, data in hub.files.items()}
    assert main(TINY) == 0 and "o will take about 5 GB, downloads included, and 1000" in capsys.readouterr().out
    for split, n in (("train", 200), ("val", 20)):
        assert tokens("o", split) == as_ids(*stories(n, seed=n))[:-1] + as_ids(" \ufffd\0"), split
    pinned = "/mirror/datasets/roneneldan/TinyStories/resolve/f54c09fd23315a6f9c86f9dc80f725de7d8f9c64/TinyStoriesV2-"
    assert [path for path, _ in hub.asked if "/cdn/" not in path] == [
        f"{pinned}GPT4-train.txt", f"{pinned}GPT4-valid.txt"], hub.asked
    asked = len(hub.asked)
    assert main([*TINY, "--max-tokens", "10000", "--overwrite"]) == 0 and len(hub.asked) == asked
    assert 0 < len(tokens("o", "train")) <= 9000 and 0 < len(tokens("o", "val")) <= 1000


def test_a_download_goes_on_as_long_as_new_bytes_come(hub, capsys):
    """Five requests in a row without new bytes end it; many more failures, of which every fifth brings some, do not."""
    hub.habit = "no range"
    assert "cut after 500 of" in failure(capsys, *TINY) and len(hub.asked) == 2 * 6, len(hub.asked)
    hub.habit = "drip"
    assert main(TINY) == 0 and tokens("o", "train") == as_ids(*stories(200, seed=200))
    assert len(hub.asked) > 100, f"only {len(hub.asked)} requests: this test shows nothing"


@pytest.mark.parametrize("habit, words, waits", [
    ("500", "HTTP Error 500", [0.5, 1, 2, 4]), ("hang", "timed out", [0.5, 1, 2, 4]),
    ("429 7", "HTTP Error 429", [7] * 4), ("503 3600", "HTTP Error 503", [60] * 4),
    ("503 Wed, 21 Oct 2026 07:28:00 GMT", "HTTP Error 503", [60] * 4), ("web page", "web page", [0.5, 1, 2, 4]),
    ("portal", "web page", [0.5, 1, 2, 4]),  # it says no size at all
    ("wrong bytes", "sha256", []), ("401", "get the file yourself", []), ("404", "edit its commit", []),
])
def test_a_bad_server_is_one_line_and_the_next_run_does(hub, capsys, monkeypatch, habit, words, waits):
    """No wrong file takes its final name, what came before stays; 429 and 503 wait as they say, a minute at most."""
    hub.habit = habit
    part = Path(write("o/downloads/f54c09fd-TinyStoriesV2-GPT4-train.txt.part", stories(200, seed=200)[0][:9]))
    with monkeypatch.context() as patch:
        patch.setattr(prepare_data, "TIMEOUT", 0.1 if habit == "hang" else 10)
        line = failure(capsys, *TINY)
    assert words in line and hub.waited == waits and len(hub.asked) == 2 + 2 * len(waits), (line, hub.waited)
    left = {path.name: path.stat().st_size for path in Path("o").rglob("*") if path.is_file()}
    assert left == ({} if habit == "wrong bytes" else {part.name: 9}), left
    hub.habit = ""
    assert main(TINY) == 0 and tokens("o", "train") == as_ids(*stories(200, seed=200)), "the next run must do"


@pytest.mark.parametrize("argv, need", [(TINY, 5), ([*OWT, "--subsets", "1"], 50 / 21)])
def test_too_little_disk_is_one_line_before_the_download(hub, capsys, monkeypatch, argv, need):
    """What a whole source takes, and what is free. A download that was begun goes on: its files are not free."""
    monkeypatch.setattr(prepare_data.shutil, "disk_usage", lambda folder: SimpleNamespace(free=0.99e9 * need))
    line = failure(capsys, *argv)
    assert f"about {need:.0f} GB, downloads included, and {0.99 * need:.0f} GB are free; make room" in line, line
    write("o/downloads/begun.part", "")
    hub.files.clear()
    assert not hub.asked and "404" in failure(capsys, *argv)


def test_a_killed_download_goes_on_where_it_stopped(hub):
    """Only the rest of what a kill left is asked for. A part that is too long, as two processes leave it, goes."""
    name, whole = next(item for item in hub.files.items() if item[0].endswith("train.txt"))
    path = Path("o/downloads/f54c09fd-TinyStoriesV2-GPT4-train.txt")
    for have in (1, 1000, len(whole), len(whole) + 1):
        path.unlink(missing_ok=True)
        hub.asked.clear()
        write(f"{path}.part", (whole + b"x")[:have])
        assert main([*TINY, "--overwrite"]) == 0
        ranges = [asked for asked_for, asked in hub.asked if asked_for == f"/cdn/mirror/datasets/{name}"]
        assert ranges == [f"bytes={have - 1}-"] + ["bytes=0-"] * (have > len(whole)), ranges
        assert path.read_bytes() == whole


def tar(*members, mode="w"):
    """A tar file of (name, bytes), or of (name, None) for a symbolic link."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.type = len(data or b""), tarfile.REGTYPE if data is not None else tarfile.SYMTYPE
            archive.addfile(info, io.BytesIO(data or b""))
    return file.getvalue()


def test_openwebtext_is_read_from_archives_in_archives(hub):
    """Documents come in order, names are not paths, links are passed over, and only needed subsets are fetched."""
    for s in range(21):
        inner = [tar((f"../../{i}.txt", f"\n\n {s}{i}\n\n\n\nzwei ".encode() + b"\xff\n"), ("link.txt", None),
                     (f"{'x' * 150}.txt", b"last"), ("note.md", b"no text"), mode="w:xz") for i in range(2)]
        hub.files[prepare_data.OPENWEBTEXT.format(s).removeprefix("datasets/")] = tar(
            ("a.xz", inner[0]), ("link.xz", None), ("../b.xz", inner[1]), ("c.md", b"x"))
    before = sorted(Path().iterdir())
    for n, argv in ((2, ["--subsets", "2"]), (21, ["--overwrite"])):
        assert main([*OWT, *argv]) == 0
        texts = [text for s in range(n) for i in range(2) for text in (f"{s}{i}\n\nzwei \ufffd", "last")]
        assert tokens("o") == as_ids(*texts), f"{len(tokens('o'))} tokens instead of {len(as_ids(*texts))}"
        assert sum("/cdn/" in path for path, _ in hub.asked) == n, hub.asked
    assert all("f3808c30e817981b845ec549c43e82bb467d8144/subsets/" in path for path, _ in hub.asked), hub.asked
    assert sorted(Path().iterdir()) == [*before, Path("o")]


@pytest.mark.parametrize("archive", [b"no tar" * 100, tar(("a.xz", tar(("a.txt", b"text " * 99), mode="w:xz")[:-40]))],
                         ids=["no tar", "cut xz"])
def test_a_damaged_archive_is_one_line(hub, capsys, archive):
    """What is no archive or is cut is one line and exit 1, and leaves only the download behind."""
    hub.files[prepare_data.OPENWEBTEXT.format(0).removeprefix("datasets/")] = archive
    assert "damaged" in failure(capsys, *OWT, "--subsets", "1")
    assert [path.name for path in Path("o").iterdir()] == ["downloads"]
