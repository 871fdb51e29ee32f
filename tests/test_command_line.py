"""The command line of train.py: every setting is a flag, samples, how a run ends, and what is refused."""

import shlex
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
from test_train import flags, log, trained

import prepare_data
import train
from erc_moe import MoEConfig
from prepare_data import UserError
from train import TrainConfig

pytestmark = pytest.mark.usefixtures("elsewhere")


def raising(error):
    """A function that raises this error, whatever it is given."""
    def fail(*given, **named):
        raise error

    return fail


@pytest.fixture
def settings_of(monkeypatch):
    """argv -> all settings that train() is called with, by name."""
    monkeypatch.setattr(train, "pick_device", lambda name: torch.device("meta"))
    monkeypatch.setattr(prepare_data, "is_finished", lambda folder: True)
    monkeypatch.setattr(train, "Run", lambda config, moe, **_: raising(InterruptedError(config, moe))())

    def get(*argv):
        with pytest.raises(InterruptedError) as caught:
            train.main(list(argv))
        config, moe = caught.value.args
        return {**asdict(moe), **asdict(config)}

    return get


def test_every_setting_is_a_flag_of_its_type(settings_of):
    """--a-b VALUE with the type of the field, booleans --x and --no-x; what is not given has the field's default."""
    for field in (*fields(TrainConfig), *(field for field in fields(MoEConfig) if field.name != "vocab_size")):
        flag = field.name.replace("_", "-")
        value = {int: 48 if flag == "d-model" else 8, float: 1.5, str: "fp32", bool: None}[field.type]
        cases = {f"{flag}={value}": value} if value else {flag: True, f"no-{flag}": False}
        for argument, expected in cases.items():
            got = settings_of(f"--{argument}")[field.name]
            assert got == expected and type(got) is field.type, f"--{argument}: {got}"
    assert settings_of() == {**asdict(MoEConfig()), **asdict(TrainConfig())}, "the demo has the defaults"


@pytest.mark.parametrize("preset", train.PRESETS)
def test_presets_fill_defaults_and_explicit_flags_win(settings_of, preset):
    """data, out and the preset's settings, unless a flag says otherwise; --help shows them."""
    values = dict(train.PRESETS[preset], data=f"data/{preset}", out=f"out/{preset}")
    help = " ".join(train.make_parser(["--preset", preset]).format_help().split())
    assert f"--steps int optimizer steps (default: {values.get('steps', 1300)})" in help, help
    assert settings_of("--preset", preset).items() >= values.items()
    got = settings_of("--preset", preset, "--lr", "0.5", "--n-experts=16", "--out", "here", "--no-qk-norm")
    assert got.items() >= dict(values, lr=0.5, n_experts=16, out="here", qk_norm=False).items(), got


@pytest.mark.parametrize("wrong", ["--steps=0", "--lr=nan", "--lr=1e300", "--top-k=9", "--dtype=float16", "--step=5",
                                   "--preset=huge", "--vocab-size=300", "word", "--resume --overwrite"])
def test_wrong_usage_is_exit_2_without_a_traceback(data, capsys, wrong):
    """Bad values, abbreviations, unknown flags, contradictions: argparse's usage and one line; nothing is made."""
    with pytest.raises(SystemExit) as caught:
        train.main([*flags(data), *wrong.split()])
    lines = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and len(lines) == 2, f"exit {caught.value.code}, {lines}"
    assert lines[1].startswith("train.py: error: ") and not list(Path().iterdir()), lines


def test_without_data_the_demo_corpus_is_prepared_first_by_one_process(monkeypatch, settings_of):
    """python train.py in an empty folder; other processes wait until it is finished; and not for other data."""
    for rank, argv, called, slept in (0, ["--data", "own"], [], 0), (0, [], [["demo"]], 0), (1, [], [], 5):
        prepared, waits = [], []
        monkeypatch.setattr(prepare_data, "main", prepared.append)
        monkeypatch.setattr(train.time, "sleep", waits.append)
        monkeypatch.setattr(prepare_data, "is_finished", lambda _, p=prepared, w=waits: p or len(w) > 4)
        monkeypatch.setattr(train, "rank_and_world_size", lambda rank=rank: (rank, 2))
        settings_of(*argv)
        assert (prepared, len(waits)) == (called, slept), f"rank {rank}, {argv}: {prepared}, {waits}"


def test_a_preset_for_a_gpu_does_not_start_on_a_cpu_unless_that_is_said(monkeypatch):
    """Where CUDA is not found, one line with the way out; --device cpu is taken at its word."""
    monkeypatch.setattr(train.torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="is for a GPU.*--device cpu"):
        train.main(["--preset", "tinystories"])
    with pytest.raises(UserError, match="data/tinystories is missing"):
        train.main(["--preset", "tinystories", "--device", "cpu"])


def test_a_sample_begins_with_its_prompt_and_follows_its_seed(data, capsys):
    """Equal twice, another seed another text; temperature 0 needs no seed; other settings of training are refused."""
    trained(data, steps=2)
    capsys.readouterr()

    def sampled(*argv, prompt="the fox"):
        assert train.main(["--out=out", "--sample-tokens=20", *argv, "--sample", prompt]) == 0
        return capsys.readouterr().out

    one, again, other = (sampled(f"--seed={seed}", "--temperature=1") for seed in (1, 1, 2))
    assert one == again != other and one.startswith("the fox"), (one, again, other)
    assert sampled("--seed=1", "--temperature=0") == sampled("--seed=2", "--temperature=0")
    for prompt in ("", "a <|endoftext|> b"):
        assert sampled(prompt=prompt).startswith(prompt), "special tokens in a prompt are plain text"
    with pytest.raises(SystemExit):
        sampled("--n-experts=5")
    assert "--n-experts is 5 here, but 4 in the run" in capsys.readouterr().err


def test_the_report_has_quality_a_sample_and_commands_that_can_be_pasted(data, monkeypatch, capsys):
    """The ratio to the floor where windows are whole documents; folders are quoted; why there is no sample is said."""
    argv = flags(data, out="a run", steps=1, context_length=96)
    text = prepare_data.load_data(data)
    for longest in (96, 97):
        meta = {"entropy_floor": 0.25, "longest_document": longest}
        monkeypatch.setattr(prepare_data, "load_data", lambda folder, meta=meta: text._replace(meta=meta))
        assert train.main([*argv, "--overwrite"]) == 0
        shown, row = capsys.readouterr().out, log("a run")[-1]
        ratio = f"{float(row['val_ce']) / 0.25:.3f} times the entropy floor"
        assert (ratio in shown) == (longest == 96), f"documents of {longest} tokens in windows of 96: {shown}"
        assert f"{float(row['response_ce']):.4f} if" in shown and "a sample:" in shown, shown
    assert "python train.py --out 'a run' --resume --steps 2" in shown, shown
    plain = shlex.join([*argv, "--erc-weight", "0", "--out", "a run-plain"])
    assert plain in shown and "--overwrite" not in shown, f"it would replace an earlier run: {shown}"

    monkeypatch.setattr(prepare_data, "get_tokenizer", raising(UserError("no vocabulary")))
    assert train.main([*argv, "--overwrite"]) == 0
    assert "no sample: no vocabulary" in capsys.readouterr().out


def test_too_little_memory_is_one_line_with_a_way_out(data, monkeypatch):
    """torch.OutOfMemoryError becomes advice; other errors stay what they are."""
    for error, raised, words in ((RuntimeError("too little"), RuntimeError, "too little"),
                                 (torch.OutOfMemoryError("64 GiB"), UserError, "lower --batch-size.*--accumulate")):
        monkeypatch.setattr(train, "train", raising(error))
        with pytest.raises(raised, match=words):
            train.main(flags(data, out=raised.__name__))
