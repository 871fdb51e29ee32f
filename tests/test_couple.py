"""The recipe for other people's models: the right matrices, their gradient, once per step, on every process the same.

Needs transformers; the models are random and small. Run: python -m pytest tests/test_couple.py
"""

import copy
import os
import socket
import subprocess
import sys
from pathlib import Path

import couple
import pytest
import torch
from torch import nn

import erc_moe

transformers = pytest.importorskip("transformers", reason="couples models of transformers, which is not installed")
ROOT = Path(erc_moe.__file__).parent
n, d, D = 4, 32, 16  # 2D = d: gate_up_proj [n, 2D, d] is square, so that no shape tells its rows from its columns
SIZES = dict(vocab_size=64, hidden_size=d, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
             num_experts_per_tok=2, pad_token_id=0, bos_token_id=0, eos_token_id=0)
LAYOUTS = {  # class in transformers -> its own settings
    "Olmoe": dict(intermediate_size=D, num_experts=n),
    "Qwen2Moe": dict(moe_intermediate_size=D, shared_expert_intermediate_size=24, intermediate_size=40, num_experts=n),
    "Qwen3Moe": dict(moe_intermediate_size=D, intermediate_size=40, num_experts=n, head_dim=16),
    "Mixtral": dict(intermediate_size=D, num_local_experts=n, router_jitter_noise=0.1),
    "DeepseekV3": dict(  # beyond the four that were read closely: a bias in the choice, shared experts, a dense layer
        moe_intermediate_size=D, intermediate_size=40, n_routed_experts=n, num_hidden_layers=3, first_k_dense_replace=1,
        n_group=1, topk_group=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8),
    "GraniteMoe": dict(intermediate_size=D, num_local_experts=n),  # the router is called router
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def hugging_face_model(layout="Olmoe", dtype=torch.float64, **changes):
    """A small model with random weights of a size at which every one of them matters."""
    config = getattr(transformers, f"{layout}Config")(**SIZES | LAYOUTS.get(layout, {}) | changes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{layout}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=parameter.size(-1) ** -0.5)
    model.set_experts_implementation("eager")  # of those that transformers has, the one that knows float64
    return model.to(dtype)


class Listed(nn.Module):
    """Layers of one router and a list of experts each, as models of transformers had before version 5, and others."""

    def __init__(self, names=("gate_proj", "up_proj", "down_proj"), bias=False):
        super().__init__()
        torch.manual_seed(1)
        sizes = dict(zip(names, ((d, D), (d, D), (D, d)) if names[0] == "gate_proj" else ((d, D), (D, d), (d, D))))
        self.layers = nn.ModuleList(nn.ModuleDict(dict(
            gate=nn.Linear(d, n, bias=bias),
            experts=nn.ModuleList(nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})
                                  for _ in range(n)))) for _ in range(2))


def norms_by_loops(R, gates):
    """M[i][j] = ||gates[j] @ R[i]||, a sum of squares for each entry.  R [n, d], gates n times [D, d] -> [n, n]"""
    return torch.stack([torch.stack([(gate @ proxy).square().sum().sqrt() for gate in gates]) for proxy in R])


def erc_by_loops(R, gates, alpha, seed):
    """The ERC loss of a layer, entry by entry; its noise factors are those that erc_moe draws, taken as constants."""
    with torch.no_grad():
        noise = torch.Generator().manual_seed(seed)
        delta = erc_moe.perturb(torch.ones_like(R), erc_moe.noise_bound(R), noise)
    M, total = norms_by_loops(R * delta, gates), 0
    for i in range(n):
        for j in range(n):
            if i != j:
                total = total + (M[i, j] - alpha * M[i, i]).clamp(min=0) + (M[j, i] - alpha * M[i, i]).clamp(min=0)
    return total / n**2


def gradients(model):
    """name -> gradient, copied, of the parameters that have one."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def farthest(one, other):
    """The largest difference between two dicts of tensors with the same names."""
    assert one.keys() == other.keys(), f"only in one: {one.keys() ^ other.keys()}"
    return max((one[name] - other[name]).abs().max().item() for name in one)


def largest(tensors):
    return max(tensor.abs().max().item() for tensor in tensors.values())


def moe_modules(model):
    """The MoE layers of a model of transformers, found by the class of their experts."""
    return [module for module in model.modules()
            if any(type(child).__name__.endswith("Experts") for child in module.children())]


# ---- Which matrices ------------------------------------------------------------------------------


@every_layout
def test_the_pair_is_what_the_model_itself_multiplies_tokens_by(layout):
    """M of each pair equals the norms that go into the activation when the layer's own code runs its router's rows."""
    model = hugging_face_model(layout)
    blocks, pairs = moe_modules(model), list(couple.routers_and_gates(model))
    assert len(blocks) == len(pairs) == 2, f"{len(blocks)} MoE layers, {len(pairs)} pairs"
    for block, (R, W_g) in zip(blocks, pairs):
        router, seen = getattr(block, "gate", None) or block.router, []
        logits = router(torch.eye(d, dtype=torch.float64))[0]                          # (d, n), of the unit vectors
        assert torch.allclose(R.to(logits.dtype), logits.T, rtol=1e-12), f"{layout}: R is not the router's matrix"
        block.experts.act_fn.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0]))
        for j in range(n):
            block.experts(R, torch.full((n, 1), j), torch.ones(n, 1, dtype=torch.float64))
            own, ours = seen[j].norm(dim=-1), torch.stack([(proxy @ W_g[j]).norm() for proxy in R])
            assert torch.allclose(own, ours, rtol=1e-12), f"{layout}, expert {j}: {own.tolist()}, not {ours.tolist()}"


@pytest.mark.parametrize("names", [("gate_proj", "up_proj", "down_proj"), ("w1", "w2", "w3")])
def test_a_list_of_experts_is_taken_as_well(names):
    """M equals ||gate_j(R[i])||, with expert j's own Linear; the order of the experts is kept."""
    model = Listed(names).double()
    for layer, (R, W_g) in zip(model.layers, couple.routers_and_gates(model), strict=True):
        own = torch.stack([layer["experts"][j][names[0]](layer["gate"].weight).norm(dim=-1) for j in range(n)], dim=1)
        assert torch.allclose(own, norms_by_loops(R, W_g.transpose(1, 2)), rtol=1e-12)


@every_layout
def test_loss_and_gradient_are_those_of_the_formula_and_reach_nothing_else(layout):
    """weight * mean over layers, entry by entry from the state dict: each router, each gate half, no other number."""
    model, weight, alpha, step = hugging_face_model(layout), 0.7, 0.9, 5
    state = {name: tensor.clone().requires_grad_() for name, tensor in model.state_dict().items()
             if name.endswith((".gate.weight", ".router.weight", ".experts.gate_up_proj"))}
    routers = [name for name in state if state[name].shape == (n, d)]
    losses = [erc_by_loops(state[router], [both[:D] for both in state[experts]], alpha, seed=2 * step + i)
              for i, (router, experts) in enumerate(zip(routers, [name for name in state if name not in routers]))]
    assert len(losses) == 2, list(state)
    (weight * sum(losses) / 2).backward()
    loss = couple.add_erc_gradient(model, step, weight, alpha)
    assert not loss.requires_grad and loss.item() == pytest.approx(sum(losses).item() / 2, rel=1e-12)
    found, wanted = gradients(model), {name: tensor.grad for name, tensor in state.items()}
    assert farthest(found, wanted) < 1e-14, f"{layout}: gradients differ by {farthest(found, wanted):.1e}"
    for name, gradient in found.items():
        assert gradient.any(dim=-1)[..., :D].all(), f"{name} has rows without a gradient"


@every_layout
def test_a_few_steps_couple_the_model(layout):
    """Twenty steps on the ERC loss alone: it falls below a tenth, and so do the broken constraints."""
    model = hugging_face_model(layout)
    (erc, violated, ratio), optimizer = couple.coupling(model), torch.optim.SGD(model.parameters(), lr=1.0)
    assert violated > 0.3, f"{violated:.0%} broken from the start: nothing to see"
    for step in range(20):
        optimizer.zero_grad()
        couple.add_erc_gradient(model, step)
        optimizer.step()
    after = couple.coupling(model)
    assert after[0] < erc / 10 and after[1] < violated / 10 and after[2] > ratio, f"{(erc, violated, ratio)} to {after}"


def test_what_is_logged_is_without_noise():
    """coupling equals the formulas on the clean M, in mean over layers, and says the same twice."""
    model, rows = hugging_face_model(), []
    for layer in model.model.layers:
        M = norms_by_loops(layer.mlp.gate.weight, layer.mlp.experts.gate_up_proj[:, :D]).tolist()
        pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
        gaps = [M[i][j] - 0.9 * M[i][i] for i, j in pairs] + [M[j][i] - 0.9 * M[i][i] for i, j in pairs]
        others = sum(M[i][j] for i, j in pairs) / len(pairs)
        rows.append([sum(max(0, gap) for gap in gaps) / n**2, sum(gap > 0 for gap in gaps) / len(gaps),
                     sum(M[i][i] for i in range(n)) / n / others])
    wanted = [sum(column) / 2 for column in zip(*rows)]
    assert couple.coupling(model, 0.9) == pytest.approx(wanted, rel=1e-6) and not gradients(model)
    assert couple.coupling(model, 0.9) == couple.coupling(model.eval(), 0.9), "two looks at the same weights differ"


# ---- Once per step, unscaled, in float32, with the step's noise -----------------------------------


def step_gradients(model, micro_batches, scaler=None, without=False):
    """The gradients that the published step ends with; `without` its line of the ERC loss on demand."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with pytest.MonkeyPatch.context() as patched:
        if without:
            patched.setattr(couple, "add_erc_gradient", lambda *arguments: None)
        couple.training_step(model, optimizer, scaler or torch.amp.GradScaler("cpu", enabled=False), micro_batches, 3,
                             clip=float("inf"))
    return gradients(model)


def erc_part(model, micro_batches, scaler=None):
    """What the ERC line adds in a step; and next to it what add_erc_gradient alone gives, on the parameters it has."""
    alone = copy.deepcopy(model)
    couple.add_erc_gradient(alone, 3)
    alone, without = gradients(alone), step_gradients(model, micro_batches, scaler, without=True)
    return {name: tensor - without[name] for name, tensor in step_gradients(model, micro_batches, scaler).items()
            if name in alone}, alone


TOKENS = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(0))


def test_accumulation_leaves_the_gradient_of_the_loss_as_it_is():
    """Four micro-batches of one row, or one of four rows: the ERC loss adds the same, and its own gradient."""
    for micro_batches in ([TOKENS], list(TOKENS.split(1))):
        added, alone = erc_part(hugging_face_model(), micro_batches)
        assert farthest(added, alone) < 1e-14, f"{len(micro_batches)}: off by {farthest(added, alone):.1e}"


def test_a_scaler_leaves_the_gradient_of_the_loss_as_it_is():
    """Under a GradScaler of 2^16 the ERC loss adds its own gradient, no more and no less."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    added, alone = erc_part(hugging_face_model(), [TOKENS], scaler)
    assert farthest(added, alone) < 1e-14 * 2**16, f"off by {farthest(added, alone):.1e}"


def test_autocast_leaves_the_gradient_of_the_loss_as_it_is():
    """After a step under bfloat16 autocast, and even when called inside of autocast."""
    model = hugging_face_model(dtype=torch.float32)
    added, alone = erc_part(model, [TOKENS])
    assert farthest(added, alone) < 1e-6 * largest(alone), f"off by {farthest(added, alone):.1e}"
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        couple.add_erc_gradient(model, 3)
    assert farthest(gradients(model), alone) == 0, "called inside of autocast, it computes something else"


def test_weights_in_bfloat16_get_the_gradient_of_their_values():
    """Up to the rounding of the gradient itself, they get what the same values in float32 get."""
    half = hugging_face_model(dtype=torch.bfloat16)
    single = copy.deepcopy(half).float()
    for model in (half, single):
        couple.add_erc_gradient(model, 3)
    for name, gradient in gradients(single).items():
        ours = dict(half.named_parameters())[name].grad
        assert ours.dtype == torch.bfloat16 and torch.equal(ours, gradient.bfloat16()), name


def test_the_noise_is_that_of_the_step():
    """The same step gives the same bits, whatever was drawn before; another gives others; dropout sees no change."""
    seen = []
    for step in (3, 3, 4):
        model = hugging_face_model()
        torch.manual_seed(len(seen))
        stream = torch.get_rng_state()
        couple.add_erc_gradient(model, step)
        assert torch.equal(stream, torch.get_rng_state()), "it drew from torch's global stream"
        seen.append(gradients(model))
    assert farthest(seen[0], seen[1]) == 0 and farthest(seen[0], seen[2]) > 1e-4
    model = hugging_face_model()
    model.model.layers[1].load_state_dict(model.model.layers[0].state_dict())
    couple.add_erc_gradient(model, 3)
    one, other = (layer.mlp.gate.weight.grad for layer in model.model.layers)
    assert (one - other).abs().max() > 1e-4, "two equal layers get the same noise"


# ---- Several processes ---------------------------------------------------------------------------


def batch(step, process):
    return torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(10 * step + process))


def worker(folder):
    """What each of the two processes does: three steps under DDP, then one gradient under fully_shard."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    process, model = dist.get_rank(), hugging_face_model()
    torch.manual_seed(process)  # the global streams of two processes differ, and may
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", enabled=False)
    for step in range(3):
        couple.training_step(wrapped, optimizer, scaler, [batch(step, process)], step)
    torch.save(model.state_dict(), Path(folder, f"ddp{process}.pt"))
    mesh = init_device_mesh("cpu", (2,))
    for sharded in (hugging_face_model(num_experts=5), Listed().double()):  # 5 experts: slices of 3 and of 2
        plain = copy.deepcopy(sharded)
        for module in [*(sharded.model.layers if hasattr(sharded, "model") else ()), sharded]:
            fully_shard(module, mesh=mesh)
        for model in (plain, sharded):
            couple.add_erc_gradient(model, 3)
            couple.add_erc_gradient(model, 4)  # to a gradient that is there already
        found = {name: gradient.full_tensor() for name, gradient in gradients(sharded).items()}
        difference = farthest(found, gradients(plain))
        assert difference < 1e-14, f"sharded, gradients differ by {difference:.1e}"
        assert couple.coupling(sharded) == pytest.approx(couple.coupling(plain), rel=1e-12)
    Path(folder, f"sharded{process}").touch()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The folder that `worker` has filled, on two processes."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1",
               f"--master-port={port}", __file__, str(folder)]
    environment = dict(os.environ, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo",
                       PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "experiments")]))
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    return folder, done


def test_two_processes_keep_the_same_weights_and_learn_what_one_does(two_processes):
    """Under DDP, after three steps, the replicas are equal to the bit; one process with both batches gets there too."""
    folder, done = two_processes
    assert Path(folder, "ddp0.pt").exists() and Path(folder, "ddp1.pt").exists(), done.stderr[-3000:]
    one, other = (torch.load(folder / f"ddp{process}.pt") for process in range(2))
    assert farthest(one, other) == 0, f"the replicas differ by {farthest(one, other):.1e}"
    model = hugging_face_model()
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", enabled=False)
    for step in range(3):
        couple.training_step(model, optimizer, scaler, [batch(step, 0), batch(step, 1)], step)
    assert farthest(one, model.state_dict()) < 1e-12, f"off by {farthest(one, model.state_dict()):.1e}"


def test_fully_sharded_weights_get_the_gradient_of_whole_ones(two_processes):
    """fused and listed experts, also where the experts do not divide evenly among the processes."""
    folder, done = two_processes
    assert Path(folder, "sharded0").exists() and Path(folder, "sharded1").exists(), done.stderr[-3000:]


def test_compiled_experts_are_understood():
    """torch.compile of the experts renames their weights; they get the same gradient."""
    plain, compiled = hugging_face_model(), hugging_face_model()
    for layer in compiled.model.layers:
        layer.mlp.experts = torch.compile(layer.mlp.experts)  # (nothing runs, so nothing compiles)
    assert torch.equal(couple.add_erc_gradient(plain, 3), couple.add_erc_gradient(compiled, 3))
    found = {name.replace("_orig_mod.", ""): gradient for name, gradient in gradients(compiled).items()}
    assert found.keys() == gradients(plain).keys(), found.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in gradients(plain).items())


# ---- What is refused -----------------------------------------------------------------------------


def test_frozen_weights_learn_nothing_and_hold_nothing_up():
    """A frozen layer changes nothing for the others; beside a frozen router the gates learn; all frozen is refused."""
    free, frozen = hugging_face_model(), hugging_face_model()
    frozen.model.layers[0].requires_grad_(False)
    frozen.model.layers[1].mlp.gate.weight.requires_grad_(False)
    losses = [couple.add_erc_gradient(model, 3) for model in (free, frozen)]
    assert torch.equal(*losses), f"the loss is {losses[0]}, and {losses[1]} with frozen parts"
    (name,) = found = gradients(frozen)
    assert name == "model.layers.1.mlp.experts.gate_up_proj" and torch.equal(found[name], gradients(free)[name]), name
    refuses(frozen.requires_grad_(False), "can be trained")
    with torch.no_grad():
        refuses(free, "can be trained")


def refuses(model, *texts):
    """add_erc_gradient ends with one line that holds all the texts, and adds nothing."""
    before = gradients(model)
    with pytest.raises(ValueError) as refused:
        couple.add_erc_gradient(model, 3)
    line = str(refused.value)
    assert "\n" not in line and all(text in line for text in texts), line
    assert gradients(model).keys() == before.keys(), "refused, yet something was added"


def test_models_it_does_not_know_are_refused():
    """No experts, a router with a bias, weights the other way around (square, at that), maps, hashed tokens."""
    refuses(hugging_face_model("Llama", intermediate_size=D), "LlamaForCausalLM has no module with experts")
    refuses(hugging_face_model("GptOss", intermediate_size=D, num_local_experts=n, head_dim=16),
            "model.layers.0.mlp holds router.bias")
    llama4 = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(
        **SIZES, intermediate_size=D, intermediate_size_mlp=D, num_local_experts=n, head_dim=16,
        interleave_moe_layer_step=1))
    assert llama4.model.layers[0].feed_forward.experts.gate_up_proj.shape == (n, d, 2 * D) == (n, 2 * D, d)
    refuses(llama4, "model.layers.0.feed_forward should have", f"experts.gate_up_proj [{n}, {d}, {d}]", "transpose")
    refuses(Listed(bias=True), "layers.0 holds gate.bias")
    projected, hashed, renamed = Listed(), Listed(), Listed()
    projected.layers[0]["norm"] = nn.RMSNorm(d)
    refuses(projected, "layers.0 holds norm.weight", "send the proxies through it")
    hashed.layers[0]["gate"].register_buffer("tid2eid", torch.zeros(64, 2))
    refuses(hashed, "layers.0 holds gate.tid2eid")
    expert = renamed.layers[0]["experts"][2]  # as LoRA does
    expert["gate_proj"] = nn.ModuleDict(dict(base_layer=expert["gate_proj"], lora_A=nn.Linear(d, 2, bias=False)))
    refuses(renamed, "layers.0 holds experts.2.gate_proj.base_layer.weight")


def test_shapes_it_does_not_know_are_refused():
    """Sliced, transposed or missing weights, and two routers: the line names the layer and shows shapes."""
    sliced = hugging_face_model()
    experts = sliced.model.layers[0].mlp.experts
    for name in ("gate_up_proj", "down_proj"):
        setattr(experts, name, nn.Parameter(getattr(experts, name)[:2]))
    refuses(sliced, "model.layers.0.mlp should have", f"experts.gate_up_proj [2, {2 * D}, {d}]")
    flat = hugging_face_model()
    flat.model.layers[0].mlp.gate.weight = nn.Parameter(torch.zeros(0))
    refuses(flat, "model.layers.0.mlp should have", "gate.weight [0]")
    for spoil, shows in [
        (lambda layer: layer.update(dict(gate=nn.Linear(n, d, bias=False))), f"gate.weight [{d}, {n}]"),
        (lambda layer: layer["experts"].append(copy.deepcopy(layer["experts"][0])), f"gate.weight [{n}, {d}]"),
        (lambda layer: layer["experts"][1].update(dict(gate_proj=nn.Linear(d, D + 1, bias=False))), "n gate matrices"),
        (lambda layer: layer.update(dict(router=copy.deepcopy(layer["gate"]))), "a router"),
        (lambda layer: layer.pop("gate"), "a router"),
        (lambda layer: [expert.pop("gate_proj") for expert in layer["experts"]], "n gate matrices"),
    ]:
        model = Listed()
        spoil(model.layers[0])
        refuses(model, "layers.0 should have", shows)


# ---- The program ---------------------------------------------------------------------------------


def test_the_program_couples_a_model():
    """It prints a table, in which the loss and the broken constraints fall to a tenth and the coupling grows."""
    done = subprocess.run([sys.executable, "-W", "error", couple.__file__], capture_output=True, text=True, timeout=240,
                          env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert done.returncode == 0 and not done.stderr, done.stderr
    head, *rows = [line.split() for line in done.stdout.splitlines()]
    assert head == ["steps", "erc", "violated", "coupling"], head
    first, last = ([float(number.rstrip("%")) for number in row] for row in (rows[0], rows[-1]))
    assert last[0] > first[0] and last[1] < first[1] / 10 and last[2] < first[2] / 10 and last[3] > 1.5 * first[3], rows


def test_without_transformers_the_program_says_what_to_install(monkeypatch):
    """One line, and no traceback."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit, match="^couple.py: error: .*pip install transformers$"):
        couple.main()


if __name__ == "__main__":
    worker(sys.argv[1])
