"""Tables and figures of the comparison, from its result files alone; trains nothing.

    python experiments/report.py              # prints every table, and says which runs are missing
    python experiments/report.py --write      # also puts them into README.md and results/README.md, and draws figures

A table stands in a text below a line `<!-- table: NAME -->`. --write puts it there, or replaces it. The figures go to
results/figures and need matplotlib.

Differences are deltas to plain, paired by seed: the same seed has the same batches and initial weights. Behind ± stands
the standard deviation over seeds, in square brackets the 95% confidence interval of the mean by Student's t. Detectable
is the smallest delta that so many seeds, with this spread, would find in about 80 of 100 cases.
"""

import argparse
import json
import math
import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to be run as it stands, from any folder

import bench
import reproduce
from reproduce import RESULTS, SUITES

import prepare_data
from prepare_data import UserError

ROOT = Path(__file__).resolve().parents[1]
BENCH = RESULTS / "bench-cpu-2-cores.json"
TEXTS = (ROOT / "README.md", RESULTS / "README.md")
T_975 = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776}  # Student's t by degrees of freedom
T_80 = {1: 1.376, 2: 1.061, 3: 0.978, 4: 0.941}
NAMES = {
    "plain": "plain MoE", "erc-1": "ERC, alpha 1", "erc-0.5": "ERC, alpha 0.5", "aoe": "Autonomy-of-Experts",
    "dense": "dense", "no-noise": "ERC without noise", "closed-form": "ERC, noise in closed form",
    "orthogonal": "router orthogonalisation", "plain-z": "plain MoE, z-loss", "erc-1-z": "ERC, alpha 1, z-loss",
    "probe-up": "(b) R~ W_p", "probe-silu": "(c) SiLU(R~ W_g)", "probe-swiglu": "(d) SiLU(R~ W_g) * R~ W_p",
    "probe-output": "(e) output", **{f"erc-{alpha}": f"ERC, alpha {alpha}" for alpha in (0, 0.4, 0.6, 0.8, 2, 3)},
}


class Results(dict):
    """{(suite, variant, seed): result} of all finished runs."""

    def __init__(self):
        for suite in SUITES:
            for path in sorted((RESULTS / suite).glob("*.json")):
                result = reproduce.load(path)
                self[suite, result["variant"], result["seed"]] = result
            for what in ("dtype", "torch", "data"):
                found = {self[job][what] for job in self if job[0] == suite}
                if len(found) > 1:
                    raise UserError(f"the results of {suite} differ in {what}: {', '.join(map(str, found))}; move those"
                                    " of one kind away, and run them again")
        names = [f"{suite}/{variant}" for suite in SUITES for variant in SUITES[suite].variants]
        self.missing = [job for job in reproduce.jobs(names) if job not in self]

    def seeds(self, suite, variant):
        return sorted(seed for s, v, seed in self if (s, v) == (suite, variant))

    def values(self, suite, variant, of):
        """of(result) for each seed."""
        return [of(self[suite, variant, seed]) for seed in self.seeds(suite, variant)]

    def paired(self, suite, variant, of, against="plain"):
        """of(result) less that of another variant, for each seed that both have."""
        return [of(self[suite, variant, seed]) - of(self[suite, against, seed])
                for seed in self.seeds(suite, variant) if (suite, against, seed) in self]


def last(name):
    """A function of a result: its last logged value."""
    return lambda result: result["log"][-1][name]


def weights(name, step=-1):
    """A function of a result: the mean over layers of what was measured in the weights at the end, or at `step`."""
    return lambda result: statistics.mean(result["weights"][step][name])


# ---- Numbers as text ----


def mean_sd(values, form="{:.4f}"):
    """"mean ± standard deviation", or the mean alone of a single value."""
    if len(values) < 2:
        return form.format(values[0]) if values else ""
    return f"{form.format(statistics.mean(values))} ± {form.format(statistics.stdev(values))}"


def mean(values, form="{:.2f}"):
    return form.format(statistics.mean(values)) if values else ""


def standard_error(values):
    return statistics.stdev(values) / math.sqrt(len(values))


def bounds(values):
    """(lower, upper) end of the 95 % confidence interval of the mean."""
    half = T_975[len(values) - 1] * standard_error(values)
    return statistics.mean(values) - half, statistics.mean(values) + half


def delta(values, form="{:+.4f}"):
    """"mean [95% CI]", from two values on."""
    if len(values) < 2:
        return ""
    low, high = bounds(values)
    return f"{form.format(statistics.mean(values))} [{form.format(low)}, {form.format(high)}]"


def detectable(values, form="{:.4f}"):
    """The smallest delta that a paired t-test at 5 % would find with a power of 80 %."""
    df = len(values) - 1
    return form.format((T_975[df] + T_80[df]) * standard_error(values)) if df > 0 else ""


def table(*rows):
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


# ---- Tables ----


def main_table(results, *jobs):
    """Quality and coupling of some (suite, variant). Other suites than n16 are named."""
    rows = [("", "seeds", "val_ce", "delta to plain [95% CI]", "detectable", "agreement", "violated", "coupling",
             "smallest alpha", "epsilon")]
    for suite, variant in jobs:
        if not results.seeds(suite, variant):
            continue
        values = lambda of, suite=suite, variant=variant: results.values(suite, variant, of)
        pairs, judged = results.paired(suite, variant, last("val_ce")), reproduce.has_router(variant)
        rows.append((
            NAMES[variant] if suite == "n16" else f"`{suite}`: {NAMES[variant]}", len(results.seeds(suite, variant)),
            mean_sd(values(last("val_ce"))),
            *(("", "") if variant == "plain" else (delta(pairs), detectable(pairs))),
            mean(values(last("agreement")), "{:.0%}") if variant != "dense" else "",
            *((mean(values(last("violated")), "{:.0%}"), mean(values(last("coupling"))),
               mean(values(weights("smallest_alpha"))), mean(values(last("epsilon")), "{:.3f}")) if judged
              else ("", "", "", ""))))
    return table(*rows)


def decoupled_table(results):
    """The paper's Table 2: the ERC loss of the trained plain model, clean R, by layer, at alpha 1 to 5."""
    rows = [("", "layer", *(f"alpha {alpha}" for alpha in range(1, 6)), "smallest alpha")]
    for name, layer, values in (("the paper's, 3B", "first", "0.87 0.69 0.26 0 0"), ("", "middle", "0.22 0.15 0 0 0"),
                                ("", "last", "0.50 0.44 0.20 0.20 0")):
        rows.append((name, layer, *values.split(), "4 to 5" if layer == "last" else ""))
    for suite in ("n16", "n64", "text"):
        ends = results.values(suite, "plain", lambda result: result["weights"][-1])
        for layer in range(len(ends[0]["loss"]) if ends else 0):
            losses = zip(*(end["loss"][layer] for end in ends))
            rows.append(("" if layer else f"`{suite}`", layer + 1, *(f"{statistics.mean(loss):.4f}" for loss in losses),
                         mean([end["smallest_alpha"][layer] for end in ends])))
    return table(*rows)


def norms_table(results, suite="n16"):
    """The paper's Table 3: norms over experts, mean and standard deviation, and the ERC loss, by layer."""
    rows = [("", "layer", "norm of R[i], plain", "ERC", "norm of W_g[i], plain", "ERC", "ERC loss, plain", "ERC")]
    paper = (("first", "1.85 ± 0.39", "1.67 ± 0.31", "0.87"), ("middle", "0.86 ± 0.08", "0.83 ± 0.07", "0.22"),
             ("last", "0.80 ± 0.14", "0.73 ± 0.10", "0.50"))
    for i, (layer, plain, erc, loss) in enumerate(paper):
        norms = ("", "") if i else ("30.5", "29.8")
        rows.append(("" if i else "the paper's, 3B", layer, plain, erc, *norms, loss, "0"))
    ends = [results.values(suite, variant, lambda result: result["weights"][-1]) for variant in ("plain", "erc-1")]
    pair = lambda which, name, layer: "{:.2f} ± {:.2f}".format(
        *(statistics.mean(end[name][layer][i] for end in which) for i in (0, 1)))
    for layer in range(len(ends[0][0]["loss"]) if all(ends) else 0):
        rows.append((f"`{suite}`" if layer == 0 else "", layer + 1,
                     *(pair(which, name, layer) for name in ("norm_R", "norm_W") for which in ends),
                     *(f"{statistics.mean(end['loss'][layer][0] for end in which):.4f}" for which in ends)))
    return table(*rows)


def weights_table(results, suite="n16"):
    """What else the loss does to the weights and to the load."""
    rows = [("", "mean cosine of rows of R", "columns of W_g: within / between experts", "experts without a token",
             "balance loss, delta to plain [95% CI]")]
    late = lambda result: statistics.mean(row["balance"] for row in result["log"][len(result["log"]) // 2:])
    for variant in ("plain", "erc-1", "erc-0.5", "no-noise", "orthogonal"):
        if not results.seeds(suite, variant):
            continue
        values = lambda of, variant=variant: results.values(suite, variant, of)
        rows.append((NAMES[variant], mean(values(weights("cosine"))), mean(values(weights("neurons"))),
                     mean(values(last("dead"))),
                     delta(results.paired(suite, variant, late)) if variant != "plain" else ""))
    return table(*rows)


def noise_table(results, suite="n16"):
    """The three ways to take the noise, at the start and at the end."""
    rows = [("trained with", "at", "ERC loss, clean R", "closed form", "mean of 64 draws", "sd of a layer's draws",
             "constraints broken under noise", "gradient in an expert's W_g")]
    part = lambda name, i, step: lambda result: statistics.mean(layer[i] for layer in result["weights"][step][name])
    for variant, step in (("plain", 0), ("plain", -1), ("erc-1", -1), ("no-noise", -1), ("closed-form", -1)):
        if results.seeds(suite, variant):
            values = lambda of, variant=variant: results.values(suite, variant, of)
            rows.append((NAMES[variant], "end" if step else "start",
                         *(mean(values(part("noise", i, step)), "{:.4f}") for i in range(4)),
                         mean(values(weights("noisy", step)), "{:.1%}"),
                         " to ".join(mean(values(part("touched", i, step)), "{:.4f}") for i in (0, 1))))
    return table(*rows)


ALL = [("n16", "", "16 experts, grammar"), ("n16", "-z", "the same, with z-loss 0.001"),
       ("n16-slow", "", "the same, decay 0.1 everywhere"), ("n64", "", "64 experts, grammar"),
       ("text", "", "32 experts, source code")]


def short_table(results):
    """The README's: quality, and whether tokens follow, with ERC and without."""
    rows = [("", "seeds", "val_ce, plain", "ERC, alpha 1: delta [95% CI]", "alpha 0.5: delta [95% CI]",
             "agreement, plain", "alpha 1", "alpha 0.5")]
    for suite, ending, title in ALL:
        plain, one, half = names = [name + ending for name in ("plain", "erc-1", "erc-0.5")]
        ones, halves = (results.paired(suite, name, last("val_ce"), plain) for name in (one, half))
        if ones and suite != "n16-slow":
            rows.append((title, len(ones), mean(results.values(suite, plain, last("val_ce")), "{:.4f}"), delta(ones),
                         delta(halves), *(mean(results.values(suite, name, last("agreement")), "{:.0%}")
                                          for name in names)))
    return table(*rows)


def agreement_table(results):
    """Do tokens follow? With the paper's initial weights, with larger ones, with a z-loss, on text."""
    rows = [("", "plain", "ERC, alpha 1", "delta, points [95% CI]", "ERC, alpha 0.5", "delta, points [95% CI]")]
    for suite, ending, title in ALL:
        cells = [mean(results.values(suite, f"plain{ending}", last("agreement")), "{:.0%}")]
        for variant in ("erc-1", "erc-0.5"):
            pairs = [100 * value for value in
                     results.paired(suite, variant + ending, last("agreement"), f"plain{ending}")]
            cells.append(mean(results.values(suite, variant + ending, last("agreement")), "{:.0%}"))
            cells.append(delta(pairs, "{:+.1f}"))
        rows.append((title, *cells))
    return table(*rows)


def bench_table(section):
    """The first table of a section of the benchmark."""
    if not BENCH.exists():
        return "(needs python experiments/bench.py)"
    shown = bench.SECTIONS[section][1](json.loads(BENCH.read_text(encoding="utf-8"))[section])
    return [part for part in shown.split("\n\n") if part.startswith("|")][0]


def n16_table(*names, others=()):
    return lambda results: main_table(results, *(("n16", name) for name in names),
                                      *((suite, name) for suite in others for name in SUITES[suite].variants))


TABLES = {
    "short": short_table,
    "main": n16_table("plain", "erc-1", "erc-0.5", "aoe", "dense", "plain-z", "erc-1-z",
                      others=("n16-slow", "n64", "text")),
    "decoupled": decoupled_table, "norms": norms_table, "weights": weights_table,
    "alphas": n16_table(*(f"erc-{alpha}" for alpha in ("0", "0.4", "0.6", "0.8", "2", "3"))),
    "probes": n16_table("erc-1", "probe-up", "probe-silu", "probe-swiglu", "probe-output", "no-noise", "closed-form",
                        "orthogonal"),
    "noise": noise_table, "agreement": agreement_table,
    "bench-step": lambda _: bench_table("step"), "bench-erc": lambda _: bench_table("erc"),
}
MARK = re.compile(r"(<!-- table: ([\w-]+) -->\n)((?:[|(].*\n)*)")  # a table, or a line in brackets that stands for it


def filled(text, results):
    """The text, with every marked table as the result files give it."""
    make = lambda name: TABLES[name](results) if results or name.startswith("bench") else "(not run yet)"
    return MARK.sub(lambda match: f"{match[1]}{make(match[2])}\n", text)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--write", action="store_true", help="fill the tables of the texts, and draw the figures")
    options, results = parser.parse_args(argv), Results()
    if not results:
        raise UserError("there are no results; run: python experiments/reproduce.py")
    for name, make in TABLES.items():
        print(f"\n## {name}\n\n{make(results)}")
    for suite, variant, seed in results.missing:
        print(f"missing: {suite}/{variant}, seed {seed}", file=sys.stderr)
    if options.write:
        for path in TEXTS:
            path.write_text(filled(path.read_text(encoding="utf-8"), results), encoding="utf-8")
        import figures

        figures.draw(results)
    return 0


if __name__ == "__main__":
    sys.exit(prepare_data.run_program(main))
