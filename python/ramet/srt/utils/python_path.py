"""Owns where the Python of a child process finds modules: this package, and what the user's PYTHONPATH names."""

import os

import ramet


def child_python_path() -> str:
    """The child's PYTHONPATH."""
    package_root = os.path.dirname(os.path.dirname(os.path.abspath(ramet.__file__)))
    return os.pathsep.join(filter(None, (package_root, os.environ.get("PYTHONPATH"))))
