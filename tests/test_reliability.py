"""Nothing lost: runs are killed, starved and fed garbage, and what they leave is compared to the bit.

Kills and full disks happen to real processes, forked by a server that has imported torch once. `slow` is the long half.
"""

import fcntl
import io
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_train import ROOT, checkpoint, flags, log, new_run, nothing, trained
from torch.utils._pytree import tree_flatten

import prepare_data
import train
from prepare_data import UserError

RUN = dict(n_layers=1, steps=12, eval_every=3, save_every=4)

pytestmark = pytest.mark.usefixtures("elsewhere")


def argv(data, *more, **changes):
    return [*flags(data, **{**RUN, **changes}), *more]


def run_here(data, extra_loss=None, **changes):
    return trained(data, extra_loss, **{**RUN, **changes})


def child(folder, main, argv, kill_at=None, limit=None):
    """A program in a forked process. kill_at: SIGKILL at that step or file event. limit: the bytes of a full disk."""
    signal.alarm(200)  # no child outlives its test
    os.chdir(folder)
    os.dup2(os.open("err.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    sys.argv = ["train.py", *argv]
    torch.set_num_threads(1)
    events, any_signal = [], train.Run.any_signal

    def watch(event, arguments):
        if event == "step" or event in ("open", "os.rename", "os.remove") and str(arguments[0]).startswith("out/"):
            events.append(event)
            if len(events) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    train.Run.any_signal = lambda run, came: watch("step", ()) or any_signal(run, came)  # called once in each step
    sys.addaudithook(watch)
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.exit(prepare_data.run_program(main))


@pytest.fixture(scope="module")
def attempt():
    """attempt(argv, ...) forks train.py, or another main, where torch is loaded already -> its code, its error."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "test_reliability"])

    def start(argv, main=train.main, **harm):
        process = context.Process(target=child, args=(os.getcwd(), main, argv), kwargs=harm)
        process.start()
        process.join()
        return SimpleNamespace(code=process.exitcode, error=Path("err.txt").read_text())

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, ROOT / "tests"))))
        yield start


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """The folder of the run that nothing happened to."""
    out = tmp_path_factory.mktemp("straight") / "run"
    run_here(data, out=str(out))
    return out


def equal(one, two):
    """Nested dicts, lists and tensors, equal to the bit."""
    (leaves, form), (others, other_form) = tree_flatten(one), tree_flatten(two)
    return form == other_form and all(type(a) is type(b) and (torch.equal(a, b) if torch.is_tensor(a) else a == b)
                                      for a, b in zip(leaves, others))


def assert_same_end(straight, what):
    for name in ("model", "optimizer", "step"):
        assert equal(checkpoint()[name], checkpoint(straight)[name]), f"{what}: another {name}"
    assert log() == log(straight), f"{what}: the log is not that of the uninterrupted run: {log()}"


def interrupted(data, step):
    """A run in "out" that an exception ends in this step."""
    steps = iter(range(1, step))
    with pytest.raises(StopIteration):
        run_here(data, extra_loss=lambda model: nothing(model) * next(steps))


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_at_any_event_loses_no_saved_step(data, attempt, straight, every):
    """SIGKILL in steps and at file events: the last save loads, and the run resumed from it ends as if never killed."""
    kills = 0
    for kill_at in range(every, 500, every):
        shutil.rmtree("out", ignore_errors=True)
        ended = attempt(argv(data), kill_at=kill_at)
        if ended.code == 0:
            break
        assert ended.code == -signal.SIGKILL, f"event {kill_at}: exit {ended.code}\n{ended.error}"
        kills += 1
        logged = len(log()) if Path("out/log.csv").exists() else 0
        if logged > 4:  # step s + 1 is logged after the save of s
            assert checkpoint()["step"] >= (logged - 1) // 4 * 4, f"event {kill_at}: step {checkpoint()['step']} loads"
        ended = attempt(argv(data, "--resume" if Path("out/ckpt.pt").exists() else "--overwrite"))
        assert ended.code == 0 or "is finished" in ended.error, ended.error
        assert_same_end(straight, f"killed at event {kill_at}")
    assert kills >= 19 // every, f"only {kills} events"


def in_small_shards(argv, tokens=6000):
    """prepare_data.main, with shards as small as those of the fixture `data`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_data, "SHARD_TOKENS", tokens)
        return prepare_data.main(argv)


@pytest.mark.parametrize("every", [6, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("flag", [[], ["--overwrite"]], ids=["fresh", "overwrite"])
def test_a_killed_preparation_run_again_gives_the_same_shards(data, attempt, flag, every):
    """Killed, or on a full disk: what is left is complete or known as unfinished, and a second run ends the same."""
    def contents(folder):
        return {path.name: path.read_bytes() for path in Path(folder).glob("*")}

    def run(**harm):
        return attempt([str(Path(data).with_name("text.txt")), *"--out out --tokenizer bytes".split(), *flag],
                       main=in_small_shards, **harm)

    kills = 0
    Path("b.txt").write_text("what was there before")
    in_small_shards("b.txt --out before --tokenizer bytes".split(), 3)
    for harm in (dict(limit=9000), *(dict(kill_at=event) for event in range(every, 99, every))):
        shutil.rmtree("out", ignore_errors=True)
        if flag:
            shutil.copytree("before", "out")
        if run(**harm).code == 0:
            break
        kills += 1
        left = {name: content for name, content in contents("out").items() if name.endswith((".bin", ".json"))}
        try:
            prepare_data.load_data("out")
        except UserError as error:
            assert "not finished" in str(error) or not left, (harm, error, list(left))
        else:
            assert left in (contents(data), contents("before")), (harm, list(left))
        assert run().code == 0 and contents("out") == contents(data), (harm, list(contents("out")))
    assert kills >= 1 + 15 // every, f"only {kills} kills"


def test_a_full_disk_is_one_line_and_the_old_checkpoint_is_whole(data, attempt):
    """It fills up inside a checkpoint: exit 1, no half file, and the one before loads."""
    interrupted(data, 6)
    before = Path("out/ckpt.pt").read_bytes()
    for limit in (8192, len(before) - 1):
        ended = attempt(argv(data, "--resume"), limit=limit)
        assert ended.code == 1 and re.fullmatch("train.py: error: cannot save out/ckpt.pt.*\n", ended.error), ended
        assert Path("out/ckpt.pt").read_bytes() == before and checkpoint()["step"] == 4, "the old one was touched"
        assert not list(Path("out").glob("*.tmp")), "a half file is left"


def test_resumed_equals_uninterrupted(data, straight):
    """Stopped in step 11, of line 10 only a 1 in the log: weights, optimizer and log end as in a run never stopped."""
    interrupted(data, 11)
    *lines, last = Path("out/log.csv").read_text().splitlines(keepends=True)
    assert last.startswith("10,") and checkpoint()["step"] == 8, (last, checkpoint()["step"])
    Path("out/log.csv").write_text("".join(lines) + last[:1])
    run_here(data, extra_loss=nothing, state=checkpoint())
    assert_same_end(straight, "stopped in step 11")


def test_intervals_change_nothing(data, straight):
    """Evaluating, saving and logging often, as in the straight run, or never: the same weights."""
    run_here(data, log_every=100, eval_every=0, save_every=0)
    assert equal(checkpoint()["model"], checkpoint(straight)["model"])


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_even_again_within_the_step_saves_and_leaves(data, monkeypatch, capsys, number, code):
    """Twice in step 5: it is ended and saved, how to go on is the last line, and the handler of before is back."""
    def batch(run, step, i, plain=train.Run.batch):
        for _ in range(2 * (step == 5)):
            signal.raise_signal(number)
        return plain(run, step, i)

    monkeypatch.setattr(train.Run, "batch", batch)
    came = []
    before = signal.signal(number, lambda *_: came.append(1))
    try:
        assert train.main(argv(data, save_every=0, eval_every=0)) == code and not came, "the signal was not caught"
        signal.raise_signal(number)
        assert came, "the handler of before is not back"
    finally:
        signal.signal(number, before)
    assert capsys.readouterr().out.splitlines()[-1].endswith("python train.py --out out --resume")
    assert checkpoint()["step"] == int(log()[-1]["step"]) == 5, f"{checkpoint()['step']} saved, {log()[-1]} logged"


def test_a_signal_of_another_process_stops_this_one_too(data, monkeypatch):
    """All processes of torchrun leave after the same step, whoever was told."""
    run = new_run(data)
    run.processes = 2
    monkeypatch.setattr(train.dist, "all_reduce", lambda number, op: number.fill_(max(15, number)))
    assert run.any_signal([]) == run.any_signal([2]) == 15


def test_a_closed_terminal_saves_and_leaves_and_nohup_does_not(data):
    """A run on a terminal of its own, which is then closed: exit code 129, saved. With nohup it trains to its end."""
    def begin():
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup

    for nohup in (False, True):
        shutil.rmtree("out", ignore_errors=True)
        master, terminal = os.openpty()
        command = [*["nohup"] * nohup, sys.executable, str(ROOT / "train.py"),
                   *argv(data, save_every=0, eval_every=0, steps=400)]
        process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
                                   env=dict(os.environ, OMP_NUM_THREADS="1"), preexec_fn=begin)
        os.close(terminal)
        while not (Path("out/log.csv").exists() and len(log()) > 2):
            assert process.poll() is None, os.read(master, 9999).decode()
            time.sleep(0.02)
        os.close(master)  # the kernel sends SIGHUP
        code = process.wait(60)
        assert code == (0 if nohup else 129), f"nohup {nohup}: exit {code}"
        assert (checkpoint()["step"] == 400) == nohup, f"nohup {nohup}: step {checkpoint()['step']} of 400"
        assert checkpoint()["step"] == int(log()[-1]["step"])


def loads(content):
    """What load_checkpoint makes of a file with this content; None where it refuses it, in one line that names it."""
    Path("x").mkdir(exist_ok=True)
    Path("x/ckpt.pt").write_bytes(content)
    try:
        return checkpoint("x")
    except UserError as error:
        assert "x/ckpt.pt is damaged" in str(error) and "\n" not in str(error), repr(str(error))


def torch_file(thing, **options):
    file = io.BytesIO()
    torch.save(thing, file, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["flip", "cut"])
def test_damage_is_found(straight, kind):
    """Flipped bits, truncations: no file loads with other contents than were saved."""
    whole, state = (straight / "ckpt.pt").read_bytes(), checkpoint(straight)
    draw, refused = random.Random(kind), 0
    for _ in range(50):
        content, at = bytearray(whole), draw.randrange(len(whole))
        if kind == "flip":
            content[at] ^= 1 << draw.randrange(8)
        else:
            del content[at:]
        got = loads(content)
        refused += got is None
        assert got is None or equal(got, state), f"a file with a {kind} loaded with changed contents"
    assert refused >= 40, f"only {refused} of 50 were refused"
    assert equal(loads(whole), state), "the undamaged file must load"


class Hostile:
    """Makes a file when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch executed",)


def test_what_is_no_checkpoint_is_refused_and_no_code_in_it_runs(straight):
    """Empty, no archive, a lost part, a pickle that calls os.system, whole or within: one line that names the file."""
    pickle.loads(pickle.dumps(Hostile()))
    assert Path("executed").exists(), "this test is blind"
    Path("executed").unlink()
    state = checkpoint(straight)
    part = {name: value for name, value in state.items() if name != "optimizer"}
    for content in (b"", b"PK\x03\x04" + bytes(999), torch_file([1, 2]), torch_file(part), pickle.dumps(Hostile()),
                    torch_file({**state, "step": Hostile()}),
                    torch_file(Hostile(), _use_new_zipfile_serialization=False)):
        assert loads(content) is None and not Path("executed").exists(), content[:40]


def test_a_folder_is_trained_in_once_and_resumed_where_there_is_a_run(data):
    """Without --resume or --overwrite, or where there is no run to resume: one line, and nothing is changed."""
    for flag in "--resume", "--sample=the":
        with pytest.raises(UserError, match="no checkpoint in out; "):
            train.main(argv(data, flag))
    assert not Path("out").exists()
    run_here(data)
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    with pytest.raises(UserError, match="holds a run; .*--resume.*--overwrite"):
        train.main(argv(data))
    assert before == {path: path.read_bytes() for path in Path("out").iterdir()}, "the folder was changed"
    assert train.main(argv(data, "--overwrite", seed=1, steps=2)) == 0
    assert checkpoint()["config"]["seed"] == 1 and len(log()) == 2


def test_two_runs_in_one_folder_at_once_are_one_run(data, attempt, straight):
    """The second is refused in one line, however it starts; the first ends as if it were alone."""
    interrupted(data, 8)
    first = train.Run(*train.configs({**checkpoint(straight)["config"], "out": "out"}), state=checkpoint())
    before = Path("out/log.csv").read_bytes()
    for way in ([], ["--resume"], ["--overwrite"]):
        ended = attempt(argv(data, *way))
        assert ended.code == 1 and re.fullmatch("train.py: error: another process .*\n", ended.error), ended
        assert Path("out/log.csv").read_bytes() == before, "the second one has written into the log"
    train.train(first)
    assert_same_end(straight, "a second run was refused")


@pytest.mark.parametrize("flag", ["seed=1", "d-model=32", "no-qk-norm", "z-weight=1"])
def test_resume_refuses_settings_that_contradict_the_run(straight, capsys, monkeypatch, flag):
    """Exit 2, naming the flag, its value here and the one of the run: the default, where there was no such setting."""
    name, state = flag.removeprefix("no-").partition("=")[0], checkpoint(straight)
    del state["config"]["z_weight"]
    monkeypatch.setattr(train, "load_checkpoint", lambda folder: state)
    with pytest.raises(SystemExit, match="^2$"):
        train.main(["--resume", f"--{flag}"])
    of_run, error = state["config"].get(name.replace("-", "_"), 0.0), capsys.readouterr().err
    assert f"--{name} is " in error and f"but {of_run} in the run" in error, error


def test_resume_takes_what_may_change(data, straight, capsys):
    """More steps, other intervals, a moved run folder, a moved data folder; values that agree; else the run's own."""
    shutil.copytree(straight, "moved")
    shutil.copytree(data, "data")
    assert train.main(["--out=moved", "--data=data", "--resume", "--steps=15", "--log-every=2", "--eval-every=0",
                       "--save-every=0", "--seed=0", "--lr=0.004"]) == 0
    state = checkpoint("moved")
    assert state["step"] == 15 and state["config"]["batch_size"] == 2 and state["config"]["data"] == "data"
    assert [row["step"] for row in log("moved")] == [*map(str, range(1, 13)), "14", "15"], log("moved")
    with pytest.raises(SystemExit):
        train.main(["--out=moved", "--resume"])
    assert "is finished, at step 15; to train on, add --steps" in capsys.readouterr().err


def test_resume_refuses_other_data_and_another_number_of_processes(data, straight):
    """Another text, or a checkpoint of two processes: UserError, before the run folder is touched."""
    Path("text.txt").write_text(Path(data).with_name("text.txt").read_text().replace("fox", "hen"))
    prepare_data.main("text.txt --out data --tokenizer bytes".split())
    for folder, processes, words in ("data", 1, "had other data"), (data, 2, "had 2 processes, not 1"):
        with pytest.raises(UserError, match=words):
            run_here(folder, state={**checkpoint(straight), "processes": processes})
    assert not Path("out").exists()


def test_variables_that_torchrun_did_not_set_are_no_torchrun(data, monkeypatch):
    """RANK and WORLD_SIZE of some other scheduler: one process, which writes, and waits for nobody."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    run_here(data)
    assert len(log()) == 12


def test_closed_stdout_and_stderr_are_no_reason_to_stop(data, monkeypatch):
    """A terminal or reader that is gone, and streams of None, as after `>&- 2>&-`: trained and saved all the same."""
    writes = iter(range(4))

    def write(text):
        if next(writes, None) is None:
            raise OSError(5, "the terminal is gone")

    for out, stdout, stderr in ("left", SimpleNamespace(write=write, flush=list), sys.stderr), ("none", None, None):
        monkeypatch.setattr(sys, "stdout", stdout)
        monkeypatch.setattr(sys, "stderr", stderr)
        run_here(data, out=out)
        assert checkpoint(out)["step"] == 12 and len(log(out)) == 12
