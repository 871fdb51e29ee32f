"""The recipe for other people's models: the right matrices, their gradient, once per step, on every process the same.

Needs transformers; the models are random and small. Run: python -m pytest tests/test_couple.py
"""

import contextlib
import copy
import io
import os
import socket
import subprocess
import sys
from pathlib import Path

import couple
import pytest
import torch
from test_families import small_model
from torch import nn

import erc_moe

safetensors = pytest.importorskip("safetensors.torch", reason="reads checkpoints of transformers")
transformers = pytest.importorskip("transformers", reason="couples models of transformers, which is not installed")
ROOT = Path(erc_moe.__file__).parent
n, d, D = 4, 32, 16  # 2D = d: gate_up_proj [n, 2D, d] is square, so that no shape tells its rows from its columns


def hugging_face_model(dtype=torch.float64, **changes):
    """A small random OLMoE."""
    model = small_model("olmoe", **changes)
    model.set_experts_implementation("eager")  # of those that transformers has, the one that knows float64
    return model.to(dtype)


class Listed(nn.Module):
    """Layers of one router and a list of experts each, as models of transformers had before version 5, and others."""

    def __init__(self, names=("gate_proj", "up_proj", "down_proj"), bias=False):
        super().__init__()
        torch.manual_seed(1)
        sizes = dict(zip(names, ((d, D), (d, D), (D, d))))
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


# ---- Which matrices ------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")])
def test_a_list_of_experts_is_taken_as_well(names):
    """M equals ||gate_j(R[i])||, with expert j's own Linear; the order of the experts is kept."""
    model = Listed(names).double()
    for name, layer in couple.moe_layers(model).items():
        R, W_g = couple.router_and_gates(name, layer)
        own = torch.stack([layer["experts"][j][names[0]](layer["gate"].weight).norm(dim=-1) for j in range(n)], dim=1)
        assert torch.allclose(own, norms_by_loops(R, W_g.transpose(1, 2)), rtol=1e-12)


def test_loss_and_gradient_are_those_of_the_formula_and_reach_nothing_else():
    """weight * mean over layers, entry by entry from the state dict: each router, each gate half, no other number."""
    model, weight, alpha, step = hugging_face_model(), 0.7, 0.5, 5
    state = {name: tensor.clone().requires_grad_() for name, tensor in model.state_dict().items()
             if name.endswith((".gate.weight", ".experts.gate_up_proj"))}
    routers = [name for name in state if state[name].shape == (n, d)]
    losses = [erc_by_loops(state[router], [both[:D] for both in state[experts]], alpha, seed=2 * step + i)
              for i, (router, experts) in enumerate(zip(routers, [name for name in state if name not in routers]))]
    assert len(losses) == 2, list(state)
    (weight * sum(losses) / 2).backward()
    loss = couple.add_erc_gradient(model, step, weight, alpha)
    assert not loss.requires_grad and loss.item() == pytest.approx(sum(losses).item() / 2, rel=1e-12)
    found, wanted = gradients(model), {name: tensor.grad for name, tensor in state.items()}
    assert farthest(found, wanted) < 1e-14, f"gradients differ by {farthest(found, wanted):.1e}"
    for name, gradient in found.items():
        assert gradient.any(dim=-1)[..., :D].all(), f"{name} has rows without a gradient"


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


@pytest.mark.parametrize("parts, scale", [(1, 1.0), (4, 1.0), (1, 2.0**16), (4, 2.0**16)])
def test_accumulation_and_a_scaler_leave_the_gradient_of_the_loss_as_it_is(parts, scale):
    """In one micro-batch or in four, scaled or not: the ERC loss adds its own gradient, no more and no less."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale > 1)
    added, alone = erc_part(hugging_face_model(), list(TOKENS.split(4 // parts)), scaler)
    assert farthest(added, alone) < 1e-14 * scale, f"off by {farthest(added, alone):.1e}"


def test_autocast_leaves_the_gradient_of_the_loss_as_it_is():
    """After a step under bfloat16 autocast, and even when called inside of autocast."""
    model = hugging_face_model(dtype=torch.float32)
    added, alone = erc_part(model, [TOKENS])
    largest = max(tensor.abs().max() for tensor in alone.values())
    assert farthest(added, alone) < 1e-6 * largest, f"off by {farthest(added, alone):.1e}"
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        couple.add_erc_gradient(model, 3)
    assert farthest(gradients(model), alone) == 0, "called inside of autocast, it computes something else"


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


DDP_OPTIONS = ("", "find_unused_parameters", "gradient_as_bucket_view", "static_graph")


def batch(step, process):
    return torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(10 * step + process))


def worker(folder):
    """What each of the two processes does: three steps under DDP, then gradients of weights that lie in slices."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo")
    process = dist.get_rank()
    for option in DDP_OPTIONS:
        model = hugging_face_model()
        torch.manual_seed(process)  # the global streams of two processes differ, and may
        wrapped = nn.parallel.DistributedDataParallel(model, **{option: True} if option else {})
        optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", enabled=False)
        for step in range(3):
            couple.training_step(wrapped, optimizer, scaler, [batch(step, process)], step)
        torch.save(model.state_dict(), Path(folder, f"ddp-{option}-{process}.pt"))
    mesh = init_device_mesh("cpu", (2,))
    fused, listed, parallel = hugging_face_model(num_experts=5), Listed().double(), hugging_face_model()
    before = [copy.deepcopy(model) for model in (fused, listed, parallel)]
    for module in [*fused.model.layers, fused, listed]:  # 5 experts: slices of 3 and of 2
        fully_shard(module, mesh=mesh)
    for layer in parallel.model.layers:  # tensor parallel: each process has some of the columns of each expert
        for module, name, dim in ((layer.mlp.gate, "weight", 0), (layer.mlp.experts, "gate_up_proj", 1)):
            setattr(module, name, nn.Parameter(distribute_tensor(getattr(module, name), mesh, [Shard(dim)])))
    for plain, sharded in zip(before, (fused, listed, parallel)):
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


@pytest.mark.parametrize("option", DDP_OPTIONS)
def test_two_processes_keep_the_same_weights_and_learn_what_one_does(two_processes, option):
    """Under DDP, after three steps, the replicas are equal to the bit; one process with both batches gets there too."""
    folder, done = two_processes
    paths = [folder / f"ddp-{option}-{process}.pt" for process in range(2)]
    assert all(path.exists() for path in paths), done.stderr[-3000:]
    one, other = map(torch.load, paths)
    assert farthest(one, other) == 0, f"the replicas differ by {farthest(one, other):.1e}"
    model = hugging_face_model()
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", enabled=False)
    for step in range(3):
        couple.training_step(model, optimizer, scaler, [batch(step, 0), batch(step, 1)], step)
    assert farthest(one, model.state_dict()) < 1e-12, f"off by {farthest(one, model.state_dict()):.1e}"


def test_fully_sharded_weights_get_the_gradient_of_whole_ones(two_processes):
    """FSDP2 with fused and listed experts, where experts do not divide evenly too; and tensor parallel."""
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


def held_as(layer, name, value):
    """Puts a buffer of that name into a layer, with the modules that its name wants."""
    *path, last = name.split(".")
    for part in path:
        if part not in dict(layer.named_children()):
            layer.add_module(part, nn.Module())
        layer = getattr(layer, part)
    layer.register_buffer(last, value)


def refuses(model, *texts):
    """add_erc_gradient ends with one line that holds all the texts, and adds nothing."""
    before = gradients(model)
    with pytest.raises(ValueError) as refused:
        couple.add_erc_gradient(model, 3)
    line = str(refused.value)
    assert "\n" not in line and all(text in line for text in texts), line
    assert gradients(model).keys() == before.keys(), "refused, yet something was added"


def test_models_it_does_not_know_are_refused():
    """No experts; llama4, also with its experts as a list; maps, hashed tokens, LoRA, packed weights: by name."""
    refuses(transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=8, hidden_size=d, num_hidden_layers=1)),
            "LlamaForCausalLM has no module with experts")
    llama4 = small_model("llama4")
    for layer in llama4.model.layers:
        refuses(llama4, "model.layers.0.feed_forward, a Llama4TextMoe", "scales tokens by their score")
        layer.feed_forward.experts = Listed().layers[0]["experts"]  # as transformers does to quantize them
    model, unknown = Listed(), ["norm.weight", "shared_pre_proj.weight", "gate.tid2eid",
                                "experts.2.gate_proj.lora_A.weight"]
    for i in range(len(unknown)):
        held_as(model.layers[0], unknown[-1 - i], torch.zeros(d))
        refuses(model, f"layers.0 holds {unknown[-1]}" if i == 0 else "layers.0 holds", *unknown[-1 - i:],
                "not known here; call erc_loss yourself; where f maps tokens on the way to the experts")
    for dtype in (torch.int8, torch.float8_e4m3fn):
        model = hugging_face_model()
        experts = model.model.layers[0].mlp.experts
        experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.detach().to(dtype), requires_grad=False)
        refuses(model, f"model.layers.0.mlp holds experts.gate_up_proj in {dtype}; load the model dequantized")
    hidden = Listed()
    hidden.layers[0]["scores"] = hidden.layers[0].pop("gate")
    refuses(hidden, "layers.0 holds scores.weight, not known here; no router was found, and one of them may be it")


def test_biases_shared_experts_and_other_names_have_no_part():
    """They change neither the loss nor any other gradient; nor do layers that `where` leaves out."""
    plain, richer = Listed(), Listed(bias=True)
    richer.load_state_dict(plain.state_dict(), strict=False)
    for layer in richer.layers:
        layer["shared_expert"], layer["shared_expert_gate"] = nn.Linear(d, d), nn.Linear(d, 1)
    richer.vision, wanted = Listed(), couple.add_erc_gradient(plain, 3)
    richer.vision.layers[0]["gate"].weight.data = plain.layers[0]["gate"].weight.data.flip(0)
    assert torch.equal(couple.add_erc_gradient(richer, 3, where="^(?!.*vision)"), wanted)
    assert farthest(gradients(richer), gradients(plain)) == 0
    assert couple.coupling(richer, where="^layers") == couple.coupling(plain) != couple.coupling(richer)


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
        (lambda layer: [expert.pop("gate_proj") for expert in layer["experts"]], "n gate matrices"),
    ]:
        model = Listed()
        spoil(model.layers[0])
        refuses(model, "layers.0 should have", shows)


# ---- The program ---------------------------------------------------------------------------------


def run_main(*arguments):
    """The output of couple.py with these arguments, in this process."""
    with pytest.MonkeyPatch.context() as patched, contextlib.redirect_stdout(io.StringIO()) as printed:
        patched.setattr(sys, "argv", ["couple.py", *map(str, arguments)])
        couple.main()
    return printed.getvalue()


def test_the_program_couples_a_model():
    """It prints a table, in which the loss and the broken constraints fall to a tenth and the coupling grows."""
    head, *rows = [line.split() for line in run_main().splitlines()]
    assert head == ["steps", "erc", "violated", "coupling"], head
    first, last = ([float(number.rstrip("%")) for number in row] for row in (rows[0], rows[-1]))
    assert last[0] > first[0] and last[1] < first[1] / 10 and last[2] < first[2] / 10 and last[3] > 1.5 * first[3], rows


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen3_vl_moe", "longcat_flash"])
def test_a_report_of_files_says_what_the_model_in_memory_does(family, tmp_path):
    """Files of one expert a name, interleaved, transposed, with identity experts; several files; every number."""
    model = small_model(family)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model*.safetensors"))) > 1, "the case does not test several files"
    rows = [line.replace("+-", " ").split() for line in run_main("report", tmp_path).splitlines()[2:]]
    layers = couple.moe_layers(model)
    assert len(rows) == len(layers), f"{len(rows)} rows for {len(layers)} layers"
    for row, (name, layer) in zip(rows, layers.items()):
        R, W_g = (tensor.detach() for tensor in couple.router_and_gates(name, layer))
        M = norms_by_loops(R, W_g.mT)
        norms = [torch.stack([tensor[j].norm() for j in range(n)]) for tensor in (R, W_g)]
        wanted = [*(erc_moe.coupling_hinge(M, alpha) for alpha in range(1, 6)), *erc_moe.coupling_report(M),
                  erc_moe.noise_bound(R).mean(), norms[0].mean(), norms[0].std(0, False), norms[1].mean(),
                  norms[1].std(0, False)]
        found = [float(number.rstrip("%")) / (100 if "%" in number else 1) for number in row[1:]]
        decoupled, near = found.pop(5), [erc_moe.coupling_report(M, float(row[6]) + off)[0] for off in (-0.006, 0.006)]
        assert near[0] > 0 == near[1], f"at alpha {decoupled} -+ 0.006 {near[0]:.1%} and {near[1]:.1%} are violated"
        assert name.endswith(row[0]) and found == pytest.approx([float(value) for value in wanted], abs=6e-4), row


def test_what_is_wrong_with_a_checkpoint_is_said_in_one_line(tmp_path):
    """No configuration, no weights, a damaged file, a lost tensor, packed weights, a model that is refused."""
    def refusal():
        with pytest.raises(SystemExit, match="^couple.py: error: [^\n]+$") as stopped:
            run_main("report", tmp_path)
        return str(stopped.value)

    assert "Unrecognized model" in refusal()
    model = small_model("olmoe")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = safetensors.load_file(file)
    file.unlink()
    assert "lacks layers.0.mlp.gate.weight" in refusal()
    file.write_bytes(b"cut off")
    assert "model.safetensors is damaged" in refusal()
    lost = "model.layers.0.mlp.gate.weight"
    safetensors.save_file({name: tensor for name, tensor in state.items() if name != lost}, file)
    assert "lacks layers.0.mlp.gate.weight" in refusal()
    safetensors.save_file(state | {lost: state[lost].to(torch.float8_e4m3fn)}, file)
    assert f"{lost} is stored in 8 bits or less" in refusal()
    small_model("llama4").save_pretrained(tmp_path)
    assert "a Llama4TextMoe, cannot be coupled as it is" in refusal()


def test_a_report_holds_one_layer_at_a_time(tmp_path, monkeypatch):
    """When a layer is read, no other has its weights."""
    small_model("olmoe").save_pretrained(tmp_path)
    layers, load = couple.open_checkpoint(str(tmp_path))
    read, present = couple.router_and_gates, []
    monkeypatch.setattr(couple, "open_checkpoint", lambda *_: (layers, load))
    monkeypatch.setattr(couple, "router_and_gates", lambda *layer: present.append(
        [not other.gate.weight.is_meta for other in layers.values()]) or read(*layer))
    run_main("report", tmp_path)
    assert present == [[True, False], [False, True]], present


def test_without_transformers_the_programs_say_what_to_install(monkeypatch):
    """One line, and no traceback."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    for arguments in ([], ["report", "."]):
        with pytest.raises(SystemExit, match="^couple.py: error: .*pip install transformers[^\n]*$"):
            run_main(*arguments)


if __name__ == "__main__":
    worker(sys.argv[1])
