"""Small random models with experts, made with transformers and loaded here."""

import torch

from llamakern import Llama
from llamakern.checkpoint_moe import parameter_name

KINDS = ("llama4", "maverick", "mixtral", "qwen2_moe", "qwen3_moe")
COMMON = {
    "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "max_position_embeddings": 64, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA4 = {
    "intermediate_size": 64, "intermediate_size_mlp": 128, "num_local_experts": 4, "num_experts_per_tok": 1,
    "attention_chunk_size": 8, "no_rope_layer_interval": 2, "floor_scale": 4, "attn_scale": 0.3,
    "attn_temperature_tuning": True, "pad_token_id": 0,
}  # fmt: skip


def hf_config(kind):
    import transformers as t

    if kind == "llama4":
        return t.Llama4TextConfig(**COMMON, **LLAMA4, use_qk_norm=True)
    if kind == "maverick":
        more = {"use_qk_norm": False, "interleave_moe_layer_step": 2, "num_experts_per_tok": 2}
        return t.Llama4TextConfig(**COMMON, **(LLAMA4 | more))
    if kind == "mixtral":
        return t.MixtralConfig(**COMMON, intermediate_size=64, num_local_experts=4, num_experts_per_tok=2)
    qwen = {"intermediate_size": 128, "moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
    if kind == "qwen2_moe":
        return t.Qwen2MoeConfig(**COMMON, **qwen, shared_expert_intermediate_size=128)
    return t.Qwen3MoeConfig(**COMMON, **qwen, norm_topk_prob=True, mlp_only_layers=[1])


def hf_model(folder):
    import transformers as t

    return t.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def our_model(folder):
    return Llama.from_pretrained(folder, dtype=torch.float32)


def build(kind, folder):
    """(transformers' model, ours from its files, the folder)"""
    import transformers as t

    torch.manual_seed(0)
    config = hf_config(kind)
    config._attn_implementation = "eager"
    architecture = {"llama4": "Llama4ForCausalLM", "maverick": "Llama4ForCausalLM", "mixtral": "MixtralForCausalLM"}
    architecture |= {"qwen2_moe": "Qwen2MoeForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
    theirs = getattr(t, architecture[kind])(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(std=0.08) if p.dim() > 1 else p.uniform_(0.5, 1.5)
    theirs.save_pretrained(folder)
    return theirs, our_model(folder), folder


def gradients(model, loss):
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def renamed(kind, config, tensors):
    """transformers' parameters in memory under our names and in our layout."""
    ours = {}
    for name, tensor in tensors.items():
        name = parameter_name(name)
        stack = ".experts." in name and kind in ("llama4", "maverick")
        ours[name] = tensor.mT if stack else tensor
    return ours
