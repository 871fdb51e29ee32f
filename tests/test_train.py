"""The trainer: what a step learns from, what it logs, what it evaluates, and what stops it.

Everything runs through train.py's own functions, with a model of a few thousand parameters; references are loops,
float64, or the same thing in one go. The command line has test_command_line.py; kills, damage and full disks have
test_reliability.py.
"""

import csv
import math
import os
import socket
import subprocess
import sys
import threading
from array import array
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import erc_moe
import prepare_data
import train
from erc_moe import MoETransformer
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
    """The rows of log.csv as text, without their time."""
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


def same(one, two):
    """Two dicts of tensors, equal to the bit."""
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def gap(one, two):
    """The largest absolute difference of two dicts of tensors."""
    assert one.keys() == two.keys(), f"only in one: {sorted(one.keys() ^ two.keys())}"
    return max((one[name].double() - two[name].double()).abs().max().item() for name in one)


class Watched(MoETransformer):
    """A model that remembers what it was shown, and spoils the cross-entropy of the forward passes in `spoil`."""

    def __init__(self, config, spoil=()):
        super().__init__(config)
        self.seen, self.spoil = [], spoil

    def forward(self, tokens, targets=None):
        self.seen.append(tokens)
        out = super().forward(tokens, targets)
        return out._replace(ce=out.ce * math.inf) if len(self.seen) in self.spoil else out


def watched(data, spoil=(), **changes):
    """(TrainConfig, MoEConfig, Watched model with the weights that train() would begin with)."""
    config, moe = settings(data, **changes)
    torch.manual_seed(config.seed)
    return config, moe, Watched(replace(moe, vocab_size=320), spoil)  # 257 ids, rounded up to a multiple of 64


# ---- The ERC loss in a step ----------------------------------------------------------------------


def test_switching_erc_off_changes_no_batch_and_nothing_before_the_first_update(data):
    """Batches of all steps, initial weights and the log of step 1, erc included, are equal to the bit; later ce not."""
    seen, rows = [], []
    for weight in (0.0, 1.0):
        config, moe, model = watched(data, erc_weight=weight, out=f"erc{weight:g}")
        assert same(weights(model), weights(new_run(data, erc_weight=weight).model)), "other initial weights"
        train.train(config, moe, model=model)
        seen.append(torch.stack(model.seen[: config.steps]))
        rows.append([{**row, "grad_norm": ""} for row in log(config.out)])
    assert torch.equal(*seen), "batches differ with and without ERC"
    assert rows[0][0] == rows[1][0], f"step 1 without ERC: {rows[0][0]}, with: {rows[1][0]}"
    assert rows[0][-1]["ce"] != rows[1][-1]["ce"], "ERC trains no other weights"
    expected = new_run(data).model.erc_loss(1.0, keyed_generator("cpu", 0, 1, "erc")).item()
    assert float(rows[0][0]["erc"]) == pytest.approx(expected, rel=1e-6), f"erc {rows[0][0]['erc']}, not {expected}"


def test_erc_once_per_step_is_erc_in_every_micro_batch(data):
    """One gradient per step, layer by layer, is the mean of four of model.erc_loss under the same noise."""
    run = new_run(data, accumulate=4, erc_weight=2.0, n_layers=3)
    value = run.add_erc_gradient(5)
    once = gradients(run.model)
    run.model.zero_grad()
    for _ in range(4):
        loss = run.model.erc_loss(1.0, keyed_generator("cpu", 0, 5, "erc"))
        (2.0 * loss / 4).backward()
    assert value.item() == pytest.approx(loss.item(), rel=1e-6), f"{value} is not {loss}"
    assert gap(once, gradients(run.model)) < 1e-7, f"gradients differ by {gap(once, gradients(run.model)):.1e}"
    assert {name.split(".")[-1] for name in once} == {"R", "W_g"} and len(once) == 6, f"reached: {sorted(once)}"


def test_one_layer_after_the_other(data, monkeypatch):
    """When a layer's loss is computed, the layers before have their gradient, so that their responses are free."""
    run, done = new_run(data, n_layers=3), []

    def watch(*given):
        done.append(sum(moe.W_g.grad is not None for moe in run.model.moe_layers()))
        return erc_moe.erc_loss(*given)

    monkeypatch.setattr(train, "erc_moe", SimpleNamespace(erc_loss=watch))
    run.add_erc_gradient(1)
    assert done == [0, 1, 2], f"layers that had a gradient at each loss: {done}"


def test_the_fp16_scaler_does_not_scale_the_erc_gradient(data):
    """In a float16 run with a loss scale of 65,536, switching ERC on adds the float32 ERC gradient to the rest."""
    seen = []
    for weight in (0.0, 1.0):
        train.train(*settings(data, dtype="fp16", steps=1, erc_weight=weight), overwrite=True,
                    extra_loss=lambda model: seen.append(gradients(model)) or nothing(model))
    assert checkpoint()["scaler"]["scale"] == 65536, checkpoint()["scaler"]
    exact = new_run(data)
    exact.model.erc_loss(1.0, keyed_generator("cpu", 0, 1, "erc")).backward()
    for name, gradient in gradients(exact.model).items():
        added = seen[1][name] - seen[0][name]
        assert torch.allclose(added, gradient, atol=1e-6), f"{name}: off by {(added - gradient).abs().max():.1e}"
    assert gradient.abs().max() > 1e-4, f"an ERC gradient of {gradient.abs().max():.1e} is too small to see here"


class PretendGPU(str):
    """PretendGPU("cpu"): torch computes on the CPU, but the trainer goes the way of a GPU."""

    type = "cuda"


def test_on_a_gpu_nothing_in_a_step_waits_for_a_value(data, monkeypatch):
    """From the batch to the update, two steps run on tensors without content, where reading a value is an error."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    class Still(MoETransformer):
        def to(self, device):  # tensors without content cannot be moved
            return self

    def pinned(tensor):
        assert tensor.is_contiguous(), "a copy of a tensor with gaps goes through memory that is not pinned, and waits"
        return tensor

    (config, moe), tokens = settings(data, dtype="bf16", accumulate=2), load_data(data)
    monkeypatch.setattr(prepare_data, "load_data", lambda folder: tokens)
    monkeypatch.setattr(train, "pick_device", lambda name: PretendGPU("cpu"))
    monkeypatch.setattr(train, "validation_batches", lambda *given: [])
    monkeypatch.setattr(train, "train_batch", lambda data, T, B, _: 2 * (torch.zeros(B, T + 1).long()[:, :-1],))
    monkeypatch.setattr(torch.Tensor, "pin_memory", pinned)
    monkeypatch.setattr(train.Run, "autocast", lambda run: torch.autocast("cpu", torch.bfloat16))
    with FakeTensorMode():
        run = train.Run(config, None, Still(replace(moe, vocab_size=320)))
        for step in (1, 2):
            means, _ = run.add_token_gradient(step)
            run.scaler.unscale_(run.optimizer)
            run.add_erc_gradient(step)
            missing = [name for name, p in run.model.named_parameters() if p.grad is None]
            norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
            run.update(step, norm, means[0], look=False)
    assert not missing and len(run.optimizer.state) > 0, f"this test is blind: without gradient {missing}"


# ---- Accumulation and data-parallel --------------------------------------------------------------


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


def test_processes_share_the_micro_batches(data, monkeypatch):
    """Two processes of 2 micro-batches, one after the other here: their shares add up to the gradient of one with 4."""
    reduced = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: reduced.append(tensor))
    shares = []
    for rank in (0, 1):
        run = new_run(data, accumulate=2)
        run.rank, run.processes = rank, 2
        means, load = run.add_token_gradient(3)
        shares.append({**gradients(run.model), "means": means, "load": load})
    one = new_run(data, accumulate=4)
    means, load = one.add_token_gradient(3)
    expected = {**gradients(one.model), "means": means, "load": load}
    difference = gap({name: shares[0][name] + shares[1][name] for name in shares[0]}, expected)
    assert difference < 1e-6 and len(reduced) == 2 * len(expected), f"off by {difference:.1e}, {len(reduced)} reduced"


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


# ---- Batches -------------------------------------------------------------------------------------

EOT = 60_000


def numbered(lengths, ends=()):
    """TokenData with shards of these lengths; token 1000 s + p stands at p in shard s, or EOT where (s, p) in ends."""
    shards = [memoryview(array("H", [EOT if (s, p) in ends else 1000 * s + p for p in range(length)]))
              for s, length in enumerate(lengths)]
    return TokenData("own", EOT + 1, EOT, shards, shards[:1], [], {}, "")


def window_starts(data, T, draws=3000):
    """{(shard, first position)} of that many random windows, each checked to be a slice of one shard."""
    inputs, targets = train.train_batch(data, T, draws, torch.Generator().manual_seed(0))
    assert inputs.shape == targets.shape == (draws, T) and inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], targets[:, :-1]), "targets are the inputs, one further"
    starts = set()
    for row in torch.cat((inputs, targets[:, -1:]), dim=1).tolist():
        at, token = next((i, token) for i, token in enumerate(row) if token != EOT)
        shard, start = token // 1000, token % 1000 - at
        assert start >= 0 and row == data.train[shard][start : start + T + 1].tolist(), row
        starts.add((shard, start))
    return starts


def test_every_window_of_every_shard_is_drawn_and_none_crosses_into_another():
    """Without documents: all first positions 0 .. length - T - 1, of shards of any length, those too short left out."""
    T, lengths = 8, (40, 5, 9, 8, 30)
    expected = {(s, start) for s, length in enumerate(lengths) for start in range(length - T)}
    got = window_starts(numbered(lengths), T)
    assert got == expected, f"missing {sorted(expected - got)}, unexpected {sorted(got - expected)}"


def test_a_window_begins_with_the_end_of_text_within_its_reach():
    """By a loop over all offsets: the first end-of-text among the next T tokens, unless the shard ends too soon."""
    T, lengths = 8, (60, 31)
    ends = {(0, 0), (0, 3), (0, 20), (0, 21), (0, 40), (0, 57), (1, 24)}
    expected = set()
    for s, length in enumerate(lengths):
        for offset in range(length - T):
            near = [p for p in range(offset, offset + T) if (s, p) in ends]
            expected.add((s, near[0] if near and near[0] + T < length else offset))
    got = window_starts(numbered(lengths, ends), T)
    assert got == expected, f"missing {sorted(expected - got)}, unexpected {sorted(got - expected)}"


def test_a_batch_is_a_function_of_its_key_alone(data):
    """The same (seed, step, micro-batch) gives the same batch, any other another; no shared stream is drawn from."""
    tokens, before = load_data(data), torch.get_rng_state()

    def batch(*key):
        return train.train_batch(tokens, 32, 2, keyed_generator("cpu", *key))[0]

    first = batch(0, 1, "batch", 0)
    assert torch.equal(first, batch(0, 1, "batch", 0)), "the same key gave another batch"
    for key in ((1, 1, "batch", 0), (0, 2, "batch", 0), (0, 1, "batch", 1), (0, 1, "other", 0), (0, 11, "batch", 0)):
        assert not torch.equal(first, batch(*key)), f"{key} gave the batch of (0, 1, 'batch', 0)"
    assert torch.equal(before, torch.get_rng_state()), "a batch moved the global random stream"


def test_a_split_too_short_for_one_window_is_refused_with_the_numbers(data):
    """A context longer than the text: one line with all three lengths, before the first step."""
    with pytest.raises(UserError, match=f"2001 tokens.*{len(load_data(data).val[0])}.*6000.*--context-length"):
        train.train(*settings(data, context_length=2000))
    assert not Path("out").exists(), "a run folder was made all the same"


# ---- Evaluation ----------------------------------------------------------------------------------


def everything(tokens):
    return [token for shard in tokens.val for token in shard.tolist()]


def with_documents(data):
    """The tokens of a folder, with the documents of their validation split known, as the embedded corpus knows them."""
    tokens = load_data(data)
    ends = [i + 1 for i, token in enumerate(everything(tokens)) if token == tokens.eot]
    return tokens._replace(meta={"val_documents": [["story", first, end] for first, end in zip([0, *ends], ends)]})


@pytest.mark.parametrize("whole", [False, True], ids=["windows", "documents"])
def test_val_ce_and_agreement_by_hand(data, whole):
    """val_ce is one F.cross_entropy over all that counts, without other losses; agreement a loop over its tokens."""
    run = new_run(data, context_length=96, batch_size=3, n_layers=2, z_weight=9.0, balance_weight=9.0)
    batches = train.validation_batches(with_documents(data) if whole else run.data, 96, 3)
    val_ce, agreement = train.evaluate(run.model, batches, run.device, run.autocast)
    logits, targets, agree, counted = [], [], 0, 0
    for x, y in batches:
        inside = []
        hooks = [moe.register_forward_pre_hook(lambda _, args, inside=inside: inside.append(args[0].detach()))
                 for moe in run.model.moe_layers()]
        logits.append(run.model(x).logits.detach()[y >= 0])
        targets.append(y[y >= 0])
        for hook in hooks:
            hook.remove()
        for moe, states in zip(run.model.moe_layers(), inside):
            for token in states[y >= 0]:
                response = [(token @ moe.W_g[j].detach()).norm().item() for j in range(4)]
                agree += (moe.R.detach() @ token).argmax().item() == response.index(max(response))
                counted += 1
    by_hand = F.cross_entropy(torch.cat(logits).double(), torch.cat(targets)).item()
    assert val_ce == pytest.approx(by_hand, rel=1e-5), f"val_ce {val_ce}, by hand {by_hand}"
    assert agreement == pytest.approx(agree / counted, abs=1e-5), f"agreement {agreement}, by loop {agree / counted}"
    assert 0 < agree < counted, f"{agree} of {counted} agree: this test shows nothing"


def test_every_validation_document_is_evaluated_whole(data):
    """Each document once, behind an end-of-text token, its own end-of-text counted: in sum every token of the split."""
    tokens = with_documents(data)
    rows = []
    for inputs, targets in train.validation_batches(tokens, 96, 3):
        for x, y in zip(inputs, targets):
            row = y[y >= 0].tolist()
            assert (y[: len(row)] >= 0).all(), "padding stands behind the document"
            assert x[: len(row)].tolist() == [tokens.eot, *row[:-1]], "shown: end-of-text, then the document"
            rows.append(row)
    expected = [everything(tokens)[first:end] for _, first, end in tokens.meta["val_documents"]]
    assert sorted(rows) == sorted(expected) and len(expected) == 40, f"{len(rows)} rows, {len(expected)} documents"


# ---- The log -------------------------------------------------------------------------------------

DOCUMENTED = ("step tokens ce val_ce balance z erc epsilon violated coupling agreement max_load dead lr grad_norm"
              " tokens_per_s").split()


def test_the_log_has_step_1_every_interval_every_evaluation_and_the_last(data):
    """11 steps, logged every 4, evaluated every 3: lines 1 3 4 6 8 9 11, each cell filled where it has a value."""
    watched_steps = []
    result = train.train(*settings(data, steps=11, log_every=4, eval_every=3),
                         watch=lambda model, step: watched_steps.append(step))
    assert Path("out", "log.csv").read_text().splitlines()[0] == ",".join(DOCUMENTED)
    rows = log()
    assert [int(row["step"]) for row in rows] == [1, 3, 4, 6, 8, 9, 11] and watched_steps == [3, 6, 9, 11], rows
    for row in rows:
        empty = {name for name, value in row.items() if value == ""}
        assert empty == (set() if int(row["step"]) in watched_steps else {"val_ce", "agreement"}), row
        assert all(math.isfinite(float(value)) for value in row.values() if value), row
        assert int(row["tokens"]) == int(row["step"]) * 64, row
    last = {name: float(value) for name, value in rows[-1].items()}
    assert {**last, "signal": 0, "tokens_per_s": result["tokens_per_s"]} == result, f"{result} is not {last}"


def test_coupling_columns_of_step_1_are_those_of_the_initial_weights(data):
    """epsilon, violated and coupling against loops in float64 over the clean R and W_g, before the first update."""
    train.train(*settings(data, erc_alpha=0.7, n_layers=3, lr=0.5, steps=1))
    violated, coupling, epsilon = [], [], []
    for moe in new_run(data, n_layers=3).model.moe_layers():
        R, W_g = moe.R.detach().double(), moe.W_g.detach().double()
        M = [[(R[i] @ W_g[j]).norm().item() for j in range(4)] for i in range(4)]
        pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
        violated.append(sum((M[i][j] > 0.7 * M[i][i]) + (M[j][i] > 0.7 * M[i][i]) for i, j in pairs) / 24)
        coupling.append(sum(M[i][i] for i in range(4)) / 4 / (sum(M[i][j] for i, j in pairs) / 12))
        epsilon += [min((R[i] - R[j]).norm() for j in range(4) if j != i).item() / 2 / R[i].norm().item()
                    for i in range(4)]
    for name, values in dict(violated=violated, coupling=coupling, epsilon=epsilon).items():
        got, expected = float(log()[0][name]), sum(values) / len(values)
        assert got == pytest.approx(expected, rel=1e-5), f"{name} {got}, by loops {expected}"


# ---- Optimizer -----------------------------------------------------------------------------------


def test_decay_reaches_every_matrix_and_no_norm(data):
    """The two groups hold each parameter once; R, the experts and the embeddings decay, the norms do not."""
    run = new_run(data, weight_decay=0.3)
    decay = [(id(p), group["weight_decay"]) for group in run.optimizer.param_groups for p in group["params"]]
    expected = [(id(p), 0 if "norm" in name else 0.3) for name, p in run.model.named_parameters()]
    assert sorted(decay) == sorted(expected), "not each parameter once, or with another decay"


def test_learning_rate_at_the_points_that_matter(data):
    """Linear to the peak at `warmup`, half-way down the cosine 55 %, a tenth at the last step; and the log says so."""
    config = TrainConfig(steps=110, warmup=10, lr=2.0)
    for step, expected in ((1, 0.2), (5, 1.0), (10, 2.0), (60, 1.1), (110, 0.2)):
        assert train.learning_rate(config, step) == pytest.approx(expected), f"step {step}: not {expected}"
    assert train.learning_rate(TrainConfig(steps=7, warmup=0, lr=2.0), 7) == pytest.approx(0.2)
    assert train.learning_rate(TrainConfig(steps=7, warmup=7, lr=2.0), 7) == 2.0
    train.train(*settings(data, lr=0.01, warmup=4, steps=1, weight_decay=0.0))
    assert float(log()[0]["lr"]) == pytest.approx(0.0025)
    moved = gap(checkpoint()["model"], new_run(data).model.state_dict())
    assert 0.0024 < moved < 0.0026, f"Adam's first update moves weights by the rate, 0.0025, not {moved:.4f}"


# ---- What is not finite --------------------------------------------------------------------------


def finite(state):
    return all(torch.isfinite(p).all() for p in state["model"].values())


ADAMW = torch.optim.AdamW
OPTIMIZERS = {
    "AdamW, fused": ADAMW,
    "AdamW": lambda groups, lr, betas, fused: ADAMW(groups, lr, betas),
    "SGD": lambda groups, lr, betas, fused: torch.optim.SGD(groups, lr, momentum=0.9),
    "RMSprop": lambda groups, lr, betas, fused: torch.optim.RMSprop(groups, lr),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("where", ["loss", "extra loss"])
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_a_bad_step_stops_any_optimizer_and_is_never_saved(data, monkeypatch, optimizer, where, device):
    """Not finite in step 5 of 9, looked at in each step, or as on a GPU in step 8, the next log line: the message names
    step 5, and the last checkpoint is that of step 4, or of 3 where saved each third."""
    monkeypatch.setattr(torch.optim, "AdamW", OPTIMIZERS[optimizer])
    if device == "gpu":
        monkeypatch.setattr(train, "pick_device", lambda name: PretendGPU("cpu"))
        monkeypatch.setattr(train.Run, "autocast", lambda run: torch.autocast("cpu", enabled=False))
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "none")
    calls = []

    def poison(model):
        calls.append(1)
        return nothing(model) + (math.nan * model.norm.weight.sum() if where == "extra loss" and len(calls) == 5 else 0)

    config, moe, model = watched(data, spoil=(5,) if where == "loss" else (), steps=9, log_every=4, save_every=3)
    with pytest.raises(UserError, match="not finite at step 5;"):
        train.train(config, moe, model=model, extra_loss=poison)
    assert len(calls) == (5 if device == "cpu" else 6), f"stopped after step {len(calls)}"
    assert checkpoint()["step"] == 3 and finite(checkpoint()), f"step {checkpoint()['step']} was saved"


def test_a_wild_learning_rate_stops_with_the_step_and_finite_checkpoints(data):
    """--lr 1e30, saved after each step: stopped at step 2, what was saved is finite; beyond float32 it is refused."""
    with pytest.raises(UserError, match="not finite at step 2;.*--lr"):
        train.train(*settings(data, lr=1e30, save_every=1, steps=10))
    assert checkpoint()["step"] == 1 and finite(checkpoint())
    with pytest.raises(ValueError, match="lr must be"):
        TrainConfig(lr=1e300)


@pytest.mark.parametrize("where", ["loss", "extra loss"])
def test_under_a_float16_scaler_a_skipped_step_is_normal_and_20_in_a_row_stop(data, where):
    """One bad step: nothing moves in it, then training goes on. 20 from step 3 on: an error that names step 3."""
    def attempt(bad, out):
        seen = []

        def look(model):
            seen.append(weights(model))
            poison = where == "extra loss" and len(seen) in bad
            return nothing(model) + (math.nan * model.norm.weight.sum() if poison else 0)

        config, moe, model = watched(data, spoil=bad if where == "loss" else (), steps=24, dtype="fp16", out=out,
                                     save_every=4, log_every=30, n_layers=1, context_length=16)
        try:
            train.train(config, moe, model=model, extra_loss=look)
        finally:
            assert finite(checkpoint(out)), f"{out}: the checkpoint of step {checkpoint(out)['step']} is not finite"
        return seen

    seen = attempt({3}, "one")
    assert same(seen[2], seen[3]) and not same(seen[3], seen[4]), "step 3 is skipped, step 4 is not"
    attempt(set(range(3, 22)), "nineteen")
    with pytest.raises(UserError, match="not finite at step 3;"):
        attempt(set(range(3, 25)), "twenty")


# ---- train() as a function -----------------------------------------------------------------------


def test_an_extra_loss_and_a_model_of_ones_own_in_a_thread(data):
    """In a thread, as in a notebook: a loss that pulls the final norm's weights to 3 does so, once per step; the own
    model is what is saved."""
    config, moe, model = watched(data, steps=30, lr=0.2, weight_decay=0.0, accumulate=2, erc_weight=0.0)
    calls, results = [], []

    def pull(given):
        calls.append(given is model)
        return 100 * (given.norm.weight - 3).square().mean()

    thread = threading.Thread(target=lambda: results.append(train.train(config, moe, model=model, extra_loss=pull)))
    thread.start()
    thread.join()
    assert calls == [True] * 30 and results[0]["signal"] == 0, f"{len(calls)} calls in 30 steps: {results}"
    assert abs(model.norm.weight.mean().item() - 3) < 0.5, f"the extra loss wants 3, not {model.norm.weight.mean()}"
    assert same(checkpoint()["model"], weights(model))


# ---- Devices and types ---------------------------------------------------------------------------


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


@pytest.mark.parametrize("before, after", [("bf16", "fp16"), ("fp16", "bf16")])
def test_a_run_is_resumed_on_hardware_of_another_type(data, monkeypatch, before, after):
    """dtype auto is bfloat16 on one machine and float16, with a loss scaler, on another: a checkpoint serves both."""
    for name, steps in (before, 2), (after, 4):
        monkeypatch.setattr(train, "pick_dtype", lambda *_, found=train.DTYPES[name]: found)
        row = train.train(*settings(data, steps=steps), resume=checkpoint() if Path("out").exists() else None)
    assert row["step"] == 4 and bool(checkpoint()["scaler"]) == (after == "fp16"), f"{row}, {checkpoint()['scaler']}"
