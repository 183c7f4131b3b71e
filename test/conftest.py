"""Owns what holds for all tests: one thread for each process that computes, on machines that have few cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
