"""LLaMA-Adapter: its formulas, its start at the base, its place beside LoRA and the cache, its files."""

import contextlib
import math

import pytest
import torch
from compare import assert_same_bits, check_against_reference
from torch import nn

from llamakern import Llama, LlamaConfig, generate, peft
from llamakern.data import Example
from llamakern.model import AttendContext, CausalAttention
from llamakern.nn import quantize_
from llamakern.peft import AdapterConfig, ExcitorConfig, LoRAConfig
from llamakern.peft.adapter import PromptAttention
from llamakern.train import TrainConfig, Trainer

TINY = LlamaConfig(dim=64, n_layers=4, n_heads=4, n_kv_heads=2, hidden_dim=64, vocab_size=53)
X = torch.arange(18).reshape(2, 9)
SWITCHES = [(a, s) for a in ("tanh", "none") for s in ("head", "layer")]
PEFTS = {"gate_activation": "none", "gate_scope": "layer"}


def base(packed=False, **change):
    torch.manual_seed(1)
    model = Llama(TINY.replace(**change)).eval()
    for layer in model.layers:  # weights that say something at this width
        nn.init.normal_(layer.self_attn.v_proj.weight, std=0.2)
        nn.init.normal_(layer.self_attn.o_proj.weight, std=0.2)
    return quantize_(model) if packed else model


def wake(model):
    generator = torch.Generator().manual_seed(3)
    for name, p in peft.trainable(model).items():
        p.data.add_((0.5 if name.endswith("gate") else 0.2) * torch.randn(p.shape, generator=generator))
    return model


def adapted(config=None, packed=False, **change):
    return wake(peft.apply(base(packed, **change), config or AdapterConfig(prompt_len=5)))


# ----------------------------------------------------------------------------------------------------------- formulas


def reference(activation, H):
    """softmax(QKᵀτ + mask) V + g·softmax(Q Kpᵀτ) Vp from the prompts on, in plain PyTorch."""

    def attend(q, k, v, prompts, gate, wk, wv):
        D, group = q.shape[-1], H // k.shape[2]
        kp, vp = ((prompts.to(w.dtype) @ w.mT).unflatten(-1, (-1, D))[None] for w in (wk, wv))
        g = (gate.tanh() if activation == "tanh" else gate).expand(H).to(q.dtype)
        y = 0
        for keys, values, hidden, factor in ((k, v, True, torch.ones_like(g)), (kp, vp, False, g)):
            keys, values = (t.repeat_interleave(group, 2) for t in (keys, values))
            s = torch.einsum("bthd,bshd->bhts", q, keys.expand(len(q), -1, -1, -1)) / math.sqrt(D)
            if hidden:
                s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
            p = torch.softmax(s.float() if s.dtype != torch.float64 else s, -1).to(q.dtype)
            y = y + factor[:, None] * torch.einsum("bhts,bshd->bthd", p, values.expand(len(q), -1, -1, -1))
        return y

    return attend


@pytest.mark.parametrize(("activation", "scope"), SWITCHES)
@pytest.mark.parametrize("Hkv", [1, 4])
def test_outputs_and_gradients(activation, scope, Hkv, dtype):
    H, D, C, P = 4, 24, 40, 6
    method = AdapterConfig(prompt_len=P, gate_activation=activation, gate_scope=scope)
    config = LlamaConfig(dim=C, n_layers=1, n_heads=H, n_kv_heads=Hkv, head_dim=D, hidden_dim=8, vocab_size=8)
    module = PromptAttention(CausalAttention(), config, method, {"dtype": torch.float32})
    linears = [nn.Linear(C, Hkv * D, bias=False, dtype=dtype).requires_grad_(False) for _ in range(2)]

    def ours(q, k, v, prompts, gate, *_):
        x = torch.empty(2, 40, C, dtype=dtype)
        parameters = {"prompts": prompts, "gate": gate}
        call = (q, k, v, x, AttendContext(projections=linears))
        return torch.func.functional_call(module, parameters, call)

    inputs = [torch.randn(2, 40, h, D).to(dtype).requires_grad_() for h in (H, Hkv, Hkv)]
    prompts = torch.randn(P, C).to(dtype).float()  # numbers that the base's dtype has
    gate = torch.linspace(-0.7, 0.8, H if scope == "head" else 1)
    inputs += [prompts.requires_grad_(), gate.requires_grad_(), *(linear.weight for linear in linears)]
    floor = 3e-6 if scope == "head" or dtype == torch.float32 else 1e-2  # eager's error of a single number may be none
    check_against_reference(ours, reference(activation, H), inputs, floor=floor)


def test_the_layers_own_projections_see_the_prompts_without_lora():
    model = adapted([LoRAConfig(rank=2), AdapterConfig(prompt_len=5, n_layers=2)])
    seen = []
    model.layers[3].self_attn.attend.base.register_forward_pre_hook(lambda _, args: seen.append(args[4]))
    model(X)
    attention, (ctx,) = model.layers[3].self_attn, seen
    want = attention.attend.prompts @ attention.k_proj.base.weight.mT
    torch.testing.assert_close(ctx.prompt_k.flatten(1), want)
    torch.testing.assert_close(ctx.prompt_gate, attention.attend.gate.tanh())


# ---------------------------------------------------------------------------------------------- sizes, start, training


def test_sizes_of_llama_7b():
    with torch.device("meta"):
        model = peft.apply(Llama(LlamaConfig.preset("llama-7b")), AdapterConfig())
    counts = [p.numel() for p in peft.trainable(model).values()]
    assert sum(n for n in counts if n > 32) == 1_228_800
    assert sum(n for n in counts if n == 32) == 960
    assert peft.count_trainable(model) == 1_229_760
    with torch.device("meta"):
        model = peft.apply(Llama(LlamaConfig.preset("llama-7b")), AdapterConfig(**PEFTS))
    assert peft.count_trainable(model) == 1_228_830


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("config", [AdapterConfig(), [LoRAConfig(rank=2), AdapterConfig()]], ids=["alone", "lora"])
def test_gates_of_0_are_the_base(packed, config):
    model = base(packed)
    want, tokens = model(X), generate(model, X, max_new_tokens=6)
    peft.apply(model, config)
    assert_same_bits(model(X).detach(), want.detach())
    assert torch.equal(generate(model, X, max_new_tokens=6), tokens)
    wake(model)
    assert not torch.allclose(model(X), want, atol=1e-2)
    assert_same_bits(peft.activate(model, None)(X).detach(), want.detach())


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "nf4"])
def test_the_first_step_moves_the_gates_and_the_second_all(packed):
    model = peft.apply(base(packed), AdapterConfig(n_layers=2))
    optimizer = torch.optim.SGD(peft.trainable(model).values(), lr=0.5)
    for step in range(2):
        optimizer.zero_grad()
        model.loss(X, X).backward()
        for name, p in peft.trainable(model).items():
            assert (p.grad.abs().max() > 0) == (step > 0 or name.endswith("gate")), name
        optimizer.step()
    assert set(peft.trainable(model)) == {
        f"layers.{i}.self_attn.attend.{part}" for i in (2, 3) for part in ("prompts", "gate")
    }


def test_activations_made_again_change_no_bit():
    model = adapted().train()
    grads = []
    for again in (False, True):
        model.checkpoint_activations = again
        model.zero_grad()
        model.loss(X, X).backward()
        grads.append([p.grad for p in peft.trainable(model).values()])
    for a, b in zip(*grads, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("beside", [(), (LoRAConfig(rank=2, dropout=0.3),)], ids=["alone", "lora"])
def test_resuming_is_exact(beside, tmp_path):
    rows = [[(i + t) % 53 for t in range(4 + i % 9)] for i in range(10)]
    examples = [Example(row, [False, *[True] * (len(row) - 1)], False, "") for row in rows]
    settings = TrainConfig(steps=8, batch_size=3, max_len=16, lr=1e-2, warmup=0, save_every=1)
    results = []
    for out, stops in (("whole", [9]), ("broken", [2, 3, 9])):
        for steps in stops:
            model = peft.apply(base(), [*beside, AdapterConfig(prompt_len=3, n_layers=2)])
            stop_after(steps, Trainer(model, examples, settings, out=tmp_path / out, quiet=True))
            torch.manual_seed(7)  # the next start has other prompts: all must come from the checkpoint
        results.append(peft.trainable(model))
    for name, p in results[0].items():
        assert_same_bits(results[1][name].detach(), p.detach(), name)


def stop_after(steps, trainer):
    """Trains to the end, or so many steps."""
    backward, done = trainer.backward, []

    def counted(batches):
        done.append(1)
        if len(done) > steps:
            raise KeyError("stop")
        return backward(batches)

    trainer.backward = counted
    with contextlib.suppress(KeyError):
        trainer.train()


# ----------------------------------------------------------------------------------------------- packing and the cache


def test_packed_rows_equal_each_alone():
    model = adapted()
    rows = [torch.arange(20), torch.arange(20, 45)]
    starts = torch.tensor([0, 20, 45]).int()
    packed = model(torch.cat(rows)[None], cu_seqlens=starts)
    for row, got in zip(rows, packed[0].split([20, 25]), strict=True):
        torch.testing.assert_close(got, model(row[None])[0])


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("change", [{}, {"n_kv_heads": 4}, {"rope_layout": "interleaved"}], ids=str)
@torch.no_grad()
def test_the_cache_gives_the_full_forward(packed, change):
    model = adapted(packed=packed, **change)
    tokens = torch.randint(53, (2, 40))
    want, cache = model(tokens), model.new_cache(2, 40)
    parts = [model(part, cache=cache) for part in tokens.split([30, 1, 1, 3, 1, 1, 1, 1, 1], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), want, rtol=1e-4, atol=1e-4)
    new = generate(model, tokens[:, :5], max_new_tokens=8)
    for t in range(5, 13):
        assert torch.equal(model(new[:, :t])[:, -1].argmax(-1), new[:, t])


@pytest.mark.parametrize("turned", ["q_only", "both", "none"])
@torch.no_grad()
def test_beside_excitor_and_lora(turned):
    """Excitor changes the words' keys, which the cache keeps; the prompts stay beside them, whatever the order."""
    excitor = ExcitorConfig(prompt_len=4, rank=2, n_layers=3, extra_rope=turned)
    model = adapted([AdapterConfig(prompt_len=5), excitor, LoRAConfig(rank=2)])
    assert type(model.layers[3].self_attn.attend) is PromptAttention
    tokens = torch.randint(53, (2, 20))
    want, cache = model(tokens), model.new_cache(2, 20)
    parts = [model(part, cache=cache) for part in tokens.split([12, 1, 3, 1, 1, 1, 1], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), want, rtol=1e-4, atol=1e-4)
    seen = []
    inner = model.layers[3].self_attn.attend.base
    inner.register_forward_hook(lambda _, args, y: seen.append((args, y)))
    model(tokens)
    ((q, k, v, x, ctx), y), g = seen[0], model.layers[3].self_attn.attend.gate.tanh()
    words = inner(q, k, v, x, ctx._replace(prompt_k=None, prompt_v=None, prompt_gate=None))
    kp, vp = (t[None].repeat_interleave(2, 2).expand(2, -1, -1, -1) for t in (ctx.prompt_k, ctx.prompt_v))
    a = torch.softmax(torch.einsum("bthd,bphd->bhtp", q, kp) / math.sqrt(16), -1)
    torch.testing.assert_close(y, words + g[:, None] * torch.einsum("bhtp,bphd->bthd", a, vp))


@torch.no_grad()
def test_what_is_kept_for_decoding_follows_every_change():
    model = adapted()
    before = model(X)
    assert_same_bits(model(X), before)
    for change in (
        lambda: model.layers[3].self_attn.attend.prompts.data.mul_(1.5),
        lambda: model.layers[3].self_attn.v_proj.weight.mul_(1.5),
        lambda: setattr(model.layers[3].self_attn, "k_proj", nn.Linear(64, 32, bias=False)),
        lambda: model.double().float(),
    ):
        change()
        kept = model(X)
        with torch.enable_grad():
            assert_same_bits(kept, model(X).detach())
    assert not torch.equal(kept, before)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_autocast_and_narrow_models(narrow):
    model = adapted()
    want = model(X)
    with torch.autocast("cpu", narrow):
        assert (model(X) - want).abs().max() < 0.1 * want.abs().max()
    model = model.to(narrow)
    assert (model(X) - want).abs().max() < 0.1 * want.abs().max()
    model.loss(X, X).backward()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt_len": 0}, "adapter: prompt_len must be a positive integer, got 0"),
        ({"n_layers": 5}, "adapter: n_layers must be at most the model's 4, got 5"),
        ({"n_layers": -1}, "adapter: n_layers must be a positive integer, got -1"),
        ({"gate_activation": "relu"}, r"adapter: gate_activation must be one of \['tanh', 'none'\], got 'relu'"),
        ({"gate_scope": "token"}, r"adapter: gate_scope must be one of \['head', 'layer'\], got 'token'"),
        ({"gate_init": math.nan}, "adapter: gate_init must be a finite number, got nan"),
        ({"prompt_init_std": 0.0}, "adapter: prompt_init_std must not be 0 with gate_init 0"),
    ],
)
def test_bad_settings(values, message):
    with pytest.raises(ValueError, match=message):
        peft.apply(base(), AdapterConfig(**values))
