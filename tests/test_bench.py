"""The benchmark at sizes that say nothing: it runs, its file has what the tables need, and it compares equal things."""

import json

import bench
import pytest
import torch


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(what `bench.py --quick --rounds 2` wrote, section by section; the folder it ran in)."""
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert bench.main(["--quick", "--rounds", "2"]) == 0
    (path,) = folder.glob("out/bench-quick/bench-*.json")
    return json.loads(path.read_text(encoding="utf-8")), folder


def test_every_section_has_its_facts_and_a_time_for_each_round(results):
    assert list(results[0]) == ["step", "erc", "scaling", "overhead", "memory"]
    for result in results[0].values():
        assert {"device", "torch", "date", "command", "seed"} <= set(result) and result["rounds"] == 2
        for times in result.get("seconds", {}).values():
            assert len(times) == 2 and min(times) > 0


def test_contenders_compute_the_same_function(results):
    ce = results[0]["step"]["ce"]
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    tolerance = 1e-2 if torch.cuda.is_available() else 1e-5
    ours = ce.pop(f"ours, {dtype}")
    assert ce[f"loop, {dtype}"] == pytest.approx(ours, abs=tolerance)  # after two updates, too: so gradients agree
    for kind in ("OLMoE eager", "OLMoE grouped_mm"):  # these have no z-loss: they learn a little differently
        if f"{kind}, {dtype}" in ce:
            assert ce[f"{kind}, {dtype}"][0] == pytest.approx(ours[0], abs=tolerance)


def test_the_tables_come_from_the_files(results, monkeypatch, capsys):
    monkeypatch.chdir(results[1])
    assert bench.main(["--quick", "--table"]) == 0
    printed = capsys.readouterr().out
    for part in ("## step", "| loop, ", "the loss itself", "rows per expert", "| checkpoint |", "--quick --rounds 2"):
        assert part in printed
