"""The expert-router coupling (ERC) loss, and a small Mixture-of-Experts transformer to train with it.

In a Mixture of Experts every token is sent by a *router* to K of n *experts*. The router is a matrix R with one row
per expert; an expert is a feed-forward network of its own. Nothing ties the two together: R never sees the experts'
weights, so a token may well be sent to an expert that is not good at it. The ERC loss ties them, in three steps:

  1. Perturb.  Read row R[i] as the centre of the cluster of tokens sent to expert i: a *proxy token* for all of them.
               Shake it by at most half the way to the nearest other row, so that it speaks for the cluster and not
               just for its centre:  R~[i] = R[i] * delta_i,  delta_i ~ Uniform(1 - epsilon_i, 1 + epsilon_i)^d
  2. Probe.    Show every proxy to every expert, and see how strongly its gate matrix responds:
               M[i, j] = || R~[i] W_g[j] ||
  3. Hinge.    Expert i must respond to proxy i more than any other expert does (row i of M), and more than it does to
               any other proxy (column i of M); alpha says by how much, smaller is stricter:
               L = 1/n^2 sum_i sum_{j != i} max(M[i,j] - alpha M[i,i], 0) + max(M[j,i] - alpha M[i,i], 0)

The loss is a function of the weights alone. Its price, n^2 small products, does not grow with the batch; it is taken
once per optimizer step; and there is nothing of it left at inference. Its gradient reaches R and every W_g, and no
other parameter.

Source: "Coupling Experts and Routers in Mixture-of-Experts via an Auxiliary Loss", Lv et al., ICLR 2026, arXiv
2512.23447; comments below cite its three steps. The transformer around the loss is OLMoE (arXiv 2409.02060) in small,
as in the paper, so that it can be checked against another implementation. Left out on purpose: shared experts,
capacity limits (no token is ever dropped), a key-value cache, expert parallelism.

One letter, one size, everywhere in this file:
  B batch   T tokens in a row   N = B*T tokens   V vocabulary   L layers   H heads
  n experts   K experts per token   S = N*K rows to compute   d model width   D width inside an expert
(In bfloat16 on a CPU, S is up to 63 rows per expert more: see `dispatch`.)
"""

import math
import warnings
from dataclasses import dataclass, field, fields
from typing import NamedTuple

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # torch says so on import; we need no numpy

import torch
import torch.nn.functional as F
from torch import nn


def setting(default, help):
    """A dataclass field that carries its own help text: train.py turns each one into a command-line flag."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class MoEConfig:
    """The shape of a model. Raises ValueError, with the numbers in it, for shapes that cannot work."""

    vocab_size: int = setting(512, "V, token ids the model knows")
    context_length: int = setting(256, "T, most tokens in a row")
    n_layers: int = setting(4, "L, transformer blocks, each with attention and a Mixture of Experts")
    n_heads: int = setting(4, "H, attention heads")
    d_model: int = setting(128, "d, width of the model")
    d_expert: int = setting(128, "D, width inside an expert")
    n_experts: int = setting(8, "n, experts in each layer; 1 (with --top-k 1) makes a dense model")
    top_k: int = setting(2, "K, experts that each token uses")
    renormalize: bool = setting(False, "let the K routing weights of a token sum to 1")
    qk_norm: bool = setting(True, "normalise queries and keys")
    rope_theta: float = setting(10000.0, "base of the rotary position embedding")
    norm_eps: float = setting(1e-5, "added to the mean square in RMSNorm")
    tie_embeddings: bool = setting(False, "use one matrix for token embedding and output")

    def __post_init__(self):
        for size in fields(self)[:8]:  # vocab_size to top_k
            if getattr(self, size.name) < 1:
                raise ValueError(f"{size.name} must be at least 1, got {getattr(self, size.name)}")
        for name in ("d_model", "d_expert"):  # the grouped product wants rows of a multiple of 16 bytes: 8 in bf16
            if (size := getattr(self, name)) % 8:
                raise ValueError(f"{name} must be a multiple of 8, got {size}; try {max(8, round(size / 8) * 8)}")
        if self.d_model % (2 * self.n_heads):  # rotary embedding turns pairs of features, so heads are even
            raise ValueError(f"d_model {self.d_model} does not split into {self.n_heads} heads of even width;"
                             f" make it a multiple of {math.lcm(8, 2 * self.n_heads)}")
        if self.top_k > self.n_experts:
            raise ValueError(f"top_k {self.top_k} is more than n_experts {self.n_experts}; lower it")
        if self.renormalize and self.top_k == 1 and self.n_experts > 1:
            raise ValueError("renormalize with top_k 1 makes every routing weight 1, so that the router learns nothing"
                             " from the data; leave renormalize off, or use top_k 2 or more")
        for name in ("rope_theta", "norm_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and above 0, got {getattr(self, name)}")


# ---- The ERC loss. To use it elsewhere, paste what stands between this line ... --------------------------------------

# From the erc-moe project: MIT licence, copyright (c) 2026 the erc-moe authors; the text of its LICENSE goes with it.
# The loss of Lv et al., arXiv 2512.23447, in three steps: 1. shake the router's rows, which are proxies for the tokens
# of their experts; 2. M[i, j] = ||R~[i] W_g[j]||; 3. a hinge: M[i, i] is to be the largest of row i and column i.


def at_least_float32(x):
    """Half precision becomes float32; float32 and float64 stay what they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


@torch.no_grad()  # a constant of the loss: with a gradient here, rows would move just to be shaken less
def noise_bound(R):
    """How far each router row may be shaken (step 1).  R [n, d] -> epsilon [n], relative to the row's length.

    A row without neighbours (n = 1), or of length 0, gets epsilon 0: no noise.
    """
    R = at_least_float32(R)
    # (The default way of cdist goes through a product, which loses the small distances between near-equal rows.)
    distance = torch.cdist(R, R, compute_mode="donot_use_mm_for_euclid_dist")          # (n, n)
    nearest = distance.fill_diagonal_(float("inf")).amin(dim=1)                        # (n,)
    # epsilon_i = min_{j != i} ||R[i] - R[j]|| / (2 ||R[i]||): half the way to the nearest other row
    epsilon = nearest / (2 * torch.linalg.vector_norm(R, dim=1))                       # (n,)
    return epsilon.nan_to_num(nan=0.0, posinf=0.0)


def perturb(R, epsilon, generator=None):
    """Proxy tokens (step 1).  R [n, d], epsilon [n] -> R_tilde [n, d].

    One factor per feature, drawn from `generator` (on R's device) or else from torch's global stream. A single factor
    per row would change a proxy's length and never its direction. The gradient reaches R; epsilon and delta are
    constants.
    """
    R = at_least_float32(R)
    with torch.no_grad():
        # delta_i ~ Uniform(1 - epsilon_i, 1 + epsilon_i)^d
        u = 2 * torch.rand(R.shape, generator=generator, device=R.device, dtype=R.dtype) - 1   # (n, d), in [-1, 1)
        delta = 1 + epsilon[:, None].to(R.dtype) * u                                   # (n, d)
    return R * delta  # outside of no_grad: inside it, the router would learn nothing from this loss


def activation_norms(R, W_g, epsilon=None):
    """How strongly each expert responds to each proxy (step 2).  R [n, d], W_g [n, d, D] -> M [n, n], float32 or 64.

    M[i, j] = ||R[i] @ W_g[j]||: row i belongs to proxy i, column j to expert j. With `epsilon` [n], the root of the
    mean square of that norm under the noise of step 1, without drawing any (ours, not the paper's).
    """
    n = R.size(0)
    with torch.autocast(R.device.type, enabled=False):  # bf16 keeps 8 bits: too few to compare norms that are close
        R, W_g = at_least_float32(R), at_least_float32(W_g)
        # `expand` hands every expert the same proxies without copying them; `einsum` would copy all of W_g.
        response = torch.bmm(R.expand(n, *R.shape), W_g)                               # (n, n, D): [expert, proxy]
        M = torch.linalg.vector_norm(response, dim=-1).T                               # (n, n): [proxy, expert]
        if epsilon is None:
            return M
        # E_delta ||(R[i]*delta) W||^2 = ||R[i] W||^2 + epsilon_i^2 / 3 * sum_k R[i,k]^2 ||W[k,:]||^2, for 1/3 is the
        # variance of Uniform(-1, 1), and features are drawn independently, so that their cross terms vanish
        spread = (R * epsilon[:, None].to(R.dtype)).square() / 3                       # (n, d)
        mean_square = M.square() + spread @ W_g.square().sum(dim=-1).T                 # (n, n)
        # The slope of the root is infinite at 0, and inf * 0 is NaN: where there is nothing, take no root.
        return torch.where(mean_square > 0, mean_square, 1.0).sqrt() * (mean_square > 0)


def coupling_hinge(M, alpha=1.0):
    """How much the constraints are broken by (step 3).  M [n, n] -> scalar >= 0; 0 when all hold, and when n = 1.

    alpha >= 0: smaller is stricter; 1 asks for the diagonal to be the largest of its row and column.
    """
    if not 0 <= alpha < float("inf"):
        raise ValueError(f"alpha must be finite and at least 0, got {alpha}")
    n = M.size(0)
    own = alpha * M.diagonal()                                                         # (n,)
    # L = 1/n^2 sum_i sum_{j != i} max(M[i,j] - alpha M[i,i], 0) + max(M[j,i] - alpha M[i,i], 0)
    row = torch.relu(M - own[:, None])                                                 # (n, n)
    column = torch.relu(M - own[None, :])                                              # (n, n), with i and j swapped
    itself = torch.eye(n, dtype=torch.bool, device=M.device)  # below alpha 1, the diagonal would count against itself
    return (row + column).masked_fill(itself, 0).sum() / n**2


def erc_loss(R, W_g, alpha=1.0, noise="sample", generator=None):
    """The ERC loss of one MoE layer.  R [n, d], W_g [n, d, D] with expert j = W_g[j] -> scalar >= 0.

    noise: "sample" as in the paper, "none", or "expected" (activation_norms with epsilon). Works in float32 at least.
    Call it once per optimizer step, on the weights, outside of any loss scaling. Raises ValueError for other shapes,
    noise names, or alpha.
    """
    if not (isinstance(R, torch.Tensor) and isinstance(W_g, torch.Tensor)):
        raise ValueError("erc_loss wants two tensors: of a Linear its .weight, of a list of experts torch.stack(...)")
    if R.ndim != 2 or W_g.ndim != 3 or W_g.shape[:2] != R.shape:
        raise ValueError(f"erc_loss wants R [n, d] and W_g [n, d, D], got {list(R.shape)} and {list(W_g.shape)};"
                         " stored as [n, D, d], W_g wants .transpose(1, 2), and a router [d, n] wants .T; of gate and"
                         " up projections in one tensor, take the gate half alone")
    if noise not in ("sample", "none", "expected"):
        raise ValueError(f'noise must be "sample", "none" or "expected", got {noise!r}')
    if noise == "sample":
        M = activation_norms(perturb(R, noise_bound(R), generator), W_g)               # (n, n)
    else:
        M = activation_norms(R, W_g, noise_bound(R) if noise == "expected" else None)  # (n, n)
    return coupling_hinge(M, alpha)


@torch.no_grad()
def coupling_report(M, alpha=1.0):
    """What to watch.  M [n, n] -> (violated, coupling), two scalar tensors.

    violated: share of the 2n(n-1) constraints of step 3 that M breaks (NaN breaks them). coupling: mean M[i,i] / mean
    M[i,j], j != i; free of a common scale of the weights, about 1 at random ones, 1 where n = 1. If rows differ much in
    length, the longest decide it.
    """
    n = M.size(0)
    own, off = M.diagonal(), ~torch.eye(n, dtype=torch.bool, device=M.device)          # (n,), (n, n)
    broken = (off & ~(M <= alpha * own[:, None])).sum() + (off & ~(M <= alpha * own[None, :])).sum()
    others = (M * off).sum() / (n * (n - 1)) if n > 1 else own.mean()
    return broken / max(1, 2 * n * (n - 1)), own.mean() / others.clamp(min=torch.finfo(M.dtype).tiny)


# ---- ... and this line. It needs `import torch` and nothing else. ----------------------------------------------------


def balance_loss(probs, load):
    """n * sum_i f_i P_i (Switch Transformer, arXiv 2101.03961).  probs [N, n], load [n] -> scalar; 1.0 when balanced.

    f_i is expert i's share of the N*K rows, P_i its mean probability. Because the shares sum to 1, K does not matter.
    """
    return load.numel() * (load / load.sum() * probs.mean(dim=0)).sum()


def z_loss(logits):
    """Keeps router logits small (ST-MoE, arXiv 2202.08906).  logits [N, n] -> scalar, the mean squared logsumexp."""
    return logits.logsumexp(dim=-1).square().mean()


def parameter(*shape, std):
    """A parameter drawn from N(0, std^2)."""
    return nn.Parameter(torch.randn(shape) * std)


class TakeRows(torch.autograd.Function):
    """x [rows, d], take [out, m] -> y [out, d]: y[r] is the sum of the m rows of x that take[r] names.

    takers [rows, k]: takers[i] names the rows of y that took x[i]; the gradient of x[i] is the sum of theirs. So the
    backward pass is the same gather, with the two swapped. Autograd would scatter with atomic additions instead, in any
    order, so that two equal runs differ from K = 3 on. (Filler rows, see `dispatch`, take x[0] without being named, and
    get token 0's gradient without being taken; both are harmless, because their scale is 0.)
    """

    @staticmethod
    def forward(ctx, x, take, takers):
        ctx.save_for_backward(take, takers)
        y = x.index_select(0, take.flatten())
        return y.view(*take.shape, -1).sum(dim=1) if take.size(1) > 1 else y

    @staticmethod
    def backward(ctx, grad):
        take, takers = ctx.saved_tensors
        return TakeRows.apply(grad, takers, take), None, None


def dispatch(experts, n, block=1):
    """Sorts the work by expert.  experts [N, K] -> pair [S], row [N*K], ends [n], load [n].

    Number the N*K pairs (token, choice) token by token: pair p belongs to token p // K. Sorted by expert, the work
    of each expert is one block of rows. row[p] is the row of pair p, pair[r] the pair in row r; ends[j] is where the
    rows of expert j end, and load[j] how many they are. No shape depends on the routing, so nothing recompiles, and in
    bf16 on a Hopper GPU nothing waits (elsewhere grouped_mm loops over experts); a stable sort makes equal runs equal
    to the bit. With block > 1, each expert's rows end in fillers, which hold pair 0, up to a multiple of block: `ends`
    counts them, load does not, and S depends on the routing.

    Three tokens that chose experts (2, 0), (0, 1), (2, 0): pair 1, 2, 5, 3, 0, 4; row 4, 0, 1, 3, 5, 2; ends 3, 4, 6.
    """
    experts = experts.flatten()                                                        # (N*K,)
    p = torch.arange(len(experts), device=experts.device)                              # (N*K,) 0, 1, 2, ...
    by_expert, pair = experts.sort(stable=True)                                        # (N*K,), (N*K,)
    row = torch.empty_like(pair).scatter_(0, pair, p)                                  # (N*K,) the inverse of pair
    ends = torch.searchsorted(by_expert, torch.arange(n, device=pair.device), right=True, out_int32=True)      # (n,)
    load = ends.diff(prepend=ends.new_zeros(1))                                        # (n,)
    if block > 1:
        space = -(-load // block) * block                                              # (n,) load, rounded up
        starts = space.cumsum(dim=0) - space                                           # (n,)
        row = row + (starts - (ends - load))[experts]                                  # (N*K,) new start for the old
        ends = space.cumsum(dim=0, dtype=torch.int32)                                  # (n,)
        pair = pair.new_zeros(int(ends[-1])).scatter_(0, row, p)                       # (S,) and fillers
    return pair, row, ends, load


class MoEStats(NamedTuple):
    """What a MoE layer reports beside its output, raw: weights of losses are the trainer's business."""

    balance: torch.Tensor  # scalar, 1.0 when perfectly balanced
    z: torch.Tensor        # scalar
    load: torch.Tensor     # (n,) how many of the N*K pairs each expert got


class MoE(nn.Module):
    """A layer of n SwiGLU experts, of which each token uses the K that the router R scores highest; none is dropped.

    forward: x [B, T, d] -> (output [B, T, d], MoEStats). Routing works in float32, the experts in the autocast type
    if there is one, else in x's, which the grouped product wants to be float32, bfloat16 or float16.
    """

    def __init__(self, config):
        super().__init__()
        n, d, D = config.n_experts, config.d_model, config.d_expert
        self.top_k, self.renormalize = config.top_k, config.renormalize
        self.R = parameter(n, d, std=d**-0.5)  # rows of length about 1: logits of an x of rms 1 start with std 1
        self.W_g = parameter(n, d, D, std=d**-0.5)
        self.W_p = parameter(n, d, D, std=d**-0.5)
        # 2L layers add to the residual stream: this keeps its variance from growing with L (GPT-2)
        self.W_o = parameter(n, D, d, std=(2 * config.n_layers * D) ** -0.5)

    def route(self, x):
        """x [N, d] -> logits [N, n], probs [N, n], weights [N, K], experts [N, K]; always with the clean R."""
        with torch.autocast(x.device.type, enabled=False):  # in bf16, near-equal experts tie or swap places
            logits = at_least_float32(x) @ at_least_float32(self.R).T                  # (N, n)
            probs = logits.softmax(dim=-1)                                             # (N, n)
            weights, experts = probs.topk(self.top_k, dim=-1)                          # (N, K), (N, K)
            if self.renormalize:
                weights = weights / weights.sum(dim=-1, keepdim=True)
        return logits, probs, weights, experts

    def forward(self, x):
        B, T, d = x.shape
        x = x.reshape(-1, d)                                                           # (N, d)
        logits, probs, weights, experts = self.route(x)
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        # On a CPU, bf16 compiles a kernel for each number of rows that it has not met before; so let it meet few.
        fill = x.device.type == "cpu" and dtype == torch.bfloat16 and not torch.compiler.is_compiling()
        pair, row, ends, load = dispatch(experts, probs.size(-1), block=64 if fill else 1)

        # Experts: W_o (silu(x W_g) * (x W_p)), each on its own block of rows, which ends where `ends` says.
        # The grouped product knows no autocast, so we cast. The routing weight could as well scale the output: W_o is
        # linear. Scaling here, the backward pass keeps the scaled h instead of the output: less where D < d.
        W_g, W_p, W_o = self.W_g.to(dtype), self.W_p.to(dtype), self.W_o.to(dtype)
        token_of, rows_of = pair[:, None] // self.top_k, row.view(-1, self.top_k)      # (S, 1), (N, K)
        rows = TakeRows.apply(x.to(dtype), token_of, rows_of)                          # (N, d) -> (S, d)
        scale = weights.new_zeros(len(pair)).scatter(0, row, weights.flatten()).to(dtype)      # (S,), 0 in filler rows
        h = F.silu(F.grouped_mm(rows, W_g, offs=ends)) * F.grouped_mm(rows, W_p, offs=ends)    # (S, D)
        y = F.grouped_mm(h * scale[:, None], W_o, offs=ends)                           # (S, d)

        # Combine: each token takes its K rows back, and adds them up.
        y = TakeRows.apply(y, rows_of, token_of)                                       # (S, d) -> (N, d)
        return y.view(B, T, d), MoEStats(balance_loss(probs, load), z_loss(logits), load)


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight over the last dimension, in the weight's type: float32 under autocast, whatever x is."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


def linear(fan_in, fan_out, std):
    """A linear layer without bias whose weights are drawn from N(0, std^2)."""
    layer = nn.Linear(fan_in, fan_out, bias=False)
    nn.init.normal_(layer.weight, std=std)
    return layer


class Attention(nn.Module):
    """Causal self-attention with rotary positions; queries and keys normalised over the whole width, as in OLMoE."""

    def __init__(self, config):
        super().__init__()
        d, self.n_heads = config.d_model, config.n_heads
        self.q, self.k, self.v = (linear(d, d, std=d**-0.5) for _ in range(3))
        self.o = linear(d, d, std=(2 * config.n_layers * d) ** -0.5)
        self.q_norm, self.k_norm = (RMSNorm(d, config.norm_eps) if config.qk_norm else nn.Identity() for _ in range(2))

    def forward(self, x, cos, sin):
        B, T, d = x.shape
        q, k, v = self.q_norm(self.q(x)), self.k_norm(self.k(x)), self.v(x)            # (B, T, d) each
        q, k, v = (t.view(B, T, self.n_heads, -1).transpose(1, 2) for t in (q, k, v))  # (B, H, T, d/H) each
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)        # (B, H, T, d/H) each
        if x.device.type == "cpu" and v.dtype == torch.bfloat16:  # where the plain way is twice as fast as the fused
            later = torch.full((T, T), -math.inf, dtype=v.dtype).triu(diagonal=1)      # (T, T)
            y = ((q * q.size(-1) ** -0.5) @ k.mT + later).softmax(dim=-1).to(v.dtype) @ v        # (B, H, T, d/H)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)                # (B, H, T, d/H)
        return self.o(y.transpose(1, 2).reshape(B, T, d))                              # (B, T, d)


def rotary_table(config):
    """cos and sin [T, d/H] of position * frequency (RoPE, arXiv 2104.09864); the second half repeats the first."""
    width = config.d_model // config.n_heads
    frequency = config.rope_theta ** (-torch.arange(0, width, 2).float() / width)      # (d/H/2,)
    angle = torch.arange(config.context_length).float()[:, None] * frequency           # (T, d/H/2)
    return angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)                          # (T, d/H) each


def rotate(x, cos, sin):
    """Turns feature k together with feature k + d/H/2 by the angle of its position.  x [B, H, T, d/H]."""
    left, right = x.chunk(2, dim=-1)                                                   # (B, H, T, d/H/2) each
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class Block(nn.Module):
    """x + attention(norm(x)), then x + experts(norm(x)).  x [B, T, d] -> (x [B, T, d], MoEStats)."""

    def __init__(self, config):
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config)
        self.moe_norm = RMSNorm(config.d_model, config.norm_eps)
        self.moe = MoE(config)

    def forward(self, x, cos, sin):
        x = x + self.attention(self.attention_norm(x), cos, sin)
        y, stats = self.moe(self.moe_norm(x))
        return x + y, stats


class Output(NamedTuple):
    """What the model returns. The trainer adds up losses; the model only reports them, and keeps none."""

    logits: torch.Tensor     # (B, T, V)
    ce: torch.Tensor | None  # scalar, pure cross-entropy in nats per token; None without targets
    balance: torch.Tensor    # scalar, mean over layers
    z: torch.Tensor          # scalar, mean over layers
    load: torch.Tensor       # (L, n)


class MoETransformer(nn.Module):
    """A decoder-only language model with a Mixture of Experts in every layer.

    forward: tokens [B, T] and, if wanted, targets [B, T] (where -100: not counted) -> Output.
    Raises ValueError for more than context_length tokens in a row.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = linear(config.d_model, config.vocab_size, std=0.02)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        cos, sin = rotary_table(config)
        self.register_buffer("cos", cos, persistent=False)  # computed, not learned: no place in a checkpoint
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, tokens, targets=None):
        T = tokens.size(1)
        if T > self.config.context_length:
            raise ValueError(f"{T} tokens in a row are more than context_length {self.config.context_length}")
        x = self.embedding(tokens)                                                     # (B, T, d)
        stats = []
        for block in self.blocks:
            x, layer_stats = block(x, self.cos[:T], self.sin[:T])
            stats.append(layer_stats)
        logits = self.head(self.norm(x))                                               # (B, T, V)
        ce = None
        if targets is not None:
            ce = F.cross_entropy(at_least_float32(logits).flatten(0, 1), targets.flatten(), ignore_index=-100)
        balance, z, load = (torch.stack(values) for values in zip(*stats))             # (L,), (L,), (L, n)
        return Output(logits, ce, balance.mean(), z.mean(), load)

    def moe_layers(self):
        """The MoE layers, first to last."""
        return [block.moe for block in self.blocks]

    def erc_loss(self, alpha=1.0, noise="sample", generator=None):
        """The ERC loss, mean over layers (the paper does not say mean or sum); a function of the weights alone."""
        return torch.stack([erc_loss(moe.R, moe.W_g, alpha, noise, generator) for moe in self.moe_layers()]).mean()

    def num_params(self):
        """(total, active): a token leaves n - K experts of each layer unused."""
        total = sum(p.numel() for p in self.parameters())
        expert = 3 * self.config.d_model * self.config.d_expert
        return total, total - self.config.n_layers * (self.config.n_experts - self.config.top_k) * expert

    @torch.no_grad()
    def generate(self, tokens, max_new_tokens, temperature=1.0, sample_top_k=None, generator=None, stop=None,
                 vocab_size=None):
        """Continues tokens [B, T >= 1] by up to max_new_tokens -> [B, T + new].

        temperature 0 (below 1e-5) takes the likeliest token, sample_top_k draws from that many. Ends early once every
        row has drawn `stop`. Ids from vocab_size on are never drawn (rows that only pad the vocabulary).
        """
        done = torch.zeros(tokens.size(0), dtype=torch.bool, device=tokens.device)     # (B,)
        for _ in range(max_new_tokens):
            logits = self(tokens[:, -self.config.context_length:]).logits[:, -1, :vocab_size].float()  # (B, V)
            if sample_top_k is not None:
                least = logits.topk(min(sample_top_k, logits.size(-1)), dim=-1).values[:, -1:]         # (B, 1)
                logits = logits.masked_fill(logits < least, -math.inf)
            if temperature < 1e-5:
                drawn = logits.argmax(dim=-1, keepdim=True)                            # (B, 1)
            else:
                drawn = torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator)  # (B, 1)
            tokens = torch.cat((tokens, drawn), dim=1)                                 # (B, T + 1)
            if stop is not None:
                done |= drawn[:, 0] == stop
                if done.all():
                    break
        return tokens


def heat_map(M):
    """M [n, n] as text, each row scaled to its largest entry: '@' is at least 0.9 of it, ' ' below 0.1."""
    share = M / M.amax(dim=1, keepdim=True).clamp(min=torch.finfo(M.dtype).tiny)       # (n, n)
    return "\n".join("  " + "".join(2 * " .:-=+*#%@"[min(9, int(10 * s))] for s in row) for row in share.tolist())


if __name__ == "__main__":
    # The loss at work on random weights, without any data: before, experts know nothing of their proxies; after 60
    # steps of Adam, the diagonal of M is the largest entry of its row and column. (M is shown without noise.)
    torch.manual_seed(0)
    R, W_g = parameter(8, 64, std=64**-0.5), parameter(8, 64, 32, std=64**-0.5)
    optimizer = torch.optim.Adam([R, W_g], lr=3e-3)
    for step in range(61):
        loss = erc_loss(R, W_g)
        if step in (0, 60):
            M = activation_norms(R, W_g)
            violated, coupling = coupling_report(M)
            print(f"step {step:2d}: loss {loss:.4f}, constraints violated {violated:.0%}, coupling {coupling:.2f}")
            print(heat_map(M.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
