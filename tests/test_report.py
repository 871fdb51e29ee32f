"""Tables and figures say what the results say, and sentences say what the tables say. Nothing here trains."""

import re
import sys
from pathlib import Path

import plot
import pytest
import report
from report import Results

from prepare_data import UserError

README, FINDINGS = (path.read_text(encoding="utf-8") for path in report.TEXTS)


def result(suite, variant, ce, cost=0.1, M=None):
    """What a run could leave; cost: of response."""
    routed = variant not in ("aoe", "dense")
    log = dict(step=20, val_ce=ce, agreement=0.3, violated=0.1, **dict(epsilon=0.5, coupling=1.1) if routed else {})
    premise = dict(router=ce, response=ce + cost, random=2, best=0.1, router_best=0.5, response_best=0.4)
    weights = dict.fromkeys(("neurons", "smallest_alpha", "noisy", "cosine"), [1.0, 2.0]) | dict(
        norm_R=[[1.0, 0.1]] * 2, norm_W=[[1.0, 0.1]] * 2, loss=[[0.5] * 5] * 2, M=[M or [[1.0]]])
    return dict(log=[log, log | dict(step=40)], weights=[weights] if routed else [],
                premise=dict(all=premise, hard=premise) if variant != "dense" else None,
                copies=dict(ce_copies=0.4, ce_other=ce - 0.1) if suite != "text" else None,
                centres=dict(own=[0.5, 0.6], random=[0, 0.1]) if routed else None)


def results(*rows):
    """Of (suite, variant, cross-entropies of its seeds, cost and M if they matter)."""
    return Results({(suite, variant, seed): result(suite, variant, ce, *more) for suite, variant, ces, *more in rows
                    for seed, ce in enumerate(ces)})


def cells(name, *rows):
    """A table's rows, as {heading: cell}."""
    heading, *below = [line[2:-2].split(" | ") for line in report.TABLES[name](results(*rows)).splitlines()
                       if line[:2] == "| "]
    return [dict(zip(heading, row)) for row in below]


EVERY = [(suite, variant, (0.3, 0.32)) for suite, its in report.SUITES.items() for variant in its.variants]


def test_an_interval_is_students_and_deltas_are_paired():
    """Quantiles of printed tables; of 1, 2, 3 the mean is 2, its standard error 1 / sqrt(3). Only shared seeds."""
    for p, df, t in ((0.975, 1, 12.7062), (0.975, 2, 4.30265), (0.975, 24, 2.06390), (0.8, 2, 1.06066)):
        assert report.student_t(p, df) == pytest.approx(t, rel=1e-5), f"{p} {df}: {report.student_t(p, df)}, not {t}"
    assert report.delta([1.0, 2.0, 3.0], ".2f") == "+2.00 [-0.48, +4.48]"
    assert report.detectable([1.0, 2.0, 3.0], ".2f") == "3.10" and report.delta([1.0], ".2f") == "+1.00"
    made = results(("n16", "plain", (1, 2, 4)), ("n16", "dense", (3, 7)), ("n16", "plain-z", [5]),
                   ("n16", "erc-1-z", [9]))
    for variant, deltas in (("dense", [2, 5]), ("erc-1-z", [4]), ("plain", [])):
        assert made.paired("n16", variant, report.last("val_ce")) == deltas, variant


def test_tables_go_below_their_marks_and_nowhere_else():
    """An old table below a mark is replaced, with its caption; a mark without one gets one; the rest stays."""
    some = results(("n16", "plain", (0.3, 0.32)))
    for below in ("| old |\n|---|\n", "(old)\n", "(old)\n(old)\n\n| old |\n|---|\n", ""):
        old = f"before\n\n<!-- table: quality -->\n{below}\nafter | a |\n\nend\n"
        new = report.filled(old, some)
        assert new.startswith("before\n\n<!-- table: quality -->\n(`n16`: ") and "\n\n|  | seeds | judged |" in new, new
        assert new.endswith("|\n\nafter | a |\n\nend\n") and "old" not in new, new
        assert report.filled(new, some) == new, "filled twice is not filled once"
        assert "(not run yet)\n\nafter" in report.filled(old, Results({})), "without results a line says so"


@pytest.mark.parametrize("name", report.TABLES)
def test_every_table_can_be_made_of_some_results(name):
    """Whatever has run so far: no table is an error, and each row has a number."""
    for row in cells(name, *EVERY) + cells(name, ("n16", "plain", [0.3])) + cells(name, ("n64", "dense", [0.3])):
        assert re.search(r"\d", " ".join([*row.values()][1:])), row


def test_premise_and_quality_stand_in_their_columns():
    """Two seeds whose numbers are known: costs, and their deltas; quality without copies, and with them."""
    rows = ("n64", "plain", (0.3, 0.32), 0.25), ("n64", "erc-0.5", (0.31, 0.35), 0.05)
    half = cells("premise", *rows)[1]
    assert half[""] == "`n64`: ERC, alpha 0.5" and half["router's choice"] == "0.330 / 0.330", half
    assert half["strongest response"] == "0.380 / 0.380" and half["response picks best"] == "40% / 40%", half
    assert half["closed"] == "97%", f"(2 - .36) / (2 - .31) and (2 - .40) / (2 - .35): {half}"
    assert half["response less random [95% CI]"] == "-1.620 [-1.874, -1.366]", f"t 12.706, standard error .02: {half}"
    assert half["its delta to plain [95% CI]"].startswith("-0.200 ["), half
    half = cells("quality", *rows)[1]
    assert half["judged"].startswith("0.2300 ±") and half["val_ce"].startswith("0.3300 ±"), half
    assert half["delta to plain [95% CI]"] == "+0.0200 [-0.1071, +0.1471]" and half["detectable"] == "0.1408", half


def test_where_routing_has_nothing_to_gain_the_caption_says_so():
    """Leads over dense and a random router: both clear; one with a wide interval; a lag; a missing seed."""
    for dense, chance, clear in (((0.31, 0.311), (0.32, 0.321), True), ((0.31, 0.311), (0.31, 0.33), False),
                                 ((0.29, 0.291), (0.32, 0.321), False), ((0.31, 0.311), (0.32,), False)):
        found = results(("n16", "plain", (0.3, 0.3)), ("n16", "dense", dense), ("n16", "random", chance))
        caption = report.basis(found, "n16")
        assert ("No basis for a sentence about quality" in caption) != clear, f"{dense} {chance}: {caption}"


def test_a_scan_compares_the_same_seeds():
    """Three suites have run, one with seed 0 alone: all rows are of seed 0."""
    rows = cells("scan", *((suite, variant, (0.5,) if suite == "n16-9" else (0.5, 0.7, 0.9))
                           for suite in ("n16-slow", "n16", "n16-9") for variant in ("plain", "erc-0.5")))
    assert [(row[""], row["seeds"], row["val_ce"]) for row in rows] == [
        (timescale, "1", "0.5000 / 0.5000") for timescale in ("0.18", "3.7", "9")], rows


def test_intervals_are_counted_once():
    """Two deltas of quality, of which one excludes 0; the same ones stand among the ablations."""
    rows = cells("intervals", *(("n16", variant, ce) for variant, ce in (
        ("plain", (0.3, 0.3)), ("erc-1", (0.31, 0.311)), ("erc-0.5", (0.28, 0.31)))))
    assert [" ".join(row.values()) for row in rows[-3:]] == ["quality 2 1 0.1", "... of ERC alone 2 1 0.1",
                                                             "ablations 0 0 0.0"], rows


def test_every_number_in_the_findings_stands_in_a_table():
    """Each decimal and percentage in the results' sentences is in a table of its section, whatever its sign."""
    if "(not run yet)" in FINDINGS:
        pytest.skip("the tables are empty; run: python experiments/report.py --write")
    number = r"(?<![\w.])\d+(?:\.\d+%?|%)"
    for section in FINDINGS.split("\n## ")[1:]:
        words = re.sub(r"^[|(].*$|alpha [\d.]+|`.*?`", "", section, flags=re.MULTILINE)
        cells = re.findall(number, " ".join(re.findall(r"^[|(].*$", section, re.MULTILINE)))
        missing = set(re.findall(number, words)) - {*cells, "0.2%"}                    # the paper's cost of the loss
        assert not missing, f"{section.splitlines()[0]}: in no table: {sorted(missing)}"


def test_all_figures_are_drawn_and_fit_a_readme(tmp_path):
    """One PNG each, as wide as a README and below 200 kB; of nothing, only the worked example is drawn."""
    pytest.importorskip("matplotlib")
    for rows, names in (((), {"steps"}), (EVERY, set(report.FIGURES))):
        report.draw(results(*rows), tmp_path)
        pictures = {path.stem: path.read_bytes() for path in tmp_path.iterdir()}
        assert pictures.keys() == names, f"drawn: {[*pictures]}"
    for name, blob in pictures.items():
        width = int.from_bytes(blob[16:20], "big")
        assert blob[:4] == b"\x89PNG" and 700 <= width <= 1000 and 5_000 < len(blob) < 200_000, f"{name}: {width}"


def test_the_picture_of_M_marks_broken_constraints_of_rows_and_of_columns():
    """Entries (1, 0) and (1, 2) exceed the diagonal entry of their column, (2, 1) that of its row."""
    figure = pytest.importorskip("matplotlib.figure").Figure()
    report.coupling(figure, results(("n16", "plain", [0.3], 0.1, [[1, 0.5, 0.5], [100, 200, 100], [0.5, 1.5, 1]])))
    rows, columns = (sorted(zip(*line.get_data())) for line in figure.axes[0].lines)  # as (j, i)
    assert rows == [(1, 2)] and columns == [(0, 1), (2, 1)], f"rows {rows}, columns {columns}"


def test_the_picture_of_the_steps_shows_the_readmes_example():
    """R, W_g, M and the excess of the README's snippets, run as they stand, are those that are drawn."""
    names, snippets = {}, re.findall(r"(<!-- [^\n]* -->\n)?```python\n(.*?)```", README, re.DOTALL)
    exec("\n".join(code for note, code in snippets if not note), names)
    for name, drawn in zip(("R", "W_g", "M", "excess"), (report.R, report.W_g, *report.example())):
        assert (names[name] - drawn).abs().max() < 1e-6, f"{name}: README {names[name]}, drawn {drawn}"


def test_runs_are_drawn_side_by_side(tmp_path, monkeypatch):
    """Two logs make plot.png; without matplotlib it is one line."""
    monkeypatch.chdir(tmp_path)
    Path("log.csv").write_text("step,ce,val_ce,violated,agreement\n1,5.0,,0.5,\n2,4.0,4.1,0.1,0.3\n", encoding="utf-8")
    with monkeypatch.context() as without, pytest.raises(UserError, match="pip install matplotlib"):
        without.setitem(sys.modules, "matplotlib", None)
        plot.main([".", "."])
    pytest.importorskip("matplotlib")
    plot.main([".", "."])
    assert Path("plot.png").read_bytes()[:4] == b"\x89PNG"
