"""TRL's SFTTrainer with and without `patch`: text, packed, completions alone, patched before and after it wraps."""

import itertools

import pytest
import torch
from qlora import BOTH, Recording, V, assert_same_curve, base, lora, qlora, rows, settings

import llamakern

transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")
pytestmark = pytest.mark.filterwarnings("ignore")


class SFT(Recording, trl.SFTTrainer):
    pass


@pytest.fixture(scope="module")
def tokenizer():
    words = {"<pad>": 0, "<unk>": 1, "<s>": 2, "</s>": 3} | {f"w{i}": i for i in range(4, V)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def words(tokens):
    return " ".join(f"w{t}" for t in tokens)


def sft(model, tokenizer, out, records, peft_config=None, **changes):
    arguments = trl.SFTConfig(**settings(out, **{"max_length": 24, "bf16": False} | changes))
    data = datasets.Dataset.from_list(records)
    return SFT(model, arguments, train_dataset=data, processing_class=tokenizer, peft_config=peft_config)


TEXTS = [{"text": words(row["input_ids"])} for row in rows()]
ANSWERS = [{"prompt": words(row["input_ids"][:4]), "completion": " " + words(row["input_ids"][4:])} for row in rows()]


@pytest.mark.parametrize(
    ("records", "changes"),
    [
        (TEXTS, {}),
        (TEXTS, {"packing": True, "per_device_train_batch_size": 2, "learning_rate": 1e-3}),  # 1e-2 magnifies rounding
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
