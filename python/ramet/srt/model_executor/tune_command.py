"""Owns the command that measures kernels for a model, from its flags to its exit code."""

import argparse
import contextlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ramet.srt.cli_parser import CliParser
from ramet.srt.configs.device_config import pick_device
from ramet.srt.configs.model_config import ModelConfig
from ramet.srt.configs.parallel_config import ParallelConfig, check_parallel_sizes
from ramet.srt.flags.log_flags import LOG_LEVELS
from ramet.srt.layers.cpu_kernels import library
from ramet.srt.layers.cpu_matmul import lacks_instructions
from ramet.srt.layers.kernels.runtime import has_triton
from ramet.srt.layers.quantization.declare import declare_quantised
from ramet.srt.layers.tuned_file import file_name, stamp_of, user_folder, write_measured
from ramet.srt.model_executor.layer_trials import layer_trials
from ramet.srt.model_executor.prompt_trial import tune_latent_rows, tune_prompts
from ramet.srt.model_executor.tuner import Tuner
from ramet.srt.models.decoder import DecoderForCausalLM
from ramet.srt.observability.logs import configure_logging
from ramet.srt.utils.hub import resolve_model_path

DESCRIPTION = (
    "Measure which kernels and tiles are the fastest for a model's layers on this machine's GPU, and keep that in a "
    "file: instances take it from the user's cache ($RAMET_TUNING_DIR), or from --tuning-dir. Weights are made up; "
    "only the model's config is read. Nothing else may use the GPU meanwhile."
)


def run_tune_command(argv: Sequence[str], prog: str) -> int:
    """Measure, and write the file.

    Returns:
        0; or 1, and one line on stderr, if the model can't be measured here or the file can't be written.
    """
    values = _make_parser(prog).parse_args(argv)
    configure_logging(values.log_level, "tune")
    try:
        sys.stdout.write(_tune(values))
    except (ValueError, OSError, RuntimeError) as error:
        sys.stderr.write(f"{prog}: error: {' '.join(str(error).split())}\n")
        return 1
    return 0


def _make_parser(prog: str) -> CliParser:
    parser = CliParser(prog=prog, description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("model", help="Folder or Hugging Face hub id of the model.")
    parser.add_argument("--revision", help="Branch, tag or commit of a model from the hub.")
    parser.add_argument("--dtype", default="auto", help="As for ramet serve.")
    parser.add_argument("--quantization", choices=("fp8",), help="As for ramet serve.")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="Where to measure.")
    parser.add_argument("--tp-size", type=int, default=1, help="Ranks over which each layer is split.")
    parser.add_argument("--ep-size", type=int, default=1, help="Groups of them over which the experts are split.")
    parser.add_argument("--output", type=Path, help="Folder for the file; the user's cache when not given.")
    parser.add_argument("--log-level", choices=LOG_LEVELS, default="info", help="Least severe level that is shown.")
    return parser


@torch.inference_mode()
def _tune(values: argparse.Namespace) -> str:
    """What to say of it. Raises ValueError, OSError or RuntimeError."""
    started = time.monotonic()
    device = pick_device(values.device, 0)
    folder = resolve_model_path(values.model, values.revision, weights=False)
    config = ModelConfig.from_path(folder, dtype=values.dtype, quantization=values.quantization)
    check_parallel_sizes(config, tp_size=values.tp_size, pp_size=1, ep_size=values.ep_size)
    dtype = getattr(torch, config.dtype)
    if device.type == "cpu" and not lacks_instructions(dtype):
        return f"nothing to measure: on this processor {config.dtype} is multiplied one way alone\n"
    if device.type == "cpu" and library.is_expected():
        return "nothing to measure: the kernels for CPUs have no choices (RAMET_CPU_KERNELS=0 measures PyTorch's own)\n"
    if device.type == "cuda" and not has_triton():
        raise ValueError("the kernels that are measured need the package triton")
    parallel = ParallelConfig.of_rank(0, tp_size=values.tp_size, ep_size=values.ep_size)
    model = DecoderForCausalLM(config, dtype, parallel)
    if config.quantization_config is not None:
        declare_quantised(model, config.quantization_config, device)
    tuner = Tuner(device)
    with contextlib.closing(tuner):
        for trial in layer_trials(model, dtype, device):
            tuner.tune(trial)
            del trial  # its memory is the next one's
        if device.type == "cuda":
            tune_prompts(tuner, model, config, dtype)
            if config.traits.latent is not None:
                tune_latent_rows(tuner, model, dtype)
    stamp = stamp_of(device)
    path = (values.output or user_folder()) / file_name(stamp)
    total = write_measured(path, stamp, tuner.entries, tuner.tuned)
    failed = f", {tuner.num_failed} values did not run" if tuner.num_failed else ""
    return (
        f"{len(tuner.tuned)} choices measured in {time.monotonic() - started:.0f} s, {len(tuner.entries)} other than "
        f"the default{failed}; {path} has {total}\n"
    )
