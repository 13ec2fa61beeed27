"""Builds the CPU kernels: of each source an object for each instruction set, one library that needs nothing of torch.

Nothing here is needed to run: without a compiler the installation goes on, and the reference loop serves.
"""

import platform
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# GCC 12 takes its own AVX-512 header for careless.
ALL = ["-std=c++17", "-O3", "-g0", "-fno-math-errno", "-fvisibility=hidden", "-Wno-psabi", "-Wno-maybe-uninitialized"]
X86 = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-DVECTOR_BYTES=64", "-DREGISTERS=32"],
    "avx2": ["-mavx2", "-mfma", "-DVECTOR_BYTES=32", "-DREGISTERS=16"],
}
PORTABLE = {"portable": ["-DVECTOR_BYTES=16", "-DREGISTERS=16", "-DWITH_DOUBLE"]}


class BuildKernels(build_ext):
    """Compiles every source once for each instruction set; which one runs is decided when the library is loaded."""

    def build_extension(self, ext: Extension) -> None:
        sets = (X86 if platform.machine() in ("x86_64", "AMD64") else {}) | PORTABLE

        def compiled(source: str, name: str) -> list[str]:
            flags = [*ALL, *sets[name], f"-DNAME={name}"]
            folder = str(Path(self.build_temp, name))
            return self.compiler.compile([source], output_dir=folder, extra_postargs=flags, depends=ext.depends)

        with ThreadPoolExecutor() as pool:  # a compiler each
            groups = pool.map(compiled, *zip(*product(ext.sources, sets), strict=True))
            objects = [o for group in groups for o in group]
        target = self.get_ext_fullpath(ext.name)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(objects, target, target_lang="c++")


if __name__ == "__main__":
    setup(
        ext_modules=[
            Extension(
                "kernels._cpu",
                ["kernels/cpu.cpp", "kernels/log_mel.cpp", "kernels/ctc.cpp", "kernels/moments.cpp"],
                depends=sorted(map(str, Path("kernels").glob("*.h"))),
                language="c++",
                optional=True,
            )
        ],
        cmdclass={"build_ext": BuildKernels},
    )
