"""NF4 inside transformers' own loading, from its version 5 on: quantised while it is read, saved, and read again.

    LlamaForCausalLM.from_pretrained(path, quantization_config=NF4Config())

Its config.json then says quant_method "llamakern_nf4", which transformers knows once this module is imported.
"""

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from llamakern import ops
from llamakern.nn import NF4Linear

METHOD = "llamakern_nf4"
PACKED = ("absmax", "absmax_scale", "absmax_offset")  # beside weight


@register_quantization_config(METHOD)
class NF4Config(QuantizationConfigMixin):
    """Which linears become NF4Linear, and how: all but the head and `modules_to_not_convert`.

    block_size and double_quant are those of `ops.nf4_quantize` and `ops.nf4_double_quantize`.
    """

    def __init__(self, block_size=64, double_quant=False, modules_to_not_convert=None, **kwargs):
        self.quant_method = METHOD
        self.block_size, self.double_quant = block_size, double_quant
        self.modules_to_not_convert = modules_to_not_convert


class Quantize(ConversionOps):
    """One dense weight of a checkpoint to the packed tensors of its NF4Linear."""

    def __init__(self, config: NF4Config):
        self.config = config

    def convert(self, input_dict, full_layer_name=None, model=None, missing_keys=None, **kwargs) -> dict[str, Tensor]:
        made = {}
        for name, weight in input_dict.items():
            weight = weight[0] if isinstance(weight, list) else weight
            packed, absmax = ops.nf4_quantize(weight, block_size=self.config.block_size)
            if self.config.double_quant:
                absmax, scale, offset = ops.nf4_double_quantize(absmax)
                made |= {beside(name, "absmax_scale"): scale, beside(name, "absmax_offset"): offset}
            made |= {name: packed, beside(name, "absmax"): absmax}
            full = full_layer_name or name
            get_module_from_name(model, full)[0]._is_hf_initialized = True
            if missing_keys is not None:
                missing_keys.difference_update(beside(full, part) for part in PACKED)
        return made


def beside(name: str, part: str) -> str:
    """The name of another tensor of the module whose weight is `name`."""
    return f"{name.removesuffix('weight')}{part}"


@register_quantizer(METHOD)
class NF4Quantizer(HfQuantizer):
    """What transformers asks while it loads and saves."""

    requires_calibration = False
    is_trainable = True  # through adapters; transformers itself refuses a quantised model without any

    def param_needs_quantization(self, model, param_name: str, **kwargs) -> bool:
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, NF4Linear) and name == "weight" and not self.pre_quantized

    def get_quantize_ops(self) -> Quantize:
        return Quantize(self.quantization_config)

    def _process_model_before_weight_loading(self, model, **kwargs) -> None:
        config = self.quantization_config
        skip = self.get_modules_to_not_convert(model, config.modules_to_not_convert, model._keep_in_fp32_modules)
        for name, linear in list(model.named_modules()):
            if type(linear) is nn.Linear and should_convert_module(name, skip):
                model.set_submodule(name, self.placeholder(linear))

    def placeholder(self, linear: nn.Linear) -> NF4Linear:
        """An empty NF4Linear. Until its weight is quantised it has that of `linear`: the loader casts to its dtype."""
        made = NF4Linear(
            linear.in_features,
            linear.out_features,
            block_size=self.quantization_config.block_size,
            double_quant=self.quantization_config.double_quant,
            device="meta",
        )
        made.bias = linear.bias
        if not self.pre_quantized:
            made.weight = nn.Parameter(torch.empty_like(linear.weight, device="meta"), requires_grad=False)
        return made

    def _process_model_after_weight_loading(self, model, **kwargs):
        model.is_loaded_in_4bit = True
        return model

    def is_serializable(self, **kwargs) -> bool:
        return True
