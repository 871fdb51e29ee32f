"""The figures of the comparison: drawn from whatever results there are. Run: python -m pytest tests/test_figures.py"""

import builtins
import json
import random
import struct

import figures
import pytest
import report

from prepare_data import UserError

N, LAYERS, STEPS = 6, 2, (0, 20, 40)
ALL = {"plain": 2, "erc-0": 1, "erc-0.5": 1, "erc-1": 2, "erc-2": 1, "erc-3": 1, "aoe": 2, "dense": 1}
NAMES = {"coupling", "alphas", "quality", "kinds", "agreement", "cost"}


class Some(report.Results):
    """Results that never were in a file."""

    def __init__(self, seeds):
        self.update({("n16", variant, seed): made_up(variant, seed) for variant in seeds
                     for seed in range(seeds[variant])})


def made_up(variant, seed):
    """A result as reproduce.run gives it, of random numbers. What a variant cannot have is None or absent, as there."""
    draw, router = random.Random(f"{variant} {seed}"), variant not in ("aoe", "dense")
    several = lambda count: [draw.uniform(0.5, 1.5) for _ in range(count)]
    log = [dict(step=step, ce=1.0, epsilon=0.5 * router, violated=0.0, **(dict(erc=draw.random()) if router else {}))
           for step in STEPS[1:]]
    log[-1]["val_ce"] = draw.uniform(0.25, 0.3)
    watched = [dict(step=step, kinds=["program", "story"], agreement=several(LAYERS), information=several(LAYERS),
                    cosine=several(LAYERS) if router else [None] * LAYERS) for step in STEPS]
    watched[0]["agreement"][0] = watched[0]["agreement"][0] if router else None
    watched[-1]["counts"] = [[[draw.randint(0, 9) for _ in range(N)] for _ in range(2)] for _ in range(LAYERS)]
    if router and seed == 0:
        watched[-1]["M"] = [[several(N) for _ in range(N)] for _ in range(LAYERS)]
    return dict(suite="n16", variant=variant, seed=seed, floor=0.22, log=log, watched=watched)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of results, but for a benchmark of the ERC loss."""
    pytest.importorskip("matplotlib", reason="figures need matplotlib (pip install matplotlib)")
    seconds = {f"{part} {n}": [n * 1e-3, n * 2e-3, n * 3e-3] for part in ("layer", "loss") for n in (8, 16)}
    bench = dict(experts=[8, 16], tokens=64, top_k=2, seconds=seconds)
    (tmp_path / "bench-cpu-2-cores.json").write_text(json.dumps({"erc": bench}), encoding="utf-8")
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    return tmp_path


def drawn(folder):
    """{name: (width in pixels, bytes)} of the figures; fails where a file is no PNG."""
    found = {}
    for path in (folder / "figures").iterdir():
        blob = path.read_bytes()
        assert blob[:8] == b"\x89PNG\r\n\x1a\n", f"{path.name} begins with {blob[:8]}"
        found[path.stem] = struct.unpack(">I", blob[16:20])[0], len(blob)
    return found


def test_all_six_figures_are_drawn_and_fit_a_readme(folder):
    """One PNG each, as wide as a README and below 200 kB."""
    figures.draw(Some(ALL))
    found = drawn(folder)
    assert set(found) == NAMES, f"drawn: {sorted(found)}"
    for name, (width, size) in found.items():
        assert 700 <= width <= 1000 and 5_000 < size < 200_000, f"{name} is {width} pixels wide and has {size} bytes"


def test_what_has_no_result_yet_is_left_out_of_a_figure(folder):
    """Each variant in turn, and all but one; no panel stays empty."""
    from matplotlib.figure import Figure

    for variants in ([one for one in ALL if one != missing] for missing in ALL):
        for name, fill in figures.FIGURES.items():
            fig = Figure()
            assert fill(fig, Some(dict.fromkeys(variants, 1))), f"{name} is not drawn of {variants}"
            empty = [ax.get_title() for ax in fig.axes if not ax.has_data()]
            assert not empty, f"{name}, of {variants}: nothing in {empty}"
    for variant in ALL:
        fig, alone = Figure(), Some({variant: 1})
        if figures.quality(fig, alone):
            assert len(fig.axes) == 1, f"{variant} alone is compared with nothing, in a panel of its own"
        assert figures.alphas(Figure(), alone) == (variant not in ("aoe", "dense")), variant


def test_without_any_result_only_the_benchmark_is_drawn(folder):
    """And without that, nothing; no empty axes."""
    figures.draw(Some({}))
    assert set(drawn(folder)) == {"cost"}, f"drawn of nothing: {sorted(drawn(folder))}"


def test_means_and_bands_are_over_the_seeds_that_have_a_value():
    """Two seeds, by hand; None and NaN are no values."""
    values = {0: [(0, 1.0), (20, None)], 1: [(0, 4.0), (20, 3.0), (40, float("nan"))]}
    rows = figures.over_seeds(Some(dict(plain=2)), "plain", lambda result: values[result["seed"]])
    assert rows == [(0, 1.0, 2.5, 4.0), (20, 3.0, 3.0, 3.0)], rows


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch):
    """The hint names the command."""
    real = builtins.__import__

    def without(name, *given, **usual):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *given, **usual)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="pip install matplotlib"):
        figures.draw(Some({}))
