"""The loss in other people's programs: under torch.func, compiled, beside activation checkpointing.

Every gradient is compared with that of a plain backward pass, which test_erc.py compares with loops.
"""

import copy
import functools

import pytest
import torch
from test_erc import clean_loss, seeded, weights
from torch.utils.checkpoint import checkpoint

import erc_moe


def loss(R, W_g):
    """The loss with the same noise at every call."""
    return erc_moe.erc_loss(R, W_g, generator=seeded())


def gradients(R, W_g):
    return torch.autograd.grad(loss(R, W_g), (R, W_g))


def close(found, wanted, what, tolerance=1e-12):
    for name, one, other in zip(("R", "W_g"), found, wanted):
        off = (one - other).abs().max().item()
        assert off <= tolerance, f"{what}: the gradient of {name} is off by {off:.1e}"


def test_func_grad_and_jvp_are_the_gradient():
    """torch.func.grad equals backward; jvp along a direction is the gradient times the direction."""
    layer = weights(dtype=torch.float64, grad=True)
    wanted, direction = gradients(*layer), weights(seed=1, dtype=torch.float64)
    plain = tuple(tensor.detach() for tensor in layer)
    close(torch.func.grad(loss, argnums=(0, 1))(*plain), wanted, "func.grad")
    value, slope = torch.func.jvp(loss, plain, direction)
    expected = sum((gradient * way).sum() for gradient, way in zip(wanted, direction))
    assert value == loss(*plain) and abs(slope - expected) < 1e-12, f"jvp {slope}, gradient times direction {expected}"


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_over_layers_is_a_loop_over_layers():
    """Layers stacked to [L, n, d] and [L, n, d, D] get the losses and gradients of each alone."""
    layers = [weights(seed=seed, dtype=torch.float64, grad=True) for seed in range(3)]
    stacked = [torch.stack(tensors).detach() for tensors in zip(*layers)]
    losses = torch.vmap(loss, randomness="same")(*stacked)
    found = torch.vmap(torch.func.grad(loss, argnums=(0, 1)), randomness="same")(*stacked)
    for i, layer in enumerate(layers):
        assert abs(losses[i] - loss(*layer)) < 1e-12, f"layer {i}: {losses[i]}, alone {loss(*layer)}"
        close((found[0][i], found[1][i]), gradients(*layer), f"layer {i}")


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_the_hessian_is_the_slope_of_the_gradient():
    """The Hessian in R is symmetric; times a direction it is the difference of two gradients, the noise held fixed."""
    R, W_g = weights(n=3, d=4, D=2, dtype=torch.float64)
    hessian = torch.func.jacfwd(torch.func.jacrev(loss), randomness="same")(R, W_g).reshape(12, 12)
    delta, way, h = erc_moe.perturb(R, erc_moe.noise_bound(R), seeded()) / R, weights(n=3, d=4, D=2, seed=1)[0], 1e-6
    fixed = torch.func.grad(lambda R: clean_loss(erc_moe, R * delta, W_g))
    wanted, found = ((fixed(R + h * way) - fixed(R - h * way)) / (2 * h)).flatten(), hessian @ way.double().flatten()
    assert torch.allclose(hessian, hessian.T, atol=1e-12) and wanted.abs().max() > 1e-3, hessian
    assert torch.allclose(found, wanted, atol=1e-7), f"off by {(found - wanted).abs().max():.1e}"


@pytest.mark.slow
def test_compiled_it_is_one_graph_with_the_same_gradient():
    """torch.compile(erc_loss, fullgraph=True), which draws the noise inside of the graph."""
    layer, found, options = weights(grad=True), [], {"fallback_random": True}
    for function in (erc_moe.erc_loss, torch.compile(erc_moe.erc_loss, fullgraph=True, options=options)):
        torch.manual_seed(0)
        found.append(torch.autograd.grad(function(*layer), layer))
    close(*found, "compiled", tolerance=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_get_the_same_gradient(reentrant):
    """Blocks that run again in the backward pass, and the loss in the same step: all gradients are equal to the bit."""
    torch.manual_seed(0)
    plain = erc_moe.MoETransformer(erc_moe.MoEConfig(n_layers=2))
    again = copy.deepcopy(plain)
    for block in again.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=reentrant)
    tokens = torch.randint(256, (2, 17), generator=seeded())
    for model in (plain, again):
        (model(tokens[:, :-1], tokens[:, 1:]).ce + model.erc_loss(generator=seeded())).backward()
    for (name, one), other in zip(plain.named_parameters(), again.parameters()):
        assert torch.equal(one.grad, other.grad), f"{name}: off by {(one.grad - other.grad).abs().max():.1e}"
