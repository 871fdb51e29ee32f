"""What the ERC loss is compared with: compositions and subclasses of erc_moe.py. Nothing to run here.

  AoE              Autonomy-of-Experts (arXiv 2501.13074): no router, experts choose their tokens by their own response
  dense_config     one expert as large as the K that a token uses
  random_router    a MoE whose router never learns
  coupled          the ERC loss with M measured another way: other activations, no noise, the noise in closed form
  orthogonality    a loss that keeps router rows apart and never looks at an expert

The losses go to train.train as extra_loss, with erc_weight 0, and AoETransformer(config) or random_router(config)
as model.
"""

import itertools
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # erc_moe.py lies one folder up

import torch
import torch.nn.functional as F

from erc_moe import MoE, MoETransformer, activation_norms, at_least_float32, coupling_hinge, noise_bound, parameter
from erc_moe import perturb
from train import keyed_generator

# ---- Autonomy-of-Experts, dense, and a random router ----


class AoE(MoE):
    """A layer of n SwiGLU experts. Each token uses the K experts that respond to it most. There is no router.

    W_g[i] = W_down[i] W_up[i], of rank r. The norms ||x W_down[i]|| are the scores. r is the largest multiple of 8 with
    which the layer has no more parameters than a MoE layer. The layer works as MoE does otherwise, with W_g formed
    whole: the same function as with cached activations, but not the way to measure its cost. R is NaN, so that the
    trainer logs NaN for erc and coupling. Raises ValueError where r would be 0.
    """

    def __init__(self, config):
        super().__init__(config)
        n, d, D = config.n_experts, config.d_model, config.d_expert
        self.r = r = d * (D + 1) // (d + D) // 8 * 8  # n * r * (d + D) <= n * d * D + n * d
        if r == 0:
            raise ValueError(f"d_model {d} and d_expert {D} leave rank 0 for W_down and W_up; make one of them larger")
        del self.R, self.W_g
        self.W_down = parameter(n, d, r, std=config.init_std)
        self.W_up = parameter(n, r, D, std=r**-0.5)  # so that W_down W_up starts with std init_std, as W_g does
        self.register_buffer("R", torch.full((n, d), torch.nan), persistent=False)

    def __getattr__(self, name):
        if name == "W_g":  # [n, d, D]
            with torch.autocast(self.W_down.device.type, enabled=False):
                return self.W_down @ self.W_up
        return super().__getattr__(name)

    def route(self, x):
        """x [N, d] -> logits [N, n], probs [N, n], weights [N, K], experts [N, K]; in float32 at least."""
        with torch.autocast(x.device.type, enabled=False):
            x, W_down = at_least_float32(x), at_least_float32(self.W_down)
            response = (x @ W_down.transpose(0, 1).flatten(1)).unflatten(1, (-1, self.r))      # (N, n, r)
            logits = torch.linalg.vector_norm(response, dim=-1)                        # (N, n)
            probs = logits.softmax(dim=-1)                                             # (N, n)
            weights, experts = probs.topk(self.top_k, dim=-1)                          # (N, K), (N, K)
        return logits, probs, weights, experts


class AoETransformer(MoETransformer):
    """MoETransformer with AoE layers. All other weights are those of MoETransformer(config) under the same seed."""

    def __init__(self, config):
        super().__init__(config)
        for block in self.blocks:
            block.moe = AoE(config)


def dense_config(config):
    """MoEConfig of a dense model with as many active parameters, but for the router: one expert, K times as wide."""
    return replace(config, n_experts=1, top_k=1, d_expert=config.top_k * config.d_expert)


def random_router(config):
    """MoETransformer whose R stays at its random start in every layer, without weight decay either."""
    model = MoETransformer(config)
    for moe in model.moe_layers():
        moe.R.requires_grad_(False)
    return model


# ---- Other ways to measure M ----


def expected_norms(R, W_g):
    """The root of the mean square of M under the noise, in closed form; ours, not the paper's.  -> M [n, n].

    Without a draw: the variance of Uniform(-1, 1) is 1/3, and the factors of two features are independent.
    """
    M, epsilon = activation_norms(R, W_g), noise_bound(R)                              # (n, n), (n,)
    R, W_g = at_least_float32(R), at_least_float32(W_g)
    # E_delta ||(R[i] * delta) W||^2 = ||R[i] W||^2 + epsilon_i^2 / 3 * sum_k R[i,k]^2 ||W[k,:]||^2
    spread = (R * epsilon[:, None]).square() / 3                                       # (n, d)
    mean_square = M.square() + spread @ W_g.square().sum(dim=-1).T                     # (n, n)
    return (mean_square + torch.finfo(M.dtype).tiny).sqrt()  # at 0, the slope of the root is infinite


def response_norms(where, R, moe):
    """M [n, n] from another activation of expert j that is shown R[i], as in the paper's Figure 6.  R [n, d].

    where: "up" ||R W_p||, "silu" ||SiLU(R W_g)||, "swiglu" ||SiLU(R W_g) * (R W_p)||, "output" that times W_o.
    """
    if where == "up":
        return activation_norms(R, moe.W_p)                                            # (n, n)
    with torch.autocast(R.device.type, enabled=False):
        R, W_g, W_p, W_o = map(at_least_float32, (R, moe.W_g, moe.W_p, moe.W_o))
        proxies = R.expand(len(R), *R.shape)                                           # (n, n, d): [expert, proxy]
        y = F.silu(torch.bmm(proxies, W_g))                                            # (n, n, D)
        if where in ("swiglu", "output"):
            y = y * torch.bmm(proxies, W_p)                                            # (n, n, D)
        if where == "output":
            y = torch.bmm(y, W_o)                                                      # (n, n, d)
        return torch.linalg.vector_norm(y, dim=-1).T                                   # (n, n)


def coupled(how, alpha=1.0, seed=0):
    """The ERC loss with M measured another way: a function of the model -> scalar >= 0, mean over layers.

    how: "clean" without noise, "expected" for the closed form, or an activation of response_norms. Call number s, from
    1, draws the noise that step s of the trainer draws for the ERC loss. So runs differ in M and in nothing else.
    """
    steps = itertools.count(1)

    def loss(model):
        layers = model.moe_layers()
        noise = keyed_generator(layers[0].R.device, seed, next(steps), "erc")
        losses = []
        for moe in layers:
            if how == "clean":
                M = activation_norms(moe.R, moe.W_g)                                   # (n, n)
            elif how == "expected":
                M = expected_norms(moe.R, moe.W_g)                                     # (n, n)
            else:
                M = response_norms(how, perturb(moe.R, noise_bound(moe.R), noise), moe)        # (n, n)
            losses.append(coupling_hinge(M, alpha))
        return torch.stack(losses).mean()

    return loss


def orthogonality(model):
    """||R^ R^^T - I||^2 / n^2, with R^ the rows of R at length 1, mean over layers -> scalar >= 0.

    The sum of squared cosines between rows, over n^2 as in the ERC loss.
    """
    losses = []
    for moe in model.moe_layers():
        unit = F.normalize(at_least_float32(moe.R), dim=1)                             # (n, d)
        losses.append((unit @ unit.T - torch.eye(len(unit), device=unit.device)).square().mean())
    return torch.stack(losses).mean()
