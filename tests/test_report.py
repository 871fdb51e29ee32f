"""Tables and figures say what the results say, and sentences say what the tables say. Nothing here trains."""

import random
import re
import struct
import sys
from pathlib import Path

import plot
import pytest
import report
from report import Results

from prepare_data import UserError

ROOT = Path(report.__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def result(suite, variant, seed, val_ce=None, cost=None, M=None):
    """What a run could leave, of random numbers; cost: strongest response less router."""
    draw, layers = random.Random(f"{suite} {variant} {seed}"), 2
    several = lambda count: [draw.uniform(0.5, 1.5) for _ in range(count)]
    val_ce, routed = val_ce or draw.uniform(0.25, 0.3), variant not in ("aoe", "dense")
    row = dict(epsilon=0.5, violated=0.1, coupling=1.1) if routed else {}
    premise = dict(router=val_ce, response=val_ce + (cost or draw.random()), random=2, best=0.1, router_best=0.5,
                   response_best=0.4)
    weights = dict(neurons=several(layers), smallest_alpha=several(layers), noisy=several(layers), M=[M or [[1.0]]] * 2,
                   cosine=several(layers), loss=[several(5), several(5)], norm_R=[several(2), several(2)],
                   norm_W=[several(2), several(2)])
    return dict(log=[dict(step=step, val_ce=val_ce, agreement=0.3, **row) for step in (20, 40)],
                weights=[weights] if routed else [], premise=dict(all=premise, hard=premise),
                copies=None if suite == "text" else dict(ce_copies=0.4, ce_other=val_ce - 0.1),
                centres=dict(own=several(layers), random=several(layers)) if routed else None)


def results(*jobs, **numbers):
    """Results of (suite, variant, number of seeds)."""
    return Results({(suite, variant, seed): result(suite, variant, seed, **numbers)
                    for suite, variant, count in jobs for seed in range(count)})


ALL = [(suite, variant, 2) for suite, its in report.SUITES.items() for variant in its.variants]


def cells(text):
    return [line[2:-2].split(" | ") for line in text.splitlines() if line[:2] == "| "]


# ---- Numbers ----


@pytest.mark.parametrize("p, df, t", [(0.975, 1, 12.7062), (0.975, 2, 4.30265), (0.975, 4, 2.77645),
                                      (0.975, 24, 2.06390), (0.8, 1, 1.37638), (0.8, 2, 1.06066), (0.8, 24, 0.85686)])
def test_quantiles_of_students_t_are_those_of_printed_tables(p, df, t):
    """To five digits."""
    assert report.student_t(p, df) == pytest.approx(t, rel=1e-5), report.student_t(p, df)


def test_an_interval_is_students_and_deltas_are_paired():
    """Of 1, 2, 3: mean 2, standard error 1 / sqrt(3), t(0.975, 2) = 4.303, t(0.8, 2) = 1.061. Only shared seeds."""
    assert report.delta([1.0, 2.0, 3.0], ".2f") == "+2.00 [-0.48, +4.48]"
    assert report.detectable([1.0, 2.0, 3.0], ".2f") == "3.10"
    made = results(("n16", "plain", 3), ("n16", "dense", 2), ("n16", "plain-z", 1), ("n16", "erc-1-z", 1))
    ce = {(variant, seed): its["log"][-1]["val_ce"] for (_, variant, seed), its in made.items()}
    for variant, plain, seeds in (("dense", "plain", (0, 1)), ("erc-1-z", "plain-z", (0,)), ("plain", "plain", ())):
        expected = [ce[variant, seed] - ce[plain, seed] for seed in seeds]
        assert made.paired("n16", variant, report.last("val_ce")) == expected, variant


# ---- Tables ----


def test_tables_go_below_their_marks_and_nowhere_else():
    """An old table below a mark is replaced, with its caption; a mark without one gets one; the rest stays."""
    some = results(("n16", "plain", 2))
    for below in ("| old |\n|---|\n", "(old)\n", "(old)\n(old)\n\n| old |\n|---|\n", ""):
        old = f"before\n\n<!-- table: quality -->\n{below}\nafter | a |\n\nend\n"
        new = report.filled(old, some)
        assert new.startswith("before\n\n<!-- table: quality -->\n(`n16`: ") and "\n\n|  | seeds | judged |" in new, new
        assert new.endswith("|\n\nafter | a |\n\nend\n") and "old" not in new, new
        assert report.filled(new, some) == new, "filled twice is not filled once"
        assert "(not run yet)\n\nafter" in report.filled(old, Results({})), "without results a line says so"


def test_every_table_can_be_made_of_some_results():
    """Whatever has run so far: no table is an error, and none has a row without a number."""
    for jobs in (ALL, [("n16", "plain", 1)], [("n64", "dense", 1)]):
        for name, make in report.TABLES.items():
            rows = cells(make(results(*jobs)))
            assert rows and all(re.search(r"\d", " ".join(row[1:])) for row in rows[1:]), f"{name}: {rows}"


def test_premise_and_quality_stand_in_their_columns():
    """Two seeds whose numbers are known: costs, and their deltas; quality without copies, and with them."""
    made = Results({("n64", variant, seed): result("n64", variant, seed, val_ce, cost) for variant, seed, val_ce, cost in (
        ("plain", 0, 0.3, 0.2), ("plain", 1, 0.32, 0.3), ("erc-0.5", 0, 0.31, 0.02), ("erc-0.5", 1, 0.35, 0.06))})
    heading, plain, half = cells(report.TABLES["premise"](made))
    row = dict(zip(heading, half))
    assert row[""] == "`n64`: ERC, alpha 0.5" and row["router's choice"] == "0.330 / 0.330", row
    assert row["strongest response"] == "0.370 / 0.370" and row["response picks best"] == "40% / 40%", row
    assert row["response less router [95% CI]"] == "+0.040 [-0.214, +0.294]", "t is 12.706, the standard error 0.02"
    assert row["its delta to plain [95% CI]"].startswith("-0.210 [") and row["detectable"] == "0.422", row
    assert dict(zip(heading, plain))["its delta to plain [95% CI]"] == "", plain
    heading, _, half = cells(report.TABLES["quality"](made))
    row = dict(zip(heading, half))
    assert row["judged"].startswith("0.2300 ±") and row["val_ce"].startswith("0.3300 ±"), row
    assert row["delta to plain [95% CI]"].startswith("+0.0200 ["), row


@pytest.mark.parametrize("dense, chance, verdict", [
    ((0.01, 0.011), (0.02, 0.021), False), ((0.01, 0.011), (0.01, 0.03), True), ((-0.01, -0.011), (0.02, 0.021), True),
    ((0.01, 0.011), (0.02,), True)])
def test_where_routing_has_nothing_to_gain_the_caption_says_so(dense, chance, verdict):
    """Two seeds' leads over dense and a random router: clear ones, one with a wide interval, a lag, a missing seed."""
    made = {("n16", "plain", seed): result("n16", "plain", seed, 0.3) for seed in (0, 1)}
    for variant, leads in (("dense", dense), ("random", chance)):
        made |= {("n16", variant, seed): result("n16", variant, seed, 0.3 + lead) for seed, lead in enumerate(leads)}
    caption = report.basis(Results(made), "n16")
    assert ("No basis for a sentence about quality" in caption) == verdict, caption


def test_a_scan_compares_the_same_seeds():
    """Three of its suites have run, one with fewer seeds: all have as many rows as counted, with means of seed 0."""
    made = results(*((suite, variant, 1 if suite == "n16-9" else 3) for suite in ("n16-slow", "n16", "n16-9")
                     for variant in ("plain", "erc-0.5")))
    rows = cells(report.TABLES["scan"](made))[1:]
    assert [row[:2] for row in rows] == [["0.18", "1"], ["3.7", "1"], ["9", "1"]], rows
    first = made["n16", "plain", 0]["log"][-1]["val_ce"]
    assert rows[1][2].startswith(f"{first:.4f} / "), f"{first}: {rows[1]}"


def test_intervals_are_counted_once():
    """Five seeds of deltas: the shared rows of quality and ablations count once; those that exclude 0 by their signs."""
    values = {"plain": [0.3] * 3, "erc-1": [0.31, 0.311, 0.312], "erc-0.5": [0.29, 0.30, 0.312]}
    made = Results({("n16", variant, seed): result("n16", variant, seed, ce, 0.1 + seed / 100)
                    for variant, its in values.items() for seed, ce in enumerate(its)})
    counts = {row[0]: row[1:] for row in cells(report.TABLES["intervals"](made))}
    assert counts["quality: delta to plain"] == ["2", "1", "0.1"], counts
    assert not any(name.startswith("ablations") for name in counts), counts


# ---- Sentences ----

PAPER = {"0.2%"}  # with 64 experts, of the training time


def test_every_number_in_the_findings_stands_in_a_table():
    """Each decimal and percentage in the results' sentences is in a cell of a table of theirs, whatever its sign."""
    text = report.TEXTS[1].read_text(encoding="utf-8")
    if "(not run yet)" in text:
        pytest.skip("the tables are empty")
    number = r"(?<![\w.])\d+(?:\.\d+%?|%)"
    tables = [line for line in text.splitlines() if line[:1] in "|("]
    words = " ".join(line for line in text.splitlines() if line not in tables)
    said = set(re.findall(number, re.sub(r"alpha \d\.\d|`.*?`|\(.*?\)", "", words))) - PAPER
    missing = said - set(re.findall(number, "\n".join(tables)))
    assert len(said) > 10 and not missing, f"{len(said)} numbers; in no table: {sorted(missing)}"


# ---- Figures ----


def test_all_figures_are_drawn_and_fit_a_readme(tmp_path):
    """One PNG each, as wide as a README and below 200 kB; of nothing, only the worked example is drawn."""
    pytest.importorskip("matplotlib")
    for made, names in ((results(*ALL, M=[[1.0, 0.5], [0.5, 1.0]]), set(report.FIGURES)), (Results({}), {"steps"})):
        report.draw(made, tmp_path)
        found = {path.stem: path.read_bytes() for path in tmp_path.iterdir()}
        assert set(found) == names, f"drawn: {sorted(found)}"
        for name, blob in found.items():
            width = struct.unpack(">I", blob[16:20])[0]
            assert blob[:4] == b"\x89PNG" and 700 <= width <= 1000 and 5_000 < len(blob) < 200_000, f"{name}: {width}"
            Path(tmp_path, f"{name}.png").unlink()


def test_the_picture_of_M_marks_broken_constraints_of_rows_and_of_columns():
    """Entries (1, 0) and (1, 2) exceed the diagonal entry of their column, (2, 1) that of its row."""
    figure = pytest.importorskip("matplotlib.figure").Figure()
    M = [[1.0, 0.5, 0.5], [100.0, 200.0, 100.0], [0.5, 1.5, 1.0]]
    report.coupling(figure, results(("n16", "plain", 1), M=M))
    rows, columns = figure.axes[0].lines
    assert sorted(zip(*rows.get_data())) == [(1, 2)], rows.get_data()
    assert sorted(zip(*columns.get_data())) == [(0, 1), (2, 1)], columns.get_data()
    assert "1 of\n6 constraints of rows, 2 of 6 of columns" in figure.axes[0].get_title(), figure.axes[0].get_title()


def test_the_picture_of_the_steps_shows_the_readmes_example():
    """R, W_g, M and the excess of the README's snippets, run as they stand, are those that are drawn."""
    names = {}
    for note, code in re.findall(r"(<!-- .* -->\n)?```python\n(.*?)```", README, re.DOTALL):
        if not note:
            exec(code, names)
    M, excess = report.example()
    for name, drawn in dict(R=report.R, W_g=report.W_g, M=M, excess=excess).items():
        assert (names[name] - drawn).abs().max() < 1e-6, f"{name}: README {names[name]}, drawn {drawn}"


def test_any_runs_are_drawn_side_by_side(tmp_path, monkeypatch):
    """Two logs make plot.png; without matplotlib, and without a log, it is one line."""
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        Path(name).mkdir()
        Path(name, "log.csv").write_text("step,ce,val_ce,violated,agreement\n1,5.0,,0.5,\n2,4.0,4.1,0.1,0.3\n",
                                         encoding="utf-8")
    with monkeypatch.context() as without, pytest.raises(UserError, match="pip install matplotlib"):
        without.setitem(sys.modules, "matplotlib", None)
        plot.main(["one", "two"])
    with pytest.raises(UserError, match="name the folders"):
        plot.main([])
    pytest.importorskip("matplotlib")
    plot.main(["one", "two"])
    assert Path("plot.png").read_bytes()[:4] == b"\x89PNG"
