import os
import sys
from pathlib import Path

import torch

# The models of the tests are so small that a second thread would only wait for the first.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
# Without a GPU the Triton kernels run under Triton's interpreter, which must be known before Triton is
# imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent))  # tests find runs.py beside them
