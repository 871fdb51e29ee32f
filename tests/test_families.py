"""What couple.py reads from each family of transformers is right, or refused: experiments/families.py, as tests."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="couples models of transformers, which is not installed")

import couple
import families

ROOT = Path(couple.__file__).parent.parent
pytestmark = pytest.mark.usefixtures("elsewhere")  # one thread: these matrices are too small for more
VERDICTS = json.loads(families.RESULTS.read_text())["families"]


def test_the_readme_says_how_many_families_are_right():
    """65 of 73 are right and none is wrong: in the results, their table, and both texts that quote them."""
    count = [entry["verdict"] for entry in VERDICTS.values()].count
    assert (count("right"), count("wrong"), len(VERDICTS)) == (65, 0, 73), f"{count('right')}, {count('wrong')}"
    for text in ("README.md", "experiments/results/README.md"):
        assert "65 of the 73" in (ROOT / text).read_text(encoding="utf-8"), text
    table = families.RESULTS.with_suffix(".md").read_text(encoding="utf-8")
    assert table.startswith("# Of 73 families 65 right, 8 refused, 0 wrong\n") and table.count("| right |") == 65


@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_verdict_is_the_one_in_results(family):
    """What couple.py reads is what the real layer computes with; or it is refused, for the reason in the file."""
    assert families.verdict(family) == VERDICTS[family]


def test_planted_errors_are_seen(monkeypatch):
    """A projection before the experts, the up half, a router without gradient: the verdict looks at the real layer."""
    projected, rows = families.small_model("olmoe"), "0 of 384 rows are an x W_g"
    for layer in projected.model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda _, args: (args[0].flip(-1), *args[1:]))
    assert rows in "; ".join(families.problems(projected)), "a projection in between"
    for planted, sentence in (
            (lambda name, layer, *_: (layer.gate.weight, layer.experts.gate_up_proj[:, 16:].mT), rows),
            (lambda name, layer, *_: (layer.gate.weight.detach(), layer.experts.gate_up_proj[:, :16].mT), "reaches")):
        monkeypatch.setattr(couple, "router_and_gates", planted)
        found = "; ".join(families.problems(families.small_model("olmoe")))
        assert sentence in found, f"{sentence}: only {found}"


@pytest.mark.parametrize("family", ["gemma4", "muse_spark"])
def test_what_a_refusal_says_to_do_is_right(family):
    """R and f as in the sentence: tokens go where x R^T is largest, and f(x) W_g enters the activation."""
    model = families.small_model(family)
    layer = next(module for module in model.modules() if type(module).__name__ in couple.REFUSED)
    [weight.data.uniform_(0.5, 1.5) for weight in layer.parameters() if weight.ndim == 1]
    if family == "muse_spark":
        R, maps = layer.gate.weight, [layer.pre_expert_proj, layer.pre_expert_norm]
    else:
        R, maps = layer.router.proj.weight * layer.router.scale, [layer.pre_feedforward_layernorm_2]
    W_g, seen, chosen, activated = layer.experts.gate_up_proj[:, :16].mT, [], [], []
    maps[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    layer.experts.register_forward_pre_hook(lambda _, args: chosen.append(args[1]))
    layer.experts.act_fn.register_forward_pre_hook(lambda _, args: activated.append(args[0]))
    with torch.no_grad():
        model(input_ids=torch.randint(1, 64, (2, 24)), use_cache=False)
        tokens, best = seen[0], (seen[0] @ R.T).topk(2).indices
        expert = best[0, 0]
        missed = (torch.nn.Sequential(*maps)(tokens[:1]) @ W_g[expert] - torch.cat(activated)).abs().amax(dim=1).min()
    assert torch.equal(best.sort().values, chosen[0].sort().values), "tokens do not go where x R^T is largest"
    assert missed < 1e-5, f"f(x) W_g misses what enters the activation by {missed:.1e}"
