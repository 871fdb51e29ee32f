"""The variants that are not the method: Autonomy-of-Experts, orthogonal routers, other probes, the dense model.

References are loops in float64 and closed forms. Run: python -m pytest tests/test_variants.py
"""

import copy
import csv
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from variants import AoE, CentredProbe, aoe_model, dense_config, orthogonality, probe_loss, probe_norms

import erc_moe
import train
from erc_moe import MoE, MoEConfig, MoETransformer
from prepare_data import UserError

GPU = {name: train.GPU[name] for name in ("n_layers", "n_heads", "d_model", "d_expert", "n_experts", "top_k")}


pytestmark = pytest.mark.usefixtures("elsewhere")


def small(**changes):
    """A configuration that runs in milliseconds; its AoE layers have rank 8."""
    sizes = dict(vocab_size=64, context_length=16, n_layers=2, n_heads=2, d_model=16, d_expert=24, n_experts=6, top_k=2)
    return MoEConfig(**sizes | changes)


def seeded(kind, config):
    torch.manual_seed(0)
    return kind(config)


def gap(ours, theirs):
    """Largest absolute difference of two tensors."""
    return (ours - theirs).abs().max().item()


# ---- Autonomy-of-Experts: the layer ----------------------------------------------------------------------------------


def aoe_by_loops(aoe, x):
    """One token at a time, one expert at a time, each with its whole gate matrix: (output [N, d], balance, z, counts).
    """
    n, K = aoe.W_down.size(0), aoe.top_k
    outputs, all_probs, logsumexps, counts = [], [], [], [0] * n
    for token in x.flatten(0, 1):
        logits = torch.stack([(token @ aoe.W_down[i]).square().sum().sqrt() for i in range(n)])
        probs = logits.exp() / logits.exp().sum()
        best = sorted(range(n), key=lambda i: -logits[i].item())[:K]
        total = sum(probs[i] for i in best) if aoe.renormalize else 1
        y = 0
        for i in best:
            counts[i] += 1
            gate, up = token @ (aoe.W_down[i] @ aoe.W_up[i]), token @ aoe.W_p[i]
            y = y + probs[i] / total * ((gate * gate.sigmoid() * up) @ aoe.W_o[i])
        outputs.append(y)
        all_probs.append(probs)
        logsumexps.append(logits.exp().sum().log())
    balance = n * sum(count / sum(counts) * torch.stack(all_probs)[:, i].mean() for i, count in enumerate(counts))
    return torch.stack(outputs), balance, torch.stack(logsumexps).square().mean(), counts


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("empty", [[], [0, 3]], ids=["all experts used", "two experts empty"])
@pytest.mark.parametrize("K, renormalize", [(1, False), (2, False), (2, True), (3, True)])
def test_an_aoe_layer_equals_a_loop_over_tokens_in_output_and_all_gradients(monkeypatch, K, renormalize, empty, block):
    """Scores from the down-projection, the cache, sorting and filler rows (block 4): the same as one by one."""
    dispatch = erc_moe.dispatch
    monkeypatch.setattr(erc_moe, "dispatch", lambda *given, **usual: dispatch(*given, block))
    aoe, x = seeded(AoE, small(top_k=K, renormalize=renormalize)), torch.randn(2, 9, 16)
    aoe.W_down.data[empty] /= 50  # short activations: no token's choice
    slow = copy.deepcopy(aoe).double()
    x, x_slow = x.requires_grad_(), x.detach().double().requires_grad_()

    y, stats = aoe(x)
    y_slow, balance, z, counts = aoe_by_loops(slow, x_slow)
    direction = torch.randn(2, 9, 16)
    ((y * direction).sum() + 3 * stats.balance + 0.1 * stats.z).backward()
    ((y_slow * direction.flatten(0, 1)).sum() + 3 * balance + 0.1 * z).backward()

    assert stats.load.tolist() == counts, f"rows per expert {stats.load.tolist()}, counted one by one {counts}"
    assert sum(counts) == 18 * K, f"{18 * K - sum(counts)} of {18 * K} rows were dropped"
    assert all(counts[i] == 0 for i in empty), f"the case does not test what it says: {counts}"
    pairs = {"output": (y.flatten(0, 1), y_slow), "balance": (stats.balance, balance), "z": (stats.z, z),
             "gradient of x": (x.grad, x_slow.grad)}
    for name in ("W_down", "W_up", "W_p", "W_o"):
        pairs[f"gradient of {name}"] = getattr(aoe, name).grad, getattr(slow, name).grad
    for name, (ours, theirs) in pairs.items():
        assert gap(ours, theirs) < 2e-5, f"{name} is off by {gap(ours, theirs):.1e} from the loop"


def test_the_experts_are_chosen_by_the_down_projection_alone():
    """Other W_up, W_p and W_o change no choice; the expert whose W_down is longest gets every token."""
    aoe, x = seeded(AoE, small()), torch.randn(50, 16)
    before = aoe.route(x)[-1]
    for W in (aoe.W_up, aoe.W_p, aoe.W_o):
        W.data.normal_()
    assert torch.equal(aoe.route(x)[-1], before), "what comes after W_down has a say in the choice"
    aoe.W_down.data[4] *= 20
    assert (aoe.route(x)[-1][:, 0] == 4).all(), f"first choices {aoe.route(x)[-1][:, 0].tolist()}"


@pytest.mark.parametrize("K", [2, 6])
def test_an_aoe_layer_in_bfloat16_is_close(monkeypatch, K):
    """Scores stay float32. With K = n, output and gradients within 2 percent; else the output, of tokens for which the
    choice is clear. Experts get blocks of 64 rows, as in MoE."""
    dispatch, blocks = erc_moe.dispatch, []
    monkeypatch.setattr(erc_moe, "dispatch", lambda *given, block: blocks.append(block) or dispatch(*given, block))
    aoe, x = seeded(AoE, small(top_k=K)), torch.randn(4, 50, 16)
    direction, results = torch.randn(4, 50, 16), []
    for enabled in (False, True):
        aoe.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y, stats = aoe(x)
            kinds = {value.dtype for value in (stats.balance, stats.z, *aoe.choose(aoe.down(x[0], y.dtype))[:3])}
        assert kinds == {torch.float32} and y.dtype == (torch.bfloat16 if enabled else torch.float32), (kinds, y.dtype)
        ((y.float() * direction).sum() + stats.balance).backward()
        results.append({"output": y.detach().float().flatten(0, 1), **{name: p.grad for name, p in
                                                                       aoe.named_parameters()}})
    assert blocks == [1, 64], f"blocks of {blocks} rows in float32 and bfloat16"
    with torch.autocast("cpu", torch.bfloat16):
        low = aoe.route(x[0])[0]
    assert torch.equal(low, aoe.route(x[0])[0]), "autocast has a say in route"
    if K < 6:
        best = aoe.route(x.flatten(0, 1))[0].sort(dim=1, descending=True).values
        clear = best[:, K - 1] - best[:, K] > 0.05
        assert clear.sum() > 100, f"only {clear.sum()} of 200 tokens have a clear choice"
        results = [{"output": result["output"][clear]} for result in results]
    for name, exact in results[0].items():
        off = ((results[1][name] - exact).norm() / exact.norm()).item()
        assert off < 0.02, f"{name} is off by {off:.1%}"


def test_an_aoe_layer_starts_at_the_scale_of_a_plain_one():
    """W_down W_up has the std of a plain W_g, d^-0.5; logits differ between the experts by about 1, around sqrt(r)."""
    config = small(d_model=128, d_expert=128, n_experts=32)
    aoe, moe, x = seeded(AoE, config), seeded(MoE, config), torch.randn(500, 128)
    for name in ("W_g", "W_p", "W_o"):
        ratio = (getattr(aoe, name).std() / getattr(moe, name).std()).item()
        assert abs(ratio - 1) < 0.02, f"std of {name} is {ratio:.3f} times that of a plain layer"
    logits = aoe.route(x)[0]
    mean, spread = logits.mean().item(), logits.std(dim=1).mean().item()
    assert aoe.r == 64 and abs(mean - 8) < 0.1 and 0.6 < spread < 1, f"norms {mean:.2f}, spread {spread:.2f}"


# ---- Autonomy-of-Experts: the model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("config, least", [(MoEConfig(), 0.99), (MoEConfig(**GPU), 0.99), (small(), 0.9),
                                           (small(d_model=64, d_expert=104), 0.99)])
def test_an_aoe_layer_has_at_most_the_parameters_of_a_plain_one(config, least):
    """And within a percent of them at the sizes we train: with one step more of rank it would have more."""
    aoe, moe = (sum(p.numel() for p in kind(config).parameters()) for kind in (AoE, MoE))
    r, more = AoE(config).r, 8 * config.n_experts * (config.d_model + config.d_expert)
    assert least * moe < aoe <= moe < aoe + more and r % 8 == 0, f"{aoe} at rank {r}, a plain layer {moe}"


def test_too_small_for_any_rank_is_refused():
    """With the numbers, at construction."""
    with pytest.raises(ValueError, match="d_model 16 and d_expert 8 leave rank 0"):
        AoE(small(d_expert=8))


def test_aoe_parameters_counted_by_hand():
    """A token uses every W_down, and K of the rest; with K = n every parameter is active."""
    # Embedding and head 2*64*16, final norm 16; a layer: attention 4*16*16, norms 4*16, and the six experts.
    others, down, rest = 2 * 64 * 16 + 16 + 2 * (4 * 16 * 16 + 4 * 16), 16 * 8, 8 * 24 + 2 * 16 * 24
    counted = aoe_model(small()).num_params()
    assert counted == (others + 2 * 6 * (down + rest), others + 2 * (6 * down + 2 * rest)), f"counted {counted}"
    total, active = aoe_model(small(top_k=6)).num_params()
    assert total == active, f"K = n, but {active} of {total} active"


def test_an_aoe_model_shares_its_other_weights_with_the_plain_one_of_the_same_seed():
    """So a comparison starts from the same embedding, attention and output."""
    ours, plain = (dict(seeded(kind, small()).named_parameters()) for kind in (aoe_model, MoETransformer))
    shared = [name for name in plain if ".moe." not in name]
    assert len(shared) == len([name for name in ours if ".moe." not in name]) == 2 * 8 + 3, shared
    different = [name for name in shared if not torch.equal(ours[name], plain[name])]
    assert not different, f"{different} differ"


def run_settings(data, **changes):
    """(TrainConfig, MoEConfig) of a run that takes milliseconds a step."""
    sizes = dict(context_length=32, n_layers=2, n_heads=2, d_model=16, d_expert=24, n_experts=4, batch_size=2, steps=6,
                 warmup=2, eval_every=3, save_every=0, log_every=1, device="cpu", dtype="fp32", erc_weight=0.0)
    config, moe = train.configs({"data": data, "out": "out", **sizes, **changes})
    return config, replace(moe, vocab_size=320)  # 257 ids, rounded up to a multiple of 64


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_aoe_model_trains_and_has_no_coupling_in_its_log(data, dtype):
    """Every weight moves and is finite; ce falls; erc and coupling are nan from the first line to the last."""
    config, moe = run_settings(data, dtype=dtype, steps=12, lr=0.01)
    model = seeded(aoe_model, moe)
    before = copy.deepcopy(model.state_dict())
    train.train(config, model=model)
    for name, value in model.state_dict().items():
        assert value.isfinite().all() and not torch.equal(value, before[name]), f"{name} is not finite, or never moved"
    with open(Path("out", "log.csv"), encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["erc"], row["coupling"]) for row in rows} == {("nan", "nan")} and len(rows) == 12, rows
    assert all(math.isfinite(float(row[name])) for row in rows for name in ("ce", "balance", "z", "grad_norm")), rows
    assert float(rows[-1]["ce"]) < float(rows[0]["ce"]) - 0.3, [row["ce"] for row in rows]
    assert 0 < float(rows[-1]["agreement"]) < 1, rows[-1]


def test_the_erc_loss_of_an_aoe_model_stops_the_run(data):
    """There is no router to couple: with an ERC weight above 0 the trainer refuses the first step, not the weights."""
    config, moe = run_settings(data, erc_weight=1.0)
    model = seeded(aoe_model, moe)
    with pytest.raises(UserError, match="not finite at step 1"):
        train.train(config, model=model)
    assert all(p.isfinite().all() for p in model.parameters()), "NaN reached the weights"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agreement_of_an_aoe_model(dtype):
    """1 where W_up has orthonormal rows, so that ||x W_down|| = ||x W_g||; where W_up of one expert is huge, that
    expert responds most, and the agreement is the share of tokens that choose it."""
    model, tokens = seeded(aoe_model, small(n_layers=1)), torch.randint(64, (8, 16))
    aoe, firsts = model.moe_layers()[0], []

    def agreement():
        with torch.no_grad():
            return train.evaluate(model, [(tokens, tokens)], torch.device("cpu"),
                                  lambda: torch.autocast("cpu", dtype, enabled=dtype != torch.float32))[1]

    aoe.W_up.data = torch.linalg.qr(torch.randn(6, 24, 8)).Q.mT.contiguous()
    assert agreement() > 0.99, f"agreement {agreement():.3f} with orthonormal W_up"
    aoe.W_up.data[2] *= 1e3
    aoe.register_forward_pre_hook(lambda aoe, args: firsts.append(aoe.route(args[0].flatten(0, 1))[-1][:, 0] == 2))
    found = agreement()
    share = firsts[-1].float().mean().item()
    assert 0.02 < share < 0.98 and abs(found - share) < 1e-6, f"agreement {found:.3f}, share of tokens {share:.3f}"


# ---- Router orthogonalisation ----------------------------------------------------------------------------------------


def test_orthogonality_is_zero_for_orthogonal_rows_of_any_length():
    """A rotation's rows, stretched each by its own factor."""
    model = seeded(MoETransformer, small())
    for moe in model.moe_layers():
        moe.R.data = torch.linalg.qr(torch.randn(16, 6)).Q.T * torch.logspace(-2, 2, 6)[:, None]
    loss = orthogonality(model).item()
    assert loss < 1e-12, f"{loss:.1e}"


def test_orthogonality_of_two_rows_at_an_angle():
    """cos^2 / 2: two entries of the four are cos; mean over layers; blind to lengths; the gradient reaches R alone."""
    model = seeded(MoETransformer, small(n_experts=2))
    angles = (0.4, 2.0)
    for moe, angle in zip(model.moe_layers(), angles):
        moe.R.data.zero_()[0, 0] = 3.0
        moe.R.data[1, :2] = 0.2 * torch.tensor([math.cos(angle), math.sin(angle)])
    loss, wanted = orthogonality(model), sum(math.cos(angle) ** 2 / 2 for angle in angles) / 2
    assert abs(loss.item() - wanted) < 1e-6, f"{loss:.6f}, closed form {wanted:.6f}"
    with torch.autocast("cpu", torch.bfloat16):
        assert orthogonality(model) == loss, "autocast has a say in it"
    loss.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert reached == {"blocks.0.moe.R", "blocks.1.moe.R"}, reached
    for moe in model.moe_layers():  # no gradient along a row: it turns rows, and does not shorten them
        along = (moe.R.grad * moe.R).sum(dim=1).abs().max().item()
        assert along < 1e-6 < moe.R.grad.norm(), f"{along:.1e} along the rows, {moe.R.grad.norm():.1e} in all"


# ---- Other probes ----------------------------------------------------------------------------------------------------

PARTS = dict(up=("R", "W_p"), swiglu=("R", "W_g", "W_p"), output=("R", "W_g", "W_p", "W_o"))


def probe_by_loops(moe, where, alpha, u):
    """The loss of one layer, number by number; u [n, d] is the noise before it is scaled, in [-1, 1)."""
    n, M, loss = len(moe.R), {}, 0
    for i in range(n):
        R = moe.R.detach()
        epsilon = min((R[i] - R[j]).norm() for j in range(n) if j != i) / (2 * R[i].norm())
        proxy = moe.R[i] * (1 + epsilon * u[i])
        for j in range(n):
            gate, y = proxy @ moe.W_g[j], proxy @ moe.W_p[j]
            y = y if where == "up" else gate * gate.sigmoid() * y
            M[i, j] = (y @ moe.W_o[j] if where == "output" else y).norm()
    for i in range(n):
        for j in range(n):
            if i != j:
                loss = loss + (M[i, j] - alpha * M[i, i]).clamp(min=0) + (M[j, i] - alpha * M[i, i]).clamp(min=0)
    return loss / n**2


@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("where", PARTS)
def test_a_probe_loss_equals_loops_in_value_and_gradients(where, alpha):
    """For two calls with noise of their own; the gradient reaches the matrices of that activation and no others; the
    value is the same under autocast."""
    model, loss = seeded(MoETransformer, small()), probe_loss(where, alpha, seed=7)
    for moe in model.moe_layers():
        moe.R.data *= 3  # so that silu is not just a half
    values = []
    for call in (1, 2):
        model.zero_grad()
        slow, noise = copy.deepcopy(model).double(), train.keyed_generator("cpu", 7, call, "erc")
        wanted = sum(probe_by_loops(moe, where, alpha, 2 * torch.rand(6, 16, generator=noise).double() - 1)
                     for moe in slow.moe_layers()) / 2
        values.append(loss(model))
        assert abs(values[-1] - wanted) < 1e-5 * wanted, f"call {call}: {values[-1]:.7f}, by loops {wanted:.7f}"
        values[-1].backward()
        wanted.backward()
        ours, theirs = ({name: p.grad for name, p in m.named_parameters() if p.grad is not None} for m in (model, slow))
        assert set(ours) == {f"blocks.{i}.moe.{part}" for i in (0, 1) for part in PARTS[where]}, set(ours)
        for name in ours:
            off = gap(ours[name], theirs.get(name, torch.zeros(()))) / theirs[name].abs().max().item()
            assert off < 1e-4, f"call {call}: gradient of {name} is off by {off:.1e} of its largest entry"
    assert values[0] != values[1], "two calls drew the same noise"
    with torch.autocast("cpu", torch.bfloat16):
        assert probe_loss(where, alpha, seed=7)(model) == values[0], "autocast has a say in it"


def test_the_probe_of_call_s_has_the_noise_of_step_s_of_the_trainer(data):
    """Where W_p equals W_g, the probe by W_p is the trainer's own ERC loss, step by step; and the global
    stream stays where it was."""
    run = train.Run(*run_settings(data, seed=3), None)
    for moe in run.model.moe_layers():
        moe.W_p.data = moe.W_g.data.clone()
    loss, state = probe_loss("up", seed=3), torch.get_rng_state()
    pairs = [(loss(run.model).item(), run.add_erc_gradient(step).item()) for step in (1, 2, 3)]
    assert all(abs(ours - theirs) < 1e-7 for ours, theirs in pairs), f"probe and trainer, by step: {pairs}"
    assert torch.equal(torch.get_rng_state(), state), "the global stream moved"


@pytest.mark.parametrize("where", PARTS)
def test_a_row_of_probe_norms_belongs_to_a_proxy_and_a_column_to_an_expert(where):
    """A proxy of zeros empties its row, an expert of zeros its column, and nothing else."""
    moe = seeded(MoE, small())
    R = moe.R.detach().clone()
    R[1] = 0
    moe.W_p.data[4] = 0
    empty = probe_norms(where, R, moe) == 0
    assert empty[1].all() and empty[:, 4].all() and empty.sum() == 11, empty.int().tolist()


def test_unknown_probes_are_refused():
    """At once, not at the first step."""
    with pytest.raises(ValueError, match='where must be "up", "swiglu" or "output", got \'gate\''):
        probe_loss("gate")


@pytest.mark.parametrize("extra_loss", [orthogonality, probe_loss("up"), probe_loss("swiglu"), probe_loss("output")])
def test_the_losses_fall_as_an_extra_loss_of_the_trainer(data, extra_loss):
    """Thirty steps with weight 10 in train.train."""
    config, moe = run_settings(data, steps=30, log_every=30, eval_every=0, lr=0.01)
    model, seen = seeded(MoETransformer, moe), []

    def weighted(model):
        seen.append(extra_loss(model))
        return 10 * seen[-1]

    train.train(config, model=model, extra_loss=weighted)
    assert len(seen) == 30 and seen[-1] < 0.5 * seen[0], f"{len(seen)} calls, from {seen[0]:.5f} to {seen[-1]:.5f}"


def test_centred_proxies_lie_where_the_tokens_are():
    """One layer, by loops: proxy i is the mean token, moved along R[i] - mean(R), shaken there as in step 1, by the
    tokens' distance from their mean. Evaluations leave what was seen alone; the gradient reaches R and W_g only."""
    model, loss = seeded(MoETransformer, small(n_layers=1)), CentredProbe(alpha=0.5, seed=3)
    (moe,), tokens, seen = model.moe_layers(), torch.randint(64, (2, 16)), []
    assert loss(model) == 0, "there were no tokens yet"
    moe.register_forward_pre_hook(lambda moe, args: seen.append(args[0].detach().flatten(0, 1).double()))
    model(tokens)
    with torch.no_grad():
        model(tokens.flip(1) * 0 + 5)
    value = loss(model)
    value.backward()

    x, R, W_g = seen[0], moe.R.detach().double(), moe.W_g.detach().double()
    mean, middle = x.mean(dim=0), R.mean(dim=0)
    distance = (sum((token - mean).norm() ** 2 for token in x) / len(x)).sqrt()
    u = 2 * torch.rand(6, 16, generator=train.keyed_generator("cpu", 3, 2, "erc")).double() - 1
    M, wanted = {}, 0
    for i in range(6):
        off = R[i] - middle
        epsilon = min((R[i] - R[j]).norm() for j in range(6) if j != i) / (2 * off.norm())
        proxy = mean + distance * off * (1 + epsilon * u[i]) / off.norm()
        M.update({(i, j): (proxy @ W_g[j]).norm() for j in range(6)})
    for i in range(6):
        for j in range(6):
            if i != j:
                wanted += (M[i, j] - 0.5 * M[i, i]).clamp(min=0) + (M[j, i] - 0.5 * M[i, i]).clamp(min=0)
    assert abs(value - wanted / 36) < 1e-5 * wanted / 36, f"{value:.6f}, by loops {wanted / 36:.6f}"
    touched = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched == {"blocks.0.moe.R", "blocks.0.moe.W_g"}, touched


# ---- The dense model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [small(), small(top_k=3, renormalize=True), MoEConfig()])
def test_a_dense_model_has_as_many_active_parameters(config):
    """But for the router: n * d numbers in each layer, and d of the one row that a single expert has."""
    active, (total, dense) = MoETransformer(config).num_params()[1], MoETransformer(dense_config(config)).num_params()
    routers = config.n_layers * config.d_model * (config.n_experts - 1)
    assert total == dense == active - routers, f"dense {total} and {dense}, active {active} with {routers} for routers"
