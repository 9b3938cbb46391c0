"""What every test shares: a machine that other processes use too."""

import os

from tasks.core.waiting import waiting

# Before torch is imported, here and in the children of a test.
os.environ.update(waiting(os.environ))
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
