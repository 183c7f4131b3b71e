"""Owns running the kernels' tests without a GPU: Triton's interpreter computes them on the CPU."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read by triton when a kernel is defined, so before anything imports one


@pytest.fixture(scope="session")
def device():
    """Where the kernels run: a GPU if there is one."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if torch.cuda.is_available():
        return torch.device("cuda")
    mend_interpreter()
    return torch.device("cpu")


def mend_interpreter():
    """Let range() take a kernel's scalars: the interpreter keeps them in arrays of one element, numpy 2.4 minds."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        patch_tensor(tensor, scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch
