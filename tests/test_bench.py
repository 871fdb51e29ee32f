"""The benchmark at sizes that say nothing, and the command for a GPU in small: they run, and their files are whole."""

import json
import os
import subprocess
from pathlib import Path

import bench
import pytest
import torch

from erc_moe import MoEConfig

ROOT = Path(bench.__file__).parents[1]


@pytest.fixture(scope="module", params=[[], pytest.param(["--compile"], marks=pytest.mark.slow)])
def results(request, tmp_path_factory):
    """What `bench.py --quick --rounds 2` wrote, section by section; in the long half with compiled contenders, too."""
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert bench.main(["--quick", "--rounds", "2", *request.param]) == 0
    (path,) = folder.glob("out/bench-quick/bench-*.json")
    return json.loads(path.read_text(encoding="utf-8"))


def test_every_section_has_its_facts_and_a_time_for_each_round(results):
    """Machine, versions, date, command and seed stand in each section, and each contender has run in each round."""
    assert list(results) == ["step", "presets", "erc", "scaling"]
    for name, result in results.items():
        missing = {"device", "dtype", "threads", "torch", "transformers", "date", "command", "seed"} - set(result)
        assert not missing, f"{name} lacks {missing}"
        rounds = {contender: len(times) for contender, times in result["seconds"].items()}
        assert set(rounds.values()) == {2}, f"{name}: {rounds}"


def test_contenders_compute_the_same_function(results):
    """The cross-entropy of every step, so after updates, too, is ours in float32 up to the rounding of the type."""
    ce, left_out = results["step"]["ce"], results["step"]["left_out"]
    assert all("No module named 'transformers'" in why for why in left_out.values()), left_out
    for name in ce:
        if not name.startswith(("OLMoE", "dense")):  # which have weights of their own
            assert ce[name] == pytest.approx(ce["ours, float32"], abs=1e-5 if "float32" in name else 1e-2), ce


def test_the_layers_that_compete_have_the_same_output_and_gradients():
    """The loop and the first edition's layer against ours, in float32."""
    found = {}
    for kind, layer in bench.LAYERS.items():
        torch.manual_seed(0)
        moe, x = layer(MoEConfig(n_heads=2, d_model=16, d_expert=8, n_experts=6, top_k=3)), torch.randn(2, 20, 16)
        y, stats = moe(x.requires_grad_())
        (y.square().sum() + stats.balance + stats.z).backward()
        found[kind] = dict(y=y, x=x.grad, load=stats.load, **{name: p.grad for name, p in moe.named_parameters()})
    for kind, its in found.items():
        off = {name: ((its[name] - ours).double().norm() / ours.double().norm()).item()
               for name, ours in found["ours"].items()}
        assert max(off.values()) < 1e-5, f"{kind}: {off}"


def test_the_tables_come_from_the_files(results):
    """Every number that a result file has becomes a table, without measuring anything."""
    for name, parts in dict(step=["| loop, float32 |", "add up rows twice"], presets=["| openwebtext |"],
                            erc=["| 8 | 128 |"], scaling=["| 8 | 16 |", "first edition / ours"]).items():
        shown = bench.show(name, results[name])
        assert all(part in shown for part in [*parts, "bench.py --quick --rounds 2"]), shown


def test_a_section_begins_no_round_after_its_seconds(tmp_path, monkeypatch):
    """Two rounds there are always; a long section does not cost the next one its time."""
    monkeypatch.chdir(tmp_path)
    bench.main(["--quick", "--rounds", "50", "--seconds", "0", "--only", "scaling"])
    (path,) = Path("out/bench-quick").glob("*.json")
    rounds = {len(times) for times in json.loads(path.read_text(encoding="utf-8"))["scaling"]["seconds"].values()}
    assert rounds == {2}, f"{rounds} rounds"


@pytest.mark.slow
def test_the_command_for_a_gpu_is_rehearsed_on_a_cpu(tmp_path):
    """`bash experiments/gpu.sh --rehearse`: every part ends well, and leaves at most 8 small files."""
    command = ["bash", str(ROOT / "experiments" / "gpu.sh"), "--rehearse"]
    done = subprocess.run(command, cwd=tmp_path, env=dict(os.environ, OUT=str(tmp_path / "out")), capture_output=True,
                          text=True, timeout=300)
    parts = [line for line in done.stdout.splitlines() if line.startswith("====")]
    assert done.returncode == 0, "\n".join([*parts, done.stdout[-3000:], done.stderr[-1000:]])
    files = sorted(path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert len(files) <= 8 and all(len(path.parts) == 1 for path in files), files
    for part in ("tests", "bench", "compiled", "long", "text"):
        assert any(line.startswith(f"==== {part}: done") for line in parts), parts
    assert (tmp_path / "out" / "gpu.log").read_text(encoding="utf-8") == done.stdout, "the log is not what was printed"
