"""Tables and figures of the comparison, from its result files alone; trains nothing.

    python experiments/report.py              # prints every table
    python experiments/report.py --write      # also puts them into README.md and results/README.md, and draws figures

A table stands in a text below a line `<!-- table: NAME -->`. --write puts it there, or replaces it. The figures go to
results/figures and need matplotlib. Deltas to plain are paired by seed: the same seed has the same batches and initial
weights. Behind ± stands the standard deviation over seeds, in square brackets the 95% confidence interval of the mean
by Student's t. Detectable is the smallest delta that so many seeds, with this spread, find in about 80 of 100 cases.
"""

import argparse
import functools
import json
import math
import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to be run as it stands, from any folder

import bench
import reproduce
import torch
from plot import LINES, picture
from reproduce import MAIN, RESULTS, SUITES

import prepare_data
from erc_moe import activation_norms, noise_bound, perturb
from prepare_data import UserError

ROOT = Path(__file__).resolve().parents[1]
BENCH = RESULTS / "bench-cpu-2-cores.json"
TEXTS = (ROOT / "README.md", RESULTS / "README.md")
NAMES = {
    "plain": "plain MoE", "aoe": "Autonomy-of-Experts", "dense": "dense", "random": "random router",
    **{f"erc-{alpha}": f"ERC, alpha {alpha}" for alpha in ("0", "0.4", "0.5", "0.6", "0.8", "1", "2", "3")},
    "probe-up": "(b) R~ W_p", "probe-silu": "(c) SiLU(R~ W_g)", "probe-swiglu": "(d) SiLU(R~ W_g) * R~ W_p",
    "probe-output": "(e) output", "no-noise": "ERC without noise", "closed-form": "ERC, noise in closed form",
    "orthogonal": "router orthogonalisation", "plain-z": "plain MoE, z-loss", "erc-1-z": "ERC, alpha 1, z-loss",
    "erc-0.5-z": "ERC, alpha 0.5, z-loss"}
SIZES = {"n16": "16 experts, grammar", "n64": "64 experts, grammar", "text": "32 experts, source code"}
SCAN = {"n16-slow": 0.18, "n16-0.9": 0.9, "n16-1.8": 1.8, "n16": 3.7, "n16-9": 9, "n16-18": 18}  # suite -> timescale


class Results(dict):
    """{(suite, variant, seed): result} of all finished runs, or of those that are given."""

    def __init__(self, found=None):
        super().__init__(found or {})
        for suite in SUITES if found is None else ():
            for path in sorted((RESULTS / suite).glob("*.json")):
                result = reproduce.load(path)
                self[suite, result["variant"], result["seed"]] = result
            for what in ("dtype", "torch", "data"):
                kinds = {self[job][what] for job in self if job[0] == suite}
                if len(kinds) > 1:
                    raise UserError(f"the results of {suite} differ in {what}: {', '.join(map(str, kinds))}; move those"
                                    " of one kind away, and run them again")

    def seeds(self, suite, variant):
        return sorted(seed for s, v, seed in self if (s, v) == (suite, variant))

    def values(self, suite, variant, of):
        """of(result) for each seed for which there is one."""
        found = [of(self[suite, variant, seed]) for seed in self.seeds(suite, variant)]
        return [value for value in found if value is not None]

    def paired(self, suite, variant, of):
        """of(result) less that of plain, for each seed that both have; with a z-loss, plain has one, too."""
        plain = "plain-z" if variant.endswith("-z") else "plain"
        pairs = [(of(self[suite, variant, seed]), of(self[suite, plain, seed]))
                 for seed in self.seeds(suite, variant) if variant != plain and (suite, plain, seed) in self]
        return [ours - theirs for ours, theirs in pairs if ours is not None]


# ---- What is measured: functions of a result; None where there is nothing ----


def last(name):
    return lambda result: result["log"][-1].get(name)


def weights(name, of_layers=statistics.mean):
    """The mean over layers of what was measured in the weights at the end."""
    return lambda result: of_layers(result["weights"][-1][name]) if result["weights"] else None


def premise(name, less=None, which="all"):
    """A number of the premise, or the difference of two."""
    return lambda result: result["premise"] and (
        result["premise"][which][name] - (result["premise"][which][less] if less else 0))


def closed(result):
    """Of the way from a random expert to the router's choice, the share that the strongest response comes."""
    found = result["premise"] and result["premise"]["all"]
    return found and (found["random"] - found["response"]) / (found["random"] - found["router"])


def judged(result):
    """The cross-entropy by which quality is judged: of tokens that are no copies; on source code, of all."""
    return result["copies"]["ce_other"] if result["copies"] else result["log"][-1]["val_ce"]


COST = "cost of response"
PREMISE = {"router's choice": ("router", ".3f"), "strongest response": ("response", ".3f"),
           "random expert": ("random", ".3f"), "best": ("best", ".3f"), "router picks best": ("router_best", ".0%"),
           "response picks best": ("response_best", ".0%")}
QUANTITIES = {  # title -> a function of a result, and how it is written
    "val_ce": (last("val_ce"), ".4f"), "judged": (judged, ".4f"),
    "copies": (lambda result: result["copies"] and result["copies"]["ce_copies"], ".4f"),
    "agreement": (last("agreement"), ".0%"), "broken": (last("violated"), ".1%"), "coupling": (last("coupling"), ".2f"),
    "epsilon": (last("epsilon"), ".3f"),
    "smallest alpha": (weights("smallest_alpha", statistics.median), ".2f"),  # of a layer that died it is a million
    "cosine of rows of R": (weights("cosine"), ".2f"), "gate columns": (weights("neurons"), ".2f"),
    "broken under noise": (weights("noisy"), ".1%"),
    COST: (premise("response", "router"), ".3f"), f"{COST}, hard": (premise("response", "router", "hard"), ".3f"),
    "response less random": (premise("response", "random"), ".3f"), "closed": (closed, ".0%"),
    **{title: (premise(name), form) for title, (name, form) in PREMISE.items()},
    **{f"{title}, hard": (premise(name, which="hard"), form) for title, (name, form) in PREMISE.items()},
    "R[i] and its tokens": (lambda result: result["centres"] and statistics.mean(result["centres"]["own"]), ".2f"),
    "R[i] and a sample": (lambda result: result["centres"] and statistics.mean(result["centres"]["random"]), ".2f")}


# ---- Numbers as text ----


@functools.cache
def student_t(p, df, parts=100_000):
    """The quantile p > 0.5 of Student's t: sqrt(df) times the tangent of an angle, which has density cos^(df - 1)."""
    width = math.pi / 2 / parts
    slices = [math.cos((k + 0.5) * width) ** (df - 1) for k in range(parts)]
    rest = (2 * p - 1) * sum(slices)
    for k, area in enumerate(slices):
        if rest < area:
            return math.sqrt(df) * math.tan((k + rest / area) * width)
        rest -= area


def standard_errors(values, *quantiles):
    """The sum of these quantiles of t, in units of the values."""
    return sum(student_t(p, len(values) - 1) for p in quantiles) * statistics.stdev(values) / math.sqrt(len(values))


def bounds(values):
    """(lower, upper) end of the 95 % confidence interval of the mean."""
    return [statistics.mean(values) + sign * standard_errors(values, 0.975) for sign in (-1, 1)]


def mean(values, form=".4f"):
    return format(statistics.mean(values), form) if values else ""


def mean_sd(values, form=".4f"):
    """"mean ± standard deviation", or the mean alone of a single value."""
    return mean(values, form) + (f" ± {statistics.stdev(values):{form}}" if values[1:] else "")


def delta(values, form=".4f"):
    """"mean [95% CI]", or the mean alone of a single value."""
    return mean(values, f"+{form}") + (" [{}, {}]".format(*(f"{end:+{form}}" for end in bounds(values)))
                                       if values[1:] else "")


def detectable(values, form=".4f"):
    """The smallest delta that a paired t-test at 5 % would find with a power of 80 %."""
    return format(standard_errors(values, 0.975, 0.8), form) if values[1:] else ""


def table(*rows):
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


# ---- Tables, of cells: functions of (results, suite, variant) ----

CI = "[95% CI]"
HALVES = {"alpha 1": "erc-1", "alpha 0.5": "erc-0.5"}


def cell(title, show=mean, to_plain=False):
    """A quantity over seeds, or its deltas to plain."""
    of, form = QUANTITIES[title]
    return lambda results, *job: show((results.paired if to_plain else results.values)(*job, of), form)


def all_and_hard(title):
    cells = cell(title), cell(f"{title}, hard")
    return lambda *job: " / ".join(filter(None, (one(*job) for one in cells)))


def across(variants, title, *how):
    """One cell of several variants, of a suite or of a suite with another loss, which ends their names."""
    return lambda results, suite, plain: " / ".join(filter(None, (
        cell(title, *how)(results, suite, variant + plain.removeprefix("plain")) for variant in variants)))


def by_layer(name, form=".3f", pick=lambda value: [value]):
    """The mean over seeds of what was measured in the weights, layer by layer; with two numbers, ± between them."""
    def show(results, *job):
        layers = zip(*results.values(*job, lambda result: result["weights"][-1][name]))
        return " / ".join(" ± ".join(mean(values, form) for values in zip(*map(pick, layer))) for layer in layers)
    return show


def rows(columns, jobs, *first):
    """A table: the first rows, then one for each {title: (suite, variant)} that has run."""
    return lambda results: table(("", "seeds", *columns), *first, *(
        (title, len(results.seeds(*job)), *(one(results, *job) for one in columns.values()))
        for title, job in jobs.items() if results.seeds(*job)))


def named(suites, variants):
    """{title: (suite, variant)}; other suites than n16 are named."""
    return {f"`{suite}`: " * (suite != "n16") + NAMES[variant]: (suite, variant)
            for suite in suites for variant in variants}


def of_shared_seeds(results):
    """The results of the suites of all timescales, each of the seeds that all of them have."""
    every = [set(results.seeds(suite, variant)) for suite in SCAN if results.seeds(suite, "erc-0.5")
             for variant in ("plain", "erc-0.5")]
    shared = set.intersection(*every) if every else set()
    return Results({job: result for job, result in results.items() if job[0] in SCAN and job[2] in shared})


def scan_table(results):
    return rows({
        **{title: across(("plain", "erc-0.5"), title) for title in (
            "val_ce", "judged", "agreement", "smallest alpha", *list(PREMISE)[:3])},
        **{f"{title}, plain {CI}": across(["plain"], title, delta) for title in ("response less random", COST)},
        f"with alpha 0.5, delta {CI}": across(["erc-0.5"], COST, delta, True),
    }, {timescale: (suite, "plain") for suite, timescale in SCAN.items()})(of_shared_seeds(results))


def basis(results, suite):
    """A line for the caption: is plain ahead of dense and of a random router, of each by more than its interval?"""
    leads = {name: results.paired(suite, name, judged) for name in ("dense", "random")}
    words = ", ".join(f"{name} less plain {delta(pairs) or '?'}" for name, pairs in leads.items())
    ahead = all(pairs[1:] and bounds(pairs)[0] > 0 for pairs in leads.values())
    return f"(`{suite}`: {words}: " + ("a basis for sentences about quality.)" if ahead else
                                       "plain isn't known to be ahead of both. No basis for a sentence about quality.)")


def quality_table(results):
    captions = [basis(results, suite) for suite in SIZES if results.seeds(suite, "plain")]
    return "\n".join([*captions, "", rows({
        "judged": cell("judged", mean_sd), f"delta to plain {CI}": cell("judged", delta, True),
        "detectable": cell("judged", detectable, True), "copies": cell("copies", mean_sd),
        "val_ce": cell("val_ce", mean_sd), f"val_ce, delta {CI}": cell("val_ce", delta, True),
    }, named(SIZES, (*MAIN, "aoe", "dense", "random")))(results)]).lstrip()


def intervals_table(results):
    """How many intervals the tables have, and how many exclude 0; each is counted once, in the first table it is in."""
    lines, seen = [("", "intervals", "exclude 0", "by chance, if all were 0")], set()

    def count(name, found):
        outside = sum(one.split("[")[1][0] == one.split(", ")[1][0] for _, one in found)   # both ends of one sign
        lines.append((name, len(found), outside, f"{len(found) / 20:.1f}"))

    for name in ("premise", "constraints", "scan", "quality", "ablations"):
        found = {(row.split(" | ")[0], one) for row in TABLES[name](results).splitlines()
                 for one in re.findall(r"\| (\S+ \[\S+, \S+\]) (?=\|)", row)} - seen
        seen |= found
        count(name, found)
        if name == "quality":
            count("... of ERC alone", {(row, one) for row, one in found if "ERC" in row})
    return table(*lines)


SIZED = {title: (suite, "plain") for suite, title in SIZES.items()}
TABLES = {
    "short": rows({
        "plain": cell(COST),
        "alpha 1": across(["erc-1"], COST), f"alpha 1, delta {CI}": across(["erc-1"], COST, delta, True),
        "alpha 0.5": across(["erc-0.5"], COST), f"alpha 0.5, delta {CI}": across(["erc-0.5"], COST, delta, True),
    }, SIZED),
    "premise": rows({
        **{title: all_and_hard(title) for title in PREMISE}, "agreement": cell("agreement"),
        **{f"{title} {CI}": cell(title, delta) for title in ("response less random", COST, f"{COST}, hard")},
        f"its delta to plain {CI}": cell(COST, delta, True), "detectable": cell(COST, detectable, True),
        "closed": cell("closed"), f"closed, delta {CI}": cell("closed", delta, True),
    }, named(SIZES, (*MAIN, "random", "aoe"))),
    "constraints": rows({
        **{title: across(MAIN, title) for title in ("broken", "smallest alpha", "coupling", "agreement")},
        **{f"{name}: delta {CI}": across([variant], "agreement", delta, True) for name, variant in HALVES.items()},
        **{title: across((*MAIN, "random"), title) for title in ("R[i] and its tokens", "R[i] and a sample")},
    }, SIZED | {"16 experts, timescale 0.18": ("n16-slow", "plain"), "16 experts, z-loss": ("n16", "plain-z")}),
    "scan": scan_table, "quality": quality_table,
    "decoupled": rows({
        **{f"alpha {a + 1}": by_layer("loss", pick=lambda loss, a=a: [loss[a]]) for a in range(5)},
        "smallest alpha": by_layer("smallest_alpha", ".2f"),
    }, SIZED, (
        "the paper's 3B: first / middle / last layer", "", "0.87 / 0.22 / 0.50", "0.69 / 0.15 / 0.44",
        "0.26 / 0 / 0.20", "0 / 0 / 0.20", "0 / 0 / 0", "above 4")),
    "norms": rows({
        "norm of R[i]": by_layer("norm_R", ".2f", list), "norm of W_g[i]": by_layer("norm_W", ".1f", list),
        "ERC loss, clean R": by_layer("loss", pick=lambda loss: loss[:1]),
    }, named(["n16"], ("plain", "erc-1")),
        ("the paper's 3B, plain", "", "1.85 ± 0.39 / 0.86 ± 0.08 / 0.80 ± 0.14", "30.5", "0.87 / 0.22 / 0.50"),
        ("the paper's 3B, ERC", "", "1.67 ± 0.31 / 0.83 ± 0.07 / 0.73 ± 0.10", "29.8", "0 / 0 / 0")),
    "ablations": rows({
        f"delta to plain {CI}": cell("judged", delta, True), "detectable": cell("judged", detectable, True),
        f"{COST}, delta {CI}": cell(COST, delta, True),
        **{title: cell(title) for title in ("agreement", "broken", "smallest alpha", "epsilon",
                                            "broken under noise", "cosine of rows of R", "gate columns")},
    }, named(["n16"], [variant for variant in NAMES if variant not in ("aoe", "dense", "random")])),
    "intervals": intervals_table,
    "bench-erc": lambda _: bench.show_erc(json.loads(BENCH.read_text(encoding="utf-8"))["erc"]),
}
# A table with its caption in brackets, or a line in brackets that stands for it.
MARK = re.compile(r"(<!-- table: ([\w-]+) -->\n)((?:[|(].*\n|\n(?=\|))*)")


def filled(text, results):
    """The text, with every marked table as the result files give it."""
    make = lambda name: TABLES[name](results) if results or name == "bench-erc" else "(not run yet)"
    return MARK.sub(lambda match: f"{match[1]}{make(match[2])}\n", text)


# ---- Figures: each fills one, or returns False where there is nothing to draw ----


def band(ax, points, look, opacity=0.18, **style):
    """points: {x: values of all seeds} -> a line through their means, and a band from the smallest to the largest."""
    xs, of_seeds = zip(*sorted(points.items())) if points else ((), ())
    ax.plot(xs, [*map(statistics.mean, of_seeds)], color=look[0], linestyle=look[1], **style)
    ax.fill_between(xs, [*map(min, of_seeds)], [*map(max, of_seeds)], color=look[0], alpha=opacity, linewidth=0)


def premise_figure(fig, results):
    """What it costs to choose by response, or at random, instead of by router, by timescale."""
    results, ax = of_shared_seeds(results), fig.subplots()
    for name, label, style in (("response", "strongest response", dict(marker="o", markersize=4)),
                               ("random", "random expert", dict(linewidth=0.8, opacity=0))):
        for variant, look in (("plain", (LINES[0][0], "-")), ("erc-0.5", (LINES[2][0], "--"))):
            points = {SCAN[suite]: results.values(suite, variant, premise(name, "router")) for suite in SCAN
                      if results.seeds(suite, variant)}
            band(ax, points, look, label=f"{label}, {NAMES[variant]}", **style)
    ax.set(title="16 experts, grammar", xlabel="timescale: sum of lr x decay (the paper's: 3.7)", xscale="log",
           ylabel="nats above the router's choice", ylim=0, xticks=[*SCAN.values()], xticklabels=[*SCAN.values()])
    ax.minorticks_off()
    ax.legend()
    return bool(results)


def violations(fig, results):
    """Broken constraints over training, without noise, each at its own alpha; plain at 1."""
    for ax, suite in zip(fig.subplots(1, 3, sharey=True), SIZES):
        for variant, look in zip(MAIN, LINES):
            points = {}
            for row in sum(results.values(suite, variant, lambda result: result["log"]), []):
                if row["step"] % 40 < 2:  # all logs have these
                    points.setdefault(row["step"], []).append(row["violated"])
            band(ax, points, look, label=NAMES[variant])
        ax.set(title=SIZES[suite], xlabel="step", xlim=0, ylim=(0, 0.6))
        ax.yaxis.set_major_formatter("{x:.0%}")
    fig.axes[0].legend()
    return bool(results)


def coupling(fig, results):
    """M of the last layer, without the loss and with it; marked is each entry that breaks a constraint, at alpha 1."""
    from matplotlib.colors import LogNorm
    variants = [variant for variant in ("plain", "erc-1") if ("n16", variant, 0) in results]
    for ax, variant in zip(fig.subplots(1, 2), variants):
        M = results["n16", variant, 0]["weights"][-1]["M"][-1]
        n, own = len(M), [row[i] for i, row in enumerate(M)]
        image = ax.imshow([[M[i][j] / min(own[i], own[j]) for j in range(n)] for i in range(n)], cmap="YlOrBr",
                          norm=LogNorm(0.25, 5))
        rows, columns = ([(j, i) for i in range(n) for j in range(n) if M[i][j] > own[(i, j)[k]]] for k in (0, 1))
        for name, entries, marker in (("row", rows, "_"), ("column", columns, "|")):
            ax.plot(*zip(*entries) if entries else ([], []), marker, color="black", markersize=7,
                    label=f"breaks the constraint of its {name}")
        ax.set(xlabel="expert j", ylabel="row R[i]", xticks=range(0, n, 5), yticks=range(0, n, 5),
               title=f"{NAMES[variant]}, last layer; broken are {len(rows)} of\n{n * (n - 1)} constraints of rows,"
                     f" {len(columns)} of {n * (n - 1)} of columns")
        ax.grid(False)
    if variants:
        bar = fig.colorbar(image, ax=fig.axes, ticks=[0.25, 0.5, 1, 2, 4], format="{x:g}", extend="both")
        bar.minorticks_off()
        bar.set_label("M[i,j] / smaller of M[i,i], M[j,j]")
        fig.legend(*fig.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return bool(variants)


R = torch.tensor([[3.0, 1.0], [1.0, 3.0], [-2.0, 2.0]])                                # the README's example
W_g = torch.tensor([[[1.0, 0.0], [0.0, 0.2]], [[0.0, 0.7], [0.9, 0.0]], [[0.5, 0.0], [0.0, 1.0]]])


def example():
    """M, and what in it is above the diagonal, for the README's draw of the noise -> two tensors [3, 3]."""
    M = activation_norms(perturb(R, noise_bound(R), torch.Generator().manual_seed(0)), W_g)
    own = M.diagonal()
    return M, (torch.relu(M - own[:, None]) + torch.relu(M - own[None, :])).fill_diagonal_(0)


def steps(fig, _):
    """The three steps on the README's example of three experts in two dimensions."""
    perturbed, *maps = fig.subplots(1, 3)
    for i, (colour, _) in enumerate(LINES[:3]):
        draws = torch.stack([perturb(R, noise_bound(R), torch.Generator().manual_seed(s))[i] for s in range(200)])
        perturbed.plot(*draws.T.tolist(), ".", color=colour, markersize=2, alpha=0.5)
        perturbed.annotate("", R[i].tolist(), (0, 0), arrowprops=dict(arrowstyle="->", color=colour, linewidth=1.6))
        perturbed.annotate(f"R[{i}]", R[i].tolist(), xytext=(4, -3), textcoords="offset points",
                           bbox=dict(facecolor="white", edgecolor="none", alpha=0.8, pad=1))
    perturbed.set(title="1. perturb: 200 draws\nof each proxy", xlim=(-3.6, 5), ylim=(-0.5, 5), aspect="equal")
    for ax, values, most, title in zip(maps, example(), (4, 1), (
            "2. probe: M, response of\nexpert j to proxy i", "3. hinge: excess over the\ndiagonal, row and column")):
        ax.imshow(values.tolist(), cmap="YlOrBr", vmin=0, vmax=most)
        for i, j in ((i, j) for i in range(3) for j in range(3)):
            ax.text(j, i, f"{values[i, j]:.2f}", ha="center", va="center", fontweight="bold" if i == j else None)
        ax.set(title=title, xlabel="expert j", ylabel="proxy i", xticks=range(3), yticks=range(3))
        ax.grid(False)


FIGURES = dict(premise=(premise_figure, (8, 3.2)), violations=(violations, (8, 2.7)), coupling=(coupling, (8, 4.2)),
               steps=(steps, (8, 2.6)))


def draw(results, folder):
    folder.mkdir(exist_ok=True)
    for name, (fill, size) in FIGURES.items():
        picture(folder / f"{name}.png", lambda fig, fill=fill: fill(fig, results), size)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--write", action="store_true", help="fill the tables of the texts, and draw the figures")
    options, results = parser.parse_args(argv), Results()
    if not results:
        raise UserError("there are no results; run: python experiments/reproduce.py")
    for name, make in TABLES.items():
        print(f"\n## {name}\n\n{make(results)}")
    if options.write:
        for path in TEXTS:
            path.write_text(filled(path.read_text(encoding="utf-8"), results), encoding="utf-8")
        draw(results, RESULTS / "figures")
    return 0


if __name__ == "__main__":
    sys.exit(prepare_data.run_program(main))
