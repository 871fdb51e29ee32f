"""The trainer: what a step learns from, what it logs, and what it evaluates.

Everything runs through train.py's own functions, with a model of a few thousand parameters; references are loops,
float64, or the same thing in one go. The command line has test_command_line.py; kills, damage and full disks have
test_reliability.py.
"""

import csv
import json
import math
import os
import re
import socket
import subprocess
import sys
import weakref
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import erc_moe
import prepare_data
import train
from erc_moe import MoETransformer, noise_bound
from prepare_data import HEADER, MAGIC, TokenData, UserError, load_data
from train import TrainConfig, keyed_generator

ROOT = Path(train.__file__).parent
SMALL = dict(context_length=32, n_layers=2, n_heads=2, d_model=16, d_expert=8, n_experts=4, batch_size=2, steps=4,
             warmup=2, eval_every=0, save_every=0, log_every=1, device="cpu", dtype="fp32")


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
    """The rows of log.csv, as text."""
    with open(Path(out, "log.csv"), encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def timeless(rows):
    return [{name: value for name, value in row.items() if name != "tokens_per_s"} for row in rows]


def checkpoint(out="out"):
    return train.load_checkpoint(Path(out))


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


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


class PretendGPU(str):
    """PretendGPU("cpu"): torch computes on the CPU, but the trainer goes the way of a GPU."""

    type = "cuda"


class Watched(MoETransformer):
    """A model that remembers what it was shown, and spoils the cross-entropy of the forward passes in `spoil`."""

    def __init__(self, config, spoil=()):
        super().__init__(config)
        self.seen, self.spoil = [], spoil

    def forward(self, tokens, targets=None):
        self.seen.append(tokens)
        out = super().forward(tokens, targets)
        return out._replace(ce=out.ce * math.inf) if len(self.seen) in self.spoil else out


def watched(data, seed=0, spoil=(), **changes):
    """(TrainConfig, MoEConfig, Watched model as train() would initialise its own)."""
    config, moe = settings(data, seed=seed, **changes)
    torch.manual_seed(seed)
    return config, moe, Watched(replace(moe, vocab_size=320), spoil)  # 257 ids, rounded up to a multiple of 64


# ---- The ERC loss in a step ----------------------------------------------------------------------


def test_switching_erc_off_changes_nothing_before_the_first_update(data):
    """Batches of all steps, initial weights, and ce, balance, z of step 1 are bit-identical; later weights differ."""
    initial, seen, rows, final = [], [], [], []
    for weight in (0.0, 1.0):
        config, moe, model = watched(data, erc_weight=weight, out=f"erc{weight:g}", log_every=100)
        initial.append(new_run(data, erc_weight=weight).model.state_dict())
        assert same(initial[-1], model.state_dict()), "an own model of the same seed begins with the same weights"
        train.train(config, moe, model=model)
        seen.append(torch.stack(model.seen[: config.steps]))
        rows.append(log(config.out))
        final.append(model.state_dict())
    assert same(*initial), "initial weights differ with and without ERC"
    assert torch.equal(*seen), "batches differ with and without ERC"
    first = [[row[name] for name in ("ce", "balance", "z", "erc", "epsilon", "violated", "coupling", "max_load")]
             for row in (rows[0][0], rows[1][0])]
    assert first[0] == first[1], f"step 1 without ERC: {first[0]}, with: {first[1]}"
    assert gap(*final) > 1e-4 and rows[0][-1]["ce"] != rows[1][-1]["ce"], "ERC on trains other weights"


def test_the_erc_column_is_logged_at_weight_0_too(data):
    """erc of step 1 is the loss of the initial weights under the noise of (seed, step), whatever its weight."""
    train.train(*settings(data, erc_weight=0.0, seed=3))
    expected = new_run(data, seed=3).model.erc_loss(1.0, "sample", keyed_generator("cpu", 3, 1, "erc")).item()
    got = float(log()[0]["erc"])
    assert got == pytest.approx(expected, rel=1e-6) and got > 0, f"erc {got}, expected {expected}"


@pytest.mark.parametrize("noise", ["sample", "none", "expected"])
def test_erc_once_per_step_is_erc_in_every_micro_batch(data, noise):
    """One gradient per step, layer by layer, is the mean of four of model.erc_loss under the same noise."""
    run = new_run(data, accumulate=4, erc_noise=noise, erc_weight=2.0, n_layers=3)
    value = run.add_erc_gradient(5)
    once = gradients(run.model)
    run.model.zero_grad()
    for _ in range(4):
        loss = run.model.erc_loss(1.0, noise, keyed_generator("cpu", 0, 5, "erc"))
        (2.0 * loss / 4).backward()
    assert value.item() == pytest.approx(loss.item(), rel=1e-6), f"{value} is not {loss}"
    assert gap(once, gradients(run.model)) < 1e-7, f"gradients differ by {gap(once, gradients(run.model)):.1e}"
    assert {name.split(".")[-1] for name in once} == {"R", "W_g"} and len(once) == 6, f"reached: {sorted(once)}"


def test_where_no_constraint_is_broken_the_gradient_left_out_was_zero(data):
    """At alpha 10 the loss is 0, and its backward pass is not taken: with it, gradients are the same to the bit."""
    run = new_run(data, erc_alpha=10.0)
    run.add_token_gradient(1)
    before = gradients(run.model)
    value = run.add_erc_gradient(1)
    assert value == 0 and gap(before, gradients(run.model)) == 0, f"erc {value}"
    loss = run.model.erc_loss(10.0, "sample", keyed_generator("cpu", 0, 1, "erc"))
    loss.backward()
    assert gap(before, gradients(run.model)) == 0, f"a loss of {loss} has a gradient after all"


def test_one_layer_of_responses_at_a_time(data):
    """Of all [n, n, D] responses kept for a backward pass, one is alive at a time; model.erc_loss keeps all three."""
    run = new_run(data, n_layers=3)
    alive, peak = weakref.WeakSet(), 0

    class Kept:  # stands for a tensor that is kept for the backward pass, for as long as it is
        def __init__(self, tensor):
            self.tensor = tensor

    def keep(tensor):
        nonlocal peak
        kept = Kept(tensor)
        if tensor.shape == (4, 4, 8):
            alive.add(kept)
            peak = max(peak, len(alive))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor):
        run.add_erc_gradient(1)
        ours, peak = peak, 0
        run.model.erc_loss().backward()
    assert (ours, peak) == (1, 3), f"{ours} alive layer by layer, {peak} in one go"


def test_the_fp16_scaler_does_not_scale_the_erc_gradient(data):
    """In a float16 run with a loss scale of 65,536, switching ERC on adds the float32 ERC gradient to the rest."""
    seen = []

    def look(model):
        seen.append(gradients(model))
        return nothing(model)

    for weight in (0.0, 1.0):
        train.train(*settings(data, dtype="fp16", steps=1, erc_weight=weight), extra_loss=look, overwrite=True)
    assert checkpoint()["scaler"]["scale"] == 65536, checkpoint()["scaler"]
    exact = new_run(data)
    exact.model.erc_loss(1.0, "sample", keyed_generator("cpu", 0, 1, "erc")).backward()
    for name, gradient in gradients(exact.model).items():
        added = seen[1][name] - seen[0][name]
        assert torch.allclose(added, gradient, atol=1e-6), f"{name}: off by {(added - gradient).abs().max():.1e}"
    assert gradient.abs().max() > 1e-4, f"an ERC gradient of {gradient.abs().max():.1e} is too small to see here"


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
    dispatch = erc_moe.dispatch
    monkeypatch.setattr(erc_moe, "dispatch", lambda *given, **usual: dispatch(*given))  # no fillers, as on a GPU
    with FakeTensorMode():
        run = train.Run(config, None, Still(replace(moe, vocab_size=320)))
        for step in (1, 2):
            means, _ = run.add_token_gradient(step)
            run.scaler.unscale_(run.optimizer)
            run.add_erc_gradient(step)
            missing = [name for name, p in run.model.named_parameters() if p.grad is None]
            norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
            run.update(step, norm, means[0])
    assert not missing and len(run.optimizer.state) > 0, f"this test is blind: without gradient {missing}"


# ---- Accumulation and data-parallel --------------------------------------------------------------


def test_accumulation_is_the_mean_over_the_micro_batches(data):
    """4 micro-batches of 2 windows: gradient and logged means are those of one batch of the same 8 windows."""
    seen = []
    config, moe = settings(data, accumulate=4, steps=1, erc_weight=0.0)
    train.train(config, moe, extra_loss=lambda model: seen.append(gradients(model)) or nothing(model))
    run = new_run(data)
    batches = [train.train_batch(run.data, 32, 2, keyed_generator("cpu", 0, 1, "batch", i)) for i in range(4)]
    outs = [run.model(*batch) for batch in batches]
    ce, balance, z = (sum(getattr(out, name) for out in outs) / 4 for name in ("ce", "balance", "z"))
    whole = run.model(torch.cat([batch[0] for batch in batches]), torch.cat([batch[1] for batch in batches]))
    assert ce.item() == pytest.approx(whole.ce.item(), rel=1e-5), f"{ce} is not {whole.ce}"
    (ce + 0.01 * balance + 0.001 * z).backward()
    row, load = log()[0], sum(out.load for out in outs)
    for name, value in dict(ce=ce, balance=balance, z=z).items():
        assert float(row[name]) == pytest.approx(value.item(), rel=1e-5), f"{name}: {row[name]}, not {value}"
    assert gap(seen[0], gradients(run.model)) < 1e-6, f"off by {gap(seen[0], gradients(run.model)):.1e}"
    assert int(row["tokens"]) == 4 * 2 * 32 and load.sum() == 2 * 2 * 4 * 2 * 32, f"{row['tokens']}, {load}"
    assert float(row["max_load"]) == pytest.approx((load / load.sum(1, keepdim=True)).max().item() * 4)
    assert int(row["dead"]) == int((load == 0).sum()), f"{row['dead']} dead of {load}"
    norm = torch.linalg.vector_norm(torch.cat([g.flatten() for g in seen[0].values()])).item()
    assert float(row["grad_norm"]) == pytest.approx(norm, rel=1e-5), f"{row['grad_norm']}, not {norm}"


def test_two_processes_learn_what_one_does_with_twice_the_accumulation(data):
    """torchrun with 2 processes of 2 micro-batches equals one process of 4: the log, and weights up to rounding."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1",
               f"--master-port={port}", str(ROOT / "train.py"), *flags(data, accumulate=2, out="two")]
    environment = dict(os.environ, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert done.stdout.count("val_ce") == 2, f"one process prints, not each:\n{done.stdout}"  # last step, and report
    train.train(*settings(data, accumulate=4, out="one"))
    difference = gap(checkpoint("one")["model"], checkpoint("two")["model"])
    assert 0 <= difference < 2e-5, f"weights differ by {difference:.1e}"
    assert len(log("one")) == len(log("two")) == 4
    for one, two in zip(timeless(log("one")), timeless(log("two"))):
        for name in one:
            if one[name] or two[name]:
                assert float(one[name]) == pytest.approx(float(two[name]), rel=1e-3, abs=1e-4), (name, one, two)
        assert one["tokens"] == two["tokens"] and one["max_load"] == two["max_load"], (one, two)


# ---- Batches -------------------------------------------------------------------------------------


EOT = 60_000


def numbered(lengths, ends=()):
    """TokenData with shards of these lengths; token 1000 s + p stands at p in shard s, or EOT where (s, p) in ends."""
    shards = [torch.tensor([EOT if (s, p) in ends else 1000 * s + p for p in range(length)]).to(torch.uint16)
              for s, length in enumerate(lengths)]
    return TokenData("own", EOT + 1, EOT, shards, shards[:1], [Path(f"{s}_train.bin") for s in range(len(lengths))],
                     {}, "")


def window_starts(data, T, draws=3000):
    """{(shard, first position)} of that many random windows, each checked to be a slice of one shard."""
    inputs, targets = train.train_batch(data, T, draws, torch.Generator().manual_seed(0))
    assert inputs.shape == targets.shape == (draws, T) and inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], targets[:, :-1]), "targets are the inputs, one further"
    starts = set()
    for row in torch.cat((inputs, targets[:, -1:]), dim=1):
        at, token = next((i, int(token)) for i, token in enumerate(row) if token != EOT)
        shard, start = token // 1000, token % 1000 - at
        assert start >= 0 and torch.equal(row, data.train[shard][start : start + T + 1].long()), row
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
            start = near[0] if near and near[0] + T < length else offset
            expected.add((s, start))
    got = window_starts(numbered(lengths, ends), T)
    assert got == expected, f"missing {sorted(expected - got)}, unexpected {sorted(got - expected)}"
    assert {(0, 3), (0, 20), (0, 21), (0, 40)} < got and (0, 15) not in got, "documents are read from their start"


def test_a_batch_is_a_function_of_its_key_alone(data):
    """The same (seed, step, micro-batch) gives the same batch, any other another; no shared stream is drawn from."""
    tokens, before = load_data(data), torch.get_rng_state()

    def batch(*key):
        return train.train_batch(tokens, 32, 2, keyed_generator("cpu", *key))[0]

    first = batch(0, 1, "batch", 0)
    torch.rand(10)
    assert torch.equal(first, batch(0, 1, "batch", 0)), "the same key gave another batch"
    for key in ((1, 1, "batch", 0), (0, 2, "batch", 0), (0, 1, "batch", 1), (0, 1, "other", 0), (0, 11, "batch", 0)):
        assert not torch.equal(first, batch(*key)), f"{key} gave the batch of (0, 1, 'batch', 0)"
    torch.set_rng_state(before)
    batch(0, 1, "batch", 0)
    assert torch.equal(before, torch.get_rng_state()), "a batch moved the global random stream"


def test_an_id_outside_the_vocabulary_is_refused_with_its_place():
    """Token 60,001 at position 30 of the second shard: shard and offset of the window that has it are named."""
    data = numbered((40, 40))
    data.train[1][30] = EOT + 1
    with pytest.raises(UserError, match=r"1_train\.bin, offset (\d+): token 60001 is outside the vocab") as caught:
        window_starts(data, 8)
    offset = int(re.search(r"offset (\d+)", str(caught.value))[1])
    assert offset <= 30 <= offset + 8 and caught.value.code == 1, str(caught.value)
    with pytest.raises(UserError, match="validation split: token 60001"):
        train.validation_batches(data._replace(val=[data.train[1]]), 8, 2)


def test_a_split_too_short_for_one_window_is_refused_with_the_numbers(data):
    """A context longer than the text: one line with all three lengths, before the first step."""
    tokens = load_data(data)
    with pytest.raises(UserError, match=f"2001 tokens.*{len(tokens.val[0])}.*6000.*--context-length"):
        train.train(*settings(data, context_length=2000))
    assert not Path("out").exists(), "a run folder was made all the same"


def test_shards_of_other_projects_are_trained_on_as_gpt2_tokens():
    """A folder without meta.json, with names as in modded-nanogpt: 50,257 ids, and 50,304 rows in the model."""
    Path("foreign").mkdir()
    for name, length in (("fineweb_train_000001.bin", 500), ("fineweb_val_000000.bin", 200)):
        tokens = torch.randint(100, (length,), generator=torch.Generator().manual_seed(length)).to(torch.uint16)
        tokens[::50] = 50256
        Path("foreign", name).write_bytes(HEADER.pack(MAGIC, 1, length) + bytes(tokens.untyped_storage()))
    result = train.train(*settings("foreign", steps=1, n_layers=1))
    assert 10 < result["val_ce"] < 11.5, f"an untrained model of 50,257 ids has val_ce {result['val_ce']:.2f}, not 10.8"
    state = checkpoint()
    assert state["tokenizer"] == "gpt2" and state["model"]["embedding.weight"].shape == (50304, 16)


# ---- Evaluation ----------------------------------------------------------------------------------


def with_documents(data):
    """The tokens of a folder, with the documents of their validation split known, as the embedded corpus knows them."""
    tokens = load_data(data)
    ends = [i + 1 for i, token in enumerate(torch.cat([s.long() for s in tokens.val]).tolist()) if token == tokens.eot]
    spans = [["story", first, end] for first, end in zip([0, *ends], ends)]
    return tokens._replace(meta={**tokens.meta, "val_documents": spans})


@pytest.mark.parametrize("whole", [False, True], ids=["windows", "documents"])
def test_val_ce_and_agreement_by_hand(data, whole):
    """val_ce is one F.cross_entropy over all that counts, without other losses; agreement a loop over its tokens."""
    run = new_run(data, context_length=96, batch_size=3, n_layers=2, z_weight=9.0, balance_weight=9.0)
    batches = train.validation_batches(with_documents(data) if whole else run.data, 96, 3)
    first, again = (train.evaluate(run.model, batches, run.device, run.autocast) for _ in range(2))
    assert first == again, f"two evaluations differ: {first}, {again}"

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
    assert first[0] == pytest.approx(by_hand, rel=1e-5), f"val_ce {first[0]}, by hand {by_hand}"
    assert first[1] == pytest.approx(agree / counted, abs=1e-5), f"agreement {first[1]}, by loop {agree / counted}"
    assert 0 < agree < counted, f"{agree} of {counted} agree: this test shows nothing"


def test_every_validation_document_is_evaluated_whole(data):
    """Each document once, behind an end-of-text token, its own end-of-text counted: in sum every token of the split."""
    tokens = with_documents(data)
    rows = []
    for inputs, targets in train.validation_batches(tokens, 96, 3):
        for x, y in zip(inputs, targets):
            row = y[y >= 0].tolist()
            assert (y[: len(row)] >= 0).all(), "padding stands behind the document"
            assert x[0] == tokens.eot and x[1 : len(row)].tolist() == row[:-1], "shown: end-of-text, then the document"
            rows.append(row)
    everything = torch.cat([shard.long() for shard in tokens.val]).tolist()
    expected = [everything[first:end] for _, first, end in tokens.meta["val_documents"]]
    assert sorted(rows) == sorted(expected) and len(expected) == 40, f"{len(rows)} rows, {len(expected)} documents"
    assert sum(map(len, rows)) == len(everything) and all(row[-1] == tokens.eot for row in rows)


def test_windows_of_evaluation_are_spread_over_the_split(data):
    """Without known documents: full windows, the first and the last possible among them, at most 128."""
    tokens = load_data(data)
    whole = tokens.val[0].long()
    for T in (8, 32):
        rows = [torch.cat((x[:1], y)) for batch in train.validation_batches(tokens, T, 3) for x, y in zip(*batch)]
        assert len(rows) == min(128, (len(whole) - 1) // T), f"{len(rows)} windows of {T}"
        assert torch.equal(rows[0], whole[: T + 1]) and torch.equal(rows[-1], whole[-T - 1 :]), "first and last"


# ---- The log -------------------------------------------------------------------------------------

DOCUMENTED = ("step tokens ce val_ce balance z erc epsilon violated coupling agreement max_load dead lr grad_norm"
              " tokens_per_s").split()


def test_the_log_has_step_1_every_interval_every_evaluation_and_the_last(data):
    """11 steps, logged every 4, evaluated every 3: lines 1 3 4 6 8 9 11, each cell filled where it has a value."""
    result = train.train(*settings(data, steps=11, log_every=4, eval_every=3))
    assert Path("out", "log.csv").read_text().splitlines()[0] == ",".join(DOCUMENTED)
    rows = log()
    assert [int(row["step"]) for row in rows] == [1, 3, 4, 6, 8, 9, 11], [row["step"] for row in rows]
    for row in rows:
        empty = {name for name in DOCUMENTED if row[name] == ""}
        evaluated = int(row["step"]) in (3, 6, 9, 11)
        assert empty == (set() if evaluated else {"val_ce", "agreement"}), f"step {row['step']}: empty {empty}"
        assert all(math.isfinite(float(row[name])) for name in DOCUMENTED if row[name]), row
        assert int(row["tokens"]) == int(row["step"]) * 64, row
    last = {name: float(value) for name, value in rows[-1].items()}
    assert {**last, "signal": 0} == result, f"train() returns {result}, the last line is {last}"


def test_coupling_columns_of_step_1_are_those_of_the_initial_weights(data):
    """epsilon, violated and coupling against loops in float64 over the clean R and W_g, before the first update."""
    train.train(*settings(data, erc_alpha=0.7, n_layers=3, lr=0.5))
    violated, coupling, epsilon = [], [], []
    for moe in new_run(data, n_layers=3).model.moe_layers():
        R, W_g = moe.R.detach().double(), moe.W_g.detach().double()
        M = [[(R[i] @ W_g[j]).norm().item() for j in range(4)] for i in range(4)]
        pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
        violated.append(sum((M[i][j] > 0.7 * M[i][i]) + (M[j][i] > 0.7 * M[i][i]) for i, j in pairs) / 24)
        coupling.append(sum(M[i][i] for i in range(4)) / 4 / (sum(M[i][j] for i, j in pairs) / 12))
        epsilon += [min((R[i] - R[j]).norm() for j in range(4) if j != i).item() / 2 / R[i].norm().item()
                    for i in range(4)]
        assert noise_bound(moe.R).mean().item() == pytest.approx(sum(epsilon[-4:]) / 4, rel=1e-5)
    row = log()[0]
    for name, values in dict(violated=violated, coupling=coupling, epsilon=epsilon).items():
        expected = sum(values) / len(values)
        assert float(row[name]) == pytest.approx(expected, rel=1e-5), f"{name} {row[name]}, by loops {expected}"


def test_after_a_crash_each_line_is_once_in_the_log(data):
    """Stopped by an exception in step 8, a line half written: resumed, the log equals that of a run never stopped."""
    same_for_both = dict(steps=11, save_every=5, eval_every=4, log_every=2)
    train.train(*settings(data, out="straight", **same_for_both), extra_loss=nothing)
    calls = []

    def crash(model):
        calls.append(1)
        return nothing(model) if len(calls) < 8 else 1 / 0

    with pytest.raises(ZeroDivisionError):
        train.train(*settings(data, **same_for_both), extra_loss=crash)
    assert [row["step"] for row in log()] == ["1", "2", "4", "6"] and checkpoint()["step"] == 5
    with open("out/log.csv", "a", encoding="utf-8") as file:
        file.write("1")  # of step 10, which must not pass for step 1
    train.train(*settings(data, **same_for_both), extra_loss=nothing, resume=checkpoint())
    assert timeless(log()) == timeless(log("straight")), f"{log()}\nis not\n{log('straight')}"
    assert same(checkpoint()["model"], checkpoint("straight")["model"]), "resumed weights differ from uninterrupted"


# ---- Optimizer -----------------------------------------------------------------------------------


def test_decay_reaches_every_matrix_and_no_norm(data):
    """The two groups hold each parameter once; R, the experts and the embeddings decay, the norms do not."""
    run = new_run(data, weight_decay=0.3)
    decay = {id(p): group["weight_decay"] for group in run.optimizer.param_groups for p in group["params"]}
    assert len(decay) == sum(len(group["params"]) for group in run.optimizer.param_groups), "a parameter twice"
    assert decay.keys() == {id(p) for p in run.model.parameters()}, "not all parameters, or others"
    for name, p in run.model.named_parameters():
        assert decay[id(p)] == (0 if "norm" in name else 0.3), f"{name} decays by {decay[id(p)]}"
    kinds = {re.sub(r".*\.", "", name) for name, p in run.model.named_parameters() if decay[id(p)]}
    assert kinds == {"R", "W_g", "W_p", "W_o", "weight"}, kinds


def test_learning_rate_at_the_points_that_matter():
    """Linear to the peak at `warmup`, the cosine's middle at 51 %, a fiftieth at the last step; warm-up may be 0."""
    config = TrainConfig(steps=110, warmup=10, lr=2.0)
    for step, expected in ((1, 0.2), (5, 1.0), (10, 2.0), (60, 1.02), (110, 0.04)):
        assert train.learning_rate(config, step) == pytest.approx(expected), f"step {step}: not {expected}"
    rates = [train.learning_rate(config, step) for step in range(10, 111)]
    assert rates == sorted(rates, reverse=True), "after the peak it only falls"
    assert train.learning_rate(TrainConfig(steps=7, warmup=0, lr=2.0), 7) == pytest.approx(0.04)
    assert train.learning_rate(TrainConfig(steps=7, warmup=7, lr=2.0), 7) == 2.0
    assert train.learning_rate(TrainConfig(steps=7, warmup=70, lr=2.0), 7) == pytest.approx(0.2)


def test_the_logged_rate_is_the_one_the_update_used(data):
    """lr in the log is the schedule's, and the first update moves no weight by more than it, decay aside."""
    train.train(*settings(data, lr=0.01, warmup=4, steps=1, weight_decay=0.0))
    assert float(log()[0]["lr"]) == pytest.approx(0.0025)
    moved = gap(checkpoint()["model"], new_run(data).model.state_dict())
    assert 0.0024 < moved < 0.0026, f"Adam's first update moves weights by the rate, 0.0025, not {moved:.4f}"


# ---- What is not finite --------------------------------------------------------------------------


def finite(state):
    return all(torch.isfinite(p).all() for p in state["model"].values())


@pytest.mark.parametrize("rate", ["1e30", "1e300"])
def test_a_wild_learning_rate_stops_with_the_step_and_finite_checkpoints(data, rate):
    """--lr 1e30, saved after each step: exit 1 at step 2, what was saved is finite; 1e300, no float32: or refused."""
    with pytest.raises(UserError) as caught:
        train.main(flags(data, lr=rate, save_every=1, steps=10))
    if caught.value.code == 1:
        assert "not finite at step 2" in str(caught.value) and "--lr" in str(caught.value), caught.value
        files = sorted(Path("out").glob("*.pt"))
        assert files and all(finite(train.read_checkpoint(path)) for path in files), f"{files}: not all finite"


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "extra loss"])
def test_a_poisoned_step_is_kept_from_the_weights(data, value, where):
    """Not finite at step 5: the run stops there, with the weights of step 4, and a last checkpoint from before."""
    before = []

    def look(model):
        before.append({name: p.clone() for name, p in model.state_dict().items()})
        return nothing(model) + (value * model.norm.weight.sum() if where == "extra loss" and len(before) == 5 else 0)

    config, moe, model = watched(data, steps=9, save_every=3, spoil=(5,) if where == "loss" else ())
    with pytest.raises(UserError, match="not finite at step 5") as caught:
        train.train(config, moe, model=model, extra_loss=look)
    assert caught.value.code == 1 and len(before) == 5, f"code {caught.value.code}, {len(before)} steps"
    assert same(before[4], model.state_dict()), "the weights after step 4 were changed"
    assert checkpoint()["step"] == 3 and finite(checkpoint())


@pytest.mark.parametrize("where", ["loss", "extra loss"])
def test_under_a_float16_scaler_a_skipped_step_is_normal_and_20_in_a_row_stop(data, where):
    """One bad step: nothing moves in it, then training goes on. 20 from step 3 on: an error that names step 3."""
    def attempt(bad, out):
        seen = []

        def look(model):
            seen.append({name: p.clone() for name, p in model.state_dict().items()})
            poison = where == "extra loss" and len(seen) in bad
            return nothing(model) + (math.nan * model.norm.weight.sum() if poison else 0)

        config, moe, model = watched(data, steps=30, dtype="fp16", out=out, save_every=1,
                                     spoil=bad if where == "loss" else ())
        try:
            train.train(config, moe, model=model, extra_loss=look)
        finally:
            assert finite(checkpoint(out)), f"{out}: the checkpoint of step {checkpoint(out)['step']} is not finite"
        return seen

    seen = attempt({3}, "one")
    assert same(seen[2], seen[3]) and not same(seen[3], seen[4]), "step 3 is skipped, step 4 is not"
    assert checkpoint("one")["step"] == 30
    attempt(set(range(3, 22)), "nineteen")
    with pytest.raises(UserError, match="not finite at step 3"):
        attempt(set(range(3, 31)), "twenty")
    assert checkpoint("twenty")["step"] < 22, f"went on to step {checkpoint('twenty')['step']}"


# ---- train() as a function -----------------------------------------------------------------------


def test_an_extra_loss_and_a_model_of_ones_own(data):
    """A loss that pulls the final norm's weights to 3 does so, once per step; the own model is what is saved."""
    config, moe, model = watched(data, steps=60, lr=0.1, weight_decay=0.0, accumulate=2, erc_weight=0.0)
    calls = []

    def pull(given):
        calls.append(given is model)
        return 100 * (given.norm.weight - 3).square().mean()

    train.train(config, moe, model=model, extra_loss=pull)
    assert calls == [True] * 60, f"{len(calls)} calls in 60 steps"
    weight = model.norm.weight.mean().item()
    assert abs(weight - 3) < 0.5, f"the extra loss wants 3, the weight is {weight:.2f}"
    assert same(checkpoint()["model"], {name: p.detach() for name, p in model.state_dict().items()})


def test_config_json_says_what_ran(data):
    """Every setting by its name, and the vocabulary that came from the data, rounded up to a multiple of 64."""
    config, moe = settings(data, steps=1, seed=5, rope_theta=500.0)
    train.train(config, moe)
    expected = {**asdict(moe), **asdict(config), "vocab_size": 320}
    assert json.loads(Path("out/config.json").read_text()) == expected == checkpoint()["config"]


@pytest.mark.parametrize("changes, words", [
    (dict(compile=True), "--compile needs --dtype bf16"),
    (dict(device="tpu"), "no device 'tpu'"),
    (dict(device="cuda:99"), "no device 'cuda:99'"),
    (dict(device="meta"), "meta"),
    (dict(device=""), "device"),
])
def test_what_cannot_run_here_is_wrong_usage(data, changes, words):
    """Exit 2 before a run folder exists: compiling float32, and devices that are not there."""
    with pytest.raises(UserError, match=words) as caught:
        train.train(*settings(data, **changes))
    assert caught.value.code == 2 and not Path("out").exists(), f"code {caught.value.code}"


def test_compiling_for_a_gpu_that_only_emulates_bfloat16_is_wrong_usage(data, monkeypatch):
    """There the compiler gives up; where bfloat16 is native, the same settings make a run."""
    monkeypatch.setattr(train, "pick_device", lambda name: PretendGPU("cpu"))
    for native in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        if native:
            assert new_run(data, compile=True, dtype="bf16").dtype == torch.bfloat16
        else:
            with pytest.raises(UserError, match="hardware that has it") as caught:
                new_run(data, compile=True, dtype="bf16")
            assert caught.value.code == 2, f"code {caught.value.code}"


@pytest.mark.parametrize("device, found, expected", [
    ("cuda", True, torch.bfloat16), ("cuda", False, torch.float16), ("mps", {}, torch.float32),
    ("cpu", {"avx512_bf16": True}, torch.bfloat16), ("cpu", {"amx_bf16": True}, torch.bfloat16),
    ("cpu", {"avx512_f": True, "avx512_bf16": False}, torch.float32), ("cpu", {}, torch.float32),
])
def test_the_type_of_the_products_is_the_fast_one_of_this_hardware(monkeypatch, device, found, expected):
    """auto: bfloat16 only where it is not emulated; a type that is asked for by name is taken everywhere."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or found)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    picked = [train.pick_dtype(name, torch.device(device)) for name in ("auto", "fp32", "bf16", "fp16")]
    assert picked == [expected, torch.float32, torch.bfloat16, torch.float16], picked


def test_compiled_or_not_checkpoints_have_the_same_names(data):
    """A compiled run saves the names of the plain model, without `_orig_mod`, and either takes up the other's."""
    plain, compiled = (new_run(data, dtype="bf16", compile=on) for on in (False, True))
    assert compiled.forward is not compiled.model, "this run is not compiled"
    names = [list(run.state()["model"]) for run in (plain, compiled)]
    assert names[0] == names[1] and not any("_orig_mod" in name for name in names[1]), names[1]
    plain.restore(compiled.state())
    compiled.restore(plain.state())


@pytest.mark.slow
def test_a_compiled_run_is_resumed_uncompiled_and_the_other_way_round(data):
    """Two steps compiled and one not, or two not and one compiled: the same val_ce but for the rounding of bf16."""
    results = []
    for first in (True, False):
        train.train(*settings(data, n_layers=1, steps=3, save_every=2, dtype="bf16", compile=first), overwrite=True)
        state = train.read_checkpoint(Path("out/ckpt.prev.pt"))
        assert state["step"] == 2, state["step"]
        results.append(train.train(*settings(data, n_layers=1, steps=3, dtype="bf16", compile=not first), resume=state))
    assert results[0]["val_ce"] == pytest.approx(results[1]["val_ce"], abs=0.02), results


@pytest.mark.parametrize("before, after", [("bf16", "fp16"), ("fp16", "bf16")])
def test_a_run_is_resumed_on_hardware_of_another_type(data, monkeypatch, before, after):
    """dtype auto is bfloat16 on one machine and float16, with a loss scaler, on another: a checkpoint serves both."""
    types = dict(bf16=torch.bfloat16, fp16=torch.float16)
    for name, steps in (before, 2), (after, 4):
        monkeypatch.setattr(train, "pick_dtype", lambda *_, found=types[name]: found)
        row = train.train(*settings(data, steps=steps), resume=checkpoint() if Path("out").exists() else None)
    assert row["step"] == 4 and bool(checkpoint()["scaler"]) == (after == "fp16"), f"{row}, {checkpoint()['scaler']}"
