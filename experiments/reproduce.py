"""The paper in miniature: ERC and what it is compared with, on the same batches, from the same weights, several seeds.

    python experiments/reproduce.py --jobs 2                 # trains whatever has no result file yet; hours on a CPU
    python experiments/reproduce.py n16/plain n16/erc-1      # only these variants
    python experiments/reproduce.py n16/plain --again 0      # trains seed 0 again and compares; writes nothing
    python experiments/reproduce.py --long --budget 120      # for a GPU: as many tokens as fit into so many seconds
    python experiments/report.py                             # tables and figures, from the result files

There is no training loop here: the runs are those of train.train. Each one writes results/SUITE/VARIANT-SEED.json, so
that a comparison that was stopped goes on with the next run. Within a suite all runs of a seed share data, batches,
evaluation, learning rate and, where shapes allow, the initial weights.

  n16       16 experts, 2 per token, on the demo corpus
  n16-wide  the same, with initial weights of standard deviation d^-0.5 instead of 0.02
  n64       64 experts, 8 per token, on the demo corpus
  text      32 experts, 4 per token, on the source of Python's standard library, which every machine has
"""

import argparse
import contextlib
import csv
import hashlib
import io
import json
import math
import multiprocessing
import os
import platform
import shutil
import statistics
import sys
import sysconfig
import time
from array import array
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to be run as it stands, from any folder

import torch
import torch.nn.functional as F
import variants

import prepare_data
import train
from erc_moe import MoEConfig, MoETransformer, activation_norms, coupling_hinge, coupling_report, noise_bound, perturb
from prepare_data import UserError

RESULTS = Path(__file__).parent / "results"

# ---- What runs ----


@dataclass(frozen=True)
class Variant:
    """What sets a variant apart: settings of train.py, a model of its own, a loss of its own; and how many seeds."""

    seeds: int = 3
    settings: dict = field(default_factory=dict)
    model: Callable = MoETransformer           # MoEConfig -> model
    shape: Callable = lambda config: config    # MoEConfig -> MoEConfig
    extra_loss: Callable | None = None         # seed -> function of the model


def erc(alpha, seeds=3, **settings):
    return Variant(seeds, dict(erc_weight=1.0, erc_alpha=alpha, **settings))


def other(extra_loss):
    return Variant(3, PLAIN, extra_loss=extra_loss)


PLAIN = dict(erc_weight=0.0)
VARIANTS = {
    "plain": Variant(5, PLAIN), "erc-1": erc(1.0, 5), "erc-0.5": erc(0.5, 5),
    "aoe": Variant(5, PLAIN, variants.AoETransformer),
    "dense": Variant(3, PLAIN, shape=variants.dense_config),
    **{f"erc-{alpha}": erc(float(alpha)) for alpha in ("0.4", "0.6", "0.8", "0", "2", "3")},
    **{f"probe-{where}": other(lambda seed, where=where: variants.coupled(where, seed=seed))
       for where in ("up", "silu", "swiglu", "output")},
    "no-noise": other(lambda seed: variants.coupled("clean")),
    "closed-form": other(lambda seed: variants.coupled("expected")),
    "orthogonal": other(lambda seed: variants.orthogonality),
    "plain-z": Variant(3, dict(PLAIN, z_weight=0.001)), "erc-1-z": erc(1.0, z_weight=0.001),
}


@dataclass(frozen=True)
class Suite:
    """Sizes and settings that all variants of a comparison share."""

    moe: MoEConfig   # its vocab_size is that of the data, rounded up to 64 as in train.py
    settings: dict
    variants: dict   # name -> number of seeds


SMALL = dict(vocab_size=320, context_length=256, n_layers=3, n_heads=3, d_model=96)
DEMO = dict(data="data/demo", steps=800, batch_size=8, accumulate=1, lr=4e-3, warmup=50, eval_every=400, log_every=20)
N16 = MoEConfig(**SMALL, d_expert=64, n_experts=16, top_k=2)
SUITES = {
    "n16": Suite(N16, DEMO, {name: variant.seeds for name, variant in VARIANTS.items()}),
    "n16-wide": Suite(replace(N16, init_std=96**-0.5), DEMO, {"plain": 3, "erc-1": 3, "erc-0.5": 3}),
    "n64": Suite(MoEConfig(**SMALL, d_expert=32, n_experts=64, top_k=8), DEMO, {"plain": 3, "erc-1": 3, "erc-0.5": 3}),
    "text": Suite(MoEConfig(320, 256, n_layers=4, n_heads=4, d_model=128, d_expert=64, n_experts=32, top_k=4),
                  dict(DEMO, data="data/stdlib", steps=1200), {"plain": 5, "erc-1": 5, "erc-0.5": 5, "aoe": 5}),
}


def configs(suite, variant, seed):
    """(TrainConfig, MoEConfig) of one run."""
    shared, it = SUITES[suite], VARIANTS[variant]
    settings = dict(dict(save_every=0, dtype="fp32") | shared.settings | it.settings)
    return train.TrainConfig(out=f"out/reproduce/{suite}-{variant}-{seed}", seed=seed, **settings), it.shape(shared.moe)


def initial_model(suite, variant, seed):
    """The variant's model, with the initial weights of the plain one, as far as names and shapes are the same."""
    torch.manual_seed(seed)
    plain = MoETransformer(SUITES[suite].moe)
    model = VARIANTS[variant].model(configs(suite, variant, seed)[1])
    ours, theirs = model.state_dict(), plain.state_dict()
    model.load_state_dict({name: theirs[name] if name in theirs and theirs[name].shape == tensor.shape else tensor
                           for name, tensor in ours.items()})
    return model


def prepare(folder):
    """Makes the shards of a suite unless they are there."""
    if Path(folder, "meta.json").exists():
        return
    if folder == "data/demo":
        prepare_data.main(["demo"])
    else:  # every module is a document; in the order of a hash, so that the last tenth is a fair sample
        root = Path(sysconfig.get_paths()["stdlib"])
        names = [path.relative_to(root) for path in root.rglob("*.py")]
        names = [name for name in names if not {"test", "tests", "site-packages", "idlelib"} & set(name.parts)]
        names.sort(key=lambda name: hashlib.sha256(name.as_posix().encode()).digest())
        files = [str(root / name) for name in names if (root / name).stat().st_size]
        prepare_data.main([*files, "--out", folder, "--tokenizer", "bytes"])


# ---- What is measured beside the log ----


@torch.no_grad()
def measure(model, alpha):
    """What the loss sees in the weights of a model with a router -> dict of lists, one value for each layer.

    loss            the ERC loss of the clean R at alpha 1, 2, 3, 4, 5: the paper's Table 2
    smallest_alpha  the smallest alpha at which the clean R breaks no constraint
    norm_R, norm_W  (mean, standard deviation) over experts of ||R[i]|| and ||W_g[i]||: the paper's Table 3
    noise           ERC loss at the run's alpha: without noise, closed form, mean and standard deviation of 64 draws
    noisy           share of the constraints that these draws break
    cosine          mean absolute cosine of two rows of R
    neurons         mean squared cosine of two columns of W_g of the same expert, over that of two experts
    touched         (smallest, largest) norm over experts of the gradient of the clean ERC loss in W_g
    M               [n, n] of the clean R, to four digits
    """
    found = []
    for moe in model.moe_layers():
        R, W_g, n = moe.R, moe.W_g, len(moe.R)
        M, off = activation_norms(R, W_g), ~torch.eye(n, dtype=torch.bool, device=R.device)    # (n, n), (n, n)
        generator = torch.Generator(R.device).manual_seed(0)
        draws = [activation_norms(perturb(R, noise_bound(R), generator), W_g) for _ in range(64)]
        losses = torch.stack([coupling_hinge(draw, alpha) for draw in draws])          # (64,)
        expected = coupling_hinge(variants.expected_norms(R, W_g), alpha)
        neurons = F.normalize(W_g, dim=1).transpose(1, 2).flatten(0, 1)                # (n D, d)
        squares = (neurons @ neurons.T).square().unflatten(1, (n, -1)).unflatten(0, (n, -1))   # (n, D, n, D)
        blocks, D = squares.sum(dim=(1, 3)), W_g.size(2)                               # (n, n)
        within = (blocks.diagonal() - D).mean() / (D * (D - 1))
        with torch.enable_grad():
            W = W_g.detach().requires_grad_()
            gradient = torch.autograd.grad(coupling_hinge(activation_norms(R.detach(), W), alpha), W)[0]
        unit, touched = F.normalize(R, dim=1), gradient.flatten(1).norm(dim=1)         # (n, d), (n,)
        found.append(dict(
            loss=[coupling_hinge(M, a).item() for a in (1, 2, 3, 4, 5)],
            smallest_alpha=(torch.maximum(M, M.T) / M.diagonal()[:, None])[off].max().item(),
            norm_R=mean_sd(R.norm(dim=1)), norm_W=mean_sd(W_g.flatten(1).norm(dim=1)),
            noise=[coupling_hinge(M, alpha).item(), expected.item(), *mean_sd(losses)],
            noisy=statistics.mean(coupling_report(draw, alpha)[0].item() for draw in draws),
            cosine=(unit @ unit.T)[off].abs().mean().item(),
            neurons=(within / (blocks[off].mean() / D**2)).item(),
            touched=[touched.min().item(), touched.max().item()],
            M=[[float(f"{value:.4g}") for value in row] for row in M.tolist()]))
    return {name: [its[name] for its in found] for name in found[0]}


def mean_sd(values):
    return [values.mean().item(), values.std().item()]


@torch.no_grad()
def plane(model):
    """Every second expert's columns of W_g in the middle layer, on their first two principal axes: [n/2, D, 2]."""
    W_g = model.moe_layers()[len(model.moe_layers()) // 2].W_g[::2]
    columns = W_g.transpose(1, 2).flatten(0, 1)                                        # (n/2 * D, d)
    _, _, axes = torch.linalg.svd(columns - columns.mean(dim=0), full_matrices=False)  # (d, d)
    points = ((columns - columns.mean(dim=0)) @ axes[:2].T).unflatten(0, W_g.shape[::2])       # (n/2, D, 2)
    return [[[float(f"{value:.3g}") for value in point] for point in expert] for expert in points.tolist()]


# ---- Running ----


def has_coupling(variant):
    """Whether there are a router and several experts, so that M and its constraints mean something."""
    return variant not in ("aoe", "dense")


def run(suite, variant, seed, config=None):
    """Trains one variant with one seed -> its result, a dict. UserError where it was interrupted."""
    config = config or configs(suite, variant, seed)[0]
    model, weights, start = initial_model(suite, variant, seed), [], time.perf_counter()

    def watch(model, step):
        if has_coupling(variant):
            weights.append(dict(step=step, **measure(model, config.erc_alpha)))

    watch(model, 0)
    extra_loss = VARIANTS[variant].extra_loss and VARIANTS[variant].extra_loss(seed)
    with contextlib.redirect_stdout(io.StringIO()):
        last = train.train(config, model=model, extra_loss=extra_loss, watch=watch, overwrite=True)
    if last["signal"]:
        raise UserError("interrupted; finished runs are safe, run the same command again")
    with open(Path(config.out, "log.csv"), encoding="utf-8") as file:
        log = [{name: float(value) for name, value in row.items() if value and value != "nan"}
               for row in csv.DictReader(file)]
    for one in weights[:-1] if seed == 0 else weights:  # what is large is kept where a figure needs it
        one.pop("M")
    data, device = prepare_data.load_data(config.data), train.pick_device(config.device)
    return dict(
        suite=suite, variant=variant, seed=seed, command=f"python experiments/reproduce.py {suite}/{variant}",
        seconds=round(time.perf_counter() - start), floor=data.meta.get("entropy_floor"), data=data.fingerprint,
        parameters=model.num_params()[0], settings=settings_of(suite, variant, seed, config), log=log, weights=weights,
        plane=plane(model) if seed == 0 and has_coupling(variant) else None,
        machine=f"{torch.cuda.get_device_name(device)}" if device.type == "cuda" else
                f"{os.cpu_count()} CPU cores, {platform.machine()}, {torch.get_num_threads()} threads",
        dtype=str(train.pick_dtype(config.dtype, device))[6:], date=str(date.today()),
        python=platform.python_version(), torch=torch.__version__)


def settings_of(suite, variant, seed, config=None):
    """All settings that a result depends on, as plain values; config: those of the run, where not the suite's."""
    usual, moe = configs(suite, variant, seed)
    return {name: value for name, value in {**asdict(config or usual), **asdict(moe)}.items()
            if name not in ("data", "out", "log_every", "save_every", "device", "sample_tokens", "temperature")}


def load(path):
    """A result file. UserError where it is damaged, or of other settings than today's."""
    variant, _, seed = path.stem.rpartition("-")
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        stored, now = dict(result["settings"]), settings_of(path.parent.name, variant, int(seed))
        result["log"], result["weights"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no result of reproduce.py ({error!r}); move it away, and run again") from error
    for name in stored.keys() | now.keys():
        if stored.get(name) != now.get(name):
            raise UserError(f"{path} is of another version: {name} {stored.get(name)}, now {now.get(name)}; move it"
                            " away to have it run again")
    return result


def run_and_save(job):
    """One job, in a process of its own; what it prints is one line."""
    suite, variant, seed = job
    path = RESULTS / suite / f"{variant}-{seed}.json"
    if not path.exists():
        result = run(suite, variant, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        prepare_data.write_whole(path, [json.dumps(result).encode()])
        print(f"{suite}/{path.name}: val_ce {result['log'][-1]['val_ce']:.4f}, {result['seconds']} s", flush=True)


def again(suite, variant, seed):
    """Trains a run a second time, and says how far its val_ce is from the stored one, beside the spread of seeds."""
    stored = {path.stem: load(path) for path in sorted((RESULTS / suite).glob(f"{variant}-[0-9].json"))}
    if f"{variant}-{seed}" not in stored or len(stored) < 2:
        raise UserError(f"{suite}/{variant} has results of {len(stored)} seeds; --again needs two, {seed} among them")
    spread = statistics.stdev(result["log"][-1]["val_ce"] for result in stored.values())
    before, now = (result["log"][-1]["val_ce"] for result in (stored[f"{variant}-{seed}"], run(suite, variant, seed)))
    # Two runs that share nothing but their distribution differ by less than 2 sqrt(2) sd in 95 of 100 cases.
    verdict = "within" if abs(now - before) <= 2 * math.sqrt(2) * spread else "OUTSIDE OF"
    print(f"{suite}/{variant}, seed {seed}: val_ce {now:.4f} now, {before:.4f} in the file; standard deviation over"
          f" {len(stored)} seeds {spread:.4f}: {verdict} the spread")


# ---- Longer, on a GPU ----


def demo_tokens(seed, documents=40_000):
    """Documents of the demo grammar under another seed than the validation documents' -> tokens, bytes of uint16."""
    tokens = array("H")
    for _, text, _ in prepare_data.demo_documents(seed, documents):
        tokens.extend(text.encode())
        tokens.append(256)
    return tokens.tobytes()


def prepare_long(folder, tokens):
    """data/demo with at least so many training tokens, from the grammar under other seeds."""
    meta = json.loads(Path("data/demo/meta.json").read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    (old,) = [shard for shard in meta["shards"] if shard["name"].startswith("val")]
    shutil.copy(Path("data/demo", old["name"]), folder)
    meta["shards"], seeds = [old], range(1, 2 + tokens // 7_000_000)
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        for seed, content in zip(seeds, pool.map(demo_tokens, seeds)):
            path = folder / f"train_{seed:06d}.bin"
            header = prepare_data.HEADER.pack(prepare_data.MAGIC, 1, len(content) // 2)
            prepare_data.write_whole(path, [header, content])
            sha256 = hashlib.sha256(header + content).hexdigest()
            meta["shards"].append({"name": path.name, "tokens": len(content) // 2, "sha256": sha256})
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def long_runs(budget, out, batch_size=64):
    """n16 and n64: plain, alpha 1 and alpha 0.5 in turn, as many steps as fit into `budget` seconds together.

    Writes OUT/long-SUITE-VARIANT.json after each. The question: does the plain model's smallest alpha grow towards the
    paper's 5 with more tokens, and does the ERC loss then keep acting?
    """
    names, folder = ("plain", "erc-1", "erc-0.5"), Path("data/long")
    for suite in ("n16", "n64"):
        base = dict(batch_size=batch_size, dtype="auto", device="auto", eval_every=0, steps=1)
        config = replace(configs(suite, "erc-1", 0)[0], **base)
        trial = train.Run(config, None, initial_model(suite, "erc-1", 0))
        for step in range(1, 16):  # the first ones warm up
            if step == 6:
                start = time.perf_counter()
            trial.add_token_gradient(step)
            trial.add_erc_gradient(step)
            trial.update(step, torch.ones((), device=trial.device), torch.ones((), device=trial.device))
            trial.model.norm.weight[0].item()  # wait for the device
        steps = max(8, int(0.7 * budget / 6 / ((time.perf_counter() - start) / 10)))
        if not (folder / "meta.json").exists():
            prepare_long(folder, steps * trial.step_tokens)
        for name in names:
            config = replace(configs(suite, name, 0)[0], **base | dict(
                data=str(folder), steps=steps, eval_every=max(1, steps // 4), log_every=max(1, steps // 40)))
            result = run(suite, name, 0, config)
            Path(out).mkdir(parents=True, exist_ok=True)
            prepare_data.write_whole(Path(out, f"long-{suite}-{name}.json"), [json.dumps(
                result | {"command": f"python experiments/reproduce.py --long --budget {budget}", "steps": steps,
                          "step_tokens": trial.step_tokens}).encode()])
            print(f"long {suite}/{name}: {steps} steps, val_ce {result['log'][-1]['val_ce']:.4f}", flush=True)


# ---- Command line ----


def jobs(names):
    """[(suite, variant, seed), ...] for names such as n16/plain; first seeds first, so that a table fills evenly."""
    chosen = []
    for name in names:
        suite, _, variant = name.partition("/")
        if suite not in SUITES or variant not in SUITES[suite].variants:
            known = " ".join(f"{s}/{v}" for s in SUITES for v in SUITES[s].variants)
            raise UserError(f"there is no variant {name!r}; known are: {known}")
        chosen += [(suite, variant, seed) for seed in range(SUITES[suite].variants[variant])]
    return sorted(chosen, key=lambda job: job[2])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("variants", nargs="*", help="such as n16/plain (default: all)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on its share of the cores")
    parser.add_argument("--long", action="store_true", help="longer runs, on as much text as they train on")
    parser.add_argument("--budget", type=float, default=120, help="seconds for --long (default: 120)")
    parser.add_argument("--out", default=str(RESULTS / "gpu"), help="folder for the results of --long")
    parser.add_argument("--again", type=int, metavar="SEED", help="train a finished run again, and compare")
    options = parser.parse_args(argv)
    todo = jobs(options.variants or [f"{suite}/{name}" for suite in SUITES for name in SUITES[suite].variants])
    for suite in ("n16",) if options.long else dict.fromkeys(job[0] for job in todo):
        prepare(SUITES[suite].settings["data"])
    if options.long:
        long_runs(options.budget, options.out)
        return 0
    if options.again is not None:
        for suite, variant in dict.fromkeys(job[:2] for job in todo):
            again(suite, variant, options.again)
        return 0
    if options.jobs == 1:
        for job in todo:
            run_and_save(job)
        return 0
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, spawn, torch.set_num_threads, (threads,)) as pool:
        list(pool.map(run_and_save, todo))
    return 0


if __name__ == "__main__":
    sys.exit(prepare_data.run(main))
