"""Tables and figures of the comparison, from its result files alone; trains nothing.

    python experiments/report.py              # prints every table, says what is still missing
    python experiments/report.py --write      # also puts them into README.md and results/README.md, and draws figures

A table stands in a text below a line `<!-- table: NAME -->`, up to the next empty line; --write replaces it there. The
figures go to results/figures and need matplotlib (pip install matplotlib).

Differences to plain are paired: the same seed has the same batches and initial weights, so the difference is taken seed
by seed, and then averaged. Behind ± stands the standard deviation over seeds; in brackets the 95 % confidence interval
of the mean (Student's t).
"""

import json
import math
import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to be run as it stands, from any folder

import reproduce
from reproduce import RESULTS, SUITES, VARIANTS

import prepare_data
from prepare_data import UserError

ROOT = Path(__file__).resolve().parents[1]
TEXTS = (ROOT / "README.md", RESULTS / "README.md")
T_975 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78}  # of Student's t, by degrees of freedom
NAMES = {
    "plain": "plain MoE", "erc-1": "**ERC, alpha 1**", "erc-0.5": "ERC, alpha 0.5", "erc-0": "ERC, alpha 0",
    "erc-2": "ERC, alpha 2", "erc-3": "ERC, alpha 3", "erc-1-no-noise": "ERC without noise",
    "erc-1-expected": "ERC, noise in closed form", "erc-1-float32": "ERC in float32", "dense": "dense",
    "aoe": "Autonomy-of-Experts", "orthogonal": "router orthogonalisation", "centred-1": "centred proxies (ours)",
    "centred-0.5": "centred proxies, alpha 0.5", "plain-half": "plain MoE", "erc-1-half": "ERC, alpha 1",
    "probe-up": "probe: up projection", "probe-swiglu": "probe: after SwiGLU", "probe-output": "probe: output",
}


class Results(dict):
    """{(suite, variant, seed): result} of all finished runs."""

    def __init__(self):
        for suite in SUITES:
            for path in sorted((RESULTS / suite).glob("*-[0-9].json")):
                result = reproduce.load(path)
                self[suite, result["variant"], result["seed"]] = result
            self.missing = []
        for name in (f"{suite}/{variant}" for suite in ("n16", "n64") for variant in SUITES[suite].names):
            self.missing += [job for job in reproduce.jobs([name]) if job not in self]

    def seeds(self, suite, variant):
        return sorted(seed for s, v, seed in self if (s, v) == (suite, variant))

    def variants(self, suite):
        return [variant for variant in SUITES[suite].names if self.seeds(suite, variant)]

    def values(self, suite, variant, of):
        """of(result) for each seed; None where a variant has no such thing."""
        return [of(self[suite, variant, seed]) for seed in self.seeds(suite, variant)]

    def paired(self, suite, variant, of, against=None):
        """of(result) less that of plain, for each seed that both have; half as long ones have their own plain."""
        against = against or ("plain" if VARIANTS[variant].length == 1 else "plain-half")
        return [of(self[suite, variant, seed]) - of(self[suite, against, seed])
                for seed in self.seeds(suite, variant) if (suite, against, seed) in self]


def last(name):
    """A function of a result: its last logged value."""
    return lambda result: result["log"][-1].get(name)


def layers(name, step=-1):
    """A function of a result: the mean over layers of what was measured at the end (step -1) or the beginning (0)."""
    def of(result):
        values = result["watched"][step].get(name)
        return None if values is None or None in values else statistics.mean(values)
    return of


def mean_sd(values, form="{:.3f}"):
    """"mean ± standard deviation", or "" where there is nothing."""
    if not values or None in values:
        return ""
    if len(values) == 1:
        return form.format(values[0])
    return f"{form.format(statistics.mean(values))} ± {form.format(statistics.stdev(values))}"


def mean(values, form="{:.2f}"):
    return "" if not values or None in values else form.format(statistics.mean(values))


def late_balance(result):
    """Mean balance loss over the second half of the log."""
    return statistics.mean(row["balance"] for row in result["log"][len(result["log"]) // 2:])


def neuron_ratio(result):
    """Squared cosine of two neurons of one expert / of two experts, mean over layers."""
    return statistics.mean(within / between for within, between in result["watched"][-1]["neurons"])


def bounds(values):
    """(lower, upper) end of the 95 % confidence interval of the mean."""
    half = T_975[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values) - half, statistics.mean(values) + half


def interval(values, form="{:+.4f}"):
    """"mean (95 % confidence interval)"."""
    if len(values) < 2:
        return ""
    low, high = bounds(values)
    return f"{form.format(statistics.mean(values))} ({form.format(low)} to {form.format(high)})"


def table(*rows):
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


# ---- Tables ----


def cost_ratios():
    """{variant: (time / plain's, memory / plain's)} of cost.json, as text; empty where it is not measured."""
    path = RESULTS / "n16" / "cost.json"
    if not path.exists():
        return {}
    cost = json.loads(path.read_text(encoding="utf-8"))
    plain = cost["seconds"]["plain"], sum(cost["bytes"]["plain"].values())
    return {name: (f"{statistics.median(a / b for a, b in zip(cost['seconds'][name], plain[0])):.2f}",
                   f"{sum(cost['bytes'][name].values()) / plain[1]:.2f}") for name in cost["seconds"]}


def main_table(results, suite="n16"):
    """What came of each variant."""
    costs = cost_ratios() if suite == "n16" else {}
    rows = [("", "seeds", "val_ce", "less plain's, paired (95 %)", "time", "memory", "violated", "coupling",
             "agreement", "information")]
    for variant in results.variants(suite):
        values = lambda of, variant=variant: results.values(suite, variant, of)
        half = VARIANTS[variant].length < 1
        routed = reproduce.has_router(variant) and variant != "dense"
        rows.append((
            NAMES[variant] + (", half as long" if half else ""), len(results.seeds(suite, variant)),
            mean_sd(values(last("val_ce")), "{:.4f}"),
            interval(results.paired(suite, variant, last("val_ce"))) if "plain" not in variant else "",
            *costs.get(variant, ("", "")), mean(values(last("violated")), "{:.0%}") if routed else "",
            mean(values(last("coupling"))) if routed else "",
            mean(values(last("agreement")), "{:.0%}") if variant != "dense" else "",
            mean(values(layers("information"))) if variant != "dense" else ""))
    if not costs:
        rows = [row[:4] + row[6:] for row in rows]
    return table(*rows)


def weights_table(results, suite="n16"):
    """What the loss does to the weights and to the load."""
    rows = [("", "norm of R's rows, start to end", "spread of these norms", "norm of W_g[j], start to end", "epsilon",
             "router cosine", "neurons, within / between", "max_load", "dead", "balance less plain's, paired (95 %)")]
    for variant in results.variants(suite):
        if not reproduce.has_router(variant) or variant == "dense":
            continue
        values = lambda of, variant=variant: results.values(suite, variant, of)
        rows.append((
            NAMES[variant], f"{mean(values(layers('norm_R', 0)))} to {mean(values(layers('norm_R')))}",
            mean(values(layers("spread_R"))),
            f"{mean(values(layers('norm_W', 0)))} to {mean(values(layers('norm_W')))}", mean(values(last("epsilon"))),
            mean(values(layers("router_cosine"))), mean(values(neuron_ratio)), mean(values(last("max_load"))),
            mean(values(last("dead"))),
            interval(results.paired(suite, variant, late_balance)) if "plain" not in variant else ""))
    return table(*rows)


def tokens_table(results, suite="n16"):
    """What the loss does to real tokens, over training and over layers."""
    rows = [("", "agreement at the start", "a quarter in", "half-way", "three quarters", "end", "end, by layer",
             "among the K", "response", "cosine to R", "centre to R", "both less their means", "violated by centres")]
    for variant in results.variants(suite):
        if variant == "dense":
            continue
        values = lambda of, variant=variant: results.values(suite, variant, of)
        count = len(results[suite, variant, 0]["watched"])
        over = [mean(values(layers("agreement", i)), "{:.0%}") for i in range(count)]
        over = over if count == 5 else [over[0], over[1], over[2], "", ""]
        by_layer = zip(*values(lambda result: result["watched"][-1]["agreement"]))
        rows.append((
            NAMES[variant], *over, ", ".join(f"{statistics.mean(layer):.0%}" for layer in by_layer),
            mean(values(layers("within")), "{:.0%}"), mean(values(layers("response"))), mean(values(layers("cosine"))),
            mean(values(layers("centre"))), mean(values(layers("relative"))),
            mean(values(layers("centred")), "{:.0%}")))
    return table(*rows)


def noise_table(results, suite="n16"):
    """The three ways to take the noise: is the closed form the mean of the draws, and how much do draws matter?"""
    rows = [("trained with", "at", "without noise", "closed form", "mean of 64 draws", "sd of draws",
             "grad_norm, mean over the run", "its sd over the last half", "val_ce, sd over seeds")]
    half = lambda name: lambda result: [row[name] for row in result["log"][len(result["log"]) // 2:]]
    for variant in ("erc-1", "erc-1-no-noise", "erc-1-expected", "plain"):
        if variant not in results.variants(suite):
            continue
        values = lambda of, variant=variant: results.values(suite, variant, of)
        drawn = lambda i, step: lambda result: statistics.mean(pair[i] for pair in result["watched"][step]["drawn"])
        for step, name in ((0, "start"), (-1, "end")):
            ends = ("", "", "") if step == 0 else (
                mean(values(lambda result: statistics.mean(row["grad_norm"] for row in result["log"]))),
                mean(values(lambda result: statistics.stdev(half("grad_norm")(result)))),
                f"{statistics.stdev(values(last('val_ce'))):.4f}" if len(values(last("val_ce"))) > 1 else "")
            rows.append((NAMES[variant] if step == 0 else "", name, mean(values(layers("none", step)), "{:.4f}"),
                         mean(values(layers("expected", step)), "{:.4f}"), mean(values(drawn(0, step)), "{:.4f}"),
                         mean(values(drawn(1, step)), "{:.4f}"), *ends))
    return table(*rows)


# ---- The paper's claims ----


def verdict_of(values, wanted):
    """Of paired differences: whether they lie below 0, above 0, or (wanted: 0) are not told from 0."""
    low, high = bounds(values)
    if wanted == 0:
        return "seen" if low <= 0 <= high else "contradicted"
    if low <= 0 <= high:
        return "not seen at this scale"
    return "seen" if (high < 0) == (wanted < 0) else "contradicted"


def claims_table(results):
    """The paper's claims, each with its number here (n=16), and a verdict that follows from the number."""
    if any(suite == "n16" for suite, _, _ in results.missing):
        return "(needs all runs of n16)"
    rows = [("claim", "in the paper", "here", "verdict")]
    of = lambda variant, what: statistics.mean(results.values("n16", variant, what))
    less = lambda variant, what, against=None: results.paired("n16", variant, what, against)
    erc, norms = of("erc-1", last("erc")), [of("erc-1", layers(name)) / of("plain", layers(name))
                                            for name in ("norm_R", "norm_W")]
    rows.append(("ERC falls to about 0, and not because norms of R and W_g collapse", "yes",
                 f"ERC {erc:.5f}; norm of R {norms[0]:.2f}, of W_g {norms[1]:.2f} times plain's",
                 "seen" if erc < 0.01 and min(norms) > 0.8 else "contradicted"))
    rows.append(("load balance stays as it is", "differences around 1e-5", interval(less("erc-1", late_balance)),
                 verdict_of(less("erc-1", late_balance), 0)))
    epsilons = [of(f"erc-{alpha}", last("epsilon")) for alpha in ("0", "0.5", "1", "2", "3")]
    rows.append(("epsilon moves with alpha", "yes",
                 "alpha 0, 0.5, 1, 2, 3: " + ", ".join(map("{:.2f}".format, epsilons)),
                 verdict_of(less("erc-0", last("epsilon"), "erc-3"), -1 if epsilons[0] < epsilons[-1] else 1)))
    for claim, paper, variant, against, wanted in (
            ("ERC (alpha 1) beats the plain MoE", "yes, from 3B parameters on", "erc-1", "plain", -1),
            ("ERC (alpha 0.5) beats the plain MoE", "at n=256", "erc-0.5", "plain", -1),
            ("noise matters: val_ce with it less that without", "most of the gain", "erc-1", "erc-1-no-noise", -1),
            ("alpha 3 is nearly the plain MoE", "yes", "erc-3", "plain", 0),
            ("router orthogonalisation alone does little", "yes", "orthogonal", "plain", 0),
            ("Autonomy-of-Experts beats the plain MoE", "yes", "aoe", "plain", -1)):
        pairs = less(variant, last("val_ce"), against)
        rows.append((claim, paper, interval(pairs), verdict_of(pairs, wanted)))
    cosine = of("plain", layers("router_cosine"))
    rows.append(("the plain router is already near-orthogonal", "mean cosine about 0.15", f"{cosine:.2f}",
                 "seen" if cosine < 0.25 else "contradicted"))
    clusters = less("erc-1", neuron_ratio)
    rows.append(("experts' parameters form clusters", "t-SNE, by eye",
                 f"neurons' squared cosine within / between experts {of('erc-1', neuron_ratio):.2f}, plain"
                 f" {of('plain', neuron_ratio):.2f}", verdict_of(clusters, 1)))
    if costs := cost_ratios():
        rows.append(("ERC costs next to nothing", "0.2 to 0.8 % of the step", f"{costs['erc-1'][0]} times plain's step",
                     "seen" if float(costs["erc-1"][0]) < 1.05 else "not seen at this scale"))
        rows.append(("Autonomy-of-Experts costs a lot", "1.6 times time, 1.3 times memory",
                     f"{costs['aoe'][0]} times time, {costs['aoe'][1]} times memory",
                     "seen" if float(costs["aoe"][0]) > 1.15 else "not seen at this scale"))
    return table(*rows)


TABLES = {
    "claims": claims_table, "main": main_table, "main-n64": lambda results: main_table(results, "n64"),
    "weights": weights_table, "weights-n64": lambda results: weights_table(results, "n64"),
    "tokens": tokens_table, "tokens-n64": lambda results: tokens_table(results, "n64"), "noise": noise_table,
}
MARK = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(?=\n\n|\Z)", re.DOTALL)


def filled(text, results):
    """The text, with every marked table as the result files give it."""
    return MARK.sub(lambda match: match[1] + TABLES[match[2]](results), text)


def main(argv):
    parser = prepare_data.Parser(prog="report.py", description=__doc__.splitlines()[0])
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
    sys.exit(prepare_data.run(main))
