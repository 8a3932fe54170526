"""Tiny models of transformers, batches for them, and one training step."""

import torch
import transformers
from compare import assert_as_good_as

IGNORED = -100
SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def make(dtype=torch.float32, kind="Llama", head="ForCausalLM", **settings):
    """A random model, the same for the same arguments."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | settings)
    model = getattr(transformers, f"{kind}{head}")(config)
    for name, p in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(p, mean=float("norm" in name), std=0.2)
    return model.to(dtype).train()


def batch(name="plain"):
    """Two rows of nine tokens with labels: plain, padded on one side, or packed by restarting positions."""
    tokens = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(1))
    given = {"input_ids": tokens, "labels": tokens.clone()}
    if name in ("left", "right"):
        mask = torch.ones_like(tokens)
        mask[1, :4] = 0
        mask = mask.flip(1) if name == "right" else mask
        given |= {"attention_mask": mask, "labels": tokens.masked_fill(mask == 0, IGNORED)}
    if name == "packed":
        given |= {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]).expand(2, -1), "use_cache": False}
    return given


BATCHES = ("plain", "left", "right", "packed")


def step(model, given, **more):
    """Loss, logits and every gradient of one training step, by name."""
    model.zero_grad(set_to_none=True)
    out = model(**given, **more)
    out.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": out.loss.detach(), "logits": out.logits.detach(), **grads}


def assert_step_as_good(ours, eager, truth):
    """The three are of one model: patched, as it was, and as it was in float64."""
    assert ours.keys() == eager.keys() == truth.keys()
    noise = (eager["logits"].double() - truth["logits"]).abs().max().item()
    assert abs(ours["loss"].item() - truth["loss"].item()) <= noise + 1e-6  # one number may be right by chance in eager
    assert_as_good_as("logits", ours["logits"], eager["logits"], truth["logits"])
    sizes = {name: truth[name].abs().max() for name in truth.keys() - {"loss", "logits"}}
    least = 0.02 * max(sizes.values())  # smaller gradients are what larger ones left over, and noise in bfloat16
    sizes = {name: max(size, least) for name, size in sizes.items()}

    def gradients(of):  # each on its own scale, in one row: the noise of a single small tensor varies
        return torch.cat([(of[name].double() / size).flatten() for name, size in sorted(sizes.items())])

    assert {ours[name].dtype for name in sizes} == {eager[name].dtype for name in sizes}
    assert_as_good_as("gradients", gradients(ours), gradients(eager), gradients(truth), floor=2e-6)
