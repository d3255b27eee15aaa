"""Peak FLOPs per second of GPUs by name: of dense matrix products, as their data sheets state them."""

from __future__ import annotations

from typing import NamedTuple

from reformer_dist.config import Precision


class Peak(NamedTuple):
    half: float
    """In bf16 and fp16, summed in float32."""
    single: float
    """In float32, without TF32, which PyTorch does not use unless asked to."""


# The first name that is a part of the device's wins. A variant comes before the name that it contains.
PEAKS = {
    "GB200": Peak(2.5e15, 8e13),
    "B200": Peak(2.25e15, 8e13),
    "GH200": Peak(9.89e14, 6.7e13),
    "H200": Peak(9.89e14, 6.7e13),
    "H800": Peak(9.89e14, 6.7e13),
    "H100 NVL": Peak(8.35e14, 6e13),
    "H100 PCIe": Peak(7.56e14, 5.1e13),
    "H100": Peak(9.89e14, 6.7e13),
    "A100": Peak(3.12e14, 1.95e13),
    "A40": Peak(1.497e14, 3.74e13),
    "A30": Peak(1.65e14, 1.03e13),
    "A10G": Peak(7e13, 3.12e13),
    "L40S": Peak(3.62e14, 9.16e13),
    "L4": Peak(1.21e14, 3.03e13),
    "RTX A6000": Peak(1.548e14, 3.87e13),
    "RTX 4090": Peak(1.652e14, 8.26e13),
    "RTX 3090": Peak(7.1e13, 3.56e13),
    "V100": Peak(1.25e14, 1.57e13),
    "T4": Peak(6.5e13, 8.1e12),
    "MI300X": Peak(1.307e15, 1.634e14),
    "MI250X": Peak(1.915e14, 2.39e13),  # of one of its two dies, which are devices of their own
}


def peak_flops(device_name: str, precision: Precision) -> float | None:
    """FLOPs per second that the device could do in this precision; None if it is not in the table."""
    found = next((peak for name, peak in PEAKS.items() if _names(device_name, name)), None)
    if found is None:
        return None
    return found.single if precision is Precision.fp32 else found.half


def _names(device_name: str, name: str) -> bool:
    """Whether the words of `name` are words of the device's name: "L4" is no "L40S"."""
    return f" {name.lower()} " in f" {device_name.lower().replace('-', ' ')} "
