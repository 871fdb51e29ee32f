"""The benchmark at sizes that say nothing, and the command for a GPU in small: they run, and their files are whole."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import bench
import pytest
import torch

from erc_moe import MoE, MoEConfig

ROOT = Path(bench.__file__).parents[1]


def run(*argv):
    """What `bench.py --quick ARGV` wrote, section by section."""
    assert bench.main(["--quick", *argv]) == 0
    (path,) = Path("out/bench-quick").glob("bench-*.json")
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_result_has_its_facts_a_time_for_each_round_and_a_table(elsewhere):
    """Machine, versions, date, command and seed stand in each section, and each contender has run in each round."""
    results = run("--rounds", "3")
    for name, row in dict(step="| loop |", erc="| 8 | 128 |").items():
        missing = {"device", "dtype", "threads", "torch", "transformers", "date", "seed"} - set(results[name])
        assert not missing, f"{name} lacks {missing}"
        rounds = {contender: len(times) for contender, times in results[name]["seconds"].items()}
        assert set(rounds.values()) == {3}, f"{name}: {rounds}"
        shown = bench.show(name, results[name])
        assert row in shown and "`python experiments/bench.py --quick --rounds 3" in shown, shown


def test_the_loop_has_our_output_and_gradients():
    """The usual loop over experts against our layer, in float32."""
    found = []
    for layer in (MoE, bench.LoopMoE):
        torch.manual_seed(0)
        moe, x = layer(MoEConfig(n_heads=2, d_model=16, d_expert=8, n_experts=6, top_k=3)), torch.randn(2, 20, 16)
        y, stats = moe(x.requires_grad_())
        (y.square().sum() + stats.balance + stats.z).backward()
        found.append(dict(y=y, x=x.grad, load=stats.load, **{name: p.grad for name, p in moe.named_parameters()}))
    off = {name: ((found[1][name] - ours).double().norm() / ours.double().norm()).item()
           for name, ours in found[0].items()}
    assert max(off.values()) < 1e-5, off


def test_it_ends_in_time_and_holds_three_models_at_most(elsewhere, monkeypatch):
    """No round begins after --seconds, but two there are always. A GPU needs memory for three models, and for one while
    the price of the loss is measured.
    """
    alive, interleave = [], bench.Setup.interleave
    monkeypatch.setattr(bench.Setup, "interleave", lambda *given: alive.append(
        sum(issubclass(type(held), bench.Ours) for held in gc.get_objects())) or interleave(*given))
    rounds = {len(times) for section in run("--rounds", "50", "--seconds", "0").values()
              for times in section["seconds"].values()}
    assert rounds == {2}, f"{rounds} rounds"
    assert alive[0] <= 3 and set(alive[1:]) == {1}, f"models alive, comparison by comparison: {alive}"


@pytest.mark.slow
def test_the_command_for_a_gpu_is_rehearsed_on_a_cpu(tmp_path):
    """`bash experiments/gpu.sh --rehearse`: every part ends well, and leaves a log and one file of the benchmark."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # its python3 is the one that runs this test
    done = subprocess.run(["bash", ROOT / "experiments" / "gpu.sh", "--rehearse"], cwd=tmp_path, capture_output=True,
                          text=True, timeout=300, env=dict(os.environ, PATH=path, OUT=str(tmp_path / "out")))
    parts = [line.split(" after")[0] for line in done.stdout.splitlines() if line.startswith("==== ")]
    wanted = [f"==== {part}: done" for part in ("tests", "step", "erc", "train")]
    assert done.returncode == 0 and parts == wanted, f"{parts}\n{done.stdout[-3000:]}\n{done.stderr[-1000:]}"
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert len(files) == 3 and "gpu.log" in files and "train.csv" in files, files
