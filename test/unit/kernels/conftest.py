"""Owns running the kernels' tests without a GPU: Triton's interpreter computes them on the CPU."""

import inspect
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read by triton when a kernel is defined, so before anything imports one

LANGUAGE = {"triton.language", "triton.language.core"}


@pytest.fixture(scope="session")
def device():
    """Where the kernels run: a GPU if there is one."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if torch.cuda.is_available():
        return torch.device("cuda")
    mend_interpreter()
    return torch.device("cpu")


def mend_interpreter():
    """Let range() take a kernel's scalars: the interpreter keeps them in arrays of one element, numpy 2.4 minds.

    And let what it puts in place of Triton's language stay there. It looks for hundreds of names at each launch, and
    at each call of one of a kernel's functions, which is a third of the time that these tests take.
    """
    from triton.runtime import interpreter

    patch_tensor, patch_language = interpreter._patch_lang_tensor, interpreter._patch_lang
    patched: set[str] = set()

    def patch(tensor, scope):
        patch_tensor(tensor, scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    def patch_once(fn):
        modules = {value.__name__ for value in fn.__globals__.values() if inspect.ismodule(value)}
        if modules & LANGUAGE <= patched:
            return interpreter._LangPatchScope()
        patched.update(modules & LANGUAGE)
        patch_language(fn)  # whose scope would take it back
        return interpreter._LangPatchScope()

    interpreter._patch_lang_tensor, interpreter._patch_lang = patch, patch_once
