"""Models with experts that train: adapters on every part, the gate, and a small LLaMA 4 from text to 4 bits."""

import warnings

import pytest
import torch

from llamakern import Llama, LlamaConfig, generate, peft, quantize_
from llamakern.config import MoEConfig
from llamakern.gate import Gate, check_training
from llamakern.moe import LoRAExperts, auxiliary_loss, load_balance_loss, router_z_loss
from llamakern.nn import MoE, NF4Experts
from llamakern.peft import ExpertLoRAConfig, LoRAConfig


def small(**changes):
    moe = MoEConfig(4, 2, 64, shared_dim=64, renormalize=True)
    fields = {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": 64, "moe": moe}
    return Llama(LlamaConfig(**(fields | changes)))


def data(rows=4, T=24):
    tokens = torch.randint(0, 64, (rows, T))
    return tokens, torch.cat((tokens[:, 1:], torch.full((rows, 1), -100)), 1)


def train(model, steps=5, lr=1e-2):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    gate = check_training(model, optimizer)
    tokens, labels = data()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model.loss(tokens, labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    gate.close()
    return losses, gate


@pytest.mark.parametrize("router", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
def test_adapters_on_attention_shared_and_routed_experts(quantized, router):
    model = small()
    before = model.layers[0].mlp.router.weight.detach().clone()
    if quantized:
        quantize_(model)
    want = model(data()[0])
    peft.apply(model, [LoRAConfig(rank=4), ExpertLoRAConfig(rank=4, router=router)])
    assert torch.equal(model(data()[0] * 0), model(data()[0] * 0))
    names = set(peft.trainable(model))
    assert any("q_proj.lora_a" in n for n in names)
    assert any("shared_expert.up_proj.lora_b" in n for n in names)
    assert {f"layers.{i}.mlp.experts.{p}_lora_{x}" for i in (0, 1) for p in ("gate_up", "down") for x in "ab"} <= names
    assert ("layers.0.mlp.router.weight" in names) == router
    losses, _ = train(model)
    assert losses[-1] < losses[0]
    assert torch.equal(model.layers[0].mlp.router.weight, before) != router
    peft.activate(model, None)
    assert torch.equal(model.layers[0].mlp.router.weight, before)
    assert model(data()[0]).shape == want.shape


def test_adapter_starts_at_the_base_and_files_keep_it(tmp_path):
    model = quantize_(small())
    tokens = data()[0]
    want = model(tokens).detach()
    peft.apply(model, ExpertLoRAConfig(rank=3, router=True))
    assert torch.equal(model(tokens).detach(), want)
    train(model)
    trained = model(tokens).detach()
    peft.save(model, tmp_path / "adapter")
    peft.remove(model, "default")
    assert torch.equal(model(tokens).detach(), want)
    peft.load(model, tmp_path / "adapter")
    assert torch.equal(model(tokens).detach(), trained)


def test_merged_matrix_is_what_the_adapter_computes():
    model = small(n_layers=1)
    peft.apply(model, ExpertLoRAConfig(rank=3))
    train(model)
    wrapped = model.layers[0].mlp.experts
    x, weights = torch.randn(30, 64), torch.rand(30, 1)
    experts = torch.randint(0, 4, (30, 1), dtype=torch.int32)
    want = wrapped(x, weights, experts)
    with torch.no_grad():
        for name in ("gate_up_proj", "down_proj"):
            stack = torch.stack([wrapped.merged(name, e) for e in range(4)])
            getattr(wrapped.base, name).copy_(stack)
    torch.testing.assert_close(wrapped.base(x, weights, experts), want, rtol=1e-4, atol=1e-6)


def test_bad_expert_adapters():
    for knobs, message in (({"rank": 0}, "rank must be"), ({"experts": False}, "experts or router must be True")):
        with pytest.raises(ValueError, match=message):
            ExpertLoRAConfig(**knobs)
    with pytest.raises(ValueError, match="experts: model must have layers with experts, got none among all"):
        peft.apply(small(moe=None), ExpertLoRAConfig())
    with pytest.raises(ValueError, match=r"got none among \(7,\)"):
        peft.apply(small(), ExpertLoRAConfig(layers=(7,)))


# --------------------------------------------------------------------------------------------------- gate


def test_the_gate_names_experts_without_tokens():
    model = small()
    with torch.no_grad():
        for layer in model.layers:
            layer.mlp.router.weight.zero_()  # all equal: experts 0 and 1 get every token
    peft.apply(model, ExpertLoRAConfig(rank=2))
    with pytest.warns(UserWarning, match=r"got none in 5 steps for layers.0.mlp.experts\[2\], layers"):
        _, gate = train(model)
    assert gate.unused == [f"layers.{i}.mlp.experts[{e}]" for i in (0, 1) for e in (2, 3)]


def test_the_gate_is_silent_where_all_experts_train():
    model = small()
    peft.apply(model, ExpertLoRAConfig(rank=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, gate = train(model)
    assert gate.unused == []


def test_an_expert_with_tokens_that_stands_still_is_refused():
    from llamakern.gate import GateError

    stack = torch.nn.Parameter(torch.ones(3, 2, 2))
    gate = Gate({"mlp.experts.down_lora_a": stack})
    with torch.no_grad():
        stack[0] += 1
        stack[2] += 1
    stack.grad = torch.ones_like(stack)
    for _ in range(4):
        gate.observe()
    with pytest.raises(GateError, match=r"an expert that received tokens and did not move: mlp.experts\[1\]"):
        gate.observe()


# ------------------------------------------------------------------------------------------------- losses


def test_auxiliary_losses():
    logits = torch.tensor([[4.0, 0.0], [0.0, 4.0], [4.0, 0.0], [4.0, 0.0]])
    p = torch.softmax(torch.tensor([4.0, 0.0]), 0)
    shares, means = torch.tensor([0.75, 0.25]), torch.stack((0.75 * p[0] + 0.25 * p[1], 0.25 * p[0] + 0.75 * p[1]))
    experts = torch.tensor([[0], [1], [0], [0]], dtype=torch.int32)
    torch.testing.assert_close(load_balance_loss(logits, experts), 2 * (shares * means).sum())
    balanced = torch.arange(8).int()[:, None] % 4
    torch.testing.assert_close(load_balance_loss(torch.zeros(8, 4), balanced), torch.tensor(1.0))
    torch.testing.assert_close(router_z_loss(logits), torch.logsumexp(torch.tensor([4.0, 0.0]), 0).square())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_auxiliary_losses_reach_the_router(checkpointing):
    tokens, labels = data()
    plain = small()
    moe = MoEConfig(4, 2, 64, shared_dim=64, renormalize=True, balance_loss=0.5, z_loss=0.25)
    model = small(moe=moe)
    model.load_state_dict(plain.state_dict())
    model.checkpoint_activations = checkpointing
    base, loss = plain.loss(tokens, labels), model.loss(tokens, labels)
    assert auxiliary_loss(model) is None, "taken once"
    routers = [layer.mlp for layer in plain.layers]
    assert loss > base
    grads = torch.autograd.grad(loss, [layer.mlp.router.weight for layer in model.layers])
    others = torch.autograd.grad(base, [m.router.weight for m in routers])
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(grads, others, strict=True))
    model.eval()
    assert torch.equal(model.loss(tokens, labels), plain.eval().loss(tokens, labels))


def test_moe_module_stands_alone():
    layer = MoE(32, 64, 4, 2, renormalize=True)
    x = torch.randn(2, 5, 32, requires_grad=True)
    layer(x).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


# ------------------------------------------------------------------------------------------ from text to 4 bits


def test_small_llama4_from_text_to_qlora():
    """Pre-trained on English, quantised, QLoRA-tuned on another text; every expert moves or is named; it generates."""
    import pydoc_data.topics

    text = "".join(pydoc_data.topics.topics.values())[:60000].encode("ascii", "ignore")
    tokens = torch.tensor(list(text), dtype=torch.long).clamp_max(127)
    moe = MoEConfig(4, 1, 64, layers=(1,), shared_dim=64, score="sigmoid", scale_input=True, balance_loss=0.01)
    model = Llama(
        LlamaConfig(
            dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=128, vocab_size=128, moe=moe, nope_layers=(1,),
            attention_chunk=32, qk_norm="after_rope", attn_scale=0.1, floor_scale=32, rope_layout="interleaved",
        )
    )  # fmt: skip

    def run(tokens, steps, lr):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
        gate, losses = check_training(model, optimizer), []
        for _ in range(steps):
            at = torch.randint(0, len(tokens) - 65, (8,))
            rows = torch.stack([tokens[i : i + 65] for i in at])
            optimizer.zero_grad()
            loss = model.loss(rows[:, :-1], rows[:, 1:])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, gate

    losses, _ = run(tokens, 60, 1e-2)
    assert sum(losses[-5:]) / 5 < 0.75 * losses[0]
    quantize_(model)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    peft.apply(model, [LoRAConfig(rank=4), ExpertLoRAConfig(rank=4)])
    fresh = {name: p.detach().clone() for name, p in peft.trainable(model).items() if ".experts." in name}
    losses, gate = run(tokens.flip(0), 25, 1e-2)
    assert sum(losses[-5:]) < sum(losses[:5])
    experts = model.layers[1].mlp.experts
    assert isinstance(experts, LoRAExperts)
    assert isinstance(experts.base, NF4Experts)
    assert len(fresh) == 4
    for name, before in fresh.items():
        for e in range(4):
            moved = not torch.equal(model.get_parameter(name)[e], before[e])
            assert moved != (f"layers.1.mlp.experts[{e}]" in gate.unused), f"{name}[{e}]"
    assert torch.equal(experts.base.gate_up_proj, start["layers.1.mlp.experts.gate_up_proj"])
    out = generate(model, tokens[None, :40], max_new_tokens=30)
    assert out.shape == (1, 70)
