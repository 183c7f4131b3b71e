"""Owns the start of the metadata server from the command line: `python -m ramet.modelexpress_server [flags]`."""

import sys
from collections.abc import Sequence

from ramet.srt.utils.early_signals import exit_on_signals


def main(argv: Sequence[str] | None = None, prog: str = "ramet.modelexpress_server") -> int:
    """Serve until SIGTERM or SIGINT. Exit code 1, and one line, when the server cannot start."""
    exit_on_signals()
    from ramet.srt.modelexpress.server.command_line import serve_from_command_line  # the imports take a while

    return serve_from_command_line(sys.argv[1:] if argv is None else argv, prog)


if __name__ == "__main__":
    sys.exit(main())
