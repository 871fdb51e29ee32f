"""Our transformer against an independent implementation: Hugging Face's OLMoE, with the same random weights.

Needs transformers (which brings safetensors). Run: python -m pytest tests/test_olmoe.py
"""

import olmoe
import pytest
import torch

transformers = pytest.importorskip("transformers", reason="compares with OLMoE in transformers, which is not installed")
modeling_olmoe = pytest.importorskip("transformers.models.olmoe.modeling_olmoe")


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


def per_expert(state):
    """The state dict in the layout of the released files: the fused matrices cut apart, one name per expert."""
    split = {}
    for name, tensor in state.items():
        experts, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            for j, (gate, up) in enumerate(both.chunk(2) for both in tensor):
                split |= {f"{experts}.{j}.gate_proj.weight": gate, f"{experts}.{j}.up_proj.weight": up}
        elif last == "down_proj":
            split |= {f"{experts}.{j}.down_proj.weight": down for j, down in enumerate(tensor)}
        else:
            split[name] = tensor
    return split


@pytest.mark.parametrize("layout", [dict, per_expert])
@pytest.mark.parametrize("K, n, heads, more", [
    (2, 4, 8, {}),
    (1, 64, 2, {}),
    (2, 4, 2, dict(norm_topk_prob=True, tie_word_embeddings=True)),
    (8, 64, 8, dict(norm_topk_prob=True, rms_norm_eps=0.1, rope_parameters=dict(rope_type="default", rope_theta=50.0))),
])
def test_logits_equal_those_of_hugging_face(K, n, heads, more, layout):
    """Norms, rotary positions, attention, routing, experts, head: two implementations, one answer."""
    theirs = hugging_face_model(num_experts=n, num_experts_per_tok=K, num_attention_heads=heads, **more)
    ours = olmoe.load_olmoe(layout(theirs.state_dict()), olmoe.olmoe_config(theirs.config.to_dict()))
    tokens = torch.randint(96, (2, 150))
    with torch.no_grad():
        wanted, got = theirs(tokens).logits, ours(tokens).logits
    difference = (got - wanted).abs().max().item()
    assert difference < 1e-4 < 0.5 < wanted.std(), f"logits differ by {difference:.1e}"


@pytest.mark.parametrize("K", [1, 3])
def test_balance_and_z_equal_theirs_but_for_the_factor_K(K):
    """Theirs counts each token K times, so that its optimum is K; ours divides by the rows, so that it is 1.

    One layer: theirs pools all layers before the product. z is checked against their router logits.
    """
    theirs = hugging_face_model(num_hidden_layers=1, num_experts_per_tok=K)
    ours = olmoe.load_olmoe(theirs.state_dict(), olmoe.olmoe_config(theirs.config.to_dict()))
    tokens = torch.randint(96, (2, 150))
    with torch.no_grad():
        logits, out = theirs(tokens, output_router_logits=True).router_logits, ours(tokens)
    balance = modeling_olmoe.load_balancing_loss_func(logits, num_experts=4, top_k=K).item()
    assert abs(K * out.balance - balance) < 1e-4, f"ours {out.balance:.5f} times {K}, theirs {balance:.5f}"
    z = logits[0].exp().sum(dim=-1).log().square().mean().item()
    assert abs(out.z - z) < 1e-4, f"z {out.z:.5f}, from their logits {z:.5f}"


def test_a_tied_head_is_loaded_once_and_an_untied_one_is_wanted():
    """Files of tied models leave lm_head.weight out; in other files its absence is damage."""
    for tied in (True, False):
        theirs = hugging_face_model(tie_word_embeddings=tied)
        state, config = theirs.state_dict(), olmoe.olmoe_config(theirs.config.to_dict())
        del state["lm_head.weight"]
        if tied:
            total = olmoe.load_olmoe(state, config).num_params()[0]
            assert total == theirs.num_parameters(), f"{total} parameters, theirs has {theirs.num_parameters()}"
        else:
            with pytest.raises(ValueError, match="lm_head.weight is missing"):
                olmoe.load_olmoe(state, config)


@pytest.mark.parametrize("layout, damage, message", [
    (per_expert, {"model.layers.1.mlp.experts.3.up_proj.weight": None}, "experts.3.up_proj.weight is missing"),
    (per_expert, {"model.layers.0.mlp.experts.2.gate_proj.weight": torch.zeros(64, 40)},
     r"layers.0.mlp.experts.2.gate_proj.weight should be \[40, 64\], but is \[64, 40\]"),
    (dict, {"model.layers.0.mlp.experts.gate_up_proj": torch.zeros(4, 64, 80)},
     r"layers.0.mlp.experts.gate_up_proj should be \[4, 80, 64\], but is \[4, 64, 80\]"),
    (dict, {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}, "layers.0.self_attn.q_proj.bias is unexpected"),
    (per_expert, {"model.layers.0.mlp.experts.4.up_proj.weight": torch.zeros(40, 64)},
     "layers.0.mlp.experts.4.up_proj.weight is unexpected"),
])
def test_a_damaged_state_dict_is_refused_by_name(layout, damage, message):
    """One clear line that names the tensor, whatever is wrong with it."""
    theirs = hugging_face_model()
    state = layout(theirs.state_dict()) | damage
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        olmoe.load_olmoe(state, olmoe.olmoe_config(theirs.config.to_dict()))


@pytest.mark.parametrize("change, message", [
    (dict(clip_qkv=8.0), "clip_qkv 8.0 is not supported"),
    (dict(num_key_value_heads=1), "num_key_value_heads 1 is not num_attention_heads 2"),
    (dict(attention_bias=True), "attention_bias True is not supported"),
    (dict(hidden_act="gelu"), "hidden_act 'gelu' is not supported"),
    (dict(rope_parameters=dict(rope_type="linear", factor=2.0)), "rope_type 'linear' is not supported"),
    (dict(num_experts=None), "the configuration has no num_experts"),
])
def test_a_configuration_that_would_compute_something_else_is_refused(change, message):
    """Better than logits that are a little wrong."""
    with pytest.raises(ValueError, match=message):
        olmoe.olmoe_config(hugging_face_model().config.to_dict() | change)


def test_the_rotary_base_is_found_in_old_files():
    """Files before transformers 5, the released ones among them, have rope_theta at the top."""
    new = hugging_face_model().config.to_dict()
    old = {name: value for name, value in new.items() if name != "rope_parameters"} | dict(rope_theta=55.0)
    assert olmoe.olmoe_config(old).rope_theta == 55.0, f"old file: {olmoe.olmoe_config(old).rope_theta}"
