"""The memory estimate of a dry run, against the measured peak of the run itself."""

import json
import os
import subprocess
import sys

import pytest

# The C library keeps small freed blocks for later, as many as it likes; here it gives them back, as it does large ones.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

# One process estimates and trains, as `finetune` would: first the estimate, from what is resident then, then the steps.
RUN = """
import json, sys, torch
from llamakern import Llama, LlamaConfig, TrainConfig, Trainer, peft
from llamakern.data import Example
from llamakern.estimate import estimate
from llamakern.runs import peak_memory_mb
batch_size, checkpointing = int(sys.argv[1]), sys.argv[2] == "True"
config = LlamaConfig(dim=256, n_layers=6, n_heads=4, n_kv_heads=2, hidden_dim=768, vocab_size=512)
torch.manual_seed(0)
model = peft.apply(Llama(config), peft.LoRAConfig(rank=8, dropout=0.1))
rows = torch.randint(512, (64, 257)).tolist()
examples = [Example(row, [True] * len(row), False, "") for row in rows]
settings = TrainConfig(steps=3, batch_size=batch_size, max_len=256, checkpoint_activations=checkpointing)
trainer = Trainer(model, examples, settings, quiet=True)
cost = estimate(trainer)
trainer.train()
print(json.dumps({"estimate": cost.total / 2**20, "peak": peak_memory_mb(), "parts": cost.parts}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "checkpointing"), [(8, False), (16, True)])
def test_memory_estimate_is_within_15_percent(batch_size, checkpointing):
    command = [sys.executable, "-c", RUN, str(batch_size), str(checkpointing)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | GIVE_BACK)
    assert done.returncode == 0, done.stderr
    cost = json.loads(done.stdout)
    assert abs(cost["estimate"] / cost["peak"] - 1) < 0.15, cost
