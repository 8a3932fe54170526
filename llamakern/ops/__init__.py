"""LLaMA's kernels as torch ops. Tensors are positional, knobs keyword-only; `<op>_reference` says what `<op>` means."""

from llamakern.ops.loss import linear_cross_entropy as linear_cross_entropy
from llamakern.ops.norm import rms_norm as rms_norm
from llamakern.ops.rope import rope as rope
from llamakern.ops.swiglu import swiglu as swiglu
