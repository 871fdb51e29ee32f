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
    for name, parameter in model.named_parameters():
        values = torch.randn_like(parameter) * parameter.size(-1) ** -0.5
        parameter.data = 0.5 + torch.rand_like(parameter) if "norm" in name else values
    return model


def current(model):
    """(state dict, config.json) as transformers 5 has them."""
    return model.state_dict(), model.config.to_dict()


def released(model):
    """The same as in the released files: names for each expert, none for a tied head, rope_theta at the top."""
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


def test_a_tensor_that_is_lost_or_too_many_is_named():
    """A norm, which would stay 1; the matrix of an expert; a fifth expert of four."""
    state, config = released(hugging_face_model())
    for name, tensor in (("model.norm.weight", None), ("model.layers.1.mlp.experts.3.up_proj.weight", None),
                         ("model.layers.0.mlp.experts.4.up_proj.weight", torch.zeros(40, 64))):
        damaged = {other: value for other, value in {**state, name: tensor}.items() if value is not None}
        with pytest.raises((KeyError, RuntimeError), match=name.rpartition(".experts.")[2].removeprefix("model.")):
            olmoe.load_olmoe(damaged, olmoe.olmoe_config(config))


@pytest.mark.parametrize("name, value", [("clip_qkv", 8.0), ("num_key_value_heads", 1), ("rope_type", "linear")])
def test_a_configuration_that_would_compute_something_else_is_refused(name, value):
    """Better than logits that are a little wrong."""
    settings = hugging_face_model().config.to_dict()
    (settings["rope_parameters"] if name == "rope_type" else settings)[name] = value
    with pytest.raises(ValueError, match=name):
        olmoe.olmoe_config(settings)
