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


@pytest.fixture(scope="module", params=[[], pytest.param(["--compile"], marks=pytest.mark.slow)])
def results(request, tmp_path_factory):
    """What `bench.py --quick --rounds 2` wrote, section by section; in the long half with our model compiled, too."""
    folder, threads = tmp_path_factory.mktemp("bench"), torch.get_num_threads()
    torch.set_num_threads(1)
    assert bench.main(["--quick", "--rounds", "2", "--out", str(folder), *request.param]) == 0
    torch.set_num_threads(threads)
    (path,) = folder.glob("bench-*.json")
    return json.loads(path.read_text(encoding="utf-8"))


def test_every_section_has_its_facts_and_a_time_for_each_round(results):
    """Machine, versions, date, command and seed stand in each section, and each contender has run in each round."""
    assert list(results) == ["step", "erc"]
    for name, result in results.items():
        missing = {"device", "dtype", "threads", "torch", "transformers", "date", "command", "seed"} - set(result)
        assert not missing, f"{name} lacks {missing}"
        rounds = {contender: len(times) for contender, times in result["seconds"].items()}
        assert set(rounds.values()) == {2}, f"{name}: {rounds}"


def test_contenders_compute_the_same_function(results):
    """The cross-entropy of all ways to run our model is ours up to the rounding of bfloat16."""
    ce, left_out = results["step"]["ce"], results["step"]["left_out"]
    assert all("No module named 'transformers'" in why for why in left_out.values()), left_out
    same = {name: value for name, value in ce.items() if name.startswith(("ours", "loop"))}
    assert len(same) > 1 and same == pytest.approx(dict.fromkeys(same, ce["ours, bfloat16"]), abs=1e-2), ce


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


def test_the_tables_come_from_the_files(results):
    """Every number that a result file has becomes a table, without measuring anything."""
    for name, part in dict(step="| loop, bfloat16 |", erc="| 8 | 128 |").items():
        shown = bench.show(name, results[name])
        assert part in shown and "bench.py --quick --rounds 2" in shown, shown


def test_it_ends_in_time_and_holds_three_models_at_most(elsewhere, monkeypatch):
    """No round begins after --seconds, but two there are always. A GPU needs memory for three models, and for one while
    the price of the loss is measured.
    """
    alive, interleave = [], bench.Setup.interleave
    monkeypatch.setattr(bench.Setup, "interleave", lambda *given: alive.append(
        sum(issubclass(type(held), bench.Ours) for held in gc.get_objects())) or interleave(*given))
    bench.main(["--quick", "--rounds", "50", "--seconds", "0"])
    (path,) = Path("out/bench-quick").glob("*.json")
    rounds = {len(times) for section in json.loads(path.read_text(encoding="utf-8")).values()
              for times in section["seconds"].values()}
    assert rounds == {2}, f"{rounds} rounds"
    assert alive[0] <= 3 and set(alive[1:]) == {1}, f"models alive, comparison by comparison: {alive}"


@pytest.mark.slow
def test_the_command_for_a_gpu_is_rehearsed_on_a_cpu(tmp_path):
    """`bash experiments/gpu.sh --rehearse`: every part ends well, and leaves a log and one file of the benchmark."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # its python3 is the one that runs this test
    done = subprocess.run(["bash", ROOT / "experiments" / "gpu.sh", "--rehearse"], cwd=tmp_path, capture_output=True,
                          text=True, timeout=300, env=dict(os.environ, PATH=path, OUT=str(tmp_path / "out")))
    parts = [line for line in done.stdout.splitlines() if line.startswith("====")]
    assert done.returncode == 0, "\n".join([*parts, done.stdout[-3000:], done.stderr[-1000:]])
    for part in ("tests", "step", "erc", "train"):
        assert any(line.startswith(f"==== {part}: done") for line in parts), parts
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert len(files) == 3 and "gpu.log" in files and "train.csv" in files, files
    assert (tmp_path / "out" / "gpu.log").read_text(encoding="utf-8") == done.stdout, "the log is not what was printed"
