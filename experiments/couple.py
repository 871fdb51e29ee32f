"""The ERC loss in someone else's model: the whole recipe, for Mixture-of-Experts models of Hugging Face's transformers.

    python experiments/couple.py        # couples a small random OLMoE, in seconds; needs the package transformers

For your own loop copy, below `import re` and `import torch`, the block of erc_moe.py between its two paste lines, and
this file from KNOWN to `coupling` (MIT licence; LICENSE goes with it). Then call `add_erc_gradient(model, step)` once
per optimizer step, where `training_step` does. What can go wrong:

* Gradient accumulation. The loss is one of the weights, not of tokens: added in every micro-batch it counts too much,
  added once but divided by their number too little. Add it once, undivided, after the last of them.
* GradScaler. Its factor is on the gradients until scaler.unscale_(optimizer). Add after that, and before clipping.
* Autocast. Norms that lie close together tie in bfloat16. erc_loss computes in float32 even inside autocast, but its
  backward, called inside, does not: stay outside. (`add_erc_gradient` sees to it.)
* DDP. It averages gradients within backward; what comes later is averaged by no one. So add it after the last backward,
  on every process, with the same noise: then all add the same. Hence the noise comes from `step`, and not from torch's
  global stream, which dropout reads too, and which differs between processes.
* FSDP. fully_shard leaves slices of the weights outside of forward; they are gathered here, a layer at a time, on all
  processes at once: `coupling` too must run on each, even if only one prints. Tested with two processes on CPU. Not
  tested: the older FullyShardedDataParallel (its slices are refused for their shape), tensor and expert parallelism,
  DeepSpeed (which keeps gradients elsewhere than in .grad).
* Trainer. The place is on_pre_optimizer_step(args, state, control, model, **_) of a callback, with state.global_step as
  `step`. Clipping is over by then; in float16, max_grad_norm must be above 0, for without clipping nothing unscales
  the gradients before that place. (Tried once by hand, not in the tests; float16 not at all.)
* Evaluation. Leave it out there: with its noise, the validation loss would be random. `coupling` has none.
* Frozen weights. A layer learns what may be trained, router or gate; if nothing may, that is an error. LoRA leaves both
  frozen and renames them: an error as well.
* Gate or up. The paper probes the gate matrix alone, the one under the activation: in fused weights the first half.
* Transposed. `erc_loss` wants W_g[j] as [d, D], and Linear layers hold [D, d]. Where d = D, its check cannot tell.
* Maps before the experts. If tokens are projected or normalised between router and experts, the proxies must be too. In
  the models named below they are not; a layer with a weight that is not known here is an error.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # erc_moe.py lies one folder up

import torch

from erc_moe import activation_norms, coupling_hinge, coupling_report, erc_loss

# All the tensors that a MoE layer may hold. OLMoE, Qwen2-MoE, Qwen3-MoE and Mixtral hand router and experts the same
# tokens (read in the code of transformers 5.23; Mixtral can jitter them in training, but before both). Some forty
# others there, DeepSeek-V3 and Granite among them, have the same tensors, and nothing in between either.
KNOWN = re.compile(r"(gate|router)\.weight"                                          # R [n, d]
                   r"|experts\.(gate_up_proj|down_proj)"                             # fused: [n, 2D, d] and [n, d, D]
                   r"|experts\.\d+\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight"  # a list, as before version 5
                   r"|((gate|router)\.)?(e_score_correction|expert)_bias"            # evens out the choice of experts
                   r"|shared_.*")                                                    # sees all tokens: has no proxy
LISTED_GATE = re.compile(r"experts\.\d+\.(gate_proj|w1)\.weight")                    # [D, d]


def moe_layers(model):
    """name -> module, of all modules with a child named experts. Raises ValueError where there is none."""
    layers = {name or "the model": module for name, module in model.named_modules()
              if "experts" in dict(module.named_children())}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no module with experts; hand your R and W_g to erc_loss yourself")
    return layers


def gate_matrices(held, n, d):
    """The gate matrices among the tensors of a layer, as they are stored: [n, D, d]. None where shapes are others."""
    if "experts.gate_up_proj" in held:
        both, D = held["experts.gate_up_proj"], held["experts.down_proj"].size(-1)
        # (Half of both.size(1) would not do for D: where 2D = d, weights stored as [n, d, 2D] would pass.)
        return both[:, :D] if both.shape == (n, 2 * D, d) else None
    listed = [tensor for name, tensor in held.items() if LISTED_GATE.fullmatch(name)]
    fit = len(listed) == n and all(tensor.shape == (listed[0].size(0), d) for tensor in listed)
    return torch.stack(listed) if fit else None


def routers_and_gates(model):
    """Yields (R [n, d], W_g [n, d, D]) of each MoE layer.

    They are the parameters, or views of them (a list of experts is stacked, which copies): gradients reach them. Shared
    experts are not among them. Raises ValueError, with the layer's name, for a layer that is not understood.
    """
    whole = lambda weight: weight.full_tensor() if hasattr(weight, "full_tensor") else weight  # of fully_shard's slices
    for name, layer in moe_layers(model).items():
        held = {tensor.replace("_orig_mod.", ""): value  # (what torch.compile calls the module that it wraps)
                for tensor, value in [*layer.named_parameters(), *layer.named_buffers()]}
        if unknown := [tensor for tensor in held if not KNOWN.fullmatch(tensor)]:
            raise ValueError(f"{name} holds {unknown[0]}, which is not known here; if tokens pass through it on the way"
                             " to the experts, send the proxies through it, and call erc_loss yourself (a bias has no"
                             " part in the loss)")
        routers = [held[router] for router in ("gate.weight", "router.weight") if router in held]
        W_g = gate_matrices(held, *routers[0].shape) if [R.ndim for R in routers] == [2] else None
        if W_g is None:
            shapes = [f"{tensor} {list(held[tensor].shape)}" for tensor in held if not tensor.startswith("shared_")][:3]
            raise ValueError(f"{name} should have a router [n, d] and n gate matrices [D, d], but has"
                             f" {', '.join(shapes)}; transpose or gather them, and call erc_loss yourself")
        yield whole(routers[0]), whole(W_g).transpose(1, 2)                            # (n, d), (n, d, D)


def add_erc_gradient(model, step, weight=1.0, alpha=1.0):
    """Adds the gradient of weight * ERC loss -> the ERC loss [], mean over layers; a tensor, so that nothing waits.

    Once per optimizer step, after the last backward and scaler.unscale_, before clipping. Its noise depends on `step`
    and on the layer, and on nothing else. Raises ValueError where nothing can be trained, and as the above do.
    """
    layers, losses = len(moe_layers(model)), []
    for i, (R, W_g) in enumerate(routers_and_gates(model)):  # layer by layer: only one's n * n responses [D] are alive
        noise = torch.Generator(R.device).manual_seed(int(step) * layers + i)
        with torch.autocast(R.device.type, enabled=False):  # else the caller's autocast would be that of backward
            losses.append(erc_loss(R, W_g, alpha, generator=noise) / layers)
            if losses[-1].requires_grad:  # a frozen layer counts in the mean, and learns nothing
                (weight * losses[-1]).backward()
    if not any(loss.requires_grad for loss in losses):
        raise ValueError("no router and no gate matrix can be trained; unfreeze them, and call this outside of no_grad")
    return sum(loss.detach().to(losses[0].device) for loss in losses)


@torch.no_grad()
def coupling(model, alpha=1.0):
    """What to log: (ERC loss without noise, violated, coupling), three floats, means over layers."""
    rows = []
    for R, W_g in routers_and_gates(model):
        M = activation_norms(R, W_g)                                                   # (n, n)
        rows.append([coupling_hinge(M, alpha).item(), *(value.item() for value in coupling_report(M, alpha))])
    return [sum(column) / len(rows) for column in zip(*rows)]


def training_step(model, optimizer, scaler, micro_batches, step, clip=1.0):
    """One optimizer step, as it may be in your loop; `here` is what this file adds to it."""
    optimizer.zero_grad()
    for tokens in micro_batches:                                                       # (B, T) each
        with torch.autocast(tokens.device.type, torch.bfloat16):  # float16 where the scaler is enabled
            loss = model(input_ids=tokens, labels=tokens).loss / len(micro_batches)
        scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    add_erc_gradient(model, step)  # here
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    scaler.step(optimizer)
    scaler.update()


def main():
    try:
        from transformers import OlmoeConfig, OlmoeForCausalLM
    except ImportError:
        sys.exit("couple.py: error: the demonstration needs a package: pip install transformers")
    torch.manual_seed(0)
    model = OlmoeForCausalLM(OlmoeConfig(
        vocab_size=256, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, num_experts=8, num_experts_per_tok=2, pad_token_id=0, eos_token_id=0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", enabled=False)  # wanted for float16 alone
    print("steps      erc  violated  coupling")
    for step in range(21):
        if step % 5 == 0:
            erc, violated, ratio = coupling(model)
            print(f"{step:5d}  {erc:.5f}  {violated:8.1%}  {ratio:8.2f}")
        training_step(model, optimizer, scaler, [torch.randint(256, (4, 32)) for _ in range(4)], step)


if __name__ == "__main__":
    main()
