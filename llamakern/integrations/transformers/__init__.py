"""transformers' LLaMA on llamakern's ops: `patch` binds them to one loaded model, `unpatch` takes them away again.

Importing this registers the attention "llamakern" with transformers, for `attn_implementation="llamakern"`.
"""

from importlib.util import find_spec

from llamakern.integrations.transformers import attention as attention
from llamakern.integrations.transformers.patch import patch as patch
from llamakern.integrations.transformers.patch import unpatch as unpatch
from llamakern.integrations.transformers.report import Report as Report

if find_spec("transformers.core_model_loading"):  # from version 5 on; before it, llamakern.nn.quantize_ after loading
    from llamakern.integrations.transformers.quantizer import NF4Config as NF4Config
