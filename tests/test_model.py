"""The model around the loss: what the file promises of routing, experts, attention, statistics and sampling.

References are loops over tokens, in float64, or arithmetic done by hand. Run: python -m pytest tests/test_model.py
"""

import ast
import copy
import inspect
import math
import re
import sys

import pytest
import torch
import torch.nn.functional as F

import erc_moe
from erc_moe import MoE, MoEConfig, MoETransformer, balance_loss


def small(**changes):
    """A configuration that runs in milliseconds, with weights so large that no difference hides below a tolerance."""
    sizes = dict(vocab_size=64, context_length=16, n_layers=2, n_heads=2, d_model=16, d_expert=24, n_experts=6, top_k=2,
                 init_std=0.25)
    return MoEConfig(**sizes | changes)


def model_and_tokens(rows=3, **changes):
    """A seeded model and as many tokens in a row as it takes."""
    torch.manual_seed(0)
    model = MoETransformer(small(**changes))
    return model, torch.randint(model.config.vocab_size, (rows, model.config.context_length))


def gap(ours, theirs):
    """Largest absolute difference of two tensors."""
    return (ours - theirs).abs().max().item()


# ---- The layer: routing, dispatch, experts ---------------------------------------------------------------------------


def moe_by_loops(moe, x):
    """One token at a time, one expert at a time: (output [N, d], balance, z, counts)."""
    n, K = moe.R.size(0), moe.top_k
    outputs, all_probs, logsumexps, counts = [], [], [], [0] * n
    for token in x.flatten(0, 1):
        logits = torch.stack([row @ token for row in moe.R])
        probs = logits.exp() / logits.exp().sum()
        best = sorted(range(n), key=lambda i: -probs[i].item())[:K]
        total = sum(probs[i] for i in best) if moe.renormalize else 1
        y = 0
        for i in best:
            counts[i] += 1
            gate, up = token @ moe.W_g[i], token @ moe.W_p[i]
            y = y + probs[i] / total * ((gate * gate.sigmoid() * up) @ moe.W_o[i])
        outputs.append(y)
        all_probs.append(probs)
        logsumexps.append(logits.exp().sum().log())
    share = [count / sum(counts) for count in counts]
    balance = n * sum(f * torch.stack(all_probs)[:, i].mean() for i, f in enumerate(share))
    return torch.stack(outputs), balance, torch.stack(logsumexps).square().mean(), counts


@pytest.mark.parametrize("routing", ["spread", "two experts empty", "same experts for all"])
@pytest.mark.parametrize("K, renormalize", [(1, False), (2, False), (2, True), (3, False), (3, True)])
def test_the_layer_equals_a_loop_over_tokens_in_output_and_all_gradients(K, renormalize, routing):
    """Sorting and grouped products change nothing. No token is dropped, and an expert without one gets gradient 0."""
    torch.manual_seed(K)
    moe = MoE(small(top_k=K, renormalize=renormalize))
    x = torch.randn(2, 9, 16)
    x[..., 0] = 1  # here a row of R can be raised or lowered for all tokens alike
    if routing == "two experts empty":
        moe.R.data[[0, 3], 0] -= 12
    elif routing == "same experts for all":
        moe.R.data[-K:, 0] += 6  # the last experts: their blocks of rows begin where empty blocks end
    slow = copy.deepcopy(moe).double()
    x, x_slow = x.requires_grad_(), x.detach().double().requires_grad_()

    y, stats = moe(x)
    y_slow, balance, z, counts = moe_by_loops(slow, x_slow)
    direction = torch.randn(2, 9, 16)
    ((y * direction).sum() + 3 * stats.balance + 2 * stats.z).backward()
    ((y_slow * direction.flatten(0, 1)).sum() + 3 * balance + 2 * z).backward()

    assert stats.load.tolist() == counts, f"rows per expert {stats.load.tolist()}, counted one by one {counts}"
    assert sum(counts) == 18 * K, f"{18 * K - sum(counts)} of {18 * K} rows were dropped"
    empty = {"spread": 0, "two experts empty": 2, "same experts for all": 6 - K}[routing]
    assert counts.count(0) >= empty, f"the case does not test what it says: {counts}"
    idle = max(moe.W_g.grad[stats.load == 0].abs().sum(), moe.W_o.grad[stats.load == 0].abs().sum())
    assert idle == 0, f"experts without a token got a gradient of {idle}"
    pairs = {"output": (y.flatten(0, 1), y_slow), "balance": (stats.balance, balance), "z": (stats.z, z),
             "gradient of x": (x.grad, x_slow.grad)}
    for name in ("R", "W_g", "W_p", "W_o"):
        pairs[f"gradient of {name}"] = getattr(moe, name).grad, getattr(slow, name).grad
    for name, (ours, theirs) in pairs.items():
        assert gap(ours, theirs) < 1e-5, f"{name} is off by {gap(ours, theirs):.1e} from the loop"


def test_two_equal_runs_are_equal_to_the_bit():
    """Nothing in forward or backward depends on the order in which threads finish."""
    model, tokens = model_and_tokens(rows=8)
    results = []
    for _ in range(2):
        model.zero_grad()
        out = model(tokens, tokens)
        (out.ce + out.balance + out.z).backward()
        results.append([out.logits, *(p.grad.clone() for p in model.parameters())])
    different = sum(not torch.equal(a, b) for a, b in zip(*results))
    assert different == 0, f"{different} of {len(results[0])} tensors differ between two equal runs"


def test_one_expert_is_a_dense_swiglu():
    """n = K = 1 is the dense model to the bit: its one routing weight is softmax of one number, exactly 1."""
    torch.manual_seed(0)
    moe, x = MoE(small(n_experts=1, top_k=1)), torch.randn(3, 11, 16)
    dense = (F.silu(x @ moe.W_g[0]) * (x @ moe.W_p[0])) @ moe.W_o[0]
    y, stats = moe(x)
    assert torch.equal(y, dense), f"differs from the dense layer by {gap(y, dense):.1e}"
    assert stats.balance == 1 and stats.load.tolist() == [33], f"balance {stats.balance}, load {stats.load.tolist()}"


def test_renormalised_weights_are_the_softmax_over_the_chosen_logits():
    """Dividing K probabilities by their sum is the same as a softmax over these K logits alone."""
    torch.manual_seed(0)
    moe, x = MoE(small(top_k=3, renormalize=True)), torch.randn(50, 16)
    logits, _, weights, experts = moe.route(x)
    wanted = logits.gather(1, experts).softmax(dim=-1)
    assert gap(weights, wanted) < 1e-6, f"off by {gap(weights, wanted):.1e}"


def test_with_top_k_1_the_cross_entropy_still_teaches_the_router():
    """The output carries the probability of its expert as a factor, so the gradient reaches R with K = 1 too."""
    model, tokens = model_and_tokens(top_k=1)
    model(tokens, tokens.roll(-1, dims=1)).ce.backward()
    norms = [moe.R.grad.norm().item() for moe in model.moe_layers()]
    assert min(norms) > 1e-4, f"gradient norms of R, layer by layer: {norms}"
    with pytest.raises(ValueError, match="renormalize with top_k 1"):  # would make that factor 1 and the gradient 0
        small(top_k=1, renormalize=True)


# ---- Statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [1, 2, 3, 8])
def test_the_balance_loss_is_one_when_every_expert_gets_the_same(K):
    """Whatever K is: shares of rows sum to 1. Tokens rank the experts cyclically, so that each expert gets K of 8."""
    moe = MoE(small(d_model=8, n_experts=8, top_k=K))
    moe.R.data = torch.eye(8)
    x = torch.stack([torch.arange(8.0).roll(shift) for shift in range(8)])[None]
    stats = moe(x)[1]
    assert stats.load.tolist() == [K] * 8, f"the case is not balanced: {stats.load.tolist()}"
    assert abs(stats.balance - 1) < 1e-6, f"balance {stats.balance:.6f} at K={K}"


def test_the_balance_loss_is_right_for_scores_that_do_not_sum_to_one():
    """A sigmoid router: equal scores are balanced at 1.0, and a common factor changes nothing."""
    scores = torch.rand(50, 6, generator=torch.Generator().manual_seed(0))
    load = torch.tensor([9, 1, 5, 5, 20, 10])
    assert balance_loss(torch.full((50, 6), 0.7), load).item() == pytest.approx(1), "equal scores"
    P = scores.double().sum(dim=0) / scores.double().sum()
    wanted = 6 * sum(f * p for f, p in zip((9, 1, 5, 5, 20, 10), P.tolist())) / 50
    found = balance_loss(scores, load).item(), balance_loss(scores / 7, load).item()
    assert found == pytest.approx((wanted, wanted)), f"{found}, by hand {wanted}"


def test_layers_are_averaged_after_their_balance_loss_not_pooled_before():
    """Two layers collapsed onto opposite halves of the experts are 2.0 each. Pooled, they would look balanced: 1.0."""
    model, tokens = model_and_tokens(n_experts=4)
    for half, block in enumerate(model.blocks):
        block.moe_norm.register_forward_hook(lambda module, inputs, output: torch.ones_like(output))
        block.moe.R.data.fill_(-1.0)[2 * half:2 * half + 2] = 1.0
    out = model(tokens)
    N = tokens.numel()
    assert out.load.tolist() == [[N, N, 0, 0], [0, 0, N, N]], f"the case is not as described: {out.load.tolist()}"
    assert abs(out.balance - 2) < 1e-6, f"balance {out.balance:.6f}"
    pooled = balance_loss(torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]), out.load.sum(dim=0))
    assert pooled == 1, f"pooled {pooled:.6f}"


def test_the_model_reports_the_mean_over_layers_and_every_row():
    """balance and z are means of what the layers report, load is all of it: N*K rows in each layer."""
    model, tokens = model_and_tokens(top_k=3, n_layers=3)
    seen = []
    for moe in model.moe_layers():
        moe.register_forward_hook(lambda module, inputs, output: seen.append(output[1]))
    out = model(tokens)
    for name in ("balance", "z"):
        mean = sum(getattr(stats, name).item() for stats in seen) / 3
        assert abs(getattr(out, name).item() - mean) < 1e-6, f"{name} {getattr(out, name)}, mean over layers {mean}"
    assert out.load.tolist() == [stats.load.tolist() for stats in seen], "load is not what the layers counted"
    assert out.load.sum(dim=1).tolist() == [3 * tokens.numel()] * 3, f"rows per layer {out.load.sum(dim=1).tolist()}"


def test_ce_is_the_mean_of_minus_log_p_over_the_targets_that_count():
    """Pure cross-entropy: no other loss is in it, and targets of -100 are neither in the sum nor in the count."""
    model, tokens = model_and_tokens()
    targets = tokens.roll(-1, dims=1)
    targets[:, -5:] = -100
    out = model(tokens, targets)
    log_p = out.logits.double().log_softmax(dim=-1)
    wanted = -sum(log_p[b, t, targets[b, t]] for b in range(3) for t in range(11)) / 33
    assert abs(out.ce - wanted) < 1e-6, f"ce {out.ce:.7f}, by hand {wanted:.7f}"
    assert model(tokens).ce is None, "without targets there is no cross-entropy"


def test_a_forward_pass_leaves_nothing_behind():
    """Losses are returned, not stored: no module gains, loses or replaces an attribute, nor does the file."""
    def everything(model):
        held = {f"{name}.{key}": value for name, module in model.named_modules() for key, value in vars(module).items()
                if key not in ("_parameters", "_buffers", "_modules")}
        held |= dict(model.named_parameters()) | dict(model.named_buffers())
        held |= {name: value for name, value in vars(erc_moe).items() if not name.startswith("__")}
        return {name: (id(value), getattr(value, "_version", 0)) for name, value in held.items()}

    (model, tokens), (other, _) = model_and_tokens(), model_and_tokens(n_experts=3)
    before, first = everything(model), model(tokens, tokens)
    other(tokens.flip(1), tokens).ce.backward()
    second = model(tokens, tokens)
    changed = {name for name, value in everything(model).items() if before.get(name) != value}
    assert not changed and len(before) == len(everything(model)), f"changed by a forward pass: {changed}"
    for name, a, b in zip(first._fields, first, second):
        assert torch.equal(a, b), f"{name} changed after another model ran"


# ---- The transformer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("qk_norm", [True, False])
def test_attention_equals_a_loop_over_positions(qk_norm):
    """Queries and keys normalised before the split into heads, RoPE as a turn of complex numbers, no key from later."""
    torch.manual_seed(0)
    T, d, H, width = 7, 24, 3, 8
    model = MoETransformer(small(d_model=d, n_heads=H, rope_theta=50.0, norm_eps=0.1, qk_norm=qk_norm)).double()
    attention, x = model.blocks[0].attention, torch.randn(1, T, d).double()

    def heads(linear, norm=None):
        y = x[0] @ linear.weight.T
        if qk_norm and norm:
            norm.weight.data.uniform_(0.5, 1.5)
            y = y / (y.square().mean(dim=1, keepdim=True) + 0.1).sqrt() * norm.weight
        return y.split(width, dim=1)

    def turned(head, t):  # feature k goes with feature k + 4, by t * 50^(-2k/8)
        angle = t * 50 ** (-torch.arange(4).double() / 4)
        return torch.complex(head[t, :4], head[t, 4:]) * torch.polar(torch.ones(4).double(), angle)

    parts = []
    for q, k, v in zip(heads(attention.q, attention.q_norm), heads(attention.k, attention.k_norm), heads(attention.v)):
        rows = []
        for t in range(T):
            scores = [(turned(q, t) * turned(k, s).conj()).real.sum() / width**0.5 for s in range(t + 1)]
            rows.append(torch.stack(scores).softmax(dim=0) @ v[:t + 1])
        parts.append(torch.stack(rows))
    wanted = torch.cat(parts, dim=1) @ attention.o.weight.T
    difference = gap(attention(x, model.cos[:T], model.sin[:T])[0], wanted)
    assert difference < 1e-6, f"off by {difference:.1e} from the loop"


def test_no_logit_depends_on_a_later_token():
    """Causality, through attention and through the experts: who else goes to my expert is not my business."""
    model, tokens = model_and_tokens()
    changed = tokens.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 64
    before, after = model(tokens).logits, model(changed).logits
    assert gap(before[:, :9], after[:, :9]) < 1e-6, f"earlier logits moved by {gap(before[:, :9], after[:, :9]):.1e}"
    assert gap(before[:, 9:], after[:, 9:]) > 1e-2, "the changed tokens changed nothing: this test is blind"


def test_rows_of_a_batch_do_not_see_each_other():
    """A row's logits are the same alone as in company; a capacity limit would make neighbours compete."""
    model, tokens = model_and_tokens(rows=8)
    together, alone = model(tokens).logits, torch.cat([model(row[None]).logits for row in tokens])
    assert gap(together, alone) < 1e-6, f"company changes logits by {gap(together, alone):.1e}"


def test_parameters_counted_by_hand():
    """Total and active; with K = n every parameter is active."""
    # Embedding and head 2*64*16, final norm 16; a layer: attention 4*16*16, norms 4*16, R 6*16, experts 6 * 3*16*24.
    total = 2 * 64 * 16 + 16 + 2 * (4 * 16 * 16 + 4 * 16 + 6 * 16 + 6 * 3 * 16 * 24)
    assert total == 18256
    counted = MoETransformer(small()).num_params()
    assert counted == (18256, 18256 - 2 * 4 * 1152), f"counted {counted}"
    # One matrix for embedding and head, no norms of q and k, one layer of 4 experts, of which one is used.
    total = 32 * 8 + 8 + (4 * 8 * 8 + 2 * 8 + 4 * 8 + 4 * 3 * 8 * 16)
    assert total == 2104
    config = MoEConfig(32, 4, 1, 1, 8, 16, 4, 1, qk_norm=False, tie_embeddings=True)
    counted = MoETransformer(config).num_params()
    assert counted == (2104, 2104 - 3 * 384), f"counted {counted}"
    total, active = MoETransformer(small(top_k=6)).num_params()
    assert total == active, f"K = n, but {active} of {total} active"


@pytest.mark.parametrize("std", [0.02, 0.1])
def test_every_matrix_starts_at_the_stated_scale(std):
    """init_std, over sqrt(2L) where it adds to the residual stream. No parameter is forgotten; experts start different.
    """
    torch.manual_seed(0)
    L, V = 3, 512
    model = MoETransformer(small(vocab_size=V, n_layers=L, d_model=128, d_expert=64, n_experts=32, init_std=std))
    residual = std * (2 * L) ** -0.5
    stated = {"R": std, "W_g": std, "W_p": std, "W_o": residual, "o.weight": residual, "q.weight": std,
              "k.weight": std, "v.weight": std, "embedding.weight": 0.02, "head.weight": 0.02}
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all(), f"{name} does not start at 1"
            continue
        expected = next(value for end, value in stated.items() if name.endswith(end))
        ratio = parameter.std().item() / expected
        assert 0.95 < ratio < 1.05, f"{name} starts at {ratio:.3f} of the stated {expected:.4f}"
        assert parameter.flatten(1).unique(dim=0).size(0) == parameter.size(0), f"{name} has equal rows or experts"
    tokens = torch.randint(V, (8, 16))
    ce = model(tokens, torch.randint(V, (8, 16))).ce.item()
    assert abs(ce - math.log(V)) < 0.1, f"an untrained model should know nothing: ce {ce:.3f}, ln V {math.log(V):.3f}"


# ---- Lower precision, compilation ------------------------------------------------------------------------------------


def test_bfloat16_does_not_change_who_is_chosen():
    """Routing stays in float32: for the same input the same experts are chosen, where bf16 logits would tie."""
    torch.manual_seed(0)
    moe, x = MoE(small(d_model=64, d_expert=64, n_experts=32)), torch.randn(4, 512, 64)
    y, stats = moe(x)
    with torch.autocast("cpu", torch.bfloat16):
        y_low, stats_low = moe(x)
        routed_low = moe.route(x.flatten(0, 1))
    for name, a, b in zip(("logits", "probs", "weights", "experts"), moe.route(x.flatten(0, 1)), routed_low):
        assert torch.equal(a, b), f"{name} of routing: {(a != b).float().mean():.2%} of entries differ under autocast"
    assert stats_low.load.tolist() == stats.load.tolist(), "experts got other rows under autocast"
    error = ((y_low - y).norm() / y.norm()).item()
    assert 1e-4 < error < 0.01, f"output is off by {error:.2%}: below 1e-4, the experts were not in bfloat16"


def test_a_layer_in_bfloat16_works():
    """Parameters and input in bf16: output in bf16, the choice of experts that of float32 on the same numbers."""
    torch.manual_seed(0)
    moe, x = MoE(small(d_model=64, n_experts=32)).bfloat16(), torch.randn(4, 512, 64).bfloat16()
    wide = copy.deepcopy(moe).float()
    y, stats = moe(x)
    y.sum().backward()
    y_wide, stats_wide = wide(x.float())
    moved = (stats.load - stats_wide.load).abs().sum() // 2
    assert y.dtype == torch.bfloat16 and moved == 0, f"output in {y.dtype}, {moved} of 4096 rows at other experts"
    error = ((y - y_wide).norm() / y_wide.norm()).item()
    assert error < 0.01, f"output is off by {error:.2%}"
    assert all(p.grad.isfinite().all() for p in moe.parameters()), "gradients are not finite"


def test_no_shape_and_no_decision_waits_for_a_value():
    """Forward and backward run on tensors without content, where reading a value is an error: no item(), no bincount,
    no masks, so that on a GPU nothing waits."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        model, tokens = model_and_tokens()
        out = model(tokens, tokens)
        (out.ce + out.balance + out.z).backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert out.load.shape == (2, 6) and not missing, f"load {list(out.load.shape)}, without gradient: {missing}"


def test_compiled_once_for_every_routing():
    """No shape depends on where tokens go: one graph without a break serves all routings, and gives the same loss."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model, _ = model_and_tokens()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=False)  # fullgraph: a break is an error
    loads = set()
    for seed in range(5):
        tokens = torch.randint(64, (3, 16), generator=torch.Generator().manual_seed(seed))
        with torch.autocast("cpu", torch.bfloat16):
            ours, eager = compiled(tokens, tokens), model(tokens, tokens)
        ours.ce.backward()
        difference = abs(ours.ce - eager.ce).item()
        assert difference < 1e-3, f"compiled ce {ours.ce:.5f}, eager {eager.ce:.5f}"
        assert torch.equal(ours.load, eager.load), "compiled and eager choose other experts"
        loads.add(str(ours.load.tolist()))
    assert len(loads) == 5, f"only {len(loads)} different routings: this test is blind"
    assert counter.frame_count == 1, f"{counter.frame_count} graphs for 5 routings"


# ---- Sampling --------------------------------------------------------------------------------------------------------


def test_greedy_sampling_is_the_argmax_step_by_step():
    """Also beyond context_length, where the model sees the last tokens only."""
    model, tokens = model_and_tokens()
    wanted = tokens[:, :10]
    for _ in range(12):  # from 10 tokens to 22, past the 16 of the context
        wanted = torch.cat((wanted, model(wanted[:, -16:]).logits[:, -1].argmax(dim=-1, keepdim=True)), dim=1)
    assert torch.equal(model.generate(tokens[:, :10], 12, temperature=0), wanted), "not the likeliest tokens"
    with pytest.raises(ValueError, match="17 tokens is longer than context_length 16"):
        model(wanted[:, :17])


def test_sampling_is_as_likely_as_the_model_says():
    """Frequencies over 4000 draws follow softmax(logits / temperature) over the first vocab_size ids."""
    model, tokens = model_and_tokens()
    model.head.weight.data *= 20  # far from uniform
    drawn = model.generate(tokens[:1].repeat(4000, 1), 1, 0.7, torch.Generator().manual_seed(0), vocab_size=40)[:, -1]
    frequency = drawn.bincount(minlength=40) / 4000
    assert len(frequency) == 40, f"drew {len(frequency) - 1}, of 40 ids that exist"
    wanted = (model(tokens[:1]).logits[0, -1, :40] / 0.7).softmax(dim=0)
    assert gap(frequency, wanted) < 0.03, f"frequencies off by {gap(frequency, wanted):.3f}"  # 4 sigma at most


def test_sampling_stops_when_every_row_has_drawn_stop():
    """One row stops at its first token and one at its third: three tokens, not one, not eight."""
    model, tokens = model_and_tokens(rows=2)
    script = iter([[7, 3], [5, 3], [5, 7], [5, 5]])
    model.head.register_forward_hook(
        lambda module, inputs, logits: F.one_hot(torch.tensor(next(script)), 64)[:, None].expand_as(logits) * 1e4)
    new = model.generate(tokens, 8, stop=7)[:, 16:]
    assert new.tolist() == [[7, 5, 5], [3, 3, 7]], f"drew {new.tolist()}"


def test_the_same_generator_seed_gives_the_same_text():
    """And leaves torch's global stream alone, so that a sample on the way does not change a training run."""
    model, tokens = model_and_tokens()
    state = torch.get_rng_state()
    texts = [model.generate(tokens, 20, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(texts[0], texts[1]), "the same seed gave two texts"
    assert not torch.equal(texts[0], texts[2]), "two seeds gave the same text"
    assert torch.equal(torch.get_rng_state(), state), "the global stream moved"


# ---- The file keeps its word -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, message", [
    (dict(d_model=124, n_heads=1), "d_model 124 and d_expert 24 must be multiples of 8"),
    (dict(d_expert=3), "d_model 16 and d_expert 3 must be multiples of 8"),
    (dict(d_model=24, n_heads=8), "d_model 24 does not split into 8 heads of even width"),
    (dict(top_k=7), "top_k must be from 1 to n_experts 6, got 7"),
    (dict(top_k=0), "top_k must be from 1 to n_experts 6, got 0"),
])
def test_shapes_that_cannot_work_are_refused_with_the_numbers(changes, message):
    """At construction, not in the middle of a product."""
    with pytest.raises(ValueError, match=re.escape(message)):
        small(**changes)


def shape_comments():
    """{line number: (assigned names or None for a return, claimed shapes)} for each statement of erc_moe.py that ends
    in a comment like # (N, K), (N, K) or # (n, n, D) -> (n, n) or # (B, T, d) each."""
    source = inspect.getsource(erc_moe)
    claims = {}
    for node in ast.walk(ast.parse(source)):
        line = source.splitlines()[getattr(node, "end_lineno", 1) - 1]
        comment = line[line.rindex("# ") + 2:] if "  # " in line else ""
        if isinstance(node, (ast.Assign, ast.Return)) and comment.startswith("("):
            comment = re.sub(r"\([^()]*\) (->|\+) ", "", comment)  # of (n, n, D) -> (n, n), the last one counts
            shapes = re.findall(r"\([^()]*\)", comment)
            target = node.targets[0] if isinstance(node, ast.Assign) else None
            names = [name.id for name in getattr(target, "elts", [target])] if target else None
            if re.search(r"\) each", comment):
                shapes = shapes[:1] * (len(names) if names else 2)
            claims[node.end_lineno] = names, shapes
    return claims


def test_every_shape_comment_is_true():
    """Runs the file with a different size for every letter, and compares each commented line with what it assigned."""
    size = dict(B=4, T=5, N=20, V=11, L=2, H=3, n=7, K=6, d=48, D=24)  # d/H = 16, d/H/2 = 8: all different
    config = MoEConfig(size["V"], size["T"], size["L"], size["H"], size["d"], size["D"], size["n"], size["K"])
    claims, seen, wrong, previous = shape_comments(), set(), [], {}

    def check(frame, event, result):
        line = previous.pop(frame, None)  # a line is announced before it runs, so look at the one before
        if line in claims and event in ("line", "return"):
            names, shapes = claims[line]
            values = [frame.f_locals[name] for name in names] if names else result
            values = values if isinstance(values, (list, tuple)) else [values]
            found = [tuple(value.shape) for value in values]
            seen.add(line)
            if found != [eval(shape, dict(size)) for shape in shapes]:
                wrong.append(f"line {line} claims {shapes}, but has {found}")
        previous[frame] = frame.f_lineno
        return check

    def trace(frame, event, result):
        inside = frame.f_code.co_filename == erc_moe.__file__ and not frame.f_code.co_name.startswith("<")
        return check(frame, event, result) if inside else None

    torch.manual_seed(0)
    tokens = torch.randint(size["V"], (size["B"], size["T"]))
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        model = MoETransformer(config)
        output = model(tokens, tokens)
        model.erc_loss()
        M = erc_moe.activation_norms(model.moe_layers()[0].R, model.moe_layers()[0].W_g)
        erc_moe.coupling_report(M)
        erc_moe.heat_map(M)
        for temperature in (0, 1.0):
            model.generate(tokens, 1, temperature, stop=0)
        x, stats = model.blocks[0](torch.randn(4, size["T"], 48), model.cos, model.sin)
    finally:
        sys.settrace(before)

    for fields in (stats, output):  # the comments in the two named tuples: "scalar, ..." or a shape
        for name, comment in re.findall(r"(\w+): torch.Tensor.*  # (.*)", inspect.getsource(type(fields))):
            claim = () if comment.startswith("scalar") else eval(re.match(r"\(.*?\)", comment)[0], dict(size))
            if getattr(fields, name).shape != claim:
                wrong.append(f"{type(fields).__name__}.{name} claims {claim}, is {list(getattr(fields, name).shape)}")
    assert not wrong, "; ".join(wrong)
    assert x.shape == (4, size["T"], 48), f"a block should return [B, T, d], returned {list(x.shape)}"
    never = set(claims) - seen
    assert not never and len(seen) > 40, f"{len(seen)} checked; never ran: lines {sorted(never)}"
