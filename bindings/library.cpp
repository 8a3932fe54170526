// The namespace torch.ops.llamakern; each room adds its own ops to it.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(llamakern, /*m*/) {}
