"""What prepare_data.py promises: faithful tokens, and one line for whatever goes wrong.

Downloads have test_hub.py. What kills, a full disk and --overwrite leave is in test_reliability.py.
"""

import os
import random
import shlex
import struct
import subprocess
import sys
import time
from array import array
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiktoken

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


def tokens(folder, *splits):
    """All tokens of the shards of these splits; of both, if none is named."""
    data = load_data(folder)
    return [token for split in splits or ("train", "val") for part in getattr(data, split) for token in part.tolist()]


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


def shard(ids, n=None, version=1):
    """The bytes of a shard, whose header may lie."""
    return struct.pack("<3i1012x", 20240520, version, len(ids) if n is None else n) + array("H", ids).tobytes()


def test_no_vocabulary_and_no_network_is_one_line(capsys, monkeypatch):
    """Without the GPT-2 files and a network, one line says TIKTOKEN_CACHE_DIR."""
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})  # as in a new process
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "none")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    assert "TIKTOKEN_CACHE_DIR" in failure(capsys, write("a.txt", "text"))


@pytest.mark.parametrize("dress", [
    lambda text: "\ufeff" + text.replace("\n", "\r\n"),
    lambda text: f"{SEPARATOR}\n{SEPARATOR}\n \n{SEPARATOR}\n{text}\n{SEPARATOR}\n{SEPARATOR}",
], ids=["mark and crlf", "separators"])
@pytest.mark.parametrize("block", [14, 18, 1 << 20])  # 14 and 18 begin a read at a separator inside a line
def test_documents_of_a_file(monkeypatch, dress, block):
    """However a file is dressed and read, its documents are the texts between separator lines, each with its end."""
    monkeypatch.setattr(prepare_data, "BLOCK", block)
    texts = ["one\n\ntwo", "drei ü" + "\n" * 44, "  four", f"{'x' * 28}{SEPARATOR}\nfive {SEPARATOR} five",
             f"{'y' * 36}{SEPARATOR}\n {SEPARATOR}", f"{SEPARATOR}six\n"]
    prepare(dress(f"\n{SEPARATOR}\n".join(texts)))
    assert tokens("o") == as_ids(*texts), bytes(i % 256 for i in tokens("o"))


def test_long_documents_tokenise_as_if_in_one_piece(monkeypatch):
    """A document longer than a block gives exactly the GPT-2 tokens of the whole, runs of white space included."""
    try:
        encoding, draw = get_tokenizer("gpt2"), random.Random(1)
    except UserError as error:
        pytest.skip(f"needs the GPT-2 vocabulary: {error}")
    parts = ["word", "It's", " ", "  ", "\n", "\n\n", "\t", "42", "!?", "日本", "\u00a0", "\x1c", "\u2003"]
    text = "".join(draw.choices(parts, k=9000))
    monkeypatch.setattr(prepare_data, "BLOCK", 100)
    pieces = list(prepare_data.read_text(write("a.txt", text)))
    assert len(pieces) > 50 and [end for _, end in pieces].count(True) == 1, len(pieces)
    ids, whole = [i for piece, _ in pieces for i in encoding.encode_ordinary(piece)], encoding.encode_ordinary(text)
    assert ids == whole, f"{len(ids)} tokens instead of {len(whole)}"


@pytest.mark.parametrize("sizes, held_out", [([810, 190], 190), ([790, 210], 100), ([960, 40], 100), ([25] * 40, 100),
                                             ([2], 1)])
def test_the_last_tenth_is_held_out_in_whole_documents_if_they_fit(sizes, held_out):
    """The last tenth of the documents, if it is 5 to 20% of the tokens; else a tenth of the tokens, at least 1."""
    texts = [letter * (size - 1) for letter, size in zip("abcd" * 10, sizes)]
    prepare(texts)
    assert len(tokens("o", "val")) == held_out, f"{len(tokens('o', 'val'))} of {sum(sizes)} tokens"
    assert tokens("o") == as_ids(*texts)


def test_a_folder_is_its_text_files_without_the_hidden_ones_each_text_once():
    """A hidden copy, a link, or a file named beside its folder would put validation text into the training text."""
    for name in (".n/b.txt", ".n/a.txt", ".n/c/D.TXT"):  # a folder that is named by the user may be hidden itself
        write(name, name)
    for name in (".n/x.png", ".n/._a.txt", ".n/__MACOSX/._a.txt", ".n/c/.git/e.txt", ".n/folder.txt/x"):
        write(name, b"\xff hidden")
    os.symlink(".n/a.txt", "link.txt")
    write("copy.txt", ".n/b.txt")
    main([".n/a.txt", ".n", "link.txt", "copy.txt", "--out", "o", "--tokenizer", "bytes"])
    assert tokens("o") == as_ids(".n/a.txt", ".n/b.txt", ".n/c/D.TXT"), bytes(i % 256 for i in tokens("o"))


def test_shards_are_in_the_format_of_llm_c_and_lose_nothing(monkeypatch):
    """256 little-endian int32 (20240520, 1, n, 0 ...) and n uint16, read without our code; writable in memory alone."""
    prepare(stories(30))
    n_train = len(tokens("o", "train"))
    for most in (77, n_train - 1, n_train):
        monkeypatch.setattr(prepare_data, "SHARD_TOKENS", most)
        prepare(stories(30), "--overwrite")
        ids = []
        for path in sorted(Path("o").glob("*.bin")):
            data = path.read_bytes()
            n = len(data) // 2 - 512
            assert struct.unpack("<256i", data[:1024]) == (20240520, 1, n, *[0] * 253) and 0 < n <= most, data[:16]
            ids += struct.unpack(f"<{n}H", data[1024:])
        assert ids == as_ids(*stories(30)), f"shards of {most}: {len(ids)} tokens"
    last = load_data("o").val[-1]
    last[0] += 1
    assert last[0] == ids[-len(last)] + 1 and path.read_bytes() == data


def test_max_tokens_takes_whole_documents():
    """At most N tokens, of whole documents from the beginning. If not even the first one fits, it is cut and ends."""
    texts = stories(400)
    n = len(as_ids(*texts[:99]))
    for limit, wanted in ((n, as_ids(*texts[:99])), (n + 1, as_ids(*texts[:99])), (10**6, as_ids(*texts)),
                          (2, as_ids(texts[0])[:1] + [256])):
        prepare(texts, "--max-tokens", str(limit), "--overwrite")
        assert tokens("o") == wanted, f"at most {limit}: {len(tokens('o'))} tokens instead of {len(wanted)}"
    with pytest.raises(SystemExit, match="^2$"):
        prepare(texts, "--max-tokens", "1")


def test_the_same_again_is_no_work_and_other_data_is_refused(capsys, monkeypatch):
    """Finished data stays: the same command, also at the same time, does nothing. Another one needs --overwrite."""
    write_shards = prepare_data.write_shards
    monkeypatch.setattr(prepare_data, "write_shards", lambda *given: time.sleep(0.2) or write_shards(*given))
    write("a.txt", "text")
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(main, 2 * [["a.txt", "--out", "o", "--tokenizer", "bytes"]])) == [0, 0]
    lines = sorted(line for line in capsys.readouterr().out.splitlines() if not line.startswith("waiting"))
    assert len(lines) == 2 and lines[0].startswith("o holds this already") and lines[1].startswith("o: 1 doc"), lines
    before = {path: path.stat().st_mtime_ns for path in Path("o").iterdir()}
    for text, *argv in ("other text",), ("text", "--max-tokens", "9999"):
        with pytest.raises(UserError, match="add --overwrite"):
            prepare(text, *argv)
    assert {path: path.stat().st_mtime_ns for path in Path("o").iterdir()} == before


def test_foreign_shards_are_gpt2_tokens_and_their_names_say_the_split():
    """Without meta.json a folder is read as GPT-2 tokens. The split is a part of a name, not letters inside a word."""
    for name, content in (("train_retrieval-0.bin", shard([1, 2])), ("x.val.bin", shard([50256])),
                          ("notes_retrieval.bin", "not a shard"), ("old_train.bin.tmp", "what a kill left")):
        write(f"f/{name}", content)
    data = load_data("f")
    assert (data.tokenizer, data.vocab_size, data.eot, data.meta) == ("gpt2", 50257, 50256, {})
    assert (tokens("f", "train"), tokens("f", "val")) == ([1, 2], [50256])


def test_the_fingerprint_names_the_data():
    """The fingerprint is that of a copy. It changes if a shard has another name or length, or our own other tokens."""
    for folder, name, ids in (("a", "1_train.bin", [1]), ("b", "1_train.bin", [1]), ("c", "2_train.bin", [1]),
                              ("d", "1_train.bin", [1, 2])):
        write(f"{folder}/{name}", shard(ids))
        write(f"{folder}/1_val.bin", shard([4]))
    prepare("ab", out="e")
    prepare("ba", out="f")
    prints = [load_data(folder).fingerprint for folder in "abcdef"]
    assert prints[0] == prints[1] and len(set(prints)) == 5, prints


@pytest.mark.parametrize("name, content, words", [
    ("tinystorys", None, "or a single one of demo, tinystories"),
    ("s.txt", f" \n\n{SEPARATOR}\n{SEPARATOR}\n", "no document"),
    ("l.txt", "\ufeff".encode() + "ä".encode() * 10_000 + b"\xferest", "0xfe at offset 20003"),
    ("z.txt", b"a\0b", "zero"),
    ("d", None, "no .txt"),
])
def test_text_that_cannot_be_used_is_one_line(capsys, name, content, words):
    """Text that cannot be used is one line that names it, exit code 1, and leaves no shard behind."""
    write("d/x.md", "x")
    line = failure(capsys, write(name, content) if content else name, "--out", "o", "--tokenizer", "bytes")
    assert words in line and not list(Path("o").glob("*")), line


@pytest.mark.parametrize("name, content, words", [
    ("train_000000.bin", shard([1, 2], version=2), "train_000000.bin is not a whole shard"),
    ("train_000000.bin", shard([1, 2, 3], n=2), "train_000000.bin is not a whole shard"),
    ("val_000000.bin", None, "val_000000.bin has 0 tokens"),
    ("x_train.bin", shard([1]), "x_train.bin has 1 tokens, but 0"),
    ("meta.json", b"{", "meta.json is damaged"),
    ("meta.json", b"{}", "is not finished"),
])
def test_a_damaged_folder_is_refused_with_a_way_out(name, content, words):
    """A folder that is not what meta.json says is one line: what is wrong, and, but for shards, a command to paste."""
    prepare(stories(9), out="mein fön")
    Path("mein fön", name).unlink(missing_ok=True)
    if content:
        write(f"mein fön/{name}", content)
    again = "with" if "whole" in words else "run: python"
    with pytest.raises(UserError, match=f"{words}.*{again} prepare_data.py (PATH --out 'mein fön' )?--overwrite$"):
        load_data("mein fön")


def test_missing_data_is_refused_with_the_command_that_makes_it():
    """Of a source, or of own text. Shards without meta.json are someone's own: it adds none, and replaces none."""
    write("f/train.bin", shard([1]))
    for folder, words in (("data/demo", "is missing; run: python prepare_data.py demo --out data/demo"),
                          ("mine", "is missing; run: python prepare_data.py PATH --out mine"),
                          ("f", "has no validation shard; add one")):
        with pytest.raises(UserError, match=f"^{folder} {words}$"):
            load_data(folder)
    write("f/val.bin", shard([1]))
    for overwrite in ([], ["--overwrite"]):
        with pytest.raises(UserError, match="^f holds shards that are not from prepare_data.py; choose another --out$"):
            main([write("a.txt", "x"), "--out", "f", "--tokenizer", "bytes", *overwrite])
    assert len(load_data("f").train[0]) == 1, "they are still there"


def test_own_text_does_not_pass_for_a_source():
    """train.py would take data/demo for the demo: demo.txt needs an --out. A link keeps its own name."""
    for name in ("demo", "tinystories"):
        with pytest.raises(UserError, match=f"data/{name} is for the source {name}; choose another folder with --out"):
            main([write(f"{name}.txt", "one two"), "--tokenizer", "bytes"])
    Path("story.txt").symlink_to("demo.txt")
    assert main(["story.txt", "--tokenizer", "bytes"]) == 0 and load_data("data/story").train


def test_run_program_is_where_errors_are_printed(capsys, monkeypatch):
    """An error of the user's making and Ctrl-C are an exit code and one line; a bug keeps its traceback."""
    def main(argv):
        raise argv[0]

    for raised, code, words in ((UserError("a\nb"), 1, "a b"), (FileExistsError("o"), 1, "o"),
                                (KeyboardInterrupt(), 130, "interrupted; run the same")):
        monkeypatch.setattr(sys, "argv", ["/somewhere/x.py", raised])
        assert prepare_data.run_program(main) == code
        error = capsys.readouterr().err
        assert error.startswith(f"x.py: error: {words}") and error.count("\n") == 1, error
    with pytest.raises(ZeroDivisionError):
        prepare_data.run_program(lambda argv: 1 / 0)


@pytest.mark.parametrize("streams", ["2>&-", "| true"])
def test_closed_streams_and_ascii_terminals_are_no_errors(streams):
    """Where nobody listens, or cannot read a name, the data is made all the same, without a traceback."""
    write("a.txt", "日本語 ü")
    command = f"{shlex.quote(sys.executable)} {shlex.quote(str(ROOT / 'prepare_data.py'))} --tokenizer bytes"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command} --out ü a.txt {streams}"], capture_output=True,
                          text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode == 0 or "true" in streams) and done.stderr == "", (done.returncode, done.stderr)
    assert tokens("ü") == as_ids("日本語 ü") and done.stdout.startswith("?: 1 doc") == (streams == "2>&-"), done.stdout


def test_all_bytes_are_on_the_disk_before_the_name_is(monkeypatch):
    """replacing(): a power cut leaves the old file or the new one, and no empty one."""
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda number: flushed.append((os.fstat(number).st_size, Path("f").read_bytes())))
    write("f", "old")
    with prepare_data.replacing("f") as file:
        file.write(b"new")
    assert flushed == [(3, b"old")] and Path("f").read_bytes() == b"new", flushed


@pytest.mark.slow
def test_memory_is_constant():
    """50 MB of text, half of it in one line, half in many documents, are prepared with 150 MB of private memory."""
    text = " ".join(stories(200)).replace("\n", " ")
    with open("a.txt", "w", encoding="utf-8") as file:
        for end in (" ", f"\n{SEPARATOR}\n"):
            file.writelines([text + end] * int(25e6 / len(text.encode())))
    script = ("import resource, sys, threading, prepare_data; threading.stack_size(1 << 20);"
              "resource.setrlimit(resource.RLIMIT_DATA, (150 << 20,) * 2); prepare_data.main(sys.argv[1:])")
    done = subprocess.run([sys.executable, "-c", script, "a.txt", "--tokenizer", "bytes", "--out", "o"],
                          capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
