"""The build steps of the distribution brokerd that pyproject.toml can't describe.

The modules of brokerd/core that brokerd/core/compiled.py lists are compiled, and the key
search: all of them, or none where no C compiler works. The install succeeds without, and
the daemon says routing=python.

The distribution brokerd-client (client/pyproject.toml) installs the package
brokerd_client. The distribution brokerd has to work without it, and must not own the
same files: pip would remove them with either distribution. So the wheel of brokerd
contains its copy of brokerd_client in brokerd/_bundled, and a .pth file that appends
this directory to the module search path. An installed brokerd-client comes first there.
"""

from __future__ import annotations

import copy
import os
import runpy
import shutil
from pathlib import Path
from threading import Lock

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import BaseError, CCompilerError

BUNDLED = "brokerd/_bundled"
COMPILED = [
    "brokerd.net.handshake._key_search_c",
    *(f"brokerd.core.{name}" for name in runpy.run_path("brokerd/core/compiled.py")["MODULES"]),
]

#: -O3 takes longer to compile and makes nothing faster; debug information takes a third
#: of the time. CFLAGS in the environment decides otherwise.
COMPILE_ARGS = [] if os.name == "nt" or "CFLAGS" in os.environ else ["-O2", "-g0"]
#: What keeps a .py file the same when it is compiled. Annotations declare no C types: they
#: would refuse what Python accepts, such as a bool as an int. A None without the attribute
#: asked for and a number too large for its C type are errors, and do not crash or wrap.
AS_THEY_ARE = {
    "annotation_typing": False,
    "auto_pickle": False,
    "nonecheck": True,
    "overflowcheck": True,
}


def extension(name: str) -> Extension:
    """Return how to compile a module."""
    path = name.replace(".", "/")
    (source,) = (file for file in (f"{path}.pyx", f"{path}.py") if Path(file).exists())
    return Extension(
        name,
        [source],
        depends=[f"{path}.pxd"] if Path(f"{path}.pxd").exists() else [],
        extra_compile_args=COMPILE_ARGS,
    )


class CompilingBuild(build_ext):
    """The usual command, with several C compilers at once, for all modules or none."""

    def finalize_options(self) -> None:
        """Run as many C compilers as there are processors."""
        super().finalize_options()
        if self.parallel is None:
            self.parallel = True
        self.cythonizing = Lock()

    def run(self) -> None:
        """Compile all modules; without a working C compiler, remove them all."""
        if not self.inplace:
            # What an earlier build left here must not get into this one.
            self.remove(Path(self.build_lib))
        try:
            super().run()
        except (BaseError, CCompilerError) as problem:
            self.warn(
                "nothing is compiled, and brokerd will be slower (on Debian: apt install gcc"
                f" python3-dev): {problem}"
            )
            self.remove(Path(self.build_lib))
            self.remove(Path())
            self.extensions = []

    def remove(self, root: Path) -> None:
        """Remove the compiled modules of this Python below a directory."""
        for each in self.extensions:
            (root / self.get_ext_filename(each.name)).unlink(missing_ok=True)

    def build_extension(self, ext: Extension) -> None:
        """Write the C source of a module into the directory for such files; compile it."""
        translated = copy.copy(ext)
        # Cython can't work in several threads. Meanwhile the others run C compilers.
        with self.cythonizing:
            (result,) = cythonize(
                ext,
                build_dir=self.build_temp,
                compiler_directives=AS_THEY_ARE if ext.sources[0].endswith(".py") else {},
                force=self.force,
                quiet=not self.verbose,
            )
        translated.sources = result.sources
        super().build_extension(translated)


class BundlingBuild(build_py):
    """The usual command, and then the moved package and the .pth file.

    An editable installation needs neither: it maps both packages to the checkout.
    """

    def run(self) -> None:
        """Build the packages."""
        super().run()
        if self.editable_mode:
            return
        bundled = Path(self.build_lib, BUNDLED)
        shutil.rmtree(bundled, ignore_errors=True)
        bundled.mkdir(parents=True)
        Path(self.build_lib, "brokerd_client").rename(bundled / "brokerd_client")
        # A relative path is relative to the directory of the .pth file.
        Path(self.build_lib, "brokerd.pth").write_text(BUNDLED + "\n", encoding="ascii")


setup(
    cmdclass={"build_ext": CompilingBuild, "build_py": BundlingBuild},
    ext_modules=[extension(name) for name in COMPILED],
)
