"""How fast is it? One command, one process, on whatever machine it finds: a GPU if there is one, else the CPU.

    python experiments/bench.py               # all sections of this machine, about 10 minutes on two quiet CPU cores
    python experiments/bench.py --only erc    # measures one section again

What is compared runs in interleaved rounds: each round runs each contender once. A ratio is the median of the ratios
within rounds, with its quartiles in brackets. A machine that slows down for a while slows everyone down alike. All
times, in order, are in results/bench-MACHINE.json, of a GPU in results/gpu/gpu-MACHINE.json.

  step     a whole training step (forward, backward, clipping, fused AdamW): ours; the usual loop over experts; our
           layer as it was in the first edition; Hugging Face's OlmoeForCausalLM of the same shape, where transformers
           is installed; a dense model with as many active parameters; the machine's best matrix product
  presets  a step of the trainer with the GPU presets, and its peak memory (on a GPU only)
  erc      what the ERC loss adds to a step
  scaling  the MoE layer alone, from few experts to many
"""

import argparse
import copy
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
from dataclasses import replace
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to be run as it stands, from any folder

import torch
import torch.nn.functional as F

import prepare_data
import train
from erc_moe import MoE, MoEConfig, MoEStats, MoETransformer, balance_loss, z_loss
from train import Run, TrainConfig

RESULTS = Path(__file__).parent / "results"
SEED, WARMUP = 0, 2  # rounds that do not count


class Setup:
    """What is measured on this machine, at which sizes. Those of --quick say nothing, but run in seconds on a CPU."""

    def __init__(self, options, scratch):
        self.quick, self.rounds, self.seconds = options.quick, options.rounds, options.seconds
        self.gpu = torch.cuda.is_available() and not options.quick
        self.device, self.data = torch.device("cuda" if self.gpu else "cpu"), "data/demo"
        self.dtype = train.pick_dtype("auto", self.device)
        self.compile = options.compile and dict(dynamic=False, fullgraph=True,
                                                backend="inductor" if self.gpu else "aot_eager")
        self.experts, self.scaling_tokens = (8, 16, 32, 64, 128, 256), (8192, 32768)
        if options.quick:
            Path(scratch, "text.txt").write_text("the fox sings under the moon\n" * 300, encoding="utf-8")
            self.data = str(Path(scratch, "shards"))
            prepare_data.main([str(Path(scratch, "text.txt")), "--out", self.data, "--tokenizer", "bytes"])
            self.model = MoEConfig(320, 32, n_layers=2, n_heads=2, d_model=32, d_expert=16, n_experts=4, top_k=2)
            self.batch_size, self.squares, self.erc_steps = 2, (64,), ((4, 64), (8, 128))
            self.experts, self.scaling_tokens = (4, 8), (32, 64)
        elif self.gpu:
            memory = torch.cuda.get_device_properties(0).total_memory  # all contenders lie in it, side by side
            self.model = MoEConfig(50304, 1024, n_layers=8, n_heads=8, d_model=512, d_expert=384, n_experts=32, top_k=4)
            self.batch_size = 32 if memory > 100e9 else 16 if memory > 70e9 else 4
            self.erc_steps = [(n, tokens) for n in (64, 256)[:1 + (memory > 40e9)] for tokens in (2048, 16384, 65536)]
            self.squares = (2048, 4096, 8192)
        else:
            self.model = MoEConfig(512, 256, n_layers=6, n_heads=8, d_model=256, d_expert=256, n_experts=16, top_k=2)
            self.batch_size, self.squares = 8, (512, 1024, 2048)
            self.erc_steps = ((8, 2048), (16, 2048), (64, 2048), (16, 8192))
        self.tokens = self.batch_size * self.model.context_length
        if not Path(self.data, "meta.json").exists():
            prepare_data.main(["demo"])

    def time(self, function, *args):
        """How long function(*args) takes, in seconds."""
        wait = torch.cuda.synchronize if self.gpu else lambda: None
        wait()
        start = time.perf_counter()
        function(*args)
        wait()
        return time.perf_counter() - start

    def autocast(self, dtype):
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32)

    def interleave(self, functions):
        """Runs each function(round) once per round, in another order each time -> {name: [seconds, ...]}."""
        names, times = list(functions), {name: [] for name in functions}
        for r in range(WARMUP + self.rounds):
            if r == WARMUP:
                start = time.perf_counter()
            if r >= WARMUP + 2 and time.perf_counter() > start + self.seconds:
                break
            for name in random.Random(r).sample(names, len(names)):  # so that nobody always has the same predecessor
                times[name].append(self.time(functions[name], r))
        return {name: values[WARMUP:] for name, values in times.items()}


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


class TakeRows(torch.autograd.Function):
    """x [rows, d], take [out, m] -> [out, d], the sum of m rows each. takers [rows, k] names who took a row, so that
    the backward pass is a gather, too, without atomic additions.
    """

    @staticmethod
    def forward(ctx, x, take, takers):
        ctx.save_for_backward(take, takers)
        return x.index_select(0, take.flatten()).view(*take.shape, -1).sum(dim=1)

    @staticmethod
    def backward(ctx, grad):
        take, takers = ctx.saved_tensors
        return TakeRows.apply(grad, takers, take), None, None


class GatherMoE(MoE):
    """The same function as MoE, as in this project's first edition: rows are gathered, forward and backward."""

    def forward(self, x):
        shape, x = x.shape, x.flatten(0, 1)                                            # (N, d)
        logits, probs, weights, experts = self.route(x)
        expert, pair = experts.flatten().sort(stable=True)                             # (N*K,), (N*K,)
        row = torch.empty_like(pair).scatter_(0, pair, torch.arange(len(pair), device=x.device))       # its inverse
        ends = torch.searchsorted(expert, torch.arange(len(self.R), device=x.device), right=True, out_int32=True)
        load = ends.diff(prepend=ends.new_zeros(1))                                    # (n,)
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        W_g, W_p, W_o = self.W_g.to(dtype), self.W_p.to(dtype), self.W_o.to(dtype)
        token_of, rows_of = pair[:, None] // self.top_k, row.view(-1, self.top_k)      # (N*K, 1), (N, K)
        rows = TakeRows.apply(x.to(dtype), token_of, rows_of)                          # (N*K, d)
        scale = TakeRows.apply(weights.reshape(-1, 1), pair[:, None], row[:, None]).to(dtype)          # (N*K, 1)
        h = F.silu(F.grouped_mm(rows, W_g, offs=ends)) * F.grouped_mm(rows, W_p, offs=ends)
        y = TakeRows.apply(F.grouped_mm(h * scale, W_o, offs=ends), rows_of, token_of)                 # (N, d)
        return y.view(shape), MoEStats(balance_loss(probs, load), z_loss(logits), load)


LAYERS = {"ours": MoE, "first edition": GatherMoE, "loop": LoopMoE}


def olmoe_model(c, experts):
    """OlmoeForCausalLM of the shape of our MoEConfig; `experts`: "eager" or "grouped_mm"."""
    import transformers  # optional

    theirs = transformers.OlmoeForCausalLM(transformers.OlmoeConfig(
        vocab_size=c.vocab_size, max_position_embeddings=c.context_length, num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads, hidden_size=c.d_model, intermediate_size=c.d_expert, num_experts=c.n_experts,
        num_experts_per_tok=c.top_k, rms_norm_eps=c.norm_eps, router_aux_loss_coef=0.01 / c.top_k,  # theirs sums to K
        bos_token_id=None, eos_token_id=None, pad_token_id=None))
    theirs.set_experts_implementation(experts)
    return theirs.train()


def contender(name, ours, setup):
    """The model called "KIND, DTYPE[, compiled]" -> a function (inputs, targets) -> ce."""
    kind, dtype, *compiled = name.split(", ")
    dtype, config = getattr(torch, dtype), ours.config
    if kind.startswith("OLMoE"):  # their grouped product takes the type of the weights, whatever autocast says
        model = olmoe_model(config, kind.split()[1]).to(setup.device, dtype if "weights" in kind else torch.float32)
    elif kind == "dense":
        dense = replace(config, n_experts=1, top_k=1, d_expert=config.top_k * config.d_expert)
        model = MoETransformer(dense).to(setup.device)
    else:
        model = copy.deepcopy(ours)
        for moe in model.moe_layers():
            moe.__class__ = LAYERS[kind]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    scaler = torch.amp.GradScaler(setup.device.type, enabled=dtype == torch.float16)
    forward = torch.compile(model, **setup.compile) if compiled else model

    def step(inputs, targets):
        with setup.autocast(torch.float32 if "weights" in kind else dtype):
            if kind.startswith("OLMoE"):
                out = forward(inputs, labels=targets, shift_labels=targets, use_cache=False, output_router_logits=True)
                loss = ce = out.loss
            else:
                out = forward(inputs, targets)
                loss, ce = out.ce + 0.01 * out.balance, out.ce
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return ce.detach().float()

    return step


def flops_per_token(config):
    """Of a training step: 6 for each active parameter but the embedding's, 12 T/2 d in the attention of each layer."""
    with torch.device("meta"):
        active = MoETransformer(config).num_params()[1] - config.vocab_size * config.d_model
    return 6 * active + 6 * config.n_layers * config.context_length * config.d_model


def step_names(setup):
    """Who competes on this device."""
    names, dtype = [], "bfloat16" if setup.quick else str(setup.dtype)[6:]
    if not setup.gpu:
        names += [f"{kind}, float32" for kind in ("ours", "loop", "OLMoE eager", "OLMoE grouped_mm", "dense")]
    if setup.gpu or setup.quick:
        names += [f"{kind}, {dtype}" for kind in (*LAYERS, "dense")] + ["ours, float16"]  # the way of older GPUs
        names += ["OLMoE grouped_mm with bfloat16 weights, bfloat16"] * (dtype == "bfloat16")
        names += [f"{kind}, {dtype}, compiled" for kind in ("ours", "dense", "first edition") if setup.compile]
    return list(dict.fromkeys(names))


def measure_step(setup):
    torch.manual_seed(SEED)
    ours, functions, ce, left_out = MoETransformer(setup.model).to(setup.device), {}, {}, {}
    shape = (WARMUP + setup.rounds, 2, setup.batch_size, setup.model.context_length)
    batches = torch.randint(setup.model.vocab_size, shape).to(setup.device)            # (rounds, 2, B, T)
    for name in step_names(setup):
        try:
            step = contender(name, ours, setup)
            step(*batches[0])
        except Exception as error:  # without transformers, memory or a compiler: the others are measured all the same
            left_out[name] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            continue
        ce[name] = []
        functions[name] = lambda r, step=step, ce=ce[name]: ce.append(step(*batches[r]))
    for size in setup.squares:  # what the machine can do at best
        a, b = torch.randn(2, size, size, device=setup.device).to(setup.dtype)
        functions[f"matmul {size}, {str(setup.dtype)[6:]}"] = lambda r, a=a, b=b: a @ b
    token = torch.randint(setup.tokens, (setup.tokens * setup.model.top_k,), device=setup.device)      # (N*K,)
    for dtype in dict.fromkeys((torch.float32, setup.dtype)):  # rows are added up in float32, their gradients in dtype
        rows = torch.randn(len(token), setup.model.d_model, device=setup.device).to(dtype)             # (N*K, d)
        functions[f"index_add, {str(dtype)[6:]}"] = lambda _, rows=rows: rows.new_zeros(
            setup.tokens, setup.model.d_model).index_add(0, token, rows)
    times = setup.interleave(functions)
    ce = {name: torch.stack(values).tolist() for name, values in ce.items()}           # of all rounds
    return dict(tokens=setup.tokens, layers=setup.model.n_layers, flops_per_token=flops_per_token(setup.model), ce=ce,
                left_out=left_out, seconds=times)


# ---- The trainer's step with the GPU presets ----


def take_step(run, step, erc):
    """One step of the trainer, as in train.train, without its log -> ce []."""
    means, _ = run.add_token_gradient(step)
    run.scaler.unscale_(run.optimizer)
    if erc:
        run.add_erc_gradient(step)
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.config.grad_clip)
    run.update(step, norm, means[0], look=False)
    return means[0]


def measure_presets(setup):
    functions, peak, tokens = {}, {}, {}
    for name in ("tinystories", "openwebtext"):
        config, moe = train.configs({**train.PRESETS[name], "data": setup.data, "device": str(setup.device)})
        moe = replace(moe, vocab_size=50304)  # GPT-2's, rounded up
        if setup.quick:
            config, moe = replace(config, batch_size=2, accumulate=2, dtype="bf16"), setup.model
        for how in (name, f"{name}, compiled") if setup.compile else (name,):
            before = torch.cuda.memory_allocated()
            run = Run(config, None, MoETransformer(moe))
            if how != name:
                run.forward = torch.compile(run.model, **setup.compile)
            functions[how] = lambda r, run=run: take_step(run, r + 1, erc=True)
            functions[how](0)  # at the end of which the optimizer makes room for its moments
            if setup.gpu:
                torch.cuda.reset_peak_memory_stats()
            functions[how](1)
            peak[how], tokens[how] = torch.cuda.max_memory_allocated() - before, run.step_tokens
    return dict(bytes=peak, tokens=tokens, seconds=setup.interleave(functions),
                steps={name: train.PRESETS[name.split(",")[0]]["steps"] for name in functions})


# ---- Many experts ----


def layer_pass(moe, layer, tokens, setup):
    """A function: the forward and backward pass of one MoE layer over that many tokens, in the way of class `layer`."""
    x = torch.randn(1, tokens, setup.model.d_model, device=setup.device, requires_grad=True)
    gradient = torch.randn_like(x)

    def run(_):
        moe.zero_grad()
        x.grad = None
        with setup.autocast(setup.dtype):
            y, stats = layer.forward(moe, x)
        torch.autograd.backward((y, 0.01 * stats.balance), (gradient.to(y.dtype), None))

    return run


def measure_scaling(setup):
    torch.manual_seed(SEED)
    moes = {n: MoE(replace(setup.model, n_experts=n)).to(setup.device) for n in setup.experts}
    functions = {f"{kind}, {n} experts, {tokens} tokens": layer_pass(moe, layer, tokens, setup)
                 for tokens in setup.scaling_tokens for n, moe in moes.items() for kind, layer in LAYERS.items()}
    return dict(tokens=setup.scaling_tokens, experts=setup.experts, top_k=setup.model.top_k,
                seconds=setup.interleave(functions))


# ---- The price of the ERC loss ----


def measure_erc(setup):
    """A step without the loss and with it. The difference of two long steps is noisy, so the loss is timed alone, too.
    On a GPU it then waits for each of its small calls to be launched, which within a step happens in advance.
    """
    functions, share, model = {}, {}, setup.model
    if setup.gpu:
        model = replace(train.configs(train.PRESETS["openwebtext"])[1], vocab_size=50304)
    for n in dict.fromkeys(n for n, _ in setup.erc_steps):
        config = TrainConfig(data=setup.data, device=str(setup.device), lr=1e-12, seed=SEED)  # weights stay as they are
        run = Run(config, None, MoETransformer(replace(model, n_experts=n)))
        functions[f"n={n}, the loss alone"] = lambda r, run=run: run.add_erc_gradient(r + 1)
        for tokens in [tokens for m, tokens in setup.erc_steps if m == n]:
            rows, c, name = tokens // run.context, run.model.config, f"n={n}, {tokens} tokens"
            size = replace(config, batch_size=min(rows, setup.batch_size), accumulate=max(1, rows // setup.batch_size))

            def step(r, erc, run=run, size=size):
                run.config = size
                take_step(run, r + 1, erc)

            functions |= {f"{name}, off": lambda r, step=step: step(r, False),
                          f"{name}, on": lambda r, step=step: step(r, True)}
            share[name] = 6 * c.n_layers * n**2 * c.d_model * c.d_expert / (tokens * flops_per_token(c))
    return dict(steps=setup.erc_steps, predicted_share_of_step=share, seconds=setup.interleave(functions))


# ---- Tables ----


def spread(values, form="{:.2f}"):
    """"median (lower..upper quartile)"."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{form} ({form}..{form})".format(middle, low, high)


def ms(values, form="{:.0f}"):
    return spread([1000 * value for value in values], form)


def ratio(times, a, b, form="{:.2f}", less=0):
    """The time of `a` in units of that of `b`, round by round; `less` 1: how much longer a takes."""
    return spread([x / y - less for x, y in zip(times[a], times[b])], form)


def table(*rows):
    """Markdown, the first row on top."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def show_step(result):
    times, tokens, flops, peak = result["seconds"], result["tokens"], result["flops_per_token"], {}
    for name in times:
        if name.startswith("matmul"):
            size, dtype = name.removeprefix("matmul ").split(", ")
            peak[dtype] = max(peak.get(dtype, 0), 2 * int(size) ** 3 / min(times[name]))
    rows = [("", "ms per step", "tokens/s", "share of the matmul peak", "time / ours, same type")]
    for name in result["ce"]:
        kind, dtype, *compiled = name.split(", ")
        seconds, ours = statistics.median(times[name]), ", ".join(["ours", dtype, *compiled])
        share = f"{tokens * flops / seconds / peak[dtype]:.0%}" if dtype in peak else ""
        rows.append((name, ms(times[name]), f"{tokens / seconds:,.0f}", share,
                     ratio(times, name, ours) if ours in times else ""))
    adds = [name for name in times if name.startswith("index_add")]
    step = times["ours, " + adds[-1].removeprefix("index_add, ")]
    share = [result["layers"] * (f + b) / t for f, b, t in zip(times[adds[0]], times[adds[-1]], step)]
    best = ", ".join(f"{dtype} {value / 1e9:,.0f} GFLOP/s" for dtype, value in peak.items())
    return "\n".join([
        table(*rows), "", *(f"Left out: {name} ({why})." for name, why in result["left_out"].items()),
        f"{tokens:,} tokens per step. In the last column, above 1 means that ours is faster. {flops / 1e6:.1f} MFLOP"
        " per token: 6 for each active parameter but the embedding's, and 6 T d per layer for causal attention. Peak,"
        f" the best square product of any round: {best}. Our layers add up rows twice each, which takes"
        f" {spread(share, '{:.1%}')} of a step."])


def show_presets(result):
    rows = [("preset", "ms per step", "tokens/s", "hours to its end", "peak GiB in a step")]
    for name, times in result["seconds"].items():
        seconds = statistics.median(times)
        rows.append((name, ms(times), f"{result['tokens'][name] / seconds:,.0f}",
                     f"{result['steps'][name] * seconds / 3600:.1f}", f"{result['bytes'][name] / 2**30:.1f}"))
    return table(*rows)


def show_erc(result):
    times = result["seconds"]
    rows = [("n", "tokens per step", "ms per step without ERC", "the loss alone, ms", "the loss alone / step",
             "step with ERC less step without", "predicted by FLOPs")]
    for n, tokens in result["steps"]:
        name, alone = f"n={n}, {tokens} tokens", f"n={n}, the loss alone"
        rows.append((n, tokens, ms(times[f"{name}, off"]), ms(times[alone], "{:.1f}"),
                     ratio(times, alone, f"{name}, off", "{:.1%}"),
                     ratio(times, f"{name}, on", f"{name}, off", "{:+.1%}", less=1),
                     f"{result['predicted_share_of_step'][name]:.2%}"))
    return table(*rows)


def show_scaling(result):
    times, experts, tables = result["seconds"], result["experts"], []
    for tokens in result["tokens"]:
        rows = [("experts", "rows per expert", "us per token", f"time / time of {experts[0]} experts",
                 *(f"{kind} / ours" for kind in LAYERS if kind != "ours"))]
        for n in experts:
            name, first = (f"ours, {m} experts, {tokens} tokens" for m in (n, experts[0]))
            rows.append((n, tokens * result["top_k"] // n, spread([1e6 * t / tokens for t in times[name]], "{:.2f}"),
                         ratio(times, name, first), *(ratio(times, name.replace("ours", kind), name)
                                                      for kind in LAYERS if kind != "ours")))
        tables.append(f"{tokens:,} tokens, K={result['top_k']}:\n\n{table(*rows)}")
    return "\n\n".join(tables)


SECTIONS = dict(step=(measure_step, show_step), presets=(measure_presets, show_presets), erc=(measure_erc, show_erc),
                scaling=(measure_scaling, show_scaling))


def show(name, result):
    about = ", ".join(f"{word} {result[key]}".strip() for word, key in (
        ("", "device"), ("", "dtype"), ("threads", "threads"), ("torch", "torch"), ("transformers", "transformers"),
        ("Python", "python"), ("seed", "seed"), ("", "date")))
    return f"## {name}\n\n{about}: `{result['command']}`\n\n{SECTIONS[name][1](result)}\n"


# ---- Command line ----


def about(setup, argv):
    """(name of this machine in file names, facts that stand in every section)."""
    name = torch.cuda.get_device_name(setup.device) if setup.gpu else f"CPU {os.cpu_count()} cores"
    model = torch.cpu.get_capabilities().get("cpu_name", platform.machine())
    return re.sub(r"\W+", "-", name.lower()).strip("-"), dict(
        device=name if setup.gpu else f"{name}, {model}", dtype=str(setup.dtype)[6:], threads=torch.get_num_threads(),
        torch=torch.__version__, transformers=getattr(sys.modules.get("transformers"), "__version__", "not used"),
        python=platform.python_version(), date=str(date.today()), seed=SEED,
        command=" ".join(["python experiments/bench.py", *argv]))


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="bench.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="tiny sizes on a CPU; writes to out/bench-quick")
    parser.add_argument("--rounds", type=int, default=15, help="most rounds that count (default: 15)")
    parser.add_argument("--seconds", type=float, default=600, help="a section begins no round later (default: 600)")
    parser.add_argument("--compile", action="store_true", help="on a GPU: compiled contenders, too; takes minutes")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="measure these; keep the others in the result file")
    parser.add_argument("--out", help="folder for the result file")
    options = parser.parse_args(argv)
    if options.rounds < 2:
        parser.error("--rounds must be at least 2")
    with tempfile.TemporaryDirectory() as scratch:
        setup = Setup(options, scratch)
        own = "out/bench-quick" if setup.quick else RESULTS / "gpu" if setup.gpu else RESULTS
        path = Path(options.out or own, f"{'gpu' if setup.gpu else 'bench'}-{about(setup, argv)[0]}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        results = json.loads(path.read_text(encoding="utf-8")) if options.only and path.exists() else {}
        for name in options.only or SECTIONS:
            if name == "presets" and not setup.gpu and not setup.quick:
                continue  # hours on a CPU
            measured = SECTIONS[name][0](setup)
            results[name] = json.loads(json.dumps(about(setup, argv)[1] | measured))  # as read from the file
            prepare_data.write_whole(path, [json.dumps(results).encode()])
            print(show(name, results[name]), flush=True)
            gc.collect()  # models that refer to themselves, for one, would count as memory of the next section
    return 0


if __name__ == "__main__":
    sys.exit(prepare_data.run_program(main))
