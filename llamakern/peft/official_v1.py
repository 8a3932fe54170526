"""The authors' files of LLaMA-Adapter V1 (github.com/OpenGVLab/LLaMA-Adapter, alpaca_finetuning_v1): one .pth.

    adapter_query.weight      (L·P, C)        prompts of the L inserted layers, the lowest layer's first
    layers.N.attention.gate   (1, H, 1, 1)    for every layer of the model; those below the inserted ones stay 0

Their models turn interleaved pairs, and nothing here depends on that: prompts are rows of the residual stream, which
the layer's own projections turn into keys, and a gate belongs to a whole head.

The file does not say how many prompts a layer has, nor whether the gates are meant through tanh: the authors' training
takes tanh(gate), their inference the gate as it is.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from llamakern.distributed import is_main, whole
from llamakern.files import atomic_file
from llamakern.peft.adapter import AdapterConfig, PromptAttention
from llamakern.peft.base import upper_layers
from llamakern.peft.switching import Adapter, active, add, find

QUERY, GATE = "adapter_query.weight", "layers.{}.attention.gate"


def load_official_v1(
    model: nn.Module, path: str | Path, *, prompt_len: int = 10, gate_activation: str = "tanh", name: str = "default"
) -> nn.Module:
    """The model itself with the LLaMA-Adapter of the authors' file in it, active under `name`.

    prompt_len: prompts of a layer. gate_activation: "tanh" to compute as the authors train, "none" as their inference
    does. FileNotFoundError without the file; ValueError, naming them, for tensors that are missing, unexpected or do
    not fit the model. The model stays as it was unless all fits.
    """
    saved = read(Path(path))
    rows, depth, H = saved[QUERY].shape[0], len(upper_layers(model, len(model.layers), "adapter")), model.config.n_heads
    if prompt_len < 1 or rows % prompt_len:
        raise ValueError(f"adapter: prompt_len must divide the file's {rows} prompts, got {prompt_len}")
    config = AdapterConfig(prompt_len=prompt_len, n_layers=rows // prompt_len, gate_activation=gate_activation)
    layers = upper_layers(model, config.n_layers, config.kind)
    wanted = {QUERY: [rows, model.config.dim]} | {GATE.format(i): [1, H, 1, 1] for i in range(depth)}
    if wrong := [key for key in saved.keys() | wanted if key not in wanted or key not in saved]:
        state = "hold no" if min(wrong) in saved else "hold"
        raise ValueError(f"adapter: {path} must {state} {min(wrong)} to fit the model's {depth} layers, got others")
    for key, shape in wanted.items():
        if list(saved[key].shape) != shape:
            raise ValueError(f"adapter: {key} must have shape {shape}, got {list(saved[key].shape)}")

    @torch.no_grad()
    def fill(adapter: Adapter) -> None:
        prompts = saved[QUERY].unflatten(0, (len(layers), prompt_len))
        for layer, part, rows in zip(layers, adapter.parts[0].modules.values(), prompts, strict=True):
            part.prompts.copy_(rows)
            part.gate.copy_(saved[GATE.format(layer)].flatten())

    add(model, name, [config], fill)
    return model


def save_official_v1(model: nn.Module, path: str | Path, *, name: str | None = None) -> None:
    """Write the LLaMA-Adapter of `model` as the authors' file, gates of 0 for the layers without; `name` as in `save`.

    Of several processes all call it; process 0 writes. A gate for a whole layer is written for each of its heads.
    Whether the gates are meant through tanh, the file cannot say. ValueError if there is no such adapter, or if it is
    of another method or of several.
    """
    if name is None and (name := active(model)) is None:
        raise ValueError("adapter: model must carry an active adapter to save one, got a model without")
    methods, modules = find(model, name).methods, find(model, name).modules
    if len(methods) > 1 or not all(isinstance(part, PromptAttention) for part in modules.values()):
        raise ValueError(f"adapter: {name!r} must be a LLaMA-Adapter alone, got {[method.kind for method in methods]}")
    H, tensors = model.config.n_heads, {}
    for i in range(len(model.layers)):
        tensors[GATE.format(i)] = torch.zeros(1, H, 1, 1)
    for path_, part in modules.items():
        gate = whole(part.gate.detach()).float().cpu().expand(H)
        tensors[GATE.format(path_.split(".")[1])] = gate.reshape(1, H, 1, 1).clone()
    tensors[QUERY] = torch.cat([whole(part.prompts.detach()).float().cpu() for part in modules.values()])
    if is_main():
        with atomic_file(path) as file:
            torch.save(tensors, file)


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a .pth, of which nothing is run."""
    if not path.is_file():
        raise FileNotFoundError(f"adapter: path must be the authors' .pth, got {path}")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"adapter: {path} must be a whole .pth of tensors, got {error}") from None
    if not isinstance(saved, dict) or not isinstance(saved.get(QUERY), Tensor) or saved[QUERY].dim() != 2:
        raise ValueError(f"adapter: {path} must hold {QUERY} of shape (L·P, C), got a file without")
    if odd := [key for key, t in saved.items() if not isinstance(t, Tensor)]:
        raise ValueError(f"adapter: {path} must hold tensors alone, got {odd[0]}")
    return saved
