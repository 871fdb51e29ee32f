"""The comparison: every variant starts from the same weights, what is measured equals loops, no result is lost, and
tables and figures say what the results say. Nothing here trains for long.
"""

import json
import math
import random
import struct
from pathlib import Path
from types import SimpleNamespace

import figures
import pytest
import report
import reproduce
import torch

import train
from erc_moe import MoEConfig, MoETransformer
from prepare_data import UserError, demo_documents

# ---- Runs ----


def test_what_is_measured_in_the_weights_equals_loops():
    """Table 2, the smallest alpha, norms, and cosines of rows and of gate columns, number by number."""
    torch.manual_seed(0)
    model = MoETransformer(MoEConfig(16, 8, 2, 2, 16, 8, 6, 2))
    found, moe = reproduce.measure(model, alpha=1.0), model.moe_layers()[1]
    R, W_g, n = moe.R.detach().double(), moe.W_g.detach().double(), 6
    cosine = lambda a, b: (a @ b / a.norm() / b.norm()).item()
    others = [(i, j) for i in range(n) for j in range(n) if i != j]
    M = [[(R[i] @ W_g[j]).norm().item() for j in range(n)] for i in range(n)]
    pairs = {True: [], False: []}
    for i, j, a, b in ((i, j, a, b) for i in range(n) for j in range(n) for a in range(8) for b in range(8)):
        if (i, a) != (j, b):
            pairs[i == j].append(cosine(W_g[i, :, a], W_g[j, :, b]) ** 2)
    norms = torch.stack([row.norm() for row in R])
    expected = dict(
        loss=[sum(max(M[i][j] - a * M[i][i], 0) + max(M[j][i] - a * M[i][i], 0) for i, j in others) / n**2
              for a in (1, 2, 3, 4, 5)],
        smallest_alpha=max(max(M[i][j], M[j][i]) / M[i][i] for i, j in others),
        norm_R=[norms.mean().item(), norms.std().item()],
        cosine=sum(abs(cosine(R[i], R[j])) for i, j in others) / len(others),
        neurons=(sum(pairs[True]) / len(pairs[True])) / (sum(pairs[False]) / len(pairs[False])))
    for name, value in expected.items():
        assert found[name][1] == pytest.approx(value, rel=1e-4, abs=1e-7), f"{name}: {found[name][1]}, loops {value}"
    clean, closed, drawn, sd = found["noise"][1]
    assert clean == pytest.approx(expected["loss"][0], rel=1e-4), f"{clean}, loops {expected['loss'][0]}"
    assert closed < drawn and 0 < sd < drawn, found["noise"][1]


def test_the_premise_equals_whole_models_with_another_route():
    """Every expert put first by hand, in the last layer of a whole model, token by token: all numbers, hard tokens too.

    Of 22 tokens, hard are the 5 with the highest cross-entropy. Of two experts that are equally good the first counts.
    """
    torch.manual_seed(0)
    model = MoETransformer(MoEConfig(16, 8, 2, 2, 16, 8, n_experts=5, top_k=3, init_std=0.5))
    moe, route = model.moe_layers()[-1], model.moe_layers()[-1].route
    tokens = torch.randint(16, (3, 9))
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[0, 6:] = -100
    counted = targets >= 0

    def token_ce():
        ce = torch.nn.functional.cross_entropy(model(inputs).logits.transpose(1, 2), targets, reduction="none")
        return ce[counted].tolist()

    def first(j):
        def forced(x):
            logits, probs, weights, experts = route(x)
            rows = [[j, *[i for i in logits[t].argsort(descending=True).tolist() if i != j][:2]] for t in range(len(x))]
            return logits, probs, weights, torch.tensor(rows)
        return forced

    seen = []
    moe.route = lambda x: seen.append(x) or route(x)
    router = token_ce()
    x = seen[0][counted.flatten()]
    chosen, strongest = (x @ moe.R.T).argmax(dim=1).tolist(), []
    for token in x:
        strongest.append(max(range(5), key=lambda j: (token @ moe.W_g[j]).norm().item()))
    trials = []
    for j in range(5):
        moe.route = first(j)
        trials.append(token_ce())
    moe.route, N = route, len(router)
    best = [min(range(5), key=lambda j: trials[j][t]) for t in range(N)]
    rows = [dict(router=router[t], response=trials[strongest[t]][t], random=sum(trials[j][t] for j in range(5)) / 5,
                 best=trials[best[t]][t], router_best=float(chosen[t] == best[t]),
                 response_best=float(strongest[t] == best[t])) for t in range(N)]
    hard = sorted(rows, key=lambda row: -row["router"])[:N // 4]
    xs, states, wanted = reproduce.validation(model, [(inputs[:2], targets[:2]), (inputs[2:], targets[2:])], "cpu")
    found = reproduce.premise(model, xs[-1], states, wanted)
    assert N == 22 and len(set(chosen)) > 1 and chosen != strongest, f"a poor example: {N} {chosen} {strongest}"
    for which, its in (("all", rows), ("hard", hard)):
        for name in its[0]:
            expected = sum(row[name] for row in its) / len(its)
            assert found[which][name] == pytest.approx(expected, abs=1e-5), f"{which} {name}: {found}, {expected}"


def test_rows_are_compared_with_the_mean_of_their_tokens():
    """Tokens that lie on the axes, rows that point there: cosine 1 with one's own, less with a sample of all."""
    model = MoETransformer(MoEConfig(16, 8, 1, 1, 8, 8, n_experts=4, top_k=1))
    moe = model.moe_layers()[0]
    moe.R.data = torch.eye(8)[:4] * 3
    x = torch.eye(8)[:3].repeat(50, 1)  # the last expert gets no token
    found = reproduce.centres(model, [x])
    assert found["own"] == pytest.approx([1.0]), found
    assert found["random"] == pytest.approx([3**-0.5], abs=0.05), f"{found}; of a mean of all tokens 1 / sqrt(3)"


BY_HAND = """One windy day June the grumpy otter found a shiny boat at the harbor. The |boat| felt all alone. A polite \
goat tiptoed in with a hammer. They ate roasted figs and slept beside the fire. Sleep well, |June|!

To make creamy pudding for 6:
- 3 spoons of corn
- 7 cups of milk
- 9 bags of flour
Heat the |flour| over a low fire. Add the rest and wait 9 minutes. Serve the |pudding| with a smile.

How many beans?
June saves 3 - 1 = 2 |beans| for a little bell.
Nora keeps 8 - 4 = 4 |beans| under the bridge.
Otto buys 8 + 5 = 13 |beans| for the hare.
Kai has 8 - 5 = 3 |beans| after meeting the brave otter.

>>> print("Kai", 7 + 6)
|Kai| 13
>>> b = 3 - 2
>>> b
1
>>> "buzz" * 2
'|buzzbuzz|'
>>> max(4, 5)
|5|
>>> for n in 1, 2: print("Cheers", n)
|Cheers| 1
|Cheers| 2""".split("\n\n")


def test_copies_are_what_the_grammar_remembers():
    """A validation document of each kind, copies found by hand. A sum is none, whatever its digits."""
    documents = {bytes(tokens[:-1]).decode(): copied for tokens, copied in reproduce.demo_copies(320)}
    assert list(documents) == [text for _, text, _ in demo_documents()][-320:], "these are not the demo's documents"
    for text in BY_HAND:
        parts = text.split("|")
        expected = [k % 2 == 1 for k, part in enumerate(parts) for _ in part] + [False]
        found = documents["".join(parts)]
        marked = "".join(c if copied else "." for c, copied in zip("".join(parts), found))
        assert found == expected, f"copies of {text!r}, found {marked!r}"


def test_copies_and_other_tokens_are_averaged_apart(monkeypatch):
    """Two documents, the shorter one first as in validation_batches; other text than the demo's is refused."""
    monkeypatch.setattr(reproduce, "demo_copies", lambda n: [([1, 2, 0], [False, True, False]), ([3, 0], [False] * 2)])
    model = SimpleNamespace(norm=lambda x: x, head=lambda x: x)
    targets = torch.tensor([3, 0, 1, 2, 0])
    states = torch.randn(5, 4, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    ce = [-states[t].softmax(dim=0)[targets[t]].log().item() for t in range(5)]
    found = reproduce.copies(model, states, targets)
    assert found == pytest.approx(dict(ce_copies=ce[3], ce_other=(sum(ce) - ce[3]) / 4, copies=1, others=4)), found
    with pytest.raises(UserError, match="prepare it again"):
        reproduce.copies(model, states, targets.flip(0))


def test_the_decay_makes_the_timescale():
    """Sum over all steps of lr * decay, by a loop: 3.7 where the suite is named for its size, else as it is named."""
    sums = {"n16": 3.7, "n64": 3.7, "text": 3.7, "n16-slow": 0.175, "n16-0.9": 0.9, "n16-18": 18}
    for suite, expected in sums.items():
        config = reproduce.configs(suite, "plain", 0)[0]
        total = 0.0
        for step in range(1, config.steps + 1):
            rise = step / config.warmup
            fall = 0.55 + 0.45 * math.cos(math.pi * (step - config.warmup) / (config.steps - config.warmup))
            total += config.lr * min(rise, fall if step > config.warmup else rise) * config.moe_weight_decay
        assert total == pytest.approx(expected, rel=2e-3), f"{suite}: {total}"


def test_first_comes_a_small_whole():
    """Three seeds of what is compared, in all suites; then what routing is for, more seeds, ablations, all 25 seeds."""
    ordered = reproduce.jobs([f"{suite}/{name}" for suite, its in reproduce.SUITES.items() for name in its.variants])
    place = {job: i for i, job in enumerate(ordered)}
    for before, after in ((("text", "erc-0.5", 2), ("n16", "dense", 0)), (("n16-18", "plain", 2), ("n64", "random", 0)),
                          (("n16", "aoe", 2), ("n16", "plain", 3)), (("n64", "plain", 7), ("n16", "erc-0.4", 0)),
                          (("n16", "orthogonal", 2), ("n16", "plain", 8))):
        assert place[before] < place[after], f"{before} is run {place[before]}th, {after} {place[after]}th"
    assert len(place) == len(ordered) == 243, len(ordered)


@pytest.mark.parametrize("suite, variant", [(s, v) for s in reproduce.SUITES for v in reproduce.SUITES[s].variants])
def test_every_variant_starts_from_the_weights_of_plain(suite, variant):
    """Same seed: a parameter whose name and shape the plain model has, too, starts with the plain model's values."""
    plain = reproduce.initial_model(suite, "plain", 3).state_dict()
    its = reproduce.initial_model(suite, variant, 3).state_dict()
    shared = [name for name in its if name in plain and plain[name].shape == its[name].shape]
    different = [name for name in shared if not torch.equal(plain[name], its[name])]
    assert not different and len(shared) >= 20, f"{len(shared)} shared, of which differ: {different}"


@pytest.mark.usefixtures("elsewhere")
def test_a_run_leaves_a_result_that_can_be_loaded(data, monkeypatch, tmp_path):
    """Four steps: log, weights before and after, settings; an interrupted one leaves none."""
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path)
    suite = reproduce.SUITES["n16"]
    monkeypatch.setitem(reproduce.SUITES, "n16", reproduce.Suite(
        suite.moe, dict(suite.settings, data=data, steps=4, eval_every=2), {"erc-1": 1}))
    assert reproduce.main(["n16/erc-1"]) == 0
    result = reproduce.load(tmp_path / "n16" / "erc-1-0.json")
    assert [one["step"] for one in result["weights"]] == [0, 2, 4] and "M" in result["weights"][-1]
    assert result["log"][-1]["step"] == 4 and result["log"][-1]["val_ce"] > 0
    assert result["premise"]["all"]["router"] == pytest.approx(result["log"][-1]["val_ce"], abs=1e-4), result["premise"]
    assert result["premise"]["all"]["response"] == pytest.approx(result["log"][-1]["response_ce"], abs=1e-4), result
    monkeypatch.setattr(reproduce, "run", lambda *job: pytest.fail(f"{job} has a result already"))
    assert reproduce.main(["n16/erc-1"]) == 0
    monkeypatch.undo()
    monkeypatch.setattr(train, "train", lambda *args, **more: dict(signal=2))
    with pytest.raises(UserError, match="run the same command again"):
        reproduce.run("n16", "plain", 1)


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A results folder with one file, of n16/plain, seed 0, that says what a run would say."""
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    (tmp_path / "n16").mkdir()
    write(tmp_path / "n16", 0, 0.5)
    return tmp_path / "n16"


def write(folder, seed, val_ce, **changes):
    result = dict(suite="n16", variant="plain", seed=seed, log=[dict(step=800, val_ce=val_ce)], weights=[], torch="2",
                  settings=reproduce.settings_of("n16", "plain", seed), dtype="float32", data="d") | changes
    (folder / f"plain-{seed}.json").write_text(json.dumps(result), encoding="utf-8")


def test_results_that_do_not_belong_here_are_named_and_kept(results):
    """Other settings and foreign files: one line with the name. Two types do not stand in one table."""
    settings = reproduce.settings_of("n16", "plain", 1)
    for changes, words in ((dict(settings=settings | dict(steps=7)), "another version: steps 7, now 800"),
                           (dict(settings=None), "no result of reproduce.py"),
                           (dict(dtype="bfloat16"), "results of n16 differ in dtype")):
        write(results, 1, 0.6, **changes)
        with pytest.raises(UserError, match=words):
            report.Results()
    assert (results / "plain-1.json").exists()
    with pytest.raises(UserError, match="no variant 'n16/plane'; known are: n16/plain"):
        reproduce.main(["n16/plane"])


@pytest.mark.parametrize("ce, verdict", [(0.69, "within the spread"), (0.71, "OUTSIDE OF the spread")])
def test_a_second_training_is_compared_with_the_spread_of_seeds(results, monkeypatch, capsys, ce, verdict):
    """0.5 and 0.6 over two seeds have sd 0.0707, and 2 sqrt(2) times that is 0.2."""
    monkeypatch.setattr(reproduce, "run", lambda *job: dict(log=[dict(val_ce=ce)]))
    write(results, 1, 0.6)
    reproduce.again("n16", "plain", 0)
    printed = capsys.readouterr().out
    assert verdict in printed and "0.0707" in printed, printed


# ---- Tables ----


def test_an_interval_is_students_and_deltas_are_paired():
    """Of 1, 2, 3: mean 2, standard error 1 / sqrt(3), t(0.975, 2) = 4.303, t(0.8, 2) = 1.061. Only shared seeds."""
    assert report.delta([1.0, 2.0, 3.0], "{:+.2f}") == "+2.00 [-0.48, +4.48]"
    assert report.detectable([1.0, 2.0, 3.0], "{:.2f}") == "3.10"
    made = Some(dict(plain=3, dense=2))
    end = report.last("val_ce")
    plain, dense = ([end(made["n16", name, seed]) for seed in (0, 1)] for name in ("plain", "dense"))
    assert made.paired("n16", "dense", end) == [dense[0] - plain[0], dense[1] - plain[1]]


def test_tables_go_below_their_marks_and_nowhere_else():
    """An old table below a mark is replaced, a mark without one gets one; the rest stays to the letter."""
    for below in ("| old |\n|---|\n", "(old)\n", ""):
        old = f"before\n\n<!-- table: main -->\n{below}\nafter | a |\n\nend\n"
        new = report.filled(old, Some(dict(plain=2)))
        assert new.startswith("before\n\n<!-- table: main -->\n|  | seeds | val_ce |"), new
        assert new.endswith("|\n\nafter | a |\n\nend\n") and "old" not in new, new
        assert report.filled(new, Some(dict(plain=2))) == new, "filled twice is not filled once"
        assert "(not run yet)\n\nafter" in report.filled(old, Some({})), "without results a line says so"


# ---- Figures ----

VARIANTS = ("plain", "erc-0.4", "erc-0.5", "erc-1", "aoe", "dense", "probe-up", "orthogonal")


class Some(report.Results):
    """Results of random numbers that never were in a file: variant -> number of seeds."""

    def __init__(self, seeds, n=6, layers=3):
        self.missing = []
        for variant, seed in [(variant, seed) for variant, count in seeds.items() for seed in range(count)]:
            draw = random.Random(f"{variant} {seed}")
            several = lambda count, draw=draw: [draw.uniform(0.5, 1.5) for _ in range(count)]
            log = [dict(step=step, epsilon=0.5, agreement=0.3, violated=0.1, coupling=1.1, dead=0, balance=1.0,
                        val_ce=draw.uniform(0.25, 0.3)) for step in (20, 40)]
            one = dict(step=40, neurons=several(layers), smallest_alpha=several(layers), noisy=several(layers),
                       cosine=several(layers), loss=[several(5) for _ in range(layers)],
                       M=[[several(n) for _ in range(n)] for _ in range(layers)],
                       **{name: [several(count) for _ in range(layers)] for name, count in
                          (("norm_R", 2), ("norm_W", 2), ("noise", 4), ("touched", 2))})
            self["n16", variant, seed] = dict(suite="n16", variant=variant, seed=seed, log=log, weights=[one, one],
                                              plane=[[several(2) for _ in range(4)] for _ in range(3)])


def test_every_table_can_be_made_of_some_results():
    """Whatever has run so far: no table is an error."""
    for seeds in (dict.fromkeys(VARIANTS, 2), dict(plain=1), dict(dense=1)):
        for name, make in report.TABLES.items():
            if not name.startswith("bench"):
                assert make(Some(seeds)).startswith("|"), name


def test_all_figures_are_drawn_and_fit_a_readme(tmp_path, monkeypatch):
    """One PNG each, as wide as a README and below 200 kB; of nothing, only the worked example is drawn."""
    pytest.importorskip("matplotlib", reason="draws with matplotlib, which is not installed")
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    for seeds, names in ((dict.fromkeys(VARIANTS, 2), set(figures.FIGURES)), ({}, {"steps"})):
        figures.draw(Some(seeds))
        found = {path.stem: path.read_bytes() for path in Path(tmp_path, "figures").iterdir()}
        assert set(found) == names, f"drawn: {sorted(found)}"
        for name, blob in found.items():
            width = struct.unpack(">I", blob[16:20])[0]
            assert blob[:4] == b"\x89PNG" and 700 <= width <= 1000 and 5_000 < len(blob) < 200_000, f"{name}: {width}"
            Path(tmp_path, "figures", f"{name}.png").unlink()
