"""Train a small MoE language model with the expert-router coupling (ERC) loss, on one GPU or on a laptop's CPU.

    python train.py                                # the embedded corpus, without a network; minutes on two CPU cores
    python train.py --preset tinystories           # one 16 GB GPU; before it: python prepare_data.py tinystories
    python train.py --preset tinystories --resume  # go on where that run stopped
    python train.py --sample "To make"             # let the model in out/demo continue a text
    torchrun --nproc-per-node=2 train.py ...       # data-parallel

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
import time
import zipfile
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path

import erc_moe  # before torch: it silences torch's warning about a missing numpy, which nothing here uses

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import prepare_data
from erc_moe import MoEConfig, MoETransformer, setting
from prepare_data import UserError

# ---- Settings --------------------------------------------------------------------------------------------------------
DTYPES = dict(auto=torch.float32, fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)  # auto: see pick_dtype


@dataclass(frozen=True)
class TrainConfig:
    """One training run. The defaults are those of the demo. Raises ValueError, naming the setting, for bad values."""

    data: str = setting("data/demo", "folder of token shards, made by prepare_data.py")
    out: str = setting("out/demo", "run folder")
    steps: int = setting(1300, "optimizer steps", least=1)
    seed: int = setting(0, "seeds initial weights, batches, noise and samples")
    batch_size: int = setting(8, "sequences in a micro-batch (of each process)", least=1)
    accumulate: int = setting(1, "gradient accumulation: micro-batches in a step (of each process)", least=1)
    lr: float = setting(4e-3, "peak learning rate")
    warmup: int = setting(60, "steps of linear warm-up; then a cosine falls to a tenth of the peak")
    moe_weight_decay: float = setting(1.3, "weight decay of router and experts: R, W_g, W_p and W_o")
    weight_decay: float = setting(0.1, "weight decay of all other matrices")
    grad_clip: float = setting(1.0, "largest norm of the whole gradient; 0: no clipping")
    log_every: int = setting(100, "steps between lines in the log", least=1)
    eval_every: int = setting(650, "steps between evaluations; 0: only at the end")
    save_every: int = setting(650, "steps between checkpoints; 0: only at the end")
    device: str = setting("auto", "auto (cuda, else cpu), cpu, cuda, cuda:1, mps ...")
    dtype: str = setting("auto", "auto, fp32, bf16 or fp16: the type of the matrix products; weights stay float32")
    compile: bool = setting(False, "compile the model; needs bf16")
    balance_weight: float = setting(0.01, "weight of the load-balancing loss")
    z_weight: float = setting(0.0, "weight of the router z-loss")
    erc_weight: float = setting(1.0, "weight of the ERC loss; 0: a plain MoE")
    erc_alpha: float = setting(1.0, "alpha of the ERC loss, 0 to 1 in the paper; smaller is stricter")
    sample_tokens: int = setting(300, "longest continuation", least=1)
    temperature: float = setting(0.8, "of samples; 0: the likeliest token")

    def __post_init__(self):
        erc_moe.check_numbers(self)
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")


# Every setting is a flag, except for vocab_size, which comes from the data.
FLAGS = [field for field in (*fields(TrainConfig), *fields(MoEConfig)) if field.name != "vocab_size"]
# For one GPU, by count of tensors with 16 GB or more; with many small experts, as in the paper.
FOR_A_GPU = dict(n_layers=8, n_heads=8, d_model=512, d_expert=256, n_experts=64, top_k=8,
                 lr=1e-3, eval_every=500, save_every=1000)
# Over a run, the sum of lr * moe_weight_decay is about 3.7, as in the paper, whose decay is 0.1 in 167,000 steps. With
# 0.1 in runs as short as these, the weights of router and experts would forget next to nothing.
PRESETS = {
    "demo": {},
    "tinystories": dict(FOR_A_GPU, data="data/tinystories", out="out/tinystories", context_length=512,
                        batch_size=16, accumulate=4, steps=10_000, warmup=500, moe_weight_decay=0.67),
    "openwebtext": dict(FOR_A_GPU, data="data/openwebtext", out="out/openwebtext", context_length=1024,
                        batch_size=8, accumulate=16, steps=30_000, warmup=1000, moe_weight_decay=0.22),
}
VAL_WINDOWS = 128  # at 512 tokens each, the standard error of val_ce is about 0.01 nats
LOG_COLUMNS = """step tokens ce val_ce response_ce balance z erc epsilon violated coupling agreement max_load dead lr
    grad_norm tokens_per_s""".split()
RESUME_MAY_CHANGE = """data out steps lr grad_clip log_every eval_every save_every device compile sample_tokens
    temperature""".split()  # all else is as in the checkpoint


def configs(values):
    """A dict of settings -> [TrainConfig, MoEConfig]. Other names in it are ignored."""
    return [kind(**{field.name: values[field.name] for field in fields(kind) if field.name in values})
            for kind in (TrainConfig, MoEConfig)]


def learning_rate(config, step):
    """A linear warm-up, then a cosine down to a tenth of the peak. Steps count from 1."""
    if step <= config.warmup:
        return config.lr * step / config.warmup
    progress = (step - config.warmup) / (config.steps - config.warmup)
    return config.lr * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)


# ---- Batches ---------------------------------------------------------------------------------------------------------
# Shapes: B sequences of at most T tokens, N tokens that count, L layers, n experts, K of them for a token. As in
# erc_moe.py, d is the width of the model and D that of an expert.


def keyed_generator(device, *key):
    """A random generator of its own for each key, such as (seed, step, "erc")."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)  # as a signed integer of 64 bits


def check_data(data, T):
    """UserError where a split is shorter than a window, or where foreign shards hold ids outside GPT-2's vocabulary."""
    val, train = (max(map(len, shards)) for shards in (data.val, data.train))
    if min(val, train) <= T:
        raise UserError(f"a window is {T + 1} tokens; the largest validation shard has {val}, the largest training"
                        f" shard {train}: lower --context-length, or add text")
    if not data.meta:  # not made by prepare_data.py: every token is read, once in a run
        for shard in (*data.train, *data.val):
            largest = max(part.int().max() for part in torch.frombuffer(shard, dtype=torch.uint16).split(1 << 24))
            if largest >= data.vocab_size:
                raise UserError(f"a shard holds token {largest}, outside GPT-2's vocabulary of {data.vocab_size};"
                                " prepare the text with prepare_data.py")


def train_batch(data, T, batch_size, generator):
    """Windows of T + 1 tokens, drawn with replacement -> (inputs, targets), both [B, T], int64, on the CPU.

    A window begins at any token, also inside a document, and behind the last token of a shard comes its first. So every
    token is a target equally often, end-of-text too, whatever the lengths of the documents.
    """
    ends = torch.tensor([len(shard) for shard in data.train]).cumsum(0)
    rows = []
    for offset in torch.randint(int(ends[-1]), (batch_size,), generator=generator):
        index = int(torch.searchsorted(ends, offset, right=True))
        shard = torch.frombuffer(data.train[index], dtype=torch.uint16)                # no copy, whatever its length
        positions = (offset - ends[index] + torch.arange(T + 1)) % len(shard)          # (T + 1,), % makes them >= 0
        rows.append(shard[positions].long())                                           # (T + 1,)
    window = torch.stack(rows)                                                         # (B, T + 1)
    return window[:, :-1], window[:, 1:]


def documents_fit(data, T):
    """Whether no document is longer than a window, as far as meta.json knows."""
    return data.meta.get("longest_document", math.inf) <= T


def validation_batches(data, T, batch_size):
    """The same tokens at every evaluation -> list of (inputs [B, T], targets [B, T]); target -100 does not count.

    Where an entropy floor is known, and all documents fit: all documents, each whole, as the floor takes them. Else
    about VAL_WINDOWS windows, evenly spaced, which may begin inside a document.
    """
    rows, shards = [], [torch.frombuffer(shard, dtype=torch.uint16) for shard in data.val if len(shard) > T]
    for shard in shards:
        if "entropy_floor" in data.meta and documents_fit(data, T):
            ends = (shard == data.eot).nonzero().flatten() + 1
            documents = shard.tensor_split(ends)[:-1]  # behind the last end-of-text is nothing
            rows += [F.pad(document.long(), (1, 0), value=data.eot) for document in documents]
        else:
            count = min(math.ceil(VAL_WINDOWS / len(shards)), (len(shard) - 1) // T)
            starts = [i * (len(shard) - T - 1) // max(1, count - 1) for i in range(count)]  # from first to last
            rows += [shard[start : start + T + 1].long() for start in starts]          # (T + 1,) each
    rows.sort(key=len)  # so that there is little padding
    padded = [torch.nn.utils.rnn.pad_sequence(rows[i : i + batch_size], batch_first=True, padding_value=-100)
              for i in range(0, len(rows), batch_size)]
    return [(batch[:, :-1].clamp(min=0), batch[:, 1:]) for batch in padded]            # (B, T) each; -100 is no input


# ---- Evaluation ------------------------------------------------------------------------------------------------------
def responses(moe, x):
    """How strongly each expert responds to each token: ||x W_g[j]||.  x [N, d] -> [N, n]."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.einsum("Nd,ndD->NnD", x.to(moe.W_g.dtype), moe.W_g).norm(dim=-1)


def layer_inputs(model, inputs, targets):
    """A forward pass -> (mean cross-entropy, [what entered each MoE layer, ..., what entered the last norm]).

    inputs, targets [B, T] -> what entered [B, T, d] each.
    """
    entered = []
    hooks = [module.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
             for module in (*model.moe_layers(), model.norm)]
    ce = model(inputs, targets).ce
    for hook in hooks:
        hook.remove()
    return ce, entered


def forced_ce(model, x, states, first, targets):
    """What if the last MoE layer's first slot had another expert? -> cross-entropy of each token, [N], in nats.

    x [N, d] enters that layer, states [N, d] the last norm, first [N] are the experts. The router's best K - 1 experts
    but this one follow, and slot k keeps the weight k. No attention follows, so all tokens can be tried at once.
    """
    moe = model.moe_layers()[-1]
    logits, _, weights, experts = moe.route(x)                                         # (N, n), -, (N, K), (N, K)
    others = logits.scatter(1, first[:, None], -math.inf).topk(moe.top_k - 1).indices  # (N, K - 1)
    forced = moe.mix(x, weights, torch.cat((first[:, None], others), dim=1))[0]        # (N, d)
    states = states - moe.mix(x, weights, experts)[0] + forced                         # (N, d)
    return F.cross_entropy(model.head(model.norm(states)).float(), targets, reduction="none")  # (N,)


@torch.no_grad()
def evaluate(model, batches, device, autocast):
    """{"val_ce", "response_ce", "agreement"}, means over all targets that count.

    val_ce: pure cross-entropy, in nats per token. response_ce: the same if the last layer's first slot goes to the
    expert that responds most, argmax_j ||x W_g[j]||. agreement: how often that expert is the router's first choice,
    mean over layers.
    """
    layers, sums, total = model.moe_layers(), torch.zeros(3, device=device), 0
    for inputs, targets in batches:
        inputs, targets = inputs.to(device), targets.to(device)
        counted = targets >= 0                                                         # (B, T)
        with autocast():
            ce, entered = layer_inputs(model, inputs, targets)
            *xs, states = (tensor[counted] for tensor in entered)                      # (N, d) each
            strongest = torch.stack([responses(moe, x).argmax(dim=1) for moe, x in zip(layers, xs)])   # (L, N)
            chosen = torch.stack([moe.route(x)[-1][:, 0] for moe, x in zip(layers, xs)])       # (L, N)
            forced = forced_ce(model, xs[-1], states, strongest[-1], targets[counted])         # (N,)
        sums += torch.stack((ce * len(states), forced.sum(), (chosen == strongest).sum() / len(layers)))
        total += len(states)
    return dict(zip(("val_ce", "response_ce", "agreement"), (sums / total).tolist()))


# ---- Checkpoint and log ----------------------------------------------------------------------------------------------
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
        return {name: state[name] for name in "config model optimizer scaler step data tokenizer processes".split()}
    except (OSError, MemoryError):
        raise  # no sign of damage
    except Exception as error:  # damage shows as errors of many kinds
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is damaged or not from train.py ({reason}); train again with --overwrite") from error


def open_log(folder, step, resume, overwrite):
    """log.csv of a run folder, open to append to: with resume cut back to `step`, else empty but for its header.

    It is locked as long as this process lives. UserError where another one trains in the folder, or where the folder
    holds a run and neither resume nor overwrite is said.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / "log.csv", "a+", encoding="utf-8", newline="")
    if not prepare_data.lock(file, wait=False):
        raise UserError(f"another process trains in {folder}; choose another --out")
    file.seek(0)
    header, *rows = file.readlines() or [""]
    has_checkpoint = (folder / "ckpt.pt").exists()
    if not (resume or overwrite) and (rows or has_checkpoint):
        raise UserError(f"{folder} holds a run; {'go on with --resume, ' if has_checkpoint else ''}start anew with"
                        " --overwrite, or choose another --out")
    kept = [row for row in rows if resume and row.endswith("\n") and int(row.split(",")[0]) <= step]
    file.truncate(len("".join([header, *kept]).encode()) if kept else 0)  # in mode "a" it is written to its new end
    file.write("" if kept else ",".join(LOG_COLUMNS) + "\n")
    file.flush()
    return file


# ---- A run -----------------------------------------------------------------------------------------------------------
def rank_and_world_size():
    """(rank, number of processes), as torchrun says."""
    return (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if dist.is_torchelastic_launched() else (0, 1)


def pick_device(name):
    """The torch.device for --device. UserError where there is none of that name."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
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
    return DTYPES[name]


class Run:
    """What a run carries from step to step: data, model, optimizer, scaler, log, and the number of the last step.

    moe: MoEConfig; its vocab_size comes from the data. model: trained if given, else a new MoETransformer; it needs the
    same methods and attributes, and no dropout. state: a checkpoint to go on from. UserError for the user's mistakes.
    """

    def __init__(self, config, moe=None, model=None, state=None, overwrite=False):
        self.config, self.step = config, 0
        self.rank, self.processes = rank_and_world_size()
        self.device = pick_device(config.device)
        self.dtype = pick_dtype(config.dtype, self.device)
        if config.compile and self.dtype != torch.bfloat16:
            raise UserError("--compile needs --dtype bf16: the grouped product compiles in no other type")
        self.data = prepare_data.load_data(config.data)
        torch.manual_seed(config.seed)
        # A multiple of 64 rows makes the largest matrix product faster on a GPU; the ids added never occur.
        self.model = model or MoETransformer(replace(moe, vocab_size=-(-self.data.vocab_size // 64) * 64))
        self.model.to(self.device)
        self.context = self.model.config.context_length
        self.step_tokens = config.batch_size * config.accumulate * self.processes * self.context
        check_data(self.data, self.context)
        self.val = validation_batches(self.data, self.context, config.batch_size)
        of_moe = {p for layer in self.model.moe_layers() for p in layer.parameters()}
        matrices = [p for p in self.model.parameters() if p.ndim >= 2]
        groups = [dict(params=[p for p in matrices if p not in of_moe], weight_decay=config.weight_decay),
                  dict(params=[p for p in self.model.parameters() if p.ndim < 2], weight_decay=0.0),
                  dict(params=[p for p in matrices if p in of_moe], weight_decay=config.moe_weight_decay)]
        self.optimizer = torch.optim.AdamW(groups, config.lr, (0.9, 0.95), fused=True)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        # For training. Evaluation takes self.model, the same weights: its shapes vary, and would compile again.
        self.forward = torch.compile(self.model, dynamic=False, fullgraph=True) if config.compile else self.model
        if state:
            self.restore(state)
        self.log = open_log(Path(config.out), self.step, bool(state), overwrite) if self.rank == 0 else None
        # If rank 0 has failed above, the others wait here, silently, until torchrun ends them.
        if self.processes > 1 and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")
        if overwrite and self.log:  # last, when nothing can fail any more
            Path(config.out, "ckpt.pt").unlink(missing_ok=True)

    def save(self):
        """Replaces ckpt.pt, all that a resumed run needs, as tensors and plain values. UserError on a full disk."""
        state = dict(model=self.model.state_dict(), optimizer=self.optimizer.state_dict(),
                     scaler=self.scaler.state_dict(), step=self.step, processes=self.processes,
                     data=self.data.fingerprint, tokenizer=self.data.tokenizer,
                     config={**asdict(self.model.config), **asdict(self.config)})
        path = Path(self.config.out, "ckpt.pt")
        try:
            with prepare_data.replacing(path) as file:
                torch.save(state, file)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            raise UserError(f"cannot save {path} ({str(error).splitlines()[0]}); an earlier one is intact: make room,"
                            " then --resume") from error

    def restore(self, state):
        """Goes on from a checkpoint. UserError where data or number of processes are not those it was saved with."""
        if state["data"] != self.data.fingerprint:
            raise UserError(f"the run to resume had other data than {self.config.data}; name its folder with --data")
        if state["processes"] != self.processes:
            raise UserError(f"the run to resume had {state['processes']} processes, not {self.processes}; start as"
                            " many again")
        for name in ("model", "optimizer", "scaler"):
            if state[name]:  # a scaler that is off has none, and dtype auto may be another one on this machine
                getattr(self, name).load_state_dict(state[name])
        self.step = state["step"]

    def autocast(self):
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def batch(self, step, i):
        """Micro-batch i of a step, counted over all processes -> inputs, targets, both [B, T] on the device."""
        tokens = train_batch(self.data, self.context, self.config.batch_size,
                             keyed_generator("cpu", self.config.seed, step, "batch", i))
        if self.device.type == "cuda":  # a copy from pinned, contiguous memory does not block
            tokens = [part.contiguous().pin_memory() for part in tokens]
        return [part.to(self.device, non_blocking=True) for part in tokens]

    def average(self, means, load):
        """Data parallelism: gradients and means become those of all processes, loads are added up.

        Gradients are still scaled: what is infinite in one process is so in all, and all skip the step.
        """
        averaged = [p.grad for p in self.model.parameters() if p.grad is not None] + [means]
        for tensor in [*averaged, load]:
            dist.all_reduce(tensor)
        torch._foreach_div_(averaged, self.processes)

    def any_signal(self, came):
        """The number of a signal that any process got, or 0: all stop after the same step."""
        number = torch.tensor(max(came, default=0))  # on the CPU: no GPU has to wait for it
        if self.processes > 1:
            dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)


# ---- The loop --------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def signals_noted():
    """A list of the signals that came. Ctrl-C, SIGTERM and the end of the terminal wait until a step is done.

    One that is ignored, as under nohup, stays so. Python allows handlers in the main thread alone.
    """
    came, before, hangup = [], {}, getattr(signal, "SIGHUP", None)  # Windows has none
    terminals = [number for number in (1, 2) if os.isatty(number)]  # asked now: once it is gone, isatty says no

    def note(number, frame):
        came.append(number)
        if number == hangup:  # what is still printed goes nowhere
            for terminal in terminals:
                os.dup2(os.open(os.devnull, os.O_WRONLY), terminal)

    with contextlib.suppress(ValueError):  # not the main thread
        for number in filter(None, (signal.SIGINT, signal.SIGTERM, hangup)):
            if signal.getsignal(number) not in (None, signal.SIG_IGN):
                before[number] = signal.signal(number, note)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(run, extra_loss=None, watch=None):
    """Trains, and returns the last logged row as a dict, with `signal`: 0, or the number of the one that stopped it.

    extra_loss: a function of the model -> scalar, added once per step, as the ERC loss is; it has to be the same on all
    processes. watch: a function of (model, step), called on every process after each evaluation. UserError for a loss
    that is not finite, or where a checkpoint cannot be saved; what was saved before is intact.
    """
    config, model, optimizer, scaler = run.config, run.model, run.optimizer, run.scaler
    row, stop, first = {}, 0, run.step + 1
    timed_from, clock = run.step, time.perf_counter()
    no_bar = None if run.log and sys.stderr else True  # None: a bar on a terminal only
    with (signals_noted() as signals, run.log or contextlib.nullcontext(),
          tqdm(total=config.steps, initial=run.step, unit="step", disable=no_bar) as bar):
        for step in range(first, config.steps + 1):
            is_last = step == config.steps
            do_eval = is_last or (config.eval_every and step % config.eval_every == 0)
            do_log = do_eval or step == 1 or step % config.log_every == 0

            # 1. The gradient of cross-entropy, balance and z-loss: the mean over all micro-batches of all processes.
            means, load = torch.zeros(3, device=run.device), 0
            for i in range(config.accumulate):
                inputs, targets = run.batch(step, run.rank * config.accumulate + i)    # (B, T) each
                with run.autocast():
                    ce, balance, z, micro_load = run.forward(inputs, targets)[1:]  # without its logits
                    loss = ce + config.balance_weight * balance + config.z_weight * z
                scaler.scale(loss / config.accumulate).backward()
                means += torch.stack((ce, balance, z)).detach() / config.accumulate    # (3,)
                load = load + micro_load                                               # (L, n)
            if run.processes > 1:
                run.average(means, load)
            scaler.unscale_(optimizer)

            # 2. The gradient of the ERC loss, a function of the weights alone: once per step, in float32, unscaled, and
            # the same on every process.
            if do_log or config.erc_weight > 0:
                erc = model.erc_loss(config.erc_alpha, keyed_generator(run.device, config.seed, step, "erc"))
            if config.erc_weight > 0:
                (config.erc_weight * erc).backward()
            if extra_loss:
                extra_loss(model).backward()

            # 3. The update.
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
            if do_log:  # before the weights change
                row = log_row(run, step, means, load, erc, norm)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            run.step = step
            bar.update()

            # 4. What is seen and kept of it.
            stop = run.any_signal(signals)
            do_save = is_last or stop or (config.save_every and step % config.save_every == 0)
            if not (do_log or do_save or step == first):  # the first one is slow, and would spoil the clock
                continue
            check_finite(run, means[0])  # waits for the GPU, so that the clock is right
            seconds, steps = time.perf_counter() - clock, step - timed_from
            if do_eval:
                row.update(evaluate(model, run.val, run.device, run.autocast))
                if watch:
                    watch(model, step)
            if do_log and run.log:
                row["tokens_per_s"] = steps * run.step_tokens / seconds
                csv.DictWriter(run.log, LOG_COLUMNS, lineterminator="\n").writerow(row)
                run.log.flush()
            if do_save and run.log:  # after the line of this step, which a resumed run does not write again
                run.save()
            if do_log and run.log:  # last: when the line shows, log.csv and ckpt.pt are written
                with bar.external_write_mode(), contextlib.suppress(OSError):  # stdout is gone; log.csv has it
                    print(log_line(run, row, None if step == first else seconds / steps), flush=True)
            timed_from, clock = step, time.perf_counter()
            if stop:
                break
    return dict(row, signal=0 if run.step == config.steps else stop)  # one that came in the last step stopped nothing


def check_finite(run, ce):
    """UserError where the weights or the loss are not finite: a NaN of an earlier step stays in the weights.

    A float16 scaler that never finds a finite gradient skips every step. The weights stay finite, and its scale, 65,536
    at first, is halved for ever.
    """
    finite = (torch.nn.utils.get_total_norm(run.model.parameters()) + ce).isfinite()
    if not finite or run.scaler.get_scale() < 1e-4:
        raise UserError(f"loss or gradient is not finite at step {run.step} or shortly before; what was saved before is"
                        " intact: --resume with a lower --lr, or train again with --overwrite")


@torch.no_grad()
def log_row(run, step, means, load, erc, norm):
    """The row of log.csv, without speed and evaluation. erc is with noise; epsilon, violated, coupling are without."""
    share = load / load.sum(dim=1, keepdim=True)                                       # (L, n)
    layers = [(erc_moe.noise_bound(moe.R).mean(),
               *erc_moe.coupling_report(erc_moe.activation_norms(moe.R, moe.W_g), run.config.erc_alpha))
              for moe in run.model.moe_layers()]
    epsilon, violated, coupling = (torch.stack(of_layers).mean().item() for of_layers in zip(*layers))
    return dict(zip(("ce", "balance", "z"), means.tolist()), step=step, tokens=step * run.step_tokens, erc=erc.item(),
                epsilon=epsilon, violated=violated, coupling=coupling, lr=learning_rate(run.config, step),
                max_load=share.max().item() * load.size(1),  # of the busiest expert; 1: all have the same
                dead=int((load == 0).sum()), grad_norm=norm.item())


def log_line(run, row, seconds):
    """A row of log.csv as a line on the console; seconds: of a step, None where that is not known yet."""
    step, steps, model = row["step"], run.config.steps, run.model
    parts = [f"step {step:5d} {step / steps:4.0%}", f"ce {row['ce']:.4f}"]
    if "val_ce" in row:
        parts += [f"val_ce {row['val_ce']:.4f}", f"agreement {row['agreement']:.0%}"]
    parts += [f"balance {row['balance']:.3f}", f"erc {row['erc']:.4f}", f"violated {row['violated']:.1%}",
              f"coupling {row['coupling']:.2f}", f"lr {row['lr']:.1e}", f"norm {row['grad_norm']:.2f}",
              f"{row['tokens_per_s']:,.0f} tok/s"]
    if run.device.type == "cuda":
        # 2 operations a weight forward, 4 backward; and scores and values of T/2 earlier tokens in each layer, as
        # attention is causal. The ERC loss is not counted.
        weights = model.num_params()[1] - (0 if model.config.tie_embeddings else model.embedding.weight.numel())
        flops = 6 * weights + 6 * model.config.n_layers * run.context * model.config.d_model
        parts.append(f"{flops * row['tokens_per_s'] / run.processes / 1e12:.1f} TFLOP/s")
    if seconds and step < steps:
        parts.append(f"{timedelta(seconds=round(seconds * (steps - step)))} left")
    return " | ".join(parts)


# ---- Samples, and the command line -----------------------------------------------------------------------------------
def sample(model, tokenizer, prompt, config):
    """The prompt and what the model makes of it, up to the end of the document -> str."""
    device = model.embedding.weight.device
    tokens = torch.tensor([[tokenizer.eot_token, *tokenizer.encode_ordinary(prompt)]], device=device)  # (1, T)
    tokens = model.generate(tokens, config.sample_tokens, config.temperature,
                            keyed_generator(device, config.seed, "sample"), tokenizer.eot_token, tokenizer.n_vocab)
    return tokenizer.decode([i for i in tokens[0].tolist() if i != tokenizer.eot_token])


def introduce(run):
    """Prints what will run on what."""
    total, active = run.model.num_params()
    print(f"{run.config.steps:,} steps of {run.step_tokens:,} tokens on {run.device}, {run.dtype}\n"
          f"model: {total / 1e6:.2f}M parameters, {active / 1e6:.2f}M active for a token\n"
          f"data:  {run.config.data}, {sum(map(len, run.data.train)):,} training tokens ({run.data.tokenizer})",
          flush=True)


def report(run, result, argv):
    """Prints how a run ended: quality, memory, a sample, and what one may do next."""
    out, floor = shlex.quote(run.config.out), run.data.meta.get("entropy_floor")
    program = "python train.py" if run.processes == 1 else "torchrun ... train.py"
    if result["signal"]:
        print(f"stopped and saved; go on with: {program} --out {out} --resume")
        return
    print(f"\nval_ce {result['val_ce']:.4f} nats per token"
          + (f", {result['val_ce'] / floor:.3f} times the entropy floor of this corpus, {floor:.4f}"
             if floor and documents_fit(run.data, run.context) else "")
          + f"\n       {result['response_ce']:.4f} if the last layer's first slot goes to the strongest response")
    if run.device.type == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    try:
        print(f"\na sample:\n{sample(run.model, prepare_data.get_tokenizer(run.data.tokenizer), '', run.config)}\n")
    except UserError as error:  # no network, no vocabulary: the run is done all the same
        print(f"\nno sample: {error}\n")
    print(f"more samples:      python train.py --out {out} --sample \"...\"\n"
          f"train longer:      {program} --out {out} --resume --steps {2 * run.config.steps}")
    if run.config.erc_weight > 0 and "--resume" not in argv:
        again = [flag for flag in argv if flag != "--overwrite"]  # which would be that of an earlier plain run
        plain = shlex.join([*again, "--erc-weight", "0", "--out", f"{run.config.out}-plain"])
        print(f"without the loss:  {program} {plain}")


def make_parser(argv):
    """The parser. Its help shows the defaults of the preset in argv. Its result has only what was given."""
    parser = argparse.ArgumentParser(prog="train.py", usage="train.py [--help] [--preset NAME] [--resume] [--FLAG ...]",
                                     description=__doc__.splitlines()[0], allow_abbrev=False, add_help=False)
    parser.add_argument("--preset", choices=PRESETS, default="demo", help="settings to start from (default: demo)")
    defaults = PRESETS[parser.parse_known_args(argv)[0].preset]  # before there is a --help that would end it
    parser.add_argument("-h", "--help", action="help", help="show this, and stop")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--resume", action="store_true", help="go on with the run in --out, with the settings it has;"
                      " more --steps stretch the learning rate's schedule, so that it rises once more")
    what.add_argument("--overwrite", action="store_true", help="start anew in an --out that holds a run")
    what.add_argument("--sample", metavar="PROMPT", help="continue PROMPT with the model in --out, and stop")
    for field in FLAGS:
        kind = (dict(action=argparse.BooleanOptionalAction) if field.type is bool else
                dict(type=field.type, metavar=field.type.__name__))
        parser.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS, **kind,
                            help=f"{field.metadata['help']} (default: {defaults.get(field.name, field.default)})")
    return parser


def configs_of(options):
    """Parsed options -> (TrainConfig, MoEConfig, checkpoint or None). ValueError for wrong usage."""
    explicit = {field.name: getattr(options, field.name) for field in FLAGS if field.name in options}
    values = {**PRESETS[options.preset], **explicit}
    if not options.resume and options.sample is None:
        return *configs(values), None
    out = values.get("out", TrainConfig.out)
    state = load_checkpoint(out)
    stored = {**{field.name: field.default for field in FLAGS}, **state["config"]}  # an older one may lack settings
    may_change = RESUME_MAY_CHANGE if options.resume else [*RESUME_MAY_CHANGE, "seed"]  # a sample may have its own
    for name, value in explicit.items():
        if name not in may_change and value != stored[name]:
            raise ValueError(f"--{name.replace('_', '-')} is {value} here, but {stored[name]} in the run in"
                             f" {out}; leave it out, or start a new run with another --out")
    config, moe = configs({**stored, **explicit, "out": out})
    if options.resume and state["step"] >= config.steps:
        raise ValueError(f"{config.out} is finished, at step {state['step']}; to train on, add --steps N, N above that")
    return config, moe, state


def main(argv=None):
    """The command line -> exit code. Raises UserError; argparse ends wrong usage with exit code 2."""
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser(argv)
    options = parser.parse_args(argv)
    try:
        config, moe, state = configs_of(options)
    except ValueError as error:
        parser.error(str(error))
    if options.sample is not None:
        model = MoETransformer(moe).to(pick_device(config.device))
        model.load_state_dict(state["model"])
        print(sample(model, prepare_data.get_tokenizer(state["tokenizer"]), options.sample, config))
        return 0
    if options.preset != "demo" and config.device == "auto" and pick_device("auto").type == "cpu":
        raise UserError(f"the preset {options.preset} is for a GPU, and torch finds none; add --device cpu to wait for"
                        " weeks, or leave --preset out")
    rank = rank_and_world_size()[0]
    if config.data == "data/demo":
        if rank == 0 and not prepare_data.is_finished(config.data):
            prepare_data.main(["demo"])
        while not prepare_data.is_finished(config.data):  # the other processes wait for rank 0
            time.sleep(0.1)
    try:
        run = Run(config, moe, state=state, overwrite=options.overwrite)
        del state  # the weights and two moments of each, on the CPU
        if rank == 0:
            introduce(run)
        result = train(run)
    except torch.OutOfMemoryError as error:
        raise UserError("out of memory; start a new run with a lower --batch-size, and a higher --accumulate to make up"
                        " for it") from error
    if run.processes > 1:
        dist.destroy_process_group()
    if rank == 0:
        report(run, result, argv)
    return 128 + result["signal"] if result["signal"] else 0


if __name__ == "__main__":
    sys.exit(prepare_data.run_program(main))
