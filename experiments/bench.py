"""How fast is it? One command, one process, on whatever machine it finds: a GPU if there is one, else the CPU.

    python experiments/bench.py               # both sections, about 10 minutes on two quiet CPU cores
    python experiments/bench.py --only erc    # measures one section again

What is compared runs in interleaved rounds: each round runs each contender once. A ratio is the median of the ratios
within rounds, with its quartiles in brackets. A machine that slows down for a while slows everyone down alike. All
times, in order, are in results/bench-MACHINE.json, of a GPU in results/gpu/gpu-MACHINE.json.

  step  a whole training step (forward, backward, clipping, fused AdamW): ours; the usual loop over experts; Hugging
        Face's OlmoeForCausalLM of the same shape, where transformers is installed; a dense model with as many active
        parameters
  erc   what the ERC loss adds to a step
"""

import argparse
import gc
import json
import math
import os
import platform
import random
import re
import statistics
import sys
import time
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to be run as it stands, from any folder

from erc_moe import MoE, MoEConfig, MoETransformer  # before torch: it filters the warning about numpy

import torch
import torch.nn.functional as F
from variants import dense_config

RESULTS = Path(__file__).parent / "results"
SEED, WARMUP = 0, 2  # rounds that do not count


class Setup:
    """What is measured on this machine, at which sizes. Those of --quick say nothing, but run in seconds on a CPU."""

    def __init__(self, options):
        self.rounds, self.seconds = options.rounds, options.seconds
        self.gpu = torch.cuda.is_available() and not options.quick
        self.device, self.dtype = torch.device("cuda" if self.gpu else "cpu"), torch.float32
        if options.quick:
            self.model = MoEConfig(320, 32, n_layers=2, n_heads=2, d_model=32, d_expert=16, n_experts=4, top_k=2)
            self.batch_size, self.erc_steps = 2, ((4, 64), (8, 128))
            self.dtype = torch.bfloat16  # as on a GPU
        elif self.gpu:
            native = torch.cuda.is_bf16_supported(including_emulation=False)
            self.dtype, memory = torch.bfloat16 if native else torch.float16, torch.cuda.mem_get_info()[1]
            self.model = MoEConfig(50304, 1024, n_layers=8, n_heads=8, d_model=512, d_expert=256, n_experts=64, top_k=8)
            self.batch_size = 16 if memory > 70e9 else 4
            self.erc_steps = [(n, tokens) for n in (64, 256)[:1 + (memory > 40e9)] for tokens in (2048, 16384, 65536)]
        else:
            self.model = MoEConfig(512, 256, n_layers=6, n_heads=8, d_model=256, d_expert=256, n_experts=16, top_k=2)
            self.batch_size, self.erc_steps = 8, ((8, 2048), (16, 2048), (64, 2048), (16, 8192))

    def batches(self, count, batch_size):
        """That many micro-batches of random tokens -> [count, 2, B, T], each with (inputs, targets)."""
        shape = (count, 2, batch_size, self.model.context_length)
        return torch.randint(self.model.vocab_size, shape).to(self.device)

    def interleave(self, functions):
        """Runs each function once per round, in another order each time -> {name: [seconds, ...]}."""
        names, times, begin = list(functions), {name: [] for name in functions}, math.inf
        wait = torch.cuda.synchronize if self.gpu else lambda: None
        for r in range(WARMUP + self.rounds):
            if r == WARMUP:
                begin = time.perf_counter()
            if r >= WARMUP + 2 and time.perf_counter() > begin + self.seconds:
                break
            for name in random.Random(r).sample(names, len(names)):  # so that nobody always has the same predecessor
                wait()
                start = time.perf_counter()
                functions[name]()
                wait()
                times[name].append(time.perf_counter() - start)
        return {name: values[WARMUP:] for name, values in times.items()}


# ---- A training step, ours and others' ----


class LoopMoE(MoE):
    """The same function as MoE, the way it is usually written: for each expert, find its tokens; add up the outputs."""

    def mix(self, x, weights, experts):
        y = torch.zeros_like(x)                                                        # (N, d)
        for j, (W_g, W_p, W_o) in enumerate(zip(self.W_g, self.W_p, self.W_o)):
            token, choice = (experts == j).nonzero(as_tuple=True)                      # (rows,), (rows,)
            rows = x[token]                                                            # (rows, d)
            h = F.silu(rows @ W_g) * (rows @ W_p)                                      # (rows, D)
            y.index_add_(0, token, ((h @ W_o) * weights[token, choice, None]).to(y.dtype))
        return y, torch.bincount(experts.flatten(), minlength=len(self.R))             # (N, d), (n,)


class Ours:
    """Our model with its optimizer. The learning rate is so small that weights, and so the routing, stay as they are.
    `way`, the class of the MoE layers, may change from step to step.
    """

    def __init__(self, setup, model=None):
        self.setup, self.model = setup, (model or MoETransformer(setup.model)).to(setup.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-12, (0.9, 0.95), weight_decay=0.1, fused=True)
        self.scaler = torch.amp.GradScaler(setup.device.type, enabled=setup.dtype == torch.float16)

    def loss(self, inputs, targets, way):
        """What is trained on."""
        for moe in self.model.moe_layers():
            moe.__class__ = way
        dtype = self.setup.dtype
        with torch.autocast(self.setup.device.type, dtype=dtype, enabled=dtype != torch.float32):
            out = self.model(inputs, targets)
        return out.ce + 0.01 * out.balance

    def add_erc_gradient(self, noise):
        self.model.erc_loss(1.0, noise).backward()

    def step(self, batches, way=MoE, noise=None):
        """A step as in train.py, without its log. With a generator `noise`, the ERC loss is in it."""
        for inputs, targets in batches:
            self.scaler.scale(self.loss(inputs, targets, way) / len(batches)).backward()
        self.scaler.unscale_(self.optimizer)
        if noise:
            self.add_erc_gradient(noise)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()


def dense(setup):
    """The same without routing, and with as many active parameters."""
    return Ours(setup, MoETransformer(dense_config(setup.model)))


class Olmoe(Ours):
    """OlmoeForCausalLM of the shape of our model. `way` is its implementation of the experts: eager or grouped_mm. The
    second takes the type of the weights, whatever autocast says, so the weights have the type of the products.
    """

    def __init__(self, setup):
        import transformers  # optional

        c = setup.model
        super().__init__(setup, transformers.OlmoeForCausalLM(transformers.OlmoeConfig(
            vocab_size=c.vocab_size, max_position_embeddings=c.context_length, num_hidden_layers=c.n_layers,
            num_attention_heads=c.n_heads, hidden_size=c.d_model, intermediate_size=c.d_expert,
            num_experts=c.n_experts, num_experts_per_tok=c.top_k, rms_norm_eps=c.norm_eps,
            router_aux_loss_coef=0.01 / c.top_k,  # theirs sums to K
            bos_token_id=None, eos_token_id=None, pad_token_id=None)).to(setup.dtype).train())

    def loss(self, inputs, targets, way):
        self.model.set_experts_implementation(way)
        return self.model(inputs, labels=targets, shift_labels=targets, use_cache=False, output_router_logits=True).loss


CONTENDERS = {"ours": (Ours, MoE), "loop": (Ours, LoopMoE), "OLMoE eager": (Olmoe, "eager"),
              "OLMoE grouped_mm": (Olmoe, "grouped_mm"), "dense": (dense, MoE)}


def flops_per_token(config):
    """Of a training step: 6 for each active parameter but the embedding's, 12 T/2 d in the attention of each layer."""
    with torch.device("meta"):
        active = MoETransformer(config).num_params()[1] - config.vocab_size * config.d_model
    return 6 * active + 6 * config.n_layers * config.context_length * config.d_model


def measure_step(setup):
    torch.manual_seed(SEED)
    batches = setup.batches(1, setup.batch_size)                                       # (1, 2, B, T)
    trainees, functions, left_out = {}, {}, {}  # one model for all its ways, so at most three models are alive
    for name, (maker, way) in CONTENDERS.items():
        try:
            trainee = trainees.get(maker) or trainees.setdefault(maker, maker(setup))
            trainee.step(batches, way)
            functions[name] = partial(trainee.step, batches, way)
        except Exception as error:  # without transformers or memory: the others are measured all the same
            left_out[name] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return dict(tokens=batches[0, 0].numel(), flops_per_token=flops_per_token(setup.model), left_out=left_out,
                seconds=setup.interleave(functions))


# ---- The price of the ERC loss ----


def measure_erc(setup):
    """A step without the loss and with it. The difference of two long steps is noisy, so the loss is timed alone, too.
    On a GPU it then waits for each of its small calls to be launched, which within a step happens in advance.
    """
    torch.manual_seed(SEED)
    times, share, noise = {}, {}, torch.Generator(setup.device).manual_seed(SEED)
    for n in dict.fromkeys(n for n, _ in setup.erc_steps):
        c = replace(setup.model, n_experts=n)
        one = Ours(setup, MoETransformer(c))
        functions = {f"n={n}, the loss alone": partial(one.add_erc_gradient, noise)}
        for tokens in [tokens for m, tokens in setup.erc_steps if m == n]:
            name, rows = f"n={n}, {tokens} tokens", tokens // c.context_length
            micro = min(rows, setup.batch_size)
            batches = setup.batches(rows // micro, micro)                              # (micro-batches, 2, B, T)
            functions |= {f"{name}, off": partial(one.step, batches),
                          f"{name}, on": partial(one.step, batches, noise=noise)}
            share[name] = 6 * c.n_layers * n**2 * c.d_model * c.d_expert / (tokens * flops_per_token(c))
        times |= setup.interleave(functions)
    return dict(steps=setup.erc_steps, predicted_share_of_step=share, seconds=times)


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
    times, tokens, flops = result["seconds"], result["tokens"], result["flops_per_token"]
    rows = [("", "ms per step", "tokens/s", "time / ours"), *(
        (name, ms(times[name]), f"{tokens / statistics.median(times[name]):,.0f}", ratio(times, name, "ours"))
        for name in times)]
    return "\n".join([
        table(*rows), "", *(f"Left out: {name} ({why})." for name, why in result["left_out"].items()),
        f"{tokens:,} tokens per step. In the last column, above 1 means that ours is faster. {flops / 1e6:.1f} MFLOP"
        " per token: 6 for each active parameter but the embedding's, and 6 T d per layer for causal attention."])


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


SECTIONS = dict(step=(measure_step, show_step), erc=(measure_erc, show_erc))


def show(name, result):
    facts = ("device", "dtype", "threads", "torch", "transformers", "python", "seed", "date")
    about = ", ".join(f"{fact} {result[fact]}" for fact in facts)
    return f"## {name}\n\n{about}: `{result['command']}`\n\n{SECTIONS[name][1](result)}\n"


# ---- Command line ----


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="bench.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="tiny sizes on a CPU; writes to out/bench-quick")
    parser.add_argument("--rounds", type=int, default=15, help="most rounds that count (default: 15)")
    parser.add_argument("--seconds", type=float, default=600, help="no round begins later (default: 600)")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="measure these; keep the others in the result file")
    parser.add_argument("--out", help="folder for the result file")
    options = parser.parse_args(argv)
    if options.rounds < 2:
        parser.error("--rounds must be at least 2")
    setup = Setup(options)
    machine = torch.cuda.get_device_name(setup.device) if setup.gpu else f"CPU {os.cpu_count()} cores"
    own = "out/bench-quick" if options.quick else RESULTS / "gpu" if setup.gpu else RESULTS
    name = re.sub(r"\W+", "-", machine.lower()).strip("-")
    path = Path(options.out or own, f"{'gpu' if setup.gpu else 'bench'}-{name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(path.read_text(encoding="utf-8")) if options.only and path.exists() else {}
    for name in options.only or SECTIONS:
        measured = SECTIONS[name][0](setup)
        results[name] = measured | dict(
            device=machine if setup.gpu else f"{machine}, {torch.cpu.get_capabilities().get('cpu_name', '')}",
            dtype=str(setup.dtype)[6:], threads=torch.get_num_threads(), torch=torch.__version__,
            transformers=getattr(sys.modules.get("transformers"), "__version__", "not used"),
            python=platform.python_version(), date=str(date.today()), seed=SEED,
            command=" ".join(["python experiments/bench.py", *argv]))
        path.write_text(json.dumps(results), encoding="utf-8")
        print(show(name, results[name]), flush=True)
        gc.collect()  # what refers to itself would take memory from the next section
    return 0


if __name__ == "__main__":
    sys.exit(main())
