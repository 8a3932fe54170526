"""QLoRA with every block spread over the processes: torchrun --nproc-per-node 2 examples/tensor_parallel.py

Each process holds its heads and its part of the feed-forward, in 4 bits, and sees every token.
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from llamakern import Llama, LlamaConfig, peft
from llamakern.integrations.dtensor import tensor_parallel_plan
from llamakern.nn import quantize_


def main() -> list[float]:
    if not dist.is_initialized():
        dist.init_process_group()
    size = dist.get_world_size()

    torch.manual_seed(0)  # the same start and the same batches everywhere
    config = LlamaConfig(dim=128, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=256, vocab_size=64)
    model = peft.apply(quantize_(Llama(config)), peft.LoRAConfig(rank=8))
    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (size,))
    parallelize_module(model, mesh, tensor_parallel_plan(model, size))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    losses = []
    for step in range(8):
        tokens = torch.arange(4 * 17).view(4, 17).add(step) % 64
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if dist.get_rank() == 0:
            print(f"step {step + 1}: loss {losses[-1]:.4f}", flush=True)
    return losses


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
