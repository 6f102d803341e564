"""The build backend: scikit-build-core's, with PyPI's `ziglang` as the compiler on machines that have none.

Only where `CXX` names no compiler and there is none on `PATH` under a usual name does a build require ziglang (400 MB, and some
minutes for the first build). Such builds have a folder of their own, as CMake does not change compilers in one.
"""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from scikit_build_core import build as scikit_build
from scikit_build_core.build import (
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

ZIG = "ziglang>=0.15"
COMPILERS = ("c++", "g++", "clang++")

Settings = dict[str, Any] | None


def without_compiler() -> bool:
    """Return whether nothing here compiles C++."""
    return os.name == "posix" and "CXX" not in os.environ and not any(shutil.which(name) for name in COMPILERS)


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """Return what building a wheel requires."""
    return [*scikit_build.get_requires_for_build_wheel(config_settings), *([ZIG] if without_compiler() else [])]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    """Return what building an editable wheel requires."""
    return [*scikit_build.get_requires_for_build_editable(config_settings), *([ZIG] if without_compiler() else [])]


def build_wheel(wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    """Build a wheel and return its name."""
    return scikit_build.build_wheel(wheel_directory, _settings(config_settings), metadata_directory)


def build_editable(wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    """Build an editable wheel and return its name."""
    return scikit_build.build_editable(wheel_directory, _settings(config_settings), metadata_directory)


def _settings(config_settings: Settings) -> Settings:
    """Make zig the compiler where there is none."""
    if not without_compiler():
        return config_settings
    # CMake wants programs, not "python -m ziglang c++". They are written anew each time: an isolated build's Python goes with it.
    folder = Path("build", "zig").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    # Not for the processor that builds: the instruction set is chosen at run time.
    for tool, options in (("c++", "-mcpu=baseline"), ("ar", ""), ("ranlib", "")):
        script = folder / tool
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ziglang {tool} {options} "$@"\n')
        script.chmod(0o755)
    os.environ["CXX"] = str(folder / "c++")
    tools = f"-DCMAKE_AR={folder / 'ar'} -DCMAKE_RANLIB={folder / 'ranlib'}"
    os.environ["CMAKE_ARGS"] = " ".join(filter(None, (os.environ.get("CMAKE_ARGS"), tools)))
    return {"build-dir": "build/zig/{wheel_tag}", **(config_settings or {})}
