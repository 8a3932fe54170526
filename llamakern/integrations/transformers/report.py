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
    hint       what more could be done, or ""
    """

    replaced: dict[str, int] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=lambda: versions())
    hint: str = ""

    def __str__(self) -> str:
        lines = [f"llamakern {self.versions['llamakern']} in transformers {self.versions['transformers']}"]
        lines += [f"  replaced  {part:<10} {count}" for part, count in self.replaced.items()]
        for (part, reason), names in self.reasons().items():
            where = f" ({names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''})" if names[0] else ""
            lines.append(f"  kept      {part:<10} {reason}{where}")
        lines += [f"  hint      {self.hint}"] if self.hint else []
        return "\n".join(lines)

    def reasons(self) -> dict[tuple[str, str], list[str]]:
        """`kept` the other way round: (part, reason) -> the modules left alone for it."""
        found: dict[tuple[str, str], list[str]] = {}
        for key, reason in self.kept.items():
            part, _, name = key.partition(": ")
            found.setdefault((part, reason), []).append(name)
        return found


def versions() -> dict[str, str]:
    """The installed versions of what meets in a patched model."""
    found = {}
    for name in ("llamakern", "torch", "transformers", "peft", "bitsandbytes"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return found
