"""nanomem: memory layers (Berges et al. 2024), small enough to read in an afternoon."""

import importlib.util
import sys
from pathlib import Path

# kernels.py lies at the top level, for readers, and is imported as nanomem.kernels: PyPI has a `kernels` of its own, which
# other programs look for. It is run when first used, for it needs Triton, which only Linux has and only GPUs want.
_folder = Path(__file__).resolve().parent
_path = next(path for path in (_folder / "kernels.py", _folder.parent / "kernels.py") if path.exists())  # installed, or a clone
_spec = importlib.util.spec_from_file_location("nanomem.kernels", _path)
_spec.loader = importlib.util.LazyLoader(_spec.loader)
kernels = sys.modules["nanomem.kernels"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kernels)
