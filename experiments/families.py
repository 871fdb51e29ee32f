"""Every family of transformers with experts, small and random: does couple.py find the right R and W_g?

    python experiments/families.py    # writes results/families.json and families.md; a minute, needs transformers

The check looks at what the real layer computes, not at names: `check_layer` on each, and where the gradient goes.
"""

import importlib
import inspect
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # as pytest.ini does

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import couple
from check_layer import check_layer

MODELS = Path(transformers.__file__).parent / "models"
RESULTS = ROOT / "experiments" / "results" / "families.json"
FAMILIES = sorted({file.parent.name for file in MODELS.glob("*/modeling_*.py") if "experts" in file.read_text()}
                  - {"bamba"})  # which speaks of experts, and has none
SMALL = dict(  # what a configuration does not know is left out
    vocab_size=64, hidden_size=32, d_model=32, num_hidden_layers=2, num_layers=2, num_decoder_layers=2, n_layers=2,
    num_attention_heads=2, num_key_value_heads=2, n_heads=2, head_dim=16, qk_head_dim=16, d_kv=16, intermediate_size=16,
    moe_intermediate_size=16, expert_ffn_hidden_size=16, d_ff=16, ffn_hidden_size=32, n_routed_experts=4, num_experts=4,
    num_local_experts=4, moe_num_experts=4, n_shared_experts=1, zero_expert_num=3, num_experts_per_tok=2,
    num_experts_per_token=2, moe_topk=2, moe_k=2, top_k_experts=2, first_k_dense_replace=0, num_dense_layers=0,
    mlp_only_layers=[], moe_layer_start_index=0, moe_layer_end_index=1, expert_layer_period=1, expert_layer_offset=0,
    num_sparse_encoder_layers=2, num_sparse_decoder_layers=2, encoder_sparse_step=1, decoder_sparse_step=1,
    encoder_layers=2, decoder_layers=2, encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_attention_heads=2,
    decoder_attention_heads=2, n_group=1, topk_group=1, num_expert_group=1, q_lora_rank=8, kv_lora_rank=8,
    qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, linear_head_dim=16, linear_num_heads=2, mamba_n_heads=2,
    max_position_embeddings=64, vocab_size_per_layer_input=64, hidden_size_per_layer_input=8, part_features=8,
    enable_moe_block=True, pad_token_id=0, bos_token_id=0, eos_token_id=0, is_moe=True)
SPARSE, PLAIN = dict(mlp_layer_types=["sparse"] * 2), dict(layer_types=["full_attention"] * 2)
turned = lambda *sections: dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[*sections]))
MORE = {  # family -> what else it needs to be small, to hold experts, or to build at all
    **dict.fromkeys(["axk1", "axk2", "beam", "deepseek_ocr2", "dots3_note", "glm4_moe_lite", "hy_v3", "hy_v4",
                     "kimi_linear", "laguna", "unlimited_ocr"], SPARSE),
    "dbrx": dict(attn_config=dict(kv_n_heads=2, rope_theta=1e4, clip_qkv=8),
                 ffn_config=dict(hidden_size=32, ffn_hidden_size=16, moe_top_k=2)),
    "deepseek_v4": dict(num_hidden_layers=4),  # the first three route by a table of tokens
    "ernie4_5_vl_moe": dict(moe_intermediate_size=[16, 16]) | turned(3, 3, 2) | SPARSE,
    "glm4v_moe": turned(2, 1, 1),
    "glm5_next": dict(qk_rope_head_dim=0) | SPARSE,
    "granitemoehybrid": PLAIN,
    "lfm2_moe": PLAIN,
    "longcat_flash": dict(head_dim=8),
    "mimo_v2_flash": dict(head_dim=24, v_head_dim=16, num_key_value_heads=1) | SPARSE,
    "step3p7": dict(sliding_window=16) | SPARSE,
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
    """A model of the family with random matrices of a size at which each matters; biases and shared experts are 0."""
    kind = model_class(family)
    known = {name: value for name, value in SMALL.items() if name in settings(kind.config_class)}
    torch.manual_seed(0)
    model = kind(kind.config_class(**known | MORE.get(family, {}) | more)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "shared_" in name:
                parameter.zero_()
            elif parameter.ndim > 1:
                parameter.normal_(std=parameter.size(-1) ** -0.5)
    return model


class Watch(TorchDispatchMode):
    """Keeps what is multiplied with R, the product, and what enters an activation, if it has width D."""

    def __init__(self, R, W_g):
        super().__init__()
        self.R, self.D, self.seen = R.untyped_storage().data_ptr(), W_g.size(2), []
        self.tokens, self.scores = R.new_zeros(1, R.size(1)), R.new_zeros(1, len(R))  # if nothing is

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result, name = function(*args, **(kwargs or {})), function.overloadpacket.__name__
        if name in ("silu", "gelu", "relu", "sigmoid") and args[0].size(-1) == self.D:
            self.seen.append(args[0].clone())
        if name in ("mm", "addmm") and args[-1].untyped_storage().data_ptr() == self.R:
            self.tokens, self.scores = args[-2].clone(), result.clone()
        return result


def problems(model, where=""):
    """What is wrong with couple.py's reading of this model, as sentences; empty where all is right."""
    layers, calls = couple.moe_layers(model, where), {}
    hooks = [layer.register_forward_pre_hook(lambda _, args, kwargs, name=name: calls.update({name: (args, kwargs)}),
                                             with_kwargs=True) for name, layer in layers.items()]
    tokens = torch.randint(1, 64, (4, 48), generator=torch.Generator().manual_seed(0))
    more = dict(decoder_input_ids=tokens) if model.config.is_encoder_decoder else {}
    if model.config.model_type.startswith("ernie4_5_vl"):
        more["moe_mm_token_type_ids"] = (tokens % 2).int()  # half of the tokens go to the vision experts
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False, **more)
    [hook.remove() for hook in hooks]
    found = [f"{name} was not called" for name in layers.keys() - calls.keys()]
    found += [f"{name} was overlooked" for name, module in model.named_modules()
              if re.search("(?<!Shared)(?<!Parallel)Experts$", type(module).__name__) and re.search(where, name)
              and not name.startswith(tuple(layers))]
    for name, (args, kwargs) in calls.items():
        R, W_g = couple.router_and_gates(name, layers[name])
        with torch.no_grad(), Watch(R, W_g) as watch:
            layers[name](*args, **kwargs)
        try:
            K = 1 if model.config.model_type == "switch_transformers" else 2  # whose configuration does not know K
            check_layer(R, W_g, watch.tokens, [watch.scores[:, :len(R)]], watch.seen, K)
        except AssertionError as error:
            found.append(f"{name}: {error}")
    couple.add_erc_gradient(model, 0, alpha=0.1, where=where)  # breaks every constraint
    wanted = sum(tensor.numel() for name in layers for tensor in couple.router_and_gates(name, layers[name]))
    reached = sum((parameter.grad != 0).sum().item() for parameter in model.parameters() if parameter.grad is not None)
    return found + [f"the gradient reaches {reached} numbers, R and W_g have {wanted}"] * (reached != wanted)


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
             f"From `python experiments/families.py`, with transformers {versions['transformers']} and torch"
             f" {versions['torch']}; of models that also see or hear, the language model.", "",
             "| family | verdict | why |", "|---|---|---|"]
    lines += [f"| {family} | {entry['verdict']} | {entry['why']} |" for family, entry in families.items()]
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
