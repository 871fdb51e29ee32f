"""The paper in miniature: ERC and what it is compared with, on the same batches, from the same weights, several seeds.

    python experiments/reproduce.py --jobs 2                 # trains whatever has no result file yet; hours on a CPU
    python experiments/reproduce.py n16/plain n16/erc-1      # only these variants
    python experiments/reproduce.py n16/plain --again 0      # trains seed 0 again and compares; writes nothing
    python experiments/report.py                             # tables and figures, from the result files

Each run writes results/SUITE/VARIANT-SEED.json, so that a comparison that was stopped goes on with the next one. Within
a suite all runs of a seed share data, batches, evaluation, learning rate and, where shapes allow, the initial weights.

  n16       16 experts, 2 per token, on the demo corpus
  n64       64 experts, 8 per token, on the demo corpus
  text      32 experts, 4 per token, on the source of Python's standard library, which every machine has
  n16-slow  n16 with the weight decay of everything else, 0.1, for R, W_g, W_p and W_o, too
  n16-S     n16 with another timescale S

AdamW's weights are a moving average over its last 1 / (lr * decay) updates (arXiv 2405.13698). So the timescale of a
run, the sum of lr * decay over its steps, says how much of it the weights have forgotten at its end. The paper's is
3.7, and so is that of n16, n64 and text. With a decay of 0.1 it is 0.18 in n16.
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
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
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
    """What sets a variant apart: settings of train.py, a model of its own, a loss of its own."""

    settings: dict = field(default_factory=dict)
    model: Callable = MoETransformer           # MoEConfig -> model
    shape: Callable = lambda config: config    # MoEConfig -> MoEConfig
    extra_loss: Callable | None = None         # seed -> function of the model


PLAIN = dict(erc_weight=0.0)
erc = lambda alpha, **settings: Variant(dict(erc_weight=1.0, erc_alpha=alpha, **settings))
other = lambda extra_loss: Variant(PLAIN, extra_loss=extra_loss)
VARIANTS = {
    "plain": Variant(PLAIN),
    **{f"erc-{alpha}": erc(float(alpha)) for alpha in ("0", "0.4", "0.5", "0.6", "0.8", "1", "2", "3")},
    "dense": Variant(PLAIN, shape=variants.dense_config),
    "random": Variant(PLAIN, variants.random_router),
    "aoe": Variant(PLAIN, variants.AoETransformer),
    **{f"probe-{where}": other(lambda seed, where=where: variants.coupled(where, seed=seed))
       for where in ("up", "silu", "swiglu", "output")},
    "no-noise": other(lambda seed: variants.coupled("clean")),
    "closed-form": other(lambda seed: variants.coupled("expected")),
    "orthogonal": other(lambda seed: variants.orthogonality),
    "plain-z": Variant(dict(PLAIN, z_weight=0.001)),
    "erc-1-z": erc(1.0, z_weight=0.001), "erc-0.5-z": erc(0.5, z_weight=0.001),
}


@dataclass(frozen=True)
class Suite:
    """Sizes and settings that all variants of a comparison share."""

    moe: MoEConfig   # its vocab_size is that of the data, rounded up to 64 as in train.py
    settings: dict
    variants: dict   # name -> number of seeds


def at_timescale(timescale, settings):
    """The settings, and the weight decay of R, W_g, W_p and W_o for which sum lr * decay is the timescale."""
    config = train.TrainConfig(**settings)
    total = sum(train.learning_rate(config, step) for step in range(1, config.steps + 1))
    return dict(settings, moe_weight_decay=float(f"{timescale / total:.4g}"))  # rounded: the same on every machine


SMALL = dict(vocab_size=320, context_length=256, n_layers=3, n_heads=3, d_model=96)
N16 = MoEConfig(**SMALL, d_expert=64, n_experts=16, top_k=2)
N64 = MoEConfig(**SMALL, d_expert=32, n_experts=64, top_k=8)
TEXT = MoEConfig(320, 256, n_layers=4, n_heads=4, d_model=128, d_expert=64, n_experts=32, top_k=4)
DEMO = dict(data="data/demo", steps=800, batch_size=8, accumulate=1, lr=4e-3, warmup=50, eval_every=400)
PAPER = 3.7  # 167,000 steps with a learning rate from 4e-4 to 4e-5 and a decay of 0.1
MAIN = ("plain", "erc-1", "erc-0.5")
seeds = lambda number, names: dict.fromkeys(names.split(), number)
SUITES = {
    "n16": Suite(N16, at_timescale(PAPER, DEMO), seeds(25, "plain erc-1 erc-0.5 dense random")
                 | seeds(5, "aoe erc-0.4 erc-0.6 erc-0.8") | seeds(3, "erc-0 erc-2 erc-3 plain-z erc-1-z erc-0.5-z"
                 " probe-up probe-silu probe-swiglu probe-output no-noise closed-form orthogonal")),
    "n64": Suite(N64, at_timescale(PAPER, DEMO), seeds(8, "plain erc-1 erc-0.5 dense random")),
    "text": Suite(TEXT, at_timescale(PAPER, dict(DEMO, data="data/stdlib", steps=1200, lr=2e-3)),
                  seeds(6, "plain erc-1 erc-0.5 dense random")),
    "n16-slow": Suite(N16, dict(DEMO, moe_weight_decay=0.1), seeds(5, "plain erc-1 erc-0.5")),
    **{f"n16-{timescale}": Suite(N16, at_timescale(timescale, DEMO), seeds(5, "plain erc-0.5"))
       for timescale in (0.9, 1.8, 9, 18)},
}


def configs(suite, variant, seed):
    """(TrainConfig, MoEConfig) of one run."""
    shared, it = SUITES[suite], VARIANTS[variant]
    settings = dict(save_every=0, dtype="fp32", log_every=20 if seed < 5 else 40) | shared.settings | it.settings
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


# ---- What is measured in the weights ----


@torch.no_grad()
def measure(model, alpha):
    """What the loss sees in the weights of a model with a router -> dict of lists, one value for each layer.

    loss            the ERC loss of the clean R at alpha 1, 2, 3, 4, 5: the paper's Table 2
    smallest_alpha  the smallest alpha at which the clean R breaks no constraint
    norm_R, norm_W  (mean, standard deviation) over experts of ||R[i]|| and ||W_g[i]||: the paper's Table 3
    noisy           share of the constraints at the run's alpha that 64 draws of the noise break
    cosine          mean absolute cosine of two rows of R
    neurons         mean squared cosine of two columns of W_g of the same expert, over that of two experts
    M               [n, n] of the clean R, to four digits
    """
    found, mean_sd = [], lambda values: [values.mean().item(), values.std().item()]
    for moe in model.moe_layers():
        R, W_g, n = moe.R, moe.W_g, len(moe.R)
        M, off = activation_norms(R, W_g), ~torch.eye(n, dtype=torch.bool, device=R.device)    # (n, n), (n, n)
        generator = torch.Generator(R.device).manual_seed(0)
        draws = [activation_norms(perturb(R, noise_bound(R), generator), W_g) for _ in range(64)]
        neurons = F.normalize(W_g, dim=1).transpose(1, 2).flatten(0, 1)                # (n D, d)
        squares = (neurons @ neurons.T).square().unflatten(1, (n, -1)).unflatten(0, (n, -1))   # (n, D, n, D)
        blocks, D = squares.sum(dim=(1, 3)), W_g.size(2)                               # (n, n)
        within = (blocks.diagonal() - D).mean() / (D * (D - 1))
        unit = F.normalize(R, dim=1)                                                   # (n, d)
        found.append(dict(
            loss=[coupling_hinge(M, a).item() for a in (1, 2, 3, 4, 5)],
            smallest_alpha=(torch.maximum(M, M.T) / M.diagonal()[:, None])[off].max().item(),
            norm_R=mean_sd(R.norm(dim=1)), norm_W=mean_sd(W_g.flatten(1).norm(dim=1)),
            noisy=statistics.mean(coupling_report(draw, alpha)[0].item() for draw in draws),
            cosine=(unit @ unit.T)[off].abs().mean().item(),
            neurons=(within / (blocks[off].mean() / D**2)).item(),
            M=rounded(M.tolist(), 4)))
    return {name: [its[name] for its in found] for name in found[0]}


def rounded(value, digits=6):
    """Nested dicts and lists, with floats cut to so many digits."""
    return json.loads(json.dumps(value), parse_float=lambda text: float(f"{float(text):.{digits}g}"))


# ---- What is measured on the validation tokens, at the end ----


@torch.no_grad()
def validation(model, batches, device):
    """One pass over all N targets that count -> (xs: L times [N, d], states [N, d], targets [N]).

    xs enter the MoE layers, states enter the norm behind the last one.
    """
    found = []
    for inputs, targets in batches:
        _, entered = train.layer_inputs(model, inputs.to(device), targets.to(device))
        counted = targets >= 0                                                         # (B, T)
        found.append([tensor[counted] for tensor in (*entered, targets.to(device))])
    *xs, states, targets = (torch.cat(parts) for parts in zip(*found))
    return xs, states, targets


@torch.no_grad()
def premise(model, x, states, targets):
    """Does the expert that responds most do best? Every expert is tried on every token, in the last layer's first slot.

    x [N, d], states [N, d] and targets [N] as in train.forced_ce -> {"all": numbers, "hard": numbers}, means over all
    tokens, and over the quarter of them that have the highest cross-entropy. The numbers: cross-entropy with the
    router's first choice, with the strongest response, with a random expert and with the one that is best in hindsight;
    and how often the router and the response pick that one. Called "router" is whatever routes: in AoE, the scores.
    """
    moe, found = model.moe_layers()[-1], []
    for part in zip(x.split(2048), states.split(2048), targets.split(2048)):  # all n responses of all tokens are large
        x, states, targets = part
        ce = torch.stack([train.forced_ce(model, x, states, torch.full_like(targets, j), targets)
                          for j in range(len(moe.W_o))], dim=1)                        # (N, n)
        router, response = moe.route(x)[-1][:, :1], train.responses(moe, x).argmax(dim=1, keepdim=True)    # (N, 1)
        best, expert = ce.min(dim=1, keepdim=True)                                     # (N, 1)
        found.append(torch.cat((ce.gather(1, router), ce.gather(1, response), ce.mean(dim=1, keepdim=True), best,
                                router == expert, response == expert), dim=1))         # (N, 6)
    by_token = torch.cat(found)                                                        # (N, 6)
    hard = by_token[:, 0].topk(len(by_token) // 4).indices                             # (N // 4,)
    names = ("router", "response", "random", "best", "router_best", "response_best")
    return {which: dict(zip(names, rows.mean(dim=0).tolist())) for which, rows in
            (("all", by_token), ("hard", by_token[hard]))}


@torch.no_grad()
def centres(model, xs):
    """Is R[i] the centre of its tokens? -> {"own", "random"}: lists, one value for each layer.

    own: the cosine of R[i] with the mean of the tokens whose first choice is i, mean over the experts that have any.
    random: the same with as many tokens, drawn from all of them.
    """
    found, generator = {"own": [], "random": []}, torch.Generator().manual_seed(0)
    for moe, x in zip(model.moe_layers(), xs):
        first, cosines = moe.route(x)[-1][:, 0], []                                    # (N,)
        for i in first.unique().tolist():
            own = x[first == i]                                                        # (N_i, d)
            drawn = x[torch.randperm(len(x), generator=generator)[:len(own)].to(x.device)]
            cosines.append(F.cosine_similarity(moe.R[i], torch.stack((own.mean(dim=0), drawn.mean(dim=0)))))
        for name, value in zip(found, torch.stack(cosines).mean(dim=0).tolist()):
            found[name].append(value)
    return found


@torch.no_grad()
def copies(model, states, targets):
    """Cross-entropy of the demo's validation tokens: of those that are copies, and of the others -> dict of numbers.

    Copies repeat what their document said before: whoever has learned to copy can be certain of them.
    """
    documents = [([*text.encode(), 256], [any(first <= k < end for first, end in spans) for k in range(len(text) + 1)])
                 for _, text, _, spans in list(prepare_data.demo_documents())[-320:]]
    documents.sort(key=lambda document: len(document[0]))                              # as in validation_batches
    tokens, copied = (torch.tensor(sum(parts, [])) for parts in zip(*documents))       # (N,), (N,)
    if not torch.equal(tokens, targets.cpu()):
        raise UserError("data/demo is not what the grammar makes today; prepare it again: python prepare_data.py demo")
    ce = F.cross_entropy(model.head(model.norm(states)), targets, reduction="none").cpu()      # (N,)
    return dict(ce_copies=ce[copied].mean().item(), ce_other=ce[~copied].mean().item(),
                copies=int(copied.sum()), others=int((~copied).sum()))


# ---- Running ----


def run(suite, variant, seed):
    """Trains one variant with one seed -> its result, a dict. UserError where it was interrupted."""
    config, _ = configs(suite, variant, seed)
    model, weights, start = initial_model(suite, variant, seed), [], time.perf_counter()
    routed = variant not in ("aoe", "dense")  # there are a router and experts, so that M means something

    watch = lambda model, step: routed and weights.append(dict(step=step, **measure(model, config.erc_alpha)))
    watch(model, 0)
    extra_loss = VARIANTS[variant].extra_loss and VARIANTS[variant].extra_loss(seed)
    with contextlib.redirect_stdout(io.StringIO()):
        last = train.train(train.Run(config, model=model, overwrite=True), extra_loss, watch)
    if last["signal"]:
        raise UserError("interrupted; finished runs are safe, run the same command again")
    with open(Path(config.out, "log.csv"), encoding="utf-8") as file:
        log = [{name: float(value) for name, value in row.items() if value and value != "nan"}
               for row in csv.DictReader(file)]
    for one in weights[:-1] if seed == 0 else weights:  # what is large is kept where a figure needs it
        one.pop("M")
    data, device = prepare_data.load_data(config.data), train.pick_device(config.device)
    batches = train.validation_batches(data, model.config.context_length, config.batch_size)
    xs, states, targets = validation(model, batches, device)
    return dict(
        suite=suite, variant=variant, seed=seed, command=f"python experiments/reproduce.py {suite}/{variant}",
        seconds=round(time.perf_counter() - start), floor=data.meta.get("entropy_floor"), data=data.fingerprint,
        parameters=model.num_params()[0], settings=settings_of(suite, variant, seed),
        log=rounded(log), weights=rounded(weights),
        premise=rounded(premise(model, xs[-1], states, targets)) if variant != "dense" else None,
        copies=rounded(copies(model, states, targets)) if config.data == "data/demo" else None,
        centres=rounded(centres(model, xs)) if routed else None,
        machine=f"{torch.cuda.get_device_name(device)}" if device.type == "cuda" else
                f"{os.cpu_count()} CPU cores, {platform.machine()}, {torch.get_num_threads()} threads",
        dtype=str(train.pick_dtype(config.dtype, device))[6:], date=str(date.today()),
        python=platform.python_version(), torch=torch.__version__)


def settings_of(suite, variant, seed):
    """All settings that a result depends on, as plain values."""
    return {name: value for config in configs(suite, variant, seed) for name, value in asdict(config).items()
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
        with prepare_data.replacing(path) as file:
            file.write(json.dumps(result).encode())
        print(f"{suite}/{path.name}: val_ce {result['log'][-1]['val_ce']:.4f}, {result['seconds']} s", flush=True)


def again(suite, variant, seed):
    """Trains a run a second time, and says how far its val_ce is from the stored one, beside the spread of seeds."""
    stored = {path.stem: load(path) for path in sorted((RESULTS / suite).glob(f"{variant}-[0-9]*.json"))}
    if f"{variant}-{seed}" not in stored or len(stored) < 2:
        raise UserError(f"{suite}/{variant} has results of {len(stored)} seeds; --again needs two, {seed} among them")
    spread = statistics.stdev(result["log"][-1]["val_ce"] for result in stored.values())
    before, now = (result["log"][-1]["val_ce"] for result in (stored[f"{variant}-{seed}"], run(suite, variant, seed)))
    # Two runs that share nothing but their distribution differ by less than 2 sqrt(2) sd in 95 of 100 cases.
    verdict = "within" if abs(now - before) <= 2 * math.sqrt(2) * spread else "OUTSIDE OF"
    print(f"{suite}/{variant}, seed {seed}: val_ce {now:.4f} now, {before:.4f} in the file; standard deviation over"
          f" {len(stored)} seeds {spread:.4f}: {verdict} the spread")


# ---- Command line ----


def jobs(names):
    """[(suite, variant, seed), ...] for names such as n16/plain; of all of them first the first seeds."""
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
    parser.add_argument("--again", type=int, metavar="SEED", help="train a finished run again, and compare")
    options = parser.parse_args(argv)
    todo = jobs(options.variants or [f"{suite}/{name}" for suite in SUITES for name in SUITES[suite].variants])
    for suite in dict.fromkeys(job[0] for job in todo):
        prepare(SUITES[suite].settings["data"])
    if options.again is not None:
        for suite, variant in dict.fromkeys(job[:2] for job in todo):
            again(suite, variant, options.again)
        return 0
    if options.jobs == 1:
        list(map(run_and_save, todo))
        return 0
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, spawn, torch.set_num_threads, (threads,)) as pool:
        list(pool.map(run_and_save, todo))
    return 0


if __name__ == "__main__":
    sys.exit(prepare_data.run_program(main))
