"""A pure Python wheel; with TORCH_PAGED_BUILD_NATIVE=1, one that holds the native CPU kernels ready built.

`TORCH_PAGED_BUILD_NATIVE=1 pip wheel --no-build-isolation .`, for every instruction set of this kind of processor.
"""

import importlib.util
import os
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py


class BuildNative(build_py):
    def run(self) -> None:
        super().run()
        path = Path("torch_paged/cpu/build.py").resolve()
        spec = importlib.util.spec_from_file_location("build", path)
        build = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(build)
        for level in build.machine_levels():
            build.build(
                build.find_compiler(), level, Path(self.build_lib, f"torch_paged/cpu/native/{level}.so").resolve()
            )


class BinaryDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True


class AnyPython(bdist_wheel):
    """The libraries know PyTorch's stable ABI alone, and nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if os.environ.get("TORCH_PAGED_BUILD_NATIVE") == "1":
    setup(cmdclass={"build_py": BuildNative, "bdist_wheel": AnyPython}, distclass=BinaryDistribution)
else:
    setup()
