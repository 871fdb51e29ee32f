"""ERC against a plain MoE on the embedded corpus: the same batches, the same initial weights, several seeds.

    python experiments/reproduce.py            # trains what has no result file yet, then prints the table
    python experiments/reproduce.py --table    # prints the table from the result files

Each run writes one file, results/demo/VARIANT-SEED.json, with its settings, versions, machine, date and whole log; so a
stopped comparison goes on where it was. The runs are those of `python train.py`: this file has no training loop.
"""

import csv
import json
import math
import os
import platform
import sys
import time
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # to be run as it stands, from any folder

import torch

import prepare_data
import train
from erc_moe import MoEConfig

RESULTS = Path(__file__).parent / "results" / "demo"
VARIANTS = {"plain": dict(erc_weight=0.0), "erc": dict()}
SEEDS = (0, 1, 2)


def run(variant, seed, data="data/demo", **settings):
    """Trains one variant with one seed; writes and returns its result, a dict."""
    out = Path("out") / f"reproduce-{variant}-{seed}"
    config = train.TrainConfig(data=data, out=str(out), seed=seed, **VARIANTS[variant], **settings)
    start = time.perf_counter()
    train.train(config, MoEConfig(), overwrite=True)
    seconds = time.perf_counter() - start
    with open(out / "log.csv", encoding="utf-8") as file:
        log = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    result = dict(
        variant=variant, seed=seed, command=f"python train.py --seed {seed} --erc-weight {config.erc_weight:g}",
        seconds=round(seconds), floor=prepare_data.load_data(data).meta["entropy_floor"], date=str(date.today()),
        machine=f"{os.cpu_count()} CPU cores, {platform.machine()}", python=platform.python_version(),
        torch=torch.__version__, config=json.loads((out / "config.json").read_text(encoding="utf-8")), log=log)
    RESULTS.mkdir(parents=True, exist_ok=True)
    prepare_data.write_whole(RESULTS / f"{variant}-{seed}.json", [json.dumps(result).encode()])
    return result


def mean_sd(values):
    """(mean, standard deviation of the sample)."""
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


def table():
    """The comparison as lines of Markdown, from the result files; a line per run, then the paired difference."""
    lines = ["| variant, seed | val_ce | times the floor | ERC loss | violated | coupling | agreement | seconds |",
             "|---|---|---|---|---|---|---|---|"]
    final = {}
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        row = final[result["variant"], result["seed"]] = result["log"][-1]
        lines.append(f"| {result['variant']}, {result['seed']} | {row['val_ce']:.4f} |"
                     f" {row['val_ce'] / result['floor']:.3f} | {row['erc']:.4f} | {row['violated']:.1%} |"
                     f" {row['coupling']:.2f} | {row['agreement']:.0%} | {result['seconds']} |")
    pairs = [final["erc", seed]["val_ce"] - final["plain", seed]["val_ce"] for seed in SEEDS
             if ("erc", seed) in final and ("plain", seed) in final]
    if len(pairs) > 1:
        lines.append("\nval_ce of erc less that of plain, by seed: mean {:+.4f}, standard deviation {:.4f}, {} seeds."
                     .format(*mean_sd(pairs), len(pairs)))
    return "\n".join(lines)


def main(argv):
    if argv not in ([], ["--table"]):
        raise prepare_data.UserError("takes --table, or nothing", code=2)
    if not argv:
        if not Path("data/demo/meta.json").exists():
            prepare_data.main(["demo"])
        for seed in SEEDS:
            for variant in VARIANTS:
                if not (RESULTS / f"{variant}-{seed}.json").exists():
                    run(variant, seed)
    print(table())
    return 0


if __name__ == "__main__":
    sys.exit(prepare_data.run(main))
