"""Nothing lost: runs are killed, starved and fed garbage, and what they leave is compared to the bit.

Kills, signals and full disks happen to real processes, forked by a server that has imported torch once. Nothing of the
product is replaced: files are really damaged, disks are really full. Marked `slow` is the long half.
"""

import io
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from test_train import ROOT, checkpoint, flags, log, nothing, settings, torchrun
from torch.utils._pytree import tree_flatten

import prepare_data
import train
from prepare_data import UserError

RUN = dict(n_layers=1, steps=12, eval_every=3, save_every=4)

pytestmark = pytest.mark.usefixtures("elsewhere")


def argv(data, *more, **changes):
    return [*flags(data, **{**RUN, **changes}), *more]


def run_here(data, extra_loss=None, resume=None, overwrite=False, **changes):
    return train.train(*settings(data, **{**RUN, **changes}), extra_loss=extra_loss, resume=resume, overwrite=overwrite)


class Ended(NamedTuple):
    code: int  # negative: the signal that ended it
    out: str
    error: str


def child(folder, argv, kill_at=None, limit=None, slow=0.0):
    """train.py in a forked process. kill_at: SIGKILL at that file event under the run folder. limit: bytes beyond which
    no file grows, as on a full disk. slow: seconds that each step but the first takes longer.
    """
    signal.alarm(200)  # no child outlives its test
    os.chdir(folder)
    for number, name in ((1, "out.txt"), (2, "err.txt")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr, sys.argv = open(1, "w", closefd=False), open(2, "w", closefd=False), ["train.py", *argv]
    torch.set_num_threads(1)
    events, calls, update = 0, [], train.Run.update

    def watch(event, arguments):
        nonlocal events
        if event in ("open", "os.rename", "os.remove", "os.mkdir") and str(arguments[0]).startswith("out" + os.sep):
            events += 1
            if events == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    def slowly(*given, **named):
        calls.append(1)
        time.sleep(slow if len(calls) > 1 else 0)
        update(*given, **named)

    code = 99
    try:
        train.Run.update = slowly
        sys.addaudithook(watch)
        if limit:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        code = prepare_data.run(train.main)
    except SystemExit as ended:  # argparse's
        code = ended.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@pytest.fixture(scope="module")
def server():
    """Forks children of a process that has torch loaded, and no threads."""
    context = multiprocessing.get_context("forkserver")
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    context.set_forkserver_preload(["torch._dynamo", "test_reliability"])
    yield context
    os.environ.pop("PYTHONPATH")
    if before:
        os.environ["PYTHONPATH"] = before


@pytest.fixture
def attempt(server):
    """attempt(argv, then, ...) runs train.py in a process of its own -> Ended. `then` is a list of (seconds, signal
    number): after the first new line of the log, and that time each, the process gets the signal.
    """
    def start(argv, then=(), **harm):
        lines = len(log()) if Path("out/log.csv").exists() and "--overwrite" not in argv else 0
        process = server.Process(target=child, args=(os.getcwd(), argv), kwargs=harm)
        process.start()
        while then and process.is_alive() and not (Path("out/log.csv").exists() and len(log()) > lines):
            time.sleep(0.005)
        for delay, number in then:
            time.sleep(delay)
            if process.is_alive():
                os.kill(process.pid, number)
        process.join()
        return Ended(process.exitcode, Path("out.txt").read_text(), Path("err.txt").read_text())

    return start


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """(checkpoint, log) of the run that nothing happened to."""
    out = str(tmp_path_factory.mktemp("straight") / "run")
    run_here(data, out=out)
    return checkpoint(out), log(out)


def equal(one, two):
    """Nested dicts, lists and tensors, equal to the bit."""
    (leaves, form), (others, other_form) = tree_flatten(one), tree_flatten(two)
    return form == other_form and all(type(a) is type(b) and (torch.equal(a, b) if torch.is_tensor(a) else a == b)
                                      for a, b in zip(leaves, others))


def assert_same_end(straight, what):
    for name in ("model", "optimizer", "step"):
        assert equal(checkpoint()[name], straight[0][name]), f"{what}: another {name}"
    assert log() == straight[1], f"{what}: the log is not that of the uninterrupted run: {log()}"


def one_line(ended, code=1):
    """The message of a run that must end with this code and one line on stderr, which is returned."""
    lines = ended.error.splitlines()
    assert ended.code == code and len(lines) == 1, f"exit {ended.code}, expected {code}:\n{ended.error}"
    assert lines[0].startswith("train.py: error: "), lines[0]
    return lines[0]


# ---- Kills and full disks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [12, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_at_any_file_event_loses_no_saved_step(data, attempt, straight, every):
    """SIGKILL at each file event, or each twelfth, of a run with 4 saves: the last save loads, and the run ends as if
    nothing had happened."""
    kills = 0
    for kill_at in range(every, 500, every):
        shutil.rmtree("out", ignore_errors=True)
        ended = attempt(argv(data), kill_at=kill_at)
        if ended.code == 0:
            break
        assert ended.code == -signal.SIGKILL, f"event {kill_at}: exit {ended.code}\n{ended.error}"
        kills += 1
        logged = len(log()) if Path("out/log.csv").exists() else 0
        if logged:  # step s + 1 is logged after the save of s
            assert checkpoint()["step"] >= (logged - 1) // 4 * 4, f"event {kill_at}: step {checkpoint()['step']} loads"
        ended = attempt(argv(data, "--resume" if Path("out/ckpt.pt").exists() else "--overwrite"))
        assert ended.code == 0 or "is finished" in ended.error, ended.error
        assert_same_end(straight, f"killed at event {kill_at}")
    assert kills >= 20 // every, f"only {kills} file events"


@pytest.mark.parametrize("count", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_at_random_moments_lose_nothing(data, attempt, count):
    """SIGKILL again and again, resumed each time: never behind the last save, and in the end equal to the bit."""
    draw, values = random.Random(count), dict(steps=30 * count, eval_every=20, save_every=5)
    run_here(data, out="straight", **values)
    for kill in range(count):
        ended = attempt(argv(data, *["--resume"] * (kill > 0), **values), [(draw.uniform(0, 0.2), signal.SIGKILL)])
        assert ended.code == -signal.SIGKILL, f"kill {kill}: exit {ended.code}\n{ended.error}"
        saved = (int(log()[-1]["step"]) - 1) // 5 * 5
        assert checkpoint()["step"] >= saved, f"kill {kill}: step {saved} was saved, {checkpoint()['step']} loads"
    assert attempt(argv(data, "--resume", **values)).code == 0
    assert_same_end((checkpoint("straight"), log("straight")), f"{count} kills")


def test_a_full_disk_is_one_line_and_the_old_checkpoint_is_whole(data, attempt):
    """The disk fills up inside the next checkpoint: exit 1, the one before loads, no half file is left. Where not even
    the first one fits, the message comes before the first step."""
    with pytest.raises(ZeroDivisionError):
        run_here(data, extra_loss=stop_in(6, lambda: 1 / 0))
    before = Path("out/ckpt.pt").read_bytes()
    for limit in (8192, len(before) // 2, len(before) - 1):
        assert "cannot save out/ckpt.pt" in one_line(attempt(argv(data, "--resume"), limit=limit))
        assert Path("out/ckpt.pt").read_bytes() == before and checkpoint()["step"] == 4, "the old one was touched"
        assert not list(Path("out").glob("*.tmp")), "a half file is left"
    shutil.rmtree("out")
    one_line(attempt(argv(data), limit=9000))
    assert not list(Path("out").iterdir()), list(Path("out").iterdir())


def stop_in(step, what):
    """An extra loss of 0 that calls a function in the given step."""
    calls = []

    def loss(model):
        calls.append(1)
        if len(calls) == step:
            what()
        return nothing(model)

    return loss


def test_resumed_equals_uninterrupted_and_keeps_what_was_added_to_the_log(data, straight, monkeypatch):
    """Stopped by an exception in step 8, a line half written, a column added to the file and one in code: resumed from
    step 4, weights, optimizer and log are those of a run never stopped, and each column keeps its cells."""
    with pytest.raises(ZeroDivisionError):
        run_here(data, extra_loss=stop_in(8, lambda: 1 / 0))
    assert [row["step"] for row in log()] == [*"1234567"] and checkpoint()["step"] == 4
    lines = Path("out/log.csv").read_text().splitlines()
    Path("out/log.csv").write_text("\n".join([lines[0] + ",mine", *(f"{line},7" for line in lines[1:]), "1"]))
    measure = train.Run.measure
    monkeypatch.setattr(train, "LOG_COLUMNS", [*train.LOG_COLUMNS, "new"])
    monkeypatch.setattr(train.Run, "measure", lambda *given: dict(measure(*given), new=9))
    run_here(data, extra_loss=nothing, resume=checkpoint())
    rows = log()
    assert [(row.pop("mine"), row.pop("new")) for row in rows] == [("7", "")] * 4 + [("", "9")] * 8, "other cells"
    assert rows == straight[1] and equal(checkpoint()["model"], straight[0]["model"])
    assert equal(checkpoint()["optimizer"], straight[0]["optimizer"]), "another state of the optimizer"


def test_intervals_change_nothing(data, straight):
    """Evaluating, saving and logging in each step or never: the same weights."""
    for log_every, eval_every, save_every in ((1, 1, 1), (100, 0, 0)):
        run_here(data, log_every=log_every, eval_every=eval_every, save_every=save_every, overwrite=True)
        assert equal(checkpoint()["model"], straight[0]["model"]), f"{log_every, eval_every, save_every}"


# ---- Signals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_even_twice_within_50_ms_saves_and_leaves(data, attempt, number, code):
    """In steps of half a second: the step is ended and saved, nothing is lost, and how to go on is the last line."""
    ended = attempt(argv(data, save_every=0, eval_every=0, steps=400), [(0.3, number), (0.05, number)], slow=0.5)
    assert ended.code == code and not ended.error, f"exit {ended.code}, expected {code}:\n{ended.error}"
    assert ended.out.splitlines()[-1].endswith("python train.py --out out --resume"), ended.out
    assert checkpoint()["step"] == int(log()[-1]["step"]) >= 2, f"{checkpoint()['step']} saved, {log()[-1]} logged"


def test_a_signal_after_a_second_ends_the_program_at_once(data, attempt):
    """In a step that takes a minute: the first SIGTERM waits for its end, one 1.2 seconds later does not."""
    begin = time.monotonic()
    ended = attempt(argv(data), [(0.3, signal.SIGTERM), (1.2, signal.SIGTERM)], slow=60)
    assert ended.code == -signal.SIGTERM and time.monotonic() - begin < 50, f"exit {ended.code}"


def test_a_signal_in_a_run_inside_a_program_comes_back_as_a_number(data):
    """train() called as a function returns the signal, having saved, and leaves Python's handlers as they were."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    result = run_here(data, extra_loss=stop_in(5, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert result["signal"] == signal.SIGTERM and checkpoint()["step"] == 5, (result["signal"], checkpoint()["step"])
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)], "handlers were changed"


@pytest.mark.slow
def test_torchrun_and_its_workers_are_told_at_once(data):
    """SIGTERM to all three processes, twice within 50 ms, as schedulers send it: saved at the last logged step."""
    command, environment = torchrun(*argv(data, steps=100_000, save_every=0, eval_every=0))
    process = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True)
    threading.Timer(200, process.kill).start()
    while not (Path("out/log.csv").exists() and log()):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    for _ in range(2):
        os.killpg(process.pid, signal.SIGTERM)
        time.sleep(0.05)
    process.wait(60)
    assert checkpoint()["step"] == int(log()[-1]["step"]) > 0, f"{checkpoint()['step']} saved, {log()[-1]} logged"


# ---- Damage ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(data, tmp_path_factory):
    """(bytes of a whole checkpoint, what is in it)."""
    out = tmp_path_factory.mktemp("saved") / "run"
    run_here(data, out=str(out), steps=2)
    return (out / "ckpt.pt").read_bytes(), checkpoint(out)


def loads(content):
    """What load_checkpoint makes of a file with this content; None where it refuses it, in one line that names it."""
    Path("x").mkdir(exist_ok=True)
    Path("x/ckpt.pt").write_bytes(content)
    try:
        return checkpoint("x")
    except UserError as error:
        assert "x/ckpt.pt is damaged" in str(error) and "\n" not in str(error), repr(str(error))


@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["flip", "cut", "zero page", "other"])
def test_damage_is_found(saved, kind, count):
    """Flipped bits, truncations, zeroed pages, other files: no file loads with other contents than were saved."""
    whole, state = saved
    draw, refused = random.Random(kind), 0
    for _ in range(count):
        content = bytearray(whole)
        if kind == "flip":
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        elif kind == "cut":
            del content[draw.randrange(len(content)) :]
        elif kind == "other":
            content = draw.choice((b"", b"PK\x03\x04" + draw.randbytes(999), b"<!doctype html>", torch_file([1, 2]),
                                   torch_file(torch.zeros(3)), torch_file(dict(state_dict={})),
                                   torch_file({name: state[name] for name in state if name != "optimizer"})))
        else:
            page = draw.randrange(len(content) // 4096) * 4096
            content[page : page + 4096] = bytes(4096)
        got = loads(content)
        refused += got is None
        assert got is None or equal(got, state), f"a file with a {kind} loaded with changed contents"
    assert refused >= count * 0.8, f"only {refused} of {count} were refused"
    assert equal(loads(whole), state), "the undamaged file must load"


class Hostile:
    """Runs a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def torch_file(thing, **options):
    file = io.BytesIO()
    torch.save(thing, file, **options)
    return file.getvalue()


def test_no_code_in_a_checkpoint_runs(saved):
    """Pickles that call os.system, open or exec, in place of a checkpoint or within one: refused, 0 executions."""
    for call in ((os.system, "touch executed"), (open, "executed", "w"), (exec, "open('executed', 'w')")):
        pickle.loads(pickle.dumps(Hostile(*call)))
        assert Path("executed").exists(), f"{call[0]} does nothing even where it runs: this test shows nothing"
        Path("executed").unlink()
        for content in (torch_file(Hostile(*call)), torch_file({**saved[1], "step": Hostile(*call)}),
                        torch_file(Hostile(*call), _use_new_zipfile_serialization=False), pickle.dumps(Hostile(*call))):
            assert loads(content) is None, f"{call[0]} was not refused"
            assert not Path("executed").exists(), f"{call[0]} was executed"


# ---- Folders and data -----------------------------------------------------------------------------------------------


def test_a_folder_with_a_run_is_not_trained_over(data, attempt):
    """Without --resume or --overwrite: exit 1, one line with the ways out, and nothing is changed."""
    run_here(data)
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    message = one_line(attempt(argv(data)))
    assert "--resume" in message and "--overwrite" in message, message
    assert before == {path: path.read_bytes() for path in Path("out").iterdir()}, "the folder was changed"
    run_here(data, seed=1, overwrite=True)
    assert checkpoint()["config"]["seed"] == 1 and len(log()) == 12


def test_where_there_is_no_run_resume_and_sample_are_one_line(data):
    """No folder, an empty one, a file: UserError, and nothing is made."""
    Path("empty").mkdir()
    Path("file").write_text("")
    for out in ("missing", "empty", "file"):
        for more in ("--resume", "--sample=the"):
            with pytest.raises(UserError, match=f"no checkpoint in {out}; "):
                train.main(argv(data, more, out=out))
    assert not Path("missing").exists() and not list(Path("empty").iterdir())


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory):
    """The folder of a run that a signal stopped in step 5."""
    out = str(tmp_path_factory.mktemp("stopped") / "run")
    run_here(data, out=out, extra_loss=stop_in(5, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    return out


@pytest.mark.parametrize("flag", ["seed=1", "batch_size=3", "accumulate=2", "erc_weight=0",
                                  "d_model=32", "top_k=1", "renormalize", "no-qk_norm", "dtype=bf16", "deterministic"])
def test_resume_refuses_settings_that_contradict_the_run(stopped, capsys, flag):
    """Exit 2, naming the flag, its value here and the one of the run."""
    flag = flag.replace("_", "-")
    name = flag.removeprefix("no-").partition("=")[0]
    with pytest.raises(SystemExit) as caught:
        train.main([f"--out={stopped}", "--resume", f"--{flag}"])
    of_run = checkpoint(stopped)["config"][name.replace("-", "_")]
    error = capsys.readouterr().err
    assert caught.value.code == 2 and f"--{name} is " in error and f"but {of_run} in the run" in error, error


def test_resume_takes_what_may_change(data, stopped, capsys):
    """More steps, other intervals, a moved run folder, a moved data folder; values that agree; else the run's own."""
    shutil.copytree(stopped, "moved")
    shutil.copytree(data, "data")
    assert train.main(["--out=moved", "--data=data", "--resume", "--steps=15", "--log-every=2", "--eval-every=0",
                       "--save-every=0", "--seed=0", "--lr=0.004"]) == 0
    state = checkpoint("moved")
    assert state["step"] == 15 and state["config"]["batch_size"] == 2 and state["config"]["data"] == "data"
    assert [row["step"] for row in log("moved")] == "1 2 3 4 5 6 8 10 12 14 15".split(), log("moved")
    with pytest.raises(SystemExit):
        train.main(["--out=moved", "--resume"])
    assert "is finished, at step 15; to train on, add --steps" in capsys.readouterr().err


def test_resume_refuses_other_data_and_another_number_of_processes(data, stopped):
    """Another text, or a checkpoint of two processes: UserError, and the run is as it was."""
    before = Path(stopped, "ckpt.pt").read_bytes()
    Path("text.txt").write_text(Path(data).with_name("text.txt").read_text().replace("fox", "hen"))
    prepare_data.main("text.txt --out data --tokenizer bytes --shard-tokens 6000".split())
    with pytest.raises(UserError, match="had other data"):
        train.main([f"--out={stopped}", "--resume", "--data=data"])
    with pytest.raises(UserError, match="had other processes"):
        run_here(data, out=stopped, resume={**checkpoint(stopped), "processes": 2})
    assert Path(stopped, "ckpt.pt").read_bytes() == before


# ---- Where a run starts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values, expected", [
    (dict(RANK="", WORLD_SIZE=""), (0, 1)), (dict(RANK="0", WORLD_SIZE="1"), (0, 1)), (dict(WORLD_SIZE="2"), None),
    (dict(RANK="1"), None), (dict(RANK="1", WORLD_SIZE="2"), None),
    (dict(RANK="1", WORLD_SIZE="2", MASTER_ADDR="host", MASTER_PORT="1"), (1, 2)),
])
def test_environment_variables_of_torchrun_are_all_there_or_none(monkeypatch, values, expected):
    """Empty is unset; where only a part is set, one line instead of a traceback or of waiting for ever for a demo."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    if expected:
        assert train.processes() == expected
    else:
        with pytest.raises(UserError, match="not all that torchrun sets"):
            train.main([])
        assert not Path("data").exists()


def test_closed_stdout_and_stderr_are_no_reason_to_stop(data, monkeypatch):
    """python train.py >&- 2>&-, and a sys.stderr of None inside a program: trained and saved all the same."""
    command = [sys.executable, str(ROOT / "train.py"), *argv(data)]
    assert subprocess.run(["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command], timeout=200).returncode == 0
    assert checkpoint()["step"] == 12
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(sys, "stdout", None)
    run_here(data, out="none")
    assert checkpoint("none")["step"] == 12
