"""nanomem: memory layers (Berges et al. 2024), small enough to read in an afternoon."""

import importlib.util
import sys
import threading
import types
from pathlib import Path


class _WhenUsed(types.ModuleType):
    """A module that runs once one of its functions is asked for.

    importlib's LazyLoader runs a module for any attribute, and torch.library asks all modules for their
    __file__.
    """

    lock = threading.RLock()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        with _WhenUsed.lock:
            if type(self) is _WhenUsed:
                self.__spec__.loader.exec_module(self)
                self.__class__ = types.ModuleType
        return getattr(self, name)


# kernels.py lies at the top level, for readers, and is imported as nanomem.kernels: PyPI has a `kernels` of
# its own, which other programs look for. It needs Triton, which only Linux has and only GPUs want.
_folder = Path(__file__).resolve().parent
_path = next(
    path for path in (_folder / "kernels.py", _folder.parent / "kernels.py") if path.exists()
)  # installed, or a clone
kernels = importlib.util.module_from_spec(importlib.util.spec_from_file_location("nanomem.kernels", _path))
kernels.__class__ = _WhenUsed
sys.modules["nanomem.kernels"] = kernels
