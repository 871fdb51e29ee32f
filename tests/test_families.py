"""Every family of transformers with experts, small and random: does couple.py find the right R and W_g?

The check looks at what the real layer computes, not at names: which numbers enter its activation, and what its output
does when R or W_g changes. Needs transformers. Run: python -m pytest -m slow tests/test_families.py

    python tests/test_families.py    # writes experiments/results/families.json, and prints the table and the counts
"""

import copy
import importlib
import inspect
import json
import math
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]  # as pytest.ini does

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import couple

transformers = pytest.importorskip("transformers", reason="couples models of transformers, which is not installed")
MODELS = Path(transformers.__file__).parent / "models"
RESULTS = ROOT / "experiments" / "results" / "families.json"
FAMILIES = sorted({file.parent.name for file in MODELS.glob("*/modeling_*.py") if "experts" in file.read_text()}
                  - {"bamba"})  # which speaks of experts, and has none
SMALL = dict(  # what a configuration does not know is left out
    vocab_size=64, hidden_size=32, d_model=32, num_hidden_layers=2, num_layers=2, num_attention_heads=2,
    num_key_value_heads=2, head_dim=16, qk_head_dim=16, intermediate_size=16, moe_intermediate_size=16,
    expert_ffn_hidden_size=16, shared_expert_intermediate_size=24, shared_experts_intermediate_size=24,
    n_routed_experts=4, num_experts=4, num_local_experts=4, moe_num_experts=4, num_experts_per_tok=2,
    num_experts_per_token=2, moe_topk=2, moe_k=2, top_k_experts=2, first_k_dense_replace=0, moe_layer_start_index=0,
    moe_layer_end_index=1, n_group=1, topk_group=1, num_expert_group=1, q_lora_rank=8, kv_lora_rank=8,
    qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, max_position_embeddings=64, enable_moe_block=True,
    pad_token_id=0, bos_token_id=0, eos_token_id=0, is_moe=True)
SPARSE = dict(mlp_layer_types=["sparse"] * 2)
MORE = {  # family -> what else it needs to be small, to hold experts, or to build at all
    **dict.fromkeys(["axk1", "axk2", "beam", "deepseek_ocr2", "dots3_note", "glm4_moe_lite", "hy_v3", "hy_v4",
                     "kimi_linear", "laguna", "unlimited_ocr"], SPARSE),
    "afmoe": dict(num_dense_layers=0),
    "dbrx": dict(n_layers=2, n_heads=2, attn_config=dict(kv_n_heads=2, rope_theta=1e4, clip_qkv=8),
                 ffn_config=dict(hidden_size=32, ffn_hidden_size=16, moe_top_k=2)),
    "deepseek_v4": dict(num_hidden_layers=4),  # the first three route by a table of tokens
    "dots1": dict(n_shared_experts=1),
    "ernie4_5_vl_moe": dict(moe_intermediate_size=[16, 16], rope_parameters=dict(
        rope_type="default", rope_theta=1e4, mrope_section=[3, 3, 2])) | SPARSE,
    "flint": dict(mlp_only_layers=[]),
    "gemma4": dict(vocab_size_per_layer_input=64, hidden_size_per_layer_input=8),
    "glm4v_moe": dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 1, 1])),
    "glm5_next": dict(qk_rope_head_dim=0, linear_head_dim=16, linear_num_heads=2) | SPARSE,
    "granitemoehybrid": dict(layer_types=["full_attention"] * 2, mamba_n_heads=2),
    "jamba": dict(expert_layer_period=1, expert_layer_offset=0),
    "lfm2_moe": dict(layer_types=["full_attention"] * 2, num_dense_layers=0),
    "longcat_flash": dict(num_layers=2, head_dim=8, zero_expert_num=3, ffn_hidden_size=32),
    "mimo_v2_flash": dict(head_dim=24, v_head_dim=16, num_key_value_heads=1) | SPARSE,
    "nllb_moe": dict(encoder_layers=2, decoder_layers=2, encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_sparse_step=1,
                     decoder_sparse_step=1, encoder_attention_heads=2, decoder_attention_heads=2),
    "step3p7": dict(sliding_window=16) | SPARSE,
    "switch_transformers": dict(d_ff=16, d_kv=16, num_sparse_encoder_layers=2, num_sparse_decoder_layers=2,
                                num_decoder_layers=2),
    "vitpose_backbone": dict(part_features=8),
    "zaya": dict(num_experts_per_tok=1),
}
WHERE = {"deepseek_v4": r"layers\.3"}


def model_class(family):
    """The class to build: a language model, if there is one whose configuration speaks of experts."""
    found = []
    for file in sorted((MODELS / family).glob("modeling_*.py")):
        module = importlib.import_module(f"transformers.models.{family}.{file.stem}")
        found += [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__
                  and issubclass(c, transformers.PreTrainedModel) and c.config_class]
    endings = ("ForCausalLM", "ForConditionalGeneration", "TextModel", "Model", "Backbone")
    order = lambda c: next((i for i, ending in enumerate(endings) if c.__name__.endswith(ending)), len(endings))
    speaks = [c for c in found if "PreTrained" not in c.__name__ and "Vision" not in c.__name__
              and any("expert" in name for name in settings(c.config_class))]
    return min(speaks or found, key=order)


def settings(config_class):
    """The names that a configuration knows."""
    return {*getattr(config_class, "__dataclass_fields__", ()), *getattr(config_class, "attribute_map", ()),
            *inspect.signature(config_class.__init__).parameters}


def small_model(family, **more):
    """A model of the family with random matrices of a size at which each one matters, and biases of 0."""
    kind = model_class(family)
    known = {name: value for name, value in SMALL.items() if name in settings(kind.config_class)}
    torch.manual_seed(0)
    model = kind(kind.config_class(**known | MORE.get(family, {}) | more)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim > 1:
                parameter.normal_(std=parameter.size(-1) ** -0.5)
    return model


ACTIVATIONS = [torch.ops.aten.silu, torch.ops.aten.gelu, torch.ops.aten.relu, torch.ops.aten.sigmoid]
PRODUCTS = [torch.ops.aten.mm, torch.ops.aten.addmm]


class Watch(TorchDispatchMode):
    """Keeps what is multiplied with R's storage, and what enters an activation."""

    def __init__(self, R):
        super().__init__()
        self.R, self.tokens, self.activated = R.untyped_storage().data_ptr(), None, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in ACTIVATIONS:
            self.activated.append(args[0].flatten(0, -2).clone())
        if function.overloadpacket in PRODUCTS:
            left, right = args[-2:]
            if right.untyped_storage().data_ptr() == self.R:
                self.tokens = left.clone()
        return function(*args, **(kwargs or {}))


def run(name, layer, inputs):
    """Calls the layer -> (its output, tokens [N, d] that R saw, whether x_t W_g[j] entered the activation [N, n])."""
    R, W_g = (tensor.detach() for tensor in couple.router_and_gates(name, layer))
    with torch.no_grad(), Watch(R) as watch:
        out = layer(*inputs[0], **inputs[1])
    unit = lambda rows: torch.nn.functional.normalize(rows, dim=-1)  # gpt_oss scales on the way to its sigmoid
    seen = unit(torch.cat([rows for rows in watch.activated if rows.size(1) == W_g.size(2)]))          # (rows, D)
    wanted = unit(watch.tokens @ W_g)                                                                   # (n, N, D)
    used = ((wanted @ seen.T).amax(dim=-1) > 1 - 1e-5).T                                                # (N, n)
    return out if isinstance(out, torch.Tensor) else out[0], watch.tokens, used


def changed(name, layer, change):
    """A copy of the layer, with R and W_g replaced by change(R, W_g) wherever in its parameters they come from."""
    layer = copy.deepcopy(layer)
    parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    pair = couple.router_and_gates(name, layer)
    for old, new in zip(pair, change(*(tensor.detach() for tensor in pair))):
        where_from, values = (torch.autograd.grad(old, parameters, at, retain_graph=True, allow_unused=True)
                              for at in (torch.ones_like(old), new))
        for parameter, where, value in zip(parameters, where_from, values):
            if where is not None:
                parameter.data[where != 0] = value[where != 0]
    return layer


def layer_problems(name, layer, inputs):
    """What is wrong with couple.py's R and W_g of this layer, as sentences."""
    R, _ = couple.router_and_gates(name, layer)
    turn = torch.arange(len(R)).roll(1)
    out, tokens, used = run(name, layer, inputs)
    _, _, used_turned = run(name, changed(name, layer, lambda R, W_g: (R[turn], W_g)), inputs)
    zero, _, _ = run(name, changed(name, layer, lambda R, W_g: (R, 0 * W_g)), inputs)
    zero_turned, _, _ = run(name, changed(name, layer, lambda R, W_g: (R[turn], 0 * W_g)), inputs)
    negated, _, _ = run(name, changed(name, layer, lambda R, W_g: (R, -W_g)), inputs)
    scores = tokens @ R.detach().T                                                                      # (N, n)
    least, most = scores.masked_fill(~used, math.inf).amin(dim=1), scores.masked_fill(used, -math.inf).amax(dim=1)
    experts = (out - zero).norm()
    tests = {
        f"x W_g enters the activation for {used.any(dim=1).sum()} of {len(tokens)} tokens only":
            used.any(dim=1).float().mean() > 0.5,
        "tokens do not go where x R^T is largest": (least >= most)[used.any(dim=1)].all(),
        "permuting R's rows does not permute the routing": torch.equal(used_turned, used[:, turn]),
        "W_g = 0 does not silence the experts": experts > 0 and (zero_turned - zero).norm() < 1e-5 * experts,
        "negating W_g merely negates what the experts give": (negated - zero + out - zero).norm() > 1e-3 * experts,
    }
    return [f"{name}: {problem}" for problem, passed in tests.items() if not passed]


def problems(model, where=""):
    """What is wrong with couple.py's reading of this model, as sentences; empty where all is right."""
    layers, inputs = couple.moe_layers(model, where), {}
    hooks = [layer.register_forward_pre_hook(lambda _, args, kwargs, name=name: inputs.update({name: (args, kwargs)}),
                                             with_kwargs=True) for name, layer in layers.items()]
    tokens = torch.randint(1, 64, (2, 24), generator=torch.Generator().manual_seed(0))
    more = dict(decoder_input_ids=tokens) if model.config.is_encoder_decoder else {}
    if model.config.model_type.startswith("ernie4_5_vl"):
        more["moe_mm_token_type_ids"] = (tokens % 2).int()  # half of the tokens go to the vision experts
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False, **more)
    [hook.remove() for hook in hooks]
    found = [f"{name} was not called" for name in layers.keys() - inputs.keys()]
    found += [f"{name} was overlooked" for name, module in model.named_modules()
              if re.search("(?<!Shared)(?<!Parallel)Experts$", type(module).__name__) and re.search(where, name)
              and not name.startswith(tuple(layers))]
    found += [problem for name in inputs for problem in layer_problems(name, layers[name], inputs[name])]
    couple.add_erc_gradient(model, 0, alpha=0.1, where=where)  # breaks every constraint
    wanted = sum(tensor.numel() for name in layers for tensor in couple.router_and_gates(name, layers[name]))
    reached = sum((parameter.grad != 0).sum().item() for parameter in model.parameters() if parameter.grad is not None)
    if reached != wanted:
        found.append(f"the gradient reaches {reached} numbers, R and W_g have {wanted}")
    optimizer, before = torch.optim.Adam(model.parameters(), lr=0.02), couple.coupling(model, where=where)
    for step in range(30):
        optimizer.zero_grad()
        couple.add_erc_gradient(model, step, where=where)
        optimizer.step()
    after = couple.coupling(model, where=where)
    if not (before[1] > 0.1 and after[0] < before[0] / 10 and after[1] < before[1] / 10 and after[2] > 1.2 * before[2]):
        found.append(f"30 steps take erc, violated, coupling from {before} to {after}")
    return found


def verdict(family):
    """{"verdict": right, wrong or refused, "why": what is wrong, or why it is refused}."""
    model, where = small_model(family), WHERE.get(family, "")
    try:
        [couple.router_and_gates(name, layer) for name, layer in couple.moe_layers(model, where).items()]
    except ValueError as error:
        return dict(verdict="refused", why=str(error))
    if found := problems(model, where):
        return dict(verdict="wrong", why="; ".join(found))
    return dict(verdict="right", why=where and f"the layers that match {where}")


def main():
    """Writes the verdicts, as they are now, beside the other results."""
    transformers.logging.set_verbosity_error()
    families = {family: verdict(family) for family in FAMILIES}
    verdicts = [entry["verdict"] for entry in families.values()]
    counts = {kind: verdicts.count(kind) for kind in ("right", "refused", "wrong")}
    versions = dict(transformers=transformers.__version__, torch=torch.__version__)
    RESULTS.write_text(json.dumps(dict(counts=counts, versions=versions, families=families), indent=1) + "\n")
    lines = [f"# Of {len(families)} families " + ", ".join(f"{count} {kind}" for kind, count in counts.items()), "",
             f"From `python tests/test_families.py`, with transformers {versions['transformers']} and torch"
             f" {versions['torch']}; of models that also see or hear, the language model.", "",
             "| family | verdict | why |", "|---|---|---|"]
    lines += [f"| {family} | {entry['verdict']} | {entry['why']} |" for family, entry in families.items()]
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


# ---- The tests -----------------------------------------------------------------------------------

QUICK = ["olmoe", "gpt_oss", "longcat_flash", "inkling", "switch_transformers", "nemotron_h", "dbrx", "jetmoe"]


def test_results_hold_every_family_and_none_is_wrong():
    """The file that the README quotes: at least 61 families right, the others refused."""
    verdicts = json.loads(RESULTS.read_text())["families"]
    counts = json.loads(RESULTS.read_text())["counts"]
    assert list(verdicts) == FAMILIES, f"not in both: {set(verdicts) ^ set(FAMILIES)}"
    assert counts["right"] >= 61 and counts["wrong"] == 0 and sum(counts.values()) == len(FAMILIES), counts


@pytest.mark.parametrize("family", [pytest.param(family, marks=[] if family in QUICK else pytest.mark.slow)
                                    for family in FAMILIES])
def test_the_verdict_is_the_one_in_results(family):
    """What couple.py reads is what the real layer computes with; or it is refused, for the reason in the file."""
    assert verdict(family) == json.loads(RESULTS.read_text())["families"][family]


def test_planted_errors_are_seen(monkeypatch):
    """The up half, interleaved halves, the next expert, a projection in between: each turns the check red."""
    right, entered = couple.router_and_gates, "x W_g enters the activation for 0 of 48 tokens only"
    assert problems(small_model("olmoe")) == [], "wrong even without a planted error"
    both = lambda layer: layer.experts.gate_up_proj.mT                                                  # (n, d, 2D)
    for planted, sentences in [
        (lambda name, layer: (layer.gate.weight, both(layer)[..., 16:]), [entered, "merely negates"]),
        (lambda name, layer: (layer.gate.weight, both(layer)[..., ::2]), [entered, "does not silence"]),
        (lambda name, layer: (layer.gate.weight, both(layer).roll(1, 0)[..., :16]), ["where x R^T is largest"]),
    ]:
        monkeypatch.setattr(couple, "router_and_gates", planted)
        found = "; ".join(problems(small_model("olmoe")))
        assert all(sentence in found for sentence in sentences), f"of {sentences}: only {found}"
    monkeypatch.setattr(couple, "router_and_gates", right)
    model, between = small_model("olmoe"), torch.randn(32, 32)
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda _, args: (args[0] @ between, *args[1:]))
    found = "; ".join(problems(model))
    assert entered in found, f"a projection in between: only {found}"


@pytest.mark.parametrize("family", ["gemma4", "diffusion_gemma", "muse_spark"])
def test_what_a_refusal_says_to_do_is_right(family):
    """R and f as in the sentence: tokens go where x R^T is largest, and f(x) W_g enters the activation."""
    model = small_model(family)
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


if __name__ == "__main__":
    main()
