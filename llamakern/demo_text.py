"""Real English that every Python has: its manual (`pydoc_data.topics`) and the standard library's docstrings."""

import ast
import inspect
import re
import sysconfig
from pathlib import Path
from typing import NamedTuple

SKIPPED = ("site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "__pycache__")


class Documented(NamedTuple):
    """A function of the standard library."""

    file: str  # "json/decoder.py"
    signature: str  # "def decode(self, s)"
    summary: str  # the first sentence of its docstring


def manual() -> list[str]:
    """The topics of Python's manual, plain text without the markup's rulers."""
    from pydoc_data.topics import topics

    return [re.sub(r"^[*=~^-]{4,}\n", "", text, flags=re.MULTILINE).strip() for text in topics.values()]


def library() -> tuple[dict[str, list[str]], list[Documented]]:
    """Whole docstrings by file, and the functions with a one-sentence summary, each summary once."""
    root = Path(sysconfig.get_paths()["stdlib"])
    docstrings, functions, seen = {}, [], set()
    for path in sorted(root.rglob("*.py")):
        file = path.relative_to(root)
        if any(part in SKIPPED for part in file.parts):
            continue
        for node in documented_nodes(path):
            text = inspect.cleandoc(ast.get_docstring(node, clean=False))
            docstrings.setdefault(str(file), []).append(text)
            if isinstance(node, ast.Module | ast.ClassDef):
                continue
            summary = first_sentence(text)
            if summary and summary not in seen:
                seen.add(summary)
                functions.append(Documented(str(file), f"def {node.name}({ast.unparse(node.args)})", summary))
    return docstrings, functions


def documented_nodes(path: Path) -> list[ast.AST]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(tree) if isinstance(node, kinds) and ast.get_docstring(node, clean=False)]


def first_sentence(text: str) -> str | None:
    """The first sentence on one line, if it is one of 20 to 120 characters."""
    paragraph = " ".join(text.split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.])\s", paragraph)[0]
    return sentence if 20 <= len(sentence) <= 120 and sentence.endswith(".") and sentence[0].isupper() else None
