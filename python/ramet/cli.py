"""Owns the console script `ramet`, which is also `python -m ramet`: its subcommands."""

import sys
from collections.abc import Sequence

COMMANDS = ("serve", "standby", "park", "modelexpress-server", "fleet", "digest", "tune", "version")
USAGE = """usage: ramet <command> …

commands:
  serve MODEL [flags]              start one serving instance (python -m ramet.launch_server MODEL [flags])
  standby [flags]                  start an instance without a model, which becomes one on request (POST /become)
  park MODEL [flags]               hold a model's port; the first request has a standby become the model
  modelexpress-server [flags]      start a metadata server (python -m ramet.modelexpress_server [flags])
  fleet set-version MODEL VERSION  have all instances of a model serve a version (also: scale, clear-version, status)
  digest MODEL                     print the digest of a model's weights, for --weights-digest
  tune MODEL                       measure which kernels are the fastest for a model on this GPU, and keep that
  version, --version               print the version

ramet serve --help, and likewise those of standby, modelexpress-server, fleet, digest and tune, list the flags.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand that the arguments name; the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments.pop(0) if arguments else ""
    if command == "serve":
        from ramet.launch_server import main as launch_main

        return launch_main(arguments, prog="ramet serve")
    if command == "standby":
        from ramet.srt.utils.early_signals import exit_on_signals

        exit_on_signals()
        from ramet.srt.entrypoints.standby.launch_standby import main as standby_main

        return standby_main(arguments)
    if command == "park":
        from ramet.srt.entrypoints.standby.park_command import main as park_main

        return park_main(arguments)
    if command == "modelexpress-server":
        from ramet.modelexpress_server import main as modelexpress_main

        return modelexpress_main(arguments, prog="ramet modelexpress-server")
    if command == "fleet":
        from ramet.srt.modelexpress.client.fleet_command import run_fleet_command

        return run_fleet_command(arguments, prog="ramet fleet")
    if command == "digest":
        from ramet.srt.model_loader.digest_command import print_digest

        return print_digest(arguments, prog="ramet digest")
    if command == "tune":
        from ramet.srt.model_executor.tune_command import run_tune_command

        return run_tune_command(arguments, prog="ramet tune")
    if command in ("version", "--version", "-V"):
        import ramet

        sys.stdout.write(f"{ramet.__version__}\n")
        return 0
    if command in ("-h", "--help", "help"):
        sys.stdout.write(USAGE)
        return 0
    sys.stderr.write(f"ramet: error: {_unknown(command) if command else 'a command is needed'}\n")
    sys.stderr.write(USAGE)
    return 1


def _unknown(command: str) -> str:
    from ramet.srt.cli_parser import did_you_mean

    return f"unknown command {command!r}{did_you_mean(command, COMMANDS)}"


if __name__ == "__main__":
    sys.exit(main())
