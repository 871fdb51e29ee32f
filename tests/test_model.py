"""The model around the loss: what the file promises of routing, experts, statistics, precision and sampling.

References are loops over tokens, in float64, or arithmetic done by hand. Attention and the whole of the model are
compared with Hugging Face's in test_olmoe.py, and compiled in test_gpu.py.
"""

import copy

import pytest
import torch
import torch.nn.functional as F

from erc_moe import MoE, MoEConfig, MoETransformer


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
@pytest.mark.parametrize("K, renormalize", [(1, False), (2, True), (3, False)])
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
    empty = {"spread": 0, "two experts empty": 2, "same experts for all": 6 - K}[routing]
    assert counts.count(0) >= empty, f"the case does not test what it says: {counts}"
    pairs = {"output": (y.flatten(0, 1), y_slow), "balance": (stats.balance, balance), "z": (stats.z, z),
             "gradient of x": (x.grad, x_slow.grad)}
    pairs |= {name: (p.grad, slow.get_parameter(name).grad) for name, p in moe.named_parameters()}
    for name, (ours, theirs) in pairs.items():
        assert gap(ours, theirs) < 1e-5, f"{name} is off by {gap(ours, theirs):.1e} from the loop"


def test_the_model_reports_the_mean_over_layers_and_every_row():
    """balance and z are means of what the layers report, load is all of it: N*K rows in each layer."""
    (model, tokens), seen = model_and_tokens(top_k=3, n_layers=3), []
    for moe in model.moe_layers():
        moe.register_forward_hook(lambda module, inputs, output: seen.append(output[1]))
    out = model(tokens)
    balance, z, load = zip(*seen)
    for ours, of_layers in (out.balance, balance), (out.z, z):
        assert gap(ours, torch.stack(of_layers).mean()) < 1e-6, f"{ours}, mean over layers of {of_layers}"
    assert torch.equal(out.load, torch.stack(load)), "load is not what the layers counted"
    assert out.load.sum(dim=1).tolist() == [3 * tokens.numel()] * 3, f"rows per layer {out.load.sum(dim=1).tolist()}"


def test_parameters_counted_by_hand():
    """Total and active; with K = n every parameter is active."""
    # Embedding and head 2*64*16, final norm 16; a layer: attention 4*16*16, norms 4*16, R 6*16, experts 6 * 3*16*24.
    total = 2 * 64 * 16 + 16 + 2 * (4 * 16 * 16 + 4 * 16 + 6 * 16 + 6 * 3 * 16 * 24)
    counted = [MoETransformer(small(top_k=K)).num_params() for K in (2, 6)]
    assert counted == [(total, total - 2 * 4 * 3 * 16 * 24), (total, total)], f"counted {counted}, by hand {total}"
    config = small(qk_norm=False, tie_embeddings=True)  # without one matrix of 64*16, and two norms of 16 in each layer
    assert MoETransformer(config).num_params()[0] == total - 64 * 16 - 2 * 2 * 16


def test_every_matrix_starts_at_the_stated_scale():
    """init_std, over sqrt(2L) where it adds to the residual stream; none is forgotten, and experts start different."""
    torch.manual_seed(0)
    model = MoETransformer(small(vocab_size=512, n_layers=3, d_model=128, d_expert=64, n_experts=32, init_std=0.1))
    stated = {"embedding.weight": 0.02, "head.weight": 0.02, "W_o": 0.1 * 6**-0.5, ".o.weight": 0.1 * 6**-0.5, "": 0.1}
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all(), f"{name} does not start at 1"
            continue
        ratio = parameter.std().item() / next(value for end, value in stated.items() if name.endswith(end))
        assert 0.95 < ratio < 1.05, f"{name} starts at {ratio:.3f} of the stated standard deviation"
        assert parameter.flatten(1).unique(dim=0).size(0) == parameter.size(0), f"{name} has equal rows or experts"


def test_bfloat16_does_not_change_who_is_chosen():
    """Routing stays in float32, where bf16 logits would tie: under autocast, and in a layer of bfloat16 weights."""
    torch.manual_seed(0)
    moe, x = MoE(small(d_model=64, d_expert=64, n_experts=32)), torch.randn(4, 512, 64)
    half = copy.deepcopy(moe).bfloat16()
    rounded = copy.deepcopy(half).float()
    for name, ours, exact, given in (("autocast", moe, moe, x), ("bf16", half, rounded, x.bfloat16())):
        with torch.autocast("cpu", torch.bfloat16, enabled=name == "autocast"):
            y, stats = ours(given)
            routed = ours.route(given.flatten(0, 1))
        y_exact, stats_exact = exact(given.float())
        for low, wanted in zip(routed, exact.route(given.float().flatten(0, 1))):
            assert torch.equal(low, wanted), f"{name}: {(low != wanted).float().mean():.2%} of the routing differs"
        assert stats.load.tolist() == stats_exact.load.tolist(), f"{name}: experts got other rows"
        error = ((y - y_exact).norm() / y_exact.norm()).item()
        assert 1e-4 < error < 0.01, f"{name}: output is off by {error:.2%}; below 0.01 % it was not in bfloat16"


def test_greedy_sampling_is_the_argmax_step_by_step():
    """Also beyond context_length, where the model sees the last tokens only."""
    model, tokens = model_and_tokens()
    wanted = tokens[:, :10]
    for _ in range(12):  # from 10 tokens to 22, past the 16 of the context
        wanted = torch.cat((wanted, model(wanted[:, -16:]).logits[:, -1].argmax(dim=-1, keepdim=True)), dim=1)
    assert torch.equal(model.generate(tokens[:, :10], 12, temperature=0), wanted), "not the likeliest tokens"
    with pytest.raises(ValueError, match="17 tokens is longer than context_length 16"):
        model(wanted[:, :17])


def test_sampling_is_as_likely_as_the_model_says_and_has_a_stream_of_its_own():
    """Frequencies over 4000 draws follow softmax(logits / temperature); torch's global stream is left alone."""
    model, tokens = model_and_tokens()
    model.head.weight.data *= 20  # far from uniform
    state, rows = torch.get_rng_state(), tokens[:1].repeat(4000, 1)
    drawn, again, other = (model.generate(rows, 1, 0.7, torch.Generator().manual_seed(seed), vocab_size=40)[:, -1]
                           for seed in (0, 0, 1))
    assert torch.equal(drawn, again) and not torch.equal(drawn, other)
    assert torch.equal(torch.get_rng_state(), state), "the global stream moved"
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


@pytest.mark.parametrize("changes, message", [
    (dict(d_model=124, n_heads=1), "d_model 124 and d_expert 24 must be multiples of 8"),
    (dict(d_expert=12), "d_model 16 and d_expert 12 must be multiples of 8"),
    (dict(d_model=24, n_heads=8), "d_model 24 does not split into 8 heads of even width"),
    (dict(top_k=7), "top_k must be at most n_experts 6, got 7"),
    (dict(top_k=1, renormalize=True), "renormalize with top_k 1"),
    *((dict([change]), "{} must be at least .* got {}".format(*change)) for change in (
        ("n_layers", 0), ("norm_eps", -1.0), ("init_std", float("nan")), ("rope_theta", float("inf")))),
], ids=str)
def test_shapes_that_cannot_work_are_refused_with_the_numbers(changes, message):
    """At construction, not in the middle of a product: one line with the name and the value of what is wrong."""
    with pytest.raises(ValueError, match=f"^{message}"):
        small(**changes)
