"""Text in, token shards out, and shards read back: all that train.py needs to know about data.

    python prepare_data.py demo                  # the corpus embedded below: no network, a few seconds
    python prepare_data.py tinystories           # 2.2 GB from the Hugging Face hub
    python prepare_data.py openwebtext           # 21 files of about 630 MB; --subsets 1 takes only the first
    python prepare_data.py story.txt notes/      # your own UTF-8 text: files, or folders of .txt files

Every source goes the same way, in constant memory: documents -> tokens -> one temporary file -> shards in data/NAME or
--out. A preparation that was killed can be run again and gives the same shards. Each of your own files is one document,
or several where lines that are exactly <|endoftext|> separate them.

A shard is 256 little-endian int32 (20240520, 1, number of tokens, zeros), then uint16 tokens. This is the format of
llm.c and modded-nanogpt, so their shards can be trained on too: without meta.json, a folder is read as GPT-2 tokens.
In llm.c's, end-of-text stands before a document; here it follows each one. meta.json says what was written.

UserError, run_program, replacing and lock, which train.py uses too, stand first. The text of the demo stands last.
Left out: shuffling (training draws random windows), cleaning, finding similar documents, training a tokenizer.
"""

import argparse
import hashlib
import json
import lzma
import math
import mmap
import os
import random
import re
import shlex
import shutil
import struct
import sys
import tarfile
import tempfile
import time
import urllib.request
from array import array
from bisect import bisect
from contextlib import contextmanager
from http.client import HTTPException
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import NamedTuple

import tiktoken
from tqdm import tqdm

SOURCES = ("demo", "tinystories", "openwebtext")
SEPARATOR = "<|endoftext|>"  # on a line of its own between two documents of a text file
BLOCK = 1 << 14  # characters or bytes read at once; longer documents are tokenised in pieces of about this size
SHARD_TOKENS = 10**8


class UserError(Exception):
    """What the user can fix, in one line: what is wrong; what to do about it."""


def run_program(main):
    """Run main(argv) and return the exit code. Errors that the user can fix become one line on stderr."""
    # Python sets a closed stream to None, and tqdm cannot write to None.
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    sys.stdout.reconfigure(errors="replace")  # a sample may hold what an ASCII terminal cannot show
    try:
        code = main(sys.argv[1:]) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of `... | head` has left; Python's last flush would complain again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        code, message = 130, "interrupted; run the same command again"
    except (UserError, OSError) as error:
        code, message = 1, " ".join(str(error).split())
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    return code


@contextmanager
def replacing(path):
    """An open binary file that becomes `path` at the end of the with block: a kill at any moment leaves the old file or
    the new one. After an exception the old one is there, and the half file is not.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave the name on an empty file
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def lock(file, wait=True):
    """Locks an open file until it is closed, or its process is dead. Returns False where another one has the lock."""
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        pass  # Windows and some network drives have no locks: go on without one
    return True


# ---- Shards ----------------------------------------------------------------------------------------------------------
HEADER = struct.Struct("<3i1012x")  # magic, version, tokens
MAGIC = 20240520
UNFINISHED = b"{}"  # meta.json while its shards are being replaced: without one they would pass for foreign shards


class TokenData(NamedTuple):
    """A folder of shards. Its tokens are memory-mapped: they cost no memory until they are read."""

    tokenizer: str
    vocab_size: int
    eot: int  # end-of-text
    train: list[memoryview]  # of uint16
    val: list[memoryview]
    meta: dict  # meta.json; empty for foreign shards
    fingerprint: str  # of the shards' names, lengths and, where meta.json has them, sha256 sums: data may be moved


def read_shard(path):
    """The tokens of a shard: a memoryview of uint16 on a private memory map. Raises UserError if damaged.

    A slice becomes a tensor without a copy, as it is writable: torch.frombuffer(tokens[a:b], dtype=torch.uint16).
    """
    with open(path, "rb") as file:
        magic, version, n = HEADER.unpack(file.read(HEADER.size).ljust(HEADER.size, b"\0"))
        size = os.fstat(file.fileno()).st_size - HEADER.size
        if (magic, version) != (MAGIC, 1) or n < 1 or size != 2 * n:
            raise UserError(f"{path} is not a whole shard of 16-bit tokens (header {magic}, {version}, {n}; then {size}"
                            " bytes); get it again, or make it again with prepare_data.py --overwrite")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))[HEADER.size:].cast("H")


def write_shards(file, n_train, total, folder):
    """The first n_train tokens of a file become training shards, the others validation shards -> meta["shards"]."""
    file.flush()
    tokens, shards = memoryview(mmap.mmap(file.fileno(), 0)).cast("H"), []
    for name, first, last in (("train", 0, n_train), ("val", n_train, total)):
        for i, start in enumerate(range(first, last, SHARD_TOKENS)):
            path, chunk = folder / f"{name}_{i:06d}.bin", tokens[start:min(start + SHARD_TOKENS, last)]
            with replacing(path) as shard:
                shard.write(HEADER.pack(MAGIC, 1, len(chunk)))
                shard.write(chunk)
            shards.append({"name": path.name, "tokens": len(chunk), "sha256": sha256_of(path)})
    return shards


def sha256_of(path):
    """Hex sha256 of a file."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            sha256.update(block)
    return sha256.hexdigest()


def split_of(name):
    """Returns "train" or "val" for names like fineweb_train_000001.bin, "" for others."""
    words = re.split("[_.-]", name)
    return next((split for split in ("train", "val") if split in words and name.endswith(".bin")), "")


def is_finished(folder):
    """Whether a preparation of this folder came to its end."""
    meta_path = Path(folder, "meta.json")
    return meta_path.exists() and meta_path.read_bytes() != UNFINISHED


def load_data(folder):
    """The TokenData of a folder, after a look at the names, sizes and headers of its shards. Raises UserError."""
    folder, meta_path = Path(folder), Path(folder, "meta.json")
    source = folder.name if folder.name in SOURCES else "PATH"
    hint = f"; run: python prepare_data.py {source} --out {shlex.quote(str(folder))}"
    if not folder.is_dir():
        raise UserError(f"{folder} is {'not a folder' if folder.exists() else 'missing'}{hint}")
    meta, sizes, sums = {}, {}, {}
    tokenizer, vocab_size, eot = "gpt2", 50257, 50256  # of foreign shards
    if meta_path.exists():
        hint += " --overwrite"  # only what prepare_data.py made may be replaced
        try:
            meta = json.loads(meta_path.read_bytes())
            if not meta:
                raise UserError(f"{folder} is not finished, its preparation was interrupted{hint}")
            tokenizer, vocab_size, eot = meta["tokenizer"], meta["vocab_size"], meta["eot"]
            sizes = {shard["name"]: shard["tokens"] for shard in meta["shards"]}
            sums = {shard["name"]: shard["sha256"] for shard in meta["shards"]}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{meta_path} is damaged ({type(error).__name__}){hint}") from error
    shards = {path.name: read_shard(path) for path in sorted(folder.iterdir()) if split_of(path.name)}
    for name in sorted({*shards, *sizes}) if meta else ():
        tokens, n = shards.get(name, ()), sizes.get(name, 0)  # one that is missing counts as empty
        if len(tokens) != n:
            raise UserError(f"{folder / name} has {len(tokens)} tokens, but {n} according to meta.json{hint}")
    train, val = ([tokens for name, tokens in shards.items() if split_of(name) == split] for split in ("train", "val"))
    if not (train and val):
        hint = hint if meta or not shards else "; add one"  # prepare_data.py leaves foreign shards alone
        raise UserError(f"{folder} has no {'validation' if train else 'training'} shard{hint}")
    contents = [(name, len(tokens), sums.get(name)) for name, tokens in shards.items()]
    return TokenData(tokenizer, vocab_size, eot, train, val, meta, hashlib.sha256(repr(contents).encode()).hexdigest())


# ---- Documents to tokens ---------------------------------------------------------------------------------------------
# A source is a generator of pieces: (text, is_end). A document may come in several pieces, so that a long one need not
# be held in memory.


def get_tokenizer(name):
    """The tiktoken.Encoding "gpt2", or "bytes": byte values, and token 256 for end-of-text. Raises UserError."""
    if name == "bytes":  # nothing is ever merged: the pattern only keeps short what is looked at in one go
        return tiktoken.Encoding(name, pat_str="(?s:.{1,64})", mergeable_ranks={bytes([i]): i for i in range(256)},
                                 special_tokens={SEPARATOR: 256})
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # no network, or not the files that tiktoken knows
        raise UserError(f"no {name} vocabulary ({type(error).__name__}); set TIKTOKEN_CACHE_DIR to a folder that has"
                        " it, connect to the network once, or use --tokenizer bytes") from error


def read_text(path, errors="strict"):
    """The pieces of a UTF-8 file. Lines that are SEPARATOR stand between documents; blank documents are left out.

    A byte order mark is dropped, CRLF and CR become LF. Long documents are cut where a space follows a word, if any
    does: no GPT-2 token goes across. With errors="strict", raises UserError for a file that is not UTF-8 text.
    """
    text, was_cut, begins_line = "", False, True  # was_cut: `text` continues a document
    with open(path, encoding="utf-8-sig", errors=errors) as file:
        try:
            while line := file.readline(BLOCK):  # a longer line comes in parts
                if errors == "strict" and "\0" in line:
                    raise UserError(f"{path} holds zero bytes, so it may be UTF-16; convert it to UTF-8 first")
                if begins_line and line.removesuffix("\n") == SEPARATOR:
                    if was_cut or text.strip():
                        yield text.removesuffix("\n"), True
                    text, was_cut = "", False
                else:
                    text += line
                begins_line = line.endswith("\n")
                if len(text) > BLOCK:
                    word = re.match(r"(?s).*\S(?=[ \n])", text)
                    cut = word.end() if word else len(text) - 1  # a newline at its end may belong to a separator
                    yield text[:cut], False
                    text, was_cut = text[cut:], True
        except UnicodeDecodeError as error:
            at = file.buffer.tell() - len(error.object) + error.start  # its buffer was read up to tell()
            raise UserError(f"{path} is not UTF-8 (byte 0x{error.object[error.start]:02x} at offset {at}); convert it"
                            " first") from error
    if was_cut or text.strip():
        yield text, True


def write_tokens(encoding, file, pieces, limit, paths):
    """Append the tokens of all documents to an open file; return where in the file, in tokens, each document ends.

    limit: a place in the file, in tokens, or None. Documents are kept as long as they end before or at it. If not even
    the first does, it is cut. paths: of the texts, for the progress bar. Raises UserError where there is no document.
    """
    begin = written = file.tell() // 2
    ends, total = array("Q"), sum(path.stat().st_size for path in paths) or None
    with tqdm(desc="tokenising", total=total, unit="B", unit_scale=True, disable=None) as bar:
        while not (limit and written > limit) and (batch := list(islice(pieces, 64))):
            for (text, is_end), tokens in zip(batch, encoding.encode_ordinary_batch([text for text, _ in batch])):
                if is_end:
                    tokens.append(encoding.eot_token)
                    ends.append(written + len(tokens))
                file.write(array("H", tokens))
                written += len(tokens)
                bar.update(len(text.encode()))
    if written == begin:
        raise UserError("there is no document in the source; is it the right one?")
    del ends[bisect(ends, limit or written):]  # the documents that go beyond the limit
    if not ends:
        ends.append(limit)
        file.seek(2 * limit - 2)  # a token has two bytes
        file.write(array("H", [encoding.eot_token]))
    file.seek(2 * ends[-1])  # where the next call goes on; what lies behind is overwritten or ignored
    return ends


# ---- The Hugging Face hub --------------------------------------------------------------------------------------------
# Pinned commits: next year's download is the same. Where the hub answers 404, look up the new path and edit it here.
TINYSTORIES = ("datasets/roneneldan/TinyStories/resolve/f54c09fd23315a6f9c86f9dc80f725de7d8f9c64/"
               "TinyStoriesV2-GPT4-{}.txt")
OPENWEBTEXT = ("datasets/Skylion007/openwebtext/resolve/f3808c30e817981b845ec549c43e82bb467d8144/"
               "subsets/urlsf_subset{:02d}.tar")
GIGABYTES = {"tinystories": 5, "openwebtext": 50}  # downloads, tokens in the temporary file, tokens in shards
TIMEOUT = 10   # seconds without a byte
TRIES = 5      # requests in a row that bring nothing new
BACKOFF = 0.5  # seconds, doubling


class Redirects(urllib.request.HTTPRedirectHandler):
    """Keeps the headers of the hub's own answer in `linked`: only they tell the size and sha256 of the file."""

    linked = None

    def redirect_request(self, request, response, code, message, headers, url):
        if "X-Linked-ETag" in headers:
            self.linked = headers
        return super().redirect_request(request, response, code, message, headers, url)


def fetch(url, part, path):
    """One request for what `part` still lacks. It becomes `path` when its size and sha256 are those that the hub says.

    Raises OSError, HTTPException or ValueError where asking again may help, and UserError where it will not.
    """
    redirects = Redirects()
    with open(part, "ab") as file:
        have = max(0, file.tell() - 1)  # the last byte again: an empty range is HTTP 416
        request = urllib.request.Request(url, headers={"User-Agent": "prepare_data.py", "Range": f"bytes={have}-"})
        with urllib.request.build_opener(redirects).open(request, timeout=TIMEOUT) as response:
            linked = redirects.linked or response.headers
            size, sha256 = int(linked.get("X-Linked-Size", 0)), linked.get("X-Linked-ETag", "").strip('"')
            have = have if response.status == 206 else 0  # 200: no range, but the whole file again
            if not 0 < size == have + int(response.headers.get("Content-Length", 0)):
                raise ConnectionError("the size is not the hub's, the answer may be a web page")
            file.truncate(have)
            with tqdm.wrapattr(file, "write", desc=path.name, initial=have, total=size, disable=None) as counted:
                shutil.copyfileobj(response, counted, BLOCK)
    if (have := part.stat().st_size) < size:
        raise ConnectionError(f"cut after {have:,} of {size:,} bytes")
    if sha256_of(part) != sha256:
        part.unlink()
        raise UserError(f"{url} did not arrive as its sha256 on the hub says; run the same command again")
    os.replace(part, path)


def download(name, folder):
    """The path of a hub file in a folder, downloaded unless it is there. Raises UserError."""
    url = f"{(os.environ.get('HF_ENDPOINT') or 'https://huggingface.co').rstrip('/')}/{name}"
    path = folder / f"{name.partition('/resolve/')[2][:8]}-{Path(name).name}"
    part = Path(f"{path}.part")
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    part.touch()
    failures, most = 0, part.stat().st_size  # most: bytes that were ever there; a server without ranges begins again
    while not path.exists():
        try:
            fetch(url, part, path)
        except (OSError, HTTPException, ValueError) as error:
            code, wait = getattr(error, "code", None), BACKOFF * 2 ** failures
            if code in (401, 403, 404):
                raise UserError(f"{url}: {error}; if it has moved, edit its commit in prepare_data.py, else check"
                                f" HF_ENDPOINT, or get the file yourself, as {path}") from error
            if code == 416:  # longer than the file: where there are no locks, two processes wrote into it
                part.write_bytes(b"")
            if code in (429, 503) and (after := error.headers.get("Retry-After")):
                wait = min(60, int(after)) if after.isdecimal() else 60  # not a number: a date
            size = part.stat().st_size
            failures, most = (0, size) if size > most else (failures + 1, most)
            if failures == TRIES:
                raise UserError(f"{url}: {error}; run the same command again to go on, or check HF_ENDPOINT") from error
            time.sleep(wait)
    return path


def tar_members(file, ending):
    """Yield the regular members of a tar stream whose names end with `ending`. They are never written to disk."""
    with tarfile.open(fileobj=file, mode="r|") as tar:
        for member in tar:
            if member.isfile() and member.name.endswith(ending):
                yield tar.extractfile(member)


def openwebtext(folder, subsets):
    """The documents of the first subsets: .txt files in .xz archives in a tar. Runs of newlines become two."""
    for path in (download(OPENWEBTEXT.format(subset), folder) for subset in range(subsets)):
        try:
            with open(path, "rb") as file:
                for archive in tar_members(file, ".xz"):
                    for member in tar_members(lzma.open(archive), ".txt"):
                        text = member.read().decode("utf-8", "replace")
                        if text := re.sub(r"\n{3,}", "\n\n", text).strip():
                            yield text, True
        except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
            raise UserError(f"{path} is damaged ({error}); delete it and run again") from error


# ---- Preparing -------------------------------------------------------------------------------------------------------
VAL_FRACTION = {"demo": 320 / 22_000, "openwebtext": 0.001}  # else 0.1; TinyStories brings its own validation file


def own_files(paths):
    """{sha256: path} of the files among paths and, sorted, the .txt files in the folders among them, hidden ones left
    out. A file that is there twice, as itself, a link or a copy, counts once: else validation text would be trained on.
    """
    files = []
    for path in map(Path, paths):
        if not (path.is_dir() or path.is_file()):
            raise UserError(f"{path} is not there; give files and folders, or a single one of {', '.join(SOURCES)}")
        files += [path] if path.is_file() else sorted(
            file for file in path.rglob("*") if file.suffix.lower() == ".txt" and file.is_file()
            and not re.search(r"(^|/)\.", file.relative_to(path).as_posix()))
    if not files:
        raise UserError(f"{', '.join(paths)}: there is no .txt file; name the files themselves")
    return {sha256_of(path): path for path in files}


def training_tokens(ends, fraction, own):
    """How many tokens are for training: all but those of the last documents, about `fraction` of all documents.

    A single document is cut between tokens, and so is own text whose last documents are far from `fraction` of it.
    """
    total, n = ends[-1], max(1, round(fraction * len(ends)))
    n_train = ends[-1 - n] if n < len(ends) else 0
    fits = fraction / 2 <= (total - n_train) / total <= 2 * fraction
    if n_train == 0 or own and not fits:
        n_train = min(total - 1, round((1 - fraction) * total))
    return n_train


def write_source(source, files, options, downloads, encoding, file):
    """Write the tokens of a source. Returns the ends of its documents, how many tokens are for training, and meta."""
    limit = options.max_tokens  # None: no limit, for a part of the source neither
    if source == "tinystories":
        train, val = (download(TINYSTORIES.format(split), downloads) for split in ("train", "valid"))
        of_val = limit and max(1, limit // 10)
        ends = write_tokens(encoding, file, read_text(train, "replace"), limit and limit - of_val, [train])
        n_train = ends[-1]
        ends += write_tokens(encoding, file, read_text(val, "replace"), limit and n_train + of_val, [val])
        return ends, n_train, {}
    documents = list(demo_documents()) if source == "demo" else []
    if source == "demo":
        pieces = ((text, True) for _, text, _, _ in documents)
    elif source == "openwebtext":
        pieces = openwebtext(downloads, options.subsets or 21)
    else:
        pieces = (piece for path in files for piece in read_text(path))
    ends = write_tokens(encoding, file, pieces, limit, files)
    n_train = training_tokens(ends, VAL_FRACTION.get(source, 0.1), own=source is None)
    if not (documents and n_train in ends):  # no floor where a document was cut
        return ends, n_train, {}
    held_out = documents[ends.index(n_train) + 1:len(ends)]
    floor = -sum(log_prob for _, _, log_prob, _ in held_out) / (ends[-1] - n_train)  # nats per token, eot counted
    return ends, n_train, {"entropy_floor": floor}


@contextmanager
def alone_in(folder):
    """Wait until no other process prepares this folder."""
    handle = os.open(folder if os.name == "posix" else os.devnull, os.O_RDONLY)  # Windows opens no folder
    try:
        if not lock(handle, wait=False):
            print(f"waiting for another process that prepares {folder}", flush=True)
            lock(handle)
        yield
    finally:
        os.close(handle)


def prepare(options):
    """Make the shards and meta.json that the options ask for, and say what was made. Raises UserError.

    What lies in the folder stays until the new tokens are ready. From then on until all is written meta.json is
    UNFINISHED, so that nobody trains on a mixture of old and new.
    """
    source = options.source[0] if len(options.source) == 1 and options.source[0] in SOURCES else None
    files = {} if source else own_files(options.source)
    encoding = get_tokenizer(options.tokenizer or ("bytes" if source == "demo" else "gpt2"))
    asked = {"tokenizer": encoding.name, "subsets": options.subsets, "max_tokens": options.max_tokens,
             "source": source or [[path.name, sha256] for sha256, path in files.items()]}
    name = source or Path(os.path.abspath(options.source[0])).stem
    if not (source or options.out) and name in SOURCES:
        raise UserError(f"data/{name} is for the source {name}; choose another folder with --out")
    out = Path(options.out or Path("data", name))
    out.mkdir(parents=True, exist_ok=True)
    with alone_in(out):
        meta_path = out / "meta.json"
        old = [path for path in out.iterdir() if split_of(path.name.removesuffix(".tmp"))]
        if old and not meta_path.exists():
            raise UserError(f"{out} holds shards that are not from prepare_data.py; choose another --out")
        if is_finished(out) and not options.overwrite:
            if load_data(out).meta.get("options") != asked:
                raise UserError(f"{out} holds other data; add --overwrite, or choose another --out")
            print(f"{out} holds this already; --overwrite makes it again")
            return
        if source in GIGABYTES and not options.max_tokens:
            need, free = GIGABYTES[source] * (options.subsets or 21) / 21, shutil.disk_usage(out).free / 1e9
            line = f"{out} will take about {need:.0f} GB, downloads included, and {free:.0f} GB are free"
            if free < need and not (out / "downloads").exists():
                raise UserError(f"{line}; make room, choose another --out, or take fewer --subsets of openwebtext")
            print(line)
        with tempfile.TemporaryFile(dir=out) as file:  # it has no name, so nothing stays behind after a kill
            ends, n_train, more = write_source(source, files.values(), options, out / "downloads", encoding, file)
            with replacing(meta_path) as meta_file:
                meta_file.write(UNFINISHED)
            for path in old:
                path.unlink()
            shards = write_shards(file, n_train, ends[-1], out)
        longest = max(end - begin for begin, end in pairwise(array("Q", [0]) + ends))
        meta = {"tokenizer": encoding.name, "vocab_size": encoding.n_vocab, "eot": encoding.eot_token,
                "documents": len(ends), "tokens": ends[-1], "longest_document": longest, "options": asked, **more,
                "shards": shards}
        with replacing(meta_path) as meta_file:
            meta_file.write(json.dumps(meta, indent=1).encode())
    floor = f"; entropy floor {more['entropy_floor']:.4f} nats per token" if more else ""
    print(f"{out}: {len(ends):,} documents, {ends[-1]:,} tokens, {ends[-1] - n_train:,} of them for validation{floor}")


def main(argv=None):
    """The command line. Raises UserError."""
    parser = argparse.ArgumentParser(prog="prepare_data.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("source", nargs="+", help=f"{', '.join(SOURCES)}, or UTF-8 files, or folders of .txt files")
    parser.add_argument("--out", help="folder for the shards (default: data/<name>)")
    parser.add_argument("--tokenizer", choices=("gpt2", "bytes"), help="default: bytes for demo, else gpt2")
    parser.add_argument("--subsets", type=int, choices=range(1, 22), metavar="N", help="of openwebtext (default: 21)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="take no more documents than fit")
    parser.add_argument("--overwrite", action="store_true", help="replace what --out holds, once the new is ready")
    options = parser.parse_args(argv)
    if options.max_tokens is not None and options.max_tokens < 2:
        parser.error("--max-tokens must be at least 2")
    if options.subsets and options.source != ["openwebtext"]:
        parser.error("--subsets is for openwebtext; --max-tokens is for any source")
    prepare(options)
    return 0


# ---- The embedded corpus ---------------------------------------------------------------------------------------------
# A grammar of tiny documents that knows the probability of what it says: the mean of -log_prob over the same documents
# is a floor that no model beats on average. For that, every text must have exactly one derivation: no alternative of a
# rule is a prefix of another, no slot is optional, and slots are filled from left to right.

KINDS = ("story", "recipe", "sums", "program")  # equally likely; each names the rule of its whole document

# Alternatives are divided by "|" and equally likely. Within a document each one is used at most once. Slots:
#     {name}       an alternative of the rule `name`          {A=name}    the same, remembered as A
#     {M=1..9}     a number, remembered; bounds may be sums   {A} {M+N}   what is remembered, or a sum of it
# Small models learn late to copy. So little has to be remembered, and a sum stands beside its answer. No document is
# longer than 243 bytes.
GRAMMAR = {rule: alternatives.split("|") for rule, alternatives in {
    "story":
        "One {weather} {hour} {A=name} the {mood} {animal} found a {look} {X=thing} {place}. The {X} {trouble}. "
        "A {mood} {animal} {came} with a {tool}. They ate {taste} {treat} and slept {bed}. Sleep well, {A}!",
    "recipe":
        "To make {taste} {X=dish} for {N=2..9}:\n"
        "- {N=2..9} {unit} of {food}\n- {N=2..9} {unit} of {food}\n- {N=2..9} {unit} of {A=food}\n"
        "{Stir} the {A} {vessel}. Add the rest and wait {N=2..9} minutes. Serve the {X} with {garnish}.",
    "sums":
        "How many {X=things}?\n{name} {sum}.\n{name} {sum}.\n{name} {sum}.\n{name} {sum}.",
    "program":
        ">>> {code}\n>>> {code}\n>>> {code}\n>>> {code}\n>>> {code}",

    "sum":
        "gets {M=1..9} + {N=1..9} = {M+N} {X} from the {mood} {animal}|"
        "finds {M=1..9} + {N=1..9} = {M+N} {X} {place}|"
        "counts {M=1..9} + {N=1..9} = {M+N} {X} in a {look} {thing}|"
        "buys {M=1..9} + {N=1..9} = {M+N} {X} for the {animal}|"
        "has {M=3..9} - {N=1..M-2} = {M-N} {X} after meeting the {mood} {animal}|"
        "keeps {M=3..9} - {N=1..M-2} = {M-N} {X} {place}|"
        "saves {M=3..9} - {N=1..M-2} = {M-N} {X} for a {look} {thing}|"
        "brings {M=3..9} - {N=1..M-2} = {M-N} {X} to the {animal}",
    "code":
        "a = {M=1..9} + {N=1..9}\n>>> a\n{M+N}|"
        "b = {M=2..9} - {N=1..M-1}\n>>> b\n{M-N}|"
        "print(\"{A=name}\", {M=1..9} + {N=1..9})\n{A} {M+N}|"
        "def {F=verb}(n): return n + {M=1..9}\n>>> {F}({N=1..9})\n{M+N}|"
        "for n in 1, 2: print(\"{H=greeting}\", n)\n{H} 1\n{H} 2|"
        "box = \"{A=thing}\", \"{B=thing}\"\n>>> {pick}|"
        "\"{A=noise}\" * 2\n'{A}{A}'|"
        "max({M=1..8}, {N=M+1..9})\n{N}",
    "pick": "box[0]\n'{A}'|box[1]\n'{B}'",

    "name": "Ada|Ben|Cleo|Dora|Emil|Finn|Gus|Hana|Ivo|June|Kai|Lena|Milo|Nora|Otto|Pia",
    "animal": "fox|owl|bear|hare|mole|deer|goat|duck|frog|swan|badger|otter|mouse|crow|lamb|cat",
    "mood": "shy|brave|sleepy|hungry|tiny|clever|gentle|grumpy|curious|dreamy|polite|lonely|merry|proud|quiet|silly",
    "weather": "rainy|windy|snowy|foggy|breezy|muggy|stormy|frosty|misty|balmy|chilly|cloudy",
    "hour": "morning|noon|evening|night|day|afternoon",
    "look": "red|blue|golden|silver|spotty|wooden|shiny|round|little|broken|green|velvet|purple|dusty|magic|tin",
    "thing": "kite|lantern|drum|boat|bell|crown|ball|basket|teapot|blanket|mirror|whistle|feather|candle|puppet|ring",
    "things": "plums|shells|buttons|acorns|cookies|marbles|stamps|walnuts|pencils|pears|tulips|beans|coins|ribbons|"
              "pebbles|grapes",
    "place": "under the bridge|in the attic|by the well|behind the barn|on the roof|near the river|in a hollow tree|"
             "at the market|on a hill|in the tall grass|by the gate|in the snow|under a bench|beside the mill|"
             "at the harbor|on the stairs",
    "trouble": "was stuck in the mud|was far too heavy|began to hum|smelled of honey|belonged to the moon|"
               "was cold and wet|had a small crack|made them sneeze|rolled down the hill|would not wake up|"
               "had lost its color|felt all alone",
    "came": "came|hurried|flew in|arrived|tiptoed in|ran over|turned up|swam by",
    "tool": "ladder|rope|spoon|hammer|broom|needle|bucket|map|pillow|brush|wagon|fishing net|shovel|magnet|towel|key",
    "taste": "sweet|warm|crispy|salty|sticky|creamy|spicy|fresh|fluffy|buttered|roasted|toasted",
    "treat": "bread|apples|soup|noodles|berries|cheese|toast|carrots|waffles|chestnuts|figs|popcorn",
    "bed": "under the stars|in a nest of leaves|by the stove|on soft moss|in the hay|in one big bed|beside the fire|"
           "on a cloud|in a warm cave|under the table|in the hammock|on the sofa",
    "dish": "pie|stew|pudding|salad|porridge|muffins|curry|dumplings|cake|omelet|crumble|fritters",
    "unit": "cups|spoons|bowls|jars|bags|mugs|scoops|pots",
    "food": "rice|honey|flour|butter|sugar|milk|oats|cocoa|barley|ginger|lentils|pumpkin|spinach|garlic|corn|raisins",
    "Stir": "Stir|Whisk|Boil|Fry|Melt|Heat|Crush|Soak",
    "vessel": "in a deep pot|in a wide pan|over a low fire|with a fork|for an hour|by hand|in a clay bowl|until soft",
    "garnish": "mint|lemon|cream|parsley|almonds|cinnamon|cold tea|a smile|yogurt|jam|sesame|pepper",
    "greeting": "Hello|Hush|Cheers|Shoo|Thanks|Sorry|Bravo|Quick",
    "noise": "moo|quack|tick|boom|splash|ding|woof|meow|buzz|plop|hoot|ribbit",
    "verb": "jump|climb|paint|hop|dance|sing|juggle|swim|knit|dream|march|giggle",
}.items()}


def demo_documents(seed=0, n_documents=22_000):
    """Yield (kind, text, log_prob, copies): ASCII text below 250 bytes; its natural log probability, kind and end
    included; and spans [first, end) of characters that repeat what is remembered. The answer of a sum is no copy.

    The end has probability 1, as no text begins another. Only `Random.random` is used: Python promises
    the same numbers for the same seed in every version, which it does not for `choice` or `shuffle`.
    """
    uniform = random.Random(seed).random
    for _ in range(n_documents):
        kind = KINDS[int(uniform() * len(KINDS))]
        marked, log_prob = _fill(GRAMMAR[kind][0], uniform, {}, set())
        parts = re.split("[{}]", marked)  # text, copy, text, copy, ..., text
        ends = [*accumulate(map(len, parts))]
        yield kind, "".join(parts), log_prob - math.log(len(KINDS)), [*zip(ends[::2], ends[1::2])]


def _fill(template, uniform, memory, used):
    """Fill the slots of a template; return the text, with {} around copies, and the log probability of its draws."""
    text, *slots = re.split(r"{(?:(\w)=)?(.+?)}", template)  # text, then a variable or None, its source, text, ...
    log_prob = 0.0
    for variable, source, behind in zip(slots[::3], slots[1::3], slots[2::3]):
        if source in GRAMMAR:
            choices = [choice for choice in GRAMMAR[source] if choice not in used]
            choice = choices[int(uniform() * len(choices))]
            used.add(choice)
            filled, inner = _fill(choice, uniform, memory, used)
            log_prob += inner - math.log(len(choices))
        elif ".." in source:
            low, high = (eval(bound, {}, memory) for bound in source.split(".."))
            filled = low + int(uniform() * (high - low + 1))
            log_prob -= math.log(high - low + 1)
        else:
            filled = "{" + str(memory[source]) + "}" if source in memory else eval(source, {}, memory)
        memory[variable] = filled
        text += f"{filled}{behind}"
    return text, log_prob


if __name__ == "__main__":
    sys.exit(run_program(main))
