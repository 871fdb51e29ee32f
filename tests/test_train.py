"""The trainer: what a step learns from, what it logs, what it evaluates, and what stops it.

References are loops, float64, or the same thing in one go, with a model of a few thousand parameters. The command line
has test_command_line.py; kills, damage and full disks have test_reliability.py; the GPU has test_gpu.py.
"""

import csv
import math
import os
import socket
import subprocess
import sys
import threading
from array import array
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import erc_moe
import train
from prepare_data import TokenData, UserError, load_data
from train import TrainConfig, keyed_generator

ROOT = Path(train.__file__).parent
SMALL = dict(context_length=32, n_layers=2, n_heads=2, d_model=16, d_expert=8, n_experts=4, batch_size=2, steps=4,
             warmup=2, eval_every=0, save_every=0, log_every=1, device="cpu", dtype="fp32", sample_tokens=1)

pytestmark = pytest.mark.usefixtures("elsewhere")


def settings(data, **changes):
    """(TrainConfig, MoEConfig) of a run that takes milliseconds a step."""
    return train.configs({"data": data, "out": "out", **SMALL, **changes})


def flags(data, **changes):
    """The same as a command line."""
    values = {"data": data, "out": "out", **SMALL, **changes}
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]


def new_run(data, **changes):
    return train.Run(*settings(data, **changes), None)


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
        train.train(settings(data, erc_weight=weight)[0], model=model, overwrite=True)
        rows.append([{**row, "grad_norm": ""} for row in log()])
    assert gap(*begins) == 0, "other initial weights"
    assert all(map(torch.equal, *seen)) and len(seen[0]) > 4, "batches differ with and without ERC"
    assert rows[0][0] == rows[1][0], f"step 1 without ERC: {rows[0][0]}, with: {rows[1][0]}"
    assert rows[0][-1]["ce"] != rows[1][-1]["ce"], "ERC trains no other weights"
    expected = new_run(data).model.erc_loss(1.0, keyed_generator("cpu", 0, 1, "erc")).item()
    assert float(rows[0][0]["erc"]) == pytest.approx(expected, rel=1e-6), f"erc {rows[0][0]['erc']}, not {expected}"


def test_erc_once_per_step_is_the_mean_of_erc_in_every_micro_batch(data, monkeypatch):
    """Under the same noise. And layer by layer: at a layer's loss, those before have their gradient, and are free."""
    run, done, erc_loss = new_run(data, accumulate=4, erc_weight=2.0, n_layers=3), [], erc_moe.erc_loss

    def watch(*given):
        done.append(sum(moe.W_g.grad is not None for moe in run.model.moe_layers()))
        return erc_loss(*given)

    monkeypatch.setattr(erc_moe, "erc_loss", watch)
    value = run.add_erc_gradient(5)
    once = gradients(run.model)
    run.model.zero_grad()
    for _ in range(4):
        loss = run.model.erc_loss(1.0, keyed_generator("cpu", 0, 5, "erc"))
        (2.0 * loss / 4).backward()
    assert done[:3] == [0, 1, 2], f"layers that had a gradient at each loss: {done[:3]}"
    assert value.item() == pytest.approx(loss.item(), rel=1e-6), f"{value} is not {loss}"
    assert gap(once, gradients(run.model)) < 1e-7, f"gradients differ by {gap(once, gradients(run.model)):.1e}"
    assert {name.split(".")[-1] for name in once} == {"R", "W_g"} and len(once) == 6, f"reached: {sorted(once)}"


def test_the_fp16_scaler_does_not_scale_the_erc_gradient(data):
    """Two micro-batches, a loss scale of 65,536: ERC adds its float32 gradient, once, before the clipping."""
    seen = []
    for weight in (0.0, 1.0):
        train.train(*settings(data, dtype="fp16", steps=1, accumulate=2, erc_weight=weight), overwrite=True,
                    extra_loss=lambda model: seen.append(gradients(model)) or nothing(model))
    assert checkpoint()["scaler"]["scale"] == 65536, checkpoint()["scaler"]
    exact = new_run(data)
    exact.model.erc_loss(1.0, keyed_generator("cpu", 0, 1, "erc")).backward()
    for name, gradient in gradients(exact.model).items():
        added = seen[1][name] - seen[0][name]
        assert torch.allclose(added, gradient, atol=1e-6), f"{name}: off by {(added - gradient).abs().max():.1e}"
    assert gradient.abs().max() > 1e-4, f"an ERC gradient of {gradient.abs().max():.1e} is too small to see here"


def test_accumulation_is_the_mean_over_the_micro_batches(data):
    """4 micro-batches of 2 windows: gradient and logged numbers are those of one batch of the same 8 windows."""
    seen = []
    train.train(*settings(data, accumulate=4, steps=1, erc_weight=0.0, z_weight=0.1),
                extra_loss=lambda model: seen.append(gradients(model)) or nothing(model))
    run = new_run(data)
    batches = [train.train_batch(run.data, 32, 2, keyed_generator("cpu", 0, 1, "batch", i)) for i in range(4)]
    outs = [run.model(*batch) for batch in batches]
    ce, balance, z = (sum(getattr(out, name) for out in outs) / 4 for name in ("ce", "balance", "z"))
    whole = run.model(*map(torch.cat, zip(*batches)))
    assert ce.item() == pytest.approx(whole.ce.item(), rel=1e-5), f"{ce} is not {whole.ce}"
    (ce + 0.01 * balance + 0.1 * z).backward()
    assert gap(seen[0], gradients(run.model)) < 1e-6, f"off by {gap(seen[0], gradients(run.model)):.1e}"
    load = sum(out.load for out in outs)
    expected = dict(ce=ce, balance=balance, z=z, tokens=torch.tensor(4 * 2 * 32), dead=(load == 0).sum(),
                    max_load=(load / load.sum(1, keepdim=True)).max() * 4,
                    grad_norm=torch.cat([g.flatten() for g in seen[0].values()]).norm())
    for name, value in expected.items():
        assert float(log()[0][name]) == pytest.approx(value.item(), rel=1e-5), f"{name}: {log()[0][name]}, not {value}"


def torchrun(*argv):
    """The command for two processes on this machine, and its environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return ([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1",
             f"--master-port={port}", str(ROOT / "train.py"), *argv],
            dict(os.environ, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo"))


@pytest.mark.slow
def test_two_processes_learn_what_one_does_with_twice_the_accumulation(data):
    """torchrun with 2 processes of 2 micro-batches equals one process of 4: the log, and weights up to rounding."""
    command, environment = torchrun(*flags(data, accumulate=2, out="two"))
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert done.stdout.count("val_ce") == 2, f"one process prints, not each:\n{done.stdout}"  # last step, and report
    train.train(*settings(data, accumulate=4, out="one"))
    difference = gap(checkpoint("one")["model"], checkpoint("two")["model"])
    assert 0 <= difference < 2e-5, f"weights differ by {difference:.1e}"
    assert len(log("one")) == len(log("two")) == 4
    for one, two in zip(log("one"), log("two")):
        for name in filter(one.get, one):
            assert float(one[name]) == pytest.approx(float(two[name]), rel=1e-3, abs=1e-4), (name, one, two)
        assert one["tokens"] == two["tokens"] and one["max_load"] == two["max_load"], (one, two)


EOT = 60_000


@pytest.mark.parametrize("lengths, ends", [
    ((40, 5, 9, 8, 30), ()), ((60, 31), {(0, 0), (0, 3), (0, 20), (0, 21), (0, 40), (0, 57), (1, 23)})])
def test_every_window_is_drawn_and_begins_with_the_end_of_text_within_its_reach(lengths, ends):
    """By a loop over all offsets: at the first end-of-text among the next T tokens, unless the shard ends too soon."""
    T, draws, expected, found = 8, 3000, set(), set()
    shards = [memoryview(array("H", [EOT if (s, p) in ends else 1000 * s + p for p in range(length)]))
              for s, length in enumerate(lengths)]
    for s, length in enumerate(lengths):
        for offset in range(length - T):
            near = [p for p in range(offset, offset + T) if (s, p) in ends]
            expected.add((s, near[0] if near and near[0] + T < length else offset))
    data = TokenData("own", EOT + 1, EOT, shards, shards[:1], [], {}, "")
    inputs, targets = train.train_batch(data, T, draws, torch.Generator().manual_seed(0))
    assert inputs.shape == targets.shape == (draws, T) and inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], targets[:, :-1]), "targets are the inputs, one further"
    for row in torch.cat((inputs, targets[:, -1:]), dim=1).tolist():
        at, token = next((i, token) for i, token in enumerate(row) if token != EOT)
        shard, start = token // 1000, token % 1000 - at
        assert start >= 0 and row == shards[shard][start : start + T + 1].tolist(), row
        found.add((shard, start))
    assert found == expected, f"missing {sorted(expected - found)}, unexpected {sorted(found - expected)}"


def test_a_batch_is_a_function_of_its_key_alone(data):
    """The same (seed, step, micro-batch) gives the same batch, any other another; no shared stream is drawn from."""
    tokens, before = load_data(data), torch.get_rng_state()
    keys = [(0, 1, "batch", 0)] * 2 + [(1, 1, "batch", 0), (0, 2, "batch", 0), (0, 1, "batch", 1), (0, 1, "other", 0),
                                       (0, 11, "batch", 0)]
    first, again, *others = (train.train_batch(tokens, 32, 2, keyed_generator("cpu", *key))[0] for key in keys)
    assert torch.equal(first, again) and not any(torch.equal(first, other) for other in others)
    assert torch.equal(before, torch.get_rng_state()), "a batch moved the global random stream"


def test_a_split_too_short_for_one_window_is_refused_with_the_numbers(data):
    """A context longer than the text: one line with all three lengths, before a run folder is made."""
    with pytest.raises(UserError, match=f"2001 tokens.*{len(load_data(data).val[0])}.*6000.*--context-length"):
        train.train(*settings(data, context_length=2000))
    assert not Path("out").exists()


def with_documents(data):
    """(TokenData whose validation documents are known, as the embedded corpus knows them; these documents)."""
    tokens = load_data(data)
    every = [token for shard in tokens.val for token in shard.tolist()]
    ends = [0, *(i + 1 for i, token in enumerate(every) if token == tokens.eot)]
    spans = [["story", first, end] for first, end in zip(ends, ends[1:])]
    return tokens._replace(meta={"val_documents": spans}), [every[first:end] for _, first, end in spans]


def test_val_ce_and_agreement_by_hand(data):
    """val_ce is one F.cross_entropy over all that counts, without other losses; agreement a loop over its tokens."""
    run = new_run(data, context_length=96, batch_size=3, z_weight=9.0, balance_weight=9.0)
    batches = train.validation_batches(with_documents(data)[0], 96, 3)  # some of whose targets are padding
    val_ce, agreement = train.evaluate(run.model, batches, run.device, run.autocast)
    logits, targets, agreed, inside = [], [], [], []
    for moe in run.model.moe_layers():
        moe.register_forward_pre_hook(lambda moe, args: inside.append((moe, args[0].detach())))
    for x, y in batches:
        inside.clear()
        logits.append(run.model(x).logits.detach()[y >= 0])
        targets.append(y[y >= 0])
        for moe, states in inside:
            for token in states[y >= 0]:
                response = [(token @ W_g).norm().item() for W_g in moe.W_g.detach()]
                agreed.append((moe.R.detach() @ token).argmax().item() == response.index(max(response)))
    by_hand, share = F.cross_entropy(torch.cat(logits).double(), torch.cat(targets)).item(), sum(agreed) / len(agreed)
    assert val_ce == pytest.approx(by_hand, rel=1e-5), f"val_ce {val_ce}, by hand {by_hand}"
    assert agreement == pytest.approx(share, abs=1e-5), f"agreement {agreement}, by loop {share}"
    assert 0 < share < 1, f"{share} agree: this test shows nothing"


def test_every_validation_document_is_evaluated_whole(data):
    """Each document once, behind an end-of-text token, its own end-of-text counted: in sum every token of the split."""
    (tokens, documents), rows = with_documents(data), []
    for inputs, targets in train.validation_batches(tokens, 96, 3):
        for x, y in zip(inputs, targets):
            rows.append(y[y >= 0].tolist())
            assert (y[: len(rows[-1])] >= 0).all(), "padding stands behind the document"
            assert x[: len(rows[-1])].tolist() == [tokens.eot, *rows[-1][:-1]]
    assert sorted(rows) == sorted(documents) and len(rows) == 40, f"{len(rows)} rows, {len(documents)} documents"


DOCUMENTED = ("step,tokens,ce,val_ce,balance,z,erc,epsilon,violated,coupling,agreement,max_load,dead,lr,grad_norm,"
              "tokens_per_s")


def test_the_log_has_step_1_every_interval_every_evaluation_and_the_last(data):
    """11 steps, logged every 4, evaluated every 3: lines 1 3 4 6 8 9 11, each cell filled where it has a value."""
    evaluated = []
    result = train.train(*settings(data, steps=11, log_every=4, eval_every=3),
                         watch=lambda model, step: evaluated.append(step))
    assert Path("out", "log.csv").read_text().splitlines()[0] == DOCUMENTED
    rows = log()
    assert [int(row["step"]) for row in rows] == [1, 3, 4, 6, 8, 9, 11] and evaluated == [3, 6, 9, 11], rows
    for row in rows:
        empty = {name for name, value in row.items() if value == ""}
        assert empty == (set() if int(row["step"]) in evaluated else {"val_ce", "agreement"}), row
        assert all(math.isfinite(float(value)) for value in row.values() if value), row
        assert int(row["tokens"]) == int(row["step"]) * 64, row
    last = {name: float(value) for name, value in rows[-1].items()}
    assert {**last, "signal": 0, "tokens_per_s": result["tokens_per_s"]} == result, f"{result} is not {last}"


def test_coupling_columns_of_step_1_are_those_of_the_initial_weights(data):
    """epsilon, violated and coupling are means over the layers, of the clean R and W_g, before the first update."""
    train.train(*settings(data, erc_alpha=0.7, n_layers=3, lr=0.5, steps=1))
    values = [(erc_moe.noise_bound(moe.R).mean().item(),
               *map(float, erc_moe.coupling_report(erc_moe.activation_norms(moe.R, moe.W_g), 0.7)))
              for moe in new_run(data, n_layers=3).model.moe_layers()]
    for name, of_layers in zip(("epsilon", "violated", "coupling"), zip(*values)):
        got, expected = float(log()[0][name]), sum(of_layers) / 3
        assert got == pytest.approx(expected, rel=1e-5), f"{name} {got}, from the weights {expected}"


def test_decay_reaches_every_matrix_and_no_norm(data):
    """The two groups hold each parameter once; R, the experts and the embeddings decay, the norms do not."""
    run = new_run(data, weight_decay=0.3)
    decay = [(id(p), group["weight_decay"]) for group in run.optimizer.param_groups for p in group["params"]]
    expected = [(id(p), 0 if "norm" in name else 0.3) for name, p in run.model.named_parameters()]
    assert sorted(decay) == sorted(expected)


def test_grad_clip_0_is_no_clipping(data):
    """It ends where a bound that no gradient reaches ends, and elsewhere than a bound that every gradient exceeds."""
    ends = {}
    for clip in (0.0, 1e6, 1e-3):
        train.train(*settings(data, out=f"clip-{clip}", grad_clip=clip))
        ends[clip] = checkpoint(f"clip-{clip}")["model"]
    assert gap(ends[0.0], ends[1e6]) == 0, f"off by {gap(ends[0.0], ends[1e6])}"
    assert gap(ends[0.0], ends[1e-3]) > 0, "a bound of 1e-3 changed nothing: this test is blind"


def test_learning_rate_at_the_points_that_matter(data):
    """Linear to the peak at `warmup`, half-way down the cosine 55 %, a tenth at the last step; and the log says so."""
    for steps, warmup, points in ((110, 10, {1: 0.2, 5: 1.0, 10: 2.0, 60: 1.1, 110: 0.2}), (7, 0, {7: 0.2}),
                                  (7, 7, {7: 2.0})):
        config = TrainConfig(steps=steps, warmup=warmup, lr=2.0)
        assert {step: train.learning_rate(config, step) for step in points} == pytest.approx(points)
    train.train(*settings(data, lr=0.01, warmup=4, steps=1, weight_decay=0.0))
    assert float(log()[0]["lr"]) == pytest.approx(0.0025)
    moved = gap(checkpoint()["model"], new_run(data).model.state_dict())
    assert 0.0024 < moved < 0.0026, f"Adam's first update moves weights by the rate, 0.0025, not {moved:.4f}"


def finite(state):
    return all(torch.isfinite(p).all() for p in state["model"].values())


class PretendGPU(str):
    """PretendGPU("cpu"): torch computes on the CPU, but the trainer goes the way of a GPU."""

    type = "cuda"


OPTIMIZERS = {
    "AdamW": torch.optim.AdamW,
    "SGD": lambda groups, lr, betas, fused: torch.optim.SGD(groups, lr, momentum=0.9),
    "RMSprop": lambda groups, lr, betas, fused: torch.optim.RMSprop(groups, lr),
}


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_bad_step_stops_any_optimizer_and_is_never_saved(data, monkeypatch, optimizer, device):
    """NaN in step 5, looked at in each step, or as on a GPU before the next save, 6: step 5 is named, 3 is saved."""
    monkeypatch.setattr(torch.optim, "AdamW", OPTIMIZERS[optimizer])
    if device == "gpu":
        monkeypatch.setattr(train, "pick_device", lambda name: PretendGPU("cpu"))
        monkeypatch.setattr(train.Run, "autocast", lambda run: torch.autocast("cpu", enabled=False))
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "none")
    seen = []
    with pytest.raises(UserError, match="not finite at step 5;.*--lr"):
        train.train(*settings(data, steps=9, log_every=4, save_every=3), extra_loss=poison([5], seen))
    assert len(seen) == (5 if device == "cpu" else 6), f"stopped after step {len(seen)}"
    assert checkpoint()["step"] == 3 and finite(checkpoint()), f"step {checkpoint()['step']} was saved"
    run, one = new_run(data), torch.tensor(1.0)
    run.update(1, one, one * math.inf, look=False)  # a loss alone, not looked at, is known later
    with pytest.raises(UserError, match="not finite at step 1;"):
        run.update(2, one, one)


def test_under_a_float16_scaler_a_skipped_step_is_normal_and_20_in_a_row_stop(data):
    """Step 3 alone is skipped, so are the 19 from step 6 on. 20 from step 5 on: an error that names step 5."""
    values, seen = dict(steps=24, dtype="fp16", save_every=4, log_every=30, n_layers=1, context_length=16), []
    train.train(*settings(data, **values), extra_loss=poison({3, *range(6, 25)}, seen))
    assert gap(seen[2], seen[3]) == 0 < gap(seen[3], seen[4]), "step 3 is skipped, step 4 is not"
    assert checkpoint()["step"] == 24 and finite(checkpoint())
    with pytest.raises(UserError, match="not finite at step 5;"):
        train.train(*settings(data, **values), extra_loss=poison(range(5, 25), []), overwrite=True)
    assert finite(checkpoint())


def test_an_extra_loss_and_a_model_of_ones_own_in_a_thread(data):
    """As in a notebook: a loss that pulls the final norm to 3 does so, once per step; the own model is saved."""
    config, _ = settings(data, steps=30, lr=0.2, weight_decay=0.0, accumulate=2, erc_weight=0.0)
    calls, results, model = [], [], new_run(data, n_layers=1).model

    def pull(given):
        calls.append(given is model)
        return 100 * (given.norm.weight - 3).square().mean()

    thread = threading.Thread(target=lambda: results.append(train.train(config, model=model, extra_loss=pull)))
    thread.start()
    thread.join()
    assert calls == [True] * 30 and results[0]["signal"] == 0, f"{len(calls)} calls in 30 steps: {results}"
    assert abs(model.norm.weight.mean().item() - 3) < 0.5, f"the extra loss wants 3, not {model.norm.weight.mean()}"
    assert gap(checkpoint()["model"], weights(model)) == 0


def test_the_type_of_the_products_is_the_fast_one_of_this_device(monkeypatch):
    """auto: float32 but on CUDA, where it is bfloat16 if that is not emulated; what is asked for is taken."""
    for device, native, expected in (("cuda", True, torch.bfloat16), ("cuda", False, torch.float16),
                                     ("cpu", True, torch.float32), ("mps", True, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        picked = [train.pick_dtype(name, torch.device(device)) for name in ("auto", "fp32", "bf16", "fp16")]
        assert picked == [expected, torch.float32, torch.bfloat16, torch.float16], (device, picked)


@pytest.mark.parametrize("changes, words", [(dict(device="tpu"), "no device 'tpu'"), (dict(compile=True), "dtype bf16"),
                                            (dict(device="cuda:99"), "no device 'cuda:99'")])
def test_what_cannot_run_here_is_one_line_before_a_folder_is_made(data, changes, words):
    """Devices that are not there, and compiling float32, which the grouped product does not."""
    with pytest.raises(UserError, match=words):
        train.train(*settings(data, **changes))
    assert not Path("out").exists()


@pytest.mark.slow
def test_compiling_without_a_compiler_is_one_line_before_a_folder_is_made(data):
    """No C++ compiler: the message names --no-compile, and nothing is claimed."""
    from torch._inductor import config as inductor

    with inductor.patch({"cpp.cxx": (None, "/no/compiler"), "force_disable_caches": True}):
        with pytest.raises(UserError, match=r"cannot be compiled here \(.+\); use --no-compile") as caught:
            train.train(*settings(data, compile=True, dtype="bf16", n_layers=1))
    assert not Path("out").exists() and "\n" not in str(caught.value), caught.value


@pytest.mark.slow
def test_a_compiled_run_is_resumed_uncompiled_and_the_other_way_round(data):
    """Two steps compiled and one not, or two not and one compiled: the same val_ce but for the rounding of bf16."""
    results = []
    for first in (True, False):
        torch.compiler.reset()
        shape = dict(n_layers=1, dtype="bf16")
        train.train(*settings(data, steps=2, compile=first, **shape), overwrite=True)
        results.append(train.train(*settings(data, steps=3, compile=not first, **shape), resume=checkpoint()))
    assert results[0]["val_ce"] == pytest.approx(results[1]["val_ce"], abs=0.02), results


def test_a_run_is_resumed_on_hardware_of_another_type(data, monkeypatch):
    """dtype auto is bfloat16 on one machine and float16, with a loss scaler, on another: a checkpoint serves both."""
    for name, steps in ("bf16", 2), ("fp16", 4):
        monkeypatch.setattr(train, "pick_dtype", lambda *_, found=train.DTYPES[name]: found)
        row = train.train(*settings(data, steps=steps), resume=checkpoint() if Path("out").exists() else None)
    assert row["step"] == 4 and checkpoint()["scaler"], f"{row}, {checkpoint()['scaler']}"
