"""OLMoE weights (arXiv 2409.02060) in our model.

    tensors = {}
    for file in Path(folder).glob("*.safetensors"):
        tensors |= safetensors.torch.load_file(file)
    model = load_olmoe(tensors, olmoe_config(json.loads(Path(folder, "config.json").read_text())))

Two layouts are known, and told apart by their names (D is intermediate_size, d is hidden_size):
  per expert, as in the released files   mlp.experts.{j}.gate_proj.weight [D, d], up_proj [D, d], down_proj [d, D]
  fused, as in current transformers      mlp.experts.gate_up_proj [n, 2D, d], mlp.experts.down_proj [n, d, D]
Ours is neither: W_g[j] = gate_proj.weight.T, W_p[j] = up_proj.weight.T, W_o[j] = down_proj.weight.T.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # erc_moe.py lies one folder up

import torch

from erc_moe import MoEConfig, MoETransformer

LAYER_NAMES = {  # in our Block: in theirs, below model.layers.{i}; the experts are apart
    "attention_norm.weight": "input_layernorm.weight",
    "attention.q.weight": "self_attn.q_proj.weight",
    "attention.k.weight": "self_attn.k_proj.weight",
    "attention.v.weight": "self_attn.v_proj.weight",
    "attention.o.weight": "self_attn.o_proj.weight",
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.weight": "self_attn.k_norm.weight",
    "moe_norm.weight": "post_attention_layernorm.weight",
    "moe.R": "mlp.gate.weight",
}


def olmoe_config(settings):
    """Our MoEConfig for `settings`, the dict of config.json. ValueError for what is missing or unknown."""
    needed = ("vocab_size", "max_position_embeddings", "num_hidden_layers", "num_attention_heads", "hidden_size",
              "intermediate_size", "num_experts", "num_experts_per_tok")  # in the order of MoEConfig
    for name in needed:
        if settings.get(name) is None:
            raise ValueError(f"the configuration has no {name}: is this an OLMoE model?")
    heads, rope = settings["num_attention_heads"], settings.get("rope_parameters") or {}  # new files nest rope_theta
    if (settings.get("num_key_value_heads") or heads) != heads:
        raise ValueError(f"num_key_value_heads {settings['num_key_value_heads']} is not num_attention_heads {heads}:"
                         " shared keys and values are not supported")
    for name, known in (("clip_qkv", None), ("rope_scaling", None), ("attention_bias", False), ("hidden_act", "silu")):
        if settings.get(name, known) != known:
            raise ValueError(f"{name} {settings[name]!r} is not supported, only {known!r}")
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_type {rope['rope_type']!r} is not supported, only 'default'")
    return MoEConfig(*(settings[name] for name in needed), renormalize=settings.get("norm_topk_prob", False),
                     rope_theta=rope.get("rope_theta", settings.get("rope_theta", 10000.0)),
                     norm_eps=settings.get("rms_norm_eps", 1e-5),
                     tie_embeddings=settings.get("tie_word_embeddings", False))


def take(tensors, name, *shape):
    """tensors[name] of this shape. Raises ValueError, with the name, where it is missing or shaped otherwise."""
    if name not in tensors:
        raise ValueError(f"{name} is missing")
    if tuple(tensors[name].shape) != shape:
        raise ValueError(f"{name} should be {list(shape)}, but is {list(tensors[name].shape)}")
    return tensors[name].detach()


def expert_names(tensors, layer, part, config):
    """Where the matrices of `part` ("gate", "up" or "down") of all experts are: one name (fused), or one per expert."""
    experts = f"model.layers.{layer}.mlp.experts."
    if experts + "gate_up_proj" in tensors:
        return [experts + ("down_proj" if part == "down" else "gate_up_proj")]
    return [f"{experts}{j}.{part}_proj.weight" for j in range(config.n_experts)]


def expert_weights(tensors, layer, part, config):
    """W_g, W_p [n, d, D] or W_o [n, D, d] of a layer, for part "gate", "up" or "down". Raises as `take` does."""
    n, d, D = config.n_experts, config.d_model, config.d_expert
    names = expert_names(tensors, layer, part, config)
    if names[0].endswith(".weight"):
        W = torch.stack([take(tensors, name, *((d, D) if part == "down" else (D, d))) for name in names])
    elif part == "down":
        W = take(tensors, names[0], n, d, D)
    else:
        both = take(tensors, names[0], n, 2 * D, d)  # the first D rows are the gate's
        W = both[:, :D] if part == "gate" else both[:, D:]
    return W.transpose(1, 2)


@torch.no_grad()
def load_olmoe(tensors, config):
    """Our model, in float32, with OLMoE's weights: a state dict in either layout, and a config from `olmoe_config`.

    Raises ValueError, with the name, for a tensor that is missing, unexpected, or not shaped as config says.
    """
    model = MoETransformer(config)
    sources = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight",
               "head.weight": "lm_head.weight"}
    for i in range(config.n_layers):
        sources |= {f"blocks.{i}.{ours}": f"model.layers.{i}.{theirs}" for ours, theirs in LAYER_NAMES.items()}
    unused = set(tensors) - set(sources.values())
    for name, parameter in model.named_parameters():  # a head tied to the embedding is not among them
        if name in sources:
            parameter.copy_(take(tensors, sources[name], *parameter.shape))
    for i, moe in enumerate(model.moe_layers()):
        for part, parameter in (("gate", moe.W_g), ("up", moe.W_p), ("down", moe.W_o)):
            parameter.copy_(expert_weights(tensors, i, part, config))
            unused -= set(expert_names(tensors, i, part, config))
    if unused:
        raise ValueError(f"{min(unused)} is unexpected: the configuration has no place for {len(unused)} tensors")
    return model
