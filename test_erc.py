"""Proof-reading the ERC loss: the three steps of arXiv 2512.23447 as numeric sentences, checked on the CPU in seconds.

    pytest test_erc.py

Every reference here is written a second way: with loops over experts, by hand, or in float64. Each test takes the
module `erc` as an argument, so that the last test can run others against copies of erc_moe.py with a known mistake in
them (mistakes found in public copies of this loss), and see them fail.
"""

import sys
import types
from pathlib import Path

import pytest
import torch

import erc_moe

SOURCE = Path(erc_moe.__file__).read_text(encoding="utf-8")
n, d, D = 5, 12, 7  # experts, width of the model, width inside an expert; all different, so that a transpose shows


@pytest.fixture(name="erc")
def the_real_module():
    return erc_moe


def weights(n=n, d=d, D=D, seed=0, dtype=torch.float32, grad=False):
    """A random router R [n, d] and gate matrices W_g [n, d, D]."""
    generator = torch.Generator().manual_seed(seed)
    R, W_g = torch.randn(n, d, generator=generator), torch.randn(n, d, D, generator=generator)
    return R.to(dtype).requires_grad_(grad), W_g.to(dtype).requires_grad_(grad)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def loop_epsilon(R):
    """Step 1 with loops: half the distance to the nearest other row, relative to the row's length."""
    R = R.detach().double()
    return [min((R[i] - R[j]).norm() for j in range(len(R)) if j != i) / (2 * R[i].norm()) for i in range(len(R))]


def loop_M(R, W_g):
    """Step 2 with loops: M[i][j] = ||R[i] W_g[j]||."""
    R, W_g = R.tolist(), W_g.tolist()
    M = torch.zeros(len(R), len(R), dtype=torch.float64)
    for i in range(len(R)):
        for j in range(len(R)):
            columns = zip(*W_g[j])
            M[i, j] = sum(sum(r * w for r, w in zip(R[i], column)) ** 2 for column in columns) ** 0.5
    return M


def clean_loss(erc, R, W_g, alpha=1.0):
    """The loss without noise."""
    return erc.coupling_hinge(erc.activation_norms(R, W_g), alpha)


def loop_loss(M, alpha):
    """Step 3 with loops."""
    size, total = len(M), 0.0
    for i in range(size):
        for j in range(size):
            if j != i:
                total += max(M[i, j] - alpha * M[i, i], 0.0) + max(M[j, i] - alpha * M[i, i], 0.0)
    return float(total / size**2)


# ---- Step 1: perturb ----


def test_epsilon_is_half_the_relative_distance_to_the_nearest_other_row(erc):
    """epsilon_i = min_{j != i} ||R[i] - R[j]|| / (2 ||R[i]||), and no gradient flows through it."""
    R, _ = weights(grad=True)
    epsilon, expected = erc.noise_bound(R), torch.tensor(loop_epsilon(R)).float()
    assert torch.allclose(epsilon, expected, rtol=1e-5), f"{epsilon.tolist()} is not {expected.tolist()}"
    assert not epsilon.requires_grad, "epsilon is a constant of the loss"


def test_near_equal_rows_get_a_small_epsilon_not_a_rounding_error(erc):
    """Two rows of length 100 that are 1e-3 apart: epsilon is 5e-6, though squares of their length swallow it."""
    R = torch.tensor([[100.0, 0.0], [100.0, 1e-3]])
    epsilon = erc.noise_bound(R)[0].item()
    assert abs(epsilon / 5e-6 - 1) < 1e-3, f"epsilon {epsilon:.3e}, expected 5e-6"


def test_a_noisy_proxy_stays_within_half_the_way_to_the_nearest_row(erc):
    """||R~[i] - R[i]|| <= min_j ||R[i] - R[j]|| / 2 in 500 draws, and some draw goes more than half that far."""
    R, _ = weights()
    half_way = torch.cdist(R, R).fill_diagonal_(float("inf")).amin(dim=1) / 2
    draws = torch.stack([erc.perturb(R, erc.noise_bound(R), seeded(seed)) for seed in range(500)])
    reach = ((draws - R).norm(dim=-1) / half_way).max().item()
    assert 0.5 < reach <= 1, f"the farthest of 500 draws went {reach:.3f} of the allowed way"


def test_each_feature_has_its_own_uniform_factor_around_one(erc):
    """delta has mean 1, stays within 1 +- epsilon_i, spreads like a uniform (variance epsilon^2/3), by feature."""
    R, _ = weights()
    epsilon = erc.noise_bound(R)
    delta = torch.stack([erc.perturb(R, epsilon, seeded(seed)) for seed in range(4000)]) / R            # (4000, n, d)
    u = (delta - 1) / epsilon[:, None]
    assert u.abs().max() <= 1 + 1e-4, f"a factor left its bound: {u.abs().max():.4f} of epsilon"
    assert u.mean().abs() < 0.01 and abs(u.square().mean() - 1 / 3) < 0.005, f"{u.mean():.4f}, {u.square().mean():.4f}"
    correlation = torch.corrcoef(u.flatten(1).T) - torch.eye(n * d)  # between features, and between rows
    strongest = correlation.abs().max()
    assert strongest < 0.1, f"features {strongest:.2f} correlated; noise must be drawn for each"


def test_same_generator_same_noise_and_the_global_stream_is_left_alone(erc):
    """A seed fixes the noise; drawing it does not move the random stream that other code uses."""
    R, W_g = weights()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one, two, other = (erc.erc_loss(R, W_g, generator=seeded(s)).item() for s in (1, 1, 2))
    assert one == two != other, f"seeds 1, 1, 2 gave {one}, {two}, {other}"
    assert torch.equal(before, torch.get_rng_state()), "the global random stream moved"


# ---- Step 2: probe ----


def test_M_ij_is_the_response_of_expert_j_to_proxy_i(erc):
    """M[i, j] = ||R[i] W_g[j]||, by loops over every number."""
    R, W_g = weights()
    M, expected = erc.activation_norms(R, W_g), loop_M(R, W_g)
    assert torch.allclose(M.double(), expected, rtol=1e-5), f"off by {(M - expected).abs().max():.2e}"


def test_half_precision_changes_nothing_but_the_rounding_of_the_inputs(erc):
    """bf16 weights, and an enclosing autocast, give exactly the float32 loss of the same rounded numbers."""
    R, W_g = weights(dtype=torch.bfloat16)
    exact = erc.erc_loss(R.float(), W_g.float(), generator=seeded())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = erc.erc_loss(R.float(), W_g.float(), generator=seeded())
    half = erc.erc_loss(R, W_g, generator=seeded())
    assert half.dtype == torch.float32 and half == cast == exact, f"{half}, {cast}, {exact}"
    assert erc.erc_loss(R.double(), W_g.double()).dtype == torch.float64, "float64 stays float64"


# ---- Step 3: hinge ----


def test_two_experts_by_hand(erc):
    """M = [[3, 1], [2, 4]] holds all at alpha 1; at alpha 0.25 it breaks by (0.25+1.25) and (1+0), over n^2 = 4."""
    M = torch.tensor([[3.0, 1.0], [2.0, 4.0]])
    assert erc.coupling_hinge(M, 1.0) == 0, "own responses are the largest of row and column: nothing is broken"
    # i=0: row 1 - 0.75 = 0.25, column 2 - 0.75 = 1.25; i=1: row 2 - 1 = 1, column 1 - 1 = 0
    assert erc.coupling_hinge(M, 0.25).item() == pytest.approx((0.25 + 1.25 + 1 + 0) / 4)


def test_a_row_that_prefers_another_expert_costs_its_excess(erc):
    """Proxy 0 excites expert 1 by 0.5 more than its own; every column holds: only the row term pays."""
    M = torch.tensor([[2.0, 2.5, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 1.0]])
    assert erc.coupling_hinge(M, 1.0).item() == pytest.approx(0.5 / 9)


def test_a_column_that_prefers_another_proxy_costs_its_excess(erc):
    """Expert 1 responds to proxy 0 by 0.5 more than to its own; every row holds: only the column term pays."""
    M = torch.tensor([[3.0, 2.5, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 1.0]])
    assert erc.coupling_hinge(M, 1.0).item() == pytest.approx(0.5 / 9)


def test_smaller_alpha_never_lowers_the_loss(erc):
    """Strictness is monotone: alpha 0 asks for most, alpha 3 for hardly anything."""
    R, W_g = weights()
    losses = [clean_loss(erc, R, W_g, alpha).item() for alpha in (0, 0.25, 0.5, 1, 1.5, 2, 3, 10)]
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[3] > losses[-1] == 0, losses
    off_diagonal = loop_M(R, W_g).fill_diagonal_(0)
    everything = 2 * off_diagonal.sum().item() / n**2
    assert losses[0] == pytest.approx(everything), "at alpha 0 it is every response to another's proxy, and no way out"


def test_report_counts_constraints_and_measures_the_diagonal(erc):
    """3 of the 12 constraints of this M are broken at alpha 1; mean diagonal 2, mean of the rest 1.25."""
    M = torch.tensor([[2.0, 2.5, 0.0], [0.0, 3.0, 2.0], [2.0, 1.0, 1.0]])
    # rows: M01 > M00, M20 > M22; columns: M12 > M22
    violated, coupling = erc.coupling_report(M, 1.0)
    assert (violated.item(), coupling.item()) == pytest.approx((3 / 12, 2 / 1.25))
    violated, _ = erc.coupling_report(M * torch.nan)
    assert violated == 1, f"NaN breaks {violated:.0%} of the constraints; it should not look like success"


# ---- The whole loss ----


def test_the_loss_is_the_formula_written_with_loops(erc):
    """Within 1e-5 of a float64 loop, with noise and without, for 2 to 17 experts and alpha 0, 0.5, 1, 2."""
    for size in range(2, 18):
        R, W_g = weights(n=size, d=8, D=5, seed=size)
        R_tilde = erc.perturb(R, torch.tensor(loop_epsilon(R)), seeded(size))  # step 1 has tests of its own
        noisy, clean = loop_M(R_tilde, W_g), loop_M(R, W_g)
        for alpha in (0.0, 0.5, 1.0, 2.0):
            losses = erc.erc_loss(R, W_g, alpha, seeded(size)).item(), clean_loss(erc, R, W_g, alpha).item()
            expected = loop_loss(noisy, alpha), loop_loss(clean, alpha)
            assert losses == pytest.approx(expected, rel=1e-5, abs=1e-7), f"n={size}, alpha={alpha}"


def test_the_gradient_reaches_every_row_of_R_and_every_gate_matrix(erc):
    """Both sides are trained: a router that gets no gradient is the most common mistake of all."""
    R, W_g = weights(grad=True)
    erc.erc_loss(R, W_g, 0.5, generator=seeded()).backward()
    assert R.grad is not None, "no gradient reaches the router"
    rows, gates = R.grad.norm(dim=1), W_g.grad.flatten(1).norm(dim=1)
    assert (rows > 0).all() and (gates > 0).all(), f"norms: rows {rows.tolist()}, experts {gates.tolist()}"


def test_the_gradient_is_that_of_a_loss_with_epsilon_and_delta_fixed(erc):
    """Chain rule by hand: d loss / dR = delta * d hinge / dR~, with delta = R~ / R. Nothing comes through epsilon."""
    R, W_g = weights(dtype=torch.float64, grad=True)
    got = torch.autograd.grad(erc.erc_loss(R, W_g, 0.7, generator=seeded()), (R, W_g))
    R_tilde = erc.perturb(R, erc.noise_bound(R), seeded()).detach().requires_grad_()
    by_proxy, by_gate = torch.autograd.grad(erc.coupling_hinge(erc.activation_norms(R_tilde, W_g), 0.7), (R_tilde, W_g))
    expected = (R_tilde / R).detach() * by_proxy
    assert torch.allclose(got[0], expected, rtol=1e-10), f"R: off by {(got[0] - expected).abs().max():.2e}"
    assert torch.allclose(got[1], by_gate, rtol=1e-10), f"W_g: off by {(got[1] - by_gate).abs().max():.2e}"


@pytest.mark.parametrize("term", ["row", "column"])
def test_which_way_a_step_moves_router_rows_and_experts(erc, term):
    """By hand, with u_ij the direction of R~[i] W_g[j] and one broken constraint against the pair (i, i).

    Row, M[i,j] > alpha M[i,i]: R~[i] moves by alpha W_g[i] u_ii - W_g[j] u_ij, towards what excites its own expert and
    away from what excites the other one; W_g[i] gains alpha R~[i] u_ii^T, W_g[j] loses R~[i] u_ij^T.
    Column, M[j,i] > alpha M[i,i]: R~[i] gains alpha W_g[i] u_ii, R~[j] loses W_g[i] u_ji; W_g[i] turns from proxy j to
    its own.
    """
    alpha, u = 0.9, lambda i, j: R[i] @ W_g[j] / (R[i] @ W_g[j]).norm()
    R, W_g = torch.tensor([[3.0, 0, 0], [0, 2, 0], [0, 0, 1]]).double(), 1e-3 * weights(3, 3, 4)[1].double()
    W_g += torch.eye(3, 4)[:, None] * torch.eye(3)[:, :, None] * torch.tensor([1, 2, 6])[:, None, None]
    i, j = (0, 1) if term == "row" else (1, 0)  # either way it is M[0, 1] that is too large
    W_g[1, 0, 0] += 3.1 / 3 if term == "row" else 4.1 / 3
    if term == "row":
        W_g[1, 1, 1] += 1
    else:
        W_g[0, 0, 0] += 2
    M = loop_M(R, W_g)
    broken = [(a, b, kind) for a in range(3) for b in range(3) if a != b
              for kind, entry in (("row", M[a, b]), ("column", M[b, a])) if entry > alpha * M[a, a]]
    assert broken == [(i, j, term)], f"the example breaks {broken}"
    down = [torch.zeros_like(R), torch.zeros_like(W_g)]  # what a step adds, but for its length
    if term == "row":
        down[0][i] = alpha * W_g[i] @ u(i, i) - W_g[j] @ u(i, j)
        down[1][i], down[1][j] = alpha * torch.outer(R[i], u(i, i)), -torch.outer(R[i], u(i, j))
    else:
        down[0][i], down[0][j] = alpha * W_g[i] @ u(i, i), -W_g[i] @ u(j, i)
        down[1][i] = alpha * torch.outer(R[i], u(i, i)) - torch.outer(R[j], u(j, i))
    R.requires_grad_(), W_g.requires_grad_()
    gradients = torch.autograd.grad(clean_loss(erc, R, W_g, alpha), (R, W_g))
    for name, expected, gradient in zip(("R", "W_g"), down, gradients):
        off = (expected / 9 + gradient).abs().max().item()
        assert off < 1e-9, f"{name}: the step differs from the one by hand by {off:.1e}"


def test_autograd_agrees_with_finite_differences(erc):
    """torch.autograd.gradcheck in float64, without noise and with the noise held fixed."""
    R, W_g = weights(n=4, d=6, D=5, dtype=torch.float64, grad=True)
    epsilon = erc.noise_bound(R)
    for noise in (lambda R: R, lambda R: erc.perturb(R, epsilon, seeded())):
        assert torch.autograd.gradcheck(lambda R, W_g, noise=noise: clean_loss(erc, noise(R), W_g, 0.5), (R, W_g))


def test_a_common_scale_scales_the_loss_and_leaves_the_constraints(erc):
    """Degree 1 in R and in W_g: shrinking all weights lowers the loss and repairs nothing: watch `violated` too."""
    R, W_g = weights()
    loss, M = clean_loss(erc, R, W_g), erc.activation_norms(R, W_g)
    for name, pair in dict(R=(3 * R, W_g), W_g=(R, 3 * W_g)).items():
        assert torch.allclose(clean_loss(erc, *pair), 3 * loss), f"3 {name} does not give 3 times the loss"
        assert erc.coupling_report(erc.activation_norms(*pair))[0] == erc.coupling_report(M)[0] > 0, name


def test_one_loud_expert_is_no_way_out(erc):
    """W_g[0] * 10 raises M[0,0], and with it the whole column 0 that M[0,0] is compared with: the loss grows."""
    R, W_g = weights()
    louder = torch.cat((10 * W_g[:1], W_g[1:]))
    before, after = (clean_loss(erc, R, W).item() for W in (W_g, louder))
    assert after > before, f"{before:.3f} -> {after:.3f}"


def test_identical_experts_are_a_minimum_without_meaning(erc):
    """All experts equal: row constraints hold with equality at alpha 1; columns too once all ||R[i] W|| are equal."""
    R, W_g = weights()
    same = W_g[:1].expand(n, d, D)
    M = erc.activation_norms(R, same)
    rows_broken = torch.relu(M - M.diagonal()[:, None]).max().item()
    assert rows_broken < 1e-5 < erc.coupling_hinge(M, 1.0), "rows hold, columns pay"
    level = R / M.diagonal()[:, None]
    assert clean_loss(erc, level, same, 1.0) < 1e-6, "both hold: a minimum, although experts know nothing"
    assert clean_loss(erc, level, same, 0.5) > 0.1, "below 1, alpha rules it out"


def test_a_few_steps_couple_a_random_router_and_its_experts_without_shrinking_them(erc):
    """60 steps of Adam: from half of all constraints broken to none, with norms of R and W_g within a quarter."""
    R, W_g = weights(n=8, d=64, D=32, grad=True)
    norms = R.norm().item(), W_g.norm().item()
    optimizer = torch.optim.Adam([R, W_g], lr=0.02)
    violated = [erc.coupling_report(erc.activation_norms(R, W_g))[0].item()]
    for step in range(60):
        optimizer.zero_grad()
        erc.erc_loss(R, W_g, generator=seeded(step)).backward()
        optimizer.step()
    violated.append(erc.coupling_report(erc.activation_norms(R, W_g))[0].item())
    assert violated[0] > 0.3 and violated[1] == 0, f"violated {violated}"
    ratios = R.norm().item() / norms[0], W_g.norm().item() / norms[1]
    assert all(0.8 < ratio < 1.25 for ratio in ratios), f"norms of R and W_g changed by {ratios}"


# ---- Edges ----

R0, W0 = weights()
EDGES = {
    "one expert": (R0[:1], W0[:1]),
    "a zero row": (torch.cat((0 * R0[:1], R0[1:])), W0),
    "only zero rows": (0 * R0, W0),
    "a dead expert": (R0, torch.cat((0 * W0[:1], W0[1:]))),
    "only dead experts": (R0, 0 * W0),
    "equal rows": (R0[:1].expand(n, d), W0),
    "rows of very different size": (R0 * 10.0 ** torch.arange(-8, 12, 4)[:, None], W0),
    "width one": (R0[:, :1], W0[:, :1, :1]),
}


@pytest.mark.parametrize("edge", EDGES)
def test_edges_have_an_answer_and_a_finite_gradient(erc, edge):
    """No NaN and no infinity, in value or gradient, whatever the weights look like; and never below 0."""
    R, W_g = (t.clone().requires_grad_() for t in EDGES[edge])
    loss = erc.erc_loss(R, W_g, 0.5)
    loss.backward()
    assert all(t.isfinite().all() for t in (loss, R.grad, W_g.grad)) and loss >= 0, f"loss {loss.item()}"
    report = erc.coupling_report(erc.activation_norms(R, W_g))
    assert not any(value.isnan() for value in report), f"{report}"
    if edge == "one expert":
        assert loss == 0 and report == (0, 1), f"one expert has nothing to be compared with: {loss}, {report}"


def test_wrong_shapes_are_refused_with_the_numbers_and_the_fix(erc):
    """Weights stored as [n, D, d], a transposed router, another number of experts: ValueError that says what it got."""
    R, W_g = weights()
    for arguments, said in [
        ((R, W_g.transpose(1, 2)), r"\[5, 7, 12\].*pass .transpose"),
        ((R.T, W_g), r"\[12, 5\].*\.T of a router \[d, n\]"),
        ((R, W_g[:-1]), r"\[5, 12\] and \[4, 12, 7\]"),
        ((R[0], W_g), r"\[12\]"),
    ]:
        with pytest.raises(ValueError, match=said):
            erc.erc_loss(*arguments)


def test_the_default_dtype_of_the_program_around_it_changes_nothing(erc):
    """At n = 256 there are 130,560 constraints, more than float16 can hold; alpha 0 breaks them all."""
    R, W_g = weights(n=256, d=8, D=4)
    expected = erc.erc_loss(R, W_g, generator=seeded())
    torch.set_default_dtype(torch.float16)
    try:
        loss = erc.erc_loss(R, W_g, generator=seeded())
        violated, _ = erc.coupling_report(erc.activation_norms(R, W_g), 0.0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert loss == expected and violated == 1, f"loss {loss} instead of {expected}, violated {violated} instead of 1"


# ---- In the model ----


def small_model(erc):
    torch.manual_seed(0)
    return erc.MoETransformer(erc.MoEConfig(32, 16, n_layers=3, n_heads=2, d_model=16, d_expert=8))


def test_in_the_model_it_trains_R_and_W_g_and_no_other_parameter(erc):
    """Embeddings, attention, norms, W_p and W_o get no gradient at all from it."""
    model = small_model(erc)
    model.erc_loss(alpha=0.5, generator=seeded()).backward()
    for name, parameter in model.named_parameters():
        has = parameter.grad is not None and parameter.grad.abs().sum() > 0
        assert has == name.endswith((".R", ".W_g")), f"{name}: gradient {'from' if has else 'missing in'} the ERC loss"


def test_in_the_model_it_is_the_mean_over_layers(erc):
    """Three layers with one generator: the mean of three losses, drawn one after the other."""
    model, generator = small_model(erc), seeded()
    by_layer = [erc.erc_loss(block.moe.R, block.moe.W_g, 0.5, generator).item() for block in model.blocks]
    assert model.erc_loss(0.5, generator=seeded()).item() == pytest.approx(sum(by_layer) / 3, rel=1e-6), by_layer
    assert model.erc_loss(generator=seeded()) == model.erc_loss(1.0, generator=seeded()), "alpha is 1 unless it is said"


def test_a_sigmoid_router_needs_one_line_and_leaves_the_loss_as_it_is(erc):
    """softmax replaced in `route`: other weights and the same experts, a balance loss that is 1 when balanced."""
    copy, x = types.ModuleType("sigmoid"), torch.randn(1, 50, 16)
    sys.modules["sigmoid"] = copy
    assert SOURCE.count("probs = logits.softmax(dim=-1)") == 1
    exec(SOURCE.replace("probs = logits.softmax(dim=-1)", "probs = logits.sigmoid()"), copy.__dict__)
    model, other = small_model(erc), small_model(copy)
    assert model.erc_loss(generator=seeded()) == other.erc_loss(generator=seeded())
    (_, _, weights, experts), (_, _, soft, same) = (m.blocks[0].moe.route(x[0]) for m in (other, model))
    assert torch.equal(experts, same) and not torch.allclose(weights, soft), "the choice of experts has changed"
    assert abs(other.blocks[0].moe(x)[1].balance.item() - 1) < 0.2, "scores of a sigmoid are not made to sum to 1"


def test_routing_uses_the_clean_R(erc):
    """Taking the loss changes neither R nor what the model computes; in training mode routing has no noise either."""
    model, tokens = small_model(erc).train(), torch.arange(16)[None]
    R, logits = model.blocks[0].moe.R.clone(), model(tokens).logits
    model.erc_loss().backward()
    assert torch.equal(model.blocks[0].moe.R, R) and torch.equal(model(tokens).logits, logits), "the loss left a trace"


# ---- The block to paste, and mistakes that must not go unseen ----

def test_the_marked_block_runs_alone_under_import_torch(erc):
    """What lies between the two paste lines needs nothing else, and gives the same number."""
    start, end = SOURCE.index("# ---- The ERC loss. To use it elsewhere"), SOURCE.index("# ---- ... and this line")
    pasted = {}
    exec("import torch\n" + SOURCE[start:end], pasted)
    R, W_g = weights()
    assert pasted["erc_loss"](R, W_g, generator=seeded()) == erc.erc_loss(R, W_g, generator=seeded())


MISTAKES = {
    "the product R * delta under no_grad": (
        "    return R * (1 +", "    return R.detach() * (1 +",
        test_the_gradient_reaches_every_row_of_R_and_every_gate_matrix),
    "one noise factor for a whole row": (
        "torch.rand(R.shape,", "torch.rand((R.size(0), 1),", test_each_feature_has_its_own_uniform_factor_around_one),
    "the column term missing": (
        "(row + column)", "row", test_a_column_that_prefers_another_proxy_costs_its_excess),
    "the row term missing": (
        "(row + column)", "column", test_a_row_that_prefers_another_expert_costs_its_excess),
    "the up matrix instead of the gate": (
        "erc_loss(moe.R, moe.W_g,", "erc_loss(moe.R, moe.W_p,",
        test_in_the_model_it_trains_R_and_W_g_and_no_other_parameter),
    "epsilon without the factor 2": (
        "amin(dim=1) / (2 * torch.linalg", "amin(dim=1) / (torch.linalg",
        test_epsilon_is_half_the_relative_distance_to_the_nearest_other_row),
    "a gradient through epsilon": (
        "at_least_float32(R).detach()  # a constant", "at_least_float32(R)  # a constant",
        test_epsilon_is_half_the_relative_distance_to_the_nearest_other_row),
    "M transposed": (
        "(response, dim=-1).T", "(response, dim=-1)", test_M_ij_is_the_response_of_expert_j_to_proxy_i),
    "the mean over n(n-1) pairs instead of n^2": (
        ", 0).sum() / n**2", ", 0).sum() / (n * (n - 1))", test_two_experts_by_hand),
    "the sum over layers": ("self.moe_layers()]).mean()", "self.moe_layers()]).sum()",
                            test_in_the_model_it_is_the_mean_over_layers),
    "the probe under autocast": (
        "with torch.autocast(R.device.type, enabled=False):  # bfloat16 keeps 8 bits", "if True:  # bfloat16",
        test_half_precision_changes_nothing_but_the_rounding_of_the_inputs),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_known_mistake_turns_its_test_red(mistake):
    """Put into a copy of erc_moe.py, as an edit of one line, each mistake fails the test that is named beside it."""
    right, wrong, named_test = MISTAKES[mistake]
    assert SOURCE.count(right) == 1, f"erc_moe.py holds {right!r} {SOURCE.count(right)} times, not once"
    copy = types.ModuleType("mistaken")
    sys.modules["mistaken"] = copy  # where dataclasses look up the module of a class
    exec(SOURCE.replace(right, wrong), copy.__dict__)
    with pytest.raises((AssertionError, RuntimeError)):
        named_test(copy)
