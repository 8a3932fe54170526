"""What turns the features of a frozen image encoder, (B, Nv, Dv), into prompts: the model's visual socket.

    VisualVector    LLaMA-Adapter (arXiv 2303.16199, section 3.3): the Nv scales side by side, an MLP, one row (B, 1, C)
                    that is added to every prompt of every layer
    VisualQueries   LLaMA-Adapter V2's released visual model: learned queries read the projected features in a few
                    transformer blocks and become rows (B, P, C)

Excitor projects features in each layer by itself (excitor.py). All of it is float32 and trains.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class VisualVector(nn.Module):
    """down(gelu(up(features side by side))): (B, Nv, Dv) -> (B, 1, C)."""

    def __init__(self, n_features: int, feature_dim: int, hidden: int, dim: int, like: dict):
        super().__init__()
        self.base, self.shape = None, (n_features, feature_dim)
        self.up = nn.Linear(n_features * feature_dim, hidden, **like)
        self.down = nn.Linear(hidden, dim, **like)

    def forward(self, features: Tensor) -> Tensor:
        check(features, *self.shape)
        with float32(features):
            return self.down(F.gelu(self.up(features.float().flatten(1))))[:, None]


class VisualQueries(nn.Module):
    """P learned queries in front of the projected features, `depth` blocks, the queries projected to the model.

    (B, Nv, Dv) -> (B, P, C). Every linear has a bias; the names are those of the released checkpoint.
    """

    def __init__(self, n_queries: int, feature_dim: int, width: int, depth: int, n_heads: int, dim: int, like: dict):
        super().__init__()
        self.base, self.feature_dim = None, feature_dim
        self.clip_proj, self.clip_proj_norm = nn.Linear(feature_dim, width, **like), nn.LayerNorm(width, **like)
        self.visual_query = nn.Parameter(torch.empty(n_queries, width, **like).normal_())
        self.visual_blocks = nn.ModuleList(VisualBlock(width, n_heads, like) for _ in range(depth))
        self.visual_proj, self.visual_proj_norm = nn.Linear(width, dim, **like), nn.LayerNorm(dim, **like)

    def forward(self, features: Tensor) -> Tensor:
        check(features, None, self.feature_dim)
        with float32(features):
            seen = self.clip_proj_norm(self.clip_proj(features.float()))
            x = torch.cat((self.visual_query.expand(len(seen), -1, -1), seen), 1)
            for block in self.visual_blocks:
                x = block(x)
            return self.visual_proj_norm(self.visual_proj(x[:, : len(self.visual_query)]))


class VisualBlock(nn.Module):
    """A block of a vision transformer (arXiv 2010.11929): x + attention(norm(x)), then the same with a GELU MLP."""

    def __init__(self, width: int, n_heads: int, like: dict):
        super().__init__()
        self.n_heads = n_heads
        self.norm1, self.norm2 = nn.LayerNorm(width, **like), nn.LayerNorm(width, **like)
        sizes = {
            "qkv": (width, 3 * width),
            "proj": (width, width),
            "fc1": (width, 4 * width),
            "fc2": (4 * width, width),
        }
        made = {name: nn.Linear(*size, **like) for name, size in sizes.items()}
        self.attn = nn.ModuleDict({name: made[name] for name in ("qkv", "proj")})
        self.mlp = nn.ModuleDict({name: made[name] for name in ("fc1", "fc2")})

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.attn["proj"](seen)
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


def check(features: Tensor, n: int | None, dim: int) -> None:
    if features.shape[2] != dim or (n is not None and features.shape[1] != n):
        wanted = f"(B, {'Nv' if n is None else n}, {dim})"
        raise ValueError(f"visual: features must have shape {wanted}, got {list(features.shape)}")


def float32(features: Tensor):
    return torch.autocast(features.device.type, enabled=False)
