"""A GPU computes what a CPU computes, from the same weights, and no step waits for it.

    pytest -m gpu                        # on a machine with a CUDA device, about a minute
    pytest -m slow tests/test_gpu.py     # the rehearsal: the same functions on a CPU

The layer alone is compared with loops in test_model.py, and the loss in test_erc.py, on a CPU.
"""

import copy
import os
import signal

import pytest
import torch
from test_train import checkpoint, gradients, log, new_run, weights
from torch.utils._python_dispatch import TorchDispatchMode

import erc_moe
import train
from erc_moe import MoEConfig, MoETransformer


@pytest.fixture(params=[pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where the test runs: on the GPU, or in the rehearsal on the CPU."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """Each test has a folder of its own, and leaves no setting behind."""
    monkeypatch.chdir(tmp_path)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product of a process
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


def assert_close(ours, exact, tolerance):
    """Each tensor is that of the same name, up to a share of its norm."""
    assert ours.keys() == exact.keys(), ours.keys() ^ exact.keys()
    ours, exact = ({name: tensor.double().cpu() for name, tensor in tensors.items()} for tensors in (ours, exact))
    off = {name: ((ours[name] - exact[name]).norm() / exact[name].norm()).item() for name in exact}
    wrong = {name: f"{value:.1e}" for name, value in off.items() if not value < tolerance}
    assert not wrong, f"relative errors beyond {tolerance}: {wrong}"


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.15)])
def test_the_model_computes_what_it_computes_on_a_cpu(device, dtype, tolerance):
    """Logits, losses, gradients against float32 on the CPU; in bfloat16, tokens between two experts may change."""
    plain = MoETransformer(MoEConfig(320, 64, n_layers=2, n_heads=4, d_model=128, d_expert=96, n_experts=8, top_k=2,
                                     init_std=0.06))
    model, tokens, found = copy.deepcopy(plain).to(device), torch.randint(320, (4, 65)), []
    for its, on, kind in ((model, device.type, dtype), (plain, "cpu", torch.float32)):
        with torch.autocast(on, kind, enabled=kind != torch.float32):
            out = its(tokens[:, :-1].to(on), tokens[:, 1:].to(on))
            erc = sum(erc_moe.coupling_hinge(erc_moe.activation_norms(moe.R, moe.W_g)) for moe in its.moe_layers())
        (out.ce + 0.01 * out.balance + 0.001 * out.z + erc).backward()
        found.append(dict(gradients(its), logits=out.logits, ce=out.ce, balance=out.balance, z=out.z, erc=erc))
    assert_close(*found, tolerance)


def test_a_run_that_was_stopped_and_resumed_is_the_uninterrupted_one(data, device):
    """SIGTERM in step 3 of 4, then --resume: equal to the bit, with torch's deterministic algorithms."""
    torch.use_deterministic_algorithms(True)
    changes = dict(device=str(device), dtype="auto", out="stopped")
    train.train(new_run(data, **{**changes, "out": "whole"}))
    train.train(new_run(data, **changes, eval_every=2), watch=lambda *_: signal.raise_signal(signal.SIGTERM))
    state, whole = checkpoint("stopped"), checkpoint("whole")["model"]
    assert state["step"] == 3, f"stopped after step {state['step']}, not 3"
    train.train(new_run(data, state=state, **changes))
    resumed = checkpoint("stopped")["model"]
    different = [name for name in resumed if not torch.equal(whole[name], resumed[name])]
    assert not different, f"{len(different)} of {len(resumed)} tensors differ: {different[:3]}"


class NoValueIsRead(TorchDispatchMode):
    """Raises where Python reads a value in steps 3 and 4, but int64: places in the text, which are on the CPU."""

    def __init__(self, run):
        super().__init__()
        self.run = run

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.name().split("::")[1].split(".")[0]
        if self.run.step in (2, 3) and (name in ("equal", "nonzero", "bincount", "masked_select") or name in (
                "_local_scalar_dense", "is_nonzero") and args[0].dtype != torch.int64):
            raise RuntimeError(f"a step waits for the value of {name}")
        return operation(*args, **(kwargs or {}))


def test_no_step_waits_for_the_device(data):
    """From the batch to the update, nothing is read that a GPU has to compute first, between two lines of the log."""
    run = new_run(data, dtype="bf16", accumulate=2, steps=5, log_every=100)  # logs steps 1 and 5
    with NoValueIsRead(run):
        train.train(run)
        run.step = 2
        with pytest.raises(RuntimeError, match="waits"):
            run.model(torch.zeros(1, 4, dtype=torch.long)).balance.item()  # does: the check is not blind


def test_a_compiled_model_is_one_graph_with_the_same_loss(data, device, monkeypatch):
    """No graph break, no second compilation, also after an evaluation, the same ce, and names as without --compile."""
    if device.type == "cpu":  # where the real compiler would take most of a minute
        compiler = torch.compile
        monkeypatch.setattr(torch, "compile", lambda *args, **more: compiler(*args, backend="aot_eager", **more))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for out in ("compiled", "plain"):
        run = new_run(data, device=str(device), out=out, dtype="bf16", compile=out == "compiled", steps=3, eval_every=2)
        with run.autocast():
            run.forward(*run.batch(0, 0))  # here it is compiled
        with torch.compiler.set_stance("fail_on_recompile" if run.config.compile else "default"):
            train.train(run)  # with an evaluation after step 2, whose hooks must not be compiled in
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1, counters
    compiled, plain = ([float(row["ce"]) for row in log(out)] for out in ("compiled", "plain"))
    assert len(plain) == 3 and compiled == pytest.approx(plain, abs=5e-3), (compiled, plain)
    assert checkpoint("compiled")["model"].keys() == weights(run.model).keys()
