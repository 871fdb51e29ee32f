"""The command line of train.py: every setting is a flag, samples, how a run begins and ends, and what is refused."""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import asdict, fields, replace

import pytest
import torch
from test_train import ROOT, checkpoint, flags, new_run, settings

import prepare_data
import train
from erc_moe import MoEConfig
from prepare_data import UserError
from train import TrainConfig

pytestmark = pytest.mark.usefixtures("elsewhere")

SETTINGS = [*fields(TrainConfig), *(field for field in fields(MoEConfig) if field.name != "vocab_size")]


@pytest.mark.parametrize("field", SETTINGS, ids=lambda field: field.name)
def test_every_setting_is_a_flag_in_both_spellings(field):
    """--a-b and --a_b, with the type of the field; booleans are --x and --no-x; not given is not set."""
    for flag in {f"--{field.name}", f"--{field.name.replace('_', '-')}"}:
        if field.type is bool:
            cases = [([flag], True), ([flag.replace("--", "--no-", 1)], False)]
        else:
            value = {int: 7, float: 0.25, str: "a_b-c"}[field.type]
            cases = [([flag, str(value)], value), ([f"{flag}={value}"], value)]
        for argv, expected in cases:
            _, explicit = train.parse(argv)
            assert explicit == {field.name: expected}, f"{argv} gives {explicit}"
            assert type(explicit[field.name]) is field.type, f"{argv}: {type(explicit[field.name])}"
    assert train.parse([])[1] == {}, "what is not on the command line counts as given"


def test_help_shows_every_flag_with_its_default_once(capsys):
    """--help lists each setting with its own help text and one default."""
    with pytest.raises(SystemExit) as caught:
        train.parse(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    entries = {re.split(r"[ ,]", entry)[0]: " ".join(entry.split()) for entry in re.split(r"\n  --", text)[1:]}
    for field in SETTINGS:
        entry, words = entries[field.name.replace("_", "-")], " ".join(field.metadata["help"].split())
        assert entry.count("default") == 1 and f"{words} (default: {field.default})" in entry, entry
    assert "--vocab-size" not in text, "the vocabulary comes from the data"


class Stop(Exception):
    pass


@pytest.mark.parametrize("preset", ["demo", "tinystories", "openwebtext"])
def test_presets_fill_defaults_and_explicit_flags_win(monkeypatch, preset):
    """data, out and the preset's settings, unless a flag says otherwise."""
    def stop(config, moe, **_):
        raise Stop(config, moe)

    monkeypatch.setattr(train, "train", stop)
    monkeypatch.setattr(prepare_data, "main", lambda argv: 0)
    with pytest.raises(Stop) as caught:
        train.main(["--preset", preset])
    config, moe = caught.value.args
    assert (config.data, config.out) == (f"data/{preset}", f"out/{preset}")
    values = {**asdict(config), **asdict(moe)}
    assert {name: values[name] for name in train.PRESETS[preset]} == train.PRESETS[preset]
    with pytest.raises(Stop) as caught:
        train.main(["--preset", preset, "--lr", "0.5", "--n_experts=16", "--out", "here", "--no-qk-norm"])
    config, moe = caught.value.args
    assert (config.lr, moe.n_experts, config.out, moe.qk_norm) == (0.5, 16, "here", False), (config, moe)
    assert config.data == f"data/{preset}" and moe.n_layers == train.PRESETS[preset].get("n_layers", 4)


@pytest.mark.parametrize("argv, near", [
    (["--step", "5"], "--steps"), (["--max", "5"], ""), (["--erc-weigth", "1"], "--erc-weight"),
    (["--batchsize=2"], "--batch-size"), (["--learning-rate", "1"], ""), (["--no-steps"], ""),
    (["--resum"], "--resume"), (["--vocab-size", "5"], ""), (["--n-expert", "4"], "--n-experts"),
    (["--qk-nrom"], "--qk-norm"),
])
def test_abbreviations_and_unknown_flags_are_refused_with_the_nearest(argv, near):
    """Exit 2; a slip of the finger is answered with the flag that was meant."""
    with pytest.raises(UserError, match=f"unknown option {argv[0].partition('=')[0]}; did you mean {near}") as caught:
        train.parse(argv)
    assert caught.value.code == 2


@pytest.mark.parametrize("words, ours", [
    ("CUDA out of memory. Tried to allocate 20.00 MiB.", True),
    ("MPS backend out of memory (MPS allocated: 9 GB). Tried to allocate 1 GB on private pool.", True),
    ("[enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: can't allocate memory", True),
    ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
    ("CUDA error: an illegal memory access was encountered", False),
])
def test_too_little_memory_is_told_from_other_errors(data, monkeypatch, words, ours):
    """What the devices say when memory runs out becomes one line with a way out; other errors stay what they are."""
    def fail(*given, **named):
        raise RuntimeError(words)

    monkeypatch.setattr(train, "train", fail)
    with pytest.raises(UserError if ours else RuntimeError, match="lower --batch-size" if ours else "illegal"):
        train.main(flags(data))


# ---- Samples -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("finished") / "run"
    train.train(*settings(data, out=str(out), steps=2))
    return str(out)


def sampled(finished, prompt, **changes):
    config, _ = train.configs({"out": finished, "sample_tokens": 40, "temperature": 1.0, **changes})
    return train.sample(checkpoint(finished), prompt, config, torch.device("cpu"))


def test_the_same_seed_gives_the_same_sample(finished):
    """Equal twice, another seed another text; the prompt stands in front; temperature 0 needs no seed."""
    one, again, other = (sampled(finished, "the fox", seed=seed) for seed in (1, 1, 2))
    assert one == again != other and one.startswith("the fox"), (one, again, other)
    greedy = sampled(finished, "the fox", seed=1, temperature=0.0)
    assert greedy == sampled(finished, "the fox", seed=2, temperature=0.0)
    assert greedy == sampled(finished, "the fox", seed=3, sample_top_k=1)


@pytest.mark.parametrize("changes", [dict(temperature=1e-40), dict(temperature=1e30), dict(sample_top_k=10**15)])
def test_extreme_sampling_settings_work(finished, changes):
    """A temperature whose reciprocal is no float32, a very hot one, and more candidates than ids."""
    assert sampled(finished, "the", **changes).startswith("the")


def test_special_tokens_in_a_prompt_are_plain_text(finished):
    """The text of the end-of-text token reaches the model as 13 characters and comes back as such."""
    assert sampled(finished, "a <|endoftext|> b").startswith("a <|endoftext|> b")


@pytest.mark.parametrize("prompt", ["", "   ", "\x1b[2J\x1b]0;title\x07\x00\x7f\x9b", "a\udcff\udcfeb",
                                    "\u202eabc\u2066", "z\u0335a\u0301 \U0001f98a", "line\n\ttab\r\n"],
                         ids=["empty", "blank", "control", "invalid", "bidi", "emoji", "lines"])
def test_no_sample_steers_the_terminal(finished, prompt):
    """Control characters, bytes that are no UTF-8, and direction marks: printed as U+FFFD; line ends and tabs stay."""
    for seed in range(3):
        text = sampled(finished, prompt, seed=seed)
        bad = [c for c in text if not (c.isprintable() or c in "\n\t")]
        assert not bad, f"{bad} would reach the terminal"
        text.encode("utf-8")
    if prompt.isprintable():
        assert text.startswith(prompt), text


def test_the_longest_prompt(finished, capsys):
    """100,000 characters are answered with 100,000 and more; one more is wrong usage."""
    argv = ["--out", finished, "--sample-tokens", "2", "--device", "cpu", "--sample"]
    assert train.main([*argv, "ab" * 50_000]) == 0
    assert capsys.readouterr().out.startswith("ab" * 50_000)
    with pytest.raises(UserError, match="100000") as caught:
        train.main([*argv, "ab" * 50_000 + "c"])
    assert caught.value.code == 2


def test_bytes_that_are_no_text_in_a_real_command_line_and_an_ascii_terminal(finished):
    """python train.py --sample $'\\xff\\xc3\\xa9' where stdout is ASCII: exit 0, nothing on stderr."""
    done = subprocess.run([sys.executable, "train.py", "--out", finished, "--sample", b"\xff\xc3\xa9", "--device=cpu",
                           "--sample-tokens=40"], cwd=ROOT, capture_output=True,
                          env=dict(os.environ, PYTHONIOENCODING="ascii", PYTHONUTF8="1"))
    assert (done.returncode, done.stderr) == (0, b""), (done.returncode, done.stderr.decode())
    assert done.stdout.isascii() and not set(done.stdout) & set(b"\x1b\x00\x07\x08"), done.stdout


def test_what_a_finished_run_suggests_fits_that_run(data, monkeypatch, capsys):
    """The command for a plain MoE has this run's data and sizes; --sample has its sampling settings, unless told."""
    config, moe = settings(data, out="here", steps=1, sample_tokens=7, erc_alpha=0.5, qk_norm=False)
    train.report(config, train.train(config, moe))
    command = re.search(r"plain MoE:  python train.py (.*)", capsys.readouterr().out)[1]
    options, explicit = train.parse(shlex.split(command))
    plain, shape = train.configs(explicit)
    assert shape == moe, f"{shape}, not {moe}"
    assert plain == replace(config, out="here-plain", erc_weight=0.0), f"{plain}, not {config}"

    seen = []
    monkeypatch.setattr(train, "sample", lambda state, prompt, config, device: seen.append(config) or "")
    for more in ([], ["--sample-tokens", "9"]):
        assert train.main(["--out", "here", "--device", "cpu", "--sample", "the", *more]) == 0
    assert [one.sample_tokens for one in seen] == [7, 9], [one.sample_tokens for one in seen]
    with pytest.raises(UserError, match="--n-experts is 5 here, but 4 in the run") as caught:  # not samples of that
        train.main(["--out", "here", "--sample", "the", "--n-experts", "5"])
    assert caught.value.code == 2


def test_suggested_commands_can_be_pasted(data, capsys):
    """A folder with a blank and a slash at the end; a plain run is not told to try a plain one."""
    for weight in (1.0, 0.0):
        config, moe = settings(data, out="a run/", steps=1, erc_weight=weight)
        train.report(config, train.train(config, moe, overwrite=True))
        told = dict(re.findall(r"(?m)^(more|train on|plain MoE): +python train.py (.*)$", capsys.readouterr().out))
        folders = {name: train.parse(shlex.split(command))[1]["out"] for name, command in told.items()}
        expected = {"more": "a run/", "train on": "a run/"} | ({"plain MoE": "a run-plain"} if weight else {})
        assert folders == expected, folders
    with pytest.raises(UserError) as caught:
        train.train(config, moe)
    resume = re.search(r"go on: python train.py (.*?);", str(caught.value))[1]
    assert train.parse(shlex.split(resume))[0].resume, caught.value


def test_a_finished_run_without_its_vocabulary_says_how_to_go_on(data, monkeypatch, capsys):
    """No network, no GPT-2 files: no sample, but the run is done, and its report whole."""
    config, moe = settings(data, steps=1)
    result = train.train(config, moe)

    def missing(name):
        raise UserError("no gpt2 vocabulary; set TIKTOKEN_CACHE_DIR")

    monkeypatch.setattr(prepare_data, "get_tokenizer", missing)
    train.report(config, result)
    said = capsys.readouterr().out
    assert "no sample: no gpt2 vocabulary; set TIKTOKEN_CACHE_DIR" in said and "train on:" in said, said


def test_a_dense_model_logs_plain_numbers(data, capsys):
    """One expert has nothing to be coupled against: nothing violated, coupling 1, no ERC loss, no run without it."""
    config, moe = settings(data, n_experts=1, top_k=1, steps=1)
    result = train.train(config, moe)
    assert (result["erc"], result["violated"], result["coupling"]) == (0, 0, 1), result
    train.report(config, result)
    assert "plain MoE:" not in capsys.readouterr().out


def test_the_header_says_how_often_the_data_is_seen_and_that_all_is_warm_up(data):
    """Tokens trained on over tokens there; a warm-up that never ends is no surprise at the end."""
    run = new_run(data, steps=4, warmup=4)
    times = 4 * run.step_tokens / sum(map(len, run.data.train))
    assert f"4 steps of 64 tokens, {times:.1f} times the data, all of it warm-up;" in train.describe(run)
    assert "warm-up" not in train.describe(new_run(data, steps=5, warmup=4))


# ---- Starting ------------------------------------------------------------------------------------


def test_no_warning_at_start_without_numpy():
    """With numpy blocked and warnings as errors: all three files import and print nothing."""
    code = "import sys; sys.modules['numpy'] = None; import erc_moe, prepare_data, train"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done.stderr[-1500:]
