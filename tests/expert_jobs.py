"""One of two processes that share experts: `python expert_jobs.py folder` under torchrun."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from llamakern import Llama, LlamaConfig, generate
from llamakern.config import MoEConfig
from llamakern.integrations.expert_parallel import share_experts_
from llamakern.nn import quantize_

CONFIGS = {
    "llama4": MoEConfig(5, 1, 64, shared_dim=64, score="sigmoid", scale_input=True),  # 2 and 3 experts
    "mixtral": MoEConfig(4, 2, 64, renormalize=True),
    "nf4": MoEConfig(4, 2, 64, renormalize=True),
}


def build(kind: str) -> Llama:
    torch.manual_seed(0)
    config = LlamaConfig(dim=64, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=32, moe=CONFIGS[kind])
    model = Llama(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1) if p.dim() > 1 else None
    if kind == "nf4":
        quantize_(model)
    else:
        torch.nn.init.zeros_(model.layers[1].mlp.router.weight)  # all tokens go to the first, so one process gets none
    return model


def batches() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (2, 9) and labels; row 1 has fewer labels."""
    torch.manual_seed(1)
    tokens = torch.randint(0, 32, (2, 9))
    labels = torch.cat((tokens[:, 1:], torch.full((2, 1), -100)), 1)
    return tokens, labels


def generated(model: Llama, rows: torch.Tensor) -> torch.Tensor:
    """The prompts (B, 9), each with 12 tokens chosen greedily: none ends early, so all processes take as many steps."""
    return generate(model, rows, max_new_tokens=12)


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for kind in CONFIGS:
        model = share_experts_(build(kind))
        tokens, labels = batches()
        loss = model.loss(tokens[rank : rank + 1], labels[rank : rank + 1], reduction="sum")
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        grads = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
        shares = [m.experts for m in model.modules() if hasattr(m, "take_loss")]
        made = generated(model, tokens[: rank + 1])  # one row here, two there
        torch.save(
            {"loss": loss.detach(), "grads": grads, "first": [s.first for s in shares], "made": made},
            Path(sys.argv[1]) / f"{kind}{rank}.pt",
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
