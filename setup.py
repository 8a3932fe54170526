"""Builds llamakern's C++ through CMake. torch is found, never imported: its headers and libtorch_cpu.so suffice."""

import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "tools"))

from toolkit import find_nvcc, has_driver  # noqa: E402


def find_torch() -> Path:
    """torch's package folder: LLAMAKERN_TORCH_DIR, or an installed one.

    Under pip's build isolation no torch can be imported, but sysconfig still names the real environment.
    """
    spec = importlib.util.find_spec("torch")
    places = [os.environ.get("LLAMAKERN_TORCH_DIR"), *(spec.submodule_search_locations if spec else ())]
    places += [Path(sysconfig.get_paths()[key]) / "torch" for key in ("platlib", "purelib")]
    found = next((Path(place) for place in places if place and (Path(place) / "version.py").exists()), None)
    if found is None:
        raise SystemExit(
            "llamakern: building needs torch >= 2.11 installed first (pip install torch), "
            "or LLAMAKERN_TORCH_DIR set to its folder .../site-packages/torch"
        )
    version = re.search(r"__version__ = '(\d+)\.(\d+)([^']*)'", (found / "version.py").read_text(encoding="utf-8"))
    if version and (int(version[1]), int(version[2])) < (2, 11):
        raise SystemExit(
            f"llamakern: torch must be 2.11 or later, got {version[1]}.{version[2]}{version[3]} in {found}"
        )
    return found


def cuda_options() -> list[str]:
    """The CUDA engine is built where driver and nvcc are; LLAMAKERN_CUDA=1 insists on it, LLAMAKERN_CUDA=0 forbids."""
    wanted = os.environ.get("LLAMAKERN_CUDA", "").upper()
    if wanted not in ("", "0", "1", "OFF", "ON"):
        raise SystemExit(f"llamakern: LLAMAKERN_CUDA must be 0 or 1, got {wanted}")
    nvcc = find_nvcc()
    if wanted in ("1", "ON") and nvcc is None:
        raise SystemExit(
            "llamakern: LLAMAKERN_CUDA=1 needs nvcc: none in CUDA_HOME, CUDA_PATH, /usr/local/cuda or on PATH"
        )
    if wanted in ("0", "OFF") or nvcc is None or not (wanted or has_driver()):
        return ["-DLLAMAKERN_CUDA=OFF"]
    options = ["-DLLAMAKERN_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}"]
    if archs := os.environ.get("LLAMAKERN_CUDA_ARCHS"):
        options.append(f"-DLLAMAKERN_CUDA_ARCHS={archs}")
    return options


class CMakeBuild(build_ext):
    def get_ext_filename(self, name):
        """Both libraries of the package: the op library has a plain name, `_C` the interpreter's suffix."""
        return "llamakern/libllamakern_ops.so" if name.endswith("libllamakern_ops") else super().get_ext_filename(name)

    def run(self):
        import pybind11

        on_host = os.environ.get("LLAMAKERN_HOST_CUDA", "OFF")
        cuda = [] if on_host == "ON" else cuda_options()
        kind = "-cuda" if "-DLLAMAKERN_CUDA=ON" in cuda else ""
        isas = [f"-DLLAMAKERN_ISAS={os.environ['LLAMAKERN_ISAS']}"] if "LLAMAKERN_ISAS" in os.environ else []
        name = os.environ.get("LLAMAKERN_BUILD_NAME", f"cmake-{sys.implementation.cache_tag}{kind}")
        build = ROOT / "build" / name
        subprocess.run(
            ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", f"-DLLAMAKERN_TORCH_DIR={find_torch()}",
             f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
             f"-DLLAMAKERN_SANITIZE={os.environ.get('LLAMAKERN_SANITIZE', '')}",
             f"-DLLAMAKERN_HOST_CUDA={on_host}", *isas, *cuda],
            check=True,
        )  # fmt: skip
        subprocess.run(["cmake", "--build", build], check=True)
        place = ROOT if self.inplace or self.editable_mode else Path(self.build_lib)
        subprocess.run(["cmake", "--install", build, "--prefix", place], check=True)


setup(
    ext_modules=[Extension("llamakern._C", []), Extension("llamakern.libllamakern_ops", [])],
    cmdclass={"build_ext": CMakeBuild},
)
