"""Nothing lost: runs are killed, starved and fed garbage, and what they leave is compared to the bit.

Kills, signals, full disks and closed pipes happen to real processes, forked by a worker that has imported torch once.
Damage, flags and folders go through train.py's own functions. Nothing of the product is replaced: files are really
damaged, disks are really full. Marked `slow` is the long half; a share of everything runs without it.
"""

import csv
import importlib
import io
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import traceback
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import prepare_data
import train
from erc_moe import MoETransformer
from prepare_data import HEADER, MAGIC, UserError

SMALL = dict(context_length=32, n_layers=1, n_heads=2, d_model=16, d_expert=8, n_experts=4, batch_size=2, steps=12,
             warmup=2, log_every=1, eval_every=3, save_every=4, device="cpu", dtype="fp32", sample_tokens=1)


pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture(scope="module")
def worker():
    """call(function, ...) in a process that only forks: threads, which this one may have, and fork do not mix."""
    context = multiprocessing.get_context("spawn")
    ours, its = context.Pipe()
    process = context.Process(target=serve, args=(its,), daemon=True)
    process.start()

    def call(function, *arguments, **options):
        ours.send((function, arguments, options))
        assert ours.poll(300), "no answer from the worker"
        answer = ours.recv()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    yield call
    process.kill()
    process.join()


def serve(connection):
    """In the worker: calls what is asked for, and sends back what it returns or raises."""
    importlib.import_module("torch._dynamo")  # an optimizer imports it, for a second, and so would each child
    torch.set_num_threads(1)
    while True:
        function, arguments, options = connection.recv()
        try:
            connection.send(function(*arguments, **options))
        except Exception as error:
            connection.send(error)


@pytest.fixture
def attempt(worker):
    """attempt(argv, ...) runs train.py in a process of its own, which may be hurt on the way -> Ended."""
    return lambda argv, **harm: worker(run_apart, os.getcwd(), argv, **harm)


class Ended(NamedTuple):
    code: int  # negative: the signal that ended it
    out: str
    error: str


def run_apart(folder, argv, then=(), **harm):
    """In the worker: fork, run, wait. `then` is a list of (seconds, signal number): after another line of the log,
    and that time, the child gets the signal. With None for a number it is left running -> its process id.
    """
    os.chdir(folder)
    Path("err.txt").write_bytes(b"")
    log = Path(next(a.partition("=")[2] for a in argv if a.startswith("--out=")), "log.csv")
    lines = log.read_bytes().count(b"\n") if log.exists() else 1
    if (pid := os.fork()) == 0:
        child(argv, **harm)
    for delay, number in then:
        while not log.exists() or log.read_bytes().count(b"\n") <= lines:
            if os.waitpid(pid, os.WNOHANG)[0]:
                raise AssertionError("ended by itself: " + Path("err.txt").read_text())
            time.sleep(0.002)
        time.sleep(delay)
        if number is None:
            return pid
        os.kill(pid, number)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return Ended(code, Path("out.txt").read_text(errors="replace"), Path("err.txt").read_text(errors="replace"))


def wait_for(pid):
    """In the worker: the exit code of a child that was left running."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class KilledInEvaluation(MoETransformer):
    """Dies in the evaluation after step 9, at its fifth batch."""

    trained = evaluated = 0

    def forward(self, tokens, targets=None):
        self.trained += torch.is_grad_enabled()
        self.evaluated += self.trained == 9 and not torch.is_grad_enabled()
        if self.evaluated == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(tokens, targets)


def child(argv, kill_at=None, limit=None, full=False, kill_in_step=None, kill_in_evaluation=False, slow_step=None,
          closed=False, seconds=250):
    """train.py as a process of its own, never to return. kill_at: SIGKILL at that file event under the run folder.
    limit: no file grows beyond it; writing on kills, or fails where `full`. The rest are moments of a step.
    """
    signal.alarm(seconds)  # no child outlives its test
    for number, name in ((1, "out.txt"), (2, "err.txt")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if closed:
        read, write = os.pipe()
        os.close(read)
        os.dup2(write, 1)
    sys.stdout = open(1, "w", closefd=False)
    sys.argv = ["train.py", *argv]
    out = next(a.partition("=")[2] for a in argv if a.startswith("--out="))
    events = 0

    def watch(event, arguments):
        nonlocal events
        if event in ("open", "os.rename", "os.remove", "os.mkdir") and str(arguments[0]).startswith(out):
            events += 1
            if events == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    def hurt(model):
        nonlocal events
        events += 1
        if events == kill_in_step:
            os.kill(os.getpid(), signal.SIGKILL)
        if events == slow_step:
            time.sleep(60)
        return sum(p.sum() for p in model.parameters()) * 0

    def main(argv):
        if kill_in_step is None and slow_step is None and not kill_in_evaluation:
            return train.main(argv)
        config, moe = train.configs(train.parse(argv)[1])
        torch.manual_seed(config.seed)
        model = KilledInEvaluation(replace(moe, vocab_size=320)) if kill_in_evaluation else None
        train.train(config, moe, model=model, extra_loss=hurt)

    code = 99
    try:
        if kill_at:
            sys.addaudithook(watch)
        if limit:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN if full else signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        code = prepare_data.run(main)
    except BaseException:
        traceback.print_exc()
    finally:
        if not closed:
            sys.stdout.flush()
        os._exit(code)


def flags(data, **changes):
    """The command line of a run of a few hundredths of a second a step."""
    values = {"data": data, "out": "o", **SMALL, **changes}
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]


def checkpoint(out="o"):
    return train.load_checkpoint(Path(out))


def log(out="o"):
    """The whole lines of log.csv, without their time column."""
    with open(Path(out, "log.csv"), encoding="utf-8", newline="") as file:
        text = file.read()
    rows = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
    return [{name: value for name, value in row.items() if name != "tokens_per_s"} for row in rows]


def acknowledged(out="o", every=4):
    """The step of the newest checkpoint that was certainly complete, as step s + 1 is logged after the save of s."""
    lines = log(out) if Path(out, "log.csv").exists() else []
    return (int(lines[-1]["step"]) - 1) // every * every if lines else None


def equal(one, two):
    """Nested dicts, lists and tensors, equal to the bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return isinstance(two, dict) and list(one) == list(two) and all(equal(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(equal, one, two))
    return type(one) is type(two) and one == two


def learned(state):
    return {name: state[name] for name in ("model", "optimizer", "scaler", "step")}


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """(checkpoint, log) of the run that nothing happened to."""
    out = str(tmp_path_factory.mktemp("straight") / "run")
    train.train(*train.configs({**SMALL, "data": data, "out": out}))
    return checkpoint(out), log(out)


def assert_same_end(straight, what, out="o"):
    assert equal(learned(checkpoint(out)), learned(straight[0])), f"{what}: other weights or optimizer state"
    assert log(out) == straight[1], f"{what}: the log is not that of the uninterrupted run: {log(out)}"


def one_line(ended, code):
    """The message of a run that must end with this code and one line on stderr, which is returned."""
    lines = ended.error.splitlines()
    assert ended.code == code and len(lines) == 1, f"exit {ended.code}, expected {code}:\n{ended.error}"
    assert lines[0].startswith("train.py: error: "), lines[0]
    return lines[0]


def to_the_end(attempt, argv):
    """Goes on with a run, or starts anew where there is nothing to go on with."""
    again = "--resume" if list(Path("o").glob("ckpt*.pt")) else "--overwrite"
    ended = attempt([*argv, again])
    assert ended.code == 0 or "is finished, at step" in ended.error, f"{again}: exit {ended.code}\n{ended.error}"


# ---- Kills ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_at_any_file_event_loses_no_saved_step(data, attempt, straight, every):
    """SIGKILL at each file event (a seventh of them in the short run) of a run with 4 saves: what was acknowledged
    loads, and the run ends as if nothing had happened."""
    kills = 0
    for kill_at in range(every, 500, every):
        shutil.rmtree("o", ignore_errors=True)
        ended = attempt(flags(data), kill_at=kill_at)
        if ended.code == 0:
            break
        assert ended.code == -signal.SIGKILL, f"event {kill_at}: exit {ended.code}\n{ended.error}"
        kills += 1
        if (saved := acknowledged()) is not None:
            assert checkpoint()["step"] >= saved, f"event {kill_at}: step {saved} was saved and does not load"
        to_the_end(attempt, flags(data))
        assert_same_end(straight, f"killed at event {kill_at}")
    assert kills >= 15 // every, f"only {kills} file events"


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_while_recovering_from_a_damaged_checkpoint_loses_nothing(data, attempt, straight, every):
    """ckpt.pt is damaged, so ckpt.prev.pt of step 4 is resumed, and killed at each file event: a step loads still."""
    assert attempt(flags(data, out="before"), kill_in_step=10).code == -signal.SIGKILL
    whole = bytearray(Path("before/ckpt.pt").read_bytes())
    whole[len(whole) // 2] ^= 1
    Path("before/ckpt.pt").write_bytes(whole)
    assert checkpoint("before")["step"] == 4
    kills = 0
    for kill_at in range(1, 500, every):
        shutil.rmtree("o", ignore_errors=True)
        shutil.copytree("before", "o")
        ended = attempt([*flags(data), "--resume"], kill_at=kill_at)
        if ended.code == 0:
            break
        assert ended.code == -signal.SIGKILL, ended.error
        kills += 1
        try:
            step = checkpoint()["step"]
        except UserError as error:
            raise AssertionError(f"killed at event {kill_at}, nothing loads any more: {error}") from error
        assert step >= 4, f"event {kill_at}: step {step} loads, less than before"
        to_the_end(attempt, flags(data))
        assert_same_end(straight, f"killed at event {kill_at}")
    assert kills >= 12 // every, f"only {kills} file events"


@pytest.mark.parametrize("count", [3, pytest.param(12, marks=pytest.mark.slow)])
@pytest.mark.parametrize("full", [False, True], ids=["killed", "disk full"])
def test_stopped_inside_a_write_the_old_checkpoint_is_whole(data, attempt, straight, count, full):
    """At byte limits all through the file, writing it kills the process, or fails as on a full disk: the step before
    loads, nothing half-written is left behind a failure, which is one line with exit 1."""
    assert attempt(flags(data, out="before"), kill_in_step=6).code == -signal.SIGKILL
    size = Path("before/ckpt.pt").stat().st_size
    for i in range(count):
        limit = 8192 + (size - 8192 - 1) * i // (count - 1)
        shutil.rmtree("o", ignore_errors=True)
        shutil.copytree("before", "o")
        ended = attempt([*flags(data), "--resume"], limit=limit, full=full)
        if full:
            assert "cannot save o/ckpt.pt" in one_line(ended, 1)
            assert not list(Path("o").glob("*.tmp")), f"left: {list(Path('o').glob('*.tmp'))}"
        else:
            assert ended.code == -signal.SIGXFSZ, f"limit {limit} of {size}: exit {ended.code}\n{ended.error}"
        assert Path("o/ckpt.pt").read_bytes() == Path("before/ckpt.pt").read_bytes(), "the old checkpoint was touched"
        assert checkpoint()["step"] == 4
        to_the_end(attempt, flags(data))
        assert_same_end(straight, f"stopped after {limit} of {size} bytes")


def test_a_full_disk_shows_before_the_first_step(data, attempt):
    """A new run whose checkpoint does not fit, or not even the log: exit 1, one line, no step trained."""
    for limit in (700, 9000, 40_000):  # config.json has more than 700 bytes, the checkpoint more than 40,000
        shutil.rmtree("o", ignore_errors=True)
        one_line(attempt(flags(data), limit=limit, full=True), 1)
        assert not list(Path("o").glob("ckpt*")), f"limit {limit}: left {list(Path('o').glob('ckpt*'))}"
        assert not Path("o/log.csv").exists() or log() == [], f"limit {limit}: a step was trained"


@pytest.mark.parametrize("count", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_at_random_times_in_a_loop_with_resume(data, attempt, count):
    """SIGKILL again and again, resumed each time: never behind what was acknowledged, and in the end the same."""
    draw, values = random.Random(count), dict(steps=60 * count, eval_every=20, save_every=5)
    train.train(*train.configs({**SMALL, "data": data, "out": "straight", **values}))
    for kill in range(count):
        again = ["--resume"] if kill else []
        ended = attempt([*flags(data, **values), *again], then=[(draw.uniform(0, 0.3), signal.SIGKILL)])
        assert ended.code == -signal.SIGKILL, f"kill {kill}: exit {ended.code}\n{ended.error}"
        saved = acknowledged(every=5)
        assert checkpoint()["step"] >= saved, f"kill {kill}: step {saved} was saved, {checkpoint()['step']} loads"
    to_the_end(attempt, flags(data, **values))
    assert_same_end((checkpoint("straight"), log("straight")), f"{count} kills")
    steps = [int(row["step"]) for row in log()]
    assert steps == list(range(1, 60 * count + 1)), "each step once in the log"


# ---- Resumed equals uninterrupted -------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["between saves", "evaluation", "save", "step after a save", "last step"])
def test_resumed_equals_uninterrupted_to_the_bit(data, attempt, straight, where):
    """Killed in step 7, in an evaluation, between the two renames of a save, in step 9, in step 12: weights, optimizer
    state and log of the resumed run are those of the uninterrupted one."""
    harm = {"between saves": dict(kill_in_step=7), "evaluation": dict(kill_in_evaluation=True),
            "step after a save": dict(kill_in_step=9), "last step": dict(kill_in_step=12)}.get(where)
    if harm:
        assert attempt(flags(data), **harm).code == -signal.SIGKILL
    for kill_at in range(8, 40) if where == "save" else ():
        shutil.rmtree("o", ignore_errors=True)
        assert attempt(flags(data), kill_at=kill_at).code == -signal.SIGKILL
        if not Path("o/ckpt.pt").exists() and Path("o/ckpt.prev.pt").exists():
            break
    expected = {"between saves": 4, "evaluation": 8, "save": 0, "step after a save": 8, "last step": 8}[where]
    assert checkpoint()["step"] == expected, f"killed in {where}: step {checkpoint()['step']} loads, not {expected}"
    ended = attempt([*flags(data), "--resume"])
    assert ended.code == 0, ended.error
    assert_same_end(straight, f"killed in {where}")


def test_intervals_change_nothing(data, straight):
    """Evaluating, saving and logging often, seldom or never: 6 settings, 1 result."""
    for log_every, eval_every, save_every in ((1, 1, 1), (5, 0, 0), (10, 7, 5), (100, 3, 0), (2, 0, 3), (3, 4, 100)):
        values = dict(log_every=log_every, eval_every=eval_every, save_every=save_every)
        train.train(*train.configs({**SMALL, "data": data, "out": "o", **values}), overwrite=True)
        assert equal(learned(checkpoint()), learned(straight[0])), f"{values} changed the result"
        of_all = {row["step"]: row for row in straight[1]}
        for row in log():
            differ = [name for name, value in of_all[row["step"]].items() if value and row[name] and value != row[name]]
            assert not differ, f"{values}, step {row['step']}: {differ} differ"


def test_the_same_seed_is_the_same_run_and_another_is_not(data, attempt, straight):
    """A second process with the same flags repeats every bit; seed 1 does not."""
    for seed in (0, 1):
        assert attempt([*flags(data, seed=seed), "--overwrite"]).code == 0
        assert equal(learned(checkpoint()), learned(straight[0])) == (seed == 0), f"seed {seed}"


# ---- Signals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_ctrl_c_and_sigterm_save_and_leave(data, attempt, count):
    """At random moments, evaluations included: exit 130 or 143, the checkpoint is of the last step, 0 steps lost."""
    draw, values = random.Random(count), dict(steps=4000, eval_every=2, save_every=0, warmup=0)
    lost = 0
    for moment in range(count):
        number, code = ((signal.SIGINT, 130), (signal.SIGTERM, 143))[moment % 2]
        ended = attempt([*flags(data, **values), *(["--resume"] if moment else [])], then=[(draw.random() / 3, number)])
        assert ended.code == code and not ended.error, f"exit {ended.code}, expected {code}:\n{ended.error}"
        assert "--out o --resume" in ended.out.splitlines()[-1], ended.out.splitlines()[-1]
        step = int(log()[-1]["step"])
        lost += step - checkpoint()["step"]
        assert [int(row["step"]) for row in log()] == list(range(1, step + 1)), "each step once in the log"
    assert lost == 0, f"{lost} steps lost at {count} moments"
    finish = train.configs({**SMALL, "data": data, "out": "straight", **values})  # the same steps, without a signal
    train.train(replace(finish[0], steps=4000, save_every=step, eval_every=2000),
                finish[1], extra_loss=stop_after(step))
    assert equal(learned(checkpoint())["model"], learned(checkpoint("straight"))["model"]), "weights differ"


def stop_after(step):
    """An extra loss of 0 that sends its own process a SIGTERM in the given step, for train() to catch."""
    calls = []

    def loss(model):
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return sum(p.sum() for p in model.parameters()) * 0

    return loss


def test_a_second_signal_ends_the_program_at_once(data, attempt):
    """In a step that takes a minute: the first SIGTERM waits for its end, the second does not; the old step loads."""
    begin = time.monotonic()
    ended = attempt(flags(data), slow_step=6, then=[(1.0, signal.SIGTERM), (0.3, signal.SIGTERM)])
    assert ended.code == -signal.SIGTERM and time.monotonic() - begin < 30, f"exit {ended.code}"
    assert checkpoint()["step"] == 4, checkpoint()["step"]


def test_a_signal_in_a_run_inside_a_program_comes_back_as_a_number(data):
    """train() called as a function returns the signal, having saved, and leaves Python's handlers as they were."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    result = train.train(*train.configs({**SMALL, "data": data, "out": "o"}), extra_loss=stop_after(5))
    assert result["signal"] == signal.SIGTERM and checkpoint()["step"] == 5, (result["signal"], checkpoint()["step"])
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)], "handlers were changed"


# ---- Damage -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(data, tmp_path_factory):
    """(bytes of a whole checkpoint, what is in it)."""
    out = tmp_path_factory.mktemp("saved") / "run"
    train.train(*train.configs({**SMALL, "data": data, "out": str(out), "steps": 2}))
    return (out / "ckpt.pt").read_bytes(), train.read_checkpoint(out / "ckpt.pt")


def loads(content):
    """What read_checkpoint makes of a file with this content; None where it refuses it, in one line that names it."""
    Path("x.pt").write_bytes(content)
    try:
        return train.read_checkpoint(Path("x.pt"))
    except UserError as error:
        assert "x.pt" in str(error) and "\n" not in str(error) and error.code == 1, repr(str(error))


@pytest.mark.parametrize("share", [10, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind, count", [("flip", 400), ("cut", 200), ("random", 100), ("zero page", 100)])
def test_damage_is_found(saved, kind, count, share):
    """400 flipped bits, 200 truncations, 100 random files, 100 zeroed pages (a tenth in the short run): no file loads
    with other contents than were saved."""
    whole, state = saved
    draw, changed, refused = random.Random(kind), 0, 0
    for _ in range(count // share):
        content = bytearray(whole)
        if kind == "flip":
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        elif kind == "cut":
            del content[draw.randrange(len(content)) :]
        elif kind == "random":
            content = draw.choice((b"", b"PK\x03\x04", b"\x80\x02")) + draw.randbytes(draw.choice((1, 100, 10_000)))
        else:
            page = draw.randrange(len(content) // 4096) * 4096
            content[page : page + 4096] = bytes(4096)
        got = loads(content)
        refused += got is None
        changed += got is not None and not equal(got, state)
    assert changed == 0, f"{changed} of {count // share} damaged files loaded with changed contents"
    assert refused >= count // share * 0.8, f"only {refused} of {count // share} were refused"
    assert equal(loads(whole), state), "the undamaged file must load"


def test_damage_falls_back_to_the_previous_checkpoint_and_says_so(data, attempt, straight):
    """One bit of ckpt.pt flipped: --resume and --sample say which file and step they take instead; the end is equal."""
    assert attempt(flags(data), kill_in_step=10).code == -signal.SIGKILL
    content = bytearray(Path("o/ckpt.pt").read_bytes())
    content[len(content) // 3] ^= 16
    Path("o/ckpt.pt").write_bytes(content)
    for argv in (["--out=o", "--sample=the", "--sample-tokens=1", "--device=cpu"], [*flags(data), "--resume"]):
        ended = attempt(argv)
        assert ended.code == 0 and len(ended.error.splitlines()) == 1, ended.error
        assert "warning" in ended.error and "o/ckpt.prev.pt, step 4" in ended.error, ended.error
    assert_same_end(straight, "damaged ckpt.pt")


def test_with_both_damaged_nothing_is_touched(data, attempt):
    """Neither file loads: exit 1, one line, and every file stays as it was; a new run needs --overwrite."""
    assert attempt(flags(data), kill_in_step=10).code == -signal.SIGKILL
    for name in ("ckpt.pt", "ckpt.prev.pt"):
        Path("o", name).write_bytes(Path("o", name).read_bytes()[:-100])
    before = {path: path.read_bytes() for path in Path("o").iterdir()}
    for more, code in ((["--resume"], 1), (["--sample=the"], 1), ([], 2)):
        one_line(attempt([*flags(data), *more]), code)
        assert before == {path: path.read_bytes() for path in Path("o").iterdir()}, f"{more} changed the folder"


class Hostile:
    """Runs a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def stored(members, compression=zipfile.ZIP_STORED):
    """A zip file of {name: bytes}."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def torch_file(thing, **options):
    file = io.BytesIO()
    torch.save(thing, file, **options)
    return file.getvalue()


def test_no_code_in_a_checkpoint_runs(saved, attempt):
    """Pickles that call os.system, open, eval or exec, in every container: refused, 0 executions."""
    whole, state = saved
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in members if name.endswith("data.pkl"))
    calls = [(os.system, "touch executed"), (open, "executed", "w"), (eval, "open('executed', 'w')"),
             (exec, "open('executed', 'w')"), (subprocess.check_call, ["touch", "executed"])]
    count = 0
    for call in calls:
        pickle.loads(pickle.dumps(Hostile(*call)))
        assert Path("executed").exists(), f"{call[0]} does nothing even where it runs: this test shows nothing"
        Path("executed").unlink()
        for thing in (Hostile(*call), {**state, "step": Hostile(*call)}, {**state, "more": [Hostile(*call)]}):
            for content in (torch_file(thing), torch_file(thing, _use_new_zipfile_serialization=False),
                            pickle.dumps(thing) if thing.__class__ is Hostile else b"",
                            stored({**members, pickled: pickle.dumps(Hostile(*call), protocol=2)})):
                assert loads(content) is None, f"{call[0]} was not refused"
                count += 1
        assert not Path("executed").exists(), f"{call[0].__name__} was executed"
    assert count == 60, count
    Path("o").mkdir()
    Path("o/ckpt.pt").write_bytes(torch_file({**state, "step": Hostile(os.system, "touch executed")}))
    message = one_line(attempt(["--out=o", "--sample=the"]), 1)
    assert not Path("executed").exists() and "weights_only" not in message, message


@pytest.mark.parametrize("kind", ["empty", "html", "text", "png", "deflated", "other zip", "legacy", "tensor", "list",
                                  "number", "other dict", "missing key", "plain pickle", "missing member"])
def test_files_of_other_programs_are_refused(saved, kind):
    """What is not a checkpoint of train.py, whole as it may be: one line that names the file."""
    whole, state = saved
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    content = {
        "empty": lambda: b"", "html": lambda: b"<!doctype html><title>404</title>", "text": lambda: b"hello\n" * 99,
        "png": lambda: b"\x89PNG\r\n\x1a\n" + bytes(500), "other zip": lambda: stored({"story.txt": b"once"}),
        "deflated": lambda: stored(members, zipfile.ZIP_DEFLATED), "list": lambda: torch_file([1, 2]),
        "legacy": lambda: torch_file(state, _use_new_zipfile_serialization=False),
        "tensor": lambda: torch_file(torch.zeros(3)), "number": lambda: torch_file(7),
        "other dict": lambda: torch_file({"state_dict": state["model"], "epoch": 3}),
        "missing key": lambda: torch_file({name: state[name] for name in state if name != "optimizer"}),
        "plain pickle": lambda: pickle.dumps({"step": 1}),
        "missing member": lambda: stored({n: c for n, c in members.items() if not n.endswith("data/0")}),
    }[kind]()
    assert loads(content) is None, f"a file that is {kind} was taken for a checkpoint"


def test_a_folder_or_a_changed_model_in_place_of_a_checkpoint(data, saved, attempt):
    """ckpt.pt is a folder, or has a tensor less or of another shape: exit 1, one line, for --resume and --sample."""
    state = saved[1]
    fewer = {**state, "model": {name: p for name, p in state["model"].items() if "head" not in name}}
    other = {**state, "model": {**state["model"], "head.weight": torch.zeros(3, 3)}}
    for thing in ("folder", fewer, other):
        shutil.rmtree("o", ignore_errors=True)
        Path("o").mkdir()
        if thing == "folder":
            Path("o/ckpt.pt").mkdir()
        else:
            Path("o/ckpt.pt").write_bytes(torch_file({**thing, "step": 8}))
        for argv in ([*flags(data), "--resume"], ["--out=o", "--sample=the", "--device=cpu"]):
            one_line(attempt(argv), 1)


def test_weights_that_are_not_finite_are_one_line_when_sampled(saved, attempt):
    """A checkpoint of another program's making, with NaN in it: no traceback out of the sampling."""
    Path("o").mkdir()
    state = saved[1]
    weights = {**state["model"], "norm.weight": state["model"]["norm.weight"] * float("nan")}
    Path("o/ckpt.pt").write_bytes(torch_file({**state, "model": weights}))
    one_line(attempt(["--out=o", "--sample=the", "--device=cpu"]), 1)


def test_a_damaged_log_does_not_stop_a_resumed_run(data, attempt):
    """Zeros and bytes that are no UTF-8, as after a power cut, in log.csv: dropped, and the run goes on."""
    assert attempt(flags(data), kill_in_step=6).code == -signal.SIGKILL
    with open("o/log.csv", "ab") as file:
        file.write(b"\0\0\0\0\n\xff\xfe,1,2\nnot a number\n")
    ended = attempt([*flags(data), "--resume"])
    assert ended.code == 0, ended.error
    assert [row["step"] for row in log()] == [str(step) for step in range(1, 13)]


# ---- Folders ----------------------------------------------------------------------------------------------------


def test_two_runs_cannot_share_a_folder(data, attempt, worker, straight):
    """The second is refused with one line while the first works, and let in once that is killed; the end is equal."""
    first = attempt(flags(data), slow_step=6, then=[(0.5, None)])
    try:
        for more in (["--overwrite"], ["--resume"]):
            assert "another run" in one_line(attempt([*flags(data), *more]), 1)
    finally:
        os.kill(first, signal.SIGKILL)
    assert worker(wait_for, first) == -signal.SIGKILL
    assert attempt([*flags(data), "--resume"]).code == 0
    assert_same_end(straight, "after a killed run")


def test_where_a_run_cannot_write(data, attempt):
    """A file in place of the folder, or a folder that is read-only: exit 1 and one line, before the first step."""
    Path("o").write_text("mine")
    assert "o" in one_line(attempt(flags(data)), 1) and Path("o").read_text() == "mine"
    assert one_line(attempt(flags(data, out="o/deeper")), 1)
    if os.geteuid():  # root may write anywhere
        Path("locked").mkdir(mode=0o555)
        one_line(attempt(flags(data, out="locked")), 1)
        assert not list(Path("locked").iterdir())
    Path("p/ckpt.pt.tmp").mkdir(parents=True)  # here nobody can write the checkpoint
    one_line(attempt(flags(data, out="p")), 1)
    assert not Path("p/ckpt.pt").exists()


def test_a_folder_with_a_run_is_not_trained_over(data, attempt):
    """Without --resume or --overwrite: exit 2 and the three commands to choose from; nothing is changed."""
    assert attempt(flags(data)).code == 0
    before = {path: path.read_bytes() for path in Path("o").iterdir()}
    message = one_line(attempt(flags(data)), 2)
    for command in ("python train.py --out o --resume", "python train.py --out o --sample", "--overwrite"):
        assert command in message, message
    assert "--steps" in one_line(attempt([*flags(data), "--resume"]), 2), "a finished run is not resumed"
    assert before == {path: path.read_bytes() for path in Path("o").iterdir()}, "the folder was changed"
    assert attempt([*flags(data, seed=1), "--overwrite"]).code == 0
    assert checkpoint()["config"]["seed"] == 1


def test_resume_never_starts_from_scratch(data, attempt):
    """No folder, an empty one, a misspelt name, a file: exit 1, one line, and nothing is made."""
    Path("empty").mkdir()
    Path("file").write_text("")
    for out in ("missing", "empty", "file", "empty/deeper"):
        for more in ("--resume", "--sample=the"):
            one_line(attempt([*flags(data, out=out), more]), 1)
    assert not Path("missing").exists() and not list(Path("empty").iterdir())


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory):
    """The folder of a run that a signal stopped in step 5."""
    out = str(tmp_path_factory.mktemp("stopped") / "run")
    train.train(*train.configs({**SMALL, "data": data, "out": out}), extra_loss=stop_after(5))
    return out


@pytest.mark.parametrize("flag", ["seed=1", "batch_size=3", "accumulate=2", "lr=0.5", "warmup=3", "weight_decay=0",
                                  "grad_clip=2", "balance_weight=0", "erc_weight=0", "erc_alpha=0.5", "erc_noise=none",
                                  "d_model=32", "n_experts=8", "top_k=1", "n_layers=2", "renormalize", "no-qk_norm",
                                  "data=elsewhere", "dtype=bf16", "deterministic"])
def test_resume_refuses_settings_that_contradict_the_run(stopped, flag):
    """Exit 2, naming the flag, its value here and the one of the run."""
    name = flag.removeprefix("no-").partition("=")[0]
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} is .* here, but") as caught:
        train.main([f"--out={stopped}", "--resume", f"--{flag}"])
    assert caught.value.code == 2 and str(train.load_checkpoint(Path(stopped))["config"][name]) in str(caught.value)


def test_resume_takes_what_may_change(stopped, straight):
    """More steps, other intervals, a folder that was moved; values repeated that agree; the run's own otherwise."""
    shutil.copytree(stopped, "moved")
    assert train.main(["--out=moved", "--resume", "--steps=15", "--log-every=2", "--eval-every=0", "--save-every=0",
                       "--seed=0", "--lr=0.004", "--sample-tokens=1"]) == 0
    state = checkpoint("moved")
    assert state["step"] == 15 and state["config"]["batch_size"] == 2 and state["config"]["out"] == "moved"
    assert [row["step"] for row in log("moved")] == ["1", "2", "3", "4", "5", "6", "8", "10", "12", "14", "15"]


@pytest.mark.parametrize("change", ["other text", "longer", "renamed", "dropped", "added"])
def test_resume_refuses_changed_data(data, straight, change):
    """Other text under the same names, and shards longer, renamed, dropped or added: exit 1, the run is untouched."""
    shutil.copytree(data, "data")
    if change == "other text":
        text = Path(data).with_name("text.txt").read_text()
        Path("text.txt").write_text(text.replace("fox", "hen"))
    else:
        Path("data/meta.json").unlink()  # foreign shards: only names and lengths are known of them
    values = dict(data="data", out="o", steps=5)
    if change != "other text":
        values |= dict(n_layers=1)
    train.train(*train.configs({**SMALL, **values}), extra_loss=stop_after(3))
    before = Path("o/ckpt.pt").read_bytes()
    shards = sorted(Path("data").glob("train*"))
    if change == "other text":
        prepare_data.main("text.txt --out data --tokenizer bytes --shard-tokens 6000 --overwrite".split())
    elif change == "longer":
        tokens = shards[-1].read_bytes()[HEADER.size :] + struct.pack("<H", 7)
        shards[-1].write_bytes(HEADER.pack(MAGIC, 1, len(tokens) // 2) + tokens)
    elif change == "renamed":
        shards[-1].rename("data/train_000009.bin")
    elif change == "dropped":
        shards[-1].unlink()
    else:
        shutil.copy(shards[0], "data/train_000009.bin")
    with pytest.raises(UserError, match="had other data") as caught:
        train.main(["--out=o", "--resume", "--data=data"])
    assert caught.value.code == 1 and Path("o/ckpt.pt").read_bytes() == before


@pytest.mark.parametrize("damage, words", [
    ("missing", "is missing"), ("file", "is not a folder"), ("empty", "no training shard"), ("no val", "is missing"),
    ("no meta.json", "not finished"), ("cut", "cut or damaged"), ("magic", "is not a shard"), ("odd", "cut or damaged"),
    ("extra", "not listed"), ("meta.json", "meta.json is damaged"), ("id", "outside the vocabulary"),
])
def test_data_that_cannot_be_trained_on(data, attempt, damage, words):
    """Missing, foreign or damaged data: exit 1, one line; no run folder, but where only the ids are wrong."""
    shard = Path("data/train_000000.bin")
    if damage == "file":
        Path("data").write_text("")
    elif damage != "missing":
        shutil.copytree(data, "data")
        content = shard.read_bytes()
    if damage == "empty":
        shutil.rmtree("data")
        Path("data").mkdir()
    elif damage == "no val":
        next(Path("data").glob("val*")).unlink()
    elif damage == "no meta.json":
        Path("data/meta.json").unlink()
        Path("data", prepare_data.UNFINISHED).write_bytes(b"")
    elif damage == "meta.json":
        Path("data/meta.json").write_text('{"shards": 7}')
    elif damage == "extra":
        shutil.copy(shard, "data/train_000009.bin")
    elif damage in ("cut", "odd", "magic", "id"):
        shard.write_bytes({"cut": content[:-200], "odd": content + b"\0", "magic": b"\0" * 4 + content[4:],
                           "id": content[: HEADER.size] + b"\xff\xff" * (len(content[HEADER.size :]) // 2)}[damage])
    message = one_line(attempt(flags("data")), 1)
    assert words in message, message
    assert Path("o").exists() == (damage == "id"), "a run folder was made for data that cannot be used"


# ---- Command lines ----------------------------------------------------------------------------------------------


def bad_command_lines():
    """Values that no flag takes, and flags that do not exist."""
    whole = "steps batch-size accumulate log-every sample-tokens n-layers n-heads n-experts top-k d-model d-expert"
    for flag in whole.split():
        yield from ([f"--{flag}", "0"], [f"--{flag}=-1"], [f"--{flag}", "1e3"])
    for flag in ("steps", "context-length", "seed"):
        yield from ([f"--{flag}", "nan"], [f"--{flag}", "inf"], [f"--{flag}", "abc"], [f"--{flag}="],
                    [f"--{flag}=-9223372036854775809"], [f"--{flag}", "2.0"])
    for flag in ("steps", "seed", "batch-size", "warmup"):
        yield from ([f"--{flag}", str(2**63)], [f"--{flag}", "9" * 40])
    for flag in ("lr", "grad-clip", "weight-decay", "balance-weight", "z-weight", "erc-weight", "erc-alpha",
                 "temperature", "rope-theta", "norm-eps"):
        yield from ([f"--{flag}", "nan"], [f"--{flag}", "inf"], [f"--{flag}=-inf"], [f"--{flag}", "1e999"],
                    [f"--{flag}=-0.1"], [f"--{flag}", "abc"], [f"--{flag}", "1,5"])
    for flag in ("lr", "grad-clip", "rope-theta", "norm-eps"):
        yield [f"--{flag}", "0"]
    yield from ([flag] for flag in (
        "--step", "--max=5", "--erc", "--n-expert=4", "--resum", "--over", "--vocab-size=300", "--no-steps", "--qk",
        "--no-resume", "-x", "--", "--lr", "--steps", "--preset", "--sample", "word", "--compile=1", "--qk-norm=yes",
        "--no-qk-norm=0", "--resume=1", "--preset=huge", "--dtype=float16", "--dtype=", "--erc-noise=gauss",
        "--device=tpu", "--device=cuda:99", "--device=", "--d-model=12", "--d-expert=12", "--n-heads=3", "--top-k=9"))
    yield from (["--resume", "--overwrite"], ["--compile", "--dtype", "fp32"], ["--renormalize", "--top-k", "1"],
                ["--n-experts", "4", "--top-k", "5"], ["--d-model", "16", "--n-heads", "16"],
                ["--sample", "a" * 100_001],
                ["--steps", "5", "5"], ["--lr=1", "--lr=x"], ["--erc_weight=-1"], ["--batch_size", "0"], ["\x1b[31m"])


def test_bad_command_lines_are_exit_2_and_one_line(data, capsys, monkeypatch):
    """nan, inf, negative, zero, huge, wrong types, abbreviations, unknown flags: no traceback, and nothing is made."""
    lines = [line for line in bad_command_lines() if line != ["--"]]
    for line in lines:
        argv = [*(flag for flag in flags(data) if flag.partition("=")[0] not in {a.partition("=")[0] for a in line}),
                *line]
        monkeypatch.setattr(sys, "argv", ["train.py", *argv])
        code = prepare_data.run(train.main)
        printed = capsys.readouterr()
        error = printed.err.splitlines()
        assert code == 2 and len(error) == 1, f"{line}: exit {code}, {len(error)} lines\n{printed.err}"
        assert error[0].startswith("train.py: error: ") and len(error[0]) < 300, f"{line}: {error[0]}"
        assert not printed.out and not Path("o").exists(), f"{line}: {printed.out}"
    assert len(lines) >= 150, f"only {len(lines)} command lines"


@pytest.mark.parametrize("flag", ["--d-model=800000000", "--n-layers=1000000000000", "--n-experts=10000000000",
                                  "--d-expert=80000000000", "--context-length=1000000000000",
                                  "--batch-size=1000000000000"])
def test_sizes_that_no_machine_holds_are_one_line(data, attempt, flag):
    """Exit 1 or 2 within seconds, instead of a traceback or of filling the memory."""
    ended = attempt([*flags(data), flag], seconds=20)
    one_line(ended, 1 if ended.code == 1 else 2)


def test_closed_stdout_is_no_traceback(data, attempt):
    """python train.py ... | head -1: when nobody reads on, the run ends without a word."""
    ended = attempt(flags(data), closed=True)
    assert ended.code == 1 and ended.error == "", f"exit {ended.code}: {ended.error}"


def test_a_control_character_in_a_message_does_not_reach_the_terminal(data, attempt):
    """A folder name or flag with an escape sequence is printed without it."""
    for argv in ([*flags(data), "--\x1b[31mred"], [*flags("\x1b[31mred")]):
        ended = attempt(argv)
        assert re.fullmatch(r"[^\x00-\x09\x0b-\x1f]*", ended.error), repr(ended.error)
