"""What this machine can compute on, and in which number types."""

import os
import platform
from pathlib import Path

import torch
from torch import Tensor

from idlefx.errors import InputError, first_line


def present(device: str | torch.device) -> torch.device:
    """The device, if this machine has it.

    Raises:
        InputError: There is no such device.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        raise InputError(f"device: cannot use {device}: {first_line(error)}") from error
    return torch.device(device)


def check_dtype(device: torch.device, dtype: torch.dtype) -> None:
    """Whether a device computes in a number type; slow imitation in software does not count.

    Raises:
        InputError: It does not.
    """
    reason = ""
    try:
        x = torch.ones(1, 1, 8, 8, device=device, dtype=dtype)
        torch.nn.functional.scaled_dot_product_attention(x, x, torch.nn.functional.layer_norm(x @ x, (8,)))
    except RuntimeError as error:
        reason = first_line(error)
    if device.type == "cuda" and dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(False):
        reason = "it would be imitated in software"
    if reason:
        raise InputError(f"dtype: {device} cannot compute in {_name(dtype)}: {reason}; take float32")


def machine_in_words(weight: Tensor) -> str:
    """Device, number type, threads and versions, in words."""
    if weight.device.type == "cuda":
        name = torch.cuda.get_device_name(weight.device)
    else:
        capability = torch.backends.cpu.get_cpu_capability()
        name = f"{os.cpu_count()}-core {_processor()} ({capability}), {torch.get_num_threads()} threads"
    return f"{name}, {_name(weight.dtype)}, torch {torch.__version__}, {platform.system()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
