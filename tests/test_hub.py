"""Downloads: what comes from the hub is whole and right, or there is one line that says why not.

The hub is a server on 127.0.0.1 with its layout and headers, and with every bad habit a server can have.
"""

import hashlib
import io
import re
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_prepare_data import as_ids, failure, stories, tokens, write

import prepare_data
from prepare_data import SEPARATOR, main

pytestmark = pytest.mark.usefixtures("elsewhere")


class Hub(BaseHTTPRequestHandler):
    """A small hub: /datasets/... redirects, with size and sha256, to /cdn/..., where Range is honoured."""

    def do_GET(self):
        server, headers = self.server, {}
        server.asked.append((self.path, self.headers.get("Range")))
        habit, n = server.habit, sum("/cdn/" in path for path, _ in server.asked)
        data = server.files.get(self.path.partition("datasets/")[2])
        if not self.path.startswith("/cdn/"):
            if habit == "404":
                return self.answer(404, b"")
            if habit != "no sha256":
                headers = {"X-Linked-Size": len(data), "X-Linked-ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
            return self.answer(302, b"", Location="/cdn" + self.path, **headers)
        if habit.isdigit():
            return self.answer(int(habit), b"sorry", **server.headers)
        if habit == "hang":
            return server.stop.wait(3)
        if habit == "garbage":
            return self.wfile.write(b"\x00\x01garbage\n\n")
        if habit == "web page":
            return self.answer(200, b"<!DOCTYPE html><p>please log in</p>")
        if habit == "wrong bytes":
            data = data[:-1] + bytes([data[-1] ^ 1])
        begin, end, status = 0, len(data), 200
        if habit != "no range":
            begin, status = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1]), 206
            if begin >= len(data):
                return self.answer(416, b"")
        if habit in ("cut", "no range") and n == 1:
            end = 1000
        if habit == "drip":  # four requests without a new byte, one with some
            end = begin + 300 * (n % 5 == 0)
        if habit == "jumps":
            begin, end, status = 0, 500 + 500 * (n % 2), 200 if n < 50 else 404
        server.sent += len(data[begin:end])
        self.answer(status, data[begin:end], length=None if habit == "no length" else len(data) - begin, **headers)

    def answer(self, status, body, length=0, **headers):
        self.send_response(status)
        for name, value in ({} if length is None else {"Content-Length": length or len(body)} | headers).items():
            self.send_header(name, str(value))
        self.end_headers()
        try:
            self.wfile.write(body)
        except OSError:  # the client was killed
            pass
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    """The server; .files and .habit decide what it does, .asked and .sent tell what it did."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.habit, server.headers, server.asked, server.sent = {}, "", {}, [], 0
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


def serve_stories(hub, train=60):
    for split, n in (("train", train), ("valid", 20)):
        text = f"\n{SEPARATOR}\n".join(stories(n, seed=n))
        hub.files[prepare_data.TINYSTORIES.format(split).removeprefix("datasets/")] = text.encode()


TRAIN = "f54c09fd-TinyStoriesV2-GPT4-train.txt"
TINY = ["tinystories", "--out", "o", "--tokenizer", "bytes"]


def test_tinystories_comes_from_the_pinned_commit(hub, capsys):
    """Both files come from the pinned commit, become the two splits, and are not asked for again. Bytes that are no
    UTF-8 become a replacement character.
    """
    serve_stories(hub)
    hub.files = {name: data + b" \xff\0" for name, data in hub.files.items()}
    assert main(TINY) == 0 and "o will take about 5 GB, downloads included, and 1000" in capsys.readouterr().out
    for split, n in (("train", 60), ("val", 20)):
        assert tokens("o", split) == as_ids(*stories(n, seed=n))[:-1] + as_ids(" \ufffd\0"), split
    paths = [path for path, _ in hub.asked if "/cdn/" not in path]
    pinned = "/mirror/datasets/roneneldan/TinyStories/resolve/f54c09fd23315a6f9c86f9dc80f725de7d8f9c64/TinyStoriesV2-"
    assert paths == [f"{pinned}GPT4-train.txt", f"{pinned}GPT4-valid.txt"], paths
    asked = len(hub.asked)
    assert main([*TINY, "--max-tokens", "10000", "--overwrite"]) == 0 and len(hub.asked) == asked
    assert 0 < len(tokens("o", "train")) <= 9000 and 0 < len(tokens("o", "val")) <= 1000


@pytest.mark.parametrize("habit, again", [("cut", 1), ("no range", 1000)])
def test_a_broken_connection_is_taken_up_again(hub, habit, again):
    """A connection that is cut costs no more than one byte twice, or, without Range, what had come."""
    serve_stories(hub, train=200)
    hub.habit = habit
    assert main(TINY) == 0
    downloaded = sorted(path.read_bytes() for path in Path("o/downloads").iterdir())
    assert downloaded == sorted(hub.files.values()), [len(data) for data in downloaded]
    twice = hub.sent - sum(map(len, hub.files.values()))
    assert twice == again, f"{twice} bytes were sent twice, instead of {again}"


def test_a_download_goes_on_as_long_as_bytes_come(hub):
    """Many more than TRIES failed requests, of which every fifth brings something, end with the whole file. Five in a
    row that bring nothing end it.
    """
    serve_stories(hub, train=200)
    hub.habit = "drip"
    assert main(TINY) == 0 and tokens("o", "train") == as_ids(*stories(200, seed=200))
    assert len(hub.asked) > 100, f"only {len(hub.asked)} requests: this test shows nothing"


def test_what_comes_again_is_no_progress(hub, capsys):
    """A server that always begins at 0, and is cut sooner or later, brings nothing new."""
    serve_stories(hub, train=200)
    hub.habit = "jumps"
    assert "cut after" in failure(capsys, *TINY) and len(hub.asked) == 2 * 6, len(hub.asked)


@pytest.mark.parametrize("habit, words, requests", [
    ("500", "HTTP Error 500", 5), ("hang", "timed out", 5), ("garbage", "garbage", 5), ("web page", "web page", 5),
    ("no length", "web page", 5), ("no sha256", "web page", 5), ("wrong bytes", "sha256", 1),
    ("401", "get the file yourself", 1), ("403", "get the file yourself", 1), ("404", "edit its commit", 0.5),
])
def test_a_bad_server_is_one_line_and_the_next_run_does(hub, capsys, monkeypatch, habit, words, requests):
    """A server that cannot give the right bytes is one line and exit 1; no wrong file ever takes its final name, and
    what came before stays.
    """
    serve_stories(hub, train=200)
    monkeypatch.setattr(prepare_data, "TIMEOUT", 0.1 if habit == "hang" else 10)
    hub.habit = habit
    part = Path(write(f"o/downloads/{TRAIN}.part", stories(200, seed=200)[0][:9]))
    line = failure(capsys, *TINY)
    assert words in line and len(hub.asked) == 2 * requests, (line, len(hub.asked))
    left = [path.name for path in Path("o").rglob("*") if path.is_file()]
    assert left == [part.name] * (habit != "wrong bytes") and (not left or part.stat().st_size == 9), left
    hub.habit = ""
    monkeypatch.setattr(prepare_data, "TIMEOUT", 10)
    assert main(TINY) == 0 and tokens("o", "train") == as_ids(*stories(200, seed=200)), "the next run must do"


@pytest.mark.parametrize("after, wait", [("7", 7), ("3600", 60), ("Wed, 21 Oct 2026 07:28:00 GMT", 60), (None, 3)])
@pytest.mark.parametrize("code", ["429", "503"])
def test_a_busy_hub_is_given_the_time_it_asks_for(hub, capsys, monkeypatch, code, after, wait):
    """429 and 503 wait as Retry-After says, at most a minute, and a minute for a date; else longer each time."""
    waits = []
    monkeypatch.setattr(prepare_data, "BACKOFF", 3)
    monkeypatch.setattr(prepare_data, "time", SimpleNamespace(sleep=waits.append))
    serve_stories(hub)
    hub.habit, hub.headers = code, {"Retry-After": after} if after else {}
    assert f"HTTP Error {code}" in failure(capsys, *TINY)
    assert waits == ([wait] * 4 if after else [3, 6, 12, 24]), waits


@pytest.mark.parametrize("argv, need", [
    (["tinystories"], 5), (["openwebtext"], 50), (["openwebtext", "--subsets", "1"], 50 / 21),
])
def test_too_little_disk_is_one_line_before_the_download(hub, capsys, monkeypatch, argv, need):
    """Of a whole source: what it takes and what is free. A download that was begun goes on: its files are not free."""
    monkeypatch.setattr(prepare_data.shutil, "disk_usage", lambda folder: SimpleNamespace(free=0.99e9 * need))
    line = failure(capsys, *argv, *TINY[1:])
    assert f"about {need:.0f} GB, downloads included, and {0.99 * need:.0f} GB are free; make room" in line, line
    write("o/downloads/begun.part", "")
    hub.habit = "404"
    assert not hub.asked and "404" in failure(capsys, *argv, *TINY[1:])


def test_a_killed_download_goes_on_where_it_stopped(hub):
    """Only the rest of what a kill left is asked for. A part that is too long, as two processes leave it, goes."""
    serve_stories(hub, train=200)
    name, whole = next(item for item in hub.files.items() if item[0].endswith("train.txt"))
    path = Path("o/downloads", TRAIN)
    for have in (1, 1000, len(whole), len(whole) + 1):
        path.unlink(missing_ok=True), hub.asked.clear()
        write(f"{path}.part", (whole + b"x")[:have])
        assert main([*TINY, "--overwrite"]) == 0
        ranges = [asked for asked_for, asked in hub.asked if asked_for == f"/cdn/mirror/datasets/{name}"]
        assert ranges == [f"bytes={have - 1}-"] + ["bytes=0-"] * (have > len(whole)), ranges
        assert path.read_bytes() == whole


OWT = ["openwebtext", "--out", "o", "--tokenizer", "bytes"]


def tar(*members, mode="w"):
    """A tar file of (name, bytes), or of (name, None) for a symbolic link."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.type = len(data or b""), tarfile.REGTYPE if data is not None else tarfile.SYMTYPE
            info.linkname = "/etc/passwd" if data is None else ""
            archive.addfile(info, io.BytesIO(data or b""))
    return file.getvalue()


def serve_subset(hub, archive, subset=0):
    hub.files[prepare_data.OPENWEBTEXT.format(subset).removeprefix("datasets/")] = archive


def test_openwebtext_is_read_from_archives_in_archives(hub):
    """Documents come in order, names are not paths, links are passed over, and only needed subsets are fetched."""
    for s in range(21):
        inner = [tar(*((f"../../{j}{'x' * 150 * j}.txt", f"\n\n {s}{i}{j}\n\n\n\nzwei ".encode() + b"\xff\n")
                       for j in range(2)), ("link.txt", None), ("note.md", b"no text"), mode="w:xz") for i in range(2)]
        serve_subset(hub, tar(("a.xz", inner[0]), ("link.xz", None), ("../b.xz", inner[1]), ("c.md", b"x")), s)
    before = sorted(Path().iterdir())
    for n in (2, 21):
        assert main([*OWT, "--overwrite", *["--subsets", "2"][:2 * (n == 2)]]) == 0
        texts = [f"{s}{i}{j}\n\nzwei \ufffd" for s in range(n) for i in range(2) for j in range(2)]
        assert tokens("o", "train") + tokens("o", "val") == as_ids(*texts)
        assert sum("/cdn/" in path for path, _ in hub.asked) == n, hub.asked
    assert all("f3808c30e817981b845ec549c43e82bb467d8144/subsets/" in path for path, _ in hub.asked), hub.asked
    assert sorted(Path().iterdir()) == [*before, Path("o")]


@pytest.mark.parametrize("archive, words", [
    (lambda: b"this is no tar" * 100, "damaged"),
    (lambda: tar(), "no document"),
    (lambda: tar(("a.xz", b"not xz")), "damaged"),
    (lambda: tar(("a.xz", tar(("a.txt", b"text " * 99), mode="w:xz")[:-40])), "damaged"),
], ids=["no tar", "empty", "no xz", "cut xz"])
def test_a_damaged_archive_is_one_line(hub, capsys, archive, words):
    """What is no archive, empty or cut is one line and exit 1, and leaves only the download behind."""
    serve_subset(hub, archive())
    line = failure(capsys, *OWT, "--subsets", "1")
    assert words in line, line
    assert [path.name for path in Path("o").iterdir()] == ["downloads"]
