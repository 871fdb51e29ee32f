"""The expert-router coupling (ERC) loss, and a small Mixture-of-Experts transformer to train with it.

In a Mixture of Experts, a *router* sends every token to K of n *experts*. The router is a matrix R with one row per
expert. Each expert is a small feed-forward network. Nothing ties the two together: R never sees the experts' weights,
so a token may well be sent to an expert that is not good at it. The ERC loss ties them, in three steps.

  1. Perturb.  Row R[i] is the centre of the cluster of tokens that are sent to expert i, and so a *proxy token* for
               them. Noise lets the proxy stand for the cluster and not only for its centre. The noise moves it by at
               most half the distance to the nearest other row:
               R~[i] = R[i] * delta_i,  delta_i ~ Uniform(1 - epsilon_i, 1 + epsilon_i)^d
  2. Probe.    Show every proxy to every expert. Measure how strongly the expert's gate matrix W_g responds:
               M[i, j] = || R~[i] W_g[j] ||
  3. Hinge.    Row i of M: no other expert may respond to proxy i more than alpha times as strongly as expert i does.
               Column i: expert i may respond to no other proxy more than alpha times as strongly as to its own. A
               smaller alpha is stricter. What exceeds this is the loss:
               loss = 1/n^2 sum_i sum_{j != i} max(M[i,j] - alpha M[i,i], 0) + max(M[j,i] - alpha M[i,i], 0)

The loss is a function of the weights alone. It costs n^2 small products per layer, whatever the batch, once per
optimizer step, and nothing at inference. Its gradient reaches R and every W_g, and no other parameter.

Source: "Coupling Experts and Routers in Mixture-of-Experts via an Auxiliary Loss", Lv et al., ICLR 2026, arXiv
2512.23447. The transformer around the loss is a small OLMoE (arXiv 2409.02060), as in the paper. Left out on purpose:
shared experts, capacity limits, a key-value cache, expert parallelism. Needs torch 2.11 or newer.

One letter, one size, everywhere in this file:
  B batch   T tokens in a sequence   N = B*T tokens   V vocabulary   L layers   H heads
  n experts   K experts per token   d model width   D width inside an expert
"""

import warnings
from dataclasses import dataclass, field, fields
from typing import NamedTuple

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # torch prints it where numpy is missing

import torch
import torch.nn.functional as F
from torch import nn

# ---- The ERC loss. To use it elsewhere, paste what stands between this line ... --------------------------------------
# From the erc-moe project, MIT licence, copyright (c) 2026 the erc-moe authors. Method: Lv et al., arXiv 2512.23447.


def at_least_float32(x):
    """Half precision becomes float32. float32 and float64 stay what they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def noise_bound(R):
    """How far noise may move each router row, relative to its length (paper, section 3.2).  R [n, d] -> epsilon [n]."""
    R = at_least_float32(R).detach()  # a constant: else rows would also move to shrink their own noise
    # Without a matrix product: it would lose the small distance between two long, nearly equal rows.
    distance = torch.cdist(R, R, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(float("inf"))     # (n, n)
    # epsilon_i = min_{j != i} ||R[i] - R[j]|| / (2 ||R[i]||)                                      (equation 4)
    epsilon = distance.amin(dim=1) / (2 * torch.linalg.vector_norm(R, dim=1))          # (n,)
    return epsilon.nan_to_num(nan=0.0, posinf=0.0)  # 0 for a single row, and for a row of zeros


def perturb(R, epsilon, generator=None):
    """Step 1: R [n, d], epsilon [n] -> proxies [n, d].  The gradient reaches R through the product.

    One factor per feature: a single factor per row would not change its direction. `generator` must be on R's device.
    """
    R = at_least_float32(R)
    # R~[i] = R[i] * delta_i,  delta_i ~ Uniform(1 - epsilon_i, 1 + epsilon_i)^d
    u = 2 * torch.rand(R.shape, generator=generator, device=R.device, dtype=R.dtype) - 1       # (n, d), in [-1, 1)
    return R * (1 + epsilon[:, None].to(R.dtype) * u)


def activation_norms(R, W_g):
    """Step 2: R [n, d], W_g [n, d, D] -> M [n, n], with row i for proxy i and column j for expert j.

    W_g[j] is expert j's gate matrix, whose output enters the activation. Float32 at least, also under autocast.
    """
    with torch.autocast(R.device.type, enabled=False):  # bfloat16 keeps 8 bits: too few to compare norms that are close
        R, W_g = at_least_float32(R), at_least_float32(W_g)
        response = torch.bmm(R.expand(len(R), *R.shape), W_g)                          # (n, n, D): [expert, proxy]
    # M[i, j] = ||R~[i] W_g[j]||
    return torch.linalg.vector_norm(response, dim=-1).T                                # (n, n): [proxy, expert]


def coupling_hinge(M, alpha=1.0):
    """Step 3: M [n, n] -> scalar >= 0.

    It is 0 if no off-diagonal entry exceeds alpha times the diagonal entry of its row, nor of its column.
    """
    n = len(M)
    bound = alpha * M.diagonal()                                                       # (n,)
    # loss = 1/n^2 sum_i sum_{j != i} max(M[i,j] - alpha M[i,i], 0) + max(M[j,i] - alpha M[i,i], 0)   (equation 3)
    row = torch.relu(M - bound[:, None])                                               # (n, n)
    column = torch.relu(M - bound[None, :])                                            # (n, n): i and j swapped
    diagonal = torch.eye(n, dtype=torch.bool, device=M.device)
    return (row + column).masked_fill(diagonal, 0).sum() / n**2


def erc_loss(R, W_g, alpha=1.0, generator=None):
    """The ERC loss of one MoE layer.  R [n, d], W_g [n, d, D] -> scalar >= 0.

    R scores tokens by x R^T, as the weight of Linear(d, n) does. From a list of experts with a Linear gate_proj, W_g is
    torch.stack([expert.gate_proj.weight.T for expert in experts]). Backpropagate once per optimizer step, after the
    micro-batches, and after unscale_ if there is a GradScaler. Raises ValueError for other shapes.
    """
    if R.ndim != 2 or W_g.ndim != 3 or W_g.shape[:2] != R.shape:
        raise ValueError(f"erc_loss needs R [n, d] and W_g [n, d, D], got {list(R.shape)} and {list(W_g.shape)}; if W_g"
                         " is stored as [n, D, d], pass .transpose(1, 2), and .T of a router [d, n]; of a fused tensor,"
                         " pass the part whose output enters the activation")
    proxies = perturb(R, noise_bound(R), generator)                                    # (n, d)
    return coupling_hinge(activation_norms(proxies, W_g), alpha)


@torch.no_grad()
def coupling_report(M, alpha=1.0):
    """What to watch beside the loss.  M [n, n] -> (violated, coupling), two scalar tensors.

    violated: share of the 2n(n-1) constraints of step 3 that M violates. NaN counts as violated. coupling: mean
    diagonal / mean off-diagonal entry, about 1 at random weights. A common scale of the weights changes neither.
    """
    n, own = len(M), M.diagonal()
    off_diagonal = ~torch.eye(n, dtype=torch.bool, device=M.device)                    # (n, n)
    row_holds, column_holds = M <= alpha * own[:, None], M <= alpha * own[None, :]     # (n, n) each
    n_violated = (off_diagonal & ~row_holds).sum() + (off_diagonal & ~column_holds).sum()
    violated = n_violated.to(M.dtype) / max(1, 2 * n * (n - 1))
    others = M.masked_fill(~off_diagonal, 0).sum() / (n * (n - 1)) if n > 1 else own.mean()
    return violated, own.mean() / others.clamp(min=torch.finfo(M.dtype).tiny)


# ---- ... and this line. It needs `import torch` and nothing else. ----------------------------------------------------


# ---- Settings --------------------------------------------------------------------------------------------------------
def setting(default, help, least=0):
    """A dataclass field with a help text and, for a number, its least value. train.py makes each one a flag."""
    return field(default=default, metadata={"help": help, "least": least})


def check_numbers(settings):
    """ValueError, with name and value, for a number in a dataclass of settings that is too small or not finite."""
    for one in fields(settings):
        value, least = getattr(settings, one.name), one.metadata["least"]
        if one.type in (int, float) and not least <= value < 1e38:  # float32 ends there; false for nan, too
            raise ValueError(f"{one.name} must be at least {least} and below 1e38, got {value}")


@dataclass(frozen=True)
class MoEConfig:
    """The shape of a model. Raises ValueError, with the numbers in it, for shapes that cannot work."""

    vocab_size: int = setting(512, "V, token ids the model knows", least=1)
    context_length: int = setting(256, "T, the longest sequence, in tokens", least=1)
    n_layers: int = setting(3, "L, transformer blocks, each with attention and a Mixture of Experts", least=1)
    n_heads: int = setting(3, "H, attention heads", least=1)
    d_model: int = setting(96, "d, width of the model", least=8)
    d_expert: int = setting(64, "D, width inside an expert", least=8)
    n_experts: int = setting(16, "n, experts in each layer; 1 with --top-k 1 makes a dense model", least=1)
    top_k: int = setting(2, "K, experts that each token uses", least=1)
    renormalize: bool = setting(False, "let the K routing weights of a token sum to 1")
    qk_norm: bool = setting(True, "normalise queries and keys")
    rope_theta: float = setting(10000.0, "base of the rotary position embedding", least=1)
    norm_eps: float = setting(1e-5, "added to the mean square in RMSNorm")
    tie_embeddings: bool = setting(False, "use one matrix for token embedding and output")
    init_std: float = setting(0.02, "standard deviation of initial weights; embedding and output start at 0.02")

    def __post_init__(self):
        check_numbers(self)
        if self.top_k > self.n_experts:
            raise ValueError(f"top_k must be at most n_experts {self.n_experts}, got {self.top_k}")
        if self.d_model % 8 or self.d_expert % 8:  # grouped_mm needs rows of a multiple of 16 bytes: 8 bfloat16
            raise ValueError(f"d_model {self.d_model} and d_expert {self.d_expert} must be multiples of 8")
        if self.d_model % (2 * self.n_heads):  # rotary embedding turns pairs of features
            raise ValueError(f"d_model {self.d_model} does not split into {self.n_heads} heads of even width")
        if self.renormalize and self.top_k == 1 < self.n_experts:
            raise ValueError("renormalize with top_k 1 makes every routing weight 1, so that the router learns nothing"
                             " from the data; leave renormalize off, or use top_k 2")


# ---- Balance losses --------------------------------------------------------------------------------------------------
def balance_loss(probs, load):
    """n * sum_i f_i P_i (Switch Transformer, arXiv 2101.03961).  probs [N, n], load [n] -> scalar; 1.0 when balanced.

    f_i is expert i's share of the N*K pairs of a token and one of its experts, P_i its share of all probability. Both
    sum to 1, so that neither K nor the scale of the scores matters.
    """
    f, P = load / load.sum(), probs.sum(dim=0) / probs.sum()                           # (n,), (n,)
    return len(f) * (f * P).sum()


def z_loss(logits):
    """Keeps router logits small (ST-MoE, arXiv 2202.08906).  logits [N, n] -> scalar, the mean squared logsumexp."""
    return logits.logsumexp(dim=-1).square().mean()


# ---- The Mixture-of-Experts layer ------------------------------------------------------------------------------------
class MoEStats(NamedTuple):
    """What a MoE layer reports beside its output. The trainer multiplies by the weights of the losses."""

    balance: torch.Tensor  # scalar, 1.0 when perfectly balanced
    z: torch.Tensor        # scalar
    load: torch.Tensor     # (n,) how many of the N*K pairs of token and expert each expert got


def parameter(*shape, std):
    """A parameter drawn from N(0, std^2)."""
    return nn.Parameter(torch.randn(shape) * std)


class MoE(nn.Module):
    """A layer of n SwiGLU experts. Each token uses the K experts that the router R scores highest; no token is dropped.

    forward: x [B, T, d] -> (output [B, T, d], MoEStats). The experts work in the autocast type, or else in x's.
    """

    def __init__(self, config):
        super().__init__()
        n, d, D, std = config.n_experts, config.d_model, config.d_expert, config.init_std
        self.top_k, self.renormalize = config.top_k, config.renormalize
        self.R = parameter(n, d, std=std)
        self.W_g = parameter(n, d, D, std=std)
        self.W_p = parameter(n, d, D, std=std)
        # 2L outputs are added to the residual stream. The factor keeps its variance from growing with L, as in GPT-2.
        self.W_o = parameter(n, D, d, std=std * (2 * config.n_layers) ** -0.5)

    def route(self, x):
        """x [N, d] -> logits [N, n], probs [N, n], weights [N, K], experts [N, K].  Tokens meet R without noise.

        To try another router, change this function. The ERC loss needs an R [n, d] that scores tokens by x R^T.
        balance_loss takes any scores above 0. z_loss takes logits of a softmax: with a sigmoid router, leave it out.
        """
        with torch.autocast(x.device.type, enabled=False):  # in bfloat16, experts with close scores would tie
            logits = at_least_float32(x) @ at_least_float32(self.R).T                  # (N, n)
            probs = logits.softmax(dim=-1)                                             # (N, n)
            weights, experts = probs.topk(self.top_k, dim=-1)                          # (N, K), (N, K)
            if self.renormalize:
                weights = weights / weights.sum(dim=-1, keepdim=True)
        return logits, probs, weights, experts

    def mix(self, x, weights, experts):
        """What the chosen experts make of x.  x [N, d], weights [N, K], experts [N, K] -> output [N, d], load [n].

        The output of token t is the sum over k of weights[t, k] times what expert experts[t, k] makes of x[t]. Written
        as loops, this layer is moe_by_loops in tests/test_model.py.
        """
        # Each token becomes K rows, one for each of its experts. Sorted by expert, the rows of an expert are adjacent.
        row_expert, order = experts.flatten().sort(stable=True)                        # (N*K,), (N*K,)
        row_token = order // self.top_k                                                # (N*K,) which token is in a row
        expert_ids = torch.arange(len(self.W_o), device=x.device)                      # (n,)
        row_ends = torch.searchsorted(row_expert, expert_ids, right=True, out_int32=True)      # (n,) last row + 1
        load = row_ends.diff(prepend=row_ends.new_zeros(1))                            # (n,)

        # SiLU(x W_g) * (x W_p), then W_o, each expert on its own rows. grouped_mm ignores autocast, so we cast.
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        W_gp = torch.cat((self.W_g.to(dtype), self.W_p.to(dtype)), dim=-1)             # (n, d, 2*D)
        rows = x.index_select(0, row_token).to(dtype)                                  # (N*K, d)
        g, p = F.grouped_mm(rows, W_gp, offs=row_ends).chunk(2, dim=-1)                # (N*K, D) each
        h = F.silu(g) * p
        h = h * weights.flatten().index_select(0, order)[:, None].to(dtype)  # W_o is linear: as good as weighting y
        y = F.grouped_mm(h, self.W_o.to(dtype), offs=row_ends)                         # (N*K, d)

        # A token's output is the sum of its K rows. Unlike index_add, scatter_add keeps no rows for the backward pass.
        y = torch.zeros_like(x).scatter_add(0, row_token[:, None].expand_as(y), y.to(x.dtype))         # (N, d)
        return y, load

    def forward(self, x):
        tokens = x.flatten(0, -2)                                                      # (N, d)
        logits, probs, weights, experts = self.route(tokens)
        y, load = self.mix(tokens, weights, experts)                                   # (N, d), (n,)
        return y.view(x.shape), MoEStats(balance_loss(probs, load), z_loss(logits), load)


# ---- Attention -------------------------------------------------------------------------------------------------------
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
    """Causal self-attention with rotary positions. Queries and keys are normalised over the whole width (OLMoE)."""

    def __init__(self, config):
        super().__init__()
        d, std, self.n_heads = config.d_model, config.init_std, config.n_heads
        self.q, self.k, self.v = (linear(d, d, std) for _ in range(3))
        self.o = linear(d, d, std * (2 * config.n_layers) ** -0.5)
        self.q_norm, self.k_norm = (RMSNorm(d, config.norm_eps) if config.qk_norm else nn.Identity() for _ in range(2))

    def forward(self, x, cos, sin):
        B, T, d = x.shape
        q, k, v = self.q_norm(self.q(x)), self.k_norm(self.k(x)), self.v(x)            # (B, T, d) each
        q, k, v = (t.view(B, T, self.n_heads, -1).transpose(1, 2) for t in (q, k, v))  # (B, H, T, d/H) each
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)        # (B, H, T, d/H) each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)                    # (B, H, T, d/H)
        return self.o(y.transpose(1, 2).reshape(B, T, d))                              # (B, T, d)


def rotary_table(config):
    """cos and sin [T, d/H] of position * frequency (RoPE, arXiv 2104.09864). The second half repeats the first."""
    width = config.d_model // config.n_heads
    frequency = config.rope_theta ** (-torch.arange(0, width, 2).float() / width)      # (d/H/2,)
    angle = torch.arange(config.context_length).float()[:, None] * frequency           # (T, d/H/2)
    return angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)                          # (T, d/H) each


def rotate(x, cos, sin):
    """Turns feature k together with feature k + d/H/2 by the angle of its position.  x [B, H, T, d/H]."""
    left, right = x.chunk(2, dim=-1)                                                   # (B, H, T, d/H/2) each
    return x * cos + torch.cat((-right, left), dim=-1) * sin


# ---- A block of attention and experts, and the whole transformer -----------------------------------------------------
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

    forward: tokens [B, T], and targets [B, T] if wanted, where -100 is not counted -> Output.
    Raises ValueError for sequences longer than context_length.
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
            raise ValueError(f"a sequence of {T} tokens is longer than context_length {self.config.context_length}")
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

    def erc_loss(self, alpha=1.0, generator=None):
        """The ERC loss, a function of the weights alone. Mean over layers: the paper does not say how to combine."""
        return torch.stack([erc_loss(moe.R, moe.W_g, alpha, generator) for moe in self.moe_layers()]).mean()

    def num_params(self):
        """(total, active): a token leaves n - K experts of each layer unused."""
        total, c = sum(p.numel() for p in self.parameters()), self.config
        return total, total - c.n_layers * (c.n_experts - c.top_k) * 3 * c.d_model * c.d_expert

    @torch.no_grad()
    def generate(self, tokens, max_new_tokens, temperature=1.0, generator=None, stop=None, vocab_size=None):
        """Continues tokens [B, T >= 1] by up to max_new_tokens -> [B, T + new].

        Temperature 0 takes the likeliest token. Ends early once every sequence has drawn `stop`. A sequence that has
        drawn it goes on while others have not. Ids from vocab_size on, which only pad the vocabulary, are never drawn.
        """
        done = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)        # (B,)
        for _ in range(max_new_tokens):
            logits = self(tokens[:, -self.config.context_length:]).logits                  # (B, T, V)
            logits = logits[:, -1, :vocab_size].float()                                    # (B, vocab_size or V)
            if temperature == 0:
                drawn = logits.argmax(dim=-1, keepdim=True)                            # (B, 1)
            else:
                drawn = torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator)  # (B, 1)
            tokens = torch.cat((tokens, drawn), dim=1)                                 # (B, T + 1)
            done |= drawn[:, 0] == (-1 if stop is None else stop)
            if done.all():
                break
        return tokens


# ---- The loss at work: python erc_moe.py -----------------------------------------------------------------------------
def heat_map(M):
    """M [n, n] as text. Each entry is compared with the smaller diagonal entry of its row and its column: '@' exceeds
    it, and so violates a constraint of alpha 1; '%' is as large, as on the diagonal; the less, the fainter.
    """
    own = M.diagonal()
    share = M / torch.minimum(own[:, None], own[None, :]).clamp(min=torch.finfo(M.dtype).tiny)         # (n, n)
    return "\n".join("  " + "".join(2 * ("@" if s > 1 else " .:-=+*#%"[int(8 * s)]) for s in row)
                     for row in share.tolist())


if __name__ == "__main__":
    # Random weights, without any data. At first, half of all constraints are violated. After 60 steps of Adam, each
    # diagonal entry of M is the largest of its row and column. The loss has noise, the M shown has none.
    torch.manual_seed(0)
    R, W_g = parameter(8, 64, std=64**-0.5), parameter(8, 64, 32, std=64**-0.5)
    optimizer, shown = torch.optim.Adam([R, W_g], lr=3e-3), []
    for step in range(61):
        loss = erc_loss(R, W_g)
        if step in (0, 60):
            M = activation_norms(R, W_g)
            violated, coupling = coupling_report(M)
            shown += [f"step {step:2d}: loss {loss:.4f}, constraints violated {violated:.0%}, coupling {coupling:.2f}",
                      heat_map(M.detach())]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print("\n".join([*shown, ""]), end="")  # in one piece: `| head` may have left before a second one
