"""Owns making the toy model importable for the tests beside it."""

import os
import sys

sys.path.insert(0, os.path.dirname(__file__))
