"""What prepare_data.py promises: faithful tokens, whole files or none, and one line for whatever goes wrong.

Downloads have a file of their own, test_hub.py; kills are in test_reliability.py.
"""

import os
import random
import shlex
import shutil
import struct
import subprocess
import sys
import time
from array import array
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path

import pytest

import prepare_data
from prepare_data import SEPARATOR, UserError, get_tokenizer, load_data, main

ROOT = Path(prepare_data.__file__).parent
pytestmark = pytest.mark.usefixtures("elsewhere")


def failure(capsys, *argv):
    """The one line on stderr of a command that must fail with exit code 1."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["/somewhere/prepare_data.py", *map(str, argv)])
        code = prepare_data.run_program(main)
    lines = capsys.readouterr().err.splitlines()
    assert code == 1 and len(lines) == 1, f"exit {code}, {len(lines)} lines on stderr: {lines}"
    assert lines[0].startswith("prepare_data.py: error: "), lines[0]
    return lines[0]


def tokens(folder, split):
    return [token for shard in getattr(load_data(folder), split) for token in shard.tolist()]


def all_tokens(folder):
    return tokens(folder, "train") + tokens(folder, "val")


def write(path, data):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(data.encode() if isinstance(data, str) else data)
    return str(path)


def prepare(text, *argv, out="o"):
    """Prepare a text, or a list of documents, as bytes in the folder `out`."""
    write("a.txt", text if isinstance(text, str) else f"\n{SEPARATOR}\n".join(text))
    return main(["a.txt", "--out", out, "--tokenizer", "bytes", *argv])


def as_ids(*documents):
    return [i for document in documents for i in [*document.encode(), 256]]


def stories(n, seed=0):
    draw, words = random.Random(seed), ["Ein", "kleiner", "Bär", "日本", "once", "upon", "a\n\n time"]
    return [" ".join(draw.choices(words, k=draw.randint(1, 60))) for _ in range(n)]


def test_no_vocabulary_and_no_network_is_one_line(tmp_path):
    """Without the GPT-2 files and a network, a fresh process says TIKTOKEN_CACHE_DIR in one line and exits with 1."""
    write("a.txt", "text")
    nowhere = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
    done = subprocess.run([sys.executable, ROOT / "prepare_data.py", "a.txt"], capture_output=True, text=True, env={
        **os.environ, **nowhere, "NO_PROXY": "", "no_proxy": "", "TIKTOKEN_CACHE_DIR": str(tmp_path / "none")})
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "TIKTOKEN_CACHE_DIR" in done.stderr, done.stderr
    assert not Path("data").exists()


@pytest.mark.parametrize("dress", [
    lambda t: t,
    lambda t: "\ufeff" + t,
    lambda t: t.replace("\n", "\r\n"),
    lambda t: t + "\n",
    lambda t: f"{SEPARATOR}\n{SEPARATOR}\n \n{SEPARATOR}\n{t}\n{SEPARATOR}\n{SEPARATOR}",
], ids=["plain", "bom", "crlf", "newline", "separators"])
@pytest.mark.parametrize("block", [14, 17, 18, 30, 1 << 20])
def test_documents_of_a_file(monkeypatch, dress, block):
    """However a file is dressed and read, its documents are the texts between separator lines, each with its end. With
    a block of 14, and of 18, a read begins at a separator that stands inside a line.
    """
    monkeypatch.setattr(prepare_data, "BLOCK", block)
    texts = ["one\n\ntwo", "drei ü" + "\n" * 44, "  four", f"{'x' * 28}{SEPARATOR}\nfive {SEPARATOR} five",
             f"{'y' * 36}{SEPARATOR}\n {SEPARATOR}", f"{SEPARATOR}six"]
    text = dress(f"\n{SEPARATOR}\n".join(texts))
    prepare(text)
    texts[-1] += "\n" * (text[-1] == "\n")
    assert all_tokens("o") == as_ids(*texts), bytes(i % 256 for i in all_tokens("o"))
    longest = max(len(text.encode()) + 1 for text in texts)
    assert load_data("o").meta["longest_document"] == longest, (load_data("o").meta, longest)


def test_long_documents_tokenise_as_if_in_one_piece(monkeypatch):
    """A document longer than a block gives exactly the GPT-2 tokens of the whole, runs of white space included."""
    try:
        encoding, draw = get_tokenizer("gpt2"), random.Random(1)
    except UserError as error:
        pytest.skip(f"needs the GPT-2 vocabulary: {error}")
    parts = ["word", "It's", " ", "  ", "\n", "\n\n", "\t", "42", "!?", "日本", "\u00a0", "\x1c", "\u2003"]
    text = "".join(draw.choices(parts, k=9000))
    whole = encoding.encode_ordinary(text)
    write("a.txt", text)
    for block in (100, 300, 1000):
        monkeypatch.setattr(prepare_data, "BLOCK", block)
        pieces = list(prepare_data.read_text("a.txt"))
        assert len(pieces) > 5 and [end for _, end in pieces].count(True) == 1, (block, len(pieces))
        ids = [i for piece, _ in pieces for i in encoding.encode_ordinary(piece)]
        assert ids == whole, f"blocks of {block}: {len(ids)} tokens instead of {len(whole)}"


@pytest.mark.parametrize("sizes, held_out", [
    ([900, 100], 100), ([810, 190], 190), ([790, 210], 100), ([940, 60], 60), ([960, 40], 100), ([1000], 100),
    ([25] * 40, 100), ([2], 1), ([2, 2], 1),
])
def test_the_last_tenth_is_held_out_in_whole_documents_if_they_fit(sizes, held_out):
    """The last tenth of the documents, if it is 5 to 20% of the tokens. Else the last tenth of the tokens, at least 1.
    """
    texts = [letter * (size - 1) for letter, size in zip("abcd" * 10, sizes)]
    prepare(texts)
    assert len(tokens("o", "val")) == held_out, f"{len(tokens('o', 'val'))} of {sum(sizes)} tokens"
    assert all_tokens("o") == as_ids(*texts)


def test_a_small_demo_keeps_whole_documents_and_its_floor(monkeypatch):
    """However few its documents, the last one is for validation, so that val_ce can be compared with the floor. A
    single one is cut between tokens, and then there is no floor.
    """
    documents = list(prepare_data.demo_documents(0, 20))
    monkeypatch.setattr(prepare_data, "demo_documents", lambda: documents)
    main(["demo", "--out", "o", "--max-tokens", "1500"])
    meta = load_data("o").meta
    _, text, log_prob, _ = documents[meta["documents"] - 1]
    assert tokens("o", "val") == as_ids(text) and meta["entropy_floor"] == -log_prob / (len(text) + 1), meta
    main(["demo", "--out", "one", "--max-tokens", "20"])
    assert len(tokens("one", "val")) == 1 and "entropy_floor" not in load_data("one").meta


def test_a_folder_is_its_text_files_without_the_hidden_ones():
    """Its .txt files in any case, sorted. A hidden copy would put validation text into the training text."""
    for name in ("n/b.txt", "n/a.txt", "n/c/D.TXT"):
        write(name, name)
    for name in ("n/x.png", "n/._a.txt", "n/.ipynb_checkpoints/b-checkpoint.txt", "n/__MACOSX/a.txt", "n/c/.git/e.txt"):
        write(name, b"\xff hidden")
    os.mkdir("n/folder.txt")
    os.rename("n", ".n")  # a folder that is named by the user may be hidden itself
    main([".n", "--out", "o", "--tokenizer", "bytes"])
    assert all_tokens("o") == as_ids("n/a.txt", "n/b.txt", "n/c/D.TXT")


def test_the_same_text_counts_once():
    """A file that is named twice, in a named folder, behind a link or copied: else validation text is trained on, too.
    """
    write("n/a.txt", "one"), write("n/b.txt", "two"), write("c.txt", "two")
    os.symlink("n/a.txt", "link.txt")
    main(["n/a.txt", "./n/a.txt", "n", "link.txt", "c.txt", "--out", "o", "--tokenizer", "bytes"])
    assert all_tokens("o") == as_ids("one", "two"), bytes(i % 256 for i in all_tokens("o"))


def test_a_shard_is_the_llm_c_format():
    """A shard is 256 little-endian int32 (20240520, 1, n, 0 ...) and n little-endian uint16, read without our code. In
    memory it is writable, as torch wants it; what is written there never reaches the disk.
    """
    prepare("Hello")
    data = Path("o/train_000000.bin").read_bytes()
    header = struct.unpack("<256i", data[:1024])
    assert header == (20240520, 1, 5, *[0] * 253), header[:5]
    assert struct.unpack("<5H", data[1024:]) == tuple(b"Hello")
    assert struct.unpack("<1H", Path("o/val_000000.bin").read_bytes()[1024:]) == (256,)
    shard = load_data("o").train[0]
    shard[0] = 7
    assert shard.tolist() == [7, *b"ello"] and (shard.format, shard.itemsize) == ("H", 2)
    assert Path("o/train_000000.bin").read_bytes() == data


def test_shards_are_cut_anywhere_and_lose_nothing(monkeypatch):
    """Of any length, the shards one after the other hold the same tokens, and none more than SHARD_TOKENS."""
    prepare(stories(30), out="whole")
    for n in (77, len(tokens("whole", "train")), len(tokens("whole", "train")) - 1):
        monkeypatch.setattr(prepare_data, "SHARD_TOKENS", n)
        prepare(stories(30), out=f"o{n}")
        for split in ("train", "val"):
            sizes = [len(shard) for shard in getattr(load_data(f"o{n}"), split)]
            assert all(size == n for size in sizes[:-1]) and 0 < sizes[-1] <= n, sizes
            assert tokens(f"o{n}", split) == tokens("whole", split)


def test_max_tokens_takes_whole_documents():
    """At most N tokens, of whole documents from the beginning. If not even the first one fits, it is cut and ends."""
    texts = stories(400)
    ends = [*accumulate(len(text.encode()) + 1 for text in texts)]
    for limit in (20_000, ends[99], 10**6):
        prepare(texts, "--max-tokens", str(limit), out=f"o{limit}")
        fit = sum(end <= limit for end in ends)
        assert all_tokens(f"o{limit}") == as_ids(*texts[:fit]), (limit, fit)
    for limit in (2, 5):
        prepare(texts, "--max-tokens", str(limit), out=f"o{limit}")
        assert all_tokens(f"o{limit}") == as_ids(texts[0])[:limit - 1] + [256], all_tokens(f"o{limit}")


def test_the_same_again_is_no_work_and_other_data_is_refused(capsys, monkeypatch):
    """Finished data stays: the same command does nothing, another one exits with 1, --overwrite replaces all shards."""
    def times():
        return {path.name: path.stat().st_mtime_ns for path in Path("o").iterdir()}

    monkeypatch.setattr(prepare_data, "SHARD_TOKENS", 500)
    prepare(stories(30))
    before = times()
    prepare(stories(30))
    for text, *argv in ("other text",), (stories(30), "--max-tokens", "9999"):
        with pytest.raises(UserError, match="add --overwrite"):
            prepare(text, *argv)
    write("b.txt", b"bad \xff text")  # the old data stays until the new tokens are ready
    assert "UTF-8" in failure(capsys, "b.txt", "--out", "o", "--tokenizer", "bytes", "--overwrite")
    assert times() == before
    prepare("other text", "--overwrite")
    write("o/meta.json", "{}")  # as a kill leaves it, while old shards are replaced
    prepare("last text")
    assert all_tokens("o") == as_ids("last text")
    assert sorted(times()) == ["meta.json", "train_000000.bin", "val_000000.bin"]


def test_two_preparations_of_a_folder_take_turns(capsys, monkeypatch):
    """Started at once, the second waits for the first, and then says that it is done. Both end well."""
    def slowly(*given):
        time.sleep(0.2)
        return write_shards(*given)

    write_shards = prepare_data.write_shards
    monkeypatch.setattr(prepare_data, "write_shards", slowly)
    write("a.txt", "text")
    with ThreadPoolExecutor(2) as pool:
        codes = list(pool.map(main, 2 * [["a.txt", "--out", "o", "--tokenizer", "bytes"]]))
    lines = sorted(capsys.readouterr().out.splitlines())
    assert codes == [0, 0] and all_tokens("o") == as_ids("text"), codes
    said = ("o holds this already", "o: 1 documents", "waiting for another process")
    assert len(lines) == 3 and all(map(str.startswith, lines, said)), lines


def shard(ids, n=None, magic=20240520, version=1):
    return struct.pack("<3i1012x", magic, version, len(ids) if n is None else n) + array("H", ids).tobytes()


@pytest.mark.parametrize("train, val", [
    ("fineweb_train_000001.bin", "fineweb_val_000000.bin"), ("train_retrieval_000000.bin", "val_pretrain_000000.bin"),
    ("train_medieval-0.bin", "x.val.bin"),
])
def test_foreign_shards_are_gpt2_tokens_and_their_names_say_the_split(train, val):
    """Without meta.json a folder is read as GPT-2 tokens. The split is a part of a name, not letters inside a word."""
    write(f"f/{train}", shard([1, 2])), write(f"f/{val}", shard([50256])), write("f/notes_retrieval.bin", "not a shard")
    write("f/old_train.bin.tmp", "what a kill left")
    data = load_data("f")
    assert (data.tokenizer, data.vocab_size, data.eot, data.meta) == ("gpt2", 50257, 50256, {})
    assert [s.tolist() for s in data.train] == [[1, 2]] and [s.tolist() for s in data.val] == [[50256]]
    with pytest.raises(UserError, match="other data"):  # and somebody's shards are not overwritten unasked
        prepare("text", out="f")


def test_the_fingerprint_names_the_data():
    """The fingerprint is that of a copy. It changes if a shard is renamed, dropped, added, or our own has other tokens.
    """
    for folder in "abcde":
        for name, ids in (("1_train.bin", [1, 2]), ("2_train.bin", [3]), ("1_val.bin", [4])):
            write(f"{folder}/{name}", shard(ids))
    os.rename("b/2_train.bin", "b/3_train.bin"), os.remove("c/2_train.bin"), write("d/9_train.bin", shard([1]))
    prints = [load_data(folder).fingerprint for folder in "abcde"]
    assert prints[0] == prints[4] and len(set(prints)) == 4, prints
    prepare("ab", out="f"), prepare("ba", out="g")
    assert load_data("f").fingerprint != load_data("g").fingerprint


@pytest.mark.parametrize("argv", ["", "demo --max-tokens 1", "openwebtext --subsets 22", "demo --max 5"])
def test_wrong_usage_is_exit_2(capsys, argv):
    """A flag that cannot be is argparse's own error, and nothing is written."""
    with pytest.raises(SystemExit) as caught:
        main(argv.split())
    assert caught.value.code == 2 and "error: " in capsys.readouterr().err and not list(Path().iterdir())


@pytest.mark.parametrize("make, word", [
    (lambda: "tinystorys", "or one of demo, tinystories"),
    (lambda: write("s.txt", f" \n\n{SEPARATOR}\n{SEPARATOR}\n"), "no document"),
    (lambda: write("b.txt", b"\xef\xbb\xbfab\xfe"), "0xfe at offset 5"),
    (lambda: write("u.txt", b"caf\xc3"), "0xc3 at offset 3"),
    (lambda: write("l.txt", "ä".encode() * 10_000 + b"\xfe" + b"rest"), "0xfe at offset 20000"),
    (lambda: write("z.txt", b"a\0b"), "zero"),
    (lambda: os.path.dirname(write("d/x.md", "x")), "no .txt"),
    (lambda: os.mkfifo("p.txt") or "p.txt", "p.txt"),
    (lambda: write("o", "file") and write("a.txt", "x"), "File exists: 'o'"),
])
def test_text_that_cannot_be_used_is_one_line(capsys, make, word):
    """Text that cannot be used is one line that names it, exit code 1, and leaves no shard behind."""
    line = failure(capsys, make(), "--out", "o", "--tokenizer", "bytes")
    assert word in line, line
    assert not list(Path("o").glob("*"))


@pytest.mark.parametrize("data", [
    b"", b"\1" * 500, shard([]), shard([1, 2], magic=20240801), shard([1, 2], version=2), shard([1, 2])[:-2],
    shard([1, 2, 3], n=2),
], ids="empty short header llama version cut long".split())
def test_damaged_shards_are_refused(data):
    """Whatever is wrong with a shard, its name is said at the start."""
    prepare(stories(9))
    write("o/train_000000.bin", data)
    with pytest.raises(UserError, match="o/train_000000.bin is not a whole shard .*; make it again"):
        load_data("o")


@pytest.mark.parametrize("damage, word", [
    (lambda o: (o / "val_000000.bin").unlink(), "val_000000.bin has 0 tokens"),
    (lambda o: write(o / "x_train.bin", shard([1])), "x_train.bin has 1 tokens, but 0"),
    (lambda o: write(o / "meta.json", "{"), "meta.json is damaged"),
    (lambda o: write(o / "meta.json", "{}"), "not finished"),
    (lambda o: [p.unlink() for p in o.iterdir()], "training shard"),
    (lambda o: [p.unlink() for p in o.iterdir() if p.name[0] in "mv"], "validation shard"),
    (lambda o: shutil.rmtree(o), "missing"),
    (lambda o: (shutil.rmtree(o), write(o, "x")), "not a folder"),
])
def test_damaged_folders_are_refused(damage, word):
    """A folder that is not what meta.json says is refused with one line: what is wrong, and a command to be pasted."""
    folder = "mein fön"
    prepare(stories(9), out=folder)
    damage(Path(folder))
    with pytest.raises(UserError) as caught:
        load_data(folder)
    message, ours = str(caught.value), Path(folder, "meta.json").exists()
    command = shlex.split(message.partition("; run: ")[2])
    assert word in message and command[:5] == ["python", "prepare_data.py", "PATH", "--out", folder], message
    assert command[5:] == ["--overwrite"] * ours, f"shards that may be the user's must not be overwritten: {message}"


@pytest.mark.parametrize("raised, code, words", [
    (UserError("a\nb; c"), 1, "x.py: error: a b; c\n"),
    (KeyboardInterrupt(), 130, "x.py: error: interrupted"),
    (OSError(28, "No space left on device"), 1, "x.py: error: [Errno 28] No space left"),
])
def test_run_program_is_where_errors_are_printed(capsys, monkeypatch, raised, code, words):
    """`run_program` turns what main raises into an exit code and one line; a bug keeps its traceback."""
    def main(argv):
        raise raised

    monkeypatch.setattr(sys, "argv", ["/somewhere/x.py"])
    assert prepare_data.run_program(main) == code
    error = capsys.readouterr().err
    assert error.startswith(words) and error.count("\n") == 1, error
    with pytest.raises(ZeroDivisionError):
        prepare_data.run_program(lambda argv: 1 / 0)


@pytest.mark.parametrize("streams", ["2>&-", "<&- >&- 2>&-", "| true"])
def test_closed_streams_and_ascii_terminals_are_no_errors(streams):
    """Where nobody listens, or cannot read a name, the data is made all the same, without a traceback."""
    write("a.txt", "日本語 ü")
    command = f"{shlex.quote(sys.executable)} {shlex.quote(str(ROOT / 'prepare_data.py'))} --tokenizer bytes"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command} --out ü a.txt {streams}"], capture_output=True,
                          text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode == 0 or "true" in streams) and done.stderr == "", (done.returncode, done.stderr)
    assert all_tokens("ü") == as_ids("日本語 ü") and done.stdout.startswith("?: 1 doc") == (streams == "2>&-")


def test_replacing_replaces_all_or_nothing(monkeypatch):
    """A write that fails half-way leaves the old file under the name, and nothing else; the error goes on. Otherwise
    all bytes are given to the disk before the name is: a power cut leaves no empty file.
    """
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda number: flushed.append((os.fstat(number).st_size, Path("f").read_bytes())))
    write("f", "old")
    with pytest.raises(ZeroDivisionError), prepare_data.replacing("f") as file:
        file.write(b"new" * 10_000)
        raise ZeroDivisionError
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == {"f": b"old"}
    with prepare_data.replacing("f") as file:
        file.write(b"new")
    assert flushed == [(3, b"old")] and {path.name: path.read_bytes() for path in Path().iterdir()} == {"f": b"new"}


@pytest.mark.slow
@pytest.mark.parametrize("ending", [" ", f"\n{SEPARATOR}\n"], ids=["one line", "many documents"])
def test_memory_is_constant(ending):
    """50 MB of text, in one line or in many documents, is prepared with 150 MB of private memory."""
    text = " ".join(stories(200)).replace("\n", " ") + ending
    with open("a.txt", "w", encoding="utf-8") as file:
        file.writelines([text] * int(50e6 / len(text.encode())))
    script = ("import resource, sys, threading, prepare_data; threading.stack_size(1 << 20);"
              "resource.setrlimit(resource.RLIMIT_DATA, (150 << 20,) * 2); prepare_data.main(sys.argv[1:])")
    done = subprocess.run([sys.executable, "-c", script, "a.txt", "--tokenizer", "bytes", "--out", "o"],
                          capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
