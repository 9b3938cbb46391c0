"""The machine as training and measuring see it: device, dtype, threads, random states."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable
from typing import Literal

import numpy as np
import torch

Dtype = Literal["float32", "bfloat16"]
TORCH_DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def device() -> torch.device:
    """The accelerator if there is one, else the CPU. `PEFTFLOW_DEVICE` overrides."""
    wanted = os.environ.get("PEFTFLOW_DEVICE")
    if wanted:
        return torch.device(wanted)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def has_fast_bfloat16() -> bool:
    """Whether the hardware multiplies bfloat16 matrices at least as fast as float32."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def resolve_dtype(wanted: str) -> Dtype:
    """`auto` as this machine means it."""
    if wanted == "auto":
        return "bfloat16" if has_fast_bfloat16() else "float32"
    assert wanted in TORCH_DTYPES, wanted
    return wanted  # type: ignore[return-value]


def seed_everything(seed: int) -> None:
    """Every generator that a stage may draw from, and deterministic kernels."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())


def peak_reset() -> None:
    """Forget the peak so far (CUDA's allocator, or the kernel's VmHWM of this process)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass


def resident_mib() -> float:
    """Resident set of this process now, MiB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def peak_mib() -> float:
    """Peak since `peak_reset`: CUDA allocator where there is one, else resident set. MiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return peak_resident_mib()


def peak_resident_mib() -> float:
    """Peak resident set of this process since `peak_reset`, whatever the device. MiB."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    raise AssertionError("/proc/self/status has no VmHWM")


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages behind some tensors, each once: tied weights are one."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
