"""Builds llamakern's C++ through CMake. torch is found, never imported: its headers and libtorch_cpu.so suffice."""

import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent


def find_torch() -> Path:
    """torch's package folder: LLAMAKERN_TORCH_DIR, or an installed one.

    Under pip's build isolation no torch can be imported, but sysconfig still names the real environment.
    """
    spec = importlib.util.find_spec("torch")
    places = [os.environ.get("LLAMAKERN_TORCH_DIR"), *(spec.submodule_search_locations if spec else ())]
    places += [Path(sysconfig.get_paths()[key]) / "torch" for key in ("platlib", "purelib")]
    for place in places:
        if place and (Path(place) / "include/torch/csrc/stable/library.h").exists():
            return Path(place)
    raise SystemExit(
        "llamakern: building needs torch >= 2.10 installed first (pip install torch), "
        "or LLAMAKERN_TORCH_DIR set to its folder .../site-packages/torch"
    )


class CMakeBuild(build_ext):
    def get_ext_filename(self, name):
        """Both libraries of the package: the op library has a plain name, `_C` the interpreter's suffix."""
        return "llamakern/libllamakern_ops.so" if name.endswith("libllamakern_ops") else super().get_ext_filename(name)

    def run(self):
        import pybind11

        build = ROOT / "build" / os.environ.get("LLAMAKERN_BUILD_NAME", f"cmake-{sys.implementation.cache_tag}")
        subprocess.run(
            ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", f"-DLLAMAKERN_TORCH_DIR={find_torch()}",
             f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
             f"-DLLAMAKERN_SANITIZE={os.environ.get('LLAMAKERN_SANITIZE', '')}",
             f"-DLLAMAKERN_HOST_CUDA={os.environ.get('LLAMAKERN_HOST_CUDA', 'OFF')}"],
            check=True,
        )  # fmt: skip
        subprocess.run(["cmake", "--build", build], check=True)
        place = ROOT if self.inplace or self.editable_mode else Path(self.build_lib)
        subprocess.run(["cmake", "--install", build, "--prefix", place], check=True)


setup(
    ext_modules=[Extension("llamakern._C", []), Extension("llamakern.libllamakern_ops", [])],
    cmdclass={"build_ext": CMakeBuild},
)
