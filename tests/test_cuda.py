"""The CUDA engine as a whole: what a machine without a GPU can tell of it, and CUDA graphs where there is one."""

import re
from pathlib import Path

import pytest
import torch
from compare import assert_same_bits

from llamakern import _C, Llama, LlamaConfig, nn, ops, peft, runs
from llamakern.config import MoEConfig
from llamakern.decoding import decoder

ROOT = Path(__file__).parent.parent
on_a_gpu = pytest.mark.skipif(not (_C.cuda_built and torch.cuda.is_available()), reason="needs a GPU and its engine")


EXPERTS = MoEConfig(4, 2, 64, shared_dim=64, renormalize=True, balance_loss=0.01, z_loss=0.001)


def tiny(device, *, method=None, moe=None):
    sizes = {"dim": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 192, "vocab_size": 256}
    config = LlamaConfig(**sizes, max_seq_len=64, moe=moe)
    with torch.device(device):
        model = Llama(config).to(torch.bfloat16)
        nn.quantize_(model)
        if method:
            peft.apply(model, method)
    return model


def test_kernels_wait_for_nothing_and_allocate_nothing():
    """So that a CUDA graph can capture every op."""
    waits = r"\bcuda(Malloc|Free|Memcpy\b|Memset\b|\w*Synchronize|StreamCreate|EventCreate)"
    for file in (*ROOT.glob("csrc/**/*.cu*"), *ROOT.glob("bindings/*")):
        assert not re.search(waits, file.read_text()), file


def test_every_op_knows_gpu_tensors():
    """A build without the CUDA engine refuses them in its own words."""
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("llamakern::")]
    assert [n for n in names if not torch._C._dispatch_has_kernel_for_dispatch_key(n, "CUDA")] == []


def test_build_facts():
    facts = runs.environment()
    assert facts["cuda engine"].startswith("nvcc" if _C.cuda_built else "not built")
    assert (facts["gpu"] is None) == (not torch.cuda.is_available())


def decode_step(model, device):
    """The step to be captured, and what it works on."""
    cache = model.new_cache(2, 32)
    tokens = torch.ones(2, 4, dtype=torch.long, device=device)
    with torch.no_grad():
        model(tokens, cache=cache)
    decode = decoder(model, cache)
    token = torch.full((2,), 7, device=device)

    def step():
        with torch.no_grad():
            return model.lm_head(decode(token))

    return cache, step


def training_step(model, device):
    tokens = torch.arange(24, device=device).view(2, 12)
    labels = tokens.roll(-1, 1)
    trained = [p for p in model.parameters() if p.requires_grad]

    def step():
        return torch.autograd.grad(model.loss(tokens, labels), trained)

    return step


@pytest.mark.parametrize("moe", [None, EXPERTS], ids=["dense", "experts"])
def test_no_step_looks_at_values_on_a_device(moe):
    """On tensors that have no values: whoever asks for one raises."""
    experts = [peft.ExpertLoRAConfig(rank=4, router=True)] if moe else []
    model = tiny("meta", method=[peft.LoRAConfig(rank=4, alpha=8), *experts], moe=moe)
    assert decode_step(model, "meta")[1]().shape == (2, 256)
    assert all(g.device.type == "meta" for g in training_step(model, "meta")())
    with pytest.raises(RuntimeError, match="meta"):
        torch.ones(1, device="meta").item()


def captured(step):
    """Runs step thrice on a side stream, as torch asks, then captures it: (graph, its outputs)."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    return graph, out


@on_a_gpu
@pytest.mark.parametrize("moe", [None, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("adapted", [False, True])
def test_decode_step_is_captured(adapted, moe):
    """Replayed, a step adds a token to the cache and gives the bits that it gives when it is called."""
    torch.manual_seed(0)
    model = tiny("cuda", method=peft.LoRAConfig(rank=4, alpha=8) if adapted else None, moe=moe)
    cache, step = decode_step(model, "cuda")
    graph, logits = captured(step)
    cache.lengths.fill_(4)
    replayed = []
    for _ in range(3):
        graph.replay()
        replayed.append(logits.clone())
    assert cache.lengths.tolist() == [7, 7]
    cache.lengths.fill_(4)
    cache.used = 4
    for want in replayed:
        assert_same_bits(step(), want)


@on_a_gpu
@pytest.mark.parametrize("moe", [None, EXPERTS], ids=["dense", "experts"])
def test_training_step_is_captured(moe):
    torch.manual_seed(0)
    step = training_step(tiny("cuda", method=peft.LoRAConfig(rank=4, alpha=8), moe=moe), "cuda")
    want = step()
    graph, gradients = captured(step)
    graph.replay()
    for ours, theirs in zip(gradients, want, strict=True):
        assert_same_bits(ours, theirs)


@on_a_gpu
def test_tensors_of_two_devices_are_refused():
    """Before a kernel follows an address that its GPU does not know."""
    mine = torch.ones(2, 8), torch.ones(4, 8), torch.ones(1, 8), torch.ones(4, 1)
    for away in range(len(mine)):
        mixed = [t.cpu() if i == away else t.cuda() for i, t in enumerate(mine)]
        with pytest.raises(ValueError, match="must be on the device of"):
            torch.ops.llamakern.lora_linear(None, *mixed, None, None, 1.0, 0.0)


@on_a_gpu
def test_ops_run_on_torchs_stream():
    """A kernel waits for what its stream does before, though the host runs ahead."""
    x = torch.zeros(1 << 20, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(20_000_000)
        x.fill_(2.0)
        y = ops.swiglu(x, x)
    torch.cuda.synchronize()
    assert torch.equal(y, ops.swiglu(x, x))
