"""The paper in miniature: ERC, and what it is compared with, on the same batches, from the same weights, several seeds.

    python experiments/reproduce.py                          # trains whatever has no result file yet; hours on a CPU
    python experiments/reproduce.py n16/plain n16/erc-1      # only these variants
    python experiments/reproduce.py n16/plain --again 0      # trains seed 0 again, and compares; writes nothing
    python experiments/reproduce.py --cost                   # times and memory of the variants, in turn
    python experiments/report.py                             # tables and figures, from the result files

There is no training loop here: the runs are those of train.train. Each writes results/SUITE/VARIANT-SEED.json
(settings, machine, versions, date, command, log, and what `measure` found at each evaluation), so that a comparison
that was stopped goes on with the next run. Runs do not depend on each other. To use all cores, start the command once
for each, with OMP_NUM_THREADS=1 in front: a run that another process is at work on is passed over.

What is the same for all: data, batches, evaluation, learning rate; and the initial weights, where shapes allow. The
suites n16 and n64 are small, so that five seeds fit in an afternoon; `large` is for a GPU: 64 experts, 262 M
parameters, TinyStories (python prepare_data.py tinystories comes first). We had none, and have not run it.
"""

import csv
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to be run as it stands, from any folder

import torch
import variants

import prepare_data
import train
from erc_moe import MoEConfig, MoETransformer, activation_norms, coupling_hinge, coupling_report, noise_bound, perturb
from prepare_data import UserError

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Variant:
    """What sets a variant apart: settings of train.py, a model of its own, a loss of its own; and how many seeds."""

    seeds: int = 3
    settings: dict = field(default_factory=dict)
    model: Callable = MoETransformer           # MoEConfig -> model
    shape: Callable = lambda config: config    # MoEConfig -> MoEConfig
    extra_loss: Callable | None = None         # seed -> function of the model
    length: float = 1.0                        # of the suite's steps


def erc(alpha=1.0, noise="sample", seeds=3):
    return Variant(seeds, dict(erc_weight=1.0, erc_alpha=alpha, erc_noise=noise))


PLAIN = dict(erc_weight=0.0)
VARIANTS = {
    "plain": Variant(5, PLAIN),
    "erc-1": erc(seeds=5),
    "erc-0.5": erc(0.5, seeds=5),
    "aoe": Variant(5, PLAIN, variants.aoe_model),
    "aoe-no-z": Variant(3, dict(PLAIN, z_weight=0.0), variants.aoe_model),  # its logits are norms, and never small
    "dense": Variant(3, PLAIN, shape=variants.dense_config),
    "erc-0": erc(0.0),
    "erc-2": erc(2.0, seeds=5),  # 0 from the first step on, but for a touch: a placebo
    "erc-3": erc(3.0),
    "erc-1-no-noise": erc(noise="none"),
    "erc-1-expected": erc(noise="expected"),
    "erc-1-float32": Variant(3, dict(erc_weight=1.0, dtype="fp32")),
    "centred-1": Variant(3, PLAIN, extra_loss=lambda seed: variants.CentredProbe(1.0, seed)),
    "centred-0.5": Variant(3, PLAIN, extra_loss=lambda seed: variants.CentredProbe(0.5, seed)),
    "orthogonal": Variant(3, PLAIN, extra_loss=lambda seed: variants.orthogonality),
    "plain-no-z": Variant(5, dict(PLAIN, z_weight=0.0)),  # the z-loss turns rows of R away from their tokens
    "erc-1-no-z": Variant(5, dict(erc_weight=1.0, z_weight=0.0)),
    "erc-0.5-no-z": Variant(5, dict(erc_weight=1.0, erc_alpha=0.5, z_weight=0.0)),
    "plain-half": Variant(3, PLAIN, length=0.5),  # what half as long a run is compared with
    "erc-1-half": Variant(3, dict(erc_weight=1.0), length=0.5),
    **{f"probe-{where}": Variant(3, PLAIN, extra_loss=lambda seed, where=where: variants.probe_loss(where, seed=seed),
                                 length=0.5) for where in ("up", "swiglu", "output")},
}


@dataclass(frozen=True)
class Suite:
    """Sizes and settings that all variants of a comparison share."""

    moe: MoEConfig   # its vocab_size is that of the data, rounded up to 64 as in train.py
    settings: dict
    names: dict      # of its variants -> number of seeds, where it is not that of the variant


SMALL = dict(vocab_size=320, n_layers=3, n_heads=3, d_model=96)
DEMO = dict(data="data/demo", steps=800, eval_every=200, log_every=20)
FEW = {"plain": 3, "erc-1": 3, "erc-0.5": 3}
SUITES = {
    "n16": Suite(MoEConfig(**SMALL, d_expert=64, n_experts=16, top_k=2), DEMO, dict.fromkeys(VARIANTS)),
    "n64": Suite(MoEConfig(**SMALL, d_expert=32, n_experts=64, top_k=8), DEMO,
                 {**FEW, "plain-no-z": 3, "erc-1-no-z": 3, "erc-0.5-no-z": 3}),
    "large": Suite(
        MoEConfig(50304, 512, n_layers=8, n_heads=8, d_model=512, d_expert=256, n_experts=64, top_k=8),
        dict(train.PRESETS["tinystories"], data="data/tinystories", eval_every=1000, log_every=50, device="cuda"),
        {**FEW, "aoe": 3}),
}


def configs(suite, variant, seed):
    """(TrainConfig, MoEConfig) of one run."""
    shared, it = SUITES[suite], VARIANTS[variant]
    settings = {"save_every": 0, **shared.settings, **it.settings}
    settings["steps"] = int(settings["steps"] * it.length)
    known = {field.name for field in fields(train.TrainConfig)}  # a preset of train.py has sizes of the model, too
    return (train.TrainConfig(out=f"out/reproduce/{suite}-{variant}-{seed}", seed=seed,
                              **{name: value for name, value in settings.items() if name in known}),
            it.shape(shared.moe))


def initial_model(suite, variant, seed):
    """The variant's model, with the initial weights of the plain one, as far as names and shapes are the same."""
    torch.manual_seed(seed)
    plain = MoETransformer(SUITES[suite].moe)
    model = VARIANTS[variant].model(configs(suite, variant, seed)[1])
    ours, theirs = model.state_dict(), plain.state_dict()
    model.load_state_dict({name: theirs[name] if name in theirs and theirs[name].shape == tensor.shape else tensor
                           for name, tensor in ours.items()})
    return model


# ---- What is measured beside the log ----


def documents(data, every):
    """Each `every`th validation document -> list of (number of its kind, tokens), by length; and the names of kinds.

    Of data that does not know its documents, windows of 256 tokens, all of one kind.
    """
    tokens, eot = torch.cat([shard.long() for shard in data.val]), torch.tensor([data.eot])
    spans = data.meta.get("val_documents") or [("text", i, i + 256) for i in range(0, len(tokens) - 256, 256)][:320]
    kinds = sorted({kind for kind, _, _ in spans})
    rows = [(kinds.index(kind), torch.cat((eot, tokens[first:end - 1]))) for kind, first, end in spans[::every]]
    return sorted(rows, key=lambda row: len(row[1])), kinds


@torch.no_grad()
def measure(model, data, every=4):
    """What happens to real tokens, layer by layer, on each `every`th validation document -> dict of lists [L].

    agreement    share of tokens whose first choice is the expert j that responds most, argmax_j ||x W_g[j]||
    within       share of tokens that have that expert among their K
    response     mean response of the first choice / mean response of all experts
    cosine       mean cosine of a token with the router row of its first choice
    centred      share of the constraints broken by M of the true cluster centres (mean token of each first choice)
    centre       mean cosine of R[i] with the true centre of its cluster
    relative     the same, after the mean of all tokens is taken from the centres, and the mean row from R
    common       share of the tokens' mean square that is in their common mean
    information  mutual information of a token's first choice and its document's kind, in bits
    counts       tokens by kind and first choice [kinds, n]
    and of the weights: norm_R, norm_W (mean norms), spread_R (standard deviation / mean of the norms of R's rows).
    """
    device, (rows, kinds) = next(model.parameters()).device, documents(data, every)
    layers = model.moe_layers()
    sums = [dict(n=0, agreement=0, within=0, response=0, cosine=0, counts=0, centre=0, square=0) for _ in layers]

    def watch(total):
        def hook(moe, args):
            x, W_g = args[0].float()[mask], moe.W_g                                    # (N, d), (n, d, D)
            *_, experts = moe.route(x)                                                 # (N, K)
            response = torch.linalg.vector_norm(torch.bmm(x.expand(len(W_g), *x.shape), W_g), dim=-1).T  # (N, n)
            first, best = experts[:, 0], response.argmax(dim=1)                        # (N,), (N,)
            one_hot = torch.nn.functional.one_hot(first, len(W_g)).float()             # (N, n)
            by_kind = torch.nn.functional.one_hot(kind_of[mask], len(kinds)).float()   # (N, kinds)
            total["n"] += len(x)
            total["agreement"] += (first == best).sum().item()
            total["within"] += (experts == best[:, None]).any(dim=1).sum().item()
            total["response"] += ((response * one_hot).sum(dim=1) / response.mean(dim=1)).sum().item()
            total["cosine"] += torch.cosine_similarity(x, moe.R[first], dim=1).sum().item()
            total["counts"] += by_kind.T @ one_hot                                     # (kinds, n)
            total["centre"] += one_hot.T @ x                                           # (n, d)
            total["square"] += x.square().sum().item()
        return hook

    hooks = [moe.register_forward_pre_hook(watch(total)) for moe, total in zip(layers, sums)]
    for i in range(0, len(rows), 16):
        batch = torch.nn.utils.rnn.pad_sequence([row for _, row in rows[i:i + 16]], True, -100).to(device)  # (B, T)
        mask = batch >= 0
        kind_of = torch.tensor([kind for kind, _ in rows[i:i + 16]], device=device)[:, None].expand_as(batch)
        model(batch.clamp(min=0))
    for hook in hooks:
        hook.remove()

    found = [of_layer(moe, total) for moe, total in zip(layers, sums)]
    return dict(kinds=kinds, **{name: [None if its[name] != its[name] else its[name] for its in found]
                                for name in found[0]})


def of_layer(moe, total):
    """What `measure` says of one layer, from the sums over its tokens; NaN where there is no router to speak of."""
    its = {name: total[name] / total["n"] for name in ("agreement", "within", "response", "cosine")}
    used = total["counts"].sum(dim=0) > 0                                              # (n,)
    centres = total["centre"][used] / total["counts"].sum(dim=0)[used, None]           # (used, d)
    mean = total["centre"].sum(dim=0) / total["n"]                                     # (d,)
    joint = total["counts"] / total["n"]                                               # (kinds, n)
    apart = joint.sum(dim=1, keepdim=True) * joint.sum(dim=0)                          # (kinds, n)
    rows_R, rows_W = moe.R.norm(dim=1), moe.W_g.flatten(1).norm(dim=1)                 # (n,), (n,)
    return its | dict(
        centred=coupling_report(activation_norms(centres, moe.W_g[used]))[0].item(),
        centre=torch.cosine_similarity(centres, moe.R[used]).mean().item(),
        relative=torch.cosine_similarity(centres - mean, (moe.R - moe.R.mean(dim=0))[used]).mean().item(),
        common=(mean.square().sum() * total["n"] / total["square"]).item(),
        information=(joint * (joint / apart).log2()).nan_to_num().sum().item(),
        counts=total["counts"].int().tolist(), norm_R=rows_R.mean().item(), norm_W=rows_W.mean().item(),
        spread_R=(rows_R.std() / rows_R.mean()).item() if len(rows_R) > 1 else 0.0)


def measure_weights(model, alpha):
    """What the loss sees, layer by layer, in the weights of a model that has a router -> dict of lists [L].

    M               [n, n] of the clean R, to four digits
    none, expected  the ERC loss without noise, and with the second moment of the noise in closed form
    drawn           (mean, standard deviation) of the ERC loss over 64 draws
    router_cosine   mean absolute cosine of two rows of R
    neurons         (within, between): mean squared cosine of two neurons, columns of W_g, of one expert and of two
    touched         (smallest, largest) norm of the gradient in an expert's W_g, of the ERC loss without noise
    """
    found = []
    for moe in model.moe_layers():
        R, W_g, n = moe.R, moe.W_g, len(moe.R)
        with torch.no_grad():
            epsilon, M = noise_bound(R), activation_norms(R, W_g)
            expected = coupling_hinge(activation_norms(R, W_g, epsilon), alpha).item()
            noise = torch.Generator(R.device).manual_seed(0)
            draws = torch.stack([coupling_hinge(activation_norms(perturb(R, epsilon, noise), W_g), alpha)
                                 for _ in range(64)])
            unit = torch.nn.functional.normalize(R, dim=1)
            neurons = torch.nn.functional.normalize(W_g, dim=1).transpose(1, 2).flatten(0, 1)  # (n D, d)
            D = W_g.size(2)
            cosines = (neurons @ neurons.T).square().view(n, D, n, D).sum(dim=(1, 3))  # (n, n)
            within = (cosines.diagonal() - D) / (D * (D - 1))
            between = (cosines.sum() - cosines.diagonal().sum()) / max(1, n * (n - 1) * D * D)
        W = W_g.detach().requires_grad_()
        loss = coupling_hinge(activation_norms(R.detach(), W), alpha)
        (gradient,) = torch.autograd.grad(loss, W)
        norms = gradient.flatten(1).norm(dim=1)                                        # (n,)
        others = ~torch.eye(n, dtype=torch.bool)
        found.append(dict(
            M=[[float(f"{value:.4g}") for value in row] for row in M.tolist()], none=coupling_hinge(M, alpha).item(),
            expected=expected, drawn=[draws.mean().item(), draws.std().item()],
            router_cosine=(unit @ unit.T)[others].abs().mean().item() if n > 1 else 0.0,
            neurons=[within.mean().item(), between.item()], touched=[norms.min().item(), norms.max().item()]))
    return {name: [its[name] for its in found] for name in found[0]}


# ---- Running ----


def has_coupling(variant):
    """Whether there are a router and several experts, so that M and its constraints mean something."""
    return VARIANTS[variant].model is MoETransformer and variant != "dense"


def run(suite, variant, seed):
    """Trains one variant with one seed -> its result, a dict. UserError where it did not end."""
    config = configs(suite, variant, seed)[0]
    data = prepare_data.load_data(config.data)
    model, watched = initial_model(suite, variant, seed).to(train.pick_device(config.device)), []

    def watch(model, step):
        every = 1 if step == config.steps else 8
        watched.append(dict(step=step, **measure(model, data, every),
                            **measure_weights(model, config.erc_alpha) if has_coupling(variant) else {}))

    watch(model, 0)
    start, extra = time.perf_counter(), VARIANTS[variant].extra_loss
    last = train.train(config, model=model, extra_loss=extra and extra(seed), watch=watch, overwrite=True)
    if last["signal"]:
        raise UserError("interrupted; results are safe, run the same command again", code=128 + last["signal"])
    with open(Path(config.out, "log.csv"), encoding="utf-8") as file:
        log = [{name: float(value) for name, value in row.items() if value and value != "nan"}
               for row in csv.DictReader(file)]
    for one in watched:  # what is large is kept where a figure needs it
        if one["step"] < config.steps:
            one.pop("counts")
        if seed > 0 or 0 < one["step"] < config.steps:
            one.pop("M", None)
    return dict(
        suite=suite, variant=variant, seed=seed, command=f"python experiments/reproduce.py {suite}/{variant}",
        seconds=round(time.perf_counter() - start), floor=data.meta.get("entropy_floor"), date=str(date.today()),
        parameters=model.num_params(), settings=settings_of(suite, variant, seed), log=log, watched=watched,
        machine=f"{os.cpu_count()} CPU cores, {platform.machine()}, {torch.get_num_threads()} threads",
        dtype=str(train.pick_dtype(config.dtype, train.pick_device(config.device)))[6:],
        python=platform.python_version(), torch=torch.__version__)


def settings_of(suite, variant, seed):
    """All settings that a result depends on, as plain values."""
    config, moe = configs(suite, variant, seed)
    return {name: value for name, value in {**asdict(config), **asdict(moe)}.items()
            if name not in ("data", "out", "log_every", "save_every")}


def load(path):
    """A result file, or UserError where it is damaged or not that of today's settings."""
    suite, name = path.parent.name, path.stem
    variant, _, seed = name.rpartition("-")
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        settings = result["settings"]
        if {"suite", "variant", "seed", "log", "watched", "dtype", "torch", "floor"} - set(result):
            raise ValueError("incomplete")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no result of reproduce.py ({type(error).__name__}); move it away, and run"
                        " again") from error
    if variant not in VARIANTS:
        raise UserError(f"{path}: there is no variant {variant!r}; move it away")
    for setting, value in settings_of(suite, variant, int(seed)).items():
        if settings.get(setting) != value:
            raise UserError(f"{path} is of another version: {setting} {settings.get(setting)}, now {value}; move it"
                            " away to have it run again")
    return result


def again(suite, variant, seed):
    """Trains a run a second time and says how far its val_ce is from the stored one, against the spread of seeds.

    Two trainings that share nothing but their distribution differ by less than 2 sqrt(2) standard deviations in 95 of
    100 cases. UserError where there is nothing to compare with.
    """
    stored = {path.stem: load(path) for path in sorted((RESULTS / suite).glob(f"{variant}-[0-9].json"))}
    if f"{variant}-{seed}" not in stored or len(stored) < 2:
        raise UserError(f"{suite}/{variant} has results of {len(stored)} seeds; --again needs two, {seed} among them")
    spread = statistics.stdev(result["log"][-1]["val_ce"] for result in stored.values())
    before, ce = (result["log"][-1]["val_ce"] for result in (stored[f"{variant}-{seed}"], run(suite, variant, seed)))
    verdict = "within" if abs(ce - before) <= 2 * math.sqrt(2) * spread else "OUTSIDE OF"
    print(f"{suite}/{variant}, seed {seed}: val_ce {ce:.4f} now, {before:.4f} in the file; standard deviation over"
          f" {len(stored)} seeds {spread:.4f}: {verdict} the spread")


# ---- Cost ----


def measure_cost(suite, rounds=60):
    """Times of a training step of each variant, in turn, and what it keeps in memory -> dict for cost.json.

    Memory is 16 bytes a parameter (weights, gradients, two moments), and what the forward pass keeps for the backward
    pass. The ERC loss keeps less than that, and comes when it is free again: it adds nothing.
    """
    from bench import Setup, interleave, take_step

    device = train.pick_device("auto")
    functions, memory = {}, {}
    for variant in SUITES[suite].names:
        config, _ = configs(suite, variant, 0)
        it = train.Run(config, None, initial_model(suite, variant, 0))
        extra_loss = VARIANTS[variant].extra_loss and VARIANTS[variant].extra_loss(0)
        functions[variant] = lambda r, it=it, extra=extra_loss: take_step(it, r + 1, it.config.erc_weight > 0, extra)
        kept = {}

        def pack(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        weights = {p.untyped_storage().data_ptr() for p in it.model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            batch = train.train_batch(it.data, it.context, config.batch_size, torch.Generator().manual_seed(0))
            with it.autocast():
                it.model(*batch)
        activations = sum(size for pointer, size in kept.items() if pointer not in weights)
        memory[variant] = dict(activations=activations, weights=16 * it.model.num_params()[0])
    setup = Setup(device, rounds, "data/demo", Path("out"))
    return dict(suite=suite, rounds=rounds, seconds=interleave(functions, setup), bytes=memory, date=str(date.today()),
                machine=f"{os.cpu_count()} CPU cores, {platform.machine()}, {torch.get_num_threads()} threads",
                torch=torch.__version__, command="python experiments/reproduce.py --cost")


# ---- Command line ----


def jobs(names):
    """[(suite, variant, seed), ...] for names such as n16/plain; first seeds first, so that a table fills evenly."""
    chosen = []
    for name in names:
        suite, _, variant = name.partition("/")
        if suite not in SUITES or variant not in SUITES[suite].names:
            known = " ".join(f"{s}/{v}" for s in SUITES for v in SUITES[s].names)
            raise UserError(f"there is no variant {name!r}; known are: {known}", code=2)
        chosen += [(suite, variant, seed) for seed in range(SUITES[suite].names[variant] or VARIANTS[variant].seeds)]
    return sorted(chosen, key=lambda job: job[2])


def main(argv):
    parser = prepare_data.Parser(prog="reproduce.py", description=__doc__.splitlines()[0])
    parser.add_argument("variants", nargs="*", help="such as n16/plain (default: all of n16 and n64)")
    parser.add_argument("--again", type=int, metavar="SEED", help="train a finished run again, and compare")
    parser.add_argument("--cost", action="store_true", help="time the variants of n16 in turn; writes n16/cost.json")
    options = parser.parse_args(argv)
    if options.cost and options.variants:
        parser.error("--cost is of all variants of n16; name none")
    todo = jobs(options.variants or [f"{suite}/{name}" for suite in ("n16", "n64") for name in SUITES[suite].names])
    if not Path("data/demo/meta.json").exists():
        prepare_data.main(["demo"])
    if options.cost:
        prepare_data.write_whole(RESULTS / "n16" / "cost.json", [json.dumps(measure_cost("n16")).encode()])
        return 0
    if options.again is not None:
        for suite, variant in sorted({job[:2] for job in todo}):
            again(suite, variant, options.again)
        return 0
    for i, (suite, variant, seed) in enumerate(todo, 1):
        path = RESULTS / suite / f"{variant}-{seed}.json"
        if path.exists():
            load(path)
            continue
        print(f"\n== {i} of {len(todo)}: {suite}/{variant}, seed {seed}", flush=True)
        try:
            result = run(suite, variant, seed)
        except UserError as error:
            if "another run is writing" not in str(error):
                raise
            print("another process is at work on it")
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        prepare_data.write_whole(path, [json.dumps(result).encode()])
    return 0


if __name__ == "__main__":
    sys.exit(prepare_data.run(main))
