"""Train a small MoE language model with the expert-router coupling (ERC) loss, on one GPU or on any laptop's CPU.

    python train.py                                # the embedded corpus, without a network; minutes on two CPU cores
    python train.py --preset tinystories           # one 24 GB GPU; before it: python prepare_data.py tinystories
    python train.py --resume                       # go on where a run stopped
    python train.py --sample "Once upon a time"    # let a trained model continue a text
    torchrun --nproc-per-node=2 train.py ...       # data-parallel on one machine

The file reads like a run: settings, batches, evaluation, checkpoints, one step, the loop, the command line.

Nothing here draws from a shared random stream. Every batch, every ERC noise and every sample has a generator of its
own, seeded by what it is for: (seed, step, purpose). So switching ERC on or off, evaluating more often, or stopping and
resuming never changes what a step trains on, and a resumed run has no stream to restore. Left out on purpose: more than
one machine, sharded parameters, worker processes for data (a batch takes less than a millisecond).
"""

import argparse
import contextlib
import csv
import hashlib
import json
import math
import os
import shlex
import signal
import sys
import time
import warnings
import zipfile
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # torch says so on import; we need no numpy

import torch
import torch.distributed as dist
from tqdm import tqdm

import erc_moe
import prepare_data
from erc_moe import MoEConfig, MoETransformer, setting
from prepare_data import UserError

# ---- Settings ----


@dataclass(frozen=True)
class TrainConfig:
    """One training run. The defaults are those of the demo. Raises ValueError, naming the setting, for bad values."""

    data: str = setting("data/demo", "folder of token shards, made by prepare_data.py")
    out: str = setting("out/demo", "run folder")
    steps: int = setting(1300, "optimizer steps")
    seed: int = setting(0, "of initial weights, batches, noise and samples")
    batch_size: int = setting(8, "sequences in a micro-batch (of each process)")
    accumulate: int = setting(1, "micro-batches in a step (of each process)")
    lr: float = setting(4e-3, "peak learning rate")
    warmup: int = setting(50, "steps from 0 to the peak, from which a cosine falls to a fiftieth of it")
    weight_decay: float = setting(0.1, "of every matrix, the router and the experts included")
    grad_clip: float = setting(1.0, "largest norm of the whole gradient")
    log_every: int = setting(10, "steps between lines in the log")
    eval_every: int = setting(650, "steps between evaluations; 0: only at the end")
    save_every: int = setting(650, "steps between checkpoints; 0: only at the end")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps ...")
    dtype: str = setting("auto", "auto, fp32, bf16 or fp16: the type of the matrix products; weights stay float32")
    compile: bool = setting(False, "compile the model (bf16 only)")
    deterministic: bool = setting(False, "on a GPU, too, equal runs are equal to the bit; a little slower")
    balance_weight: float = setting(0.01, "of the load-balancing loss")
    z_weight: float = setting(0.001, "of the router z-loss")
    erc_weight: float = setting(1.0, "of the ERC loss; 0: a plain MoE")
    erc_alpha: float = setting(1.0, "strictness: 0 most, 3 hardly any; best in the paper 1 (n=64), 0.5 (n=256)")
    erc_noise: str = setting("sample", "noise in the ERC loss: sample (the paper's), none or expected")
    sample_tokens: int = setting(300, "longest continuation")
    temperature: float = setting(0.8, "of samples; 0: the likeliest token")
    sample_top_k: int = setting(0, "draw samples from that many likeliest tokens; 0: from all")

    def __post_init__(self):
        def check(names, low, above=False):
            for name in names.split():
                value = getattr(self, name)
                top = 2**63 if isinstance(value, int) else 1e38  # where float32 ends
                if not (low < value < top if above else low <= value < top):  # false for nan, too
                    raise ValueError(f"{name} must be finite and {'above' if above else 'at least'} {low}, got {value}")

        check("steps batch_size accumulate log_every sample_tokens", 1)
        check("seed warmup eval_every save_every weight_decay temperature sample_top_k", 0)
        check("balance_weight z_weight erc_weight erc_alpha", 0)
        check("lr grad_clip", 0, above=True)
        for name, choices in dict(dtype="auto, fp32, bf16, fp16", erc_noise="sample, none, expected").items():
            if getattr(self, name) not in choices.split(", "):
                raise ValueError(f"{name} must be one of {choices}; got {getattr(self, name)!r}")


SETTINGS = [*fields(TrainConfig), *fields(MoEConfig)[1:]]  # each is a flag; vocab_size comes from the data
# For one GPU with 24 GB (the README says how that was computed), with many small experts, as in the paper.
GPU = dict(n_layers=8, n_heads=8, d_model=512, d_expert=256, n_experts=64, top_k=8, lr=1e-3, eval_every=500,
           save_every=1000)
PRESETS = {
    "demo": {},
    "tinystories": dict(GPU, context_length=512, batch_size=16, accumulate=4, steps=10_000, warmup=500),
    "openwebtext": dict(GPU, context_length=1024, batch_size=8, accumulate=16, steps=30_000, warmup=1000),
}
MAY_CHANGE_ON_RESUME = ("out steps log_every eval_every save_every device compile sample_tokens temperature"
                        " sample_top_k").split()

# ---- Batches ----


def keyed_generator(device, *key):
    """A random generator of its own for each key, such as (seed, step, "erc")."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def check_ids(tokens, data, where):
    """UserError for ids outside the vocabulary, which on a GPU would end in an assertion far from its cause."""
    if (largest := int(tokens.max())) >= data.vocab_size:
        raise UserError(f"{where}: token {largest} is outside the vocabulary of {data.vocab_size}; make the shards"
                        " again with prepare_data.py")


def train_batch(data, T, batch_size, generator):
    """Windows of T + 1 tokens, drawn with replacement -> (inputs, targets), both [B, T], int64, on the CPU.

    Where an end-of-text token lies within the next T tokens of the drawn offset, the window begins with it: a document
    is read from its start, with in front of it just what will stand there when sampling.
    """
    ends = torch.tensor([max(0, len(shard) - T) for shard in data.train]).cumsum(0)  # windows up to each shard's end
    rows = []
    for offset in torch.randint(int(ends[-1]), (batch_size,), generator=generator).tolist():
        index = int(torch.searchsorted(ends, offset, right=True))
        shard, start = data.train[index], offset - (int(ends[index - 1]) if index else 0)
        to_document = int((shard[start : start + T].long() == data.eot).int().argmax())  # 0, too, if there is none
        if start + to_document + T < len(shard):
            start += to_document
        rows.append(shard[start : start + T + 1].long())                               # (T + 1,)
        check_ids(rows[-1], data, f"{data.train_paths[index]}, offset {start}")
    window = torch.stack(rows)                                                         # (B, T + 1)
    return window[:, :-1], window[:, 1:]


VAL_WINDOWS = 128  # at 512 tokens each, the standard error of val_ce is about 0.01 nats


def validation_batches(data, T, batch_size):
    """The same tokens at every evaluation -> list of (inputs [B, T], targets [B, T]); target -100 does not count.

    Where the data knows its documents (the embedded corpus): all of them, each one whole, for which its entropy floor
    is defined. Else up to VAL_WINDOWS windows, spread evenly. UserError where the text is too short for one window.
    """
    tokens = torch.cat([shard.long() for shard in data.val])
    check_ids(tokens, data, "validation split")
    spans = [(first, end) for _, first, end in data.meta.get("val_documents", [])]
    count = min(VAL_WINDOWS, (len(tokens) - 1) // T)
    if count == 0 or all(len(shard) <= T for shard in data.train):
        raise UserError(f"a window is {T + 1} tokens; the validation split has {len(tokens)}, the largest training"
                        f" shard {max(map(len, data.train))}: lower --context-length, or add text")
    if spans and max(end - first for first, end in spans) <= T:
        eot = torch.tensor([data.eot])
        rows = sorted((torch.cat((eot, tokens[first:end])) for first, end in spans), key=len)  # for little padding
    else:
        starts = torch.linspace(0, len(tokens) - T - 1, count).long().tolist()
        rows = [tokens[start : start + T + 1] for start in starts]
    batches = []
    for i in range(0, len(rows), batch_size):
        padded = torch.nn.utils.rnn.pad_sequence(rows[i : i + batch_size], batch_first=True, padding_value=-100)
        batches.append((padded[:, :-1].clamp(min=0), padded[:, 1:]))                   # (B, T) each
    return batches


# ---- Evaluation ----


@torch.no_grad()
def evaluate(model, batches, device, autocast):
    """(val_ce, agreement), two floats: pure cross-entropy in nats per token; and the share of tokens, mean over layers,
    whose first choice by the router is the expert that responds most: argmax_j ||x W_g[j]||, x the layer's input.
    """
    layers = model.moe_layers()
    ce, agree, counted = torch.zeros(3, device=device, dtype=torch.float32).unbind()

    def watch(moe, args):
        x = args[0][targets >= 0].to(moe.W_g.dtype)                                    # (N, d), without the padding
        with torch.autocast(device.type, enabled=False):
            response = torch.linalg.vector_norm(torch.bmm(x.expand(len(moe.W_g), *x.shape), moe.W_g), dim=-1)  # (n, N)
        agree.add_((moe.route(x)[-1][:, 0] == response.argmax(dim=0)).sum() / len(layers))

    hooks = [moe.register_forward_pre_hook(watch) for moe in layers]
    for inputs, targets in batches:
        inputs, targets = inputs.to(device), targets.to(device)
        with autocast():
            mean = model(inputs, targets).ce
        ce, counted = ce + mean * (targets >= 0).sum(), counted + (targets >= 0).sum()
    for hook in hooks:
        hook.remove()
    return (ce / counted).item(), (agree / counted).item()


@torch.no_grad()
def coupling(model, alpha):
    """{epsilon, violated, coupling} of the clean router and experts, means over layers."""
    rows = [torch.stack((erc_moe.noise_bound(moe.R).mean(),
                         *erc_moe.coupling_report(erc_moe.activation_norms(moe.R, moe.W_g), alpha)))
            for moe in model.moe_layers()]                                             # L times (3,)
    return dict(zip(("epsilon", "violated", "coupling"), torch.stack(rows).mean(dim=0).tolist()))


# ---- Checkpoints and log ----


def save_checkpoint(folder, state):
    """ckpt.pt becomes ckpt.prev.pt, and `state` ckpt.pt; whatever happens on the way, one of the two is whole."""
    path, temporary = folder / "ckpt.pt", folder / "ckpt.pt.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave the final name on an empty file
        if path.exists():
            os.replace(path, folder / "ckpt.prev.pt")
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot save {path} ({str(error).splitlines()[0]}); earlier checkpoints are whole: make room,"
                        " or mend the folder's permissions, then --resume") from error


def read_checkpoint(path):
    """A checkpoint file's contents, or UserError. torch.load alone does not compare the checksums in the file, so that
    damaged weights load in silence, and unpacks compressed members into any amount of memory; hence the look before.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("compressed members")
            if damaged := archive.testzip():
                raise ValueError(f"wrong checksum in {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)  # tensors and plain values: runs no code
        if missing := {"model", "optimizer", "scaler", "step", "config", "tokenizer", "data", "processes"} - set(state):
            raise ValueError(f"no {min(missing)!r} in it")
        return state
    except FileNotFoundError:
        raise
    except Exception as error:  # damage has many faces; whichever it is, the file is not used
        reason = "Python objects in it" if "weights_only" in str(error) else (str(error) or repr(error)).splitlines()[0]
        raise UserError(f"{path} is damaged or no checkpoint of train.py ({reason})") from error


def load_checkpoint(folder):
    """The newest whole checkpoint of a run folder, and its `path`, with a warning where that is not ckpt.pt; UserError
    without one.
    """
    problem = f"no checkpoint in {folder}; name the run folder with --out, or train first"
    for path in (folder / "ckpt.pt", folder / "ckpt.prev.pt"):
        try:
            state = read_checkpoint(path)
        except FileNotFoundError:
            continue
        except UserError as error:
            problem = f"{error}; start anew with --overwrite, or another --out"
            continue
        if path.name != "ckpt.pt":
            print(f"warning: ckpt.pt is damaged or missing; taking {path}, step {state['step']}", file=sys.stderr)
        return dict(state, path=path)
    raise UserError(problem)


LOG_COLUMNS = ("step tokens ce val_ce balance z erc epsilon violated coupling agreement max_load dead lr grad_norm"
               " tokens_per_s").split()


def open_log(path, last_step):
    """log.csv, to append to; without what a kill cut short, and without lines that a resumed run will write anew."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n") and line.count(",") == 15
             and line.split(",")[0].isdecimal() and int(line.split(",")[0]) <= last_step]
    temporary = path.with_name("log.csv.tmp")
    temporary.write_text(",".join(LOG_COLUMNS) + "\n" + "".join(lines), encoding="utf-8")
    os.replace(temporary, path)
    return open(path, "a", encoding="utf-8", newline="", buffering=1)  # each line is written as it comes


def claim(out, resume, overwrite):
    """Makes the run folder ours, and returns the open lock, which is released however we end. UserError where another
    run is at work in it, or where a run lies in it that is neither resumed nor overwritten.
    """
    out.mkdir(parents=True, exist_ok=True)
    lock = open(out / ".lock", "w", encoding="utf-8")
    try:
        import fcntl  # not on Windows, where nobody notices two runs in one folder

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except OSError as error:
        raise UserError(f"another run is writing to {out}; wait for it, or choose another --out") from error
    old = [path for path in (out / "ckpt.pt", out / "ckpt.prev.pt", out / "log.csv") if path.exists()]
    if any(path.suffix == ".pt" for path in old) and not resume and not overwrite:
        raise UserError(f'{out} already holds a run; go on: {command(out)} --resume; try it: {command(out)} --sample'
                        ' "Once"; or start anew: add --overwrite', code=2)
    for path in [] if resume else old:
        path.unlink()
    return lock


# ---- One step ----


def pick_device(name):
    """The torch.device for --device; auto takes the best there is. UserError, wrong usage, where there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:100].split(". ")[0]  # some are pages long
        raise UserError(f"no device {name!r} here ({reason}); try --device cpu", code=2) from error
    if name.startswith("cuda"):
        torch.cuda.set_device(name)  # else pinned memory and NCCL of every process would use the first GPU
    return torch.device(name)


def pick_dtype(name, device):
    """The type of the matrix products. auto: bfloat16 where the hardware has it, else float16 on a GPU, or float32."""
    if name == "auto" and device.type == "cuda":  # those that only emulate bfloat16 are faster in float16
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif name == "auto" and device.type == "cpu":  # those that only emulate it are slower by far
        has = torch.cpu.get_capabilities()
        name = "bf16" if has.get("avx512_bf16") or has.get("amx_bf16") or has.get("bf16") else "fp32"
    return dict(bf16=torch.bfloat16, fp16=torch.float16).get(name, torch.float32)


def command(out, processes=1):
    """How to start train.py on a run folder, to be pasted into a shell."""
    launcher = f"torchrun --nproc-per-node={processes}" if processes > 1 else "python"
    return f"{launcher} train.py --out {shlex.quote(str(out))}"


def check_size(config, moe):
    """UserError, wrong usage, for sizes that no machine holds, which would fill the memory before they fail."""
    if moe:
        layer = moe.d_model * (4 * moe.d_model + moe.n_experts * 3 * moe.d_expert)
        tokens = config.batch_size * moe.context_length
        if (terabytes := (16 * moe.n_layers * layer + 8 * moe.d_model * tokens) / 1e12) > 10:
            raise UserError(f"this would take {terabytes:,.0f} TB of memory; choose a smaller model or batch", code=2)


def learning_rate(config, step):
    """Of a step, counted from 1: a linear warm-up, then a cosine down to a fiftieth of the peak."""
    if step <= config.warmup:
        return config.lr * step / config.warmup
    progress = (step - config.warmup) / (config.steps - config.warmup)
    return config.lr * (0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)


class Run:
    """What a run carries from step to step: data, model, optimizer, scaler, and the number of the last step."""

    def __init__(self, config, moe, model):
        self.config, self.step = config, 0
        self.rank, self.processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = device = pick_device(config.device)
        self.dtype = pick_dtype(config.dtype, device)
        if config.compile and (self.dtype != torch.bfloat16
                               or device.type == "cuda" and pick_dtype("auto", device) != torch.bfloat16):
            raise UserError("--compile needs --dtype bf16, and hardware that has it: the grouped product compiles in no"
                            " other type", code=2)
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(config.deterministic)
        self.data = prepare_data.load_data(config.data)
        check_size(config, moe)
        torch.manual_seed(config.seed)
        # A multiple of 64 rows makes the largest matrix product faster on a GPU; the ids added never occur.
        self.model = (model or MoETransformer(replace(moe, vocab_size=-(-self.data.vocab_size // 64) * 64))).to(device)
        self.context = self.model.config.context_length
        self.step_tokens = config.batch_size * config.accumulate * self.processes * self.context
        self.val = validation_batches(self.data, self.context, config.batch_size)
        decayed, others = ([p for p in self.model.parameters() if (p.ndim >= 2) == yes] for yes in (True, False))
        self.optimizer = torch.optim.AdamW([dict(params=decayed, weight_decay=config.weight_decay),
                                            dict(params=others, weight_decay=0.0)], config.lr, (0.9, 0.95), fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.skipped = torch.zeros((), device=device)  # updates in a row that a gradient that is not finite prevented
        self.forward = torch.compile(self.model, dynamic=False, fullgraph=True) if config.compile else self.model
        if self.processes > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    def state(self):
        """All that a resumed run needs: tensors and plain values."""
        config = {**asdict(self.model.config), **asdict(self.config)}
        return dict({name: getattr(self, name).state_dict() for name in ("model", "optimizer", "scaler")},
                    step=self.step, config=config, data=self.data.fingerprint, tokenizer=self.data.tokenizer,
                    processes=self.processes)

    def restore(self, state):
        """Takes up a checkpoint; UserError where data, processes or shapes are not those it was saved with."""
        for name, here in dict(data=self.data.fingerprint, processes=self.processes).items():
            if state[name] != here:
                mend = "start as many with torchrun --nproc-per-node" if name == "processes" else "bring them back"
                raise UserError(f"the run to resume had other {name} ({state[name]}, here {here}); {mend}, or start a"
                                " new run with another --out")
        try:
            # What is saved of a scaler is empty but for float16, and --dtype auto may have been another type there.
            for name in ("model", "optimizer", "scaler") if state["scaler"] else ("model", "optimizer"):
                getattr(self, name).load_state_dict(state[name])
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(f"the {name} of the checkpoint does not fit its own settings; was the code changed since?"
                            f" ({str(error).splitlines()[-1].strip()})") from error
        self.step = state["step"]

    def autocast(self):
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def add_token_gradient(self, step):
        """Adds up the gradients of a step's micro-batches -> means of (ce, balance, z) [3] and the load [L, n].

        Micro-batches are numbered over all processes: N processes with A each learn from what one with N * A does.
        """
        config, means, load = self.config, torch.zeros(3, device=self.device), 0
        for i in range(self.rank * config.accumulate, (self.rank + 1) * config.accumulate):
            batch = train_batch(self.data, self.context, config.batch_size,
                                keyed_generator("cpu", config.seed, step, "batch", i))
            if self.device.type == "cuda":  # nobody has to wait for a copy from pinned memory, if it is in one piece
                batch = [tokens.contiguous().pin_memory().to(self.device, non_blocking=True) for tokens in batch]
            with self.autocast():
                out = self.forward(*(tokens.to(self.device) for tokens in batch))
                loss = out.ce + config.balance_weight * out.balance + config.z_weight * out.z
            self.scaler.scale(loss / config.accumulate).backward()
            means += torch.stack((out.ce, out.balance, out.z)).detach() / config.accumulate
            load = load + out.load
        if self.processes > 1:  # data-parallel, all of it: average gradients and means, add up loads
            averaged = [p.grad for p in self.model.parameters()] + [means]
            for work in [dist.all_reduce(tensor, async_op=True) for tensor in [*averaged, load]]:
                work.wait()
            torch._foreach_div_(averaged, self.processes)
        return means, load

    def add_erc_gradient(self, step):
        """Adds the gradient of the ERC loss, once for the whole step -> its value [], mean over layers.

        Layer by layer, so that only one layer's n * n responses [D] are alive at a time. Unscaled, in float32: it comes
        after scaler.unscale_. Every process adds the same, so none has to be told of it. Where the loss is 0, so is its
        gradient: on a CPU, where it costs nothing to look, we spare ourselves the backward pass.
        """
        layers, total = self.model.moe_layers(), torch.zeros((), device=self.device)
        noise = keyed_generator(self.device, self.config.seed, step, "erc")
        for moe in layers:
            loss = erc_moe.erc_loss(moe.R, moe.W_g, self.config.erc_alpha, self.config.erc_noise, noise) / len(layers)
            if self.config.erc_weight > 0 and not (self.device.type == "cpu" and loss == 0):  # a GPU would have to wait
                (self.config.erc_weight * loss).backward()
            total += loss.detach()
        return total

    def measure(self, step, means, load, erc, norm):
        """What log.csv says of a step, but for its speed and evaluation -> dict of numbers."""
        share = load / load.sum(dim=1, keepdim=True)                                   # (L, n)
        return dict(zip(("ce", "balance", "z"), means.tolist()), step=step, tokens=step * self.step_tokens,
                    erc=erc.item(), **coupling(self.model, self.config.erc_alpha), dead=int((load == 0).sum()),
                    max_load=share.max().item() * load.size(1), lr=learning_rate(self.config, step),
                    grad_norm=norm.item())

    def update(self, step, norm, ce):
        """Takes the step, unless the gradient is not finite: then the weights stay as they are.

        On CUDA the fused optimizer reads found_inf on the device, so that no step has to wait for the answer;
        check_finite asks for it later, until when nothing moves. (A float16 scaler in search of a scale skips a step
        now and then.)
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step)
        bad = ~torch.isfinite(norm + ce)
        scaling = self.scaler.is_enabled()
        self.skipped = (self.skipped + bad) * bad if scaling else self.skipped + (bad | (self.skipped > 0))
        self.optimizer.found_inf = (self.skipped > 0).float()
        if self.device.type != "mps" or not self.skipped:  # Metal's fused step takes found_inf and ignores it
            self.optimizer.step()  # not scaler.step, which would not know of what came after unscale_
        self.optimizer.zero_grad()
        self.scaler.update()
        self.step = step

    def anywhere(self, caught):
        """The number of a signal that any of the processes caught, or 0: they all leave after the same step."""
        if self.processes == 1:
            return max(caught, default=0)
        flag = torch.tensor(max(caught, default=0), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return int(flag)  # the one thing that several GPUs wait for in every step

    def check_finite(self):
        """UserError, naming the step, once an update was prevented (with a float16 scaler: 20 in a row)."""
        if (skipped := int(self.skipped)) >= (20 if self.scaler.is_enabled() else 1):
            raise UserError(f"loss or gradient is not finite at step {self.step - skipped + 1}, and was kept from the"
                            " weights; start again with a lower --lr or a longer --warmup")


@contextlib.contextmanager
def signals_caught():
    """A list in which the first Ctrl-C or SIGTERM waits until a step is done; a second one ends the program at once."""
    caught = []

    def catch(number, frame):
        caught.append(number)
        for number in before:
            signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- The loop ----


def describe(run):
    """The lines above the log: what runs on what, and at what cost."""
    config, shape, (total, active) = run.config, run.model.config, run.model.num_params()
    tokens = run.step_tokens
    device = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else run.device.type
    floor, trained = run.data.meta.get("entropy_floor"), sum(map(len, run.data.train))
    erc_cost = shape.n_experts**2 / (3 * shape.top_k * tokens)  # 6 n^2 dD for a step, 18 K dD for each of its tokens
    return (f"run    torch {torch.__version__} on {device}, {str(run.dtype)[6:]}, processes: {run.processes}\n"
            f"model  {total / 1e6:.2f}M parameters, {active / 1e6:.2f}M active for a token; {shape.n_layers} layers,"
            f" d={shape.d_model}, {shape.n_experts} experts of D={shape.d_expert}, top-{shape.top_k}\n"
            f"data   {config.data}: {trained:,} training tokens ({run.data.tokenizer})"
            f"{f', entropy floor {floor:.4f} nats per token' if floor else ''}\n"
            f"train  {config.steps:,} steps of {tokens:,} tokens, {config.steps * tokens / trained:.1f} times the data"
            f"{', all of it warm-up' if config.warmup >= config.steps else ''}; ERC weight {config.erc_weight:g}, alpha"
            f" {config.erc_alpha:g}, noise {config.erc_noise}, for {erc_cost:.2%} of the experts' FLOPs")


def log_line(row):
    """A row of log.csv as a line on the console."""
    val = f"val_ce {row['val_ce']:.4f} | agreement {row['agreement']:.0%} | " if "val_ce" in row else ""
    return (f"step {row['step']:5d} | ce {row['ce']:.4f} | {val}balance {row['balance']:.3f} | erc {row['erc']:.4f} |"
            f" violated {row['violated']:.1%} | coupling {row['coupling']:.2f} | lr {row['lr']:.1e} | norm"
            f" {row['grad_norm']:.2f} | {row['tokens_per_s']:,.0f} tok/s")


def train(config, moe=None, model=None, extra_loss=None, watch=None, resume=None, overwrite=False):
    """Trains, and returns the last logged row as a dict, with `signal`: 0, or the number of the one that stopped it.

    config: TrainConfig. moe: MoEConfig; its vocab_size comes from the data. model: one's own instead, with the methods
    of MoETransformer. extra_loss: a function of the model -> scalar, added once per step, as the ERC loss is. watch: a
    function of (model, step), called after each evaluation. resume: a checkpoint from load_checkpoint. Raises UserError
    for whatever the user can mend.
    """
    run, out, row = Run(config, moe, model), Path(config.out), {}
    if resume:
        run.restore(resume)
    is_main = run.rank == 0  # the one process that writes
    with (contextlib.ExitStack() as stack, signals_caught() as signals,
          tqdm(total=config.steps, initial=run.step, unit="step", disable=None if is_main else True) as bar):
        if is_main:
            stack.enter_context(claim(out, resume, overwrite))
            if resume and resume.get("path") == out / "ckpt.prev.pt":  # or the next save would drop it
                os.replace(resume["path"], out / "ckpt.pt")
            print(describe(run), flush=True)
            (out / "config.json").write_text(json.dumps(run.state()["config"], indent=1) + "\n", encoding="utf-8")
            log_file = stack.enter_context(open_log(out / "log.csv", run.step))
            log = csv.DictWriter(log_file, LOG_COLUMNS, lineterminator="\n")
            if not resume:
                save_checkpoint(out, run.state())  # a full disk shows now, and not in an hour
        timed_from, clock = run.step, time.perf_counter()
        for step in range(run.step + 1, config.steps + 1):
            last = step == config.steps
            evaluates = last or (config.eval_every and step % config.eval_every == 0)
            logs = evaluates or step == 1 or step % config.log_every == 0
            means, load = run.add_token_gradient(step)
            run.scaler.unscale_(run.optimizer)
            erc = run.add_erc_gradient(step) if logs or config.erc_weight > 0 else None
            if extra_loss:
                extra_loss(run.model).backward()
            norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), config.grad_clip)
            if logs:  # before the update, of the weights that ce is of
                row = run.measure(step, means, load, erc, norm)
            run.update(step, norm, means[0])
            bar.update()
            caught = run.anywhere(signals)
            saves = last or caught or (config.save_every and step % config.save_every == 0)
            if logs or saves or run.device.type != "cuda":  # which would have to wait for the answer
                run.check_finite()
            if logs:
                row["tokens_per_s"] = (step - timed_from) * run.step_tokens / (time.perf_counter() - clock)
                if evaluates:
                    row["val_ce"], row["agreement"] = evaluate(run.model, run.val, run.device, run.autocast)
                    if watch:
                        watch(run.model, step)
                if is_main:
                    log.writerow(row)
                    bar.write(log_line(row), file=sys.stdout)
            if saves and is_main:  # after the line of this step, which a resumed run does not write again
                save_checkpoint(out, run.state())
            if logs or saves:
                timed_from, clock = step, time.perf_counter()
            if caught:
                break
    return dict(row, signal=0 if run.step == config.steps else caught)


# ---- Samples, and the command line ----


def configs(values):
    """(TrainConfig, MoEConfig) of plain values; UserError, wrong usage, for values that cannot work."""
    try:
        return [kind(**{field.name: values[field.name] for field in fields(kind) if field.name in values})
                for kind in (TrainConfig, MoEConfig)]
    except ValueError as error:
        raise UserError(str(error), code=2) from error


def model_of(state):
    """The model in a checkpoint, on the CPU; UserError where it does not fit its settings or is not finite."""
    model = MoETransformer(configs(state["config"])[1])
    try:
        model.load_state_dict(state["model"])
    except (RuntimeError, TypeError, KeyError) as error:
        raise UserError("the model of the checkpoint does not fit its settings; was the code changed since?") from error
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise UserError("the model of the checkpoint has weights that are not finite; train again with a lower --lr")
    return model


def sample(state, prompt, config, device):
    """The prompt and what the model in a checkpoint makes of it, up to the end of the document -> str."""
    tokenizer, model = prepare_data.get_tokenizer(state["tokenizer"]), model_of(state).to(device)
    text = prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # a shell may hand us any bytes
    ids = torch.tensor([[tokenizer.eot_token, *tokenizer.encode_ordinary(text)]], device=device)   # (1, T)
    ids = model.generate(ids, config.sample_tokens, config.temperature, config.sample_top_k or None,
                         keyed_generator(device, config.seed, "sample"), tokenizer.eot_token, tokenizer.n_vocab)
    text = tokenizer.decode([i for i in ids[0].tolist() if i != tokenizer.eot_token])
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)  # nothing that steers a terminal


def report(config, result):
    """Prints how a run ended: quality, coupling before and after, a sample, and how to go on."""
    state = load_checkpoint(Path(config.out))
    floor = prepare_data.load_data(config.data).meta.get("entropy_floor")
    print(f"\nval_ce {result['val_ce']:.4f} nats per token"
          + (f", {result['val_ce'] / floor:.3f} times the entropy floor of this corpus, {floor:.4f}" if floor else ""))
    after = model_of(state)
    torch.manual_seed(config.seed)
    for title, model in dict(before=MoETransformer(after.config), after=after).items():
        moe, numbers = model.moe_layers()[-1], coupling(model, config.erc_alpha)
        print(f"{title} training: violated {numbers['violated']:.1%}, coupling {numbers['coupling']:.2f}; M of the last"
              " layer (a row for each proxy, a column for each expert, @ within a tenth of the largest of its row):")
        print(erc_moe.heat_map(erc_moe.activation_norms(moe.R, moe.W_g).detach()))
    try:
        print(f"\na sample:\n{sample(state, '', config, pick_device(config.device))}\n")
    except UserError as error:  # no network, no vocabulary: the run is done all the same
        print(f"\nno sample: {error}\n")
    mine = {**asdict(config), **asdict(after.config)}
    flags = "".join(f" --{'no-' * (mine[field.name] is False)}{field.name.replace('_', '-')}"
                    + f" {shlex.quote(str(mine[field.name]))}" * (field.type is not bool) for field in SETTINGS
                    if mine[field.name] != field.default and field.name not in ("out", "erc_weight"))
    print(f"more:       {command(config.out)} --sample \"...\"\n"
          f"train on:   {command(config.out, state['processes'])} --resume --steps {2 * config.steps}")
    if config.erc_weight > 0 and after.config.n_experts > 1:
        print(f"plain MoE:  {command(f'{Path(config.out)}-plain', state['processes'])}{flags} --erc-weight 0")


def parse(argv):
    """(options, explicit): what to do, and those settings that stand on the command line."""
    parser = prepare_data.Parser(prog="train.py", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="demo", help="settings to start from (default: demo)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, with the settings it"
                        " has; more --steps stretch the learning rate's schedule, so that it rises once more")
    parser.add_argument("--overwrite", action="store_true", help="start anew in an --out that holds a run")
    parser.add_argument("--sample", metavar="PROMPT", help="continue PROMPT with the model in --out, and stop")
    for field in SETTINGS:
        kind = dict(type=field.type, metavar=field.type.__name__)
        parser.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS,
                            help=f"{field.metadata['help']} (default: {field.default})",
                            **dict(action=argparse.BooleanOptionalAction) if field.type is bool else kind)
    options = parser.parse_args(argv)
    if options.resume and options.overwrite:
        parser.error("--resume and --overwrite contradict each other; choose one")
    if len(options.sample or "") > 100_000:
        parser.error("--sample takes at most 100000 characters")
    return options, {field.name: getattr(options, field.name) for field in SETTINGS if field.name in options}


def main(argv=None):
    """The command line -> exit code."""
    options, explicit = parse(argv)
    name = options.preset
    config, moe = configs({"data": f"data/{name}", "out": f"out/{name}", **PRESETS[name], **explicit})
    state = load_checkpoint(Path(config.out)) if options.resume or options.sample is not None else None
    may_change = MAY_CHANGE_ON_RESUME if options.sample is None else [*MAY_CHANGE_ON_RESUME, "seed"]
    for name, value in explicit.items():
        if state and name not in may_change and value != state["config"][name]:
            raise UserError(f"--{name.replace('_', '-')} is {value} here, but {state['config'][name]} in the run to"
                            " go on with; leave it out, or start a new run with another --out", code=2)
    if options.sample is not None:
        config, _ = configs({**state["config"], "device": config.device, **explicit})
        print(sample(state, options.sample, config, pick_device(config.device)))
        return 0
    if options.resume:
        changed = {name: explicit[name] for name in MAY_CHANGE_ON_RESUME if name in explicit}
        config, moe = configs({**state["config"], **changed, "out": config.out})
        if state["step"] >= config.steps:
            raise UserError(f"{config.out} is finished, at step {state['step']}; to train on, add --steps N", code=2)
    rank, demo = int(os.environ.get("RANK", 0)), Path("data/demo/meta.json")
    if config.data == "data/demo" and rank == 0 and not demo.exists():
        prepare_data.main(["demo"])
    while config.data == "data/demo" and rank > 0 and not demo.exists():  # the first process of torchrun is at it
        time.sleep(0.1)
    try:
        result = train(config, moe, resume=state, overwrite=options.overwrite)
    except RuntimeError as error:
        if "alloc" not in str(error).lower():  # in the words of all devices; others speak of illegal memory accesses
            raise
        raise UserError("out of memory; lower --batch-size, and raise --accumulate to make up for it") from error
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank == 0 and result["signal"]:
        processes = int(os.environ.get("WORLD_SIZE", 1))
        print(f"stopped and saved; go on with: {command(config.out, processes)} --resume")
    elif rank == 0:
        report(config, result)
    return 128 + result["signal"] if result["signal"] else 0


if __name__ == "__main__":
    sys.exit(prepare_data.run(main))
