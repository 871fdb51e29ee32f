"""The README keeps its word: its snippets print what it shows, its commands parse, its figures are in result files."""

import contextlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import bench
import pytest
import report
import torch

import erc_moe
import prepare_data
import train

ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"(?:<!-- (?P<note>[^\n]*) -->\n)?```(?P<kind>\w+)\n(?P<text>.*?)```", re.DOTALL)
BLOCKS = [match.groupdict() for match in BLOCK.finditer(README)]


def test_the_first_command_comes_early():
    """A reader can run something before line 15. The first four commands are the first four of .ci/run, in this order.
    """
    lines = README.splitlines()
    first = next(i for i, line in enumerate(lines, 1) if line.startswith("pip install"))
    assert first < 15, f"the first command is on line {first}"
    for text in (README, (ROOT / ".ci" / "run").read_text(encoding="utf-8")):
        found = re.findall(r"pip install -r requirements.txt|python erc_moe.py|python train.py|\bpytest\b", text)
        assert list(dict.fromkeys(found)) == ["pip install -r requirements.txt", "python erc_moe.py", "python train.py",
                                              "pytest"], found


def test_the_snippets_print_what_is_shown():
    """All Python blocks, run one after the other, print the text blocks below them, to the letter."""
    names, printed, shown = {}, "", ""
    for block in BLOCKS:
        if block["kind"] == "python" and not block["note"]:
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(block["text"], names)
            printed += out.getvalue()
        elif block["kind"] == "text" and not (block["note"] or "").startswith("output"):
            shown += block["text"]
    assert printed == shown, f"printed:\n{printed}\nshown:\n{shown}"


def test_the_first_program_is_quiet_where_its_reader_leaves():
    """python erc_moe.py | head -1, also unbuffered: one line, and no traceback."""
    command = 'set -o pipefail; "$0" -u "$1" | head -1'
    done = subprocess.run(["bash", "-c", command, sys.executable, ROOT / "erc_moe.py"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.startswith("step  0: loss"), done


def test_the_printed_loss_is_erc_loss_to_the_last_digit():
    """The function that the README shows whole, for 2 to 20 experts, with its gradients."""
    (block,) = [block for block in BLOCKS if block["note"] == "the loss"]
    shown = {"torch": torch}
    exec(block["text"], shown)
    for n in range(2, 21):
        R, W_g = torch.randn(n, 12, requires_grad=True), torch.randn(n, 12, 7, requires_grad=True)
        pair = [loss(R, W_g, 0.7, torch.Generator().manual_seed(n)) for loss in (shown["erc_loss"], erc_moe.erc_loss)]
        grads = [torch.autograd.grad(loss, (R, W_g)) for loss in pair]
        assert pair[0] == pair[1], f"n={n}: {pair[0].item()}, {pair[1].item()}"
        assert all(map(torch.allclose, *grads)), f"n={n}: the gradients differ"


def run_block(note, **names):
    """Runs the Python block that stands under this note."""
    (block,) = [block for block in BLOCKS if block["note"] == note]
    exec(block["text"], {**vars(erc_moe), **names})


def test_the_snippet_for_hugging_face_trains_router_and_gate_and_nothing_else():
    """On a random OLMoE: the gradient of the mean over layers, times the weight, in each router and gate half."""
    transformers = pytest.importorskip("transformers", reason="couples a model of transformers, not installed")
    torch.manual_seed(0)
    model = transformers.OlmoeForCausalLM(transformers.OlmoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_experts=4, num_experts_per_tok=2))

    run_block("needs a model: OLMoE", model=model, weight=2.0, alpha=0.7, step=3, device="cpu")
    generator, pairs = torch.Generator().manual_seed(3), []
    for layer in model.model.layers:
        fused = layer.mlp.experts.gate_up_proj.detach()                                # (n, 2D, d)
        pairs.append([layer.mlp.gate.weight.detach().requires_grad_(), fused[:, :16].mT.clone().requires_grad_()])
    (2.0 * sum(erc_moe.erc_loss(*pair, 0.7, generator) for pair in pairs) / 2).backward()
    for layer, (R, W_g) in zip(model.model.layers, pairs):
        fused = layer.mlp.experts.gate_up_proj.grad
        assert torch.allclose(layer.mlp.gate.weight.grad, R.grad) and R.grad.any(), "in a router"
        assert torch.allclose(fused[:, :16].mT, W_g.grad) and not fused[:, 16:].any(), "in gate and up"
    touched = {name.split(".mlp.")[-1] for name, p in model.named_parameters() if p.grad is not None}
    assert touched == {"gate.weight", "experts.gate_up_proj"}, touched


def commands():
    """What the README says to run, in blocks and in lines."""
    text = "\n".join([block["text"] for block in BLOCKS if block["kind"] == "sh"] + re.findall(r"`(.*?)`", README))
    return sorted(set(re.findall(r"(?:python|torchrun .*?) (\w+\.py .*)", text)))


@pytest.mark.parametrize("command", commands())
def test_the_commands_parse(command, monkeypatch):
    """Every flag that the README prints exists, and takes the value that is printed."""
    program, *argv = shlex.split(command.replace(" ...", ""))
    if program == "train.py":
        options = train.make_parser(argv).parse_args(argv)
        train.configs({**train.PRESETS[options.preset], **vars(options)})
    elif program == "prepare_data.py":
        monkeypatch.setattr(prepare_data, "prepare", lambda options: None)
        prepare_data.main(argv)
    else:
        assert (ROOT / program).exists(), program


@pytest.mark.parametrize("block", [block for block in BLOCKS if (block["note"] or "").startswith("output")],
                         ids=lambda block: block["note"])
def test_the_console_output_is_that_of_a_real_run(block):
    """Each line of what was printed stands, in this order, in the committed console of that run; ... leaves out."""
    console = (ROOT / block["note"].split()[1]).read_text(encoding="utf-8").splitlines()
    position = 0
    for line in block["text"].splitlines():
        pattern = ".*".join(map(re.escape, line.split("...")))
        found = [i for i in range(position, len(console)) if re.fullmatch(pattern, console[i])]
        assert found, f"not in the console output, or not in this order: {line!r}"
        position = found[0] + (line.strip() != "...")


def test_the_three_runs_of_the_demo_are_those_of_their_consoles():
    """Both cross-entropies of each command: with the loss, with a smaller alpha, without it."""
    rows = re.findall(r"^\| `python train.py.*?` \| (\S+) \| (\S+) \|$", README, re.MULTILINE)
    for numbers, name in zip(rows, ("console", "console-half", "console-plain"), strict=True):
        console = (report.RESULTS / f"{name}.txt").read_text(encoding="utf-8")
        found = re.findall(r"^(?:val_ce| {6}) (0\.\d{4}) .*(?:nats|response)", console, re.MULTILINE)
        assert [*numbers] == found, f"{name}: {found}, README {numbers}"


@pytest.mark.parametrize("path", report.TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_tables_are_those_of_the_result_files(path):
    """Every marked table, here and beside the results, is what the result files give: each number of it."""
    text = path.read_text(encoding="utf-8")
    now = report.filled(text, report.Results())
    different = [line for line in text.splitlines() if line not in now.splitlines()]
    assert text == now, f"run python experiments/report.py --write; not in the result files: {different[:3]}"
    assert len(report.MARK.findall(report.TEXTS[1].read_text(encoding="utf-8"))) >= 2, "this test is blind"


def test_the_findings_in_words_have_their_numbers_from_the_tables():
    """Each decimal and percentage in the README's words on what the loss does stands in a table, here or beside the
    results, whatever its sign; the paper's own are the paper's.
    """
    number = r"(?<![\w.])\d+(?:\.\d+%?|%)"
    tables = "\n".join(line for path in report.TEXTS for line in path.read_text(encoding="utf-8").splitlines()
                       if line[:1] in "|(")
    words = [README.partition("## Run it")[0], README.partition("## The idea")[2].partition("## The three steps")[0],
             README.partition("## What it does")[2].partition("\n## ")[0]]
    words = re.sub(r"^[|(].*$|(?:alpha|α =) [\d.]+|arXiv [\d.]+", "", "\n".join(words), flags=re.MULTILINE)
    said = set(re.findall(number, words)) - {"0.2%", "0.8%", "0.4", "2.2", "2512.23447"}                  # the paper's
    missing = said - set(re.findall(number, tables))
    assert len(said) > 6 and not missing, f"in no table: {sorted(missing)}"


def test_every_picture_and_every_file_that_is_named_exists():
    """Images lie where the texts say. Files in backticks are there, unless a run makes them."""
    found = [path.parent / name for path in report.TEXTS
             for name in re.findall(r"!\[.*?\]\((.*?)\)", path.read_text(encoding="utf-8"))]
    named = set(re.findall(r"`((?:\w+/)*\w+\.(?:py|txt|csv|md|sh))`", README)) - {"log.csv", "my_notes.txt"}
    missing = [path for path in found if not path.exists()]
    missing += [name for name in named if not ((ROOT / name).exists() or (ROOT / "experiments" / name).exists())]
    assert found and named and not missing, missing


def test_the_sizes_of_the_presets_are_right():
    """Parameters, steps, batches and hours of both presets, from the settings."""
    for preset in ("tinystories", "openwebtext"):
        config, moe = train.configs({**train.PRESETS[preset], "vocab_size": 50304})
        with torch.device("meta"):
            total, active = erc_moe.MoETransformer(moe).num_params()
        T, tokens = moe.context_length, moe.context_length * config.batch_size * config.accumulate * config.steps
        hours = bench.flops_per_token(moe) * tokens / 20e12 / 3600
        (row,) = [line for line in README.splitlines() if line.startswith(f"| `{preset}` |")]
        for words in (f" {config.steps:,} ", f" {config.accumulate} micro-batches of {config.batch_size} x {T:,} ",
                      f" {hours:.2g} hours"):
            assert words in row, f"{words!r} is not in {row}"
        words = f"{total / 1e6:.3g} M parameters, {active / 1e6:.2g} M of them active"
        assert words in README, words
