"""What the ERC loss is compared with, beside loops in float64 and closed forms."""

import copy
import csv
import math
from pathlib import Path

import pytest
import torch
from variants import (AoE, AoETransformer, coupled, dense_config, expected_norms, orthogonality, random_router,
                      response_norms)

import train
from erc_moe import MoE, MoEConfig, MoETransformer, activation_norms, coupling_hinge, noise_bound, perturb

pytestmark = pytest.mark.usefixtures("elsewhere")


def small(**changes):
    """A configuration that runs in milliseconds; its AoE layers have rank 8. What is made of it has seed 0."""
    torch.manual_seed(0)
    return MoEConfig(**dict(vocab_size=320, context_length=16, n_layers=2, n_heads=2, d_model=16, d_expert=24,
                            n_experts=6, top_k=2, init_std=0.25) | changes)


def trained(model, data, **changes):
    """Trains it for four steps -> (names of the parameters that are what they were, rows of its log)."""
    before = copy.deepcopy(model.state_dict())
    train.train(train.Run(train.TrainConfig(data=data, out="run", steps=4, batch_size=2, log_every=1, eval_every=2,
                                            save_every=0, warmup=2, erc_weight=0.0, **changes), model=model))
    rows = [*csv.DictReader(Path("run", "log.csv").read_text(encoding="utf-8").splitlines())]
    return [name for name, value in model.named_parameters() if torch.equal(value, before[name])], rows


def aoe_by_loops(aoe, x):
    """One token at a time, one expert at a time -> (output [N, d], counts)."""
    outputs, counts = [], [0] * len(aoe.W_down)
    for token in x.flatten(0, 1):
        logits = torch.stack([(token @ W_down).square().sum().sqrt() for W_down in aoe.W_down])
        probs, y = logits.exp() / logits.exp().sum(), 0
        for i in sorted(range(len(logits)), key=lambda i: -logits[i].item())[:aoe.top_k]:
            counts[i] += 1
            a, b = token @ aoe.W_down[i] @ aoe.W_up[i], token @ aoe.W_p[i]
            y = y + probs[i] * ((a * a.sigmoid() * b) @ aoe.W_o[i])
        outputs.append(y)
    return torch.stack(outputs), counts


def test_an_aoe_layer_equals_a_loop_over_tokens_in_output_and_all_gradients():
    """Experts are chosen by ||x W_down[i]|| and go on with W_down[i] W_up[i]. Two that respond little are idle."""
    aoe, x, direction = AoE(small(top_k=3)), torch.randn(2, 9, 16), torch.randn(18, 16)
    aoe.W_down.data[[0, 3]] *= 1e-3
    slow = copy.deepcopy(aoe).double()
    (y, stats), (y_slow, counts) = aoe(x), aoe_by_loops(slow, x.double())
    (y.flatten(0, 1) * direction).sum().backward()
    (y_slow * direction).sum().backward()
    assert stats.load.tolist() == counts and counts[0] == counts[3] == 0, f"{stats.load.tolist()}, loop {counts}"
    for name, ours, theirs in (("output", y.flatten(0, 1), y_slow), *(
            (name, getattr(aoe, name).grad, getattr(slow, name).grad) for name in ("W_down", "W_up", "W_p", "W_o"))):
        assert torch.allclose(ours.double(), theirs, atol=1e-5), f"{name} off by {(ours - theirs).abs().max():.1e}"


def test_an_aoe_layer_has_the_parameters_and_the_initial_scale_of_a_plain_one():
    """93 to 100 % of the parameters, and W_down W_up starts with std init_std. Without a rank it is an error."""
    for config in (MoEConfig(), MoEConfig(n_heads=3, d_model=96, d_expert=64, n_experts=16)):
        plain, aoe = (sum(p.numel() for p in kind(config).parameters()) for kind in (MoE, AoE))
        assert 0.93 * plain <= aoe <= plain, f"{aoe} parameters, plain {plain}"
    assert AoE(MoEConfig()).W_g.std().item() == pytest.approx(0.02, rel=0.05), "the initial scale"
    with pytest.raises(ValueError, match="d_model 8 and d_expert 8 leave rank 0"):
        AoE(small(d_model=8, n_heads=1, d_expert=8))


def test_an_aoe_model_trains_and_has_no_coupling_in_its_log(data):
    """Every weight moves, agreement is logged, and erc and coupling are nan from the first line to the last."""
    still, rows = trained(AoETransformer(small()), data)
    assert not still and float(rows[-1]["agreement"]) > 1 / 6, f"did not move: {still}; {rows[-1]}"
    assert all(math.isnan(float(row[name])) for row in rows for name in ("erc", "coupling")), rows


def test_a_dense_model_has_as_many_active_parameters():
    """But for the router, of which a single expert has one row: in 2 layers 5 rows of 16 less."""
    active, dense = (MoETransformer(config).num_params()[1] for config in (small(), dense_config(small())))
    assert active - dense == 2 * 5 * 16, f"active {active}, dense {dense}"


def test_a_random_router_never_moves(data):
    """Not by weight decay either. All else is trained, with the decay of the experts beside it."""
    still, _ = trained(random_router(small()), data, moe_weight_decay=100.0)
    assert still == ["blocks.0.moe.R", "blocks.1.moe.R"], f"did not move: {still}"


def test_expected_norms_are_the_root_mean_square_of_many_draws():
    """The closed form lies within 4.5 standard errors of 2,000 draws."""
    moe = MoE(small()).double()
    draws = torch.stack([activation_norms(perturb(moe.R, noise_bound(moe.R)), moe.W_g) for _ in range(2000)]).square()
    closed = expected_norms(moe.R, moe.W_g).square()
    error = ((draws.mean(dim=0) - closed) / (draws.std(dim=0) / 2000**0.5)).abs().max().item()
    assert error < 4.5, f"{error:.1f} standard errors apart"  # the largest of 36


@pytest.mark.parametrize("where, y", [
    ("up", lambda a, b, W_o: b), ("silu", lambda a, b, W_o: a * a.sigmoid()),
    ("swiglu", lambda a, b, W_o: a * a.sigmoid() * b), ("output", lambda a, b, W_o: (a * a.sigmoid() * b) @ W_o)])
def test_another_activation_equals_loops_over_rows_and_experts(where, y):
    """M[i, j] and its gradients: the norm of y, for expert j and R[i]. a enters its activation, b is the up half."""
    moe = MoE(small()).double()
    moe.R.data *= 3  # so that SiLU is not just a half
    experts = [*zip(moe.W_g, moe.W_p, moe.W_o)]
    M = torch.stack([y(row @ W_g, row @ W_p, W_o).norm() for row in moe.R for W_g, W_p, W_o in experts]).view(6, 6)
    found = response_norms(where, moe.R, moe)
    assert torch.allclose(found, M), where
    ours, loops = (torch.autograd.grad(m.square().sum(), [*moe.parameters()], allow_unused=True) for m in (found, M))
    for one, other in zip(ours, loops):
        assert one is other is None or torch.allclose(one, other), f"{where}: gradients"


def test_a_loss_with_another_M_is_the_hinge_of_it_in_mean_over_layers():
    """Call s has the noise of step s of the trainer, or none. Its gradient reaches the matrices in M and no other."""
    model = MoETransformer(small())
    for how, M in dict(clean=lambda moe, noise: activation_norms(moe.R, moe.W_g),
                       expected=lambda moe, noise: expected_norms(moe.R, moe.W_g),
                       silu=lambda moe, noise: response_norms("silu", perturb(moe.R, noise_bound(moe.R), noise), moe),
                       ).items():
        loss = coupled(how, alpha=0.5, seed=7)
        for call in (1, 2):
            value, noise = loss(model), train.keyed_generator("cpu", 7, call, "erc")
            wanted = sum(coupling_hinge(M(moe, noise), 0.5) for moe in model.moe_layers()) / 2
            assert torch.allclose(value, wanted), f"{how}, call {call}: {value:.7f}, not {wanted:.7f}"
    value.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert reached == {f"blocks.{i}.moe.{part}" for i in (0, 1) for part in ("R", "W_g")}, reached


def test_orthogonality_of_two_rows_at_an_angle():
    """cos^2 / 2, two of four entries, whatever the lengths. The gradient reaches R alone."""
    model = MoETransformer(small(n_experts=2, n_layers=1, top_k=1))
    model.moe_layers()[0].R.data = torch.tensor([[3.0, 0.0], [5 * math.cos(1.0), 5 * math.sin(1.0)]])
    loss = orthogonality(model)
    loss.backward()
    assert loss.item() == pytest.approx(math.cos(1.0) ** 2 / 2), f"{loss.item()}"
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["blocks.0.moe.R"]
