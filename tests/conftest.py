"""What every test shares: a machine that other processes use too."""

import os

# Before torch is imported, here and in the children of a test: see flows/home.py.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
