"""Each method and combination: counts of LLaMA-7B, zero starts, training on a real model, resuming to the last bit."""

import pytest
import torch
from compare import assert_same_bits

from llamakern import Llama, LlamaConfig, TrainConfig, Trainer, generate, load_tokenizer, peft
from llamakern.chat import PLAIN
from llamakern.data import Example, load_examples, split
from llamakern.nn import quantize_
from llamakern.peft import AdapterConfig, AdapterV2Config, ExcitorConfig, FullConfig, LoRAConfig, PromptConfig

TINY = LlamaConfig(dim=64, n_layers=3, n_heads=4, n_kv_heads=2, hidden_dim=64, vocab_size=53)
X = torch.arange(18).reshape(2, 9)
LORA = LoRAConfig(rank=4, dropout=0.1, targets=("q_proj", "v_proj"))
METHODS = {
    "lora": (LORA,),
    "adapter": (AdapterConfig(4),),
    "adapter_v2": (AdapterV2Config(prompt_len=4),),
    "excitor": (ExcitorConfig(6, 4),),
    "excitor-unroped": (ExcitorConfig(6, 4, extra_rope="none"),),
    "prompt": (PromptConfig(4),),
    "full": (FullConfig(),),
    "lora+excitor": (LORA, ExcitorConfig(6, 4)),
    "lora+adapter": (LORA, AdapterConfig(4)),
    "excitor+adapter": (ExcitorConfig(6, 4), AdapterConfig(4)),
    "excitor-unroped+adapter": (ExcitorConfig(6, 4, extra_rope="none"), AdapterConfig(4)),
    "lora+adapter_v2+excitor+prompt": (LORA, AdapterV2Config(prompt_len=4), ExcitorConfig(6, 4), PromptConfig(3)),
}
EACH = pytest.mark.parametrize("name", METHODS)
PACKED = pytest.mark.parametrize("packed", [False, True], ids=["dense", "nf4"])
EXAMPLES = [Example([(7 * i + j) % 53 for j in range(5 + i % 4)], [True] * (5 + i % 4), False, "") for i in range(24)]


def base(packed=False):
    torch.manual_seed(1)
    model = Llama(TINY).eval()
    return quantize_(model) if packed else model


def fresh(name, packed):
    if packed and name == "full":
        pytest.skip("packed weights do not train")
    model = base(packed)
    torch.manual_seed(2)
    return peft.apply(model, METHODS[name])


def wake(model):
    generator = torch.Generator().manual_seed(3)
    for p in peft.trainable(model).values():
        p.data.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model.eval()


def test_trainable_parameters_of_llama_7b():
    def count(*configs, skip=""):
        with torch.device("meta"):
            model = peft.apply(Llama(LlamaConfig.preset("llama-7b")), configs)
        return sum(p.numel() for name, p in peft.trainable(model).items() if not (skip and name.endswith(skip)))

    assert count(AdapterConfig()) == 1_228_800 + 960
    assert count(ExcitorConfig()) == 7_618_560 + 30
    assert count(ExcitorConfig(gate_scope="head")) == 7_618_560 + 960
    assert count(LoRAConfig(rank=8, targets=("q_proj", "v_proj"))) == 4_194_304
    assert count(LoRAConfig(rank=64)) == 159_907_840
    assert count(AdapterV2Config("paper", prompt_len=20), skip="gate") == 5_525_504
    assert count(PromptConfig(20)) == 20 * 4096
    assert count(LoRAConfig(rank=8, targets=("q_proj", "v_proj")), ExcitorConfig()) == 4_194_304 + 7_618_590


@EACH
@PACKED
def test_starts_at_the_base_and_goes_back_to_it(name, packed):
    want, model = base(packed)(X), fresh(name, packed).eval()
    neutral = not any(word in name for word in ("excitor", "prompt"))  # those start near it
    if neutral:
        assert_same_bits(model(X), want)
    assert not torch.equal(wake(model)(X), want)
    if name != "full":
        assert_same_bits(peft.activate(model, None)(X), want)


@EACH
@PACKED
def test_saved_and_loaded_is_the_same(tmp_path, name, packed):
    model = wake(fresh(name, packed))
    peft.save(model, tmp_path / "a")
    again = peft.load(base(packed), tmp_path / "a").eval()
    assert_same_bits(again(X), model(X))
    assert peft.trainable(again).keys() == peft.trainable(model).keys()


@EACH
@PACKED
def test_cached_decode_equals_the_full_forward(name, packed):
    model = wake(fresh(name, packed))
    got = generate(model, X[:, :4], max_new_tokens=6)
    want = X[:, :4]
    for _ in range(6):
        want = torch.cat((want, model(want)[:, -1:].argmax(-1)), 1)
    assert torch.equal(got, want)


@EACH
def test_packed_sequences_equal_rows(name):
    losses = []
    for packing in (False, True):
        model = wake(fresh(name, False))
        trainer = Trainer(model, EXAMPLES, TrainConfig(steps=1, packing=packing), held_out=EXAMPLES[:6], quiet=True)
        losses.append(trainer.evaluate())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@EACH
@PACKED
def test_resuming_is_exact(tmp_path, name, packed):
    config = TrainConfig(steps=6, batch_size=4, max_len=16, lr=1e-2, warmup=2, save_every=3, seed=3)

    class Stopped(Exception):
        pass

    class Killed(Trainer):
        def log(self, **values):
            super().log(**values)
            if values.get("step") == 5:
                raise Stopped

    def trained(kind, model, out):
        kind(model, EXAMPLES, config, out=out, quiet=True).train()
        return {key: p.detach().clone() for key, p in peft.trainable(model).items()}

    straight = trained(Trainer, fresh(name, packed), tmp_path / "straight")
    with pytest.raises(Stopped):
        trained(Killed, fresh(name, packed), tmp_path / "killed")
    resumed = trained(Trainer, fresh(name, packed), tmp_path / "killed")
    assert straight.keys() == resumed.keys()
    for key, tensor in straight.items():
        assert_same_bits(tensor, resumed[key], key)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize(
    ("name", "lr"),
    [
        ("lora", 1e-2),
        ("adapter", 3e-2),
        ("adapter_v2", 1e-2),
        ("excitor", 3e-2),
        ("prompt", 5e-2),
        ("full", 3e-3),
        ("lora+excitor", 1e-2),
        ("lora+adapter", 1e-2),
    ],
)
def test_a_real_model_learns(data_dir, name, lr, packed):
    """A model of stories learns to follow instructions: the held-out loss falls by more than 0.05."""
    if packed and name == "full":
        pytest.skip("packed weights do not train")
    path = data_dir / "tinystories-656k"
    tokenizer = load_tokenizer(path)
    records = load_examples(data_dir / "self-instruct" / "seed_tasks.jsonl", tokenizer, max_len=96, template=PLAIN)
    train, held_out = split([record for record in records if not any(e.masked for e in record)], 0.2, seed=0)
    torch.manual_seed(0)
    model = peft.apply(Llama.from_pretrained(path, quantize="nf4" if packed else None), METHODS[name])
    config = TrainConfig(steps=40, batch_size=4, max_len=96, lr=lr, warmup=4)
    result = Trainer(model, train, config, held_out=held_out, quiet=True).train()
    assert result["loss_after"] < result["loss_before"] - 0.05
