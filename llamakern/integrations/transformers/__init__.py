"""transformers' LLaMA on llamakern's ops: `patch` binds them to one loaded model, `unpatch` takes them away again.

Importing this registers the attention "llamakern" with transformers, for `attn_implementation="llamakern"`.
"""

from llamakern.integrations.transformers import attention as attention
from llamakern.integrations.transformers.patch import patch as patch
from llamakern.integrations.transformers.patch import unpatch as unpatch
from llamakern.integrations.transformers.report import Report as Report
