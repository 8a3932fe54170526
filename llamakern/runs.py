"""What a run leaves in its folder: metrics.jsonl, checkpoints, run.json, loss.png. All of it survives a kill."""

import json
import os
import platform
import resource
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

from llamakern.files import atomic_file


class RunFolder:
    """`path/metrics.jsonl`, one JSON object a line, and the last `keep_last` of `path/checkpoints/step-<n>.pt`."""

    def __init__(self, path: str | Path, keep_last: int = 2):
        self.path, self.keep_last = Path(path), keep_last
        self.metrics = self.path / "metrics.jsonl"
        self.path.mkdir(parents=True, exist_ok=True)

    def log(self, **values) -> None:
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def history(self) -> list[dict]:
        """What `log` has written."""
        return read_lines(self.metrics)

    def rewind(self, step: int) -> None:
        """Forget the lines after `step`: they will be computed again."""
        kept = [json.dumps(line) + "\n" for line in self.history() if line["step"] <= step]
        with atomic_file(self.metrics) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")

    def checkpoints(self) -> list[Path]:
        """Oldest first."""
        return sorted((self.path / "checkpoints").glob("step-*.pt"))

    def save_checkpoint(self, step: int, state: dict) -> Path:
        path = self.path / "checkpoints" / f"step-{step:08d}.pt"
        with atomic_file(path) as temporary:
            torch.save(state, temporary)
        for old in self.checkpoints()[: -self.keep_last]:
            old.unlink()
        return path

    def load_checkpoint(self) -> dict | None:
        """The newest one, or None. ValueError if it cannot be read."""
        if not (paths := self.checkpoints()):
            return None
        try:
            return torch.load(paths[-1], map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"train: checkpoint must be a whole file, got {paths[-1]}: {error}") from error


def read_lines(file: Path) -> list[dict]:
    """The lines of a metrics.jsonl; one that a kill cut short is left out."""
    values = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict) and type(value.get("step")) is int:
            values.append(value)
    return values


def rng_state() -> dict:
    """Every generator that training draws from."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: dict) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def peak_memory_mb() -> float:
    """The most that this process has held: so far, or since `reset_peak_memory`; on the GPU if one is in use."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    if sys.platform == "linux":  # where ru_maxrss also counts the process that started this one
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def reset_peak_memory() -> bool:
    """Make `peak_memory_mb` count from now on. False where the system offers no way."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: VmHWM becomes VmRSS
    except OSError:
        return False
    return True


def environment() -> dict:
    """Versions and machine: what a bug report and a reproduction need."""
    facts = {"python": platform.python_version(), "platform": platform.platform(), "machine": platform.machine()}
    for name in ("llamakern", "torch", "numpy", "safetensors", "sentencepiece", "tokenizers", "transformers", "peft"):
        try:
            facts[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            facts[name] = None
    facts["commit"] = commit()
    facts["cpus"], facts["threads"] = os.cpu_count(), torch.get_num_threads()
    facts["processes"] = int(os.environ.get("WORLD_SIZE", "1"))
    facts["torch cuda"] = torch.version.cuda
    facts.update(gpu() or {"gpu": None, "driver": None})
    facts.update(engine())
    return facts


def gpu() -> dict:
    """The GPU that torch would use and its driver; empty where there is none."""
    if not torch.cuda.is_available():
        return {}
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        driver = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        driver = None
    return {"gpu": torch.cuda.get_device_name(), "driver": driver}


def commit() -> str | None:
    """The commit of the checkout that this package runs from, with "+ changes" if files differ; None elsewhere."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        call = {"cwd": root, "capture_output": True, "text": True, "check": True, "timeout": 10}
        head = subprocess.run(["git", "rev-parse", "HEAD"], **call).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], **call).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return head + (" + changes" if changed else "")


def now() -> str:
    """UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def engine() -> dict:
    """What the C++ engine says of itself: instruction set and build."""
    try:
        from llamakern import _C
    except ImportError:
        return {"isa": None, "cuda engine": None}
    built = f"nvcc {_C.cuda_compiler} for {_C.cuda_archs}" if _C.cuda_built else "not built"
    return {"isa": _C.isa(), "compiler": _C.compiler, "cuda engine": built}


def plot_curves(files: dict[str, Path], path: str | Path) -> bool:
    """Draw training and held-out loss of each metrics.jsonl, side by side, as a PNG.

    False, and nothing written, without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(5 * len(files), 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(files), squeeze=False)[0]
    for axes, (title, file) in zip(panels, files.items(), strict=True):
        for key, label, style in (("loss", "training", "-"), ("eval_loss", "held out", "o-")):
            points = [(line["step"], line[key]) for line in read_lines(file) if line.get(key) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1, markersize=4)
        axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
        axes.grid(alpha=0.3)
        axes.legend()
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    return True
