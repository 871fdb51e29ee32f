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

NAMES = {  # part of a name of theirs: what it is here; the experts are apart
    "model.embed_tokens": "embedding", "model.layers": "blocks", "model.norm": "norm", "lm_head": "head",
    "input_layernorm": "attention_norm", "post_attention_layernorm": "moe_norm", "mlp.gate.weight": "moe.R",
    "self_attn": "attention", "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o",
}


def olmoe_config(settings):
    """Our MoEConfig for `settings`, the dict of config.json. ValueError for what would compute something else."""
    settings = settings | (settings.get("rope_parameters") or {})  # where newer files have rope_theta
    for name, known in (("num_key_value_heads", settings["num_attention_heads"]), ("clip_qkv", None),
                        ("rope_scaling", None), ("rope_type", "default"), ("attention_bias", False),
                        ("hidden_act", "silu")):
        if settings.get(name) not in (None, known):
            raise ValueError(f"{name} {settings[name]!r} is not supported, only {known!r}")
    return MoEConfig(*(settings[name] for name in (
        "vocab_size", "max_position_embeddings", "num_hidden_layers", "num_attention_heads", "hidden_size",
        "intermediate_size", "num_experts", "num_experts_per_tok")), renormalize=settings.get("norm_topk_prob", False),
        rope_theta=settings.get("rope_theta", 10000.0), norm_eps=settings.get("rms_norm_eps", 1e-5),
        tie_embeddings=settings.get("tie_word_embeddings", False))


def load_olmoe(tensors, config):
    """Our model, in float32, with OLMoE's weights: a state dict in either layout, and a config from `olmoe_config`.

    KeyError or RuntimeError, with the name, for a tensor that is missing, unexpected, or not shaped as config says.
    """
    model, rest, ours = MoETransformer(config), dict(tensors), {}
    for i in range(config.n_layers):
        experts = f"model.layers.{i}.mlp.experts."
        if experts + "gate_up_proj" in rest:
            gate, up = rest.pop(experts + "gate_up_proj").chunk(2, dim=1)                       # [n, D, d] each
            down = rest.pop(experts + "down_proj")
        else:
            gate, up, down = (torch.stack([rest.pop(f"{experts}{j}.{part}_proj.weight") for j in range(
                config.n_experts)]) for part in ("gate", "up", "down"))
        ours |= {f"blocks.{i}.moe.{name}": W.mT for name, W in (("W_g", gate), ("W_p", up), ("W_o", down))}
    for name, tensor in rest.items():
        for theirs, here in NAMES.items():
            name = name.replace(theirs, here)
        ours[name] = tensor
    if config.tie_embeddings:
        ours["head.weight"] = ours["embedding.weight"]
    model.load_state_dict(ours)
    return model
