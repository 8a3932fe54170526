"""QLoRA under FSDP2 in a loop of your own: torchrun --nproc-per-node 2 examples/fsdp2.py [out]

Mixed precision, a checkpoint that the next start goes on from, and an adapter file that PEFT reads. The model is a tiny
random one; `llamakern.Llama.from_pretrained(path, quantize="nf4")` takes its place.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy

from llamakern import Llama, LlamaConfig, peft
from llamakern.distributed import shard
from llamakern.nn import quantize_

ADAPTER = StateDictOptions(ignore_frozen_params=True)  # the base is in its own file already
STEPS = 8


def main(out: Path) -> list[float]:
    if not dist.is_initialized():
        dist.init_process_group()
    rank, size = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)  # the same start everywhere
    config = LlamaConfig(dim=128, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=256, vocab_size=64)
    model = peft.apply(quantize_(Llama(config)), peft.LoRAConfig(rank=8))
    # A group per block. RoPE's angles are inputs of a block and stay float32.
    shard(model, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    parameters, moments = get_state_dict(model, optimizer, options=ADAPTER)
    state = {"model": parameters, "optimizer": moments, "step": 0}
    if (out / "checkpoint" / ".metadata").exists():
        dcp.load(state, checkpoint_id=out / "checkpoint")
        knobs = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
        set_state_dict(model, optimizer, **knobs, options=StateDictOptions(strict=False))

    losses = []
    for step in range(state["step"], STEPS):
        tokens = torch.arange(4 * 17).view(4, 17).add(step) % 64  # the step's batch, the same everywhere
        mine = tokens[rank::size]
        n_trained = tokens[:, 1:].numel()  # of all processes: their gradients are averaged, so each scales by size
        loss = model.loss(mine[:, :-1], mine[:, 1:], reduction="sum") * size / n_trained
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss := loss.detach() / size)
        losses.append(loss.item())
        if rank == 0:
            print(f"step {step + 1}: loss {losses[-1]:.4f}", flush=True)
        if step + 1 == STEPS // 2:
            parameters, moments = get_state_dict(model, optimizer, options=ADAPTER)
            saved = {"model": parameters, "optimizer": moments, "step": step + 1}
            dcp.save(saved, checkpoint_id=out / "checkpoint")
    peft.save(model, out / "adapter")  # every process gives its part, process 0 writes
    return losses


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/fsdp2"))
    dist.destroy_process_group()
