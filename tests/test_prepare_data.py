"""What prepare_data.py promises: faithful tokens, whole files or none, and one line for whatever goes wrong.

Downloads have a file of their own, test_hub.py.
"""

import hashlib
import json
import os
import random
import struct
import subprocess
import sys
import time
from array import array
from pathlib import Path

import pytest

import prepare_data
from prepare_data import SEPARATOR, UserError, get_tokenizer, load_data, main, read_shard

ROOT = Path(prepare_data.__file__).parent


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Each test runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)


def gpt2():
    try:
        return get_tokenizer("gpt2")
    except UserError as error:
        pytest.skip(f"needs the GPT-2 vocabulary: {error}")


def failure(capsys, *argv):
    """(exit code, the one line on stderr) of a command that must fail."""
    old, sys.argv = sys.argv, ["prepare_data.py", *map(str, argv)]
    try:
        code = prepare_data.run(main)
    finally:
        sys.argv = old
    lines = capsys.readouterr().err.splitlines()
    assert code in (1, 2) and len(lines) == 1, f"exit {code}, {len(lines)} lines on stderr: {lines}"
    assert lines[0].startswith("prepare_data.py: error: ") and ";" in lines[0], lines[0]
    return code, lines[0]


def tokens(folder, split):
    return [token for tensor in getattr(load_data(folder), split) for token in tensor.tolist()]


def all_tokens(folder):
    return tokens(folder, "train") + tokens(folder, "val")


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def write(path, data):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(data.encode() if isinstance(data, str) else data)
    return str(path)


def as_ids(*documents):
    return [i for document in documents for i in [*document.encode(), 256]]


def stories(n, seed=0):
    draw = random.Random(seed)
    return [
        " ".join(
            draw.choice(["Ein", "kleiner", "Bär", "日本", "once", "upon", "a\n\n time"])
            for _ in range(draw.randint(1, 60))
        )
        for _ in range(n)
    ]


# ---- Tokenizers ------------------------------------------------------------------------------------------------------


def test_bytes_tokenizer_is_the_bytes():
    """ "bytes" gives the UTF-8 bytes of any text, decodes them back, and keeps 256 for the end of a text."""
    encoding, draw = get_tokenizer("bytes"), random.Random(0)
    assert (encoding.n_vocab, encoding.eot_token) == (257, 256)
    for _ in range(100):
        text = (
            "".join(chr(draw.choice([*range(128), 228, 0x65E5, 0x1F600])) for _ in range(draw.randint(0, 300)))
            + SEPARATOR
        )
        ids = encoding.encode_ordinary(text)
        assert bytes(ids) == text.encode() and encoding.decode(ids) == text, repr(text)


def test_gpt2_keeps_the_marker_in_a_line_as_text():
    """A marker inside a line is text: it comes back when decoded, and is never the end-of-text token."""
    encoding = gpt2()
    write("a.txt", f"say {SEPARATOR} twice {SEPARATOR}\nbye")
    assert main(["a.txt", "--out", "o", "--tokenizer", "gpt2"]) == 0
    ids = all_tokens("o")
    assert ids.count(encoding.eot_token) == 1 == ids[-1:].count(50256), ids
    assert encoding.decode(ids[:-1]) == f"say {SEPARATOR} twice {SEPARATOR}\nbye"


def test_no_vocabulary_and_no_network_is_one_line(tmp_path):
    """Without the GPT-2 files and a network, a fresh process says TIKTOKEN_CACHE_DIR in one line and exits with 1."""
    write("a.txt", "text")
    nowhere = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
    done = subprocess.run(
        [sys.executable, ROOT / "prepare_data.py", "a.txt"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, **nowhere, "NO_PROXY": "", "no_proxy": "", "TIKTOKEN_CACHE_DIR": str(tmp_path / "none")},
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "TIKTOKEN_CACHE_DIR" in done.stderr, done.stderr
    assert done.stderr.startswith("prepare_data.py: error: ") and not Path("data").exists(), done.stderr


# ---- Own text --------------------------------------------------------------------------------------------------------


def test_shard_is_the_llm_c_format():
    """A shard is 256 little-endian int32 (20240520, 1, n, 0 ...) and n little-endian uint16, read without our code."""
    write("a.txt", "Hello")
    main(["a.txt", "--out", "o", "--tokenizer", "bytes", "--val-fraction", "0.5"])
    data = Path("o/train_000000.bin").read_bytes()
    header = struct.unpack("<256i", data[:1024])
    assert header == (20240520, 1, 3, *[0] * 253), header[:5]
    assert struct.unpack("<3H", data[1024:]) == tuple(b"Hel")
    assert struct.unpack("<3H", Path("o/val_000000.bin").read_bytes()[1024:]) == (*b"lo", 256)


@pytest.mark.parametrize(
    "dress",
    [
        lambda t: t,
        lambda t: "\ufeff" + t,
        lambda t: t.replace("\n", "\r\n"),
        lambda t: t + "\n",
        lambda t: f"{SEPARATOR}\n{SEPARATOR}\n \n{SEPARATOR}\n{t}\n{SEPARATOR}\n{SEPARATOR}",
    ],
    ids=["plain", "bom", "crlf", "newline", "separators"],
)
@pytest.mark.parametrize("block", [17, 18, 19, 30, 64, 1 << 20])
def test_documents_of_a_file(monkeypatch, dress, block):
    """However a file is dressed and read, its documents are the texts between separator lines, each with its end."""
    monkeypatch.setattr(prepare_data, "BLOCK", block)
    texts = ["one\n\ntwo", "drei ü" + "\n" * 40, "  four", f"five {SEPARATOR} five", f"{SEPARATOR}six"]
    text = dress(f"\n{SEPARATOR}\n".join(texts))
    write("a.txt", text)
    main(["a.txt", "--out", "o", "--tokenizer", "bytes", "--val-fraction", "0.4"])
    texts[-1] += "\n" * (text[-1] == "\n")
    assert tokens("o", "train") == as_ids(*texts[:3]), bytes(i % 256 for i in tokens("o", "train"))
    assert tokens("o", "val") == as_ids(*texts[3:]), bytes(i % 256 for i in tokens("o", "val"))


def test_long_documents_tokenise_as_if_in_one_piece(monkeypatch):
    """A document longer than a block gives exactly the GPT-2 tokens of the whole, runs of white space included."""
    encoding, draw = gpt2(), random.Random(1)
    text = "".join(
        draw.choice(["word", "It's", " ", "  ", "\n", "\n\n", "\t", "42", "!?", "日本", "\u00a0", "\x1c", "\u2003"])
        for _ in range(9000)
    )
    whole = encoding.encode_ordinary(text)
    write("a.txt", text)
    for block in (100, 300, 1000):
        monkeypatch.setattr(prepare_data, "BLOCK", block)
        pieces = [piece for _, job in prepare_data.text_jobs([Path("a.txt")]) for piece in job()]
        ids = [i for piece, _ in pieces for i in encoding.encode_ordinary(piece)]
        assert len(pieces) > 5 and [end for _, end in pieces].count(True) == 1, (block, len(pieces))
        assert ids == whole, f"blocks of {block}: {len(ids)} tokens instead of {len(whole)}"


def test_workers_do_not_change_a_byte(monkeypatch):
    """1, 2 and 4 threads write the same files, meta.json included."""
    monkeypatch.setattr(prepare_data, "BLOCK", 200)
    write("a.txt", f"\n{SEPARATOR}\n".join(stories(300)))
    encode = get_tokenizer("bytes").encode_ordinary

    class Uneven:
        """A tokenizer that takes longer for some pieces, so that threads finish out of order."""

        eot_token, n_vocab, decode = 256, 257, get_tokenizer("bytes").decode

        def encode_ordinary(self, text):
            time.sleep(len(text) % 7 / 2000)
            return encode(text)

    monkeypatch.setattr(prepare_data, "get_tokenizer", lambda name: Uneven())
    for workers in (1, 2, 4):
        main(
            [
                "a.txt",
                "--out",
                f"o{workers}",
                "--tokenizer",
                "bytes",
                "--workers",
                str(workers),
                "--shard-tokens",
                "5000",
            ]
        )
    assert contents("o1") == contents("o2") == contents("o4")


def test_shards_are_cut_anywhere_and_lose_nothing():
    """With any --shard-tokens, the shards one after the other hold the same tokens, and none more than was asked."""
    write("a.txt", f"\n{SEPARATOR}\n".join(stories(30)))
    main(["a.txt", "--out", "whole", "--tokenizer", "bytes"])
    for n in (1000, 777, len(tokens("whole", "train")), len(tokens("whole", "train")) - 1):
        main(["a.txt", "--out", f"o{n}", "--tokenizer", "bytes", "--shard-tokens", str(n)])
        sizes = [len(shard) for shard in load_data(f"o{n}").train]
        assert all(size == n for size in sizes[:-1]) and 0 < sizes[-1] <= n, sizes
        assert tokens(f"o{n}", "train") == tokens("whole", "train") and tokens(f"o{n}", "val") == tokens("whole", "val")


def test_max_tokens_takes_whole_documents():
    """At most N tokens, of whole documents from the beginning; a single long document is cut and still ends."""
    texts = stories(40)
    write("a.txt", f"\n{SEPARATOR}\n".join(texts))
    for limit in (2000, 2001, 5, 10**6):
        main(["a.txt", "--out", f"o{limit}", "--tokenizer", "bytes", "--max-tokens", str(limit)])
        ids = all_tokens(f"o{limit}")
        fit = max(n for n in range(41) if len(as_ids(*texts[:n])) <= limit)
        assert ids == (as_ids(*texts[:fit]) if fit else as_ids(texts[0])[: limit - 1] + [256]), (limit, len(ids), fit)


def test_folder_is_its_txt_files_in_order():
    """A folder stands for its .txt files, sorted, one document each; other files are left alone."""
    for name, text in (("n/b.txt", "B"), ("n/a.txt", "A"), ("n/c/d.txt", "D"), ("n/x.png", b"\xff")):
        write(name, text)
    main(["n", "--out", "o", "--tokenizer", "bytes"])
    assert all_tokens("o") == as_ids("A", "B", "D")


def test_final_line_counts(capsys):
    """The last line gives documents, tokens, shards, bytes, mean length and how the text begins; so does meta.json."""
    write("a.txt", f"\n{SEPARATOR}\n".join(["abc"] * 20))
    main(["a.txt", "--out", "o", "--tokenizer", "bytes"])
    line, meta = capsys.readouterr().out.splitlines()[-1], json.loads(Path("o/meta.json").read_text(encoding="utf-8"))
    for word in (
        "20 documents",
        "80 tokens",
        "8 of them",
        "2 shards",
        f"{2 * 1024 + 160:,} bytes",
        "4.0 tokens per",
        "'abc",
    ):
        assert word in line, f"{word!r} is not in {line!r}"
    assert (meta["documents"], meta["tokens"], meta["vocab_size"], meta["eot"]) == (20, 80, 257, 256), meta
    for shard in meta["shards"]:
        assert shard["sha256"] == hashlib.sha256(Path("o", shard["name"]).read_bytes()).hexdigest(), shard


def test_the_same_again_is_no_work_and_other_data_is_refused(capsys):
    """Finished data stays: the same command does nothing, another one exits with 2, --overwrite replaces all shards."""
    write("a.txt", f"\n{SEPARATOR}\n".join(stories(30)))
    command = ["a.txt", "--out", "o", "--tokenizer", "bytes", "--shard-tokens", "500"]
    main(command)
    before = {path.name: path.stat().st_mtime_ns for path in Path("o").iterdir()}
    assert main(command) == 0 and {path.name: path.stat().st_mtime_ns for path in Path("o").iterdir()} == before
    write("a.txt", "other text, and not much of it")
    code, line = failure(capsys, *command)
    assert code == 2 and "--overwrite" in line, line
    assert main([*command, "--overwrite"]) == 0
    assert all_tokens("o") == as_ids("other text, and not much of it")
    assert sorted(contents("o")) == ["meta.json", "train_000000.bin", "val_000000.bin"]


def test_failed_overwrite_keeps_the_old_data(capsys):
    """--overwrite with text that turns out to be bad leaves the folder as it was."""
    write("a.txt", "good text")
    main(["a.txt", "--out", "o", "--tokenizer", "bytes"])
    before = contents("o")
    write("b.txt", b"bad \xff text")
    assert failure(capsys, "b.txt", "--out", "o", "--tokenizer", "bytes", "--overwrite")[0] == 1
    assert contents("o") == before


def test_demo_knows_its_floor():
    """The demo needs less than 10 s of one core; floor and val_documents describe the documents of its val shard."""
    began = time.process_time()
    assert main(["demo", "--out", "d"]) == 0
    seconds, data = time.process_time() - began, load_data("d")
    documents, ids = list(prepare_data.demo_documents()), tokens("d", "val")
    spans = data.meta["val_documents"]
    held_out = documents[-len(spans) :]
    assert seconds < 10 and len(spans) >= 300, f"{seconds:.1f} s, {len(spans)} held-out documents"
    assert ids == as_ids(*(text for _, text, _ in held_out)), "the val shard is not the last documents"
    ends = [0]
    for (kind, first, end), (true_kind, text, _) in zip(spans, held_out, strict=True):
        assert (kind, first, end) == (true_kind, ends[-1], ends[-1] + len(text) + 1), (kind, first, end)
        ends.append(end)
    floor = -sum(log_prob for _, _, log_prob in held_out) / len(ids)
    assert abs(data.meta["entropy_floor"] - floor) < 1e-9, f"{data.meta['entropy_floor']} instead of {floor}"
    assert (data.tokenizer, data.vocab_size, data.eot) == ("bytes", 257, 256)


# ---- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, word",
    [
        (["demo", "--max-tokens", "nan"], "nan"),
        (["demo", "--max-tokens", "inf"], "inf"),
        (["demo", "--max-tokens", "-1"], "-1"),
        (["demo", "--max-tokens", "0"], "0"),
        (["demo", "--max-tokens", "1e3"], "1e3"),
        (["demo", "--max-tokens", "9" * 30], "999"),
        (["demo", "--max-tokens", "9" * 5000], "999"),
        (["demo", "--shard-tokens", "0"], "0"),
        (["demo", "--shard-tokens", str(2**31)], "2147483647"),
        (["demo", "--val-fraction", "nan"], "nan"),
        (["demo", "--val-fraction", "0"], "0"),
        (["demo", "--val-fraction", "1"], "1"),
        (["demo", "--val-fraction", "x"], "x"),
        (["demo", "--workers", "0"], "0"),
        (["demo", "--workers", "1000000"], "256"),
        (["openwebtext", "--subsets", "22"], "21"),
        (["demo", "--subsets", "1"], "openwebtext"),
        (["tinystories", "--val-fraction", "0.1"], "validation"),
        (["demo", "--max", "5"], "--max-tokens"),
        (["demo", "--wrokers", "2"], "--workers"),
        (["demo", "--tokenizer", "gpt3"], "gpt2"),
        (["tinystorys"], "tinystories"),
        ([], "demo"),
        (["demo", "--check", "x"], "--check"),
        (["demo", "--out"], "--out"),
        (["big.txt", "--tokenizer", "bytes", "--shard-tokens", "1"], "shard-tokens"),
        (["demo", "--overwrite=yes"], "--overwrite"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_wrong_usage_is_exit_2(capsys, argv, word):
    """A flag that cannot be is one line on stderr that says so, exit code 2, and nothing is written."""
    write("big.txt", "x" * 100_000)
    code, line = failure(capsys, *argv)
    assert code == 2 and word in line, f"exit {code}: {line}"
    assert not list(Path().rglob("*.bin"))


def test_underscores_are_dashes_in_flags_and_nowhere_else():
    """--a_b and --a-b are one flag; values, and what follows "=", keep their underscores."""
    parser = prepare_data.Parser(prog="x")
    parser.add_argument("--one-flag")
    parser.add_argument("words", nargs="*")
    assert parser.parse_args(["--one_flag=a_b--c_d"]).one_flag == "a_b--c_d"
    options = parser.parse_args(["--one_flag", "a_b", "c_d", "--", "e_f"])
    assert (options.one_flag, options.words) == ("a_b", ["c_d", "e_f"])
    assert parser.parse_args(["--one-flag", "--a_b is text"]).one_flag == "--a_b is text"


@pytest.mark.parametrize(
    "make, word",
    [
        (lambda: "missing.txt", "missing.txt"),
        (lambda: write("e.txt", ""), "empty"),
        (lambda: write("s.txt", " \n\n"), "empty"),
        (lambda: write("s.txt", f"{SEPARATOR}\n{SEPARATOR}\n"), "empty"),
        (lambda: write("x.txt", b"0123456789\xffabc"), "0xff at offset 10"),
        (lambda: write("b.txt", b"\xef\xbb\xbfab\xfe"), "0xfe at offset 5"),
        (lambda: write("u.txt", b"caf\xc3"), "0xc3 at offset 3"),
        (lambda: write("z.txt", b"a\0b"), "zero"),
        (lambda: os.path.dirname(write("d/x.md", "x")), "no .txt"),
        (lambda: os.mkfifo("p.txt") or "p.txt", "p.txt"),
        (lambda: write("o", "file") and write("a.txt", "x"), "o"),
    ],
)
def test_bad_input_is_exit_1(capsys, make, word):
    """Text that cannot be used is one line that names it, exit code 1, and leaves no shard behind."""
    code, line = failure(capsys, make(), "--out", "o", "--tokenizer", "bytes")
    assert code == 1 and word in line, f"exit {code}: {line}"
    left = [path for path in Path().rglob("*") if path.suffix in (".bin", ".part", ".tmp")]
    assert not left and not Path("o", prepare_data.UNFINISHED).exists(), left


def test_offset_of_a_bad_byte_is_right_in_later_blocks(capsys, monkeypatch):
    """The offset of a byte that is not UTF-8 counts from the beginning of the file, wherever blocks were cut."""
    monkeypatch.setattr(prepare_data, "BLOCK", 7)
    for at in (*range(20, 30), *range(8185, 8195), 20_000):  # Python decodes 8192 bytes at a time
        write("x.txt", ("\n" * (at % 2) + "ä" * (at // 2)).encode() + b"\xfe" + b"rest")
        assert f"0xfe at offset {at});" in failure(capsys, "x.txt", "--out", "o", "--tokenizer", "bytes")[1]


def shard(ids, n=None, magic=20240520, version=1, order="<"):
    return struct.pack(order + "3i1012x", magic, version, len(ids) if n is None else n) + array("H", ids).tobytes()


GOOD = list(range(100))
BAD_SHARDS = {
    "empty": b"",
    "short": b"\1" * 500,
    "header only": shard([]),
    "odd": shard(GOOD) + b"\0",
    "magic": shard(GOOD, magic=1),
    "llama": shard(GOOD, magic=20240801),
    "version": shard(GOOD, version=2),
    "negative": shard(GOOD, n=-1),
    "cut": shard(GOOD)[:-20],
    "long": shard(GOOD) + bytes(20),
    "big-endian": shard(GOOD, order=">"),
    "raw": array("H", GOOD).tobytes() * 9,
}


@pytest.mark.parametrize("kind", BAD_SHARDS)
@pytest.mark.parametrize("foreign", [True, False])
def test_damaged_shards_are_refused(kind, foreign):
    """Whatever is wrong with a shard, training and --check hear of it at the start, with its name and what to run."""
    write("a.txt", f"\n{SEPARATOR}\n".join(stories(9)))
    main(["a.txt", "--out", "o", "--tokenizer", "bytes"])
    if foreign:
        Path("o/meta.json").unlink()
    write("o/train_000000.bin", BAD_SHARDS[kind])
    for call in (load_data, lambda folder: main(["--check", folder])):
        with pytest.raises(UserError, match="train_000000.bin .*;.*prepare_data.py") as caught:
            call("o")
        assert caught.value.code == 1 and "\n" not in str(caught.value)


def test_every_header_is_read_or_refused():
    """300 random headers are refused, or are those of a whole shard; nothing else is raised."""
    draw = random.Random(0)
    for _ in range(300):
        data = bytearray(shard(GOOD))
        for _ in range(draw.randint(1, 3)):
            data[draw.randrange(12)] = draw.choice([0, 1, 255, draw.randrange(256)])
        write("t_train.bin", bytes(data[: draw.choice([len(data), draw.randrange(len(data))])]))
        try:
            read_shard("t_train.bin")
            assert Path("t_train.bin").read_bytes() == shard(GOOD), data[:12]
        except UserError:
            pass


@pytest.mark.parametrize(
    "damage, word",
    [
        (lambda o: (o / "val_000000.bin").unlink(), "val_000000.bin is missing"),
        (lambda o: write(o / "x_train.bin", shard(GOOD)), "x_train.bin"),
        (lambda o: write(o / "meta.json", "{"), "meta.json is damaged"),
        (lambda o: write(o / "meta.json", "[]"), "meta.json is damaged"),
        (lambda o: write(o / "meta.json", "{}"), "meta.json is damaged"),
        (lambda o: write(o / "meta.json", b"\xff"), "meta.json is damaged"),
        (
            lambda o: write(o / "meta.json", (o / "meta.json").read_text().replace("train_0", "../o/train_0")),
            "/train_000000.bin",
        ),
        (lambda o: write(o / "train_000000.bin", shard(GOOD)), "100 tokens"),
        (lambda o: [p.unlink() for p in o.iterdir()], "training shard"),
        (lambda o: [p.unlink() for p in o.iterdir() if p.name[0] in "mv"], "validation shard"),
        (lambda o: ((o / "meta.json").unlink(), write(o / prepare_data.UNFINISHED, "")), "not finished"),
        (lambda o: ([p.unlink() for p in o.iterdir()], o.rmdir()), "missing"),
        (lambda o: ([p.unlink() for p in o.iterdir()], o.rmdir(), write(o, "x")), "not a folder"),
    ],
)
def test_damaged_folders_are_refused(damage, word):
    """A folder that is not what meta.json says is refused with one line that says what is wrong and what to run."""
    write("a.txt", f"\n{SEPARATOR}\n".join(stories(9)))
    main(["a.txt", "--out", "o", "--tokenizer", "bytes"])
    damage(Path("o"))
    with pytest.raises(UserError) as caught:
        load_data("o")
    assert word in str(caught.value) and "; run: python prepare_data.py PATH --out o" in str(caught.value), caught.value


def test_foreign_shards_are_gpt2_tokens():
    """A folder of llm.c shards, without meta.json, is read as GPT-2 tokens; names decide about the split."""
    for name, ids in (
        ("fineweb_train_000001.bin", [1, 2]),
        ("fineweb_train_000002.bin", [3]),
        ("fineweb_val_000000.bin", [65535]),
    ):
        write(f"f/{name}", shard(ids))
    data = load_data("f")
    assert (data.tokenizer, data.vocab_size, data.eot, data.meta) == ("gpt2", 50257, 50256, {})
    assert [t.tolist() for t in data.train] == [[1, 2], [3]] and [t.tolist() for t in data.val] == [[65535]]
    assert [path.name for path in data.train_paths] == ["fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    with pytest.raises(UserError, match="token 65535, outside the vocabulary of 50257"):
        main(["--check", "f"])


def test_foreign_shards_are_never_overwritten_unasked(capsys):
    """Preparing into a folder of somebody's shards exits with 2 and leaves them."""
    write("o/fineweb_train_0.bin", shard(GOOD)), write("o/fineweb_val_0.bin", shard(GOOD)), write("a.txt", "x")
    before = contents("o")
    assert failure(capsys, "a.txt", "--out", "o", "--tokenizer", "bytes")[0] == 2
    assert contents("o") == before


def test_fingerprint_names_the_data():
    """The fingerprint is the same for the same data; it changes if a shard is swapped, renamed, dropped or added."""
    for folder in "abcde":
        for name, ids in (("1_train.bin", [1, 2]), ("2_train.bin", [3]), ("1_val.bin", [4])):
            write(f"{folder}/{name}", shard(ids))
    os.rename("b/2_train.bin", "b/3_train.bin"), os.remove("c/2_train.bin"), write("d/9_train.bin", shard([1]))
    prints = [load_data(folder).fingerprint for folder in "abcde"]
    assert prints[0] == prints[4] and len(set(prints)) == 4, prints
    for folder, text in (("x", "same length"), ("y", "same lenght"), ("z", "same length")):
        main([write(f"{folder}.txt", text), "--out", folder, "--tokenizer", "bytes"])
    x, y, z = (load_data(folder).fingerprint for folder in "xyz")
    assert x == z != y, "the content of a shard is not in its fingerprint"


def test_check_reads_every_byte(capsys):
    """--check accepts whole data and finds any single flipped bit in a shard."""
    main([write("a.txt", "some text"), "--out", "o", "--tokenizer", "bytes"])
    assert main(["--check", "o"]) == 0 and "all right" in capsys.readouterr().out
    path, data = Path("o/train_000000.bin"), Path("o/train_000000.bin").read_bytes()
    for at in (500, 1024, len(data) - 1):
        write(path, data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        assert "has changed" in failure(capsys, "--check", "o")[1], f"a bit of byte {at} was flipped"


@pytest.mark.parametrize(
    "raised, code, words",
    [
        (UserError("a\nb; c", code=2), 2, "x.py: error: a b; c\n"),
        (KeyboardInterrupt(), 130, "x.py: error: interrupted"),
        (OSError(28, "No space left on device", "f"), 1, "x.py: error: f: No space left"),
        (None, 0, ""),
    ],
)
def test_run_is_where_errors_are_printed(capsys, monkeypatch, raised, code, words):
    """`run` turns what main raises into an exit code and one line; a bug keeps its traceback."""

    def main(argv):
        if raised:
            raise raised

    monkeypatch.setattr(sys, "argv", ["/somewhere/x.py"])
    assert prepare_data.run(main) == code
    error = capsys.readouterr().err
    assert error.startswith(words) and error.count("\n") == (raised is not None), error
    with pytest.raises(ZeroDivisionError):
        prepare_data.run(lambda argv: 1 / 0)


def test_ascii_terminals_and_closed_pipes(tmp_path):
    """A sample that stdout cannot encode is no reason to fail, and neither is a reader who has gone."""
    write("a.txt", "日本語 ü")
    script = f"{sys.executable} {ROOT / 'prepare_data.py'} a.txt --tokenizer bytes --out"
    done = subprocess.run(
        f"{script} o; {script} o --overwrite | true",
        shell=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"},
    )
    assert done.stderr == "" and "it begins '???" in done.stdout, (done.stdout, done.stderr)


# ---- Kills -----------------------------------------------------------------------------------------------------------

KILLER = """
import os, resource, signal, sys
sys.path.insert(0, {root!r})
import prepare_data

def attempt(argv, kill_at=None, limit=None):
    pid = os.fork()
    if pid == 0:
        events = 0
        def hook(event, arguments):
            nonlocal events
            if event in ("os.rename", "os.remove", "os.mkdir") or event == "open" and {out!r} in str(arguments[0]):
                events += 1
                if events == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
        if kill_at:
            sys.addaudithook(hook)
        if limit:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            code = prepare_data.main(argv)
        except BaseException as error:
            print("ERROR", repr(error), flush=True)
            code = 1
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""


def killer(body):
    """Run `body` in a process of its own, where attempt(argv, kill_at, limit) forks a preparation and kills it."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLER.format(root=str(ROOT), out="o/") + body],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_write_whole_replaces_all_or_nothing():
    """A write that fails half-way leaves the old file under the name."""
    write("f", "old")
    with pytest.raises(ZeroDivisionError):
        prepare_data.write_whole(Path("f"), (b"x" * (1 // n) for n in (1, 0)))
    assert Path("f").read_bytes() == b"old"


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("again", [False, True], ids=["fresh", "overwrite"])
def test_killed_at_any_file_event_and_run_again_gives_the_same(again, every):
    """Killed at any file event, or in a write: what is left is complete or known as unfinished, and a second run ends
    the same. (The short run tries every third event.)
    """
    write("a.txt", f"\n{SEPARATOR}\n".join(stories(60))), write("b.txt", "what was there before")
    argv = ["a.txt", "--out", "o", "--tokenizer", "bytes", "--shard-tokens", "2000", "--workers", "2"]
    main(argv)
    Path("o").rename("right")
    main(["b.txt", "--out", "before", "--tokenizer", "bytes", "--shard-tokens", "3"])
    print(
        killer(f"""
import hashlib, pathlib, shutil
def contents(folder):
    return {{path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir()}}
argv, right, before, killed = {argv!r}, contents("right"), contents("before"), 0
for kill_at in range({every}, 1000, {every}):
    shutil.rmtree("o", ignore_errors=True)
    if {again}:
        shutil.copytree("before", "o")
    code = attempt(argv + ["--overwrite"] * {again}, kill_at)
    if code == 0:
        break
    assert code == -9, code
    killed += 1
    try:
        data = prepare_data.load_data("o")
    except prepare_data.UserError as error:
        left = contents("o") if pathlib.Path("o").exists() else ()
        assert "not finished" in str(error) or not left, (kill_at, error, list(left))
    else:
        found = {{n: d for n, d in contents("o").items() if n.endswith((".bin", ".json"))}}
        assert found in (right, before), (kill_at, sorted(found))
    assert attempt(argv + ["--overwrite"] * {again}) == 0, kill_at
    assert contents("o") == right, (kill_at, sorted(contents("o")), sorted(right))
assert killed >= 15 // {every}, killed
for limit in (1500, 4000, 9000, 21000):
    shutil.rmtree("o", ignore_errors=True)
    if {again}:
        shutil.copytree("before", "o")
    assert attempt(argv + ["--overwrite"] * {again}, limit=limit) == -25, limit
    for path in pathlib.Path("o").glob("*.bin"):
        prepare_data.read_shard(path)
    assert attempt(argv + ["--overwrite"] * {again}) == 0 and contents("o") == right, limit
print(killed, "kills")
""")
    )


@pytest.mark.slow
def test_memory_is_bounded():
    """200 MB of text, in one line or in many documents, is prepared in less than 500 MB of memory."""
    words = " ".join(stories(2000)).replace("\n", " ")
    for name, text in (("line.txt", words + " "), ("lines.txt", f"{words[:5000]}\n{SEPARATOR}\n")):
        with open(name, "w", encoding="utf-8") as file:
            for _ in range(int(200e6 / len(text.encode()))):
                file.write(text)
        script = (
            "import re, sys, prepare_data; prepare_data.main(sys.argv[1:]);"  # ru_maxrss would count our own peak
            "print(int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) // 1024)"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, name, "--tokenizer", "bytes", "--out", name + ".out", "--workers", "4"],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 0, done.stderr
        megabytes = int(done.stdout.split()[-1])
        print(name, megabytes, "MB")
        assert megabytes < 500, f"{name}: {megabytes} MB"
