"""nanomem: memory layers (Berges et al. 2024), small enough to read in an afternoon."""

import importlib.util
import sys
from pathlib import Path

# kernels.py lies at the top level, for readers, and is imported as nanomem.kernels, since PyPI has a `kernels` of its own.
# It is run when first used, for it needs Triton, which only Linux has and only GPUs want.
_path = Path(__file__).resolve().parent.parent / "kernels.py"
_spec = importlib.util.spec_from_file_location("nanomem.kernels", _path)
_spec.loader = importlib.util.LazyLoader(_spec.loader)
kernels = sys.modules["nanomem.kernels"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kernels)
