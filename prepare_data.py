"""Text in, token shards out, and shards read back: all that train.py needs to know about data.

    python prepare_data.py demo                  # the corpus embedded below: no network, a few seconds
    python prepare_data.py tinystories           # 2.2 GB from the Hugging Face hub
    python prepare_data.py openwebtext           # 21 files of about 630 MB; --subsets 1 takes only the first
    python prepare_data.py story.txt notes/      # your own UTF-8 text: files, or folders of .txt files
    python prepare_data.py --check data/demo     # are all bytes still the ones that were written?

The way of every source: documents -> tokens -> one temporary file -> shards in data/NAME or --out. The memory it takes
hardly grows with the source. A preparation that was killed can be run again and gives the same shards. Of your own
text, a file is one document, unless lines that are <|endoftext|> divide it.

A shard is 256 little-endian int32 (20240520, 1, number of tokens, zeros), then uint16 tokens. This is the format of
llm.c and modded-nanogpt, so their shards can be trained on too. Here end-of-text follows every document. meta.json says
what was written. A folder of shards without meta.json is read as GPT-2 tokens.

Left out: shuffling (training draws random windows), cleaning, deduplication, training a tokenizer.
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
import struct
import sys
import tarfile
import tempfile
import time
import urllib.request
from array import array
from bisect import bisect
from functools import partial
from http.client import HTTPException
from itertools import islice
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import tiktoken
from tqdm import tqdm

SOURCES = ("demo", "tinystories", "openwebtext")
SEPARATOR = "<|endoftext|>"  # on a line of its own between two documents of a text file
BLOCK = 1 << 14  # characters or bytes read at once; longer documents are cut into pieces


class UserError(Exception):
    """What the user can fix, in one line: what is wrong; what to do about it."""


def run_program(main):
    """Run main(argv) and return the exit code. Errors that the user can fix become one line on stderr."""
    # Python sets a closed stream to None, and tqdm cannot write to None.
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
    if hasattr(sys.stdout, "reconfigure"):
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


from contextlib import contextmanager
@contextmanager
def replacing(path):
    """An open binary file that becomes `path` at the end of the with block: a kill at any moment leaves the old file or
    the new one. An exception leaves the old one, removes the half file, and goes on.
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



def is_finished(folder):
    path = Path(folder, "meta.json")
    return path.exists() and path.read_bytes() != UNFINISHED


# ---- Shards ----------------------------------------------------------------------------------------------------------

HEADER = struct.Struct("<3i1012x")  # magic, version, tokens
MAGIC = 20240520
UNFINISHED = b"{}"  # meta.json while the shards beside it are being replaced


class TokenData(NamedTuple):
    """A folder of shards. Its tokens are memory-mapped: they cost no memory until they are read."""

    tokenizer: str
    vocab_size: int
    eot: int  # end-of-text
    train: list[memoryview]  # of uint16
    val: list[memoryview]
    train_paths: list[Path]  # one for each element of train
    meta: dict  # meta.json; empty for foreign shards
    fingerprint: str  # of the names, lengths and, where meta.json has them, sha256 sums of the shards; not of the path


def read_shard(path):
    """The tokens of a shard: a writable memoryview of uint16 on a private memory map. Raises UserError if damaged.

    A slice becomes a tensor without a copy: torch.frombuffer(tokens[a:b], dtype=torch.uint16).
    """
    with open(path, "rb") as file:
        magic, version, n = HEADER.unpack(file.read(HEADER.size).ljust(HEADER.size, b"\0"))
        size = os.fstat(file.fileno()).st_size - HEADER.size
        if (magic, version) != (MAGIC, 1) or n < 1 or size != 2 * n:
            raise UserError(f"{path} is not a whole shard of 16-bit tokens (header {magic}, {version}, {n}; then {size}"
                            " bytes); make it again with prepare_data.py")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))[HEADER.size:].cast("H")


def split_of(name):
    """Returns "train" or "val" for names like fineweb_train_000001.bin, "" for others. Raises UserError for both."""
    *parts, ending = re.split("[_.-]", name)
    splits = {"train", "val"}.intersection(parts) if ending == "bin" else ()
    if len(splits) == 2:
        raise UserError(f"{name}: the name says both train and val; rename the file")
    return "".join(splits)


def load_data(folder):
    """The TokenData of a folder, after a look at the names, sizes and headers of its shards. Raises UserError."""
    folder = Path(folder)
    hint = f"; run: python prepare_data.py {folder.name if folder.name in SOURCES else 'PATH'} --out {folder}"
    if (folder / "meta.json").exists():  # then the shards are our own, and may be replaced
        hint += " --overwrite"
    if not folder.is_dir():
        raise UserError(f"{folder} is {'not a folder' if folder.exists() else 'missing'}{hint}")
    meta, tokenizer, vocab_size, eot, listed = {}, "gpt2", 50257, 50256, {}
    if (folder / "meta.json").exists():
        try:
            meta = json.loads((folder / "meta.json").read_bytes())
            if not meta:
                raise UserError(f"{folder} is not finished, its preparation was interrupted{hint}")
            tokenizer, vocab_size, eot = meta["tokenizer"], meta["vocab_size"], meta["eot"]
            listed = {shard["name"]: (shard["tokens"], shard["sha256"]) for shard in meta["shards"]}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder / 'meta.json'} is damaged ({type(error).__name__}){hint}") from error
    shards = {path.name: read_shard(path) for path in sorted(folder.iterdir()) if split_of(path.name)}
    for name in sorted({*shards, *listed}):
        found, expected = len(shards.get(name, ())), listed.get(name, (0,))[0]
        if meta and found != expected:
            raise UserError(f"{folder / name} has {found} tokens, but {expected} according to meta.json{hint}")
    train, val = ([name for name in shards if split_of(name) == split] for split in ("train", "val"))
    if not (train and val):
        raise UserError(f"{folder} has no {'validation' if train else 'training'} shard{hint}")
    facts = [(name, len(tokens), listed.get(name, (0, None))[1]) for name, tokens in shards.items()]
    return TokenData(tokenizer, vocab_size, eot, [shards[name] for name in train], [shards[name] for name in val],
                     [folder / name for name in train], meta, hashlib.sha256(repr(facts).encode()).hexdigest())


def check(folder):
    """Read every byte of a folder: are the sha256 sums those of meta.json, or, without one, all tokens GPT-2's?"""
    data = load_data(folder)
    sums = {shard["name"]: shard["sha256"] for shard in data.meta.get("shards", ())}
    for path in tqdm(sorted(p for p in Path(folder).iterdir() if split_of(p.name)), desc="checking", disable=None):
        if sums and sha256_of(path) != sums[path.name]:
            raise UserError(f"{path} has changed since it was written (sha256); make it again with --overwrite")
        if not sums and (largest := max(read_shard(path))) >= data.vocab_size:
            raise UserError(f"{path} holds token {largest}, outside the vocabulary of {data.vocab_size}; replace it")
    print(f"{folder}: OK, {sum(map(len, data.train + data.val)):,} tokens ({data.tokenizer})")


def sha256_of(path):
    """Hex sha256 of a file."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            sha256.update(block)
    return sha256.hexdigest()


def write_whole(path, blocks):
    """Writes a file atomically: a kill at any moment leaves the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.writelines(blocks)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


# ---- Documents to tokens ---------------------------------------------------------------------------------------------
# A source is a generator of pieces: (text, is_end). A document may come in several pieces, so that a long one need not
# be held in memory.


def get_tokenizer(name):
    """The tiktoken.Encoding "gpt2", or "bytes": byte values 0 to 255, and token 256 for end-of-text. Raises UserError.
    """
    if name == "bytes":  # nothing is ever merged, so the pattern only says how much to look at in one go
        return tiktoken.Encoding(name, pat_str="(?s:.{1,64})", mergeable_ranks={bytes([i]): i for i in range(256)},
                                 special_tokens={SEPARATOR: 256}, explicit_n_vocab=257)
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # no network, or not the files that tiktoken knows
        raise UserError(f"no {name} vocabulary ({type(error).__name__}); set TIKTOKEN_CACHE_DIR to a folder that has"
                        " it, connect to the network once, or use --tokenizer bytes") from error


def read_text(path, errors="strict"):
    """The pieces of a UTF-8 file. Lines that are SEPARATOR stand between documents; blank documents are left out.

    A byte order mark is dropped, CRLF becomes LF. Long documents are cut after a word and before whitespace, where no
    GPT-2 token goes across. With errors="strict", raises UserError for a file that is not UTF-8 text.
    """
    text, inside, block = "", False, "-"  # inside: `text` continues a document that was cut
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
            text += block or "\n"  # at the end a newline, so that a last separator matches
            *documents, text = re.split(rf"(?m)^{re.escape(SEPARATOR)}\n", text)
            for document in documents if block else [*documents, text]:
                if inside or document.strip():
                    yield document.removesuffix("\n"), True
                inside = False
            if block and len(text) > BLOCK:
                word = re.match(r"(?s).*\S(?=[ \n])", text)
                cut = word.end() if word else len(text) - len(SEPARATOR) - 1  # the rest may be part of a separator
                yield text[:cut], False
                text, inside = text[cut:], True


def write_tokens(encoding, file, pieces, limit, total):
    """Append the tokens of all documents to an open file; return where in the file, in tokens, each document ends.

    Whole documents are kept as long as they end within the limit, if there is one. If the first one exceeds it, it is
    truncated. `total`: bytes of text, for the progress bar. Raises UserError where there is no document.
    """
    begin = written = file.tell() // 2
    ends = array("Q")
    with tqdm(desc="tokenising", total=total, unit="B", unit_scale=True, disable=None) as bar:
        while not (limit and written > limit) and (batch := list(islice(pieces, 64))):
            for (text, is_end), tokens in zip(batch, encoding.encode_ordinary_batch([text for text, _ in batch])):
                file.write(array("H", tokens + [encoding.eot_token] * is_end))
                written += len(tokens) + is_end
                ends.extend([written] * is_end)
                bar.update(len(text.encode()))
    if written == begin:
        raise UserError("there is no document in the source; is it the right one?")
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
TIMEOUT = 10    # seconds without a byte
TRIES = 5       # requests per file
BACKOFF = 0.25  # seconds, doubling


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, never away from https. `hub` keeps the first answer: only it has a file's size and sha256."""

    hub = None

    def redirect_request(self, request, response, code, message, headers, url):
        if urlsplit(url).scheme not in ("https", request.type):
            raise UserError(f"{request.full_url} leads to {url}, not to https; check HF_ENDPOINT")
        if "X-Linked-ETag" in headers:
            self.hub = headers
        return super().redirect_request(request, response, code, message, headers, url)


def fetch(url, path):
    """One request for what is missing of `path`.part, which becomes `path` when size and sha256 are the hub's.

    Raises OSError, HTTPException or ValueError where asking again may help, and UserError where it will not.
    """
    part, redirects = Path(f"{path}.part"), Redirects()
    with open(part, "ab") as file:
        have = max(0, file.tell() - 1)  # the last byte again: an empty range is HTTP 416
        request = urllib.request.Request(url, headers={"User-Agent": "prepare_data.py", "Range": f"bytes={have}-"})
        with urllib.request.build_opener(redirects).open(request, timeout=TIMEOUT) as response:
            hub = redirects.hub or response.headers
            size, sha256 = int(hub.get("X-Linked-Size", 0)), hub.get("X-Linked-ETag", "").strip('"')
            if not (size and re.fullmatch("[0-9a-f]{64}", sha256)):
                raise UserError(f"{url}: the answer has no size and sha256, so it is not the hub's; check HF_ENDPOINT")
            have = have if response.status == 206 else 0
            if have + int(response.headers.get("Content-Length", 0)) != size:
                raise ConnectionError("the answer has the wrong size, it may be a web page")
            file.truncate(have)
            with tqdm(desc=path.name, initial=have, total=size, unit="B", unit_scale=True, disable=None) as bar:
                while block := response.read1(BLOCK):
                    file.write(block)
                    bar.update(len(block))
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
    folder.mkdir(parents=True, exist_ok=True)
    failures = 0
    while not path.exists():
        try:
            fetch(url, path)
        except (OSError, HTTPException, ValueError) as error:
            failures += 1
            if getattr(error, "code", 0) == 416:  # two processes wrote into it, and it is longer than the file
                Path(f"{path}.part").unlink()
            if failures == TRIES:
                raise UserError(f"{url}: {error}; run the same command again to go on, or check HF_ENDPOINT") from error
            time.sleep(BACKOFF * 2 ** failures)
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
                for packed in tar_members(file, ".xz"):
                    for member in tar_members(lzma.open(packed), ".txt"):
                        text = member.read().decode("utf-8", "replace")
                        if text := re.sub(r"\n{3,}", "\n\n", text).strip():
                            yield text, True
        except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
            raise UserError(f"{path} is damaged ({error}); delete it and run again") from error


# ---- The embedded corpus ---------------------------------------------------------------------------------------------
# Four kinds of tiny documents from a grammar that knows the probability of what it says.
#
#     story     a bedtime story: who found what, what was wrong with it, who helped
#     recipe    an ingredient list and the steps that use it
#     sums      small additions and subtractions with their right answers
#     program   a Python session with its right output
#
# A language model trained on this text can be measured against the truth: the mean of -log_prob over the same
# documents is a floor that no model beats on average. For that, every text must have exactly one derivation: no
# alternative of a rule is a prefix of another, no slot is optional, and draws are ordered.

KINDS = ("story", "recipe", "sums", "program")  # equally likely; each names the rule of its whole document

# Alternatives are divided by "|" and equally likely. Within a document each one is used at most once. Slots are filled
# from left to right:
#     {name}       an alternative of the rule `name`          {A=name}    the same, remembered as A
#     {M=1..9}     a number, remembered; bounds may be sums   {A} {M+N}   what is remembered, or a sum of it
# Few things have to be remembered, because small models learn to copy late; so a sum stands beside its answer. No
# document of this grammar is longer than 243 bytes, whatever the seed.
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
        memory[variable] = filled  # variable is None for unnamed slots
        return filled

    return re.sub(r"{(?:(\w)=)?(.+?)}", fill, template), log_prob


def _sum(expression, memory):
    """The value of an expression such as "M-N" or "M+1" over remembered numbers."""
    return sum(int(sign + memory.get(term, term)) for sign, term in re.findall(r"([+-]?)(\w+)", expression))


# ---- Preparing -------------------------------------------------------------------------------------------------------

VAL_FRACTION = {"demo": 320 / 22_000, "openwebtext": 0.001}  # else 0.1; TinyStories brings its own validation file


def own_files(paths):
    """The files among paths and, sorted, the .txt files in the folders among them, hidden ones left out."""
    files = []
    for path in map(Path, paths):
        if not (path.is_dir() or path.is_file()):
            raise UserError(f"{path} is not there; give files and folders, or one of {', '.join(SOURCES)}")
        files += [path] if path.is_file() else sorted(
            file for file in path.rglob("*") if file.suffix.lower() == ".txt" and file.is_file()
            and not re.search(r"(^|/)(\.|__MACOSX/)", file.relative_to(path).as_posix()))
    if not files:
        raise UserError(f"{', '.join(paths)}: there is no .txt file; name the files themselves")
    return files


def tokenise(args, source, files, write):
    """Write the tokens of a source. Returns the ends of its documents, how many tokens are for training, and meta."""
    limit, downloads = args.max_tokens, args.out / "downloads"
    if source == "tinystories":
        train, val = (download(TINYSTORIES.format(split), downloads) for split in ("train", "valid"))
        val_limit = limit and max(1, limit // 10)
        ends = write(read_text(train, "replace"), limit and limit - val_limit, train.stat().st_size)
        split = ends[-1]
        return ends + write(read_text(val, "replace"), limit and split + val_limit, val.stat().st_size), split, {}
    documents = list(demo_documents()) if source == "demo" else ()
    if documents:
        pieces = ((text, True) for _, text, _ in documents)
    elif source == "openwebtext":
        pieces = openwebtext(downloads, args.subsets or 21)
    else:
        pieces = (piece for path in files for piece in read_text(path))
    ends = write(pieces, limit, sum(path.stat().st_size for path in files) or None)
    n, total, fraction = len(ends), ends[-1], args.val_fraction or VAL_FRACTION.get(source, 0.1)
    kept = max(1, n - max(1, round(fraction * n)))
    split = ends[kept - 1]
    whole = n > 1 and (source or fraction / 2 <= (total - split) / total <= 2 * fraction)
    if not whole:  # a single document, or the user's few or very long ones: cut between tokens
        split = max(1, round((1 - fraction) * total))
    if not (documents and whole):
        return ends, split, {}
    floor = -sum(log_prob for _, _, log_prob in documents[kept:n]) / (total - split)  # nats per token, eot counted
    spans = [[documents[i][0], ends[i - 1] - split, ends[i] - split] for i in range(kept, n)]
    return ends, split, {"entropy_floor": floor, "val_documents": spans}


def cut_shards(file, split, total, shard_tokens, folder):
    """Tokens [0, split) of a file become training shards, [split, total) validation shards. Returns meta["shards"]."""
    file.flush()
    tokens, shards = memoryview(mmap.mmap(file.fileno(), 0)).cast("H"), []
    for name, first, last in (("train", 0, split), ("val", split, total)):
        for i, start in enumerate(range(first, last, shard_tokens)):
            path, part = folder / f"{name}_{i:06d}.bin", tokens[start:min(start + shard_tokens, last)]
            write_whole(path, [HEADER.pack(MAGIC, 1, len(part)), part])
            shards.append({"name": path.name, "tokens": len(part), "sha256": sha256_of(path)})
    return shards


def prepare(args):
    """Make the shards and meta.json that the options ask for, and say what was made. Raises UserError.

    What lies in the folder stays until the new tokens are ready. From then on until all is written meta.json is
    UNFINISHED, so that nobody trains on a mixture of old and new.
    """
    source = args.source[0] if len(args.source) == 1 and args.source[0] in SOURCES else None
    files = [] if source else own_files(args.source)
    args.tokenizer = args.tokenizer or ("bytes" if source == "demo" else "gpt2")
    args.out = out = Path(args.out or Path("data", source or Path(args.source[0]).resolve().stem))
    encoding, meta_path = get_tokenizer(args.tokenizer), out / "meta.json"
    options = {name: getattr(args, name) for name in "tokenizer subsets max_tokens shard_tokens val_fraction".split()}
    options["source"] = source or [[path.name, sha256_of(path)] for path in files]
    out.mkdir(parents=True, exist_ok=True)
    old = [path for path in out.iterdir() if split_of(path.name.removesuffix(".tmp"))]
    unfinished = meta_path.exists() and meta_path.read_bytes() == UNFINISHED
    if not (args.overwrite or unfinished) and (old or meta_path.exists()):
        if load_data(out).meta.get("options") != options:
            raise UserError(f"{out} holds other data; add --overwrite, or choose another --out")
        print(f"{out} holds this already; --overwrite makes it again")
        return
    with tempfile.TemporaryFile(dir=out) as file:  # it has no name, so nothing stays behind after a kill
        ends, split, more = tokenise(args, source, files, partial(write_tokens, encoding, file))
        file.seek(0)
        sample = encoding.decode([*array("H", file.read(80))])
        write_whole(meta_path, [UNFINISHED])
        for path in old:
            path.unlink()
        shards = cut_shards(file, split, ends[-1], args.shard_tokens, out)
    meta = {"tokenizer": args.tokenizer, "vocab_size": encoding.n_vocab, "eot": encoding.eot_token,
            "documents": len(ends), "tokens": ends[-1],
            "longest_document": max(b - a for a, b in zip([0, *ends], ends)),
            "options": options, **more, "shards": shards}
    write_whole(meta_path, [json.dumps(meta, indent=1).encode()])
    floor = f"; entropy floor {more['entropy_floor']:.4f} nats per token" if more else ""
    print(f"{out}: {len(ends):,} documents, {ends[-1]:,} tokens ({ends[-1] - split:,} of them for validation),"
          f" {len(shards)} shards, {2 * ends[-1] + HEADER.size * len(shards):,} bytes;"
          f" {ends[-1] / len(ends):.1f} tokens per document{floor}; it begins {sample!r}")


def main(argv=None):
    """The command line. Raises UserError."""
    parser = argparse.ArgumentParser(prog="prepare_data.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("source", nargs="*", help=f"{', '.join(SOURCES)}, or UTF-8 files, or folders of .txt files")
    parser.add_argument("--out", help="folder for the shards (default: data/<name>)")
    parser.add_argument("--tokenizer", choices=("gpt2", "bytes"), help="default: bytes for demo, else gpt2")
    parser.add_argument("--subsets", type=int, choices=range(1, 22), metavar="N", help="of openwebtext (default: 21)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="take no more documents than fit")
    parser.add_argument("--shard-tokens", type=int, metavar="N", default=10**8, help="default: 10^8")
    parser.add_argument("--val-fraction", type=float, metavar="F",
                        help="the end of the text, in whole documents unless they are few (default: 0.1; demo 0.0145,"
                        " openwebtext 0.001)")
    parser.add_argument("--overwrite", action="store_true", help="replace what --out holds, once the new is ready")
    parser.add_argument("--check", metavar="DIR", help="read all of a folder of shards, and stop")
    args = parser.parse_args(argv)
    if bool(args.source) == bool(args.check):
        parser.error(f"give either a source ({', '.join(SOURCES)}, or your own files) or --check DIR")
    if not 0 < args.shard_tokens < 2**31 or args.max_tokens is not None and args.max_tokens < 2:
        parser.error("--shard-tokens must be from 1 to 2147483647, --max-tokens at least 2")
    if args.val_fraction is not None and (not 0 < args.val_fraction < 1 or args.source == ["tinystories"]):
        parser.error("--val-fraction must be between 0 and 1, and is not for tinystories, which has its own split")
    check(args.check) if args.check else prepare(args)
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
