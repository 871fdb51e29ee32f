"""Downloads: what comes from the hub is whole and right, or there is one line that says why not.

The hub is a server on 127.0.0.1 with its layout and headers, and with every bad habit a server can have.
"""

import hashlib
import io
import re
import tarfile
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from test_prepare_data import as_ids, failure, stories, tokens, write

import prepare_data
from prepare_data import SEPARATOR, UserError, main

pytestmark = pytest.mark.usefixtures("elsewhere")


class Hub(BaseHTTPRequestHandler):
    """A small hub: /datasets/... redirects, with size and sha256, to /cdn/..., where Range is honoured."""

    def do_GET(self):
        server, headers = self.server, {}
        server.asked.append((self.path, self.headers.get("Range")))
        habit, n = server.habit, sum("/cdn/" in path for path, _ in server.asked)
        data = server.files[self.path.partition("datasets/")[2]]
        if not self.path.startswith("/cdn/"):
            if habit != "no sha256":
                headers = {"X-Linked-Size": len(data), "X-Linked-ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
            return self.answer(302, b"", Location="/cdn" + self.path, **headers)
        if habit == "500" or habit == "500 twice" and n <= 2:
            return self.answer(500, b"sorry")
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
            begin += 10 * (habit == "wrong range" and n == 2)
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        if habit in ("cut", "no range", "wrong range") and n == 1:
            end = 1000
        server.sent += end - begin
        self.answer(status, data[begin:end], length=len(data) - begin, **headers)

    def answer(self, status, body, length=None, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body) if length is None else length, **headers}.items():
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
    server.files, server.habit, server.asked, server.sent, server.stop = {}, "", [], 0, threading.Event()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(prepare_data, "BACKOFF", 0)
    yield server
    server.stop.set()
    server.shutdown()
    server.server_close()
    thread.join()


def serve_stories(hub, train=60):
    for split, n in (("train", train), ("valid", 20)):
        text = f"\n{SEPARATOR}\n".join(stories(n, seed=n))
        hub.files[prepare_data.TINYSTORIES.format(split).removeprefix("datasets/")] = text.encode()


TINY = ["tinystories", "--out", "o", "--tokenizer", "bytes"]


def test_tinystories_comes_from_the_pinned_commit(hub):
    """Both files come from the pinned commit, become the two splits, and are not asked for again."""
    serve_stories(hub)
    assert main(TINY) == 0
    assert tokens("o", "train") == as_ids(*stories(60, seed=60)) and tokens("o", "val") == as_ids(*stories(20, seed=20))
    paths = [path for path, _ in hub.asked if "/cdn/" not in path]
    commit = "/datasets/roneneldan/TinyStories/resolve/f54c09fd23315a6f9c86f9dc80f725de7d8f9c64/TinyStoriesV2-GPT4-"
    assert paths == [f"{commit}train.txt", f"{commit}valid.txt"], paths
    asked = len(hub.asked)
    assert main([*TINY, "--max-tokens", "10000", "--overwrite"]) == 0 and len(hub.asked) == asked
    assert 0 < len(tokens("o", "train")) <= 9000 and 0 < len(tokens("o", "val")) <= 1000


@pytest.mark.parametrize("habit, again", [("cut", 1), ("wrong range", 1), ("no range", 1000), ("500 twice", 0)])
def test_a_broken_connection_is_taken_up_again(hub, habit, again):
    """A connection that is cut or refused costs no more than one byte twice, or, without Range, what had come."""
    serve_stories(hub, train=200)
    hub.habit = habit
    assert main(TINY) == 0
    downloaded = sorted(path.read_bytes() for path in Path("o/downloads").iterdir())
    assert downloaded == sorted(hub.files.values()), [len(data) for data in downloaded]
    twice = hub.sent - sum(map(len, hub.files.values()))
    assert twice == again or habit == "wrong range", f"{twice} bytes were sent twice, instead of {again}"


@pytest.mark.parametrize("habit, words", [
    ("500", "HTTP Error 500"), ("hang", "timed out"), ("garbage", "garbage"), ("web page", "web page"),
    ("wrong bytes", "sha256"), ("no sha256", "no size and sha256"),
])
def test_a_bad_server_is_one_line_and_the_next_run_does(hub, capsys, monkeypatch, habit, words):
    """A server that cannot give the right bytes is one line and exit 1; no wrong file ever takes its final name."""
    serve_stories(hub, train=200)
    monkeypatch.setattr(prepare_data, "TIMEOUT", 0.1 if habit == "hang" else 10)
    hub.habit = habit
    line = failure(capsys, *TINY)
    assert words in line and len(hub.asked) <= 10, (line, len(hub.asked))
    left = [path.name for path in Path("o").rglob("*") if path.is_file() and path.suffix != ".part"]
    assert not left, left
    hub.habit = ""
    monkeypatch.setattr(prepare_data, "TIMEOUT", 10)
    assert main(TINY) == 0 and tokens("o", "train") == as_ids(*stories(200, seed=200)), "the next run must do"


def test_no_redirect_leads_away_from_https():
    """https may lead to https only; that http, asked for by HF_ENDPOINT, may lead to http, the other tests show."""
    with pytest.raises(UserError, match="not to https"):
        prepare_data.Redirects().redirect_request(urllib.request.Request("https://a"), None, 302, "", {}, "http://b")


def test_a_killed_download_goes_on_where_it_stopped(hub):
    """Only the rest of what a kill left is asked for. A part that is too long, as two processes leave it, goes."""
    serve_stories(hub, train=200)
    name, whole = next(item for item in hub.files.items() if item[0].endswith("train.txt"))
    path = Path("o/downloads/f54c09fd-TinyStoriesV2-GPT4-train.txt")
    for have in (1, 1000, len(whole), len(whole) + 1):
        path.unlink(missing_ok=True), hub.asked.clear()
        write(f"{path}.part", (whole + b"x")[:have])
        assert main([*TINY, "--overwrite"]) == 0
        ranges = [asked for asked_for, asked in hub.asked if asked_for == f"/cdn/datasets/{name}"]
        assert ranges == [f"bytes={have - 1}-"] + ["bytes=0-"] * (have > len(whole)), ranges
        assert path.read_bytes() == whole


OWT = ["openwebtext", "--out", "o", "--tokenizer", "bytes", "--val-fraction", "0.5"]


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
    for s in range(3):
        inner = [tar(*((f"../../{j}{'x' * 150 * j}.txt", f"\n\n {s}{i}{j}\n\n\n\nzwei ü\n".encode()) for j in range(3)),
                     ("link.txt", None), ("note.md", b"no text"), mode="w:xz") for i in range(2)]
        serve_subset(hub, tar(("a.xz", inner[0]), ("link.xz", None), ("../b.xz", inner[1]), ("c.md", b"x")), s)
    before = sorted(Path().iterdir())
    assert main([*OWT, "--subsets", "2"]) == 0
    texts = [f"{s}{i}{j}\n\nzwei ü" for s in range(2) for i in range(2) for j in range(3)]
    assert tokens("o", "train") + tokens("o", "val") == as_ids(*texts)
    assert sorted(Path().iterdir()) == [*before, Path("o")]
    assert sum("/cdn/" in path for path, _ in hub.asked) == 2, hub.asked


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
