"""LLaMA's kernels as torch ops. Tensors are positional, knobs keyword-only; `<op>_reference` says what `<op>` means."""

from llamakern.ops.rope import rope as rope
