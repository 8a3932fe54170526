"""What the tests of foreign trainers share: QLoRA over a tiny LLaMA of transformers, its data, and settings."""

import pytest
import torch

import llamakern
from llamakern.nn import quantize_

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")

V = 64
SIZES = {
    "vocab_size": V, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip
BOTH = pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])


def base():
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, attn_implementation="sdpa"))
    with torch.no_grad():  # wide enough that attention and the MLP matter
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(4)
    return quantize_(model)


def lora(dropout=0.0):
    config = {"r": 4, "lora_alpha": 8, "lora_dropout": dropout, "target_modules": "all-linear"}
    return peft.LoraConfig(**config, task_type="CAUSAL_LM")


def qlora(patched=False, dropout=0.0):
    model = base()
    torch.manual_seed(2)
    model = peft.get_peft_model(model, lora(dropout))
    if patched:
        report = llamakern.patch(model)
        assert report.replaced == {"attention": 2, "rope": 2, "norm": 5, "mlp": 2, "loss": 1, "lora": 14}, str(report)
    return model


def rows(n=24):
    """Sequences of 6 to 16 tokens that count upwards; of every third a prompt of 4 is not trained."""
    made = []
    for i in range(n):
        tokens = [4 + (7 * i + t) % (V - 4) for t in range(6 + (5 * i) % 11)]
        made.append({"input_ids": tokens, "labels": [-100] * 4 + tokens[4:] if i % 3 == 0 else list(tokens)})
    return made


def collate(some, side="right"):
    T = max(len(row["input_ids"]) for row in some)

    def padded(values, fill):
        rest = [fill] * (T - len(values))
        return values + rest if side == "right" else rest + values

    return {
        "input_ids": torch.tensor([padded(row["input_ids"], 0) for row in some]),
        "labels": torch.tensor([padded(row["labels"], -100) for row in some]),
        "attention_mask": torch.tensor([padded([1] * len(row["input_ids"]), 0) for row in some]),
    }


class Recording:
    """A mixin for a Trainer: keeps the loss of every step, unrounded."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if not hasattr(self, "losses"):
            self.losses = []
        self.losses.append(loss.item())
        return loss


def settings(out, **changes):
    wanted = {
        "output_dir": str(out), "per_device_train_batch_size": 4, "max_steps": 5, "learning_rate": 1e-2, "seed": 3,
        "lr_scheduler_type": "linear", "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no",
    }  # fmt: skip
    return wanted | changes


def assert_same_curve(a, b):
    """float32 in another order of summation, over a few steps of training."""
    torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
