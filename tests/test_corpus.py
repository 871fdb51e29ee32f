"""The embedded corpus knows its own entropy: its probabilities are checked here.

`derivations` is a second reading of the grammar: it walks a given text instead of drawing one, tries every alternative
in every slot, multiplies exact fractions and leaves sums to Python. It shares nothing with prepare_data but the table.
"""

import math
import re
from fractions import Fraction
from itertools import pairwise

import pytest

import prepare_data
from prepare_data import GRAMMAR, KINDS, demo_documents, load_data, main

HELD_OUT = 320  # the last documents of the stream, about 60 kB


@pytest.fixture(scope="module")
def documents():
    return list(demo_documents())


def derivations(template, text, start, memory, used):
    """Yield (end, probability, copies, memory, used) for every way in which the template can say text[start:end]."""
    literal, slot, rest = re.fullmatch(r"([^{]*)(?:{(.+?)}(.*))?", template, re.DOTALL).groups()
    if not text.startswith(literal, start):
        return
    start += len(literal)
    if slot is None:
        yield start, Fraction(1), [], memory, used
        return
    variable, source = re.fullmatch(r"(?:(\w+)=)?(.+)", slot).groups()
    if source in GRAMMAR:
        options = [option for option in GRAMMAR[source] if option not in used]
        ways = [(end, p / len(options), *more) for option in options
                for end, p, *more in derivations(option, text, start, memory, used | {option})]
    else:  # a range of numbers, or something said again
        numbers = {name: int(word) for name, word in memory.items() if word.isdigit()}
        first, *last = (memory[source] if source in memory else eval(part, {}, numbers) for part in source.split(".."))
        words = [str(number) for number in range(first, last[0] + 1)] if last else [str(first)]
        ways = [(end, Fraction(1, len(words)), [(start, end)] * (source in memory), memory, used)
                for word in words for end in [start + len(word)] if text.startswith(word, start)]
    for end, p, copies, inner_memory, inner_used in ways:
        inner_memory = {**inner_memory, variable: text[start:end]}
        for final, q, more, *after in derivations(rest, text, end, inner_memory, inner_used):
            yield final, p * q, copies + more, *after


def test_the_demo_is_the_same_on_every_machine_and_knows_its_floor(documents, tmp_path, monkeypatch):
    """The shards are the published ones, and the floor is that of the held-out documents, which fit 256 tokens."""
    monkeypatch.setattr(prepare_data, "demo_documents", lambda: documents)  # drawn once is enough
    main(["demo", "--out", str(tmp_path)])
    data, held_out = load_data(tmp_path), documents[-HELD_OUT:]
    sums = [shard["sha256"][:16] for shard in data.meta["shards"]]
    assert sums == ["7b769ffcf2fece2e", "8338e20abc6dbe18"], f"every floor published with the corpus changes: {sums}"
    assert bytes(i % 256 for i in data.val[0]) == "".join(text + "\0" for _, text, _, _ in held_out).encode("ascii")
    floor = -sum(log_prob for _, _, log_prob, _ in held_out) / len(data.val[0])  # nats per token, a text's end is one
    assert abs(data.meta["entropy_floor"] - floor) < 1e-9, (data.meta["entropy_floor"], floor)
    longest = max(len(text) + 1 for _, text, _, _ in documents)
    assert data.meta["longest_document"] == longest < 256, (data.meta["longest_document"], longest)


def test_every_text_has_one_derivation_with_its_probability_and_copies(documents):
    """Walking the grammar along a text finds one way, no earlier end, and the generator's log_prob and copies."""
    for kind, text, log_prob, copies in documents[-HELD_OUT:]:
        found = [(k, *way) for k in KINDS for way in derivations(GRAMMAR[k][0], text, 0, {}, set())]
        assert [(k, end) for k, end, *_ in found] == [(kind, len(text))], f"{len(found)} derivations: {found}\n{text}"
        replayed = math.log(found[0][2] / len(KINDS))
        assert math.isclose(log_prob, replayed, abs_tol=1e-9), f"{log_prob} drawn, {replayed} replayed:\n{text}"
        assert copies == found[0][3], f"{[text[first:end] for first, end in copies]}, replayed {found[0][3]}:\n{text}"


def test_no_document_is_the_beginning_of_another(documents):
    """No text is a prefix of another one, or the same: the end of a text costs nothing, and held-out ones are new."""
    texts = sorted(text for _, text, _, _ in documents)
    alike = [(one, other) for one, other in pairwise(texts) if other.startswith(one)]
    assert not alike, f"{len(alike)} of {len(texts)} texts begin another one: {alike[:1]}"
