"""Tables and figures of the comparison, from its result files alone; trains nothing.

    python experiments/report.py              # prints every table, says what is still missing
    python experiments/report.py --write      # also puts them into README.md and results/README.md, and draws figures

A table stands in a text below a line `<!-- table: NAME -->`, up to the next empty line; --write replaces it there. The
figures go to results/figures and need matplotlib (pip install matplotlib).

Differences to plain are paired: the same seed has the same batches and initial weights, so the difference is taken
seed by seed, and then averaged. Behind ± stands the standard deviation over seeds; in brackets, from three seeds on,
the 95 % confidence interval of the mean (Student's t). Pairing shares data and beginning, not the noise of a run: a
difference in the last bit of one step is enough for another end. And all rows share plain's seeds, hence their luck.
"""

import json
import math
import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to be run as it stands, from any folder

import bench
import reproduce
from reproduce import RESULTS, SUITES, VARIANTS

import prepare_data
from prepare_data import UserError

ROOT = Path(__file__).resolve().parents[1]
BENCH = RESULTS / "bench-cpu-2-cores.json"
TEXTS = (ROOT / "README.md", RESULTS / "README.md")
T_975 = {2: 4.30, 3: 3.18, 4: 2.78}  # of Student's t, by degrees of freedom
NAMES = {
    "plain": "plain MoE", "erc-1": "**ERC, alpha 1**", "erc-0.5": "ERC, alpha 0.5", "erc-0": "ERC, alpha 0",
    "erc-2": "ERC, alpha 2 (placebo)", "erc-3": "ERC, alpha 3", "erc-1-no-noise": "ERC without noise",
    "erc-1-expected": "ERC, noise in closed form", "erc-1-float32": "ERC, trained in float32", "dense": "dense",
    "aoe": "Autonomy-of-Experts", "aoe-no-z": "Autonomy-of-Experts without z-loss",
    "plain-no-z": "plain MoE without z-loss", "erc-1-no-z": "ERC, alpha 1, without z-loss",
    "erc-0.5-no-z": "ERC, alpha 0.5, without z-loss",
    "orthogonal": "router orthogonalisation", "centred-1": "centred proxies (ours)",
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
        for of in ("dtype", "torch", "floor"):
            for suite in SUITES:
                found = {self[job][of] for job in self if job[0] == suite and job[1] != "erc-1-float32"}
                if len(found) > 1:
                    raise UserError(f"the results of {suite} differ in {of}: {', '.join(map(str, found))}; move"
                                    " those of one kind away, and run them again")
        names = [f"{suite}/{variant}" for suite in ("n16", "n64") for variant in SUITES[suite].names]
        self.missing = [job for job in reproduce.jobs(names) if job not in self]

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
    if len(values) < 3:
        return ""
    low, high = bounds(values)
    return f"{form.format(statistics.mean(values))} ({form.format(low)} to {form.format(high)})"


def table(*rows):
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


# ---- Tables ----


def cost_ratios():
    """{variant: (time / plain's, memory / plain's)} of cost.json, two floats; empty where it is not measured."""
    path = RESULTS / "n16" / "cost.json"
    if not path.exists():
        return {}
    cost = json.loads(path.read_text(encoding="utf-8"))
    times, memory = cost["seconds"], {name: sum(kept.values()) for name, kept in cost["bytes"].items()}
    return {name: (statistics.median(a / b for a, b in zip(times[name], times["plain"])),
                   memory[name] / memory["plain"]) for name in times}


def main_table(results, suite="n16", length=1.0, only=None):
    """What came of each variant (or of `only` these), of those as long as `length` times the suite's steps."""
    costs = cost_ratios() if suite == "n16" else {}
    rows = [("", "seeds", "val_ce", "/ floor", "less plain's, paired (95 %)", "time", "memory", "violated", "coupling",
             "agreement", "information")]
    for variant in results.variants(suite):
        if VARIANTS[variant].length != length or only and variant not in only:
            continue
        values = lambda of, variant=variant: results.values(suite, variant, of)
        judged = reproduce.has_coupling(variant) and not variant.startswith(("centred", "probe"))  # by another M
        rows.append((
            NAMES[variant], len(results.seeds(suite, variant)),
            mean_sd(values(last("val_ce")), "{:.4f}"),
            mean(values(lambda result: result["log"][-1]["val_ce"] / result["floor"]), "{:.3f}"),
            interval(results.paired(suite, variant, last("val_ce")))
            if variant not in ("plain", "plain-half", "erc-1-float32") else "",
            *([f"{ratio:.2f}" for ratio in costs.get(variant, ())] or ("", "")),
            mean(values(last("violated")), "{:.0%}") if judged else "",
            mean(values(last("coupling"))) if judged else "",
            mean(values(last("agreement")), "{:.0%}") if variant != "dense" else "",
            mean(values(layers("information"))) if variant != "dense" else ""))
    if not costs:
        rows = [row[:5] + row[7:] for row in rows]
    return table(*rows)


def weights_table(results, suite="n16"):
    """What the loss does to the weights and to the load."""
    rows = [("", "norm of R's rows, start to end", "spread of these norms", "norm of W_g[j], start to end", "epsilon",
             "router cosine", "neurons, within / between", "max_load", "dead", "balance less plain's, paired (95 %)")]
    for variant in results.variants(suite):
        if not reproduce.has_coupling(variant):
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
             "among the K", "response", "in their mean", "cosine to R", "centre to R", "both less their means",
             "violated by centres", "information, by layer")]
    for variant in results.variants(suite):
        if variant == "dense" or VARIANTS[variant].length != 1:
            continue
        values = lambda of, variant=variant: results.values(suite, variant, of)
        over = [mean(values(layers("agreement", i)), "{:.0%}") for i in range(5)]
        by_layer = zip(*values(lambda result: result["watched"][-1]["agreement"]))
        rows.append((
            NAMES[variant], *over, ", ".join(f"{statistics.mean(layer):.0%}" for layer in by_layer),
            mean(values(layers("within")), "{:.0%}"), mean(values(layers("response"))), mean(values(layers("common"))),
            mean(values(layers("cosine"))),
            mean(values(layers("centre"))), mean(values(layers("relative"))),
            mean(values(layers("centred")), "{:.0%}"),
            ", ".join(f"{statistics.mean(layer):.2f}" for layer in zip(*values(
                lambda result: result["watched"][-1]["information"])))))
    return table(*rows)


def of_pair(name, i, step):
    """A function of a result: the mean over layers of the i-th of two numbers that were measured."""
    return lambda result: statistics.mean(pair[i] for pair in result["watched"][step][name])


def noise_table(results, suite="n16"):
    """The three ways to take the noise: is the closed form the mean of the draws, and how much do draws matter?"""
    rows = [("trained with", "at", "ERC loss without noise", "closed form", "mean of 64 draws", "sd of a layer's draws",
             "gradient in an expert's W_g", "sd of grad_norm over seeds, same step")]
    for variant in ("erc-1", "erc-1-no-noise", "erc-1-expected", "plain"):
        norms = zip(*results.values(suite, variant, lambda result: [row["grad_norm"] for row in result["log"]]))
        spread = [statistics.stdev(step) for step in norms] if len(results.seeds(suite, variant)) > 1 else [0.0]
        for step, when in ((0, "start"), (-1, "end")):
            values = [mean(results.values(suite, variant, of), "{:.4f}") for of in (
                layers("none", step), layers("expected", step), of_pair("drawn", 0, step), of_pair("drawn", 1, step),
                of_pair("touched", 0, step), of_pair("touched", 1, step))]
            rows.append(("" if step else NAMES[variant], when, *values[:4], " to ".join(values[4:]),
                         f"{statistics.mean(spread):.3f}" if step else ""))
    return table(*rows)


# ---- The paper's claims ----


def verdict_of(values, wanted):
    """Of paired differences, by their interval: wanted -1, that they are below 0; +1, above; None, either of these."""
    low, high = bounds(values)
    if low <= 0 <= high:
        return "not seen at this scale"
    return "seen" if wanted is None or (high < 0) == (wanted < 0) else "contradicted"


def claims_table(results):
    """The paper's claims, each with its number here (n=16), and a verdict that follows from the number."""
    if any(suite == "n16" for suite, _, _ in results.missing):
        return "(needs all runs of n16)"
    rows = [("claim", "in the paper", "here", "verdict")]
    of = lambda variant, what: statistics.mean(results.values("n16", variant, what))
    less = lambda variant, what, against=None: results.paired("n16", variant, what, against)

    erc, norms = of("erc-1", last("erc")), [of("erc-1", layers(name)) / of("plain", layers(name))
                                            for name in ("norm_R", "norm_W")]
    rows.append(("ERC falls to about 0 (below 0.001), and norms do not collapse (above 0.8 of plain's)", "yes",
                 f"ERC {erc:.5f}; norm of R {norms[0]:.2f}, of W_g {norms[1]:.2f} of plain's",
                 "seen" if erc < 0.001 and min(norms) > 0.8 else "contradicted"))
    for claim, paper, variant, against, wanted in (
            ("ERC (alpha 1) beats the plain MoE", "yes, from 3B parameters on", "erc-1", "plain", -1),
            ("ERC (alpha 1) beats the placebo (alpha 2)", "yes", "erc-1", "erc-2", -1),
            ("ERC (alpha 0.5) beats the plain MoE", "yes, at n=256", "erc-0.5", "plain", -1),
            ("ERC (alpha 1) beats the plain MoE, both without z-loss", "yes; z-loss not stated", "erc-1-no-z",
             "plain-no-z", -1),
            ("with noise ERC is better than without", "most of the gain", "erc-1", "erc-1-no-noise", -1),
            ("router orthogonalisation does less than ERC", "yes", "orthogonal", "erc-1", 1),
            ("Autonomy-of-Experts beats the plain MoE", "yes", "aoe", "plain", -1)):
        pairs = less(variant, last("val_ce"), against)
        rows.append((claim, paper, "val_ce " + interval(pairs), verdict_of(pairs, wanted)))
    for alpha, with_z in ((1, True), (0.5, True), (1, False), (0.5, False)):
        end = "" if with_z else "-no-z"
        pairs = [100 * value for value in less(f"erc-{alpha}{end}", last("agreement"), f"plain{end}")]
        rows.append((f"tokens notice: agreement rises (alpha {alpha}, with{'' if with_z else 'out'} z-loss)",
                     "not reported", interval(pairs, "{:+.1f}") + " percentage points", verdict_of(pairs, 1)))
    fires = max(row["erc"] for seed in results.seeds("n16", "erc-3") for row in results["n16", "erc-3", seed]["log"])
    rows.append(("alpha 3 is nearly the plain MoE", "yes", f"its ERC loss is {fires:.5f} at most: it never acts",
                 "seen" if fires < 1e-5 else "contradicted"))
    balance = less("erc-1", late_balance)
    rows.append(("load balance stays as it is (no difference told from chance)", "yes: differences around 1e-5",
                 f"{interval(balance)}, before its weight of 0.01",
                 "seen" if verdict_of(balance, None) == "not seen at this scale" else "contradicted"))
    epsilons = ", ".join(f"{of(f'erc-{alpha}', last('epsilon')):.3f}" for alpha in ("0", "0.5", "1", "2", "3"))
    rows.append(("epsilon moves with alpha (0.5 against 3)", "yes", f"alpha 0, 0.5, 1, 2, 3: {epsilons}",
                 verdict_of(less("erc-0.5", last("epsilon"), "erc-3"), None)))
    cosine, chance = of("plain", layers("router_cosine")), math.sqrt(2 / math.pi / SUITES["n16"].moe.d_model)
    rows.append(("the plain router is near-orthogonal (below 0.25)", "mean cosine about 0.15",
                 f"mean absolute cosine {cosine:.2f}; chance is {chance:.2f}",
                 "seen" if cosine < 0.25 else "contradicted"))
    excess = [of(variant, neuron_ratio) - 1 for variant in ("plain", "erc-1", "erc-0.5")]
    rows.append(("experts' parameters cluster with ERC, not without (here: twice plain's excess)", "by eye, in t-SNE",
                 "squared cosine of neurons within an expert, above that between: plain {:.0%}, alpha 1 {:.0%}, alpha"
                 " 0.5 {:.0%}".format(*excess), "seen" if excess[1] > 2 * excess[0] else "not seen at this scale"))
    rows += cost_claims()
    return table(*rows)


def bench_table(section, i=0):
    """The i-th table of a section of the benchmark."""
    if not BENCH.exists():
        return "(needs python experiments/bench.py)"
    shown = bench.SECTIONS[section][1](json.loads(BENCH.read_text(encoding="utf-8"))[section])
    return [part for part in shown.split("\n\n") if part.startswith("|")][i]


def cost_claims():
    """Two more rows, from the benchmark and from cost.json; none where these were not measured."""
    costs = cost_ratios()
    if not BENCH.exists() or not costs:
        return []
    erc = json.loads(BENCH.read_text(encoding="utf-8"))["erc"]
    first = f"accumulate {erc['accumulate'][0]}"
    off, *on = (erc["seconds"][f"{first}, {state}"]
                for state in ("off", "acting, the loss itself", "coupled, the loss itself"))
    acting, coupled = (statistics.median(a / b for a, b in zip(times, off)) for times in on)
    small, (time, memory) = costs["erc-1"][0], costs["aoe"]
    return [("ERC costs next to nothing (below 3 %)", "0.2 to 0.8 % of a step",
             f"{acting:.1%} of a step of bench.py while constraints are broken, {coupled:.1%} once none is (of its"
             f" FLOPs {erc['predicted_share_of_step']:.1%}); {small - 1:+.1%} of the smaller one here",
             "seen" if max(acting, coupled, small - 1) < 0.03 else "not seen at this scale"),
            ("Autonomy-of-Experts costs a lot (half of that excess, or more)", "1.6 times time, 1.3 times memory",
             f"{time:.2f} times time, {memory:.2f} times memory",
             "seen" if time >= 1.3 and memory >= 1.15 else "not seen at this scale")]


SHORT = ("plain", "erc-1", "erc-0.5", "erc-2", "aoe", "dense", "centred-0.5", "plain-no-z", "erc-1-no-z",
         "erc-0.5-no-z")  # what the README has room for
TABLES = {
    "claims": claims_table, "main": main_table, "main-short": lambda results: main_table(results, only=SHORT),
    "half": lambda results: main_table(results, "n16", 0.5), "main-n64": lambda results: main_table(results, "n64"),
    "weights": weights_table, "weights-n64": lambda results: weights_table(results, "n64"),
    "tokens": tokens_table, "tokens-n64": lambda results: tokens_table(results, "n64"), "noise": noise_table,
    "bench-step": lambda _: bench_table("step"), "bench-erc": lambda _: bench_table("erc"),
    "bench-loss": lambda _: bench_table("erc", 1), "bench-scaling": lambda _: bench_table("scaling"),
    "bench-scaling-more": lambda _: bench_table("scaling", 1), "bench-overhead": lambda _: bench_table("overhead"),
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
