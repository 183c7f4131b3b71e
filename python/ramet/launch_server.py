"""Owns the start of a server from the command line: `python -m ramet.launch_server --model-path … [flags]`."""

import sys
from collections.abc import Sequence

from ramet.srt.utils.early_signals import exit_on_signals


def main(argv: Sequence[str] | None = None, prog: str = "ramet.launch_server") -> int:
    """Serve as the flags say; the exit code."""
    exit_on_signals()
    arguments = sys.argv[1:] if argv is None else argv
    if "--from-standby" in arguments:
        from ramet.srt.entrypoints.standby.from_standby import serve_from_standby

        return serve_from_standby(arguments, prog)
    from ramet.srt.entrypoints.launch import serve_from_command_line  # the imports take a while

    return serve_from_command_line(arguments, prog)


if __name__ == "__main__":
    sys.exit(main())
