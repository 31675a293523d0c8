"""What this machine can do at most: the yardstick of docs/PERFORMANCE.md.

    python -m benchmarks.ceilings [--device cuda] [--json FILE]

Bytes per second of a large copy (read + written), exponentials per second, and arithmetic of a
large matrix product (on a GPU in half types, too), the best of several.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import torch

from benchmarks.harness import machine, parser, start


def fastest(call: Callable[[], object], calls: int, device: str) -> float:
    """Seconds of the fastest call, after one to warm up."""
    times = []
    for _ in range(calls + 1):
        start = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def ceilings(device: str, side: int, calls: int) -> dict[str, float]:
    """What -> units per second; matrices of side x side, vectors eight times as long."""
    long = torch.rand(8 * side * side, device=device)
    out = torch.empty_like(long)
    result = {
        "copy, GB/s": 2e-9 * 4 * long.numel() / fastest(lambda: out.copy_(long), calls, device),
        "exp, G/s": 1e-9 * long.numel() / fastest(lambda: torch.exp(long, out=out), calls, device),
    }
    halves = () if device == "cpu" else (torch.bfloat16, torch.float16)
    for dtype in (torch.float32, *halves):
        a, b = (torch.rand(side, side, device=device).to(dtype) for _ in range(2))
        seconds = fastest(lambda a=a, b=b: a @ b, calls, device)  # type: ignore[misc]
        result[f"product in {str(dtype)[6:]}, TFLOP/s"] = 2e-12 * side**3 / seconds
    return result


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--side", type=int, default=2048, help="of the matrices")
    args = p.parse_args()
    values = ceilings(args.device, args.side, args.repeats)
    for name, value in values.items():
        print(f"{name:32} {value:10.4g}")
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), "ceilings": values}, indent=1))


if __name__ == "__main__":
    start(main)
