import os
import sys
from pathlib import Path

# The models of the tests are so small that a second thread would only wait for the first.
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent))  # tests find runs.py beside them
