"""Downloads: what comes from the hub is whole and right, or there is one line that says why not.

The hub is a server on 127.0.0.1 with its layout and headers, and with every bad habit a server can have.
"""

import hashlib
import io
import lzma
import re
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from test_prepare_data import all_tokens, as_ids, failure, killer, stories, tokens, write

import prepare_data
from prepare_data import SEPARATOR, UserError, main

pytestmark = pytest.mark.usefixtures("elsewhere")


class Hub(BaseHTTPRequestHandler):
    """A small hub: /datasets/... redirects, with size and hash, to /cdn/..., where Range is honoured."""

    def do_GET(self):
        server, headers = self.server, {}
        server.asked.append((self.path, self.headers.get("Range")))
        habit, n = server.habit, sum("/cdn/" in path for path, _ in server.asked)
        name = self.path.partition("datasets/")[2]
        if name not in server.files:
            return self.answer(404, b"no such file\nat all")
        data = server.files[name]
        if not self.path.startswith("/cdn/"):
            if habit != "no linked headers":
                sha256 = "of another kind" if habit == "changed, no hash" else hashlib.sha256(data).hexdigest()
                headers = {
                    "X-Linked-Size": len(data) + 50 * (habit == "wrong length"),
                    "X-Linked-ETag": f'"{sha256}"',
                }
            there = {"loop": self.path, "to file": "file:///etc/passwd", "to ftp": f"ftp://{self.headers['Host']}/x"}
            return self.answer(302, b"", Location=there.get(habit, "/cdn" + self.path), **headers)
        if habit == "500" or habit == "500 twice" and n <= 2:
            return self.answer(500, b"sorry")
        if habit == "hang":
            return server.stop.wait(3)
        if habit == "garbage":
            return self.wfile.write(b"\x00\x01garbage\n\n")
        if habit.startswith("html"):
            return self.answer(200, b"<!DOCTYPE html><p>please log in</p>")
        if habit == "wrong bytes":
            data = data[:-1] + bytes([data[-1] ^ 1])
        if habit.startswith("changed") and n == 2:
            data = server.files[name] = bytes(reversed(data))
        begin, status = 0, 200
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted and habit != "no range":
            begin, status = int(wanted[1]), 206
            if begin >= len(data):
                return self.answer(416, b"", **{"Content-Range": f"bytes */{len(data)}"})
            begin += 10 * (habit == "wrong range" and n == 2)
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        end = len(data)
        if (
            habit == "cut always"
            or habit in ("cut", "no range", "changed", "changed, no hash", "wrong range")
            and n == 1
        ):
            end = min(end, begin + server.cut)
        server.sent += max(0, end - begin)
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
    """The server; .files, .habit and .cut decide what it does, .asked and .sent tell what it did."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.habit, server.cut, server.asked, server.sent, server.stop = (
        {},
        "",
        1000,
        [],
        0,
        threading.Event(),
    )
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


def serve_stories(hub, train=60, valid=20):
    for split, n in (("train", train), ("valid", valid)):
        text = f"\n{SEPARATOR}\n".join(stories(n, seed=n))
        hub.files[prepare_data.TINYSTORIES.format(split).removeprefix("datasets/")] = text.encode()


TINY = ["tinystories", "--out", "o", "--tokenizer", "bytes"]


def test_a_mirror_without_https_is_refused_at_once(monkeypatch):
    """HF_ENDPOINT=mirror.example: no request, no second try, one line that says how to write it."""
    monkeypatch.setenv("HF_ENDPOINT", "mirror.example")
    monkeypatch.setattr(prepare_data, "fetch", None)
    with pytest.raises(UserError, match="HF_ENDPOINT must begin with https://") as caught:
        main(TINY)
    assert caught.value.code == 2


def test_tinystories_from_the_hub(hub):
    """Both files come from the pinned commit, become the two splits, and are not asked for again."""
    serve_stories(hub)
    assert main(TINY) == 0
    assert tokens("o", "train") == as_ids(*stories(60, seed=60)) and tokens("o", "val") == as_ids(*stories(20, seed=20))
    paths = [path for path, _ in hub.asked if "/cdn/" not in path]
    commit = "/datasets/roneneldan/TinyStories/resolve/f54c09fd23315a6f9c86f9dc80f725de7d8f9c64/TinyStoriesV2-GPT4-"
    assert paths == [f"{commit}train.txt", f"{commit}valid.txt"], paths
    assert hub.sent == sum(map(len, hub.files.values())), f"{hub.sent} bytes sent"
    asked = len(hub.asked)
    assert main([*TINY, "--max-tokens", "2000", "--overwrite"]) == 0 and len(hub.asked) == asked
    assert 0 < len(tokens("o", "train")) <= 1800 and 0 < len(tokens("o", "val")) <= 200


@pytest.mark.parametrize(
    "habit",
    [
        "cut",
        "cut always",
        "no range",
        "wrong range",
        "500 twice",
        "changed, no hash",
        "no linked headers",
    ],
)
def test_bad_connections_end_well(hub, habit):
    """Whatever cuts or confuses a download, the file ends up whole, and without waste where the server can resume."""
    serve_stories(hub, train=200)
    size = sum(map(len, hub.files.values()))
    hub.habit = habit
    if habit == "cut always":
        hub.cut = 5000
    assert main(TINY) == 0
    downloaded = sorted(path.read_bytes() for path in Path("o/downloads").iterdir())
    assert downloaded == sorted(hub.files.values()), [len(data) for data in downloaded]
    wasted = hub.sent - size
    assert wasted == {"no range": 1000, "wrong range": wasted, "changed, no hash": wasted}.get(habit, 0), (
        f"{hub.sent} bytes sent for {size}"
    )


@pytest.mark.parametrize(
    "habit, words",
    [
        ("500", "HTTP Error 500"),
        ("hang", "timed out"),
        ("garbage", "garbage"),
        ("html", "web page"),
        ("wrong bytes", "sha256"),
        ("wrong length", "run the same command"),
        ("loop", "infinite loop"),
        ("to file", "file:///etc/passwd"),
        ("to ftp", "ftp://"),
        ("changed", "sha256"),
        ("404", "edit TINYSTORIES"),
    ],
)
def test_bad_servers_are_one_line(hub, capsys, monkeypatch, habit, words):
    """A server that cannot or will not give the right bytes is one line and exit 1; no final name is ever taken."""
    serve_stories(hub, train=200)
    monkeypatch.setattr(prepare_data, "TIMEOUT", 0.3 if habit == "hang" else 10)
    hub.habit = habit
    if habit == "404":
        hub.files.clear()
    code, line = failure(capsys, *TINY)
    assert code == 1 and words in line, line
    left = sorted(path.name for path in Path("o").rglob("*") if path.is_file())
    assert all(name.endswith(".part") for name in left), left
    tries = sum("/cdn/" in path for path, _ in hub.asked)
    assert tries == {"404": 0, "loop": 0, "to file": 0, "to ftp": 0, "html": 1, "wrong bytes": 1, "changed": 2}.get(
        habit, tries
    )
    assert tries <= 20, f"{tries} tries"
    if habit in ("500", "hang", "garbage", "html", "wrong bytes", "wrong length"):
        hub.habit, prepare_data.TIMEOUT = "", 10
        assert main(TINY) == 0, "the next run must do"


def test_killed_download_goes_on_where_it_stopped(hub):
    """Killed inside a write, the next process asks for exactly the bytes that are missing, and gets the right file."""
    serve_stories(hub, train=1200)
    name = next(name for name in hub.files if name.endswith("train.txt"))
    hub.files[name] = hub.files[name][:150_000]
    limits = (1000, 10_000, 65_536, 70_000, 140_000)
    killer(
        f"for limit in {limits}:\n"
        "    assert attempt(['tinystories', '--out', f'o{limit}', '--tokenizer', 'bytes'], limit=limit) == -25"
    )
    for limit in limits:
        (part,) = Path(f"o{limit}/downloads").glob("*.part")
        assert part.stat().st_size == limit
        hub.asked.clear()
        assert main(["tinystories", "--out", f"o{limit}", "--tokenizer", "bytes", "--max-tokens", "3000"]) == 0
        ranges = [asked for path, asked in hub.asked if "/cdn/" in path and path.endswith("train.txt")]
        assert ranges == [f"bytes={limit}-"], ranges
        (whole,) = Path(f"o{limit}/downloads").glob("*train.txt")
        assert whole.read_bytes() == hub.files[name]


@pytest.mark.parametrize("rest, sent", [(b"", 0), (b"more", 1)], ids=["whole", "too long"])
def test_part_that_lacks_nothing_is_not_fetched_again(hub, rest, sent):
    """Killed after the last byte but before its final name, a file is there already; one that is too long is not."""
    serve_stories(hub)
    name = next(name for name in hub.files if name.endswith("train.txt"))
    write(f"o/downloads/{name.partition('/resolve/')[2][:8]}-{Path(name).name}.part", hub.files[name] + rest)
    assert main(TINY) == 0 and tokens("o", "train") == as_ids(*stories(60, seed=60))
    assert hub.sent == sum(len(data) for n, data in hub.files.items() if sent or n != name), f"{hub.sent} bytes sent"


def member(name, data=b"", kind=tarfile.REGTYPE, link="", size=None):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(data) if size is None else size
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


def tar(*members, end=bytes(1024)):
    return b"".join(members) + end


def serve_subset(hub, archive, subset=0):
    hub.files[prepare_data.OPENWEBTEXT.format(subset).removeprefix("datasets/")] = archive


OWT = ["openwebtext", "--out", "o", "--tokenizer", "bytes", "--val-fraction", "0.5"]


def test_openwebtext_from_the_hub(hub):
    """Archives in archives, made by the standard module, become documents in order; only needed subsets are fetched."""
    for subset in range(3):
        outer = io.BytesIO()
        with tarfile.open(fileobj=outer, mode="w") as archive:
            for i in range(2):
                inner = io.BytesIO()
                with tarfile.open(fileobj=inner, mode="w:xz") as texts:
                    for j in range(3):
                        data = f"\n\n {subset}{i}{j}\n\n\n\nzwei ü\n".encode()
                        info = tarfile.TarInfo(f"000{j}-{'abcdef' * (30 if j else 1)}.txt")
                        info.size = len(data)
                        texts.addfile(info, io.BytesIO(data))
                info = tarfile.TarInfo(f"openwebtext/urlsf_subset{subset:02d}-{i}_data.xz")
                info.size = len(inner.getvalue())
                archive.addfile(info, io.BytesIO(inner.getvalue()))
        serve_subset(hub, outer.getvalue(), subset)
    assert main([*OWT, "--subsets", "2"]) == 0
    assert all_tokens("o") == as_ids(*(f"{s}{i}{j}\n\nzwei ü" for s in range(2) for i in range(2) for j in range(3)))
    assert len([path for path, _ in hub.asked if "/cdn/" in path]) == 2
    asked = len(hub.asked)
    assert main([*OWT, "--max-tokens", "30", "--overwrite"]) == 0 and len(hub.asked) == asked, (
        "no third subset was needed"
    )


def test_hostile_members_are_passed_over(hub):
    """Links, devices, pipes and folders are not read, names are not paths: nothing appears outside, texts are kept."""
    odd = [
        member("l.txt", kind=tarfile.SYMTYPE, link="/etc/passwd"),
        member("h.txt", kind=tarfile.LNKTYPE, link="../x"),
        member("d.txt", kind=tarfile.CHRTYPE),
        member("f.txt", kind=tarfile.FIFOTYPE),
        member("dir.txt", kind=tarfile.DIRTYPE),
        member("note.md", b"no text"),
        member("x.txt", b"27 mtime=1350244992.023960\n", kind=b"x"),
    ]
    good = [
        member("../../evil.txt", b"one"),
        member("/evil.txt", b"two"),
        member("a.txt", b"three"),
        member("a.txt", b"four"),
    ]
    inner = tar(*odd, *good, *odd)
    inner = lzma.compress(inner[:700]) + lzma.compress(inner[700:]) + bytes(8)
    serve_subset(hub, tar(*odd, member("../x.xz", inner), member("y.xz", kind=tarfile.SYMTYPE, link="/etc/passwd")))
    before = sorted(Path().iterdir())
    assert main([*OWT, "--subsets", "1"]) == 0
    assert all_tokens("o") == as_ids("one", "two", "three", "four")
    assert sorted(Path().iterdir()) == [*before, Path("o")] and not Path("/evil.txt").exists()


TEXT = member("a.txt", b"some text")


@pytest.mark.parametrize(
    "archive, words",
    [
        (lambda: b"this is no tar" * 100, "damaged"),
        (lambda: tar(), "no documents"),
        (lambda: tar(member("a.xz", b"not xz")), "no whole .xz"),
        (lambda: tar(member("a.xz", lzma.compress(tar(TEXT))[:-9])), "cut short"),
        (lambda: tar(member("a.xz", lzma.compress(tar(TEXT))))[:520], "cut"),
        (lambda: tar(member("a.xz", lzma.compress(tar(TEXT)[:515]))), "cut"),
        (lambda: tar(member("a.xz", size=10**10)), "more than"),
        (lambda: tar(member("a.xz", bytes(17 << 20))), "more than"),
        (lambda: tar(member("a.xz", lzma.compress(tar(member("a.txt", size=10**11))))), "more than"),
        (lambda: tar(member("a.xz", lzma.compress(bytes(1000) + tar(TEXT)))), "no documents"),
        (lambda: tar(member("a.xz", lzma.compress(tar(member("a.txt", bytes(20 << 20)))))), "unpacked"),
        (lambda: tar(TEXT[:124] + b"-0000000001\0" + TEXT[136:]), "damaged"),
        (
            lambda: tar(
                member("a.xz", lzma.compress(b"x" * 999, filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 27}]))
            ),
            "no whole .xz",
        ),
    ],
)
def test_bad_archives_are_one_line(hub, capsys, monkeypatch, archive, words):
    """Cut, damaged, swollen and lying archives are one line and exit 1, and memory stays where it was told to."""
    monkeypatch.setattr(prepare_data, "CAP", 1 << 24)
    serve_subset(hub, archive())
    code, line = failure(capsys, *OWT, "--subsets", "1")
    assert code == 1 and words in line, line
    assert [path.name for path in Path("o").iterdir()] == ["downloads"]
