"""What is not the method, to compare it with: compositions and subclasses of erc_moe.py. Nothing to run here.

  AoE, aoe_model   Autonomy-of-Experts (arXiv 2501.13074): no router, the experts choose their tokens themselves; the
                   costly relative of the ERC loss
  orthogonality    a loss that keeps router rows apart and never looks at an expert; its cheap relative
  probe_loss       the ERC loss with M taken from another activation than x W_g
  dense_config     one expert as large as the K that a token uses

The two losses go to train.train as extra_loss, with erc_weight 0; aoe_model(config) and MoETransformer(dense_config(
config)) as model.
"""

import itertools
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # erc_moe.py lies one folder up

import torch
import torch.nn.functional as F

import erc_moe
from erc_moe import MoE, MoEStats, MoETransformer, TakeRows, at_least_float32, parameter
from train import keyed_generator


class AoE(MoE):
    """A layer of n SwiGLU experts, of which each token uses the K that respond to it most; there is no router.

    W_g[i] = W_down[i] @ W_up[i], of rank r. Every token passes through every W_down[i], ||x W_down[i]|| are the logits,
    and the K chosen experts go on from there. r is the largest multiple of 8 with which the layer has no more
    parameters than a MoE layer with its router. Contract of forward and route: MoE's. Raises ValueError where r is 0.

    R is NaN and W_g the product: so the trainer's log has agreement, while its erc and coupling are NaN (but epsilon
    and violated 0, which mean nothing here). Norms are never negative, so that the z-loss pulls at W_down even where no
    logit stands out.
    """

    def __init__(self, config):
        super(MoE, self).__init__()  # passes over MoE's, which would make a router and full W_g
        n, d, D = config.n_experts, config.d_model, config.d_expert
        self.top_k, self.renormalize = config.top_k, config.renormalize
        self.r = r = d * (D + 1) // (d + D) // 8 * 8  # n * r * (d + D) <= n * d * D + n * d; rows of 16 bytes in bf16
        if r == 0:
            raise ValueError(f"d_model {d} and d_expert {D} leave rank 0 for W_down and W_up; make one of them larger")
        # Each by its fan-in. Then W_down @ W_up starts as W_g does in MoE, with std sqrt(r) * d^-0.5 * r^-0.5 = d^-0.5.
        # A token with features of size 1 has x W_down[i] of size 1, too, and norms around sqrt(r) with std 1/sqrt(2):
        # the mean is nothing to the softmax, and the spread is about that of the logits in MoE, 1.
        self.W_down = parameter(n, d, r, std=d**-0.5)
        self.W_up = parameter(n, r, D, std=r**-0.5)
        self.W_p = parameter(n, d, D, std=d**-0.5)
        self.W_o = parameter(n, D, d, std=(2 * config.n_layers * D) ** -0.5)
        self.register_buffer("R", torch.full((n, d), torch.nan), persistent=False)

    @property
    def W_g(self):
        """[n, d, D]: the gate matrices that W_down and W_up amount to; never formed in a forward pass."""
        with torch.autocast(self.W_down.device.type, enabled=False):
            return self.W_down @ self.W_up

    def down(self, x, dtype):
        """x [N, d] -> x W_down[i] for every expert, [N, n, r], in dtype: one product, on the columns of all experts."""
        with torch.autocast(x.device.type, enabled=False):
            return (x.to(dtype) @ self.W_down.to(dtype).transpose(0, 1).flatten(1)).unflatten(1, (-1, self.r))

    def choose(self, cached):
        """cached [N, n, r] -> what route returns; from the norms on in float32 at least."""
        with torch.autocast(cached.device.type, enabled=False):
            dtype = torch.promote_types(cached.dtype, torch.float32)
            logits = torch.linalg.vector_norm(cached, dim=-1, dtype=dtype)             # (N, n)
            probs = logits.softmax(dim=-1)                                             # (N, n)
            weights, experts = probs.topk(self.top_k, dim=-1)                          # (N, K), (N, K)
            if self.renormalize:
                weights = weights / weights.sum(dim=-1, keepdim=True)
        return logits, probs, weights, experts

    def route(self, x):
        """x [N, d] -> logits [N, n], probs [N, n], weights [N, K], experts [N, K]; all of it in float32 at least."""
        return self.choose(self.down(x, torch.promote_types(x.dtype, torch.float32)))

    def forward(self, x):
        B, T, d = x.shape
        x = x.reshape(-1, d)                                                           # (N, d)
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        cached = self.down(x, dtype)                                                   # (N, n, r)
        logits, probs, weights, experts = self.choose(cached)
        few = x.device.type == "cpu" and dtype == torch.bfloat16 and not torch.compiler.is_compiling()
        pair, row, ends, load = erc_moe.dispatch(experts, probs.size(-1), block=64 if few else 1)

        # As in MoE, but silu(x W_g) comes from the cache. A token chooses an expert once at most, so no cached row is
        # taken twice, and in the backward pass no two gradients meet in one.
        cached = cached.gather(1, experts[..., None].expand(-1, -1, self.r)).flatten(0, 1)     # (S, r), by token
        cached = TakeRows.apply(cached, pair[:, None], row[:, None])                   # (S, r), by expert
        token_of, rows_of = pair[:, None] // self.top_k, row.view(-1, self.top_k)      # (S, 1), (N, K)
        rows = TakeRows.apply(x.to(dtype), token_of, rows_of)                          # (N, d) -> (S, d)
        scale = weights.new_zeros(len(pair)).scatter(0, row, weights.flatten()).to(dtype)      # (S,), 0 in filler rows
        W_up, W_p, W_o = self.W_up.to(dtype), self.W_p.to(dtype), self.W_o.to(dtype)
        h = F.silu(F.grouped_mm(cached, W_up, offs=ends)) * F.grouped_mm(rows, W_p, offs=ends)  # (S, D)
        y = F.grouped_mm(h * scale[:, None], W_o, offs=ends)                           # (S, d)
        y = TakeRows.apply(y, rows_of, token_of)                                       # (S, d) -> (N, d)
        return y.view(B, T, d), MoEStats(erc_moe.balance_loss(probs, load), erc_moe.z_loss(logits), load)


class AoETransformer(MoETransformer):
    """MoETransformer with AoE layers. All other weights are those of MoETransformer(config) under the same seed."""

    def __init__(self, config):
        super().__init__(config)
        for block in self.blocks:
            block.moe = AoE(config)

    def num_params(self):
        """(total, active): a token uses all W_down, and leaves the rest of n - K experts of each layer unused."""
        total, config = sum(p.numel() for p in self.parameters()), self.config
        rest = config.d_expert * (self.blocks[0].moe.r + 2 * config.d_model)  # W_up, W_p and W_o of an expert
        return total, total - config.n_layers * (config.n_experts - config.top_k) * rest


def aoe_model(config):
    """A model for train.train: MoEConfig -> AoETransformer."""
    return AoETransformer(config)


def orthogonality(model):
    """||Rn Rn^T - I||^2 / n^2, with Rn the rows of R at length 1, mean over layers -> scalar >= 0.

    The sum of the squared cosines between the rows, over n^2 as in the ERC loss; 0 when all rows are at right angles.
    Source: router orthogonalisation as in the ERNIE 4.5 technical report.
    """
    losses = []
    for moe in model.moe_layers():
        with torch.autocast(moe.R.device.type, enabled=False):
            Rn = F.normalize(at_least_float32(moe.R), dim=1)                           # (n, d)
            losses.append((Rn @ Rn.T - torch.eye(len(Rn), device=Rn.device)).square().mean())
    return torch.stack(losses).mean()


def probe_norms(where, R, moe):
    """M [n, n], float32 or 64: M[i, j] is the norm of an activation of expert j that is shown R[i].  R [n, d].

    where: "up" ||R W_p||, "swiglu" ||silu(R W_g) * (R W_p)||, "output" ||(silu(R W_g) * (R W_p)) W_o||.
    """
    if where == "up":
        return erc_moe.activation_norms(R, moe.W_p)                                    # (n, n)
    with torch.autocast(R.device.type, enabled=False):
        R, W_g, W_p, W_o = map(at_least_float32, (R, moe.W_g, moe.W_p, moe.W_o))
        proxies = R.expand(len(R), *R.shape)                                           # (n, n, d): [expert, proxy]
        y = F.silu(torch.bmm(proxies, W_g)) * torch.bmm(proxies, W_p)                  # (n, n, D)
        if where == "output":
            y = torch.bmm(y, W_o)                                                      # (n, n, d)
        return torch.linalg.vector_norm(y, dim=-1).T                                   # (n, n)


def probe_loss(where, alpha=1.0, seed=0):
    """The ERC loss with M from probe_norms: a function of the model -> scalar >= 0, mean over layers.

    Call number s (from 1) draws the noise that step s of the trainer draws for the ERC loss with that seed: so runs
    differ in the probe and in nothing else. Raises ValueError for another `where`.
    """
    if where not in ("up", "swiglu", "output"):
        raise ValueError(f'where must be "up", "swiglu" or "output", got {where!r}')
    steps = itertools.count(1)

    def loss(model):
        layers = model.moe_layers()
        noise = keyed_generator(layers[0].R.device, seed, next(steps), "erc")
        proxies = [erc_moe.perturb(moe.R, erc_moe.noise_bound(moe.R), noise) for moe in layers]        # (n, d) each
        return torch.stack([erc_moe.coupling_hinge(probe_norms(where, R_tilde, moe), alpha)
                            for R_tilde, moe in zip(proxies, layers)]).mean()

    return loss


class CentredProbe:
    """The ERC loss with proxies where the tokens are (ours, not the paper's): a function of the model -> scalar >= 0.

    Tokens have a mean in common that no row of R shows: softmax does not see what all rows share, and the z-loss turns
    it away from the tokens, to make logits small.
    So the proxy of expert i is the mean token, moved to where R[i] differs from the mean row, by the tokens' distance:
      P[i] = mean(x) + rms ||x - mean(x)|| * (R[i] - mean(R)) / ||R[i] - mean(R)||
    Both means of x are constants, from the last batch that the layer was trained on. The noise is that of step 1, of
    the rows R[i] - mean(R) at their own lengths. The first call only begins to look at batches, and returns 0.
    """

    def __init__(self, alpha=1.0, seed=0):
        self.alpha, self.seed, self.steps, self.seen = alpha, seed, itertools.count(1), {}

    def look(self, moe, args):
        if torch.is_grad_enabled():  # not in evaluations
            x = at_least_float32(args[0].detach()).flatten(0, 1)                       # (N, d)
            self.seen[moe] = x.mean(dim=0), (x - x.mean(dim=0)).square().sum(dim=1).mean().sqrt()      # (d,), ()

    def __call__(self, model):
        layers = model.moe_layers()
        noise = keyed_generator(layers[0].R.device, self.seed, next(self.steps), "erc")
        if not self.seen:
            for moe in layers:
                moe.register_forward_pre_hook(self.look)
            return sum(moe.R.sum() for moe in layers) * 0
        losses = []
        for moe in layers:
            mean, distance = self.seen[moe]
            R = moe.R - moe.R.mean(dim=0)                                              # (n, d)
            unit = erc_moe.perturb(R, erc_moe.noise_bound(R), noise) / R.norm(dim=1, keepdim=True)     # (n, d)
            losses.append(erc_moe.coupling_hinge(erc_moe.activation_norms(mean + distance * unit, moe.W_g), self.alpha))
        return torch.stack(losses).mean()


def dense_config(config):
    """MoEConfig of a dense model with as many active parameters, but for the router: one expert, K times as wide."""
    return replace(config, n_experts=1, top_k=1, d_expert=config.top_k * config.d_expert)
