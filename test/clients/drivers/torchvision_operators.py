"""Owns that torchvision can be imported beside torch for CPUs: its wheel has its operators for CUDA's torch alone.

Libraries import it, and use none of them for a text model. Import this first.
"""

import torch

_library = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _library.define(_name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
