"""The loss pasted into other people's programs: the table of layouts, the question to a layer, the pitfalls."""

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

ROOT = Path(erc_moe.__file__).parent
PAGES = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "experiments/pasting.md"))
n, d, D = 4, 32, 16


def paste(note, names):
    """Runs the Python block that stands under this note of the README or of pasting.md."""
    (block,) = re.findall(rf"<!-- {note} -->\n```python\n(.*?)```", PAGES, re.DOTALL)
    exec(block, names)


def row(start):
    """The expressions in the second column of a row of the table, or in a point of the list."""
    (cell,) = re.findall(rf"(?s)\n(?:\| {re.escape(start)}.*?\||\* \*\*{start})(.*?)\n(?=[|*\n])", PAGES)
    return re.findall("`(.*?)`", cell)


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
    """A layer of n experts of width D = d, which says its router logits and activations where OLMoE does. An odd one
    shifts its logits, scales tokens by their score, and drops those beyond 4 an expert.
    """

    def __init__(self, odd):
        super().__init__()
        torch.manual_seed(0)
        self.R, self.both = nn.Parameter(torch.randn(n, d)), nn.Parameter(torch.randn(n, d, 2 * d))  # gates, then ups
        self.gate, self.experts, self.odd = nn.Identity(), nn.ModuleDict(dict(act_fn=nn.Identity())), odd

    def forward(self, x):
        x = x.reshape(-1, d)
        score, expert = self.gate((0.5 * x @ self.R.T + 3 * self.odd,))[0].topk(2)
        for j in range(n):
            token, place = (expert == j).nonzero()[:4 if self.odd else 99].T
            rows = x[token] * (score[token, place, None].sigmoid() if self.odd else 1)
            self.experts.act_fn(torch.cat((rows, rows.new_zeros(3, d))) @ self.both[j, :, :d])  # 3 empty places


def question(odd=False, dtype=torch.float32):
    """Asks a layer the README's question -> what check_layer was given, by name, and the layer."""
    layer, x = Own(odd).to(dtype), torch.randn((40, d) if odd else (2, 20, d), generator=seeded(0)).to(dtype)
    names = dict(check_layer=check_layer, K=2, layer=layer, x=x, R=layer.R, W_g=layer.both[..., :d])
    paste("needs a layer", names)
    return {name: names[name] for name in ("R", "W_g", "x", "scores", "seen", "K")}, layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("odd", [False, True])
def test_the_question_accepts_what_is_right(odd, dtype):
    """All that is odd at once, x [N, d], bfloat16; and each under autocast."""
    question(odd, dtype)
    with torch.autocast("cpu", torch.bfloat16):
        question(odd, dtype)


@pytest.mark.parametrize("said, wrong", [  # a word of the message; what is wrong, made of gates and ups, R and records
    ("rows", lambda both, **_: dict(W_g=both[..., d:])),                                # the ups
    ("rows", lambda both, **_: dict(W_g=both[..., ::2])),                               # pairs for halves
    ("rows", lambda W_g, **_: dict(W_g=W_g.mT)),                                        # no transpose, where D = d
    ("rows", lambda W_g, **_: dict(W_g=W_g.reshape(d, n, d).transpose(0, 1))),          # a wrong view of flat weights
    ("rows", lambda both, **_: dict(W_g=torch.cat((both[:1, :, d:], both[1:, :, :d])))),   # one of n is wrong
    ("order", lambda W_g, **_: dict(W_g=W_g[[1, 0, 2, 3]])),                            # two are swapped
    ("scores", lambda R, **_: dict(R=R.flip(0))),
    ("scores", lambda R, **_: dict(R=R * torch.tensor([[1.0], [2.0], [0.5], [1.0]]))),  # what a cosine router does
    ("wide", lambda seen, **_: dict(seen=[rows.repeat(1, 2) for rows in seen])),        # gate and up together
    ("80 .* for 40", lambda scores, **_: dict(scores=2 * scores)),                      # of two runs
    ("each sees one", lambda seen, **_: dict(seen=seen[1:])),                           # too few tokens
    ("reaches 2 experts, and K is 3", lambda **_: dict(K=3)),
])
def test_the_question_rejects_what_is_wrong(said, wrong):
    """Other matrices, layouts and orders, another R or K, other records: it says what got a no."""
    right, layer = question()
    with pytest.raises(AssertionError, match=said):
        check_layer(**right | wrong(**right, both=layer.both))


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
    """torch.compile of the loss, with a generator; with fullgraph=True that is refused."""
    with pytest.raises(Exception, match="(?i)generator"):
        gradients(torch.compile(erc_moe.erc_loss, fullgraph=True))
    for found, wanted in zip(gradients(torch.compile(erc_moe.erc_loss)), gradients(erc_moe.erc_loss)):
        assert torch.allclose(found, wanted, rtol=1e-10), f"off by {(found - wanted).abs().max():.1e}"
