"""How fast is it? One command, one process, on whatever machine it finds: a GPU if there is one, else the CPU.

    python experiments/bench.py               # all sections, about 15 minutes on two quiet CPU cores
    python experiments/bench.py --only erc    # measures one section again
    python experiments/bench.py --table       # prints the tables from the result files

Everything that is compared runs in interleaved rounds: each round runs each contender once, one after the other, on the
same batch, and a ratio is the median of the ratios within rounds (in brackets: the quartiles). So a machine that slows
down for a while slows everyone down alike. The raw times, in order, are in results/bench-MACHINE.json.

  step      a whole training step (forward, backward, clipping, fused AdamW): ours; the plain loop over experts; Hugging
            Face's OlmoeForCausalLM with the same weights (needs transformers); a dense model with as many active
            parameters; and what the machine's matrix product can do at best
  erc       the step with and without the ERC loss; its cost against the formula n^2 / (3 K N)
  scaling   the MoE layer's time per token, from few experts to many
  overhead  what a default run spends on data, log, evaluation and checkpoints
  memory    a step of the GPU presets (on a GPU only)
"""

import copy
import csv
import gc
import json
import os
import platform
import random
import re
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to be run as it stands, from any folder

import torch
import torch.nn.functional as F
from olmoe import LAYER_NAMES

import prepare_data
import train
from erc_moe import MoE, MoEConfig, MoEStats, MoETransformer, balance_loss, erc_loss, z_loss
from prepare_data import UserError
from train import Run, TrainConfig

RESULTS = Path(__file__).parent / "results"
SEED = 0


@dataclass(frozen=True)
class Setup:
    """What is measured on this machine, at which sizes; the defaults are those for a CPU."""

    device: torch.device
    rounds: int                # that count; before them, `warmup` more
    data: str                  # folder of shards
    scratch: Path              # for checkpoints and logs, gone afterwards
    warmup: int = 2
    model: MoEConfig = MoEConfig(512, 256, n_layers=6, n_heads=8, d_model=256, d_expert=256, n_experts=16, top_k=2)
    demo: MoEConfig = MoEConfig()  # the model of a default run
    batch_size: int = 8        # sequences in a micro-batch
    dtype: torch.dtype = torch.float32
    accumulate: tuple = (1, 4)
    experts: tuple = (8, 16, 32, 64, 128, 256)
    erc_experts: tuple = (8, 16, 64, 256)
    rows: tuple = (64, 256)    # per expert, where there are most experts
    squares: tuple = (512, 1024, 2048)

    def tokens(self):
        return self.batch_size * self.model.context_length

    def seconds(self, function, *args):
        """How long function(*args) takes."""
        wait = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        wait()
        start = time.perf_counter()
        function(*args)
        wait()
        return time.perf_counter() - start

    def autocast(self, dtype):
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32)


def setup_for(quick, rounds, scratch):
    """The Setup for this machine; with `quick`, sizes that say nothing but run in seconds."""
    gpu, data = torch.cuda.is_available(), "data/demo"
    device = torch.device("cuda" if gpu else "cpu")
    if quick:
        Path(scratch, "text.txt").write_text("the fox sings under the moon\n" * 300, encoding="utf-8")
        data = str(Path(scratch, "shards"))
        prepare_data.main([str(Path(scratch, "text.txt")), "--out", data, "--tokenizer", "bytes"])
        model = MoEConfig(320, 32, n_layers=2, n_heads=2, d_model=32, d_expert=16, n_experts=4, top_k=2)
        sizes = dict(model=model, demo=model, batch_size=2, experts=(4, 8), erc_experts=(4, 8), rows=(8, 16),
                     squares=(64,), warmup=1)
    elif gpu:
        model = MoEConfig(50304, 1024, n_layers=8, n_heads=8, d_model=512, d_expert=384, n_experts=32, top_k=4)
        large = torch.cuda.get_device_properties(0).total_memory > 70e9  # all contenders lie in it, side by side
        sizes = dict(model=model, batch_size=32 if large else 4, accumulate=(2, 8), rows=(64, 512),
                     squares=(2048, 4096, 8192))
    else:
        sizes = {}
    if not Path(data, "meta.json").exists():
        prepare_data.main(["demo"])
    return Setup(device, rounds, data, Path(scratch), dtype=train.pick_dtype("auto", device), **sizes)


def interleave(functions, setup, settle=False):
    """Runs each function(round) once per round, in another order each time -> {name: [seconds, ...]}.

    settle: once more before, untimed. In bfloat16, oneDNN keeps the last 1,024 kernels that it compiled; a contender
    that needs new ones in every step throws out everybody's, and alone, as in training, each would have its own.
    """
    names, times = list(functions), {name: [] for name in functions}
    for r in range(setup.warmup + setup.rounds):
        for name in random.Random(r).sample(names, len(names)):  # so that nobody always has the same predecessor
            if settle:
                functions[name](r)
            times[name].append(setup.seconds(functions[name], r))
    return {name: values[setup.warmup:] for name, values in times.items()}


# ---- A training step, ours and others' ----


class LoopMoE(MoE):
    """The same function as MoE, the way it is usually written: for each expert, find its tokens; add up the outputs."""

    def forward(self, x):
        shape, x = x.shape, x.flatten(0, 1)                                            # (N, d)
        logits, probs, weights, experts = self.route(x)
        y = torch.zeros_like(x)
        for j, (W_g, W_p, W_o) in enumerate(zip(self.W_g.unbind(), self.W_p.unbind(), self.W_o.unbind())):
            token, choice = (experts == j).nonzero(as_tuple=True)                      # (rows,), (rows,)
            rows = x[token]                                                            # (rows, d)
            h = F.silu(rows @ W_g) * (rows @ W_p)                                      # (rows, D)
            y.index_add_(0, token, ((h @ W_o) * weights[token, choice, None]).to(y.dtype))
        load = torch.bincount(experts.flatten(), minlength=len(self.R))                # (n,)
        return y.view(shape), MoEStats(balance_loss(probs, load), z_loss(logits), load)


def olmoe_model(model, experts):
    """OlmoeForCausalLM with the weights of our model; `experts`: "eager" or "grouped_mm". ImportError without it."""
    import transformers  # optional

    c = model.config
    theirs = transformers.OlmoeForCausalLM(transformers.OlmoeConfig(
        vocab_size=c.vocab_size, max_position_embeddings=c.context_length, num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads, hidden_size=c.d_model, intermediate_size=c.d_expert, num_experts=c.n_experts,
        num_experts_per_tok=c.top_k, rms_norm_eps=c.norm_eps, router_aux_loss_coef=0.01 / c.top_k,  # theirs sums to K
        bos_token_id=None, eos_token_id=None, pad_token_id=None)).to(model.head.weight.device)
    theirs.set_experts_implementation(experts)
    state = {"model.embed_tokens.weight": model.embedding.weight, "model.norm.weight": model.norm.weight,
             "lm_head.weight": model.head.weight}
    for i, block in enumerate(model.blocks):
        layer, moe = f"model.layers.{i}.", block.moe
        state |= {layer + name: block.get_parameter(ours) for ours, name in LAYER_NAMES.items()}
        state[layer + "mlp.experts.gate_up_proj"] = torch.cat((moe.W_g, moe.W_p), dim=-1).transpose(1, 2)
        state[layer + "mlp.experts.down_proj"] = moe.W_o.transpose(1, 2)
    theirs.load_state_dict(state)
    return theirs.train()


def contender(name, ours, setup):
    """The model called "KIND, DTYPE[, compiled]", with the weights of `ours` -> a function (inputs, targets) -> ce."""
    kind, dtype, *compiled = name.split(", ")
    dtype, config = getattr(torch, dtype), ours.config
    if kind.startswith("OLMoE"):
        model = olmoe_model(ours, kind.split()[1])
        if "weights" in kind:  # their grouped product takes the type of the weights, whatever autocast says
            model = model.to(dtype)
    elif kind == "dense":
        dense = replace(config, n_experts=1, top_k=1, d_expert=config.top_k * config.d_expert)
        model = MoETransformer(dense).to(setup.device)
    else:
        model = copy.deepcopy(ours)
        for block in model.blocks if kind == "loop" else []:
            block.moe.__class__ = LoopMoE
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    scaler = torch.amp.GradScaler(setup.device.type, enabled=dtype == torch.float16)
    forward = torch.compile(model, dynamic=False, fullgraph=True) if compiled else model

    def step(inputs, targets):
        with setup.autocast(torch.float32 if "weights" in kind else dtype):
            if kind.startswith("OLMoE"):
                out = forward(inputs, labels=targets, shift_labels=targets, use_cache=False, output_router_logits=True)
                loss, ce = out.loss, out.loss - 0.01 / config.top_k * out.aux_loss
            else:
                out = forward(inputs, targets)
                loss, ce = out.ce + 0.01 * out.balance + 0.001 * out.z, out.ce
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return ce.detach()

    return step


def flops_per_token(config):
    """Of a training step: 6 for each active parameter but the embedding's, 12 T/2 d in the attention of each layer."""
    with torch.device("meta"):
        active = MoETransformer(config).num_params()[1] - config.vocab_size * config.d_model
    return 6 * active + 6 * config.n_layers * config.context_length * config.d_model


def measure_step(setup):
    gpu, native = setup.device.type == "cuda", setup.dtype == torch.bfloat16  # emulated, a step would take minutes
    kinds = ("ours", "loop", "OLMoE eager", "OLMoE grouped_mm", "dense")
    names = [f"{kind}, float32" for kind in kinds if not gpu]
    if native:
        names += [f"{kind}, bfloat16" for kind in kinds] + ["OLMoE grouped_mm with bfloat16 weights, bfloat16"]
    if gpu and native:
        names += ["ours, bfloat16, compiled", "dense, bfloat16, compiled"]
    if gpu:  # which shows the way without a fused grouped product, on a GPU that has one for bfloat16, too
        names += ["ours, float16"]
    torch.manual_seed(SEED)
    ours, functions, ce, skipped = MoETransformer(setup.model).to(setup.device), {}, {}, []
    shape = (setup.warmup + setup.rounds, 2, setup.batch_size, setup.model.context_length)
    batches = torch.randint(setup.model.vocab_size, shape).to(setup.device)            # (rounds, 2, B, T)
    for name in names:
        try:
            step = contender(name, ours, setup)
        except ImportError:
            skipped.append(f"{name}: needs transformers (pip install transformers)")
            continue
        ce[name] = []
        functions[name] = lambda r, step=step, ce=ce[name]: ce.append(step(*batches[r]))
    for dtype in (torch.float32, torch.bfloat16) if native else (torch.float32,):
        for size in setup.squares:
            a, b = torch.randn(2, size, size, device=setup.device).to(dtype)
            functions[f"matmul {size}, {str(dtype)[6:]}"] = lambda r, a=a, b=b: a @ b
    times = interleave(functions, setup, settle=True)
    return dict(tokens=setup.tokens(), flops_per_token=flops_per_token(setup.model), skipped=skipped, seconds=times,
                ce={name: torch.stack(values).tolist() for name, values in ce.items()})  # warm-up included


# ---- The price of the ERC loss ----


def take_step(run, step, erc, extra_loss=None):
    """One step of the trainer, as in train.train, without its log."""
    means, _ = run.add_token_gradient(step)
    run.scaler.unscale_(run.optimizer)
    if erc:
        run.add_erc_gradient(step)
    if extra_loss:
        extra_loss(run.model).backward()
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.config.grad_clip)
    run.update(step, norm, means[0])


def layer_pass(n, tokens, setup):
    """(moe, function): one MoE layer of n experts, and its forward and backward pass over that many tokens."""
    torch.manual_seed(SEED)
    moe = MoE(replace(setup.model, n_experts=n)).to(setup.device)
    x = torch.randn(1, tokens, setup.model.d_model, device=setup.device, requires_grad=True)
    gradient = torch.randn_like(x)

    def run(_):
        moe.zero_grad()
        x.grad = None
        with setup.autocast(setup.dtype):
            y, stats = moe(x)
        torch.autograd.backward((y, 0.01 * stats.balance, 0.001 * stats.z), (gradient.to(y.dtype), None, None))

    return moe, run


def measure_erc(setup):
    """A step without the loss; with it while constraints are broken ("acting"), as at the start of a run; and with it
    where none is ("coupled"), as in most steps later on. With next to no learning rate, each stays what it is. The
    difference of two long steps is noisy, so the loss is timed inside of its steps, too ("the loss itself").
    """
    functions, itself, native = {}, {}, setup.dtype == torch.bfloat16
    for accumulate in setup.accumulate:
        config = TrainConfig(data=setup.data, device=str(setup.device), lr=1e-12, seed=SEED, accumulate=accumulate,
                             batch_size=setup.batch_size, compile=setup.device.type == "cuda" and native)
        off, acting, coupled = (Run(config, None, MoETransformer(setup.model)) for _ in range(3))
        optimizer = torch.optim.Adam(coupled.model.parameters(), lr=3e-3)
        for step in range(100):
            coupled.add_erc_gradient(step)
            optimizer.step()
            optimizer.zero_grad()
        for state, run in dict(off=off, acting=acting, coupled=coupled).items():
            name = f"accumulate {accumulate}, {state}"
            functions[name] = lambda r, run=run, erc=state != "off": take_step(run, r + 1, erc)
            if state != "off":
                times = itself[f"{name}, the loss itself"] = []
                run.add_erc_gradient = lambda step, add=run.add_erc_gradient, times=times: times.append(
                    setup.seconds(add, step))
    for n in setup.erc_experts:  # the loss after the layer's backward pass, as in the trainer: it adds to gradients
        moe, functions[f"layer {n}"] = layer_pass(n, setup.tokens(), setup)
        functions[f"loss {n}"] = lambda _, moe=moe: erc_loss(moe.R, moe.W_g).backward()
    c = setup.model
    share = 6 * c.n_layers * c.n_experts**2 * c.d_model * c.d_expert / (setup.tokens() * flops_per_token(c))
    seconds = interleave(functions, setup) | {name: times[setup.warmup:] for name, times in itself.items()}
    return dict(tokens=setup.tokens(), top_k=c.top_k, accumulate=setup.accumulate, experts=setup.erc_experts,
                dtype=str(setup.dtype)[6:], predicted_share_of_step=share, seconds=seconds)


# ---- Many experts ----


def measure_scaling(setup):
    K, d, D = setup.model.top_k, setup.model.d_model, setup.model.d_expert
    all_tokens = [rows * max(setup.experts) // K for rows in setup.rows]
    functions = {f"{n} experts, {tokens} tokens": layer_pass(n, tokens, setup)[1]
                 for tokens in all_tokens for n in setup.experts}
    return dict(tokens=all_tokens, experts=setup.experts, top_k=K, dtype=str(setup.dtype)[6:],
                flops_per_token={n: 18 * K * d * D + 6 * n * d for n in setup.experts},
                seconds=interleave(functions, setup))


# ---- A default run, aside from its steps ----


def measure_overhead(setup):
    config = TrainConfig(data=setup.data, device=str(setup.device), seed=SEED)
    run = Run(config, setup.demo, None)
    folder = setup.scratch / "run"
    folder.mkdir(exist_ok=True)
    with open(os.devnull, "w") as console, open(folder / "log.csv", "w", buffering=1) as file:
        writer = csv.DictWriter(file, train.LOG_COLUMNS)

        def log(_):
            row = dict.fromkeys(train.LOG_COLUMNS, 0) | train.coupling(run.model, config.erc_alpha)
            writer.writerow(row)
            print(train.log_line(row), file=console)

        times = interleave({
            "step": lambda r: take_step(run, r + 1, erc=True),
            "data": lambda r: train.train_batch(run.data, run.context, config.batch_size,
                                                train.keyed_generator("cpu", SEED, r, "batch", 0)),
            "log": log,
            "evaluation": lambda _: train.evaluate(run.model, run.val, run.device, run.autocast),
            "checkpoint": lambda _: train.save_checkpoint(folder, run.state()),
        }, setup)
    return dict(every=dict(data=1, log=config.log_every, evaluation=config.eval_every, checkpoint=config.save_every),
                seconds=times)


# ---- Memory of the presets ----


def measure_memory(setup):
    if setup.device.type != "cuda":
        return dict(skipped="no GPU here: not measured")
    peak = {}
    for name in ("tinystories", "openwebtext"):
        config, moe = train.configs({**train.PRESETS[name], "data": setup.data, "device": str(setup.device)})
        run = Run(config, None, MoETransformer(replace(moe, vocab_size=50304)))
        take_step(run, 1, erc=True)  # at the end of which the optimizer makes room for its moments
        torch.cuda.reset_peak_memory_stats()
        take_step(run, 2, erc=True)
        peak[name] = torch.cuda.max_memory_allocated()
        del run
    return dict(bytes=peak)


# ---- Tables ----


def spread(values, form="{:.2f}"):
    """"median (lower..upper quartile)"."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{form} ({form}..{form})".format(middle, low, high)


def ratio(times, a, b, form="{:.2f}", less=0):
    """The time of `a` in units of that of `b`, round by round; `less` 1: how much longer a takes."""
    return spread([x / y - less for x, y in zip(times[a], times[b])], form)


def table(*rows):
    """Markdown, the first row on top."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def show_step(result):
    times, tokens = result["seconds"], result["tokens"]
    peak = {}
    for name in times:
        if name.startswith("matmul"):
            size, dtype = name.removeprefix("matmul ").split(", ")
            peak[dtype] = max(peak.get(dtype, 0), 2 * int(size) ** 3 / min(times[name]))
    rows = [("", "ms per step", "tokens/s", "share of the matmul peak", "time / ours, same type")]
    for name in result["ce"]:
        kind, dtype, *compiled = name.split(", ")
        seconds = statistics.median(times[name])
        share = tokens * result["flops_per_token"] / seconds / peak[dtype] if dtype in peak else None
        rows.append((name, spread([1000 * t for t in times[name]], "{:.0f}"), f"{tokens / seconds:,.0f}",
                     f"{share:.0%}" if share else "", ratio(times, name, ", ".join(["ours", dtype, *compiled]))))
    lines = [table(*rows), "", *result["skipped"], "In the last column, above 1 means that ours is faster.",
             f"{result['flops_per_token'] / 1e6:.1f} MFLOP per token: 6 for each active parameter but the embedding's,"
             " and 6 T d per layer for causal attention (dense: the same, less the router).",
             "Peak, the best square product of any round: "
             + ", ".join(f"{dtype} {flops / 1e9:,.0f} GFLOP/s" for dtype, flops in peak.items()) + "."]
    if {"ours, float32", "ours, bfloat16"} <= set(times):
        lines.append(f"Ours in float32 / in bfloat16: {ratio(times, 'ours, float32', 'ours, bfloat16')}.")
    return "\n".join(lines)


def show_erc(result):
    times, tokens, K = result["seconds"], result["tokens"], result["top_k"]
    steps = [("tokens per step", "constraints", "ms per step without ERC", "the loss itself, of that",
              "step with ERC less step without", "predicted by FLOPs")]
    for a in result["accumulate"]:
        off = f"accumulate {a}, off"
        for constraints, state in dict(broken="acting", hold="coupled").items():
            on = f"accumulate {a}, {state}"
            steps.append((f"{a} x {tokens}", constraints, spread([1000 * t for t in times[off]], "{:.0f}"),
                          ratio(times, f"{on}, the loss itself", off, "{:.1%}"),
                          ratio(times, on, off, "{:+.1%}", less=1), f"{result['predicted_share_of_step'] / a:.1%}"))
    losses = [("n", f"layer, {tokens} tokens, ms", "ERC loss, ms", "loss / layer", "n^2 / (3 K N)")]
    for n in result["experts"]:
        losses.append((n, *(spread([1000 * t for t in times[f"{part} {n}"]], "{:.1f}") for part in ("layer", "loss")),
                       ratio(times, f"loss {n}", f"layer {n}", "{:.1%}"), f"{n**2 / (3 * K * tokens):.1%}"))
    return (f"{table(*steps)}\n\nOne MoE layer, forward and backward, K={K}; the loss works in float32, all else in"
            f" {result['dtype']}:\n\n{table(*losses)}")


def show_scaling(result):
    times, experts, tables = result["seconds"], result["experts"], []
    for tokens in result["tokens"]:
        rows = [("experts", "rows per expert", "us per token", f"time / time of {experts[0]} experts", "FLOPs / FLOPs")]
        for n in experts:
            name, first = (f"{m} experts, {tokens} tokens" for m in (n, experts[0]))
            flops = [result["flops_per_token"][str(m)] for m in (n, experts[0])]
            rows.append((n, tokens * result["top_k"] // n, spread([1e6 * t / tokens for t in times[name]], "{:.1f}"),
                         ratio(times, name, first), f"{flops[0] / flops[1]:.2f}"))
        tables.append(f"{tokens} tokens, K={result['top_k']}, {result['dtype']}:\n\n{table(*rows)}")
    return "\n\n".join(tables)


def show_overhead(result):
    times, every = result["seconds"], result["every"]
    step = [t - data for t, data in zip(times["step"], times["data"])]  # take_step draws its batch, too
    shares = {name: [t / steps / s for t, s in zip(times[name], step)] for name, steps in every.items()}
    rows = [("", "ms", "every ... steps", "share of the step")]
    rows += [(name, spread([1000 * t for t in times[name]]), every[name], spread(shares[name], "{:.2%}"))
             for name in every]
    rows.append(("together", "", "", spread([sum(values) for values in zip(*shares.values())], "{:.2%}")))
    return f"A step without its batch: {spread([1000 * t for t in step], '{:.0f}')} ms.\n\n{table(*rows)}"


def show_memory(result):
    if "skipped" in result:
        return result["skipped"]
    return table(("preset", "peak GiB in a step"), *((k, f"{v / 2**30:.1f}") for k, v in result["bytes"].items()))


SECTIONS = dict(step=(measure_step, show_step), erc=(measure_erc, show_erc), scaling=(measure_scaling, show_scaling),
                overhead=(measure_overhead, show_overhead), memory=(measure_memory, show_memory))


def show(name, result):
    about = (f"{result['device']}, {result['threads']} threads, torch {result['torch']}, transformers"
             f" {result['transformers']}, Python {result['python']}, {result['date']}, seed {result['seed']},"
             f" {result['rounds']} rounds: `{result['command']}`")
    try:
        return f"## {name}\n\n{about}\n\n{SECTIONS[name][1](result)}\n"
    except KeyError as error:
        raise UserError(f"section {name} was measured by another version; run bench.py --only {name}") from error


def about(setup, argv):
    """(name of this machine in file names, facts that stand in every section)."""
    gpu = setup.device.type == "cuda"
    name = torch.cuda.get_device_name(setup.device) if gpu else f"CPU {os.cpu_count()} cores"
    model = getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name", platform.machine())
    return re.sub(r"\W+", "-", name.lower()).strip("-"), dict(
        device=name if gpu else f"{name}, {model}", threads=torch.get_num_threads(), torch=torch.__version__,
        transformers=getattr(sys.modules.get("transformers"), "__version__", "not used"),
        python=platform.python_version(), date=str(date.today()), seed=SEED,
        rounds=setup.rounds, command=" ".join(["python experiments/bench.py", *argv]))


def main(argv):
    parser = prepare_data.Parser(prog="bench.py", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see it run; writes to out/bench-quick")
    parser.add_argument("--rounds", type=int, default=15, help="rounds that count (default: 15)")
    parser.add_argument("--only", choices=SECTIONS, help="measure this section; keep the others in the result file")
    parser.add_argument("--table", action="store_true", help="measure nothing; print the tables of the result files")
    options = parser.parse_args(argv)
    if options.rounds < 2:
        parser.error("--rounds must be at least 2")
    folder = Path("out", "bench-quick") if options.quick else RESULTS
    if options.table:
        for path in sorted(folder.glob("bench-*.json")):
            for name, result in json.loads(path.read_text(encoding="utf-8")).items():
                print(show(name, result))
        return 0
    if not torch.cuda.is_available():
        print("No GPU here: speed on a GPU, float16 and memory of the presets are not measured.\n")
    with tempfile.TemporaryDirectory() as scratch:
        setup = setup_for(options.quick, options.rounds, scratch)
        path = folder / f"bench-{about(setup, argv)[0]}.json"
        results = json.loads(path.read_text(encoding="utf-8")) if options.only and path.exists() else {}
        for name in [options.only] if options.only else SECTIONS:
            measured = SECTIONS[name][0](setup)
            results[name] = json.loads(json.dumps(about(setup, argv)[1] | measured))  # as read from the file
            folder.mkdir(parents=True, exist_ok=True)
            prepare_data.write_whole(path, [json.dumps(results).encode()])
            print(show(name, results[name]), flush=True)
            gc.collect()  # models that refer to themselves, for one, would count as memory of the next section
    return 0


if __name__ == "__main__":
    sys.exit(prepare_data.run(main))
