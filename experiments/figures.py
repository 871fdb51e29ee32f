"""The figures of the comparison, for `python experiments/report.py --write`; nothing to run here.

Each function in FIGURES fills an empty figure from the results of n16, or returns False: nothing to draw.
Lines are means over seeds, bands go from the smallest seed to the largest; what has no result yet is left out.
"""

import json
import math
import statistics

from reproduce import RESULTS, SUITES

from prepare_data import UserError

SUITE = "n16"
ALPHAS = ("plain", "erc-0", "erc-0.5", "erc-1", "erc-2", "erc-3")
LABELS = {"plain": "plain MoE", "erc-0": "ERC, alpha 0", "erc-0.5": "ERC, alpha 0.5", "erc-1": "ERC, alpha 1",
          "erc-2": "ERC, alpha 2", "erc-3": "ERC, alpha 3", "aoe": "AoE", "dense": "dense",
          "centred-0.5": "centred proxies (ours),\nalpha 0.5",
          "plain-no-z": "plain MoE, no z-loss", "erc-0.5-no-z": "ERC, alpha 0.5, no z-loss"}
# Okabe and Ito's colours, which colour-blind readers tell apart; a variant has the same one in every figure, and none
# has that of another in the same figure.
COLOURS = {"plain": "#000000", "erc-0": "#CC79A7", "erc-0.5": "#D55E00", "erc-1": "#0072B2", "erc-2": "#56B4E9",
           "erc-3": "#009E73", "aoe": "#E69F00", "dense": "#888888", "centred-0.5": "#009E73",
           "plain-no-z": "#888888", "erc-0.5-no-z": "#56B4E9"}
STYLE = {"font.size": 9, "axes.titlesize": 9.5, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
         "grid.color": "#e6e6e6", "grid.linewidth": 0.6, "axes.axisbelow": True, "lines.linewidth": 1.4,
         "legend.frameon": False, "legend.handlelength": 1.5}


# ---- Lines over steps ----


def logged(name):
    """A function of a result: [(step, value), ...] of its log."""
    return lambda result: [(row["step"], row.get(name)) for row in result["log"]]


def watched(name):
    """A function of a result: [(step, mean over layers), ...] of what was measured at each evaluation."""
    return lambda result: [(row["step"], statistics.mean(row[name])) for row in result["watched"]
                           if row.get(name) and None not in row[name]]


def over_seeds(results, variant, points):
    """[(x, lowest, mean, highest), ...] of points(result), over the seeds of a variant; without what is no number."""
    found = {}
    for x, y in (point for seed in results.values(SUITE, variant, points) for point in seed):
        if y is not None and math.isfinite(y):
            found.setdefault(x, []).append(y)
    return [(x, min(ys), statistics.mean(ys), max(ys)) for x, ys in sorted(found.items())]


def lines(ax, results, variants, points, **style):
    """A line and a band for each of the variants that have such points; says whether there was any."""
    drawn = False
    for i, variant in enumerate(variants):
        if rows := over_seeds(results, variant, points):
            x, low, mean, high = zip(*rows)
            ax.plot(x, mean, color=COLOURS[variant], label=LABELS[variant],
                    linewidth=2.6 - 0.25 * i, **style)  # ever thinner: of equal lines, each can be seen
            ax.fill_between(x, low, high, color=COLOURS[variant], alpha=0.18, linewidth=0)
            drawn = True
    return drawn


def seed_0(results):
    """[(label, what was measured at the end), ...] of plain and of ERC with alpha 1, where they have run."""
    return [(LABELS[variant], results[SUITE, variant, 0]["watched"][-1]) for variant in ("plain", "erc-1")
            if (SUITE, variant, 0) in results]


# ---- The figures ----


def coupling(fig, results):
    """M of the last layer, each row divided by its diagonal entry: above 1, the constraint of that row is broken."""
    if not (panels := seed_0(results)):
        return False
    from matplotlib.colors import LogNorm

    fig.set_size_inches(8, 3.7)
    fig.set_layout_engine("compressed")  # else square panels overflow
    axes = fig.subplots(1, len(panels), squeeze=False)[0]
    for ax, (label, end) in zip(axes, panels):
        M, n = end["M"][-1], len(end["M"][-1])
        broken = sum((M[i][j] > M[i][i]) + (M[j][i] > M[i][i]) for i in range(n) for j in range(n) if j != i)
        image = ax.imshow([[value / row[i] for value in row] for i, row in enumerate(M)], cmap="RdBu_r",
                          norm=LogNorm(0.4, 2.5))  # white is 1; twice as loud is as far from it as half as loud
        ax.set(title=f"{label}\n{broken / (2 * n * (n - 1)):.0%} of the constraints broken",
               xlabel="expert j", ylabel="proxy i", xticks=range(0, n, 5), yticks=range(0, n, 5))
        ax.spines[:].set_visible(False)
        ax.grid(False)
    bar = fig.colorbar(image, ax=list(axes), ticks=[0.4, 0.6, 1, 1.6, 2.5], format="{x:g}", extend="both")
    bar.minorticks_off()
    bar.set_label("M[i,j] / M[i,i] in the last layer\n(red: louder than i's own expert)")
    return True


def alphas(fig, results):
    """What the loss is at its own alpha, how much noise it allows, and how many constraints are broken."""
    loss, epsilon, violated = fig.subplots(1, 3)
    drawn = lines(loss, results, ALPHAS, logged("erc"))
    lines(epsilon, results, ALPHAS, logged("epsilon"))
    lines(violated, results, ALPHAS, logged("violated"))
    loss.set_yscale("symlog", linthresh=1e-3, linscale=0.5)  # it does become exactly 0
    loss.set(title="ERC loss", ylim=-1e-4)
    epsilon.set(title="epsilon, mean over experts")
    violated.set(title="constraints broken", ylim=(-0.02, 1.02))
    violated.yaxis.set_major_formatter("{x:.0%}")
    for ax in (loss, epsilon, violated):
        ax.set(xlabel="step", xlim=0)
    fig.legend(*loss.get_legend_handles_labels(), loc="outside lower center", ncols=6, columnspacing=1,
           title="mean and range over seeds; loss and constraints: each at its own alpha, plain MoE at 1")
    return drawn


def quality(fig, results):
    """The loss on held-out text over training, and how far it ends from plain's of the same seed."""
    variants, last = ("plain", "erc-0.5", "erc-1", "aoe", "dense"), lambda result: result["log"][-1]["val_ce"]
    over, end = fig.subplots(1, 2, width_ratios=(1.1, 1))
    if not lines(over, results, variants, logged("val_ce"), marker="o", markersize=3):
        return False
    over.axhline(results[min(results)]["floor"], color="#666666", linestyle="--", linewidth=1,
                 label="entropy of the corpus")
    over.set(title="held-out cross-entropy, nats per token", xlabel="step")
    over.locator_params(axis="x", nbins=5)
    over.legend(title="mean and range over seeds", alignment="left")
    end.axvline(0, color=COLOURS["plain"], linewidth=1)
    others = [variant for variant in variants[1:] if results.paired(SUITE, variant, last)]
    if not others:
        end.remove()
        return True
    for y, variant in enumerate(others):
        differences = results.paired(SUITE, variant, last)
        end.plot(differences, [y] * len(differences), "o", color=COLOURS[variant], markersize=4, alpha=0.6)
        end.plot([statistics.mean(differences)] * 2, [y - 0.25, y + 0.25], color=COLOURS[variant], linewidth=2.2)
    end.set(title="at the end, less plain's of the same seed", xlabel="nats per token (dots: seeds, bar: their mean)",
            yticks=range(len(others)), yticklabels=[LABELS[variant] for variant in others],
            ylim=(len(others) - 0.5, -0.5))
    end.locator_params(axis="x", nbins=5)
    return True


def kinds(fig, results):
    """Where the tokens of each kind of document go: first choices in the last layer."""
    if not (panels := seed_0(results)):
        return False
    shares = [[[count / sum(row) for count in row] for row in end["counts"][-1]] for _, end in panels]
    top = max(share for panel in shares for row in panel for share in row)
    fig.set_size_inches(8, 2.3)
    axes = fig.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, (label, end), panel in zip(axes, panels, shares):
        columns = sorted(zip(*panel), key=lambda column: (column.index(max(column)), -max(column)))
        image = ax.imshow(list(zip(*columns)), cmap="Blues", vmin=0, vmax=top, aspect="auto")
        ax.set(title=f"{label}: {end['information'][-1]:.2f} bits of mutual information",
               xlabel="experts of the last layer, by main kind", xticks=[], yticks=range(len(end["kinds"])),
               yticklabels=end["kinds"])
        ax.spines[:].set_visible(False)
        ax.grid(False)
    fig.colorbar(image, ax=list(axes), format="{x:.0%}", label="of the kind's tokens")
    return True


def agreement(fig, results):
    """How often the router's first choice is the expert that responds most: over training, and layer by layer."""
    variants, n = ("plain", "erc-0.5", "plain-no-z", "erc-0.5-no-z", "centred-0.5", "aoe"), SUITES[SUITE].moe.n_experts
    by_layer = lambda result: enumerate(result["watched"][-1]["agreement"], 1)
    over, layers = fig.subplots(1, 2, width_ratios=(1.5, 1), sharey=True)
    drawn = lines(over, results, variants, watched("agreement"), marker="o", markersize=3)
    lines(layers, results, variants, by_layer, marker="o", markersize=3)
    for ax in (over, layers):
        ax.axhline(1 / n, color="#666666", linestyle="--", linewidth=1, label=f"chance, 1/{n}")
    over.set(title="agreement on real tokens, mean over layers", xlabel="step", ylim=0)
    over.yaxis.set_major_formatter("{x:.0%}")
    over.locator_params(axis="x", nbins=5)
    layers.set(title="layer by layer, at the end", xlabel="layer", xticks=range(1, SUITES[SUITE].moe.n_layers + 1))
    fig.legend(*over.get_legend_handles_labels(), loc="outside right center", title="mean and range\nover seeds",
               alignment="left")
    return drawn


def cost(fig, results):
    """Time of the ERC loss and of the layer it belongs to, and their ratio, against the count of operations."""
    path = RESULTS / "bench-cpu-2-cores.json"
    if not path.exists():
        return False
    bench = json.loads(path.read_text(encoding="utf-8"))["erc"]
    n, T, K, times = bench["experts"], bench["tokens"], bench["top_k"], bench["seconds"]
    time, ratio = fig.subplots(1, 2)
    for part, colour in (("layer", COLOURS["plain"]), ("loss", COLOURS["erc-1"])):
        quartiles(time, n, [[1000 * seconds for seconds in times[f"{part} {m}"]] for m in n], colour,
                  {"layer": f"MoE layer, {T} tokens", "loss": "ERC loss"}[part])
    quartiles(ratio, n, [[a / b for a, b in zip(times[f"loss {m}"], times[f"layer {m}"])] for m in n],
              COLOURS["erc-1"], "measured")
    ratio.plot(n, [m**2 / (3 * K * T) for m in n], color="#666666", linestyle="--", label="predicted, n²/(3KN)")
    time.set(title="forward and backward on 2 CPU cores, ms")
    ratio.set(title=f"ERC loss / MoE layer, K = {K}, N = {T}")
    for ax, form in ((time, "{x:g}"), (ratio, "{x:.0%}")):
        ax.set(xscale="log", yscale="log", xlabel="number of experts n", xticks=n, xticklabels=n)
        ax.yaxis.set_major_formatter(form)
        ax.minorticks_off()
        ax.legend()
    return True


def quartiles(ax, x, samples, colour, label):
    """Medians as a line, with bars from the lower to the upper quartile."""
    low, middle, high = zip(*(statistics.quantiles(values, n=4, method="inclusive") for values in samples))
    ends = [[m - a for a, m in zip(low, middle)], [b - m for b, m in zip(high, middle)]]
    ax.errorbar(x, middle, ends, color=colour, label=label, marker="o", markersize=3, capsize=2)


FIGURES = dict(coupling=coupling, alphas=alphas, quality=quality, kinds=kinds, agreement=agreement, cost=cost)


def draw(results):
    """Writes results/figures/NAME.png for what `results` (report.Results) and the benchmark give. UserError without
    matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("the figures need matplotlib; run: pip install matplotlib") from error
    folder = RESULTS / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for name, fill in FIGURES.items():
            fig = Figure(figsize=(8, 3), dpi=110, layout="constrained")
            if fill(fig, results):
                fig.savefig(folder / f"{name}.png")
