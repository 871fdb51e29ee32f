"""Loss, broken constraints and agreement of any runs, side by side, from their log.csv; for people who look.

    python experiments/plot.py out/demo out/plain      # writes plot.png; needs matplotlib
"""

import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to be run as it stands, from any folder

import prepare_data
from prepare_data import UserError

# Okabe and Ito's colours, which colour-blind readers tell apart; from dark to light, and dashed, for print in grey.
LINES = [("#000000", "-"), ("#0072B2", (0, (5, 1.5))), ("#E69F00", "-"), ("#CC79A7", (0, (1, 1))), ("#009E73", "-.")]
STYLE = {"font.size": 9, "axes.titlesize": 9.5, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
         "grid.color": "#e6e6e6", "grid.linewidth": 0.6, "axes.axisbelow": True, "lines.linewidth": 1.4,
         "lines.markersize": 3.5, "legend.frameon": False, "legend.fontsize": 8}


def picture(path, fill, size=(8, 3)):
    """Writes a PNG as wide as a README, unless fill(figure) returns False. UserError without matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("pictures need matplotlib; run: pip install matplotlib") from error
    with matplotlib.rc_context(STYLE):
        fig = Figure(figsize=size, dpi=110, layout="compressed")
        if fill(fig) is not False:
            fig.savefig(path)


def side_by_side(fig, folders):
    """A line for each run and panel; what is measured in evaluations alone has a dot for each of them."""
    axes = fig.subplots(1, 3)
    for folder, (colour, dash) in zip(folders, LINES * len(folders)):
        with open(Path(folder, "log.csv"), encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        points = lambda name, rows=rows: zip(*[(int(row["step"]), float(row[name])) for row in rows if row.get(name)])
        for ax, name, title in zip(axes, ("ce", "violated", "agreement"), (
                "cross-entropy (dots: validation)", "constraints broken", "agreement")):
            ax.plot(*points(name), color=colour, linestyle=dash, label=folder, marker="o" * (name == "agreement"))
            ax.set(title=title, xlabel="step")
            ax.yaxis.set_major_formatter("{x:.0%}")
        axes[0].plot(*points("val_ce"), "o", color=colour)
    axes[0].set_yscale("log", base=2)
    axes[0].yaxis.set_major_formatter("{x:g}")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)


def main(folders):
    if not folders:
        raise UserError("name the folders of runs, such as out/demo out/plain")
    picture("plot.png", lambda fig: side_by_side(fig, folders))
    print("plot.png")


if __name__ == "__main__":
    sys.exit(prepare_data.run_program(main))
