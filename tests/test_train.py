"""The trainer: what a step learns from, what it logs, what it evaluates, and what stops it.

References are loops, float64, or the same thing in one go, with a model of a few thousand parameters. The command line
has test_command_line.py; kills, damage and full disks have test_reliability.py; the GPU has test_gpu.py.
"""

import csv
import itertools
import math
import os
import socket
import subprocess
import sys
import threading
from array import array
from pathlib import Path
from types import SimpleNamespace

import bench
import pytest
import torch
import torch.nn.functional as F

import erc_moe
import prepare_data
import train
from prepare_data import TokenData, UserError, load_data
from train import TrainConfig, keyed_generator

ROOT = Path(train.__file__).parent
SMALL = dict(context_length=32, n_layers=2, n_heads=2, d_model=16, d_expert=8, n_experts=4, batch_size=2, steps=4,
             warmup=2, eval_every=0, save_every=0, log_every=1, device="cpu", dtype="fp32", sample_tokens=1)

pytestmark = pytest.mark.usefixtures("elsewhere")


def flags(data, **changes):
    """The command line of a run that takes milliseconds a step."""
    values = {"data": data, "out": "out", **SMALL, **changes}
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]


def new_run(data, model=None, state=None, **changes):
    return train.Run(*train.configs({"data": data, "out": "aside", **SMALL, **changes}), model, state, overwrite=True)


def trained(data, extra_loss=None, watch=None, **changes):
    """The last row of a new run in the folder "out", or in another one."""
    return train.train(new_run(data, **{"out": "out", **changes}), extra_loss, watch)


def log(out="out"):
    """The rows of log.csv as text, without their speed."""
    with open(Path(out, "log.csv"), encoding="utf-8", newline="") as file:
        return [{name: value for name, value in row.items() if name != "tokens_per_s"} for row in csv.DictReader(file)]


def checkpoint(out="out"):
    return train.load_checkpoint(out)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def weights(model):
    return {name: p.clone() for name, p in model.state_dict().items()}


def nothing(model):
    """An extra loss of 0, for tests that look at the gradient where extra losses are taken: just before clipping."""
    return sum(p.sum() for p in model.parameters()) * 0


def gap(one, two):
    """The largest absolute difference of two dicts of tensors; NaN if one holds NaN."""
    assert one.keys() == two.keys(), f"only in one: {sorted(one.keys() ^ two.keys())}"
    return torch.stack([(one[name].double() - two[name].double()).abs().max() for name in one]).max().item()


def poison(bad, seen):
    """An extra loss that remembers the weights at each step, and has a gradient of NaN in the steps `bad`."""
    def loss(model):
        seen.append(weights(model))
        return nothing(model) * (math.nan if len(seen) in bad else 1)

    return loss


def test_switching_erc_off_changes_no_batch_and_nothing_before_the_first_update(data):
    """Batches of all steps, initial weights and the log of step 1, erc included, are equal to the bit; later ce not."""
    seen, rows, begins = ([], []), [], []
    for weight in (0.0, 1.0):
        model = new_run(data, erc_weight=weight).model
        begins.append(weights(model))
        model.register_forward_pre_hook(lambda model, args, into=seen[int(weight)]: into.append(args[0]))
        trained(data, erc_weight=weight, model=model)
        rows.append([{**row, "grad_norm": ""} for row in log()])
    assert gap(*begins) == 0, "other initial weights"
    assert all(map(torch.equal, *seen)) and len(seen[0]) > 4, "batches differ with and without ERC"
    assert rows[0][0] == rows[1][0], f"step 1 without ERC: {rows[0][0]}, with: {rows[1][0]}"
    assert rows[0][-1]["ce"] != rows[1][-1]["ce"], "ERC trains no other weights"
    expected = new_run(data).model.erc_loss(1.0, keyed_generator("cpu", 0, 1, "erc")).item()
    assert float(rows[0][0]["erc"]) == pytest.approx(expected, rel=1e-6), f"erc {rows[0][0]['erc']}, not {expected}"


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_erc_once_per_step_is_the_mean_of_erc_in_every_micro_batch(data, dtype):
    """ERC adds its float32 gradient once, to router and gates alone, before clipping; no float16 scaler scales it."""
    seen = []
    for weight in (0.0, 2.0):
        trained(data, lambda model: seen.append(gradients(model)) or nothing(model), steps=1, accumulate=4,
                erc_weight=weight, dtype=dtype)
    assert checkpoint()["scaler"].get("scale", 65536) == 65536, checkpoint()["scaler"]
    assert 0.1 < float(log()[0]["grad_norm"]) < 10, f"the norm is that of scaled gradients: {log()[0]['grad_norm']}"
    model = new_run(data).model
    for _ in range(4):
        (2.0 * model.erc_loss(1.0, keyed_generator("cpu", 0, 1, "erc")) / 4).backward()
    exact = gradients(model)
    assert {name.split(".")[-1] for name in exact} == {"R", "W_g"} and len(exact) == 4, f"reached: {sorted(exact)}"
    for name in seen[0]:
        off = (seen[1][name] - seen[0][name] - exact.get(name, 0)).abs().max()
        assert off < 1e-6, f"{name}: what ERC adds is off by {off:.1e}"
    assert min(g.abs().max() for g in exact.values()) > 1e-4, "gradients are too small to see here"


def test_accumulation_is_the_mean_over_the_micro_batches(data):
    """Gradient and log are those of one batch of the same 8 windows, and of the weights before the first update."""
    seen = []
    trained(data, lambda model: seen.append(gradients(model)) or nothing(model), accumulate=4, steps=1,
            erc_weight=0.0, erc_alpha=0.7, z_weight=0.1, lr=0.5)
    run = new_run(data)
    batches = [train.train_batch(run.data, 32, 2, keyed_generator("cpu", 0, 1, "batch", i)) for i in range(4)]
    outs = [run.model(*batch) for batch in batches]
    ce, balance, z = (sum(getattr(out, name) for out in outs) / 4 for name in ("ce", "balance", "z"))
    whole = run.model(*map(torch.cat, zip(*batches)))
    assert ce.item() == pytest.approx(whole.ce.item(), rel=1e-5), f"{ce} is not {whole.ce}"
    (ce + 0.01 * balance + 0.1 * z).backward()
    assert gap(seen[0], gradients(run.model)) < 1e-6, f"off by {gap(seen[0], gradients(run.model)):.1e}"
    load, of_layers = sum(out.load for out in outs), []
    for moe in run.model.moe_layers():
        M = erc_moe.activation_norms(moe.R, moe.W_g)
        of_layers.append(torch.stack((erc_moe.noise_bound(moe.R).mean(), *erc_moe.coupling_report(M, 0.7))))
    expected = dict(zip(("epsilon", "violated", "coupling"), torch.stack(of_layers).mean(dim=0)))
    expected |= dict(ce=ce, balance=balance, z=z, tokens=torch.tensor(4 * 2 * 32), dead=(load == 0).sum(),
                     max_load=(load / load.sum(1, keepdim=True)).max() * 4,
                     grad_norm=torch.cat([g.flatten() for g in seen[0].values()]).norm())
    for name, value in expected.items():
        assert float(log()[0][name]) == pytest.approx(value.item(), rel=1e-5), f"{name}: {log()[0][name]}, not {value}"


def test_the_console_says_how_fast_it_goes_and_how_long_it_will(data, monkeypatch, capsys):
    """By a clock that ticks once in each interval: 64 tokens a step; the time left from the second step on, also after
    a resume, whose first step is slow too. On a GPU the FLOPs of bench.py as well.
    """
    ticks = itertools.count(0, 10)
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    trained(data, steps=7, log_every=2)
    run = new_run(data, steps=11, log_every=3, out="out", state=checkpoint())
    train.train(run)
    lines = [line.split(" | ")[-2:] for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert [rest[-1] for rest in lines] == ["6 tok/s", "0:00:50 left", "0:00:15 left", "0:00:05 left", "6 tok/s",
                                            "0:00:20 left", "13 tok/s"], lines
    run.device = torch.device("cuda")
    line = train.log_line(run, dict.fromkeys(train.LOG_COLUMNS, 0) | dict(tokens_per_s=1e9), None)
    assert f" | {bench.flops_per_token(run.model.config) / 1e3:.1f} TFLOP/s" in line, line


@pytest.mark.slow
@pytest.mark.parametrize("machines", [1, 2])
def test_two_processes_learn_what_one_does_with_twice_the_accumulation(data, machines):
    """2 processes of 2 micro-batches equal one of 4: the log, and weights up to rounding. On a machine, and on two that
    share the folder, as two agents of torchrun act them.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={machines}", "--master-addr=127.0.0.1",
                f"--nproc-per-node={2 // machines}", f"--master-port={port}"]
    agents = [subprocess.Popen(
        [*torchrun, f"--node-rank={i}", str(ROOT / "train.py"), *flags(data, accumulate=2, out="two")], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ, OMP_NUM_THREADS="1",
                                                                 GLOO_SOCKET_IFNAME="lo")) for i in range(machines)]
    printed, errors = map("".join, zip(*(agent.communicate(timeout=240) for agent in agents)))
    # Of two agents the last to end may print a traceback, about the store that went with the other, and returns 0.
    assert not any(agent.returncode for agent in agents), errors[-2000:]
    assert machines == 2 or "Traceback" not in errors, errors[-2000:]
    assert printed.count("val_ce") == 2, f"one process prints, not each:\n{printed}"  # last step, and report
    trained(data, accumulate=4, out="one")
    difference = gap(checkpoint("one")["model"], checkpoint("two")["model"])
    assert 0 <= difference < 2e-5, f"weights differ by {difference:.1e}"
    assert len(log("one")) == len(log("two")) == 4
    for one, two in zip(log("one"), log("two")):
        for name in filter(one.get, one):
            assert float(one[name]) == pytest.approx(float(two[name]), rel=1e-3, abs=1e-4), (name, one, two)


def test_every_token_is_a_target_equally_often_and_every_window_is_drawn():
    """By a loop over all offsets of two shards: windows begin anywhere, and go on with the beginning of their shard."""
    T, draws, eot = 8, 5000, 1999
    shards = [[eot if p in (2, 42, 59) else p for p in range(60)],
              [eot if p in (9, 30) else 1000 + p for p in range(31)]]
    expected = {tuple(shard[(start + i) % len(shard)] for i in range(T + 1))
                for shard in shards for start in range(len(shard))}
    data = TokenData("own", 2000, eot, [memoryview(array("H", shard)) for shard in shards], [], {}, "")
    inputs, targets = train.train_batch(data, T, draws, torch.Generator().manual_seed(0))
    assert inputs.shape == targets.shape == (draws, T) and inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], targets[:, :-1]), "targets are the inputs, one further"
    found = {tuple(row) for row in torch.cat((inputs, targets[:, -1:]), dim=1).tolist()}
    assert found == expected, f"{len(expected - found)} missing, unexpected: {sorted(found - expected)[:3]}"
    tokens, share = shards[0] + shards[1], targets.flatten().bincount().double() / (draws * T)
    ratios = {token: share[token].item() * len(tokens) / tokens.count(token) for token in tokens}
    wrong = {token: f"{ratio:.2f}" for token, ratio in ratios.items() if not 0.7 < ratio < 1.4}
    assert not wrong, f"targets so many times as often as they stand in the text: {wrong}"


def test_a_batch_is_a_function_of_its_key_alone(data):
    """The same (seed, step, micro-batch) gives the same batch, any other another; no shared stream is drawn from."""
    tokens, before = load_data(data), torch.get_rng_state()
    keys = [(0, 1, "batch", 0)] * 2 + [(1, 1, "batch", 0), (0, 2, "batch", 0), (0, 1, "batch", 1), (0, 1, "other", 0),
                                       (0, 11, "batch", 0)]
    first, again, *others = (train.train_batch(tokens, 32, 2, keyed_generator("cpu", *key))[0] for key in keys)
    assert torch.equal(first, again) and not any(torch.equal(first, other) for other in others)
    assert torch.equal(before, torch.get_rng_state()), "a batch moved the global random stream"


def foreign(folder, train_tokens, val_tokens):
    """A folder of two shards without meta.json, in which all but the last token is 0, as a hole in the file."""
    Path(folder).mkdir()
    for name, (n, last) in (("x_train.bin", train_tokens), ("x_val.bin", val_tokens)):
        with open(Path(folder, name), "wb") as file:
            file.write(prepare_data.HEADER.pack(prepare_data.MAGIC, 1, n))
            file.seek(2 * n - 2, os.SEEK_CUR)
            file.write(array("H", [last]).tobytes())
    return folder


def test_what_cannot_be_trained_is_one_line_before_a_folder_is_made(data):
    """Devices that are not there, compiling float32, a split shorter than a window, an id that GPT-2 does not have."""
    for changes, words in (
        (dict(device="tpu"), "no device 'tpu'"),
        (dict(compile=True), "dtype bf16"),
        (dict(context_length=2000), f"2001 tokens.*{len(load_data(data).val[0])}.*6000.*--context-length"),
        (dict(data=foreign("a", (99, 50_257), (99, 0))), "token 50257, outside"),
        (dict(data=foreign("b", (99, 0), (99, 60_000))), "token 60000, outside"),
    ):
        with pytest.raises(UserError, match=words):
            new_run(**{"data": data, **changes})
        assert not Path("aside").exists(), words
    new_run(foreign("c", (99, 50_256), (99, 50_256)))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the limit is set from /proc")
def test_validation_reads_no_more_of_the_text_than_its_windows():
    """A validation split of 300 MB, with 100 MB of memory to spare: 128 windows, evenly spaced, whole and in order."""
    import resource  # Windows has none
    text, limits = load_data(foreign("data", (99, 0), (150_000_000, 7))), resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 100_000_000, limits[1]))
    try:
        batches = train.validation_batches(text, 64, 8)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    targets = torch.cat([targets for _, targets in batches])
    assert targets.shape == (128, 64) and (targets == 7).nonzero().tolist() == [[127, 63]], targets.shape


def whole_documents(data):
    """(TokenData with an entropy floor, as the embedded corpus has one; its validation documents)."""
    text = load_data(data)
    tokens = text.val[0].tolist()
    ends = [0, *(i + 1 for i, token in enumerate(tokens) if token == text.eot)]
    return text._replace(meta={**text.meta, "entropy_floor": 1.0}), [tokens[a:b] for a, b in zip(ends, ends[1:])]


def test_every_validation_document_is_evaluated_whole_where_there_is_a_floor(data):
    """Each once, behind an end-of-text token, its own end-of-text counted; windows where one does not fit."""
    (text, documents), rows = whole_documents(data), []
    longest = max(map(len, documents))
    text.meta["longest_document"] = longest
    for inputs, targets in train.validation_batches(text, longest, 3):
        for x, y in zip(inputs, targets):
            rows.append(y[y >= 0].tolist())
            assert (y[: len(rows[-1])] >= 0).all(), "padding stands behind the document"
            assert x[: len(rows[-1])].tolist() == [text.eot, *rows[-1][:-1]]
    assert sorted(rows) == sorted(documents) and len(rows) == 40, f"{len(rows)} rows, {len(documents)} documents"
    for other, T in ((text, longest - 1), (text._replace(meta={"longest_document": longest}), longest)):
        assert all(y.shape[1] == T and (y >= 0).all() for _, y in train.validation_batches(other, T, 3))


def test_evaluation_by_hand(data, monkeypatch):
    """One F.cross_entropy over all that counts, and, token by token, agreement and a model with another route."""
    run = new_run(data, context_length=96, batch_size=3, z_weight=9.0, balance_weight=9.0, d_model=32, init_std=0.3,
                  seed=3)
    batches = train.validation_batches(whole_documents(data)[0], 96, 3)  # some of whose targets are padding
    found = train.evaluate(run.model, batches, run.device, run.autocast)
    plain, last, agreed, logits = erc_moe.MoE.route, run.model.moe_layers()[-1], [], {False: [], True: []}

    def route(moe, x):
        """One token at a time: the strongest expert, then the best other one, with the router's weights."""
        scores, probs, weights, experts = plain(moe, x)
        for t in range(len(x)):
            strength = [(x[t] @ W_g).norm().item() for W_g in moe.W_g]
            first = strength.index(max(strength))
            agrees[t].append((moe.R @ x[t]).argmax().item() == first)
            if forces and moe is last:
                experts[t] = torch.tensor([first, max({*range(4)} - {first}, key=lambda j: scores[t, j])])
        return scores, probs, weights, experts

    monkeypatch.setattr(erc_moe.MoE, "route", route)
    for forces in (False, True):
        for x, y in batches:
            agrees = [[] for _ in range(y.numel())]
            logits[forces].append(run.model(x).logits[y >= 0].detach())
            agreed += [agrees[t] for t in (y.flatten() >= 0).nonzero() if not forces]
    targets = torch.cat([y[y >= 0] for _, y in batches])
    ce, forced_ce = (F.cross_entropy(torch.cat(rows).double(), targets).item() for rows in logits.values())
    agreement = torch.tensor(agreed).double().mean(dim=0)  # of each layer
    expected = dict(val_ce=ce, response_ce=forced_ce, agreement=agreement.mean().item())
    assert found == pytest.approx(expected, rel=1e-5), f"{found}, by hand {expected}"
    assert abs(ce - forced_ce) > 1e-3 and 0 < agreement[-1] < 1, f"this test shows nothing: {expected}"


def test_the_log_has_step_1_every_interval_every_evaluation_and_the_last(data):
    """11 steps, logged every 4, evaluated every 3: lines 1 3 4 6 8 9 11, each cell filled where it has a value."""
    evaluated = []
    result = trained(data, watch=lambda model, step: evaluated.append(step), steps=11, log_every=4, eval_every=3)
    assert Path("out", "log.csv").read_text().splitlines()[0].split(",") == (
        "step tokens ce val_ce response_ce balance z erc epsilon violated coupling agreement max_load dead lr grad_norm"
        " tokens_per_s").split()
    rows = log()
    assert [int(row["step"]) for row in rows] == [1, 3, 4, 6, 8, 9, 11] and evaluated == [3, 6, 9, 11], rows
    for row in rows:
        empty = {name for name, value in row.items() if value == ""}
        assert empty == (set() if int(row["step"]) in evaluated else {"val_ce", "response_ce", "agreement"}), row
        assert all(math.isfinite(float(value)) for value in row.values() if value), row
        assert int(row["tokens"]) == int(row["step"]) * 64, row
    last = {name: float(value) for name, value in rows[-1].items()}
    assert {**last, "signal": 0, "tokens_per_s": result["tokens_per_s"]} == result, f"{result} is not {last}"


def test_decay_reaches_every_matrix_and_no_norm(data):
    """Each parameter once: a decay for R and the experts, another one for embedding and attention, none for norms."""
    run = new_run(data, weight_decay=0.3, moe_weight_decay=0.7)
    decay = [(id(p), group["weight_decay"]) for group in run.optimizer.param_groups for p in group["params"]]
    expected = [(id(p), 0.7 if ".moe." in name else 0 if "norm" in name else 0.3)
                for name, p in run.model.named_parameters()]
    assert sorted(decay) == sorted(expected)


@pytest.mark.parametrize("preset", train.PRESETS)
def test_what_router_and_experts_forget_over_a_run_is_what_they_forget_in_the_paper(preset):
    """sum of lr * decay over the steps: 3.7, as of the paper's 167,000 steps from 4e-4 to 4e-5 with decay 0.1."""
    config = train.configs(train.PRESETS[preset])[0]
    paper = 167_000 * (4e-4 + 4e-5) / 2 * 0.1
    total = config.moe_weight_decay * sum(train.learning_rate(config, step + 1) for step in range(config.steps))
    assert total == pytest.approx(paper, rel=0.03), f"{preset}: {total:.2f}, in the paper {paper:.2f}"


def test_grad_clip_0_is_no_clipping(data):
    """It ends where a bound that no gradient reaches ends, and elsewhere than a bound that every gradient exceeds."""
    ends = []
    for clip in (0.0, 1e6, 1e-3):
        trained(data, grad_clip=clip)
        ends.append(checkpoint()["model"])
    off, clipped = gap(ends[0], ends[1]), gap(ends[0], ends[2])
    assert off == 0 < clipped, f"off by {off}; a bound of 1e-3 makes a difference of {clipped}"


def test_learning_rate_at_the_points_that_matter(data):
    """Linear to the peak at `warmup`, half-way down the cosine 55 %, a tenth at the last step; and the log says so."""
    for steps, warmup, points in ((110, 10, {1: 0.2, 5: 1.0, 10: 2.0, 60: 1.1, 110: 0.2}), (7, 0, {7: 0.2}),
                                  (7, 7, {7: 2.0})):
        config = TrainConfig(steps=steps, warmup=warmup, lr=2.0)
        assert {step: train.learning_rate(config, step) for step in points} == pytest.approx(points)
    trained(data, lr=0.01, warmup=4, steps=1, weight_decay=0.0, moe_weight_decay=0.0)
    assert float(log()[0]["lr"]) == pytest.approx(0.0025)
    moved = gap(checkpoint()["model"], new_run(data).model.state_dict())
    assert 0.0024 < moved < 0.0026, f"Adam's first update moves weights by the rate, 0.0025, not {moved:.4f}"


def finite(state):
    return all(torch.isfinite(p).all() for p in state["model"].values())


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, lambda groups, lr, *_, **__: torch.optim.SGD(groups, lr)],
                         ids=["AdamW", "SGD"])
def test_a_bad_step_stops_any_optimizer_and_is_never_saved_nor_logged(data, monkeypatch, optimizer):
    """NaN in step 5 shows before the next save, 6, whether the gradient, the weights or the loss has it; 3 is saved."""
    monkeypatch.setattr(torch.optim, "AdamW", optimizer)
    seen = []
    with pytest.raises(UserError, match="not finite at step 6 .*--lr"):
        trained(data, poison([5], seen), steps=9, log_every=20, save_every=3)
    assert len(seen) == 6 and checkpoint()["step"] == 3 and finite(checkpoint()), f"step {checkpoint()['step']} saved"
    with pytest.raises(UserError, match="not finite at step 5 "):
        trained(data, poison([5], []), steps=9)
    assert [row["step"] for row in log()] == [*"1234"] and not Path("out/ckpt.pt").exists(), "a bad step was logged"


def test_under_a_float16_scaler_a_skipped_step_is_normal_and_a_vanishing_scale_stops(data):
    """Step 3 alone is skipped, and so are the 19 from step 6 on. A gradient that is never finite ends the run."""
    def overflowing(steps, bad):
        run = new_run(data, out="out", steps=steps, dtype="fp16", save_every=4, log_every=30, n_layers=1,
                      context_length=16)
        run.model.norm.weight.register_hook(lambda g: g * (math.inf if run.step + 1 in bad else 1))
        return run

    seen = []
    train.train(overflowing(26, {3, *range(6, 25)}), poison([], seen))
    assert gap(seen[2], seen[3]) == 0 < gap(seen[3], seen[4]), "step 3 is skipped, step 4 is not"
    assert gap(seen[5], seen[24]) == 0 < gap(seen[24], seen[25]), "steps 6 to 24 are skipped, step 25 is not"
    assert checkpoint()["step"] == 26 and finite(checkpoint())
    with pytest.raises(UserError, match="not finite at step"):
        train.train(overflowing(60, range(5, 99)))
    assert finite(checkpoint())


def test_an_extra_loss_and_a_model_of_ones_own_in_a_thread(data):
    """As in a notebook: a loss that pulls the final norm to 3 does so, once per step; the own model is saved."""
    calls, model = [], new_run(data, n_layers=1).model
    run = new_run(data, model, out="out", steps=30, lr=0.2, weight_decay=0.0, accumulate=2, erc_weight=0.0)
    pull = lambda given: calls.append(given is model) or 100 * (given.norm.weight - 3).square().mean()
    thread = threading.Thread(target=train.train, args=(run, pull))
    thread.start()
    thread.join()
    assert calls == [True] * 30 == [True] * run.step, f"{len(calls)} calls in {run.step} steps of 30"
    assert abs(model.norm.weight.mean().item() - 3) < 0.5, f"the extra loss wants 3, not {model.norm.weight.mean()}"
    assert gap(checkpoint()["model"], weights(model)) == 0


def test_the_type_of_the_products_is_the_fast_one_of_this_device(monkeypatch):
    """auto: float32 but on CUDA, where it is bfloat16 if that is not emulated; what is asked for is taken."""
    for device, native, expected in (("cuda", True, torch.bfloat16), ("cuda", False, torch.float16),
                                     ("cpu", True, torch.float32), ("mps", True, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        picked = [train.pick_dtype(name, torch.device(device)) for name in ("auto", "fp32", "bf16", "fp16")]
        assert picked == [expected, torch.float32, torch.bfloat16, torch.float16], (device, picked)


def test_a_run_is_resumed_on_hardware_of_another_type(data, monkeypatch):
    """dtype auto is bfloat16 on one machine and float16, with a loss scaler, on another: a checkpoint serves both."""
    for name, steps in ("bf16", 2), ("fp16", 4):
        monkeypatch.setattr(train, "pick_dtype", lambda *_, found=train.DTYPES[name]: found)
        row = trained(data, steps=steps, state=checkpoint() if Path("out").exists() else None)
    assert row["step"] == 4 and checkpoint()["scaler"], f"{row}, {checkpoint()['scaler']}"
