"""Owns the description of a whole model by its config: it is built without memory, as one rank would hold it."""

import dataclasses

import torch

from ramet.srt.configs.model_config import ModelConfig
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.layers.quantization.declare import declare_quantised
from ramet.srt.model_loader.checkpoint.whole_model import WholeModel, boxes_of, collect_boxes, is_whole
from ramet.srt.models.decoder import DecoderForCausalLM
from ramet.srt.weights.manifest import WeightManifest, dtype_name


def describe_whole_model(config: ModelConfig, manifest: WeightManifest) -> WholeModel:
    """What all ranks of a model need of its checkpoint.

    Args:
        manifest: of one rank; if that is all there is, nothing is built.
    """
    whole = _collect(config, manifest)
    return dataclasses.replace(whole, has_head=config.embedding is None, surplus=config.surplus_tensors,
                               has_fp8_cache=config.has_fp8_cache)  # fmt: skip


def _collect(config: ModelConfig, manifest: WeightManifest) -> WholeModel:
    quantization = config.quantization_config
    if is_whole(manifest):
        return collect_boxes(boxes_of(manifest.entries), quantization)
    model = DecoderForCausalLM(config, getattr(torch, config.dtype), ParallelConfig())
    if quantization is not None:
        declare_quantised(model, quantization)
    parameters = [(name, parameter, dtype_name(parameter.dtype)) for name, parameter in model.named_parameters()]
    boxes = [(name, dtype, box) for name, parameter, dtype in parameters for box in vars(parameter)["boxes"]]
    return collect_boxes(boxes, quantization)
