"""Settings for every test: small thread count, a derandomised hypothesis profile, no leftovers."""

import os

import torch
from hypothesis import settings

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=30, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
torch.set_num_threads(int(os.environ.get("TEST_THREADS", 2)))
