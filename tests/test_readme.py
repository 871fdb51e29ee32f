"""The README keeps its word: its snippets print what it shows, its commands parse, its figures are in result files."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
import reproduce

import prepare_data
import train

ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"(?:<!-- (?P<note>.*?) -->\n)?```(?P<kind>\w+)\n(?P<text>.*?)```", re.DOTALL)
BLOCKS = [match.groupdict() for match in BLOCK.finditer(README)]


def test_the_first_command_comes_early():
    """A reader can run something before line 15."""
    lines = README.splitlines()
    first = next(i for i, line in enumerate(lines, 1) if line.startswith("pip install"))
    assert first < 15, f"the first command is on line {first}"


def test_the_snippets_print_what_is_shown():
    """All Python blocks, run one after the other, print the text blocks below them, to the letter."""
    names, printed, shown = {}, "", ""
    for block in BLOCKS:
        if block["kind"] == "python" and block["note"] != "not run":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(block["text"], names)
            printed += out.getvalue()
        elif block["kind"] == "text" and not (block["note"] or "").startswith("output"):
            shown += block["text"]
    assert printed == shown, f"printed:\n{printed}\nshown:\n{shown}"


def commands():
    """What the README says to run, in blocks and in lines."""
    text = "\n".join([block["text"] for block in BLOCKS if block["kind"] == "sh"] + re.findall(r"`(.*?)`", README))
    return sorted(set(re.findall(r"(?:python|torchrun .*?) (\w+\.py .*)", text)))


@pytest.mark.parametrize("command", commands())
def test_the_commands_parse(command, monkeypatch):
    """Every flag that the README prints exists, and takes the value that is printed."""
    program, *argv = shlex.split(command.replace(" ...", ""))
    if program == "train.py":
        options, explicit = train.parse(argv)
        train.configs({**train.PRESETS[options.preset], **explicit})
    elif program == "prepare_data.py":
        monkeypatch.setattr(prepare_data, "prepare", lambda options: None)
        assert prepare_data.main(argv) == 0
    else:
        assert (ROOT / program).exists(), program


def test_the_console_output_is_that_of_a_real_run():
    """Each line of the first output stands, in this order, in the committed console of that run."""
    (block,) = [block for block in BLOCKS if (block["note"] or "").startswith("output")]
    console = (reproduce.RESULTS / block["note"].split()[1]).read_text(encoding="utf-8").splitlines()
    position = 0
    for line in block["text"].splitlines():
        if line.strip() == "...":
            continue
        assert line in console[position:], f"not in the console output, or not in this order: {line!r}"
        position = console.index(line, position) + 1


def test_the_table_is_that_of_the_result_files():
    """The comparison in the README is what the result files give."""
    assert reproduce.table() in README, "the README's table is not:\n" + reproduce.table()


def test_every_file_it_names_exists():
    """Files in backticks are there, unless a run makes them."""
    made = {"log.csv", "my_notes.txt"}
    named = set(re.findall(r"`((?:\w+/)*\w+\.(?:py|txt|csv|md))`", README)) - made
    missing = [name for name in named if not (ROOT / name).exists()]
    assert named and not missing, missing


def test_the_parameter_counts_of_the_presets_are_right():
    """Total and active parameters in the preset table, in millions, computed from the settings."""
    for preset, vocab in dict(demo=320, tinystories=50304, openwebtext=50304).items():
        _, moe = train.configs({**train.PRESETS[preset], "vocab_size": vocab})
        d, layers, expert = moe.d_model, moe.n_layers, 3 * moe.d_model * moe.d_expert
        rest = 2 * vocab * d + d + layers * (4 * d * d + moe.n_experts * d + 4 * d)
        total, active = (rest + layers * count * expert for count in (moe.n_experts, moe.top_k))
        row = rf"\| {preset}.*\| {total / 1e6:.3g} M, {active / 1e6:.2g} M \|"
        assert re.search(row, README), row
