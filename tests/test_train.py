"""The loop: schedule, accumulation, gate, failure, and fine-tuning that really lowers a held-out loss."""

import itertools
import json
import math
from statistics import mean, stdev

import pytest
import torch

from llamakern import peft
from llamakern.config import LlamaConfig
from llamakern.data import PLAIN, Example, drop_masked, load_examples, split
from llamakern.gate import GateError
from llamakern.model import Llama
from llamakern.peft import LoRAConfig
from llamakern.tokenizer import load_tokenizer
from llamakern.train import TrainConfig, Trainer

TINY = LlamaConfig(dim=64, n_layers=1, n_heads=4, n_kv_heads=2, hidden_dim=64, vocab_size=32)
FAST = {"batch_size": 4, "max_len": 16, "packing": False, "lr": 1e-2, "warmup": 2, "keep_last": 1}


def tiny(**lora) -> Llama:
    torch.manual_seed(1)
    model = Llama(TINY)
    return peft.apply(model, LoRAConfig(**{"rank": 4} | lora))


def counting(n=12):
    """Sequences that count upwards: easy to learn."""
    rows = [[(i + t) % 32 for t in range(4 + i % 9)] for i in range(n)]
    return [Example(row, [False, *[True] * (len(row) - 1)], False, "") for row in rows]


def trainer(model=None, out=None, examples=None, held_out=(), **config):
    return Trainer(
        model or tiny(), examples or counting(), TrainConfig(**FAST | config), held_out=held_out, out=out, quiet=True
    )


def test_learning_rate():
    config = TrainConfig(lr=1.0, warmup=4, min_lr=0.1)
    rates = [config.lr_at(step, 14) for step in range(1, 15)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[9] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5)))
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))
    assert rates[-1] > 0.1


def test_accumulation_equals_one_large_batch():
    def gradients(batch_size, accumulation, packing):
        t = trainer(batch_size=batch_size, accumulation=accumulation, packing=packing, epochs=1)
        t.model.layers[0].mlp.up_proj.lora_b.data.fill_(0.01)
        (batches,) = list(t.plan(0))[:1]
        loss = t.backward(batches)
        return [torch.tensor(loss), *(p.grad for p in t.trainable.values() if p.grad is not None)]

    whole = gradients(12, 1, False)
    for batch_size, accumulation, packing in ((3, 4, False), (5, 3, False), (12, 1, True)):
        for a, b in zip(gradients(batch_size, accumulation, packing), whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_float16_gradients_do_not_shrink_with_the_number_of_tokens():
    def gradients(dtype):
        model = tiny().to(dtype)
        for name, p in peft.trainable(model).items():
            p.data = p.data.float()
            if name.endswith("lora_b"):
                torch.nn.init.normal_(p, std=0.02, generator=torch.Generator().manual_seed(2))
        t = trainer(model, examples=counting(4096), batch_size=4096)
        (batches,) = list(t.plan(0))[:1]
        t.backward(batches)
        return {name: p.grad for name, p in t.trainable.items()}

    wanted, got = gradients(torch.float32), gradients(torch.float16)
    worst = {name: ((got[name] - g).norm() / g.norm()).item() for name, g in wanted.items()}
    print(worst)
    assert max(worst.values()) < 0.02, worst


@pytest.mark.parametrize("packing", [False, True])
def test_loss_falls_and_the_folder_tells_it(tmp_path, packing):
    t = trainer(out=tmp_path, held_out=counting(3), epochs=20, packing=packing, eval_every=10)
    result = t.train()
    assert result["loss_after"] < result["loss_before"] - 0.3
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, t.total + 1))
    assert steps[0].keys() >= {"loss", "lr", "grad_norm", "tokens", "tokens_per_s"}
    evals = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert evals[0] == result["loss_before"]
    assert evals[-1] == result["loss_after"]
    assert len(evals) > 2
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1
    assert (tmp_path / "loss.png").stat().st_size > 1000
    assert result["tokens"] == 20 * sum(len(e.inputs) for e in counting())


def test_checkpointed_activations_change_nothing():
    def run(on):
        t = trainer(tiny(dropout=0.3), epochs=3, checkpoint_activations=on)
        t.train()
        return t.trainable

    for (name, a), b in zip(run(False).items(), run(True).values(), strict=True):
        assert torch.equal(a, b), name


def test_sharded_parameters_leave_the_kind_of_adamw_to_torch():
    """fused=False would forbid foreach too."""
    t = trainer()
    assert t.optimizer.defaults["fused"]
    next(iter(t.trainable.values())).full_tensor = None
    assert t.make_optimizer().defaults["fused"] is None


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(tmp_path):
    t = trainer(out=tmp_path, epochs=5, save_every=100)
    good, loss, calls = {}, t.loss, []

    def broken(batch):
        calls.append(1)
        if len(calls) == 7:
            good.update({n: p.detach().clone() for n, p in t.trainable.items()})
            return loss(batch) * math.nan
        return loss(batch)

    t.loss = broken
    with pytest.raises(FloatingPointError, match=r"got loss nan at step 7; the state after step 6 is saved in"):
        t.train()
    assert all(torch.isfinite(p).all() for p in t.trainable.values())
    state = t.folder.load_checkpoint()
    assert state["progress"]["step"] == 6
    assert all(torch.equal(state["parameters"][n], good[n]) for n in good)


# ---------------------------------------------------------------------------------------------------------------------
# The gate


def test_gate_names_a_tensor_without_gradient_and_one_that_cannot_move():
    class Dead(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Parameter(torch.ones(2))
            self.decayed = torch.nn.Parameter(torch.ones(2, 2))
            self.frozen = torch.nn.Parameter(torch.full((), 1e30))
            self.alive = torch.nn.Parameter(torch.ones(2))

        def loss(self, tokens, labels, **_):
            return (self.alive**2).sum() + self.frozen * 1e-3 + 0.0 * self.decayed.sum()

    with pytest.raises(
        GateError,
        match="gate: every trainable tensor must receive a finite gradient and move in the first 5 steps, "
        "got no gradient, or one of zeros: unused, decayed; no change: unused, frozen",
    ):
        trainer(Dead(), steps=9, weight_decay=0.1).train()


def test_gate_judges_the_first_five_steps_and_short_runs():
    model = tiny()
    model.layers[0].mlp.down_proj.lora_b.requires_grad_(False)  # then its A never has a gradient
    names = r"zeros: layers\.0\.mlp\.down_proj\.lora_a; no change: layers\.0\.mlp\.down_proj\.lora_a$"
    with pytest.raises(GateError, match=names):
        trainer(model, steps=50).train()
    with pytest.raises(GateError, match=names):
        trainer(model, steps=3).train()
    assert trainer(steps=1).train()["steps"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "train: batch_size must be at least 1, got 0"),
        ({"lr": -1.0}, "train: lr must be finite and at least 0, got -1.0"),
        ({"lr": math.nan}, "train: lr must be finite and at least 0, got nan"),
        ({"clip": math.inf}, "train: clip must be finite and at least 0, got inf"),
        ({"beta2": 1.0}, r"train: beta2 must be in \[0, 1\), got 1.0"),
        ({"max_len": 1}, "train: max_len must be at least 2, got 1"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**change)


def test_bad_inputs():
    with pytest.raises(ValueError, match="train: model must have a trainable parameter, got none"):
        trainer(Llama(TINY).requires_grad_(False))
    with pytest.raises(ValueError, match="train: train must hold at least one example, got none"):
        Trainer(tiny(), [])
    with pytest.raises(ValueError, match="every example must keep an answer"):
        trainer(examples=[Example([1, 2, 3], [False] * 3, True, "line 1")])


# ---------------------------------------------------------------------------------------------------------------------
# Real weights, real instructions


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_fine_tuning_lowers_the_held_out_loss(data_dir, method):
    path = data_dir / "tinystories-656k"
    tokenizer = load_tokenizer(path)
    records = load_examples(data_dir / "self-instruct" / "seed_tasks.jsonl", tokenizer, max_len=128, template=PLAIN)
    records = drop_masked(records)
    falls = []
    for seed in range(3):
        train, held_out = split(records, 0.2, seed)
        torch.manual_seed(seed)
        base = Llama.from_pretrained(path, quantize="nf4" if method == "qlora" else None)
        model = peft.apply(base, LoRAConfig(rank=8, alpha=16, dropout=0.05))
        config = TrainConfig(steps=25, batch_size=6, max_len=128, lr=5e-3, warmup=3, seed=seed)
        result = Trainer(model, train, config, held_out=held_out, quiet=True).train()
        falls.append(result["loss_before"] - result["loss_after"])
    assert mean(falls) > max(0.05, 3 * stdev(falls)), falls
