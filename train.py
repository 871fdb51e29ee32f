"""Train a small MoE language model with the expert-router coupling (ERC) loss, on one GPU or on a laptop's CPU.

    python train.py                                # the embedded corpus, without a network; minutes on two CPU cores
    python train.py --preset tinystories           # one 24 GB GPU; before it: python prepare_data.py tinystories
    python train.py --preset tinystories --resume  # go on where that run stopped
    python train.py --sample "To make"             # let the model in out/demo continue a text
    torchrun --nproc-per-node=2 train.py ...       # data-parallel on one machine

Every batch, every ERC noise and every sample has a random generator of its own, seeded by what it is for: (seed, step,
purpose). So switching ERC on or off, evaluating more often, or stopping and resuming never changes what a step trains
on, and a resumed run has no random stream to restore.
"""

import argparse
import contextlib
import csv
import hashlib
import math
import os
import shlex
import signal
import sys
import threading
import time
import zipfile
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import erc_moe  # before torch: it filters the warning that torch prints where numpy is missing

import torch
import torch.distributed as dist
from tqdm import tqdm

import prepare_data
from erc_moe import MoEConfig, MoETransformer, setting
from prepare_data import UserError

# ---- Settings --------------------------------------------------------------------------------------------------------
DTYPES = dict(auto=None, fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)


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
    warmup: int = setting(60, "steps from 0 to the peak, from which a cosine falls to a tenth of it")
    weight_decay: float = setting(0.1, "of every other matrix")
    moe_weight_decay: float = setting(1.3, "of R, W_g, W_p and W_o")
    grad_clip: float = setting(1.0, "largest norm of the whole gradient; 0: no clipping")
    log_every: int = setting(100, "steps between lines in the log")
    eval_every: int = setting(650, "steps between evaluations; 0: only at the end")
    save_every: int = setting(650, "steps between checkpoints; 0: only at the end")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps ...")
    dtype: str = setting("auto", "auto, fp32, bf16 or fp16: the type of the matrix products; weights stay float32")
    compile: bool = setting(False, "compile the model; needs bf16")
    deterministic: bool = setting(False, "equal runs are equal to the bit on a GPU, too; a little slower")
    balance_weight: float = setting(0.01, "of the load-balancing loss")
    z_weight: float = setting(0.0, "of the router z-loss")
    erc_weight: float = setting(1.0, "of the ERC loss; 0: a plain MoE")
    erc_alpha: float = setting(1.0, "strictness: 0 most, 3 hardly any; best in the paper 1 (n=64), 0.5 (n=256)")
    sample_tokens: int = setting(300, "longest continuation")
    temperature: float = setting(0.8, "of samples; 0: the likeliest token")

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            least = int(field.name in ("steps", "batch_size", "accumulate", "log_every", "sample_tokens"))
            if field.type in (int, float) and not least <= value < 1e38:  # float32 ends there; false for nan, too
                raise ValueError(f"{field.name} must be at least {least} and below 1e38, got {value}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")


# Each is a flag. vocab_size comes from the data.
SETTINGS = [field for field in (*fields(TrainConfig), *fields(MoEConfig)) if field.name != "vocab_size"]
# For one GPU with 24 GB, with many small experts, as in the paper.
GPU = dict(n_layers=8, n_heads=8, d_model=512, d_expert=256, n_experts=64, top_k=8, lr=1e-3, eval_every=500,
           save_every=1000)
PRESETS = {
    "demo": {},
    "tinystories": dict(GPU, context_length=512, batch_size=16, accumulate=4, steps=10_000, warmup=500),
    "openwebtext": dict(GPU, context_length=1024, batch_size=8, accumulate=16, steps=30_000, warmup=1000),
}
VAL_WINDOWS = 128  # at 512 tokens each, the standard error of val_ce is about 0.01 nats
LOG_COLUMNS = ("step tokens ce val_ce response_ce balance z erc epsilon violated coupling agreement max_load dead lr"
               " grad_norm tokens_per_s").split()
MAY_CHANGE = ("data out steps lr grad_clip log_every eval_every save_every device compile sample_tokens"
              " temperature").split()


def configs(values):
    """(TrainConfig, MoEConfig) of plain values by name; others are left out. Raises ValueError for bad ones."""
    return [kind(**{field.name: values[field.name] for field in fields(kind) if field.name in values})
            for kind in (TrainConfig, MoEConfig)]


# ---- Batches ---------------------------------------------------------------------------------------------------------
def keyed_generator(device, *key):
    """A random generator of its own for each key, such as (seed, step, "erc")."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def documents_fit(data, T):
    """Whether no document is longer than a window, as meta.json says; of foreign shards that is not known."""
    return data.meta.get("longest_document", math.inf) <= T


def train_batch(data, T, batch_size, generator):
    """Windows of T + 1 tokens, drawn with replacement -> (inputs, targets), both [B, T], int64, on the CPU.

    A window begins anywhere, and behind the last token of a shard comes its first. So every token is a target equally
    often, whatever the length of its document. Where all documents fit, a window begins at the next end-of-text:
    documents are seen from their start, as in sampling.
    """
    lengths = torch.tensor([len(shard) for shard in data.train])
    rows = []
    for offset in torch.randint(int(lengths.sum()), (batch_size,), generator=generator):
        index = int(torch.searchsorted(lengths.cumsum(0), offset, right=True))
        shard = torch.frombuffer(data.train[index], dtype=torch.uint16)                # no copy, whatever its length
        places = offset - lengths[:index].sum() + torch.arange(2 * T + 1)              # (2T + 1,)
        tokens = shard[places % len(shard)].long()                                     # (2T + 1,)
        first = int((tokens[:T] == data.eot).int().argmax()) if documents_fit(data, T) else 0
        rows.append(tokens[first : first + T + 1])                                     # (T + 1,)
    window = torch.stack(rows)                                                         # (B, T + 1)
    return window[:, :-1], window[:, 1:]


def validation_batches(data, T, batch_size):
    """The same tokens at every evaluation -> list of (inputs [B, T], targets [B, T]); target -100 does not count.

    Where the entropy floor is known and all documents fit: every whole document, as the floor assumes. Otherwise up to
    VAL_WINDOWS windows, evenly spaced, which may begin inside a document. UserError where the text is too short.
    """
    shards = [torch.frombuffer(shard, dtype=torch.uint16) for shard in data.val if len(shard) > T]
    if not shards or all(len(shard) <= T for shard in data.train):
        raise UserError(f"a window is {T + 1} tokens; the largest validation shard has {max(map(len, data.val))}, the"
                        f" largest training shard {max(map(len, data.train))}: lower --context-length, or add text")
    rows = []
    for shard in shards:
        if "entropy_floor" in data.meta and documents_fit(data, T):
            ends = (shard == data.eot).nonzero().flatten() + 1                         # (documents,)
            documents = shard.long().tensor_split(ends)[:-1]
            rows += [torch.cat((torch.tensor([data.eot]), document)) for document in documents]
        else:
            count = min(-(-VAL_WINDOWS // len(shards)), (len(shard) - 1) // T)
            starts = torch.linspace(0, len(shard) - T - 1, count).long().tolist()
            rows += [shard[start : start + T + 1].long() for start in starts]          # (T + 1,) each
    rows.sort(key=len)
    padded = [torch.nn.utils.rnn.pad_sequence(rows[i : i + batch_size], batch_first=True, padding_value=-100)
              for i in range(0, len(rows), batch_size)]
    return [(batch[:, :-1].clamp(min=0), batch[:, 1:]) for batch in padded]            # (B, T) each


# ---- Evaluation ------------------------------------------------------------------------------------------------------
def responses(moe, x):
    """How strongly each expert responds to each token: ||x W_g[j]||.  x [N, d] -> [N, n], in the weights' type."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.einsum("Nd,ndD->NnD", x.to(moe.W_g.dtype), moe.W_g).norm(dim=-1)


def forced_ce(model, x, states, first, targets):
    """What if other experts were in the last MoE layer's first slot? -> cross-entropy of each token, [N], in nats.

    x [N, d] enters that layer, states [N, d] the norm behind it, first [N] holds the experts. The router's best K - 1
    others keep the other slots, and the slots their weights. What a token's experts do in the last layer reaches no
    other token, so that each token is a trial of its own.
    """
    moe = model.moe_layers()[-1]
    logits, _, weights, experts = moe.route(x)                                         # (N, n), -, (N, K), (N, K)
    others = logits.scatter(1, first[:, None], -math.inf).topk(moe.top_k - 1).indices  # (N, K - 1)
    forced = moe.mix(x, weights, torch.cat((first[:, None], others), dim=1))[0]        # (N, d)
    states = states - moe.mix(x, weights, experts)[0] + forced                         # (N, d)
    return torch.nn.functional.cross_entropy(model.head(model.norm(states)).float(), targets, reduction="none")


def watched(model, inputs, targets):
    """A forward pass -> (its mean cross-entropy, what entered each MoE layer then the last norm: [B, T, d] each)."""
    entered = []
    hooks = [module.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
             for module in (*model.moe_layers(), model.norm)]
    ce = model(inputs, targets).ce
    for hook in hooks:
        hook.remove()
    return ce, entered


@torch.no_grad()
def evaluate(model, batches, device, autocast):
    """{"val_ce", "response_ce", "agreement"}, means over all targets that count.

    val_ce: pure cross-entropy, in nats per token. response_ce: what it would be if the last layer's first slot went to
    the expert that responds most, argmax_j ||x W_g[j]||. agreement: how often that is the router's first choice, mean
    over layers.
    """
    layers, sums, total = model.moe_layers(), torch.zeros(3, device=device), 0
    for inputs, targets in batches:
        inputs, targets = inputs.to(device), targets.to(device)
        counted = targets >= 0                                                         # (B, T)
        with autocast():
            ce, entered = watched(model, inputs, targets)
            *xs, states = (tensor[counted] for tensor in entered)                      # (N, d) each
            strongest = [responses(moe, x).argmax(dim=1) for moe, x in zip(layers, xs)]        # L times (N,)
            agreed = [moe.route(x)[-1][:, 0] == first for moe, x, first in zip(layers, xs, strongest)]
            forced = forced_ce(model, xs[-1], states, strongest[-1], targets[counted])         # (N,)
        sums += torch.stack((ce * len(states), forced.sum(), torch.stack(agreed).sum() / len(layers)))
        total += len(states)
    return dict(zip(("val_ce", "response_ce", "agreement"), (sums / total).tolist()))


@torch.no_grad()
def coupling(model, alpha):
    """{epsilon, violated, coupling} of the clean router and experts, means over layers."""
    rows = [torch.stack((erc_moe.noise_bound(moe.R).mean(),
                         *erc_moe.coupling_report(erc_moe.activation_norms(moe.R, moe.W_g), alpha)))
            for moe in model.moe_layers()]                                             # L times (3,)
    return dict(zip(("epsilon", "violated", "coupling"), torch.stack(rows).mean(dim=0).tolist()))


# ---- Checkpoints and log ---------------------------------------------------------------------------------------------
def save_checkpoint(folder, state):
    """Replaces ckpt.pt atomically: a kill or a full disk at any moment leaves the old one intact."""
    path, temporary = folder / "ckpt.pt", folder / "ckpt.pt.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave the final name on an empty file
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot save {path} ({reason}); an earlier one is intact: make room, then --resume") from error


def load_checkpoint(folder):
    """The checkpoint of a run folder, on the CPU. UserError where there is none, or where it is damaged."""
    path = Path(folder) / "ckpt.pt"
    if not path.exists():
        raise UserError(f"no checkpoint in {folder}; name the run folder with --out, or train first")
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch compares no checksums: damaged weights would load in silence
                raise ValueError(f"wrong checksum in {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)  # runs no code that may be in it
        names = "model optimizer scaler step config tokenizer data processes".split()
        return {name: dict(state)[name] for name in names}
    except (OSError, MemoryError):
        raise  # the file may be intact
    except Exception as error:  # damage shows as errors of many kinds
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is damaged or not from train.py ({reason}); train again with --overwrite") from error


def start_log(path, last_step):
    """Makes log.csv ready to append to -> its columns.

    Drops lines after last_step, which a resumed run writes again, and a truncated last line. Keeps columns that were
    added, in the file or to LOG_COLUMNS.
    """
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    old = csv.DictReader(line for line in lines if line.endswith("\n"))
    columns = list(dict.fromkeys([*(old.fieldnames or []), *LOG_COLUMNS]))
    temporary = path.with_name("log.csv.tmp")
    with open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for row in old if float(row["step"]) <= last_step)
    os.replace(temporary, path)
    return columns


# ---- One step --------------------------------------------------------------------------------------------------------
def processes():
    """(rank, number of processes) as torchrun says, else (0, 1). UserError where only a part of it is set."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    rank, number = int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)
    if (rank, number) != (0, 1) and not (rank < number and all(os.environ.get(name) for name in names)):
        raise UserError("RANK or WORLD_SIZE is set, but not all that torchrun sets; unset them, or start with torchrun")
    return rank, number


def pick_device(name):
    """The torch.device for --device; auto takes the best there is. UserError where there is none of that name."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK') or 0}"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"no device {name!r} here; try --device cpu") from error
    if name.startswith("cuda"):
        torch.cuda.set_device(name)  # else every process would pin memory for the first GPU
    return torch.device(name)


def pick_dtype(name, device):
    """The type of the matrix products. auto: float32, but on CUDA bfloat16 where it is native, or else float16."""
    if name == "auto" and device.type == "cuda":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return DTYPES[name] or torch.float32


def learning_rate(config, step):
    """Of a step, counted from 1: a linear warm-up, then a cosine down to a tenth of the peak."""
    if step <= config.warmup:
        return config.lr * step / config.warmup
    progress = (step - config.warmup) / (config.steps - config.warmup)
    return config.lr * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)


class Run:
    """What a run carries from step to step: data, model, optimizer, scaler, and the number of the last step."""

    def __init__(self, config, moe, model):
        self.config, self.step = config, 0
        self.rank, self.processes = processes()
        self.device = pick_device(config.device)
        self.dtype = pick_dtype(config.dtype, self.device)
        if config.compile and self.dtype != torch.bfloat16:
            raise UserError("--compile needs --dtype bf16: the grouped product compiles in no other type")
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(config.deterministic)
        self.data = prepare_data.load_data(config.data)
        torch.manual_seed(config.seed)
        # A multiple of 64 rows makes the largest matrix product faster on a GPU; the ids added never occur.
        self.model = model or MoETransformer(replace(moe, vocab_size=-(-self.data.vocab_size // 64) * 64))
        self.model.to(self.device)
        self.context = self.model.config.context_length
        self.step_tokens = config.batch_size * config.accumulate * self.processes * self.context
        self.val = validation_batches(self.data, self.context, config.batch_size)
        experts = [p for moe in self.model.moe_layers() for p in moe.parameters()]
        matrices = [p for p in self.model.parameters() if p.ndim >= 2 and all(p is not other for other in experts)]
        norms = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [dict(params=matrices, weight_decay=config.weight_decay), dict(params=norms, weight_decay=0.0),
                  dict(params=experts, weight_decay=config.moe_weight_decay)]
        self.optimizer = torch.optim.AdamW(groups, config.lr, (0.9, 0.95), fused=True)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.bad = torch.zeros((), device=self.device)  # steps in a row whose loss or gradient was not finite
        if self.processes > 1 and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")
        self.forward = torch.compile(self.model, dynamic=False, fullgraph=True) if config.compile else self.model
        if config.compile:  # a trial step: what cannot be compiled shows before a run folder is made
            try:
                self.add_token_gradient(0)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                reason = " ".join(str(error).strip().splitlines()[:2])
                raise UserError(f"the model cannot be compiled here ({reason}); use --no-compile") from error
            self.optimizer.zero_grad()

    def state(self):
        """All that a resumed run needs: tensors and plain values."""
        return dict({name: getattr(self, name).state_dict() for name in ("model", "optimizer", "scaler")},
                    step=self.step, config={**asdict(self.model.config), **asdict(self.config)},
                    data=self.data.fingerprint, tokenizer=self.data.tokenizer, processes=self.processes)

    def restore(self, state):
        """Goes on from a checkpoint. UserError where data or number of processes are not those it was saved with."""
        if state["data"] != self.data.fingerprint:
            raise UserError(f"the run to resume had other data than {self.config.data}; name its folder with --data")
        if state["processes"] != self.processes:
            raise UserError(f"the run to resume had {state['processes']} processes, not {self.processes}; start as"
                            " many again")
        for name in ("model", "optimizer", "scaler"):
            if state[name]:  # a scaler's is empty unless float16, and --dtype auto may be another type here
                getattr(self, name).load_state_dict(state[name])
        self.step = state["step"]

    def autocast(self):
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def add_token_gradient(self, step):
        """Adds up the gradients of a step's micro-batches -> means of (ce, balance, z) [3] and the load [L, n].

        Micro-batches are numbered over all processes: N processes with A each see the same data as one with N * A.
        """
        config, means, load = self.config, torch.zeros(3, device=self.device), 0
        for i in range(self.rank * config.accumulate, (self.rank + 1) * config.accumulate):
            batch = train_batch(self.data, self.context, config.batch_size,
                                keyed_generator("cpu", config.seed, step, "batch", i))
            if self.device.type == "cuda":  # a copy from pinned, contiguous memory does not block
                batch = [tokens.contiguous().pin_memory() for tokens in batch]
            with self.autocast():
                out = self.forward(*(tokens.to(self.device, non_blocking=True) for tokens in batch))
                loss = out.ce + config.balance_weight * out.balance + config.z_weight * out.z
            self.scaler.scale(loss / config.accumulate).backward()
            means += torch.stack((out.ce, out.balance, out.z)).detach() / config.accumulate
            load = load + out.load
        if self.processes > 1:  # data parallelism: average gradients and means, add up loads
            averaged = [p.grad for p in self.model.parameters() if p.grad is not None] + [means]
            for tensor in [*averaged, load]:
                dist.all_reduce(tensor)
            torch._foreach_div_(averaged, self.processes)
        return means, load

    def add_erc_gradient(self, step):
        """Adds the gradient of the ERC loss, once for the whole step -> its value [], mean over layers.

        Layer by layer, so that only one layer's n * n responses [D] are alive at a time. Unscaled, in float32: it comes
        after scaler.unscale_. It is the same on every process: no all-reduce.
        """
        layers, total = self.model.moe_layers(), torch.zeros((), device=self.device)
        noise = keyed_generator(self.device, self.config.seed, step, "erc")
        for moe in layers:
            loss = erc_moe.erc_loss(moe.R, moe.W_g, self.config.erc_alpha, noise) / len(layers)
            if self.config.erc_weight > 0:
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

    def update(self, step, norm, ce, look=True):
        """Takes the step. UserError, naming the step, if the loss or gradient of one was not finite.

        Such steps are counted on the device, to avoid a wait in each. `look` reads the count: before logging or saving.
        A float16 scaler that searches its scale may skip 19 in a row.
        """
        scaling = self.scaler.is_enabled()
        bad = ~torch.isfinite(norm + ce) | (not scaling and self.bad > 0)
        self.bad = (self.bad + 1) * bad
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step)
        if not (scaling and self.bad):  # the scaler knows nothing of what came after unscale_
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step = step
        if look and self.bad >= (20 if scaling else 1):
            raise UserError(f"loss or gradient is not finite at step {step - int(self.bad) + 1}; what was saved before"
                            " is intact: --resume with a lower --lr, or train again with --overwrite")

    def agree(self, number):
        """The largest number of all processes, which have to leave after the same step. No GPU has to wait for it."""
        flag = torch.tensor(number)
        if self.processes > 1:
            dist.all_reduce(flag, dist.ReduceOp.MAX)
        return int(flag)


# ---- The loop --------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def signals_caught():
    """A list that gets (number, time) of the first Ctrl-C or SIGTERM, which waits until a step is done.

    Within a second, another one is the same request: a scheduler and torchrun may both tell us. A later one ends the
    program at once. Outside the main thread Python allows no handlers.
    """
    caught, before = [], {}

    def catch(number, frame):
        if not caught:
            caught.extend((number, time.monotonic()))
        elif time.monotonic() > caught[1] + 1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def log_line(row):
    """A row of log.csv as a line on the console."""
    val = f"val_ce {row['val_ce']:.4f} | agreement {row['agreement']:.0%} | " if "val_ce" in row else ""
    return (f"step {row['step']:5d} | ce {row['ce']:.4f} | {val}balance {row['balance']:.3f} | erc {row['erc']:.4f} |"
            f" violated {row['violated']:.1%} | coupling {row['coupling']:.2f} | lr {row['lr']:.1e} | norm"
            f" {row['grad_norm']:.2f} | {row['tokens_per_s']:,.0f} tok/s")


def begin(run, resume, overwrite):
    """Makes the run folder, prints what runs on what -> columns of the log. UserError where the folder holds a run."""
    config, out, (total, active) = run.config, Path(run.config.out), run.model.num_params()
    device = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else run.device.type
    floor = run.data.meta.get("entropy_floor")
    if (out / "ckpt.pt").exists() and not resume and not overwrite:
        raise UserError(f"{out} holds a run; go on with --resume, start anew with --overwrite, or choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    if not resume:
        save_checkpoint(out, run.state())  # a folder that cannot be written shows now
        (out / "log.csv").unlink(missing_ok=True)
    print(f"{config.steps:,} steps of {run.step_tokens:,} tokens on {device}, {str(run.dtype)[6:]}\n"
          f"model: {total / 1e6:.2f}M parameters, {active / 1e6:.2f}M active for a token\n"
          f"data:  {config.data}, {sum(map(len, run.data.train)):,} training tokens ({run.data.tokenizer})"
          + (f", entropy floor {floor:.4f} nats per token" if floor else ""), flush=True)
    return start_log(out / "log.csv", run.step)


def train(config, moe=None, model=None, extra_loss=None, watch=None, resume=None, overwrite=False):
    """Trains, and returns the last logged row as a dict, with `signal`: 0, or the number of the one that stopped it.

    config: TrainConfig. moe: MoEConfig; its vocab_size comes from the data. model: one's own instead, with the methods
    of MoETransformer. extra_loss: a function of the model -> scalar, added once per step, as the ERC loss is. watch: a
    function of (model, step), called after each evaluation. resume: a checkpoint from load_checkpoint. Raises UserError
    for whatever the user can put right.
    """
    run, out, row, caught = Run(config, moe, model), Path(config.out), {}, 0
    if resume:
        run.restore(resume)
    is_main = run.rank == 0  # the one process that writes
    columns = begin(run, resume, overwrite) if is_main else []
    has_bar = is_main and not getattr(sys.stderr, "closed", True)  # sys.stderr is None where the shell closed it
    timed_from, clock = run.step, time.perf_counter()
    with (signals_caught() as signals,
          tqdm(total=config.steps, initial=run.step, unit="step", disable=None if has_bar else True) as bar):
        for step in range(run.step + 1, config.steps + 1):
            last = step == config.steps
            evaluates = last or (config.eval_every and step % config.eval_every == 0)
            logs = evaluates or step == 1 or step % config.log_every == 0
            means, load = run.add_token_gradient(step)
            run.scaler.unscale_(run.optimizer)
            erc = run.add_erc_gradient(step) if logs or config.erc_weight > 0 else None
            if extra_loss:
                extra_loss(run.model).backward()
            norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), config.grad_clip or math.inf)
            if logs:  # before the update: the weights that ce is of
                row = run.measure(step, means, load, erc, norm)
            caught = run.agree(signals[0] if signals else 0)
            saves = last or caught or (config.save_every and step % config.save_every == 0)
            run.update(step, norm, means[0], look=logs or saves or run.device.type == "cpu")
            bar.update()
            if logs:
                row["tokens_per_s"] = (step - timed_from) * run.step_tokens / (time.perf_counter() - clock)
            if evaluates:
                row.update(evaluate(run.model, run.val, run.device, run.autocast))
                if watch:
                    watch(run.model, step)
            if logs and is_main:
                with open(out / "log.csv", "a", encoding="utf-8", newline="") as file:
                    csv.DictWriter(file, columns, lineterminator="\n").writerow(row)
                with bar.external_write_mode():
                    print(log_line(row), flush=True)
            if saves and is_main:  # after the line of this step, which a resumed run does not write again
                save_checkpoint(out, run.state())
            if logs or saves:
                timed_from, clock = step, time.perf_counter()
            if caught:
                break
    return dict(row, signal=0 if run.step == config.steps else caught)


# ---- Samples, and the command line -----------------------------------------------------------------------------------
def sample(state, prompt, config, device):
    """The prompt and what the model in a checkpoint makes of it, up to the end of the document -> str."""
    tokenizer, model = prepare_data.get_tokenizer(state["tokenizer"]), MoETransformer(configs(state["config"])[1])
    model.load_state_dict(state["model"])
    tokens = torch.tensor([[tokenizer.eot_token, *tokenizer.encode_ordinary(prompt)]], device=device)  # (1, T)
    tokens = model.to(device).generate(tokens, config.sample_tokens, config.temperature,
                                       keyed_generator(device, config.seed, "sample"), tokenizer.eot_token,
                                       tokenizer.n_vocab)
    return tokenizer.decode([i for i in tokens[0].tolist() if i != tokenizer.eot_token])


def report(config, result):
    """Prints how a run ended: quality, memory, a sample, and how to go on."""
    this = f"python train.py --out {shlex.quote(config.out)}"
    if result["signal"]:
        return print(f"stopped and saved; go on with: {this} --resume")
    device, floor = pick_device(config.device), prepare_data.load_data(config.data).meta.get("entropy_floor")
    print(f"\nval_ce {result['val_ce']:.4f} nats per token"
          + (f", {result['val_ce'] / floor:.3f} times the entropy floor of this corpus, {floor:.4f}" if floor else ""))
    if device.type == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    try:
        print(f"\na sample:\n{sample(load_checkpoint(config.out), '', config, device)}\n")
    except UserError as error:  # no network, no vocabulary: the run is done all the same
        print(f"\nno sample: {error}\n")
    print(f"more samples:  {this} --sample \"...\"\ntrain longer:  {this} --resume --steps {2 * config.steps}")


def make_parser():
    """The argparse parser. A setting that is not on the command line is not in its result."""
    parser = argparse.ArgumentParser(prog="train.py", usage="train.py [--help] [--preset NAME] [--resume] [--FLAG ...]",
                                     description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--preset", choices=PRESETS, default="demo", help="settings to start from (default: demo)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--resume", action="store_true", help="go on with the run in --out, with the settings it has;"
                      " more --steps stretch the learning rate's schedule, so that it rises once more")
    what.add_argument("--overwrite", action="store_true", help="start anew in an --out that holds a run")
    what.add_argument("--sample", metavar="PROMPT", help="continue PROMPT with the model in --out, and stop")
    for field in SETTINGS:
        kind = dict(type=field.type, metavar=field.type.__name__)
        parser.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS,
                            help=f"{field.metadata['help']} (default: {field.default})",
                            **dict(action=argparse.BooleanOptionalAction) if field.type is bool else kind)
    return parser


def choose(options):
    """Parsed options -> (TrainConfig, MoEConfig, checkpoint or None). ValueError for wrong usage."""
    preset = options.preset
    explicit = {field.name: getattr(options, field.name) for field in SETTINGS if field.name in options}
    values = {"data": f"data/{preset}", "out": f"out/{preset}", **PRESETS[preset], **explicit}
    if not options.resume and options.sample is None:
        return *configs(values), None
    state = load_checkpoint(values["out"])
    for name, value in explicit.items():
        if name not in MAY_CHANGE and value != state["config"][name] and (options.resume or name != "seed"):
            raise ValueError(f"--{name.replace('_', '-')} is {value} here, but {state['config'][name]} in the run in"
                             f" {values['out']}; leave it out, or start a new run with another --out")
    config, moe = configs({**state["config"], **explicit, "out": values["out"]})
    if options.resume and state["step"] >= config.steps:
        raise ValueError(f"{config.out} is finished, at step {state['step']}; to train on, add --steps N, N above that")
    return config, moe, state


def main(argv=None):
    """The command line -> exit code. Raises UserError; argparse ends wrong usage with exit code 2."""
    parser = make_parser()
    options = parser.parse_args(argv)
    try:
        config, moe, state = choose(options)
    except ValueError as error:
        parser.error(str(error))
    if options.sample is not None:
        print(sample(state, options.sample, config, pick_device(config.device)))
        return 0
    rank, demo = processes()[0], Path("data/demo/meta.json")
    if config.data == "data/demo" and rank == 0 and not demo.exists():
        prepare_data.main(["demo"])
    while config.data == "data/demo" and rank > 0 and not demo.exists():  # the first process prepares it
        time.sleep(0.1)
    try:
        result = train(config, moe, resume=state, overwrite=options.overwrite)
    except torch.OutOfMemoryError as error:
        raise UserError("out of memory; lower --batch-size, raise --accumulate to make up for it, and add --overwrite"
                        ) from error
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank == 0:
        report(config, result)
    return 128 + result["signal"] if result["signal"] else 0


if __name__ == "__main__":
    sys.exit(prepare_data.run(main))
