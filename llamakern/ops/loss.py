"""Cross-entropy of a linear head, without the logits.

    z = h Wᵀ            loss_m = logsumexp(z_m) - z_m[label_m]            ignored rows give 0

Shapes: M tokens, C model width, V vocabulary.
"""

import torch.nn.functional as F


def linear_cross_entropy_reference(h, w_head, labels, *, ignore_index=-100, reduction="mean"):
    """What the op means, in plain PyTorch: the mean is over the labels that are not ignored."""
    logits = (h @ w_head.T).flatten(0, -2)
    logits = logits if logits.dtype == h.new_empty(0).double().dtype else logits.float()
    return F.cross_entropy(logits, labels.flatten(), ignore_index=ignore_index, reduction=reduction)
