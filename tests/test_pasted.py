"""The loss pasted into other people's programs: the README's table, its question to a layer, its pitfalls."""

import re
import types
from pathlib import Path

import pytest
import torch
from check_layer import check_layer
from test_erc import seeded, weights
from torch import nn
from torch.utils.checkpoint import checkpoint

import erc_moe

README = Path(erc_moe.__file__).with_name("README.md").read_text(encoding="utf-8").partition("## Use it in your")[2]
n, d, D = 4, 32, 16


def paste(note, names):
    """Runs the Python block that stands under this note of the README."""
    (block,) = re.findall(rf"<!-- {note} -->\n```python\n(.*?)```", README, re.DOTALL)
    exec(block, names)


def row(start):
    """The expressions in the second column of a row of its table."""
    (line,) = [line for line in README.splitlines() if line.startswith(f"| {start}")]
    return re.findall("`(.*?)`", line.split("|")[2])


def test_each_row_of_the_table_gives_the_gate_matrices():
    """From W, stored as the first column says, the expression in the second makes W_g, or R."""
    R, W_g, W_p = torch.randn(n, d), torch.randn(n, d, D), torch.randn(n, d, D)
    gate, up = W_g.mT, W_p.mT
    experts = [types.SimpleNamespace(gate_proj=types.SimpleNamespace(weight=W)) for W in gate]
    for start, stored in {
        "router [d, n]": [R.T], "a list": [None], "[n, D, d]": [gate, W_g],
        "gate and up fused, [n, 2D, d]": [torch.cat((gate, up), dim=1), torch.stack((gate, up), dim=2).flatten(1, 2)],
        "gate and up fused, [n, d, 2D]": [torch.cat((W_g, W_p), dim=2), torch.stack((W_g, W_p), dim=3).flatten(2, 3)],
        "flat": [gate.reshape(n * D, d), W_g.reshape(n * d, D)],
    }.items():
        for W, expression in zip(stored, row(start), strict=True):
            found = eval(expression, dict(torch=torch, W=W, experts=experts, n=n, d=d, D=D))
            assert torch.equal(found, R if "router" in start else W_g), f"{start}: {expression}"


class Own(nn.Module):
    """A layer of n experts of width D = d, which says its router logits and activations where OLMoE does."""

    def __init__(self, scaled=False, capacity=99, shift=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.R, self.both = nn.Parameter(torch.randn(n, d)), nn.Parameter(torch.randn(n, d, 2 * d))  # gates, then ups
        self.gate, self.experts = nn.Identity(), nn.ModuleDict(dict(act_fn=nn.Identity()))
        self.scaled, self.capacity, self.shift = scaled, capacity, shift

    def forward(self, x):
        x = x.reshape(-1, d)
        score, expert = self.gate((0.5 * x @ self.R.T + self.shift,))[0].topk(2)
        for j in range(n):
            token, place = (expert == j).nonzero()[:self.capacity].T
            rows = x[token] * (score[token, place, None].sigmoid() if self.scaled else 1)
            self.experts.act_fn(torch.cat((rows, rows.new_zeros(3, d))) @ self.both[j, :, :d])  # 3 empty places


def question(R=lambda R: R, W_g=lambda both: both[..., :d], shape=(2, 20, d), dtype=torch.float32, **options):
    """The README's question, its names. R and W_g: functions of a layer's R [n, d], and of gates and ups [n, d, 2d]."""
    layer, x = Own(**options).to(dtype), torch.randn(shape, generator=seeded(0)).to(dtype)
    names = dict(check_layer=check_layer, K=2, layer=layer, x=x, R=R(layer.R), W_g=W_g(layer.both))
    paste("needs a layer", names)
    return names


@pytest.mark.parametrize("case", [{}, dict(scaled=True), dict(capacity=4), dict(shift=3.0), dict(shape=(40, d)), dict(
    dtype=torch.bfloat16), dict(dtype=torch.bfloat16, scaled=True, capacity=4)], ids=str)
def test_the_question_accepts_what_is_right(case):
    """Tokens scaled by their score, dropped tokens, shifted scores, x [N, d], bfloat16; and each under autocast."""
    question(**case)
    with torch.autocast("cpu", torch.bfloat16):
        question(**case)


@pytest.mark.parametrize("said, wrong", [
    ("rows", dict(W_g=lambda both: both[..., d:])), ("rows", dict(W_g=lambda both: both[..., ::2])),
    ("rows", dict(W_g=lambda both: both[..., :d].mT)),                                  # no transpose, where D = d
    ("rows", dict(W_g=lambda both: both[..., :d].reshape(d, n, d).transpose(0, 1))),    # a wrong view of flat weights
    ("rows", dict(W_g=lambda both: torch.cat((both[:1, :, d:], both[1:, :, :d])))),     # one of n is wrong
    ("order", dict(W_g=lambda both: both[[1, 0, 2, 3], :, :d])),                        # two are swapped
    ("scores", dict(R=lambda R: R.flip(0))), ("scores", dict(R=lambda R: 0 * R)),
    ("scores", dict(R=lambda R: R * torch.tensor([[1.0], [2.0], [0.5], [1.0]]))),       # what a cosine router does
], ids="up-half pairs-for-halves transpose view one swapped reversed zero cosine".split())
def test_the_question_rejects_what_is_wrong(said, wrong):
    """Other matrices, layouts and orders, another R or none: it says which of its three questions got a no."""
    with pytest.raises(AssertionError, match=said):
        question(**wrong)


def test_the_question_needs_a_token_for_each_expert_and_the_lists_of_one_run():
    """Few tokens, nothing recorded, gate and up together, two runs, another K are told apart; tensors will do."""
    R, W_g, x, scores, seen = map(question().get, ("R", "W_g", "x", "scores", "seen"))
    check_layer(R, W_g, x, scores[0], torch.cat(seen), 2)
    for said, *records in [("wide", [], seen, 2), ("wide", scores, [rows.repeat(1, 2) for rows in seen], 2),
                           ("80 .* for 40", 2 * scores, seen, 2), ("each sees one", scores, seen[1:], 2),
                           *(("K is wrong .2", scores, seen, K) for K in (1, 3, 99))]:
        with pytest.raises(AssertionError, match=said):
            check_layer(R, W_g, x, *records)


def gradients(loss):
    """Of a loss with the same noise at every call, in R and in W_g."""
    layer = weights(dtype=torch.float64, grad=True)
    return torch.autograd.grad(loss(*layer, 1.0, seeded()), layer)


def test_checkpointing_around_the_loss_draws_other_noise_in_the_backward_pass():
    """A pitfall: with a generator, the gradient of R is off by more than half."""
    right = gradients(erc_moe.erc_loss)
    again = gradients(lambda *inputs: checkpoint(erc_moe.erc_loss, *inputs, use_reentrant=False))
    off = (again[0] - right[0]).norm() / right[0].norm()
    assert off > 0.5, f"off by {off:.0%} only: the README says about 80%"


def test_a_router_of_zeros_looks_coupled():
    """A pitfall: loss 0, violated 0, no gradient; a coupling of 0 gives it away."""
    R, W_g = torch.zeros(n, d, requires_grad=True), torch.randn(n, d, D, requires_grad=True)
    loss = erc_moe.erc_loss(R, W_g)
    found = [loss, *torch.autograd.grad(loss, (R, W_g)), *erc_moe.coupling_report(erc_moe.activation_norms(R, W_g))]
    assert not any(value.any() for value in found), found


@pytest.mark.slow
def test_compiled_it_has_the_same_gradient():
    """torch.compile of the loss: with a generator; with fullgraph=True without one; the two together are refused."""
    loss, whole = erc_moe.erc_loss, torch.compile(erc_moe.erc_loss, fullgraph=True, options={"fallback_random": True})
    with pytest.raises(Exception, match="(?i)generator"):
        gradients(whole)
    drawn = lambda f: torch.manual_seed(0) and gradients(lambda R, W_g, alpha, _: f(R, W_g, alpha))
    for one, other in (*zip(gradients(torch.compile(loss)), gradients(loss)), *zip(drawn(whole), drawn(loss))):
        assert torch.allclose(one, other, rtol=1e-10), f"off by {(one - other).abs().max():.1e}"
