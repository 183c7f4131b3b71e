"""Owns the command that prints the digest of a model's weights, from its flags to its exit code."""

import sys
from collections.abc import Sequence

from ramet.srt.cli_parser import CliParser
from ramet.srt.flags.log_flags import LOG_LEVELS
from ramet.srt.model_loader.checkpoint.digest_store import compute_table, find_table
from ramet.srt.observability.logs import configure_logging
from ramet.srt.utils.hub import resolve_model_path


def print_digest(argv: Sequence[str], prog: str) -> int:
    """Print the digest of a model's weights, and keep it for instances that are started from the same files.

    Returns:
        0; or 1, and one line on stderr, if the files can't be read.
    """
    parser = CliParser(prog=prog, description="Print the digest of a model's weights.", allow_abbrev=False)
    parser.add_argument("model", help="Folder or Hugging Face hub id of the model.")
    parser.add_argument("--revision", help="Branch, tag or commit of a model from the hub.")
    parser.add_argument("--again", action="store_true", help="Read the files even if their digest is known.")
    parser.add_argument("--log-level", choices=LOG_LEVELS, default="warning", help="Least severe level that is shown.")
    values = parser.parse_args(argv)
    configure_logging(values.log_level, "digest")
    try:
        folder = resolve_model_path(values.model, values.revision)
        table = None if values.again else find_table(folder)
        digest = (table or compute_table(folder)).digest
    except ValueError as error:
        sys.stderr.write(f"{prog}: error: {error}\n")
        return 1
    sys.stdout.write(f"{digest}\n")
    return 0
