"""Our transformer against an independent implementation: Hugging Face's OLMoE, with the same random weights.

Needs transformers. Run: python -m pytest tests/test_olmoe.py
"""

import olmoe
import pytest
import torch

transformers = pytest.importorskip("transformers", reason="compares with OLMoE in transformers, which is not installed")


def hugging_face_model(**changes):
    """A small OlmoeForCausalLM, all of whose weights, norms included, are drawn at a size where each one matters."""
    settings = dict(vocab_size=96, hidden_size=64, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
                    max_position_embeddings=160, num_experts=4, num_experts_per_tok=2, pad_token_id=None,
                    eos_token_id=None) | changes
    torch.manual_seed(0)
    model = transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=parameter.size(-1) ** -0.5)
    return model


def current(model):
    """(state dict, config.json) as transformers 5 has them."""
    return model.state_dict(), model.config.to_dict()


def released(model):
    """The same as in the released files: each expert has names of its own, a tied head has none, and rope_theta stands
    at the top."""
    state, config = current(model)
    split = {}
    for name, tensor in state.items():
        experts, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            for j, (gate, up) in enumerate(both.chunk(2) for both in tensor):
                split |= {f"{experts}.{j}.gate_proj.weight": gate, f"{experts}.{j}.up_proj.weight": up}
        elif last == "down_proj":
            split |= {f"{experts}.{j}.down_proj.weight": down for j, down in enumerate(tensor)}
        elif name != "lm_head.weight" or not config["tie_word_embeddings"]:
            split[name] = tensor
    return split, config | dict(rope_parameters=None, rope_theta=config["rope_parameters"]["rope_theta"])


@pytest.mark.parametrize("layout", [current, released])
@pytest.mark.parametrize("K, n, heads, more", [
    (1, 64, 2, {}),
    (2, 4, 2, dict(norm_topk_prob=True, tie_word_embeddings=True)),
    (8, 64, 8, dict(rms_norm_eps=0.1, rope_parameters=dict(rope_type="default", rope_theta=50.0))),
])
def test_logits_equal_those_of_hugging_face(K, n, heads, more, layout):
    """Norms, rotary positions, attention, routing, experts, head: two implementations, one answer, as many parameters.
    """
    theirs = hugging_face_model(num_experts=n, num_experts_per_tok=K, num_attention_heads=heads, **more)
    state, config = layout(theirs)
    ours = olmoe.load_olmoe(state, olmoe.olmoe_config(config))
    tokens = torch.randint(96, (2, 150))
    with torch.no_grad():
        wanted, got = theirs(tokens).logits, ours(tokens).logits
    difference = (got - wanted).abs().max().item()
    assert difference < 1e-4 < 0.5 < wanted.std(), f"logits differ by {difference:.1e}"
    assert ours.num_params()[0] == theirs.num_parameters(), f"{ours.num_params()[0]}, theirs {theirs.num_parameters()}"


@pytest.mark.parametrize("layout, name, tensor, said", [
    (released, "model.layers.1.mlp.experts.3.up_proj.weight", None, "missing"),
    (current, "lm_head.weight", None, "missing"),  # only a tied head may be
    (released, "model.layers.0.mlp.experts.2.gate_proj.weight", torch.zeros(64, 40), r"\[40, 64\].* \[64, 40\]"),
    (current, "model.layers.0.mlp.experts.gate_up_proj", torch.zeros(4, 64, 80), r"\[4, 80, 64\].* \[4, 64, 80\]"),
    (released, "model.layers.0.mlp.experts.4.up_proj.weight", torch.zeros(40, 64), "unexpected"),
])
def test_a_damaged_state_dict_is_refused_by_name(layout, name, tensor, said):
    """A tensor that is lost, shaped otherwise, or too many."""
    state, config = layout(hugging_face_model())
    state = {other: value for other, value in {**state, name: tensor}.items() if value is not None}
    with pytest.raises(ValueError, match=f"{name} .*{said}"):
        olmoe.load_olmoe(state, olmoe.olmoe_config(config))


@pytest.mark.parametrize("name, value", [("clip_qkv", 8.0), ("num_key_value_heads", 1), ("num_experts", None),
                                         ("rope_parameters", dict(rope_type="linear", factor=2.0))])
def test_a_configuration_that_would_compute_something_else_is_refused(name, value):
    """Better than logits that are a little wrong."""
    with pytest.raises(ValueError, match="rope_type" if name == "rope_parameters" else name):
        olmoe.olmoe_config(hugging_face_model().config.to_dict() | {name: value})
