"""What an error says in one line, above all which limit it comes from."""

import errno
import resource

import pytest
from ramet.srt.errors import limit_advice, one_line


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "MemoryError (less is needed with a lower --max-total-tokens"),
        (RuntimeError("std::bad_alloc"), "--mem-fraction-static"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 8"), "--max-total"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "--max-running-requests"),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n allows a process"),
        (RuntimeError("Too many open files"), "ulimit -n allows a process"),
        (RuntimeError("can't start new thread"), "ulimit -u allows this user"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "ulimit -u"),
        (OSError(errno.ENOSPC, "No space left on device"), "TMPDIR"),
    ],
)
def test_the_limit_behind_an_error_is_named(error, words):
    line = one_line(error)
    assert words in line and "\n" not in line
    assert one_line(RuntimeError(line)).count("ulimit") == line.count("ulimit"), "said twice"


def test_the_address_space_is_named_where_it_is_limited(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (2 << 30, 2 << 30))
    assert "ulimit -v allows a process 2097152 kB" in one_line(MemoryError())


@pytest.mark.parametrize("error", [ValueError("no such model"), OSError(errno.ENOENT, "No such file"), KeyError("x")])
def test_other_errors_have_no_limit(error):
    assert limit_advice(error) is None and "ulimit" not in one_line(error)
