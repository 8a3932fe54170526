"""What `patch` did to a model."""

from dataclasses import dataclass, field
from importlib import metadata

PARTS = ("attention", "rope", "norm", "mlp", "loss", "lora")


@dataclass
class Report:
    """What runs on llamakern in a model, and what was left as it is.

    replaced   part -> how many modules: "attention", "rope", "norm", "mlp", "loss", "lora"
    kept       part, or "part: module name" -> why it was left alone
    versions   package -> version
    """

    replaced: dict[str, int] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=lambda: versions())

    def __str__(self) -> str:
        lines = [f"llamakern {self.versions['llamakern']} in transformers {self.versions['transformers']}"]
        lines += [f"  replaced  {part:<10} {count}" for part, count in self.replaced.items()]
        lines += [f"  kept      {part:<10} {reason}" for part, reason in self.kept.items()]
        return "\n".join(lines)


def versions() -> dict[str, str]:
    """The installed versions of what meets in a patched model."""
    found = {}
    for name in ("llamakern", "torch", "transformers", "peft", "bitsandbytes"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return found
