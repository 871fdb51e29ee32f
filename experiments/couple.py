"""The ERC loss in someone else's model: the whole recipe, for Mixture-of-Experts models of Hugging Face's transformers.

    python experiments/couple.py report FOLDER_OR_NAME    # how coupled is this checkpoint?

It needs the package transformers. experiments/results/families.md lists the model families that are understood.

For your own loop copy, below `import re` and `import torch`, the block of erc_moe.py between its two paste lines, and
this file from ROUTER to `coupling` (MIT licence; LICENSE goes with it). Then call `add_erc_gradient(model, step)` once
per optimizer step, where `training_step` does. Beside the pitfalls of the README:

* GradScaler. Its factor is on the gradients until scaler.unscale_(optimizer). Add after that, and before clipping.
* DDP. It averages gradients within backward; what comes later is averaged by no one. Add it after the last backward, on
  every process, with the same noise. Hence the noise comes from `step` and not from torch's global stream.
* FSDP2, tensor and expert parallelism. DTensors are gathered, on all processes: `coupling` too must run on each.
  What FSDP2 has left whole is resharded first: its gradient would reach no optimizer. n / p plain experts a process are
  refused: the README's table has them. Not tested: the older FullyShardedDataParallel, and DeepSpeed.
* Pipeline parallel. The mean is over the layers of the whole model: on a stage, weight is own layers / all layers.
* Trainer. The place is on_pre_optimizer_step(args, state, control, model, **_) of a callback, with state.global_step as
  `step`. Clipping is over by then; in float16, max_grad_norm must be above 0, or nothing has unscaled the gradients.
* Frozen weights. A layer learns what may be trained, router or gate. LoRA freezes and renames both: an error.
"""

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # erc_moe.py lies one folder up

import torch

from erc_moe import activation_norms, coupling_hinge, coupling_report, erc_loss, noise_bound
from prepare_data import UserError, run_program

# The tensors that a MoE layer may hold, by their names in transformers 5. In all layers with these names, but for those
# in REFUSED, router and experts see the same tokens. (Mixtral can jitter them in training, but before both.)
ROUTER = re.compile(r"(gate|router)\.((gate|wg|layer|classifier)\.)?weight")       # R [n, d]
LISTED = re.compile(r"experts\.(expert_)?\d+\.(gate_proj|w1|wi)\.weight")          # n gate matrices [D, d]
FUSED = {"experts.gate_up_proj": ("experts.down_proj", 2),                         # [n, 2D, d] and [n, d, D]
         "input_linear.weight": ("output_linear.weight", 2),                       # the same
         "experts.up_proj": ("experts.down_proj", 1)}                              # [n, D, d] and [n, d, D]: no gate
FLAT = "experts.mlp.w1"                                                            # [nD, d]
OTHERS = re.compile(r"experts\.((expert_)?\d+\.)?(up_proj|down_proj|w2|w3|wo)(\.weight)?|experts\.mlp\.(v1|w2)"
                    r"|output_linear\.weight|(.*[._])?bias|(gate\.)?moe_statics\..*|gate\.global_scale"
                    r"|shared_(expert|experts|mlp)(_gate)?\..*"                    # sees all tokens: has no proxy
                    r"|post_mlp_layernorm\.weight")                                # behind the experts
MAPPED = ("where f maps tokens on the way to the experts, the loss is"
          " coupling_hinge(activation_norms(f(perturb(R, noise_bound(R))), W_g))")
REFUSED = {  # class -> why its R and W_g cannot be coupled as they are
    **dict.fromkeys(["Gemma4TextDecoderLayer", "DiffusionGemmaDecoderTextLayer", "DiffusionGemmaEncoderTextLayer"],
                    f"R is router.proj.weight * router.scale, and f is pre_feedforward_layernorm_2; {MAPPED}"),
    "DogeCDMoE": "product keys choose the experts, and R has no row for each",
    "Llama4TextMoe": "it scales tokens by their score before the experts",
    "MuseSparkMoE": f"f is pre_expert_proj, then pre_expert_norm; {MAPPED}",
    "NllbMoeSparseMLP": "transformers 5.23 sends all tokens to experts 0 and 1, whatever R says",
    "VitPoseBackboneMoeMLP": "the caller chooses the expert: there is no R",
    "ZayaSparseMoeBlock": "an MLP chooses the experts, and R has no row for each",
}


def moe_layers(model, where=""):
    """name -> module with experts, if `where` matches in its name. ValueError for none, and for a class in REFUSED."""
    layers = {}
    for name, module in model.named_modules():
        children, kind = dict(module.named_children()), type(module).__name__
        if "attention" in name or not re.search(where, name):  # (experts of attention have no activation)
            continue
        if kind in REFUSED:
            raise ValueError(f"{name}, a {kind}, cannot be coupled as it is: {REFUSED[kind]}")
        if "experts" in children or {"router", "input_linear"} <= children.keys():
            layers[name or "the model"] = module
    if not layers:
        raise ValueError(f"{type(model).__name__} has no module with experts" + (
            f" whose name matches {where}" if where else "; hand your R and W_g to erc_loss yourself"))
    return layers


def whole(tensor):
    """All values of a DTensor, of which each process holds a slice; another tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gate_matrices(held, experts, R, gather):
    """W_g [n, d, D] of the tensors that a layer holds: x W_g[j] enters the activation. None where shapes do not fit."""
    if listed := [gather(tensor) for name, tensor in held.items() if LISTED.fullmatch(name)]:
        return torch.stack(listed).mT if all(W.shape == listed[0].shape for W in listed) else None
    if FLAT in held:
        D, rest = divmod(len(held[FLAT]), len(R))
        return None if rest else gather(held[FLAT]).unflatten(0, (len(R), D)).mT
    for name, (down_name, parts) in FUSED.items():
        if name in held and down_name in held:
            W, down = gather(held[name]), held[down_name]
            if getattr(experts, "is_transposed", False):  # transformers states it; where 2D = d no shape tells
                W, down = W.mT, down.mT
            n, D = down.size(0), down.size(-1)
            if W.shape[1:] != (parts * D, R.size(1)):
                return None
            return (W[:n, :D] if getattr(experts, "is_concatenated", True) else W[:n, ::2]).mT


def router_and_gates(name, layer, gather=whole):
    """(R [n, d], W_g [n, d, D]) of a MoE layer, which gradients reach: the parameters, views of them, or their stack.

    Shared and identity experts are left out. Raises ValueError, with the layer's name, where it is not understood.
    """
    held = {tensor.replace("_orig_mod.", ""): value  # (what torch.compile calls the module that it wraps)
            for tensor, value in [*layer.named_parameters(), *layer.named_buffers()]}
    for tensor, value in held.items():
        if value.dtype.itemsize == 1 or value.is_meta:
            raise ValueError(f"{name} holds {tensor} in {value.dtype} on {value.device}; load it whole and dequantized")
    routers = [tensor for tensor in held if ROUTER.fullmatch(tensor)]
    if unknown := [tensor for tensor in held if tensor not in (FLAT, *FUSED, *routers)
                   and not LISTED.fullmatch(tensor) and not OTHERS.fullmatch(tensor)]:
        maybe = "" if routers else "; no router was found, and one of them may be it"
        raise ValueError(f"{name} holds {', '.join(unknown)}, not known here{maybe}; call erc_loss yourself; {MAPPED}")
    if any(LISTED.fullmatch(tensor) and tensor.replace(".w1.", ".w3.") in held.keys() - {tensor} for tensor in held):
        raise ValueError(f"{name} holds w1 and w3 of each expert; call erc_loss with what enters the activation")
    R, W_g, rest = gather(held[routers[0]]) if len(routers) == 1 else None, None, 0
    if R is not None and R.ndim == 2:
        experts, router = getattr(layer, "experts", layer), layer.get_submodule(routers[0].split(".")[0])
        W_g = gate_matrices(held, experts, R, gather)
        rest = getattr(experts, "zero_expert_num", 0) + getattr(router, "n_shared_experts", 0)  # R's last rows
    if (W_g is None or W_g.ndim != 3 or R.shape != (len(W_g) + rest, W_g.size(1))
            or torch.promote_types(R.dtype, torch.float32) != torch.promote_types(W_g.dtype, torch.float32)):
        found = [f"{name} {[*W.shape]} {W.dtype}" for name, W in held.items() if not name.startswith("shared_")][:3]
        raise ValueError(f"{name} should have a router [n, d] and n gate matrices [D, d] of one dtype, but has"
                         f" {', '.join(found)}; transpose, gather or convert them, and call erc_loss yourself")
    return R[:len(W_g)], W_g


def add_erc_gradient(model, step, weight=1.0, alpha=1.0, where=""):
    """Adds the gradient of weight * ERC loss -> the ERC loss [], mean over layers; a tensor, so that nothing waits.

    Once per optimizer step, after the last backward and scaler.unscale_, before clipping. Its noise depends on `step`
    and the layer alone. `where` picks layers by name: r"^(?!.*vision)" leaves a vision tower out. Raises ValueError,
    before anything is added, where nothing can be trained, and as the above do.
    """
    layers, losses = moe_layers(model, where), []
    [module.reshard() for module in model.modules() if hasattr(module, "reshard")]  # else FSDP2 can lose the gradient
    for name, layer in layers.items():  # nothing is gathered: a refusal comes before the first gradient
        router_and_gates(name, layer, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))
    for i, (name, layer) in enumerate(layers.items()):  # one by one: only one's n * n responses [D] are alive
        R, W_g = router_and_gates(name, layer)
        noise = torch.Generator(R.device).manual_seed(int(step) * len(layers) + i)
        with torch.autocast(R.device.type, enabled=False):  # else the caller's autocast would be that of backward
            losses.append(erc_loss(R, W_g, alpha, generator=noise) / len(layers))
            if losses[-1].requires_grad:  # a frozen layer counts in the mean, and learns nothing
                (weight * losses[-1]).backward()
    if not any(loss.requires_grad for loss in losses):
        raise ValueError("no router and no gate matrix can be trained; unfreeze them, and call this outside of no_grad")
    return sum(loss.detach().to(losses[0].device) for loss in losses)


@torch.no_grad()
def coupling(model, alpha=1.0, where=""):
    """What to log: (ERC loss without noise, violated, coupling), three floats, means over layers."""
    Ms = [activation_norms(*router_and_gates(*item)) for item in moe_layers(model, where).items()]     # (n, n) each
    rows = [[coupling_hinge(M, alpha).item(), *map(float, coupling_report(M, alpha))] for M in Ms]
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


def open_checkpoint(source):
    """A folder, or a name on the hub -> (MoE layers, still without weights; a function that loads one; files read).

    transformers builds the model, finds its files, and converts them. Raises OSError or ValueError, with the reason.
    """
    from safetensors import SafetensorError, safe_open
    from transformers import AutoConfig, AutoModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, convert_and_load_state_dict_in_model, rename_source_key
    from transformers.modeling_utils import LoadStateDictConfig, _get_resolved_checkpoint_files

    if not Path(source).is_dir() and (str(source).count("/") != 1 or Path(source).parent.is_dir()):
        raise FileNotFoundError(f"there is no folder {source}, and a name on the hub looks like owner/name")
    config, slices = AutoConfig.from_pretrained(source), {}
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    layers = moe_layers(model)
    named = getattr(config, "transformers_weights", None)
    try:  # (the second True: without asking the hub to convert .bin files)
        for file in (files := _get_resolved_checkpoint_files(source, None, None, True, None, True, named)[0]):
            opened = safe_open(file, framework="pt")
            slices |= {saved: opened.get_slice(saved) for saved in opened.keys()}
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}); fetch it again") from None
    except OSError as error:
        raise OSError(f"{error} If it has .bin files: save_pretrained makes safetensors of them") from None
    steps, names = get_model_conversion_mapping(model), model.state_dict()
    renaming = [step for step in steps if isinstance(step, WeightRenaming)]
    converting = [step for step in steps if not isinstance(step, WeightRenaming)]
    target = {key: rename_source_key(key, renaming, converting, model.base_model_prefix, names)[0] for key in slices}

    def load(name, layer):
        own = {saved: slices[saved] for saved in slices if target[saved].startswith(f"{name}.")}
        if packed := [saved for saved in own if slices[saved].get_dtype().startswith(("F8", "I8", "U8"))]:
            raise ValueError(f"{packed[0]} is stored in 8 bits or less; save the model dequantized")
        convert_and_load_state_dict_in_model(model, own, LoadStateDictConfig(weight_mapping=steps))
        if lacking := [weight for weight, value in layer.named_parameters() if value.is_meta]:
            raise ValueError(f"{source} lacks {name}.{lacking[0]}, or holds it in another shape")

    return layers, load, files


@torch.no_grad()
def report(source):
    """Prints a line for each MoE layer of a checkpoint, from its clean M; one layer is in memory at a time."""
    from tqdm import tqdm
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    layers, load, files = open_checkpoint(source)
    width = max(len(name) for name in layers)
    spread = lambda norms: f"{norms.mean():7.3f} +-{norms.std(correction=0):6.3f}"
    print("read:", files[0], *(Path(file).name for file in files[1:]))
    print("erc at alpha 1 to 5; decoupled: the smallest alpha that breaks no constraint; violated, coupling at alpha 1;"
          f" norms: mean +- sd\n{'layer':{width}}    erc 1       2       3       4       5  decoupled"
          f"  violated  coupling  epsilon  {'|R[i]|':17}  |W_g[i]|")
    for name, layer in tqdm(layers.items(), unit="layer", disable=None):
        load(name, layer)
        R, W_g = router_and_gates(name, layer)
        M = activation_norms(R, W_g)                                                   # (n, n)
        (violated, ratio), off = coupling_report(M), M.clone().fill_diagonal_(0)
        decoupled = (torch.maximum(off.amax(dim=0), off.amax(dim=1)) / M.diagonal()).amax()
        tqdm.write("  ".join([
            f"{name:{width}}", *(f"{coupling_hinge(M, alpha):7.4f}" for alpha in range(1, 6)),
            f"{decoupled:9.2f}  {violated:8.1%}  {ratio:8.3f}  {noise_bound(R).mean():7.3f}",
            spread(R.float().norm(dim=1)), spread(W_g.float().norm(dim=(1, 2)))]))
        layer.to("meta")


def main(argv):
    parser = argparse.ArgumentParser(description="Tells how coupled a checkpoint is.")
    parser.add_argument("command", choices=["report"])
    parser.add_argument("source", metavar="FOLDER_OR_NAME", help="a checkpoint in safetensors, or its name on the hub")
    arguments = parser.parse_args(argv)
    try:
        report(arguments.source)
    except ImportError as error:
        raise UserError(f"{error}; pip install transformers==5.23.0") from None
    except ValueError as error:
        raise UserError(str(error).partition("\n")[0]) from None


if __name__ == "__main__":
    sys.exit(run_program(main))
