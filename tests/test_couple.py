"""The loss in models of transformers, small and random: the README's template, and couple.py."""

import contextlib
import copy
import gc
import io
import sys

import pytest
import torch
from torch import nn

import erc_moe

safetensors = pytest.importorskip("safetensors.torch", reason="reads checkpoints of transformers")
transformers = pytest.importorskip("transformers", reason="couples models of transformers, which is not installed")

import couple
from check_layer import check_layer
from families import small_model
from test_erc import seeded, weights
from test_pasted import paste, row
from test_train import gap, gradients

n, d, D = 4, 32, 16  # 2D = d: gate_up_proj [n, 2D, d] is square, so that no shape tells its rows from its columns


def hugging_face_model(dtype=torch.float64, **changes):
    """A small random OLMoE."""
    model = small_model("olmoe", **changes)
    model.set_experts_implementation("eager")  # of those that transformers has, the one that knows float64
    return model.to(dtype)


class Listed(nn.Module):
    """Two layers of one router and a list of experts each, as many models have them."""

    def __init__(self, names=("gate_proj", "up_proj", "down_proj")):
        super().__init__()
        torch.manual_seed(1)
        sizes = dict(zip(names, ((d, D), (d, D), (D, d))))
        self.layers = nn.ModuleList(nn.ModuleDict(dict(
            gate=nn.Linear(d, n, bias=False),
            experts=nn.ModuleList(nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})
                                  for _ in range(n)))) for _ in range(2))


@pytest.mark.parametrize("dtype, off", [(torch.float64, 1e-14), (torch.float32, 1e-7)], ids=str)
def test_loss_and_gradient_are_those_of_the_formula_and_reach_nothing_else(dtype, off):
    """On OLMoE: weight * mean over layers, in each router and each gate half; no other number has a gradient. Autocast
    changes nothing. Each layer of each step has noise of its own, and torch's global stream stays as it is.
    """
    model, wanted, total, stream = hugging_face_model(dtype), {}, 0, torch.get_rng_state()
    for i, layer in enumerate(model.model.layers):
        parts = dict(layer.mlp.named_parameters(f"model.layers.{i}.mlp"))
        leaves = {name: value.detach().clone().requires_grad_() for name, value in parts.items() if "down" not in name}
        R, both = leaves.values()
        loss = erc_moe.erc_loss(R, torch.stack([W[:D].T for W in both]), 0.7, seeded(3 * 2 + i)) / 2
        (2.0 * loss).backward()
        wanted |= {name: leaf.grad for name, leaf in leaves.items()}
        total += loss.item()
    with torch.autocast("cpu", torch.bfloat16):
        assert couple.add_erc_gradient(model, 3, 2.0, 0.7).item() == pytest.approx(total, rel=off)
    assert gap(gradients(model), wanted) < off, f"off by {gap(gradients(model), wanted):.1e}"
    assert torch.equal(stream, torch.get_rng_state()), "it drew from torch's global stream"


def test_lora_is_coupled_by_the_merged_weight():
    """With peft on OLMoE, D = d, down_proj too: base + delta is what merging gives, and the delta alone learns."""
    peft = pytest.importorskip("peft", reason="trains with LoRA of peft, which is not installed")
    linear, fused, _, outer, inner, *_ = row("LoRA")
    for place, down in ((outer, []), (inner, ["mlp.experts.down_proj"])):
        model = hugging_face_model(torch.float32, intermediate_size=d)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, r=4, target_parameters=[
            "mlp.gate.weight", "mlp.experts.gate_up_proj", *down]))
        layer = model.model.layers[0]
        R, both = eval(linear, dict(linear=layer.mlp.gate)), eval(fused, dict(experts=eval(place, dict(layer=layer))))
        erc_moe.erc_loss(R, both[:, :d].mT).backward()
        assert len(gradients(model)) == 4 and all("lora_" in name for name in gradients(model)), [*gradients(model)]
        refuses(model, "gate.lora_A.default.weight")
        base, merged = layer.mlp.gate.weight.clone(), wrapped.merge_and_unload().model.layers[0].mlp
        assert torch.allclose(merged.gate.weight, R) and torch.equal(merged.experts.gate_up_proj, both), "not merged"
        assert not torch.allclose(base, R, atol=0.1), "the base alone would do"


def test_the_hooks_of_the_question_record_what_olmoe_computes():
    """The question of pasting.md to a layer, as printed, accepts OLMoE's router and gate half."""
    layer = small_model("olmoe").model.layers[0].mlp
    paste("needs a layer", dict(check_layer=check_layer, layer=layer, K=2, x=torch.randn(1, 64, d),
                                R=layer.gate.weight, W_g=layer.experts.gate_up_proj[:, :D].mT))


def test_what_is_logged_is_without_noise():
    """coupling equals the formulas on the clean M, in mean over layers."""
    model, rows = hugging_face_model(), []
    for layer in model.model.layers:
        M = erc_moe.activation_norms(layer.mlp.gate.weight, layer.mlp.experts.gate_up_proj[:, :D].mT)
        rows.append([erc_moe.coupling_hinge(M, 0.9).item(), *map(float, erc_moe.coupling_report(M, 0.9))])
    assert couple.coupling(model, 0.9) == pytest.approx([sum(column) / 2 for column in zip(*rows)], rel=1e-6)


def test_accumulation_and_a_scaler_leave_the_gradient_of_the_loss_as_it_is():
    """The published step, with four micro-batches, scaled: the batch's gradient plus the ERC loss's."""
    model, plain, tokens = hugging_face_model(), hugging_face_model(), torch.randint(64, (4, 16), generator=seeded(0))
    plain(input_ids=tokens, labels=tokens).loss.backward()
    couple.add_erc_gradient(plain, 3)
    couple.training_step(model, torch.optim.SGD(model.parameters(), lr=0.0), torch.amp.GradScaler(
        "cpu", init_scale=2.0**16), tokens.split(1), 3, clip=float("inf"))
    assert gap(gradients(model), gradients(plain)) < 1e-12, gap(gradients(model), gradients(plain))


def under_ddp(rank):
    """After three of the published steps each replica is where one process with both batches is."""
    replica, alone = hugging_face_model(), hugging_face_model()
    torch.manual_seed(rank)  # the global streams of two processes differ, and may
    for model, processes in ((nn.parallel.DistributedDataParallel(replica), [rank]), (alone, [0, 1])):
        optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", enabled=False)
        for step in range(3):
            couple.training_step(model, optimizer, scaler, [
                torch.randint(64, (2, 16), generator=seeded(10 * step + process)) for process in processes], step)
    off = gap(replica.state_dict(), alone.state_dict())
    assert off < 1e-12, f"under DDP, off by {off:.1e}"


def in_slices(rank):
    """FSDP2, with 5 experts and so slices of 3 and of 2, and tensor parallel: the gradient is that of whole weights."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh, ours = init_device_mesh("cpu", (2,)), lambda model: couple.add_erc_gradient(model, 3)
    printed = lambda model: paste("needs a model: OLMoE", dict(
        vars(erc_moe), model=model, weight=1.0, alpha=0.9, step=3, device="cpu"))
    fused, listed, parallel = hugging_face_model(num_local_experts=5), Listed().double(), hugging_face_model()
    assert len(fused.model.layers[0].mlp.gate.weight) == 5, "all slices are equal"
    cases = [(add, copy.deepcopy(model), model) for add, model in (
        (printed, fused), (ours, fused), (ours, listed), (ours, parallel))]
    for module in [*fused.model.layers, fused, listed]:
        fully_shard(module, mesh=mesh)
    for layer in parallel.model.layers:  # each process has some of the columns of each expert
        for module, name, dim in ((layer.mlp.gate, "weight", 0), (layer.mlp.experts, "gate_up_proj", 1)):
            setattr(module, name, nn.Parameter(distribute_tensor(getattr(module, name), mesh, [Shard(dim)])))
    for add, plain, sharded in cases:
        trained = dict(sharded.named_parameters())  # what an optimizer holds: always the slices
        for model in (plain, sharded):
            model.zero_grad()
            add(model)
            [module.unshard() for module in model.modules() if hasattr(module, "unshard")]  # as some settings leave it
            add(model)  # to a gradient that is there already
        found = {name: p.grad.full_tensor() for name, p in trained.items() if p.grad is not None}
        off = gap(found, gradients(plain))
        assert off < 1e-14, f"sharded, gradients differ by {off:.1e}"
        assert couple.coupling(sharded) == pytest.approx(couple.coupling(plain), rel=1e-12)


def in_plain_parts(rank):
    """What pasting.md says of plain experts in parts: each process holds 3 of 6, and the whole router."""
    (R, W_g), (own_R, every) = weights(6, d, D, grad=True), weights(6, d, D)
    own, own_R = every[3 * rank:3 * rank + 3].requires_grad_(), own_R.requires_grad_()
    *statements, gathered = row("Expert parallelism")
    names = dict(torch=torch, dist=torch.distributed, p=2, rank=rank, W=own)
    exec("\n".join(statements), names)
    for pair in ((R, W_g), (own_R, eval(gathered, names))):
        erc_moe.erc_loss(*pair, generator=seeded(0)).backward()
    for found, wanted in ((own_R.grad, R.grad), (own.grad, W_g.grad[3 * rank:3 * rank + 3])):
        assert wanted.any() and torch.allclose(found, wanted), f"{(found / wanted).nanmean()} times the gradient"


def worker(rank, store):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    for work in (under_ddp, in_slices, in_plain_parts):
        work(rank)
    gc.collect()  # ends the threads of process groups that models held; at Python's own end they can abort it
    torch.distributed.destroy_process_group()


def test_two_processes_learn_what_one_does(tmp_path, monkeypatch):
    """The template of the README and couple.py, under DDP, FSDP2, tensor and expert parallelism."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(worker, [tmp_path / "store"], nprocs=2)


def refuses(model, *texts):
    """add_erc_gradient ends with one line that holds all the texts, and adds nothing."""
    before = gradients(model)
    with pytest.raises(ValueError) as refused:
        couple.add_erc_gradient(model, 3)
    line = str(refused.value)
    assert "\n" not in line and all(text in line for text in texts), line
    assert gradients(model).keys() == before.keys(), "refused, yet something was added"


def test_a_list_of_experts_is_understood():
    """W_g[j] is the gate matrix of expert j, also where experts are bfloat16 beside a router of float32, or compiled.
    """
    layer = Listed().layers[0]
    layer["experts"].bfloat16()
    gates = torch.stack([expert["gate_proj"].weight.T for expert in layer["experts"]])
    assert torch.equal(couple.router_and_gates("", layer)[1], gates), "not the gates, or not in order"
    layer["experts"] = torch.compile(layer["experts"])  # which gives the names of their weights a prefix
    assert torch.equal(couple.router_and_gates("", layer)[1], gates), "compiled"


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


SPOILT = {  # what is done to the second of two layers: what the line says of it
    "norm.weight, not known": lambda layer: layer.update(dict(norm=nn.RMSNorm(d))),
    "no router was found": lambda layer: layer.update(dict(scores=layer.pop("gate"))),
    "a router [n, d]": lambda layer: layer.update(dict(router=copy.deepcopy(layer["gate"]))),
    f"gate.weight [{n}, {d}]": lambda layer: layer["experts"].append(copy.deepcopy(layer["experts"][0])),
    "n gate matrices": lambda layer: layer["experts"][1].update(dict(gate_proj=nn.Linear(d, D + 1, False))),
    "w1 and w3": lambda layer: layer.update(Listed(("w1", "w3", "w2")).layers[0]),
    "float64": lambda layer: layer["gate"].double(),
    "int8": lambda layer: layer["gate"].register_buffer("my_bias", torch.zeros(n, dtype=torch.int8)),
    "on meta": lambda layer: layer["experts"][3].to("meta"),
}


@pytest.mark.parametrize("said", SPOILT)
def test_a_layer_it_does_not_know_is_refused_before_any_gradient(said):
    """The line names the layer, the second of two, and what is there; the first has no gradient yet."""
    model = Listed()
    SPOILT[said](model.layers[1])
    refuses(model, "layers.1 ", said)


def test_models_it_does_not_know_are_refused():
    """No experts; slices of fused weights, as older FSDP leaves them."""
    refuses(nn.Linear(d, d), "Linear has no module with experts")
    for sliced in (lambda weight: weight[:2], lambda weight: weight.flatten()[:7]):
        model = hugging_face_model()
        experts = model.model.layers[1].mlp.experts
        for name in ("gate_up_proj", "down_proj"):
            setattr(experts, name, nn.Parameter(sliced(getattr(experts, name))))
        refuses(model, "model.layers.1.mlp ", f"experts.gate_up_proj {list(experts.gate_up_proj.shape)}")


def report(source):
    """What `couple.py report` prints, in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        couple.main(["report", str(source)])
    return printed.getvalue()


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "longcat_flash"])
def test_a_report_of_files_says_what_the_model_in_memory_does(family, tmp_path, monkeypatch):
    """Files of one expert a name, interleaved and transposed, with identity experts; of the index, not of leftovers.
    When a layer is read, no other has its weights.
    """
    model = small_model(family)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    files = sorted(tmp_path.glob("model*.safetensors"))
    assert len(files) > 1, "the case does not test several files"
    old = {name: 2 * tensor.flip(0) for name, tensor in safetensors.load_file(files[0]).items()}
    safetensors.save_file(old, tmp_path / "model_old.safetensors")
    read, opened, present = couple.router_and_gates, couple.open_checkpoint(tmp_path), []
    monkeypatch.setattr(couple, "open_checkpoint", lambda *_: opened)
    monkeypatch.setattr(couple, "router_and_gates", lambda *layer: present.append(
        sum(not next(other.parameters()).is_meta for other in opened[0].values())) or read(*layer))
    said, _, _, *lines = [line.replace("+-", " ").split() for line in report(tmp_path).splitlines()]
    assert said == ["read:", str(files[0]), *(file.name for file in files[1:])], f"{said}, not {files}"
    layers = couple.moe_layers(model)
    assert present == [1] * len(lines) == [1] * len(layers), f"{present}, {len(lines)} lines for {len(layers)} layers"
    for (label, *cells), (name, layer) in zip(lines, layers.items()):
        R, W_g = (tensor.detach() for tensor in read(name, layer))
        M, rows, gates = erc_moe.activation_norms(R, W_g), R.norm(dim=1), W_g.norm(dim=(1, 2))
        excess = [max(M[i, j], M[j, i]) / M[i, i] for i in range(len(M)) for j in range(len(M)) if i != j]
        wanted = [*(erc_moe.coupling_hinge(M, alpha) for alpha in range(1, 6)), *erc_moe.coupling_report(M),
                  erc_moe.noise_bound(R).mean(), rows.mean(), rows.std(0, False), gates.mean(), gates.std(0, False)]
        found = [float(number.rstrip("%")) / (100 if "%" in number else 1) for number in cells]
        assert found.pop(5) == pytest.approx(max(excess).item(), abs=6e-3), f"decoupled at {max(excess)}: {cells}"
        assert name.endswith(label) and found == pytest.approx([float(value) for value in wanted], abs=6e-4), cells


def test_what_is_wrong_is_said(tmp_path, monkeypatch):
    """No folder, .bin alone, a damaged file, a lost tensor, 8 bits, no transformers."""
    def refusal(source=tmp_path):
        with pytest.raises((couple.UserError, OSError)) as stopped:
            report(source)
        return str(stopped.value)

    monkeypatch.chdir(tmp_path.parent)
    for missing in ("missing", f"{tmp_path.name}/missing"):
        assert f"no folder {missing}," in refusal(missing)
    small_model("olmoe").save_pretrained(tmp_path)
    file, lost = tmp_path / "model.safetensors", "model.layers.0.mlp.gate.weight"
    state = safetensors.load_file(file)
    file.unlink()
    (tmp_path / "pytorch_model.bin").touch()
    assert "save_pretrained" in refusal()
    file.write_bytes(b"cut off")
    assert "model.safetensors is damaged" in refusal()
    safetensors.save_file({name: tensor for name, tensor in state.items() if name != lost}, file)
    assert "lacks layers.0.mlp.gate.weight" in refusal()
    safetensors.save_file(state | {lost: state[lost].to(torch.float8_e4m3fn)}, file)
    assert f"{lost} is stored in 8 bits" in refusal()
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install transformers" in refusal()
