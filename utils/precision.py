"""Automatic mixed precision."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Precision:
    """An autocast context and a loss scaler that may do nothing.

    `dtype` None switches both off. Only float16 needs the scaler.
    """

    device: torch.device
    dtype: torch.dtype | None = None
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self) -> None:
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)

    @classmethod
    def of(cls, amp: str, device: torch.device) -> Precision:
        """What `--amp` (auto, bf16, fp16 or off) means on a device."""
        if amp == "auto":
            if device.type != "cuda":
                return cls(device)
            bf16 = torch.cuda.is_bf16_supported(False)
            return cls(device, torch.bfloat16 if bf16 else torch.float16)
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}
        return cls(device, dtypes[amp])

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Half types become float32; float32 and float64 stay as they are."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
