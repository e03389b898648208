"""The build step of the distribution brokerd that pyproject.toml can't describe.

The distribution brokerd-client (client/pyproject.toml) installs the package
brokerd_client. The distribution brokerd has to work without it, and must not own the
same files: pip would remove them with either distribution. So the wheel of brokerd
contains its copy of brokerd_client in brokerd/_bundled, and a .pth file that appends
this directory to the module search path. An installed brokerd-client comes first there.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

BUNDLED = "brokerd/_bundled"


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


setup(cmdclass={"build_py": BundlingBuild})
