"""What prepare_data.py promises: faithful tokens, whole files or none, and one line for whatever goes wrong.

Downloads have a file of their own, test_hub.py; kills are in test_reliability.py.
"""

import os
import random
import shutil
import struct
import subprocess
import sys
from array import array
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
        code = prepare_data.run(main)
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
@pytest.mark.parametrize("block", [17, 18, 19, 30, 64, 1 << 20])
def test_documents_of_a_file(monkeypatch, dress, block):
    """However a file is dressed and read, its documents are the texts between separator lines, each with its end."""
    monkeypatch.setattr(prepare_data, "BLOCK", block)
    texts = ["one\n\ntwo", "drei ü" + "\n" * 40, "  four", f"five {SEPARATOR} five", f"{SEPARATOR}six"]
    text = dress(f"\n{SEPARATOR}\n".join(texts))
    prepare(text, "--val-fraction", "0.4")
    texts[-1] += "\n" * (text[-1] == "\n")
    assert tokens("o", "train") == as_ids(*texts[:3]), bytes(i % 256 for i in tokens("o", "train"))
    assert tokens("o", "val") == as_ids(*texts[3:]), bytes(i % 256 for i in tokens("o", "val"))


@pytest.mark.parametrize("sizes", [(159, 349), (949, 9), (509,)])
def test_few_documents_are_cut_between_tokens(sizes):
    """Where the last documents are far from a tenth of the text, its last tenth is for validation all the same."""
    prepare([letter * size for letter, size in zip("ab", sizes)])
    train, val = len(tokens("o", "train")), len(tokens("o", "val"))
    assert val == round(0.1 * (train + val)), f"{train} and {val} tokens"
    assert all_tokens("o") == as_ids(*(letter * size for letter, size in zip("ab", sizes)))


def test_a_small_demo_keeps_whole_documents_and_its_floor():
    """However few its documents, the last one is for validation, so that val_ce can be compared with the floor."""
    main(["demo", "--out", "o", "--max-tokens", "1500"])
    meta = load_data("o").meta
    assert meta["entropy_floor"] > 0.1 and len(meta["val_documents"]) == 1, meta


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


def test_a_folder_is_its_text_files_without_the_hidden_ones():
    """Its .txt files in any case, sorted. A hidden copy would put validation text into the training text."""
    for name in ("n/b.txt", "n/a.txt", "n/c/D.TXT"):
        write(name, name)
    for name in ("n/x.png", "n/._a.txt", "n/.ipynb_checkpoints/b-checkpoint.txt", "n/__MACOSX/a.txt", "n/c/.git/e.txt"):
        write(name, b"\xff hidden")
    os.rename("n", ".n")  # a folder that is named by the user may be hidden itself
    main([".n", "--out", "o", "--tokenizer", "bytes"])
    assert all_tokens("o") == as_ids("n/a.txt", "n/b.txt", "n/c/D.TXT")


def test_a_shard_is_the_llm_c_format():
    """A shard is 256 little-endian int32 (20240520, 1, n, 0 ...) and n little-endian uint16, read without our code. In
    memory it is writable, as torch wants it; what is written there never reaches the disk.
    """
    prepare("Hello", "--val-fraction", "0.5")
    data = Path("o/train_000000.bin").read_bytes()
    header = struct.unpack("<256i", data[:1024])
    assert header == (20240520, 1, 3, *[0] * 253), header[:5]
    assert struct.unpack("<3H", data[1024:]) == tuple(b"Hel")
    assert struct.unpack("<3H", Path("o/val_000000.bin").read_bytes()[1024:]) == (*b"lo", 256)
    shard = load_data("o").train[0]
    shard[0] = 7
    assert shard.tolist() == [7, *b"el"] and (shard.format, shard.itemsize) == ("H", 2)
    assert Path("o/train_000000.bin").read_bytes() == data


def test_shards_are_cut_anywhere_and_lose_nothing():
    """With any --shard-tokens, the shards one after the other hold the same tokens, and none more than was asked."""
    prepare(stories(30), out="whole")
    for n in (777, len(tokens("whole", "train")), len(tokens("whole", "train")) - 1):
        prepare(stories(30), "--shard-tokens", str(n), out=f"o{n}")
        sizes = [len(shard) for shard in load_data(f"o{n}").train]
        assert all(size == n for size in sizes[:-1]) and 0 < sizes[-1] <= n, sizes
        assert tokens(f"o{n}", "train") == tokens("whole", "train") and tokens(f"o{n}", "val") == tokens("whole", "val")


def test_max_tokens_takes_whole_documents():
    """At most N tokens, of whole documents from the beginning. If not even the first one fits, it is cut and ends."""
    texts = stories(400)
    ends = [*accumulate(len(text.encode()) + 1 for text in texts)]
    for limit in (20_000, ends[99], 10**6):
        prepare(texts, "--max-tokens", str(limit), out=f"o{limit}")
        fit = sum(end <= limit for end in ends)
        assert all_tokens(f"o{limit}") == as_ids(*texts[:fit]), (limit, fit)
    prepare(texts, "--max-tokens", "5", out="o5")
    assert all_tokens("o5") == as_ids(texts[0])[:4] + [256], all_tokens("o5")


def test_the_same_again_is_no_work_and_other_data_is_refused(capsys):
    """Finished data stays: the same command does nothing, another one exits with 1, --overwrite replaces all shards."""
    def times():
        return {path.name: path.stat().st_mtime_ns for path in Path("o").iterdir()}

    prepare(stories(30), "--shard-tokens", "500")
    before = times()
    prepare(stories(30), "--shard-tokens", "500")
    with pytest.raises(UserError, match="add --overwrite"):
        prepare("other text", "--shard-tokens", "500")
    write("b.txt", b"bad \xff text")  # the old data stays until the new tokens are ready
    assert "UTF-8" in failure(capsys, "b.txt", "--out", "o", "--tokenizer", "bytes", "--overwrite")
    assert times() == before
    prepare("other text", "--overwrite")
    assert all_tokens("o") == as_ids("other text")
    assert sorted(times()) == ["meta.json", "train_000000.bin", "val_000000.bin"]


def shard(ids, n=None, magic=20240520, version=1):
    return struct.pack("<3i1012x", magic, version, len(ids) if n is None else n) + array("H", ids).tobytes()


@pytest.mark.parametrize("train, val", [
    ("fineweb_train_000001.bin", "fineweb_val_000000.bin"), ("train_pretrain_000000.bin", "val_pretrain_000000.bin"),
    ("train_retrieval_000000.bin", "val_retrieval_000000.bin"), ("train_medieval-0.bin", "x.val.bin"),
])
def test_foreign_shards_are_gpt2_tokens_and_their_names_say_the_split(train, val):
    """Without meta.json a folder is read as GPT-2 tokens. The split is a part of a name, not letters inside a word."""
    write(f"f/{train}", shard([1, 2])), write(f"f/{val}", shard([65535])), write("f/notes_retrieval.bin", "not a shard")
    data = load_data("f")
    assert (data.tokenizer, data.vocab_size, data.eot, data.meta) == ("gpt2", 50257, 50256, {})
    assert [s.tolist() for s in data.train] == [[1, 2]] and [s.tolist() for s in data.val] == [[65535]]
    assert [path.name for path in data.train_paths] == [train]
    with pytest.raises(UserError, match="token 65535, outside the vocabulary of 50257"):
        main(["--check", "f"])
    with pytest.raises(UserError, match="other data"):  # and somebody's shards are not overwritten unasked
        prepare("text", out="f")
    write("f/train_val_0.bin", shard([1]))
    with pytest.raises(UserError, match="both train and val"):
        load_data("f")


def test_the_fingerprint_names_the_data():
    """Without meta.json: the fingerprint is that of a copy; it changes if a shard is renamed, dropped or added."""
    for folder in "abcde":
        for name, ids in (("1_train.bin", [1, 2]), ("2_train.bin", [3]), ("1_val.bin", [4])):
            write(f"{folder}/{name}", shard(ids))
    os.rename("b/2_train.bin", "b/3_train.bin"), os.remove("c/2_train.bin"), write("d/9_train.bin", shard([1]))
    prints = [load_data(folder).fingerprint for folder in "abcde"]
    assert prints[0] == prints[4] and len(set(prints)) == 4, prints


def test_check_reads_every_byte(capsys):
    """--check accepts whole data and finds any single flipped bit in a shard."""
    prepare("some text")
    assert main(["--check", "o"]) == 0 and "OK" in capsys.readouterr().out
    path, data = Path("o/train_000000.bin"), Path("o/train_000000.bin").read_bytes()
    for at in (500, 1024, len(data) - 1):
        write(path, data[:at] + bytes([data[at] ^ 1]) + data[at + 1:])
        assert "has changed" in failure(capsys, "--check", "o"), f"a bit of byte {at} was flipped"


@pytest.mark.parametrize("argv", [
    "", "demo --check x", "demo --max-tokens 1", "demo --shard-tokens 0", "demo --shard-tokens 2147483648",
    "demo --val-fraction nan", "demo --val-fraction 1", "tinystories --val-fraction 0.1", "demo --max 5"])
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
    b"", b"\1" * 500, shard([]), shard([1, 2]) + b"\0", shard([1, 2], magic=20240801), shard([1, 2], version=2),
    shard([1, 2], n=-1), shard([1, 2])[:-2],
], ids="empty short header odd llama version negative cut".split())
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
    (lambda o: write(o / "meta.json", "[1]"), "meta.json is damaged"),
    (lambda o: write(o / "meta.json", b"\xff"), "meta.json is damaged"),
    (lambda o: [p.unlink() for p in o.iterdir()], "training shard"),
    (lambda o: [p.unlink() for p in o.iterdir() if p.name[0] in "mv"], "validation shard"),
    (lambda o: shutil.rmtree(o), "missing"),
    (lambda o: (shutil.rmtree(o), write(o, "x")), "not a folder"),
])
def test_damaged_folders_are_refused(damage, word):
    """A folder that is not what meta.json says is refused with one line that says what is wrong and what to run."""
    prepare(stories(9))
    damage(Path("o"))
    with pytest.raises(UserError) as caught:
        load_data("o")
    message, ours = str(caught.value), Path("o/meta.json").exists()
    assert word in message and "; run: python prepare_data.py PATH --out o" in message, message
    assert message.endswith(" --overwrite") == ours, f"shards that may be the user's must not be overwritten: {message}"


@pytest.mark.parametrize("raised, code, words", [
    (UserError("a\nb; c"), 1, "x.py: error: a b; c\n"),
    (KeyboardInterrupt(), 130, "x.py: error: interrupted"),
    (OSError(28, "No space left on device"), 1, "x.py: error: [Errno 28] No space left"),
])
def test_run_is_where_errors_are_printed(capsys, monkeypatch, raised, code, words):
    """`run` turns what main raises into an exit code and one line; a bug keeps its traceback."""
    def main(argv):
        raise raised

    monkeypatch.setattr(sys, "argv", ["/somewhere/x.py"])
    assert prepare_data.run(main) == code
    error = capsys.readouterr().err
    assert error.startswith(words) and error.count("\n") == 1, error
    with pytest.raises(ZeroDivisionError):
        prepare_data.run(lambda argv: 1 / 0)


@pytest.mark.parametrize("streams", ["2>&-", "<&- >&- 2>&-", "| true"])
def test_closed_streams_and_ascii_terminals_are_no_errors(streams):
    """Where nobody listens, or cannot read the sample, the data is made all the same, without a traceback."""
    write("a.txt", "日本語 ü")
    command = f'set -o pipefail; "$0" "$1" --tokenizer bytes --out o a.txt {streams}'
    done = subprocess.run(["bash", "-c", command, sys.executable, ROOT / "prepare_data.py"], capture_output=True,
                          text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode == 0 or "true" in streams) and done.stderr == "", (done.returncode, done.stderr)
    assert all_tokens("o") == as_ids("日本語 ü") and ("it begins '???" in done.stdout) == (streams == "2>&-")


def test_write_whole_replaces_all_or_nothing():
    """A write that fails half-way leaves the old file under the name."""
    write("f", "old")
    with pytest.raises(ZeroDivisionError):
        prepare_data.write_whole(Path("f"), (b"x" * (1 // n) for n in (1, 0)))
    assert Path("f").read_bytes() == b"old"


@pytest.mark.slow
def test_memory_is_constant():
    """50 MB of text, in one line or in many documents, is prepared with 150 MB of private memory."""
    words = " ".join(stories(2000)).replace("\n", " ")
    for name, text in (("line.txt", words + " "), ("lines.txt", f"{words[:5000]}\n{SEPARATOR}\n")):
        with open(name, "w", encoding="utf-8") as file:
            for _ in range(int(50e6 / len(text.encode()))):
                file.write(text)
        script = ("import resource, sys, threading, prepare_data; threading.stack_size(1 << 20);"
                  "resource.setrlimit(resource.RLIMIT_DATA, (150 << 20,) * 2); prepare_data.main(sys.argv[1:])")
        done = subprocess.run([sys.executable, "-c", script, name, "--tokenizer", "bytes", "--out", name + ".out"],
                              capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert done.returncode == 0, done.stderr
