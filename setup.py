"""pyproject.toml says the rest; this puts what lies at the top level, for readers, into an installed nanomem too."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithTopLevel(build_py):
    """Copies kernels.py beside the package's own modules, and the facts that ship with nanomem into nanomem/shipped."""

    def find_package_modules(self, package, package_dir):
        return super().find_package_modules(package, package_dir) + [(package, "kernels", "kernels.py")]

    def run(self):
        super().run()
        if not self.editable_mode:  # an editable install reads the clone's own
            for name in ("people", "world"):
                target = Path(self.build_lib, "nanomem", "shipped", name)
                shutil.copytree(Path("data", name), target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.py", "__pycache__"))


setup(cmdclass={"build_py": BuildWithTopLevel})
