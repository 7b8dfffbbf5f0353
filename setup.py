"""Adds kernels.py, the facts and the recipes, which lie at the top level, to the installed package."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithTopLevel(build_py):
    """Copies kernels.py beside the package's own modules, and facts and recipes into nanomem/shipped."""

    def find_package_modules(self, package, package_dir):
        return super().find_package_modules(package, package_dir) + [(package, "kernels", "kernels.py")]

    def run(self):
        super().run()
        if self.editable_mode:  # an editable install reads those of the clone
            return
        for folder in ("data/people", "data/world", "configs"):
            target = Path(self.build_lib, "nanomem", "shipped", Path(folder).name)
            ignored = shutil.ignore_patterns("*.py", "__pycache__")
            shutil.copytree(folder, target, dirs_exist_ok=True, ignore=ignored)


setup(cmdclass={"build_py": BuildWithTopLevel})
