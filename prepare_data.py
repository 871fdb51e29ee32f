"""Text in, token shards out, and shards read back: everything train.py needs to know about data.

    python prepare_data.py demo                  # the corpus embedded below: no network, a few seconds
    python prepare_data.py tinystories           # 2.2 GB from the Hugging Face hub
    python prepare_data.py openwebtext           # 21 files of about 630 MB; --subsets 1 takes the first only
    python prepare_data.py story.txt notes/      # your own UTF-8 text: files, or folders of .txt files
    python prepare_data.py --check data/demo     # are all bytes still the ones that were written?

One pipeline serves every source: documents -> tokens (threads, in order, little ahead) -> one file -> shards. It holds
a few MB per thread. It can be killed anywhere and run again: the shards are the same, whatever the number of threads.

A shard is 256 little-endian int32 (20240520, 1, number of tokens, zeros), then uint16 tokens: the format of llm.c and
modded-nanogpt, so their shards can be trained on, too. End-of-text follows every document. meta.json, written last,
says what was written; a folder of shards without it is taken as foreign, and as GPT-2 tokens.

What it is not: no shuffling (training draws random windows), no cleaning or deduplication, no training of tokenizers.
Nothing is unpacked to disk and no code comes with the data: downloads are checked against the hub's sha256, archives
are read as streams of bytes.
"""

import argparse
import difflib
import hashlib
import http.client
import io
import json
import lzma
import math
import os
import random
import re
import ssl
import struct
import sys
import tempfile
import time
import urllib.error
import urllib.request
import warnings
from array import array
from bisect import bisect
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # torch says so on import; we need no numpy

import torch
from tqdm import tqdm

SOURCES = ("demo", "tinystories", "openwebtext")
SEPARATOR = "<|endoftext|>"  # on a line of its own between two documents of a text file
BLOCK = 1 << 18  # bytes read at once, and the longest text that waits for the end of its document


class UserError(Exception):
    """What the user can mend, in one line: "what is wrong; what to do". Exit code 1: failed; 2: wrong usage."""

    def __init__(self, message, code=1):
        super().__init__(message)
        self.code = code


# ---- Shards ----------------------------------------------------------------------------------------------------------

HEADER = struct.Struct("<3i1012x")  # magic, version, tokens
MAGIC = 20240520
UNFINISHED = "unfinished"  # a file that lies in a folder while its shards are being replaced


class TokenData(NamedTuple):
    """A folder of shards. Its tensors are 1-D uint16 and memory-mapped: they cost no memory until they are read."""

    tokenizer: str
    vocab_size: int
    eot: int  # end-of-text
    train: list[torch.Tensor]
    val: list[torch.Tensor]
    train_paths: list[Path]  # one for each tensor of train
    meta: dict  # meta.json; empty for foreign shards
    fingerprint: str  # another one if a name, a length or, where meta.json knows it, the content of a shard changes


def read_shard(path):
    """The tokens of a shard, a memory-mapped uint16 tensor [n]. Raises UserError for anything but a whole shard."""
    path = Path(path)
    if not path.is_file():  # a pipe would wait for ever
        raise UserError(f"{path} is not a file; make the shards again with prepare_data.py")
    with open(path, "rb") as file:
        magic, version, n = HEADER.unpack(file.read(HEADER.size).ljust(HEADER.size, b"\0"))
    size = path.stat().st_size - HEADER.size
    if magic != MAGIC:
        raise UserError(f"{path} is not a shard of 16-bit tokens: it begins with {magic}, not {MAGIC}; make it with"
                        " prepare_data.py")
    if version != 1 or n < 1 or size != 2 * n:
        raise UserError(f"{path} is cut or damaged: version {version}, {n} tokens announced, {size / 2:.1f} there; make"
                        " the shards again with prepare_data.py")
    return torch.from_file(str(path), shared=False, size=512 + n, dtype=torch.uint16)[512:]


def split_of(name):
    """The split, "train" or "val", of a shard with a name like fineweb_train_000001.bin; "" for other files."""
    found = re.fullmatch(r".*(train|val).*\.bin", name)
    return found[1] if found else ""


def load_data(folder):
    """The TokenData of a folder, after a look at the names, sizes and headers of its shards. Raises UserError."""
    folder = Path(folder)

    def wrong(what, name=""):
        source = folder.name if folder.name in SOURCES else "PATH"
        flag = " --overwrite" if (folder / "meta.json").exists() else ""
        return UserError(f"{folder / name} {what}; run: python prepare_data.py {source} --out {folder}{flag}")

    if not folder.is_dir():
        raise wrong("is not a folder" if folder.exists() else "is missing")
    names = sorted(entry.name for entry in folder.iterdir() if split_of(entry.name))
    meta, tokenizer, vocab_size, eot, listed = {}, "gpt2", 50257, 50256, dict.fromkeys(names, (None, None))
    if (folder / "meta.json").exists():
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            listed = {shard["name"]: (int(shard["tokens"]), str(shard["sha256"])) for shard in meta["shards"]}
            tokenizer, vocab_size, eot = str(meta["tokenizer"]), int(meta["vocab_size"]), int(meta["eot"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise wrong(f"is damaged ({type(error).__name__})", "meta.json") from error
    elif (folder / UNFINISHED).exists():
        raise wrong("is not finished, its preparation was interrupted")
    for name in sorted({*names} ^ {*listed}):  # from here on, a listed name is one that lies in the folder
        raise wrong("is not listed in meta.json" if name in names else "is missing", name)
    shards = {name: read_shard(folder / name) for name in names}
    for name, tokens in shards.items():
        if listed[name][0] not in (None, len(tokens)):
            raise wrong(f"has {len(tokens)} tokens, but {listed[name][0]} according to meta.json", name)
    train, val = ([name for name in names if split_of(name) == split] for split in ("train", "val"))
    if not (train and val):
        raise wrong(f"has no {'validation' if train else 'training'} shard (*{'val' if train else 'train'}*.bin)")
    facts = [(name, len(shards[name]), listed[name][1]) for name in names]
    return TokenData(tokenizer, vocab_size, eot, [shards[name] for name in train], [shards[name] for name in val],
                     [folder / name for name in train], meta, hashlib.sha256(repr(facts).encode()).hexdigest())


def check(folder):
    """Read every byte of a folder of shards: sha256 where meta.json knows it, ids below the vocabulary size."""
    data = load_data(folder)
    sums = {shard["name"]: shard["sha256"] for shard in data.meta.get("shards", [])}
    paths = sorted(path for path in Path(folder).iterdir() if split_of(path.name))
    for path in tqdm(paths, desc="checking", disable=None):
        if sums and sha256_of(path) != sums[path.name]:
            raise UserError(f"{path} has changed since it was written (sha256); make it again with --overwrite")
        largest = max(int(block.int().max()) for block in read_shard(path).split(BLOCK))
        if largest >= data.vocab_size:
            raise UserError(f"{path} holds token {largest}, outside the vocabulary of {data.vocab_size}; make it again")
    n = sum(map(len, data.train + data.val))
    print(f"{folder}: all right, {n:,} {data.tokenizer} tokens in {len(paths)} shards")


def sha256_of(path):
    """Hex sha256 of a file."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            sha256.update(block)
    return sha256.hexdigest()


def write_whole(path, blocks):
    """Put bytes under a name, all or none: a kill at any moment leaves the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.writelines(blocks)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def cut_shards(file, split, total, shard_tokens, folder):
    """Tokens [0, split) of an open file become training shards, [split, total) validation shards.

    The last one goes first and the file shrinks with each, so that no disk need hold the tokens twice. Returns a list
    of {"name", "tokens", "sha256" of the shard file} in order.
    """
    plan = [(f"{name}_{i:06d}.bin", start, min(start + shard_tokens, end))
            for name, first, end in (("train", 0, split), ("val", split, total))
            for i, start in enumerate(range(first, end, shard_tokens))]
    shards = []
    for name, start, end in reversed(plan):
        file.seek(2 * start)
        blocks = (file.read(min(BLOCK, 2 * end - at)) for at in range(2 * start, 2 * end, BLOCK))
        write_whole(folder / name, chain([HEADER.pack(MAGIC, 1, end - start)], blocks))
        file.truncate(2 * start)
        shards.insert(0, {"name": name, "tokens": end - start, "sha256": sha256_of(folder / name)})
    return shards


# ---- Documents to tokens ---------------------------------------------------------------------------------------------
# A source is an iterator of jobs, (bytes of input, function). The function runs in a thread and returns pieces, (text,
# does a document end here), because a document can be far longer than what one wants to hold in memory.


def get_tokenizer(name):
    """The tiktoken.Encoding called "gpt2" or "bytes": n_vocab, eot_token, encode_ordinary(text), decode(ids).

    "bytes" is the 256 bytes, and 256 for end-of-text; it needs no files. Raises UserError where "gpt2" finds none.
    """
    try:
        import tiktoken
        if name == "bytes":  # nothing is ever merged, so the pattern only says how much to look at in one go
            return tiktoken.Encoding(name, pat_str="(?s:.{1,64})", mergeable_ranks={bytes([i]): i for i in range(256)},
                                     special_tokens={SEPARATOR: 256}, explicit_n_vocab=257)
        return tiktoken.get_encoding(name)
    except ImportError as error:
        raise UserError("tiktoken is not installed; run: pip install -r requirements.txt") from error
    except (OSError, ValueError) as error:  # no network, or not the files that tiktoken knows
        raise UserError(f"no {name} vocabulary ({type(error).__name__}); set TIKTOKEN_CACHE_DIR to a folder that has"
                        " it, connect to the network once, or use --tokenizer bytes") from error


def text_jobs(paths, errors="strict"):
    """Jobs for UTF-8 files. SEPARATOR lines stand between documents and belong to none; blank documents are left out.

    A byte order mark is dropped, CRLF becomes LF. Long documents are cut in front of a blank behind a word: no GPT-2
    token reaches across. Raises UserError for an empty file and, with errors="strict", for one that is not UTF-8 text.
    """
    for path in paths:
        text, inside, empty, done, block = "", False, True, 0, "-"  # inside: `text` goes on with a cut document
        with open(path, encoding="utf-8-sig", errors=errors) as file:
            while block:
                try:
                    block = file.read(BLOCK)
                except UnicodeDecodeError as error:
                    at = file.buffer.tell() - len(error.object) + error.start
                    raise UserError(f"{path} is not UTF-8 (byte 0x{error.object[error.start]:02x} at offset {at});"
                                    " convert it first") from error
                if errors == "strict" and "\0" in block:
                    raise UserError(f"{path} holds zero bytes, so it is no UTF-8 text; convert it first")
                *documents, text = re.split(rf"(?m)^{re.escape(SEPARATOR)}\n", text + (block or "\n"))
                pieces = []
                for document in documents if block else [*documents, text]:
                    if inside or document.strip():
                        pieces.append((document.removesuffix("\n"), True))
                    inside = False
                if block and len(text) > BLOCK:
                    word = re.match(r"(?s).*\S(?=[ \n])", text)
                    cut = word.end() if word else len(text) - len(SEPARATOR) - 1  # which may begin there
                    pieces.append((text[:cut], False))
                    text, inside = text[cut:], True
                empty = empty and not pieces
                yield file.buffer.tell() - done, partial(iter, pieces)
                done = file.buffer.tell()
        if empty:
            raise UserError(f"{path} is empty; leave it out")


def in_order(pool, function, jobs, ahead):
    """The results of function(job) in the order of the jobs, with at most `ahead` jobs begun and not yet taken."""
    waiting = deque()
    for job in jobs:
        waiting.append(pool.submit(function, job))
        if len(waiting) == ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def write_tokens(jobs, encoding, file, limit, workers, total=None):
    """Append the tokens of all documents to an open file; return where in the file, in tokens, each document ends.

    Whole documents are kept as long as they end within the limit (None: all); if not even the first one does, it is
    cut, and still ends with end-of-text. `total`: bytes of all jobs, for the bar. Raises UserError for no documents.
    """
    def tokens_of(job):
        tokens, ends = array("H"), []
        for text, is_end in job[1]():
            tokens.extend(encoding.encode_ordinary(text))
            if is_end:
                tokens.append(encoding.eot_token)
                ends.append(len(tokens))
        return job[0], tokens, ends

    begin = written = file.tell() // 2
    ends = array("Q")
    bar = tqdm(desc="tokenising", total=total, unit="B", unit_scale=True, disable=None)
    with ThreadPoolExecutor(workers) as pool, bar:
        for size, tokens, new_ends in in_order(pool, tokens_of, jobs, 2 * workers):
            file.write(tokens)
            ends.extend(written + end for end in new_ends)
            written += len(tokens)
            bar.update(size)
            if limit and written > limit:
                break
    if written == begin:
        raise UserError("there are no documents in the data; is it the right source?")
    del ends[bisect(ends, limit or written):]
    if not ends:
        ends.append(limit)
        file.seek(2 * limit - 2)
        file.write(array("H", [encoding.eot_token]))
    file.seek(2 * ends[-1])
    file.truncate()
    return ends


# ---- The Hugging Face hub --------------------------------------------------------------------------------------------

# Pinned commits: next year's download is the same. Where the hub answers 404, look up the new path and edit it here.
TINYSTORIES = ("datasets/roneneldan/TinyStories/resolve/f54c09fd23315a6f9c86f9dc80f725de7d8f9c64/"
               "TinyStoriesV2-GPT4-{}.txt")
OPENWEBTEXT = ("datasets/Skylion007/openwebtext/resolve/8cfd553694d06979cfec29248b200468786f0294/"
               "subsets/urlsf_subset{:02d}.tar")
TIMEOUT, TRIES, BACKOFF = 10, 5, 0.25  # seconds of silence; requests in a row that bring nothing; seconds, doubling
NETWORK = (urllib.error.URLError, http.client.HTTPException, ssl.SSLError, ConnectionError, TimeoutError, ValueError)
CAP = 1 << 26  # bytes of an archive inside an OpenWebText file, packed or unpacked; about thirty times what they have


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but never away from https. Size and hash of a file are in the hub's own answer only: `hub`."""

    hub = None

    def redirect_request(self, request, response, code, message, headers, url):
        if urlsplit(url).scheme not in ("https", request.type):
            raise UserError(f"{request.full_url} leads to {url}, not to https; check HF_ENDPOINT")
        if "X-Linked-ETag" in headers:
            self.hub = headers
        return urllib.request.Request(url, headers=request.headers)


def fetch(url, path):
    """One request for what is lacking of a file; `path` is taken once all is there and right.

    Until then it lies in `path`.part. A later request, or process, goes on behind that where the hub tells the sha256
    of the whole. Raises one of NETWORK where asking again may help, and UserError where it will not.
    """
    part, redirects = Path(f"{path}.part"), Redirects()
    with open(part, "ab") as file:
        have = file.tell()
        request = urllib.request.Request(url, headers={"User-Agent": "prepare_data.py"})
        if have:
            request.add_header("Range", f"bytes={have}-")
        try:
            response = urllib.request.build_opener(redirects).open(request, timeout=TIMEOUT)
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 416, 429):  # not there, not for us, redirects in a circle
                raise UserError(f"{url}: {error}; check HF_ENDPOINT, or edit TINYSTORIES or OPENWEBTEXT in"
                                " prepare_data.py") from error
            if error.code != 416:
                raise
            response = error
        with response:
            hub = redirects.hub or response.headers
            size, sha256 = int(hub.get("X-Linked-Size", 0)), re.search("[0-9a-f]{64}", hub.get("X-Linked-ETag", ""))
            content_range = response.headers.get("Content-Range", "")
            if response.status == 200:
                have, size = 0, size or int(response.headers.get("Content-Length", 0))
                file.truncate(0)
            elif not (size and sha256 and re.match(rf"bytes ({have}-|\*/{have}$)", content_range)):
                file.truncate(0)
                raise ConnectionError("what came before does not fit what the server has")
            if size < 1:
                raise UserError(f"{url}: the server does not say how long the file is; try another HF_ENDPOINT")
            with tqdm(desc=path.name, initial=have, total=size, unit="B", unit_scale=True, disable=None) as bar:
                while have < size and (block := response.read1(min(1 << 16, size - have))):
                    if have == 0 and re.match(rb"(?i)\s*<(!doctype|html)", block):
                        raise UserError(f"{url} is a web page, not the file; is a login or a proxy in the way?")
                    file.write(block)
                    have += len(block)
                    bar.update(len(block))
    if have < size:
        raise ConnectionError(f"cut after {have:,} of {size:,} bytes")
    if sha256 and sha256_of(part) != sha256[0]:
        part.unlink()
        raise UserError(f"{url} did not arrive as its sha256 on the hub says; run the same command again")
    os.replace(part, path)


def download(name, folder):
    """The path of a hub file in a folder, downloaded unless it is there; whole and right, else UserError."""
    url = f"{(os.environ.get('HF_ENDPOINT') or 'https://huggingface.co').rstrip('/')}/{name}"
    if not url.startswith(("https://", "http://")):
        raise UserError(f"{url} is no address; HF_ENDPOINT must begin with https://", code=2)
    path = folder / f"{name.partition('/resolve/')[2][:8]}-{Path(name).name}"
    folder.mkdir(parents=True, exist_ok=True)
    best, failures = 0, 0
    while not path.exists():
        try:
            fetch(url, path)
        except NETWORK as error:
            have = Path(f"{path}.part").stat().st_size
            best, failures = max(best, have), 0 if have > best else failures + 1
            if failures == TRIES:
                raise UserError(f"{url}: {error}; run the same command again to go on") from error
            time.sleep(BACKOFF * 2 ** failures)
    return path


def tar_members(file, suffix, where):
    """Yield the bytes of the regular members of a tar file whose names end in suffix. Raises UserError.

    A tar is a row of 512-byte headers, each with its padded content behind it; a blank one ends it. Names are compared
    and nothing else, and links, devices and extended headers passed over. (The standard module trusts the sizes in
    extended headers.) A name of 100 bytes may have been cut, suffix and all, so it counts.
    """
    while (header := file.read(512)).strip(b"\0"):
        try:
            size, checksum = (int(header[at:at + n].strip(b"\0 ") or b"0", 8) for at, n in ((124, 12), (148, 8)))
        except ValueError:
            size = checksum = -1
        data = file.read(size) if 0 <= size <= CAP else b""
        if len(data) != size or checksum != sum(header[:148]) + 8 * ord(" ") + sum(header[156:]):
            raise UserError(f"{where}: a member of the tar archive is damaged, cut, or has more than {CAP:,} bytes;"
                            " delete the file and run again")
        file.read(-size % 512)
        name, kind = header[:100].rstrip(b"\0"), header[156:157]
        if kind in (b"0", b"\0") and (name.endswith(suffix) or len(name) == 100):
            yield data


def unpack(packed, where):
    """The pieces of an .xz archive of OpenWebText: runs of newlines become two, ends are stripped. Raises UserError."""
    tar = b""
    try:
        while packed:  # an .xz file may be several streams, and padding
            decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=2 * CAP)
            tar += decoder.decompress(packed, max_length=CAP + 1 - len(tar))
            if len(tar) > CAP or not decoder.eof:
                raise lzma.LZMAError(f"more than {CAP:,} bytes unpacked" if len(tar) > CAP else "cut short")
            packed = decoder.unused_data.lstrip(b"\0")
    except lzma.LZMAError as error:
        raise UserError(f"{where} is no whole .xz file ({error}); delete the file and run again") from error
    for data in tar_members(io.BytesIO(tar), b".txt", where):
        text = re.sub(r"\n{3,}", "\n\n", data.decode("utf-8", "replace")).strip()
        if text:
            yield text, True


def openwebtext_jobs(folder, subsets):
    """Jobs for the first subsets, each downloaded when its turn comes."""
    for subset in range(subsets):
        path = download(OPENWEBTEXT.format(subset), folder)
        with open(path, "rb") as file:
            for i, packed in enumerate(tar_members(file, b".xz", path)):
                yield len(packed), partial(unpack, packed, f"{path}: archive {i}")


# ---- The embedded corpus ---------------------------------------------------------------------------------------------
# Four kinds of tiny documents from a grammar that knows the probability of what it says.
#
#     story     a bedtime story: who found what, what was wrong with it, who helped
#     recipe    an ingredient list and the steps that use it
#     sums      small additions and subtractions with their right answers
#     program   a Python session with its right output
#
# A language model trained on this text can be measured against the truth: the mean of -log_prob over the same
# documents is a floor that no model beats on average. The floor is only true if every text has exactly one
# derivation, which three habits secure: no alternative of a rule begins with another one, nothing is optional, and
# no draw ignores its order.

KINDS = ("story", "recipe", "sums", "program")  # equally likely; each names the rule of its whole document

# Alternatives are divided by "|" and equally likely, except that none is used twice in a document (two friends never
# share a name, and one word less is left for the second). Slots are filled from left to right:
#     {name}       an alternative of the rule `name`          {A=name}    the same, remembered as A
#     {M=1..9}     a number, remembered; bounds may be sums   {A} {M+N}   what is remembered, or a sum of it
# 6 to 16 words per rule and one or two remembered things per document keep the entropy in the words a reader would call
# content, and copying, which small models learn late, a small part of the task. For the same reason a sum stands beside
# its answer. No document of this grammar is longer than 243 bytes, whatever the seed.
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
    """Yield (kind, text, log_prob): ASCII text below 250 bytes and its natural log probability, kind and end included.

    The end costs nothing because no text is the beginning of another one. Only `Random.random` is used: Python promises
    the same numbers for the same seed in every version, which it does not for `choice` or `shuffle`.
    """
    uniform = random.Random(seed).random
    for _ in range(n_documents):
        kind = KINDS[int(uniform() * len(KINDS))]
        text, log_prob = _fill(GRAMMAR[kind][0], uniform, {}, set())
        yield kind, text, log_prob - math.log(len(KINDS))


def _fill(template, uniform, memory, used):
    """Fill the slots of a template; return the text and the log probability (nats) of the draws it took."""
    log_prob = 0.0

    def fill(slot):
        nonlocal log_prob
        variable, source = slot.groups()
        if source in GRAMMAR:
            options = [option for option in GRAMMAR[source] if option not in used]
            choice = options[int(uniform() * len(options))]
            used.add(choice)
            filled, inner = _fill(choice, uniform, memory, used)
            log_prob += inner - math.log(len(options))
        elif ".." in source:
            low, high = (_sum(bound, memory) for bound in source.split(".."))
            filled = str(low + int(uniform() * (high - low + 1)))
            log_prob -= math.log(high - low + 1)
        else:
            filled = memory[source] if source in memory else str(_sum(source, memory))
        memory[variable] = filled  # (as None where nothing asks for it)
        return filled

    return re.sub(r"{(?:(\w)=)?(.+?)}", fill, template), log_prob


def _sum(expression, memory):
    """The value of an expression such as "M-N" or "M+1" over remembered numbers."""
    return sum(int(sign + memory.get(term, term)) for sign, term in re.findall(r"([+-]?)(\w+)", expression))


# ---- Preparing -------------------------------------------------------------------------------------------------------

VAL_FRACTION = {"demo": 320 / 22_000, "openwebtext": 0.001}  # else 0.1; TinyStories brings its own validation file


def own_files(paths):
    """The files among paths and, sorted, the .txt files in the folders among them. Raises UserError."""
    files = []
    for path in map(Path, paths):
        if not (path.is_dir() or path.is_file()):  # a word is a misspelt source, hence wrong usage
            raise UserError(f"{path} is no file or folder, and not one of {', '.join(SOURCES)}; check the spelling",
                            code=1 if path.suffix or len(path.parts) > 1 else 2)
        files += sorted(p for p in path.rglob("*.txt") if p.is_file()) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{', '.join(paths)}: there is no .txt file; name the files themselves")
    return files


def tokenise(args, source, files, encoding, file):
    """Write the tokens of a source to an open file. Returns (ends of documents, tokens for training, more for meta)."""
    write = partial(write_tokens, encoding=encoding, file=file, workers=args.workers)
    limit, downloads = args.max_tokens, args.out / "downloads"
    if source == "tinystories":
        train, valid = (download(TINYSTORIES.format(split), downloads) for split in ("train", "valid"))
        val_limit = limit and max(1, limit // 10)
        ends = write(text_jobs([train], "replace"), limit=limit and limit - val_limit, total=train.stat().st_size)
        split = ends[-1]
        ends += write(text_jobs([valid], "replace"), limit=limit and split + val_limit, total=valid.stat().st_size)
        return ends, split, {}
    if source == "demo":
        documents = list(demo_documents())
        jobs = ((0, partial(iter, [(text, True)])) for _, text, _ in documents)
    else:
        jobs = openwebtext_jobs(downloads, args.subsets or 21) if source else text_jobs(files)
    ends = write(jobs, limit=limit, total=sum(path.stat().st_size for path in files) or None)
    cuts = ends if len(ends) > 1 else range(1, ends[0] + 1)  # a single document is cut between tokens
    n, fraction = len(cuts), args.val_fraction or VAL_FRACTION.get(source, 0.1)
    kept = max(1, n - max(1, round(fraction * n)))
    split = cuts[kept - 1]
    if source != "demo" or cuts is not ends:
        return ends, split, {}
    floor = -sum(log_prob for _, _, log_prob in documents[kept:n]) / (ends[-1] - split)  # nats per token, eot counted
    spans = [[documents[i][0], ends[i - 1] - split, ends[i] - split] for i in range(kept, n)]
    return ends, split, {"entropy_floor": floor, "val_documents": spans}


def prepare(args):
    """Make the shards and meta.json that the options (see `main`) ask for, and say what was made. Raises UserError."""
    source = args.source[0] if len(args.source) == 1 and args.source[0] in SOURCES else None
    files = [] if source else own_files(args.source)
    args.tokenizer = args.tokenizer or ("bytes" if source == "demo" else "gpt2")
    args.out = out = Path(args.out or Path("data", source or Path(args.source[0]).resolve().stem))
    encoding, meta_path, unfinished = get_tokenizer(args.tokenizer), out / "meta.json", out / UNFINISHED
    options = {name: getattr(args, name) for name in "tokenizer subsets max_tokens shard_tokens val_fraction".split()}
    options["source"] = source or [[path.name, sha256_of(path)] for path in files]
    out.mkdir(parents=True, exist_ok=True)
    old = [path for path in out.iterdir() if split_of(path.name.removesuffix(".tmp"))]
    if not args.overwrite and (meta_path.exists() or old and not unfinished.exists()):
        if load_data(out).meta.get("options") != options:
            raise UserError(f"{out} holds other data; add --overwrite, or choose another --out", code=2)
        unfinished.unlink(missing_ok=True)
        print(f"{out} holds this already; --overwrite makes it again")
        return
    with tempfile.TemporaryFile(dir=out) as file:  # it has no name, so nothing stays behind where we are killed
        ends, split, more = tokenise(args, source, files, encoding, file)
        if ends[-1] > 10**5 * args.shard_tokens:
            raise UserError(f"{ends[-1]:,} tokens would be too many files; choose a larger --shard-tokens", code=2)
        unfinished.touch()  # from here on, what lies here is neither the old data nor the new
        meta_path.unlink(missing_ok=True)
        for path in old:
            path.unlink()
        shards = cut_shards(file, split, ends[-1], args.shard_tokens, out)
    meta = {"tokenizer": args.tokenizer, "vocab_size": encoding.n_vocab, "eot": encoding.eot_token,
            "documents": len(ends), "tokens": ends[-1], "options": options, **more, "shards": shards}
    write_whole(meta_path, [json.dumps(meta, indent=1).encode()])
    unfinished.unlink()
    sample = encoding.decode(load_data(out).train[0][:40].tolist())
    print(f"{out}: {len(ends):,} documents, {ends[-1]:,} tokens ({ends[-1] - split:,} of them for validation),"
          f" {len(shards)} shards, {2 * ends[-1] + HEADER.size * len(shards):,} bytes;"
          f" {ends[-1] / len(ends):.1f} tokens per document" +
          (f"; entropy floor {more['entropy_floor']:.4f} nats per token" if more else "") + f"; it begins {sample!r}")


# ---- Command line ----------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Flags in full, --a-b and --a_b alike. What is wrong raises UserError with code 2."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def parse_args(self, args=None, namespace=None):
        args = [re.sub(r"^--[a-zA-Z][\w-]*(?=$|=)", lambda flag: flag[0].replace("_", "-"), argument)
                for argument in (sys.argv[1:] if args is None else args)]
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].partition("=")[0]
            near = difflib.get_close_matches(flag, self._option_string_actions, 1, cutoff=0)[0]
            self.error(f"unknown option {flag}; did you mean {near}?")
        return options

    def error(self, message):
        raise UserError(message.removeprefix("argument ") + "; see --help" * (";" not in message), code=2)


def run(main):
    """Run main(argv) and return the exit code. The one place that prints errors: "<program>: error: ..." on stderr."""
    try:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # a story may hold what an ASCII terminal cannot show
        code = main(sys.argv[1:]) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `... | head` has seen enough; Python's own last flush must not complain either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except UserError as error:
        message, code = str(error), error.code
    except KeyboardInterrupt:
        message, code = "interrupted; run the same command again", 130
    except OSError as error:
        if not error.strerror:
            raise
        message, code = f"{error.filename or 'system'}: {error.strerror}; make room, or check the permissions", 1
    line = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(message.split()))  # nothing steers a terminal
    print(f"{os.path.basename(sys.argv[0])}: error: {line}", file=sys.stderr)
    return code


def number(kind, low, high, text):
    """An int or float from low to high, for argparse."""
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        what = "whole number" if kind is int else "number"
        raise argparse.ArgumentTypeError(f"{text!r} is not possible; give a {what} from {low} to {high}")
    return value


def main(argv=None):
    """The command line; returns the exit code. Raises UserError."""
    parser = Parser(prog="prepare_data.py", description=__doc__.splitlines()[0])
    parser.add_argument("source", nargs="*", help=f"{', '.join(SOURCES)}, or UTF-8 files, or folders of .txt files")
    parser.add_argument("--out", help="folder for the shards (default: data/<name>)")
    parser.add_argument("--tokenizer", choices=("gpt2", "bytes"), help="default: bytes for demo, else gpt2")
    parser.add_argument("--subsets", type=partial(number, int, 1, 21), help="of openwebtext (default: 21)")
    parser.add_argument("--max-tokens", type=partial(number, int, 2, 10**12), help="take no more documents than fit")
    parser.add_argument("--shard-tokens", type=partial(number, int, 1, 2**31 - 1), default=10**8, help="default: 10^8")
    parser.add_argument("--val-fraction", type=partial(number, float, 1e-6, 1 - 1e-6),
                        help="of the documents, the last ones (default: 0.1; demo 0.0145, openwebtext 0.001)")
    parser.add_argument("--workers", type=partial(number, int, 1, 256), default=min(16, os.cpu_count() or 1),
                        help="threads; they change the speed and nothing else (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace what --out holds, once the new is ready")
    parser.add_argument("--check", metavar="DIR", help="read all of a folder of shards, and stop")
    args = parser.parse_args(argv)
    if bool(args.source) == bool(args.check):
        parser.error(f"give either a source ({', '.join(SOURCES)}, or your own files) or --check DIR")
    if args.subsets and args.source != ["openwebtext"]:
        parser.error("--subsets is for openwebtext; leave it out")
    if args.val_fraction and args.source == ["tinystories"]:
        parser.error("--val-fraction is not for tinystories, which has its own validation file; leave it out")
    check(args.check) if args.check else prepare(args)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
