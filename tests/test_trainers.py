"""Other people's trainers, with and without `patch`: the same losses, the same tokens, the same files.

Each run is QLoRA over a tiny LLaMA of transformers: `quantize_`, PEFT's LoRA on all linears, `patch`.
"""

import itertools

import pytest
import torch
from torch import nn

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


class HFTrainer(Recording, transformers.Trainer):
    pass


def settings(out, **changes):
    wanted = {
        "output_dir": str(out), "per_device_train_batch_size": 4, "max_steps": 5, "learning_rate": 1e-2, "seed": 3,
        "lr_scheduler_type": "linear", "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no",
    }  # fmt: skip
    return wanted | changes


def trainer(model, out, **changes):
    arguments = transformers.TrainingArguments(**settings(out, **changes))
    return HFTrainer(model=model, args=arguments, train_dataset=rows(), eval_dataset=rows(6), data_collator=collate)


def curve(model, out, **changes):
    made = trainer(model, out, **changes)
    made.train()
    return torch.tensor(made.losses)


def assert_same_curve(a, b):
    """float32 in another order of summation, over a few steps of training."""
    torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


# ---------------------------------------------------------------------------------------------------------------------
# transformers.Trainer


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
# TRL


@pytest.fixture(scope="module")
def tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<pad>": 0, "<unk>": 1, "<s>": 2, "</s>": 3} | {f"w{i}": i for i in range(4, V)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def words(tokens):
    return " ".join(f"w{t}" for t in tokens)


def sft(model, tokenizer, out, records, peft_config=None, **changes):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")

    class SFT(Recording, trl.SFTTrainer):
        pass

    arguments = trl.SFTConfig(**settings(out, **{"max_length": 24, "bf16": False} | changes))
    data = datasets.Dataset.from_list(records)
    return SFT(model, arguments, train_dataset=data, processing_class=tokenizer, peft_config=peft_config)


TEXTS = [{"text": words(row["input_ids"])} for row in rows()]
ANSWERS = [{"prompt": words(row["input_ids"][:4]), "completion": " " + words(row["input_ids"][4:])} for row in rows()]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("records", "changes"),
    [
        (TEXTS, {}),
        (TEXTS, {"packing": True, "per_device_train_batch_size": 2}),
        (ANSWERS, {"gradient_checkpointing": True}),
    ],
    ids=["text", "packed", "completion"],
)
def test_sft_has_the_same_loss_curve(tmp_path, tokenizer, records, changes):
    changes = {"gradient_checkpointing": False} | changes
    curves = []
    for patched in (False, True):
        made = sft(qlora(patched), tokenizer, tmp_path, records, **changes)
        made.train()
        curves.append(torch.tensor(made.losses))
    assert_same_curve(*curves)
    assert curves[1][-1] < curves[1][0]


@pytest.mark.filterwarnings("ignore")
@BOTH
def test_packed_sequences_see_only_themselves(tmp_path, tokenizer, patched):
    """TRL packs by "bfd" into one row without attention_mask: restarting position_ids tell the sequences apart."""
    made = sft(qlora(patched), tokenizer, tmp_path, TEXTS, packing=True, per_device_train_batch_size=2)
    batch = next(iter(made.get_train_dataloader()))
    tokens, positions = batch["input_ids"], batch["position_ids"]
    assert "attention_mask" not in batch
    assert tokens.shape[0] == 1
    starts = [*(positions[0] == 0).nonzero().flatten().tolist(), tokens.shape[1]]
    assert len(starts) > 3
    model = made.model.eval()
    with torch.no_grad():
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        packed = model(**inputs, use_cache=False).logits[0]
        for a, b in itertools.pairwise(starts):
            alone = model(input_ids=tokens[:, a:b], use_cache=False).logits[0]
            torch.testing.assert_close(packed[a:b], alone, rtol=1e-4, atol=1e-4)
    # what completes a sequence is trained, its first token is not: no sequence predicts the next one's start
    assert (batch["labels"][0, starts[:-1]] == -100).all()


@pytest.mark.filterwarnings("ignore")
def test_only_completions_train(tmp_path, tokenizer):
    made = sft(qlora(True), tokenizer, tmp_path, ANSWERS)
    batch = next(iter(made.get_train_dataloader()))
    trained = batch["labels"] != -100
    assert not trained[:, :4].any()
    assert (batch["labels"][trained] == batch["input_ids"][trained]).all()
    assert ((batch["labels"] == tokenizer.eos_token_id).sum(1) == 1).all()
    loss = made.compute_loss(made.model, dict(batch))
    theirs = qlora()(**batch).loss
    torch.testing.assert_close(loss, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_sft_patched_after_it_was_made(tmp_path, tokenizer):
    """TRL wraps the model by peft_config and binds a forward of its own for its loss: patch replaces all but that."""
    plain, late = (sft(base(), tokenizer, tmp_path, TEXTS, peft_config=lora(), max_steps=3) for _ in range(2))
    late.model.load_state_dict(plain.model.state_dict())
    report = llamakern.patch(late.model)
    assert report.replaced == {"attention": 2, "rope": 2, "norm": 5, "mlp": 2, "lora": 14}, str(report)
    assert "trl" in report.kept["loss"]
    for made in (plain, late):
        made.train()
    assert_same_curve(torch.tensor(late.losses), torch.tensor(plain.losses))


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
