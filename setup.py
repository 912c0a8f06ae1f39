# SPDX-License-Identifier: Apache-2.0
"""Copy `configs/` into the wheel; everything else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Also copy `configs/` to `msa_online/configs`; an editable installation reads the folder itself."""

    def run(self) -> None:
        """Build the packages."""
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "msa_online", "configs")
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree("configs", target)


setup(cmdclass={"build_py": BuildWithConfigs})
