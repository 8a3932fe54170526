"""Jobs of test_distributed.py with a training loop of one's own: FSDP2 and tensor parallelism against one process.

Each asserts in both processes; the values to compare with are computed by every process for itself.
"""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from llamakern import Llama, LlamaConfig, peft
from llamakern.distributed import shard, whole
from llamakern.nn import NF4Linear, quantize_
from llamakern.peft.base import trainable

TINY = LlamaConfig(dim=128, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=256, vocab_size=32)
NEAR = {"rtol": 1e-3, "atol": 2e-4}  # of parameters that AdamW moved by up to 1e-2 a step, however small the gradient
ADAPTER = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)


def qlora(**knobs) -> Llama:
    torch.manual_seed(1)
    return peft.apply(quantize_(Llama(TINY), **knobs), peft.LoRAConfig(rank=4))


def adamw(model) -> torch.optim.AdamW:
    return torch.optim.AdamW(trainable(model).values(), lr=1e-2)


FOUR = range(4)


def losses(model, optimizer, steps=FOUR, rank=0, size=1) -> list[float]:
    """The losses of some steps over four rows, each process with its share of them; their padding differs."""
    values = []
    for step in steps:
        rows = torch.randint(32, (4, 13), generator=torch.Generator().manual_seed(step))
        labels = rows[:, 1:].masked_fill(torch.arange(12) >= torch.tensor([[12], [3], [9], [5]]), -100)
        n_trained = (labels != -100).sum()
        mine = slice(rank, None, size)
        loss = model.loss(rows[mine, :-1], labels[mine], reduction="sum") * size / n_trained
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach() / size
        if size > 1:
            dist.all_reduce(total)
        values.append(total.item())
    return values


def join() -> tuple[int, int]:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()


def fsdp2(folder: Path) -> None:
    world = join()
    model = qlora()
    optimizer = adamw(model)
    wanted = losses(model, optimizer)

    def sharded(prepare=lambda model: model, model=None, **knobs):
        return shard(prepare(model or qlora()), **knobs)

    plain = sharded()
    assert isinstance(plain.layers[0].mlp.up_proj.base.weight, DTensor)
    plain_optimizer = adamw(plain)
    got = losses(plain, plain_optimizer, range(4), *world)
    assert got == pytest.approx(wanted, rel=1e-5)

    adapter = get_model_state_dict(plain, options=ADAPTER)
    assert adapter.keys() == (trainable(model).keys() if world[0] == 0 else set())
    for name, tensor in adapter.items():
        torch.testing.assert_close(tensor, trainable(model)[name].detach(), **NEAR)

    def variant(model):
        return losses(model, adamw(model), range(4), *world)

    def recompute(model):
        model.checkpoint_activations = True
        return model

    def compiled(model):
        for layer in model.layers:
            layer.compile(backend="aot_eager", fullgraph=True)
        return model

    def stored(model):
        for module in model.modules():
            if isinstance(module, NF4Linear):
                module.store_(torch.bfloat16)
        return model

    assert variant(sharded(recompute)) == got
    assert variant(sharded(compiled)) == pytest.approx(got, rel=1e-6)
    twice = qlora(double_quant=True)
    assert variant(sharded(model=qlora(double_quant=True))) == pytest.approx(losses(twice, adamw(twice)), rel=1e-5)

    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    assert variant(sharded(stored)) == got
    mixed = sharded(mp_policy=policy)
    assert {p.dtype for p in mixed.parameters()} == {torch.float32, torch.bfloat16}
    assert variant(mixed) == pytest.approx(wanted, rel=2e-2)

    full = qlora().state_dict()
    with torch.device("meta"):
        empty = sharded(model=qlora())
    empty.to_empty(device="cpu")
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(empty, full if world[0] == 0 else {}, options=options)
    assert variant(empty) == got

    dcp_resume(folder, plain, plain_optimizer, sharded(), world)


def dcp_resume(folder, model, optimizer, fresh, world) -> None:
    """Model and optimizer through torch.distributed.checkpoint: the next losses are the same to the last bit."""
    frozen = StateDictOptions(ignore_frozen_params=True)
    parts = get_state_dict(model, optimizer, options=frozen)
    dcp.save({"model": parts[0], "optimizer": parts[1]}, checkpoint_id=folder / "dcp")
    wanted = losses(model, optimizer, range(4, 7), *world)
    fresh_optimizer = adamw(fresh)
    parts = get_state_dict(fresh, fresh_optimizer, options=frozen)
    state = {"model": parts[0], "optimizer": parts[1]}
    dcp.load(state, checkpoint_id=folder / "dcp")
    knobs = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
    set_state_dict(fresh, fresh_optimizer, **knobs, options=StateDictOptions(strict=False))
    assert losses(fresh, fresh_optimizer, range(4, 7), *world) == wanted


def tensor_parallel(folder: Path) -> None:
    from llamakern.integrations.dtensor import NF4Parallel, tensor_parallel_plan

    _rank, size = join()
    mesh = init_device_mesh("cpu", (size,))

    def warm(model):
        for name, p in model.named_parameters():
            if name.endswith("lora_b"):
                torch.nn.init.normal_(p, std=0.1)
        return model

    model, spread = warm(qlora()), warm(qlora())
    parallelize_module(spread, mesh, tensor_parallel_plan(spread, size))
    down = spread.layers[0].mlp.down_proj
    assert down.base.weight.to_local().shape == (128, 256 // 2 // size)
    assert down.base.absmax.to_local().shape == (128, 256 // 64 // size)
    assert down.lora_a.to_local().shape == (4, 256 // size)
    tokens = torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(0))
    both = [m.loss(tokens[:, :-1], tokens[:, 1:]) for m in (model, spread)]
    torch.testing.assert_close(*both, rtol=1e-6, atol=0)
    for loss in both:
        loss.backward()
    for (name, p), q in zip(trainable(model).items(), trainable(spread).values(), strict=True):
        assert (whole(q.grad) - p.grad).abs().max() < 1e-5 * p.grad.abs().max(), name
        p.grad = q.grad = None
    assert losses(spread, adamw(spread)) == pytest.approx(losses(model, adamw(model)), rel=1e-5)

    torch_styles(mesh, size)
    with pytest.raises(ValueError, match="tensor_parallel: n_heads must be a multiple of 3 processes, got 4"):
        tensor_parallel_plan(model, 3)
    with pytest.raises(ValueError, match="tensor_parallel: n_kv_heads must be a multiple of 4 processes, got 2"):
        tensor_parallel_plan(model, 4)
    bad = {
        ("row", 192, 64): "in_features must be a multiple of 2 processes x block_size 64 by row, got 192",
        ("column", 64, 63): "out_features must be a multiple of 2 processes, got 63",
    }
    for (by, K, N), message in bad.items():
        with pytest.raises(ValueError, match=f"tensor_parallel: {message}"):
            parallelize_module(NF4Linear.from_weight(torch.randn(N, K)), mesh, NF4Parallel(by))
    with pytest.raises(NotImplementedError, match="tensor_parallel: linear must be an NF4Linear of float32 absmax"):
        parallelize_module(torch.nn.Linear(64, 64), mesh, NF4Parallel("row"))


def torch_styles(mesh, size) -> None:
    """torch's own styles take an NF4Linear for the nn.Linear that it is; column-wise the result is the same bits."""
    torch.manual_seed(2)
    up, down = NF4Linear.from_weight(torch.randn(256, 128)), NF4Linear.from_weight(torch.randn(128, 256))
    x = torch.randn(3, 5, 128, requires_grad=True)
    wanted_up = up(x)
    wanted = down(wanted_up)
    (wanted_dx,) = torch.autograd.grad(wanted.square().sum(), x)
    parallelize_module(up, mesh, ColwiseParallel())
    parallelize_module(down, mesh, RowwiseParallel())
    y_up = up(x)
    assert torch.equal(y_up, wanted_up.chunk(size, -1)[mesh.get_rank()])
    y = down(y_up)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    assert (y - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert (dx - wanted_dx).abs().max() < 1e-5 * wanted_dx.abs().max()
    narrow = parallelize_module(NF4Linear.from_weight(torch.randn(64, 192)), mesh, RowwiseParallel())
    with pytest.raises(
        ValueError, match="nf4_linear: each process's part of K must be a multiple of block_size 64, got 96"
    ):
        narrow(torch.randn(2, 192).chunk(size, -1)[mesh.get_rank()])


def transformers_trainer(folder: Path) -> None:
    """transformers' Trainer on a patched QLoRA model: batches of four rows, in one process or in two of two each."""
    import transformers
    from test_trainers import collate, qlora, rows

    size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    settings = {"per_device_train_batch_size": 4 // size, "max_steps": 4, "learning_rate": 1e-2, "logging_steps": 1}
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    arguments = transformers.TrainingArguments(output_dir=str(folder / "hf"), seed=0, **settings, **quiet)
    knobs = {"train_dataset": rows(), "data_collator": collate}
    trainer = transformers.Trainer(model=qlora(patched=True), args=arguments, **knobs)
    trainer.train()
    if trainer.is_world_process_zero():
        figures = [[line["loss"], line["grad_norm"]] for line in trainer.state.log_history if "grad_norm" in line]
        (folder / "transformers.json").write_text(json.dumps(figures))
