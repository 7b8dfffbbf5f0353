"""pyproject.toml says the rest; this puts the top level's kernels.py into an installed nanomem, as nanomem/kernels.py."""

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithKernels(build_py):
    """Copies kernels.py beside the package's own modules."""

    def find_package_modules(self, package, package_dir):
        return super().find_package_modules(package, package_dir) + [(package, "kernels", "kernels.py")]


setup(cmdclass={"build_py": BuildWithKernels})
