"""The figures, for `python experiments/report.py --write`; nothing to run here.

Each function in FIGURES fills an empty figure from the results, or returns False where there is nothing to draw. Lines
are means over seeds; bands go from the smallest seed to the largest.
"""

import statistics

import torch
from report import NAMES, bounds, last
from reproduce import RESULTS, SUITES

from erc_moe import activation_norms, noise_bound, perturb
from prepare_data import UserError

ALPHAS = ("0.4", "0.5", "0.6", "0.8", "1")
# Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = {"plain": "#000000", "erc-0.4": "#CC79A7", "erc-0.5": "#D55E00", "erc-0.6": "#E69F00", "erc-0.8": "#56B4E9",
           "erc-1": "#0072B2", "aoe": "#009E73"}
STYLE = {"font.size": 9, "axes.titlesize": 9.5, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
         "grid.color": "#e6e6e6", "grid.linewidth": 0.6, "axes.axisbelow": True, "lines.linewidth": 1.4,
         "legend.frameon": False, "legend.handlelength": 1.5}


def lines(ax, results, suite, variants, column, **style):
    """A line and a band of a column of the log for each variant that has run."""
    for variant in variants:
        found = {}
        for log in results.values(suite, variant, lambda result: result["log"]):
            for row in log:
                if column in row:
                    found.setdefault(row["step"], []).append(row[column])
        if found:
            steps, colour = sorted(found), COLOURS[variant]
            means = [statistics.mean(found[step]) for step in steps]
            ax.plot(steps, means, color=colour, label=NAMES[variant], **style)
            ax.fill_between(steps, [min(found[step]) for step in steps], [max(found[step]) for step in steps],
                            color=colour, alpha=0.18, linewidth=0)


def heat(ax, M, title):
    """M, each row divided by its diagonal entry: red is above 1, a broken constraint of that row."""
    from matplotlib.colors import LogNorm

    image = ax.imshow([[value / row[i] for value in row] for i, row in enumerate(M)], cmap="RdBu_r",
                      norm=LogNorm(0.4, 2.5))  # white is 1
    ax.set(title=title, xlabel="expert j", ylabel="proxy i")
    ax.spines[:].set_visible(False)
    ax.grid(False)
    return image


def coupling(fig, results):
    """M of the last layer at the end of training, without the loss and with it."""
    panels = [(NAMES[variant], results["n16", variant, 0]["weights"][-1]) for variant in ("plain", "erc-1")
              if ("n16", variant, 0) in results]
    if not panels:
        return False
    fig.set_size_inches(8, 3.7)
    fig.set_layout_engine("compressed")  # else square panels overflow
    axes = fig.subplots(1, len(panels), squeeze=False)[0]
    for ax, (label, end) in zip(axes, panels):
        M, n = end["M"][-1], len(end["M"][-1])
        broken = sum((M[i][j] > M[i][i]) + (M[j][i] > M[i][i]) for i in range(n) for j in range(n) if j != i)
        image = heat(ax, M, f"{label}, 16 experts, last layer\n{broken / (2 * n * (n - 1)):.0%} of constraints broken")
        ax.set(xticks=range(0, n, 5), yticks=range(0, n, 5))
    bar = fig.colorbar(image, ax=list(axes), ticks=[0.4, 0.6, 1, 1.6, 2.5], format="{x:g}", extend="both")
    bar.minorticks_off()
    bar.set_label("M[i,j] / M[i,i]\n(red: stronger than i's own expert)")
    return True


def steps(fig, results):
    """The three steps on the README's example of three experts in two dimensions."""
    R = torch.tensor([[3.0, 1.0], [1.0, 3.0], [-2.0, 2.0]])
    W_g = torch.tensor([[[1.0, 0.0], [0.0, 0.2]], [[0.0, 0.7], [0.9, 0.0]], [[0.5, 0.0], [0.0, 1.0]]])
    epsilon, colours = noise_bound(R), ("#0072B2", "#D55E00", "#009E73")
    M = activation_norms(perturb(R, epsilon, torch.Generator().manual_seed(0)), W_g)  # the README's draw
    fig.set_size_inches(8, 2.7)
    fig.set_layout_engine("compressed")  # else square panels overflow
    perturbed, probe, hinge = fig.subplots(1, 3)
    for i, colour in enumerate(colours):
        draws = torch.stack([perturb(R, epsilon, torch.Generator().manual_seed(s))[i] for s in range(200)])
        perturbed.plot(*draws.T.tolist(), ".", color=colour, markersize=2, alpha=0.5)
        perturbed.annotate("", R[i].tolist(), (0, 0), arrowprops=dict(arrowstyle="->", color=colour, linewidth=1.6))
        perturbed.annotate(f"R[{i}]", R[i].tolist(), xytext=(4, -3), textcoords="offset points", color=colour,
                           bbox=dict(facecolor="white", edgecolor="none", alpha=0.8, pad=1))
    perturbed.set(title="1. perturb: 200 draws of each proxy", xlim=(-3.6, 5), ylim=(-0.5, 5), aspect="equal")
    excess = (torch.relu(M - M.diagonal()[:, None]) + torch.relu(M - M.diagonal()[None, :])).fill_diagonal_(0)
    for ax, values, title in ((probe, M, "2. probe: M, how strongly\nexpert j responds to proxy i"),
                              (hinge, excess, "3. hinge: excess over the\ndiagonal, row and column")):
        ax.imshow(values.tolist(), cmap="Blues" if ax is probe else "Reds", vmin=0, vmax=4 if ax is probe else 1.6)
        for i in range(3):
            for j in range(3):
                ax.text(j, i, f"{values[i, j]:.2f}", ha="center", va="center",
                        fontweight="bold" if i == j and ax is probe else None)
        ax.set(title=title, xlabel="expert j", ylabel="proxy i", xticks=range(3), yticks=range(3))
        ax.spines[:].set_visible(False)
        ax.grid(False)
    return True


def alphas(fig, results):
    """The paper's Figure 5: epsilon over training, and quality, for alpha 0.4 to 1."""
    variants = [f"erc-{alpha}" for alpha in ALPHAS if results.paired("n16", f"erc-{alpha}", last("val_ce"))]
    if not variants:
        return False
    epsilon, quality = fig.subplots(1, 2)
    lines(epsilon, results, "n16", ["plain", *variants], "epsilon")
    epsilon.set(title="epsilon, mean over experts and layers", xlabel="step", xlim=0, ylim=(0.49, 0.65))
    epsilon.legend(fontsize=7.5, loc="lower left", ncols=2)  # below all bands
    deltas(quality, results, variants)
    return True


def deltas(ax, results, variants):
    """val_ce less plain's of the same seed: a dot a seed, a bar for the 95 % confidence interval."""
    ax.axvline(0, color=COLOURS["plain"], linewidth=1)
    for y, variant in enumerate(variants):
        pairs, colour = results.paired("n16", variant, last("val_ce")), COLOURS.get(variant, "#0072B2")
        ax.plot(pairs, [y] * len(pairs), "o", color=colour, markersize=4, alpha=0.6)
        if len(pairs) > 1:
            ax.plot(bounds(pairs), [y, y], color=colour, linewidth=2.2, alpha=0.5)
    ax.set(title="val_ce, delta to plain of the same seed", xlabel="nats per token (dots: seeds, bar: 95% CI)",
           yticks=range(len(variants)), yticklabels=[NAMES[variant] for variant in variants],
           ylim=(len(variants) - 0.5, -0.5))
    ax.locator_params(axis="x", nbins=5)


def probes(fig, results):
    """The paper's Figure 6: other activations, no noise, orthogonalisation, as deltas to plain."""
    names = ("erc-1", "probe-up", "probe-silu", "probe-swiglu", "probe-output", "no-noise", "closed-form", "orthogonal")
    variants = [name for name in names if results.paired("n16", name, last("val_ce"))]
    if not variants:
        return False
    deltas(fig.subplots(), results, variants)
    return True


def clusters(fig, results):
    """The paper's Figure 4: gate columns of every second expert, middle layer, on two principal axes."""
    panels = [(NAMES[variant], results["n16", variant, 0]) for variant in ("plain", "erc-1", "erc-0.5")
              if ("n16", variant, 0) in results]
    if not panels:
        return False
    fig.set_size_inches(8, 3)
    for ax, (label, result) in zip(fig.subplots(1, len(panels), squeeze=False)[0], panels):
        for points in result["plane"]:
            ax.plot(*zip(*points), ".", markersize=3)
        neurons = result["weights"][-1]["neurons"]
        ax.set(title=f"{label}\nwithin / between experts {neurons[len(neurons) // 2]:.2f}",
               xlabel="first principal axis")
    return True


def agreement(fig, results):
    """How often the router's first choice is the expert that responds most, over training."""
    panels = [suite for suite in ("n16", "n64", "text") if results.seeds(suite, "plain")]
    if not panels:
        return False
    axes = fig.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, suite in zip(axes, panels):
        lines(ax, results, suite, ("plain", "erc-1", "erc-0.5"), "agreement", marker="o", markersize=3)
        n = SUITES[suite].moe.n_experts
        ax.axhline(1 / n, color="#666666", linestyle="--", linewidth=1)
        ax.annotate(f"chance, 1/{n}", (1, 1 / n), (-4, 3), ("axes fraction", "data"), "offset points", ha="right",
                    fontsize=7.5, color="#666666")
        ax.set(title=f"{suite}, {n} experts", xlabel="step")
        ax.yaxis.set_major_formatter("{x:.0%}")
    axes[0].set(ylabel="agreement on validation tokens", ylim=0)  # once all is drawn: the panels share it
    axes[0].legend(fontsize=7.5, loc=(0.03, 0.15))
    return True


FIGURES = dict(coupling=coupling, steps=steps, alphas=alphas, probes=probes, clusters=clusters, agreement=agreement)


def draw(results):
    """Writes results/figures/NAME.png for what `results`, a report.Results, give. UserError without matplotlib."""
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
