"""Owns what holds for all tests: one thread for each process that computes; no digests in the user's cache."""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")
if "RAMET_DIGEST_DIR" not in os.environ:
    os.environ["RAMET_DIGEST_DIR"] = tempfile.mkdtemp(prefix="ramet-digests-")
    atexit.register(shutil.rmtree, os.environ["RAMET_DIGEST_DIR"], ignore_errors=True)
