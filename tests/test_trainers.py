"""Other people's trainers, with and without `patch`: the same losses, the same tokens, the same files.

Each run is QLoRA over a tiny LLaMA of transformers: `quantize_`, PEFT's LoRA on all linears, `patch`.
"""

import pytest
import torch
from qlora import BOTH, Recording, V, assert_same_curve, base, collate, qlora, rows, settings
from torch import nn

import llamakern

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")


class HFTrainer(Recording, transformers.Trainer):
    pass


def trainer(model, out, **changes):
    arguments = transformers.TrainingArguments(**settings(out, **changes))
    return HFTrainer(model=model, args=arguments, train_dataset=rows(), eval_dataset=rows(6), data_collator=collate)


def curve(model, out, **changes):
    made = trainer(model, out, **changes)
    made.train()
    return torch.tensor(made.losses)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_checkpointing": True},
        {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2},
        {"weight_decay": 0.1, "warmup_steps": 2, "max_grad_norm": 0.1},
    ],
    ids=["plain", "checkpointing", "accumulation", "warmup"],
)
def test_the_loss_curve_is_the_same(tmp_path, changes):
    plain, patched = (curve(qlora(on), tmp_path, **changes) for on in (False, True))
    assert_same_curve(patched, plain)
    assert (patched[1:] != patched[0]).all()


def test_the_loss_curve_in_bfloat16_is_within_its_noise(tmp_path):
    wide = curve(qlora(), tmp_path)
    plain, patched = (curve(qlora(on), tmp_path, bf16=True) for on in (False, True))
    assert (plain != wide).all()
    assert (patched - plain).abs().max() <= 2 * (plain - wide).abs().max()


def test_accumulated_batches_are_one_large_batch(tmp_path):
    """The mean is over all trained tokens of the step, of which every batch has another number."""
    whole = curve(qlora(True), tmp_path, per_device_train_batch_size=6)
    parts = curve(qlora(True), tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=3)
    assert_same_curve(parts.view(-1, 3).sum(1), whole)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_resumed_run_has_identical_losses(tmp_path, dropout):
    whole = trainer(qlora(True, dropout), tmp_path, save_strategy="steps", save_steps=3)
    whole.train()
    resumed = trainer(qlora(True, dropout), tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.losses == whole.losses[3:]
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_evaluation_and_prediction_are_the_same(tmp_path):
    results = []
    for patched in (False, True):
        made = trainer(qlora(patched), tmp_path, per_device_eval_batch_size=3)
        loss, prediction = made.evaluate()["eval_loss"], made.predict(rows(6)).predictions
        assert prediction.shape == (6, max(len(row["input_ids"]) for row in rows(6)), V)
        kept = collate(rows(6))["attention_mask"].bool()
        results.append((torch.tensor(loss), torch.from_numpy(prediction)[kept]))
    for plain, patched in zip(*results, strict=True):
        torch.testing.assert_close(patched, plain, rtol=1e-5, atol=1e-4)


@BOTH
def test_the_adapter_moves_between_plain_and_patched(tmp_path, patched):
    trained = qlora(patched)
    curve(trained, tmp_path / "run", max_steps=2)
    trained.save_pretrained(tmp_path / "adapter")
    other = peft.PeftModel.from_pretrained(base(), tmp_path / "adapter", is_trainable=True)
    if not patched:
        llamakern.patch(other)
    assert trained.state_dict().keys() == other.state_dict().keys()
    found = llamakern.verify(trained.eval(), other.eval(), collate(rows(3)))
    assert found.within(2**-8), str(found)


def test_verify_sees_patched_and_plain_as_one():
    model = qlora(dropout=0.4)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    for batch in (collate(rows(3)), collate(rows(3), "left")):
        found = llamakern.verify(model, llamakern.patch, batch)
        assert found.within(2**-8), str(found)
        assert len(found.gradients) == 2 * 7 * 2
        assert llamakern.verify(model, llamakern.unpatch, batch).within(2**-8)
    model.bfloat16()
    found = llamakern.verify(model, llamakern.patch, batch)
    assert found.ok, str(found)


@BOTH
def test_the_gate_watches_the_trainer(tmp_path, patched):
    made = trainer(qlora(patched), tmp_path)
    gate = llamakern.check_training(made.model, made.create_optimizer())
    made.train()
    assert gate.judged
    made = trainer(qlora(patched), tmp_path)
    made.model.base_model.model.extra = nn.Linear(2, 2)
    llamakern.check_training(made.model, made.create_optimizer())
    with pytest.raises(llamakern.gate.GateError, match=r"zeros: \S+extra\.weight, \S+extra\.bias;"):
        made.train()


# ---------------------------------------------------------------------------------------------------------------------
# Loops


class Lit(nn.Module):
    """What a LightningModule has, without Lightning."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-2)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 2))


def fit(module, batches):
    optimizer, schedule = module.configure_optimizers()
    gate = llamakern.check_training(module, optimizer)
    losses = []
    for i, batch in enumerate(batches):
        loss = module.training_step(batch, i)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    gate.close()
    return torch.tensor(losses)


def batches(n=6):
    return [collate(rows()[4 * i : 4 * i + 4]) for i in range(n)]


def test_a_lightning_module_has_the_same_losses():
    plain, patched = (fit(Lit(qlora(on)), batches()) for on in (False, True))
    assert_same_curve(patched, plain)


def test_accelerate_has_the_same_losses():
    from accelerate import Accelerator

    curves = []
    for patched in (False, True):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = qlora(patched)
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
        loader = torch.utils.data.DataLoader(rows(), batch_size=2, collate_fn=collate)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        gate, losses = llamakern.check_training(model, optimizer), []
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        assert gate.judged
        curves.append(torch.tensor(losses))
    assert_same_curve(*curves)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_gives_the_same_tokens(cache):
    batch = collate(rows(4), "left")
    del batch["labels"]
    knobs = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    if cache == "static":
        knobs |= {"cache_implementation": "static", "disable_compile": True}
    results = []
    for patched in (False, True):
        model = qlora(patched).eval()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
        results.append(model.generate(**batch, **knobs))
    assert torch.equal(*results)
    assert len(results[1][:, -8:].unique()) > 4  # not one token for ever


def test_a_compiled_training_step_has_the_same_losses():
    torch._dynamo.reset()
    plain, patched = qlora(), qlora(True)
    compiled = torch.compile(patched, backend="aot_eager", fullgraph=True)
    some = [{**collate(rows()[4:8]), "use_cache": False}] * 3
    assert_same_curve(fit(Lit(compiled), some), fit(Lit(plain), some))
