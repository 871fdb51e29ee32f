"""Downloads: what comes from the hub is whole and right, or there is one line that says why not.

The hub is a server on 127.0.0.1 with its layout and headers, and with the bad habits a server can have.
"""

import hashlib
import io
import re
import tarfile
import threading
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
        server = self.server
        server.asked.append((self.path, self.headers["Range"]))
        habit, n = server.habit, sum("/cdn/" in path for path, _ in server.asked)
        data = server.files.get(self.path.partition("datasets/")[2])
        if data is None:
            return self.answer(404)
        if not self.path.startswith("/cdn/"):
            headers = {"X-Linked-Size": len(data), "X-Linked-ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
            return self.answer(302, Location="/cdn" + self.path, **headers)
        if habit.isdigit():
            return self.answer(int(habit), **server.headers)
        if habit == "hang":
            return server.stop.wait(3)
        if habit == "garbage":
            return self.wfile.write(b"\x00\x01garbage\n\n")
        if habit == "web page":
            return self.answer(200, b"<!DOCTYPE html><p>please log in</p>")
        if habit == "wrong bytes":
            data = data[:-1] + b"?"
        begin, end, status = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1]), len(data), 206
        if begin >= len(data):
            return self.answer(416)
        if habit == "drip":  # four requests without a new byte, one with some
            end = begin + 300 * (n % 5 == 0)
        if habit == "no range":  # and cut again and again
            begin, end, status = 0, 500 + 500 * (n % 2), 200 if n < 50 else 404
        self.answer(status, data[begin:end], length=None if habit == "no length" else len(data) - begin)

    def answer(self, status, body=b"", length=0, **headers):
        self.send_response(status)
        for name, value in ({} if length is None else {"Content-Length": length or len(body)} | headers).items():
            self.send_header(name, str(value))
        self.end_headers()
        with suppress(OSError):  # the client may have seen enough
            self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    """The server; .files and .habit decide what it does, .asked tells what it was asked."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.habit, server.headers, server.asked = {}, "", {}, []
    server.stop = threading.Event()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/mirror/")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(prepare_data, "BACKOFF", 0)
    monkeypatch.setattr(prepare_data.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1e12))
    yield server
    server.stop.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def tiny(hub):
    """The hub with TinyStories: 200 stories to train on, 20 others."""
    for split, n in (("train", 200), ("valid", 20)):
        text = f"\n{SEPARATOR}\n".join(stories(n, seed=n))
        hub.files[prepare_data.TINYSTORIES.format(split).removeprefix("datasets/")] = text.encode()
    return hub


def test_tinystories_comes_from_the_pinned_commit(tiny, capsys):
    """Both files come from the pinned commit, become the two splits, and are not asked for again. Bytes that are no
    UTF-8 become a replacement character.
    """
    tiny.files = {name: data + b" \xff\0" for name, data in tiny.files.items()}
    assert main(TINY) == 0 and "o will take about 5 GB, downloads included, and 1000" in capsys.readouterr().out
    for split, n in (("train", 200), ("val", 20)):
        assert tokens("o", split) == as_ids(*stories(n, seed=n))[:-1] + as_ids(" \ufffd\0"), split
    paths = [path for path, _ in tiny.asked if "/cdn/" not in path]
    pinned = "/mirror/datasets/roneneldan/TinyStories/resolve/f54c09fd23315a6f9c86f9dc80f725de7d8f9c64/TinyStoriesV2-"
    assert paths == [f"{pinned}GPT4-train.txt", f"{pinned}GPT4-valid.txt"], paths
    asked = len(tiny.asked)
    assert main([*TINY, "--max-tokens", "10000", "--overwrite"]) == 0 and len(tiny.asked) == asked
    assert 0 < len(tokens("o", "train")) <= 9000 and 0 < len(tokens("o", "val")) <= 1000


def test_a_download_goes_on_as_long_as_new_bytes_come(tiny, capsys):
    """Five requests in a row that bring nothing end it, and what comes again, from a server without ranges, is nothing.
    Many more failures, of which every fifth brings something, end with the whole file.
    """
    tiny.habit = "no range"
    assert "cut after 500 of" in failure(capsys, *TINY) and len(tiny.asked) == 2 * 6, len(tiny.asked)
    tiny.habit = "drip"
    assert main(TINY) == 0 and tokens("o", "train") == as_ids(*stories(200, seed=200))
    assert len(tiny.asked) > 100, f"only {len(tiny.asked)} requests: this test shows nothing"


@pytest.mark.parametrize("habit, words, times", [
    ("500", "HTTP Error 500", 5), ("hang", "timed out", 5), ("garbage", "garbage", 5), ("web page", "web page", 5),
    ("no length", "web page", 5), ("wrong bytes", "sha256", 1), ("401", "get the file yourself", 1),
    ("404", "edit its commit", 1),
])
def test_a_bad_server_is_one_line_and_the_next_run_does(tiny, capsys, monkeypatch, habit, words, times):
    """A server that cannot give the right bytes is one line and exit 1; no wrong file ever takes its final name, and
    what came before stays.
    """
    tiny.habit = habit
    part = Path(write("o/downloads/f54c09fd-TinyStoriesV2-GPT4-train.txt.part", stories(200, seed=200)[0][:9]))
    with monkeypatch.context() as patch:
        patch.setattr(prepare_data, "TIMEOUT", 0.1 if habit == "hang" else 10)
        line = failure(capsys, *TINY)
    assert words in line and len(tiny.asked) == 2 * times, (line, len(tiny.asked))
    left = {path.name: path.stat().st_size for path in Path("o").rglob("*") if path.is_file()}
    assert left == ({} if habit == "wrong bytes" else {part.name: 9}), left
    tiny.habit = ""
    assert main(TINY) == 0 and tokens("o", "train") == as_ids(*stories(200, seed=200)), "the next run must do"


@pytest.mark.parametrize("code, after, waits", [
    ("429", "7", [7] * 4), ("503", "3600", [60] * 4), ("503", "Wed, 21 Oct 2026 07:28:00 GMT", [60] * 4),
    ("429", None, [3, 6, 12, 24]),
])
def test_a_busy_hub_is_given_the_time_it_asks_for(tiny, capsys, monkeypatch, code, after, waits):
    """429 and 503 wait as Retry-After says, at most a minute, and a minute for a date; else longer each time."""
    waited = []
    monkeypatch.setattr(prepare_data, "BACKOFF", 3)
    monkeypatch.setattr(prepare_data, "time", SimpleNamespace(sleep=waited.append))
    tiny.habit, tiny.headers = code, {"Retry-After": after} if after else {}
    assert f"HTTP Error {code}" in failure(capsys, *TINY) and waited == waits, waited


@pytest.mark.parametrize("argv, need", [(TINY, 5), ([*OWT, "--subsets", "1"], 50 / 21)])
def test_too_little_disk_is_one_line_before_the_download(hub, capsys, monkeypatch, argv, need):
    """What a whole source takes, and what is free. A download that was begun goes on: its files are not free."""
    monkeypatch.setattr(prepare_data.shutil, "disk_usage", lambda folder: SimpleNamespace(free=0.99e9 * need))
    line = failure(capsys, *argv)
    assert f"about {need:.0f} GB, downloads included, and {0.99 * need:.0f} GB are free; make room" in line, line
    write("o/downloads/begun.part", "")
    assert not hub.asked and "404" in failure(capsys, *argv)


def test_a_killed_download_goes_on_where_it_stopped(tiny):
    """Only the rest of what a kill left is asked for. A part that is too long, as two processes leave it, goes."""
    name, whole = next(item for item in tiny.files.items() if item[0].endswith("train.txt"))
    path = Path("o/downloads/f54c09fd-TinyStoriesV2-GPT4-train.txt")
    for have in (1, 1000, len(whole), len(whole) + 1):
        path.unlink(missing_ok=True)
        tiny.asked.clear()
        write(f"{path}.part", (whole + b"x")[:have])
        assert main([*TINY, "--overwrite"]) == 0
        ranges = [asked for asked_for, asked in tiny.asked if asked_for == f"/cdn/mirror/datasets/{name}"]
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
        inner = [tar(*((f"../../{j}{'x' * 150 * j}.txt", f"\n\n {s}{i}{j}\n\n\n\nzwei ".encode() + b"\xff\n")
                       for j in range(2)), ("link.txt", None), ("note.md", b"no text"), mode="w:xz") for i in range(2)]
        hub.files[prepare_data.OPENWEBTEXT.format(s).removeprefix("datasets/")] = tar(
            ("a.xz", inner[0]), ("link.xz", None), ("../b.xz", inner[1]), ("c.md", b"x"))
    before = sorted(Path().iterdir())
    for n, argv in ((2, ["--subsets", "2"]), (21, ["--overwrite"])):
        assert main([*OWT, *argv]) == 0
        texts = [f"{s}{i}{j}\n\nzwei \ufffd" for s in range(n) for i in range(2) for j in range(2)]
        assert tokens("o") == as_ids(*texts), f"{len(tokens('o'))} tokens instead of {len(as_ids(*texts))}"
        assert sum("/cdn/" in path for path, _ in hub.asked) == n, hub.asked
    assert all("f3808c30e817981b845ec549c43e82bb467d8144/subsets/" in path for path, _ in hub.asked), hub.asked
    assert sorted(Path().iterdir()) == [*before, Path("o")]


@pytest.mark.parametrize("archive", [
    b"this is no tar" * 100, tar(("a.xz", b"not xz")), tar(("a.xz", tar(("a.txt", b"text " * 99), mode="w:xz")[:-40])),
], ids=["no tar", "no xz", "cut xz"])
def test_a_damaged_archive_is_one_line(hub, capsys, archive):
    """What is no archive or is cut is one line and exit 1, and leaves only the download behind."""
    hub.files[prepare_data.OPENWEBTEXT.format(0).removeprefix("datasets/")] = archive
    assert "damaged" in failure(capsys, *OWT, "--subsets", "1")
    assert [path.name for path in Path("o").iterdir()] == ["downloads"]
