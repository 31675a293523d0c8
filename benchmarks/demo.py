"""`make demo`: the paper's point in minutes, on toy data, on a CPU.

Step 0 of 15-5 overlapped once, then step 1 with plain fine-tuning and with MiB from the same
checkpoint. All but size, epochs, batch and learning rate are the program's defaults. Everything
lands in `demo/`, which may be deleted; a second start goes on where the first stopped.
"""

from __future__ import annotations

import subprocess
import sys

from benchmarks import compare
from benchmarks.compare import ROOT

OUT = ROOT / "demo"
DATA = OUT / "toy"
RUN = [
    "--task", "15-5", "--overlap", "--methods", "FT", "MIB",
    "--epochs", "14", "10", "--lr", "0.05", "0.01",
    "--backbone", "resnet18", "--no-pretrained", "--crop_size", "96", "--batch_size", "8",
    "--val_interval", "7", "--sample_num", "4",
]  # fmt: skip


def main() -> int:
    if not (DATA / "PascalVOC12").exists():
        script = ROOT / "data" / "make_toy.py"
        subprocess.run([sys.executable, str(script), "--out", str(DATA)], check=True)
    compare.main(["--data_root", str(DATA), "--out", str(OUT), *RUN])
    curves = OUT / "logs" / "voc-15-5-ov"
    print(f"\npanels (image | truth | prediction): {curves / '<method>' / 'step-1' / 'images'}")
    print(f"curves: .venv/bin/tensorboard --logdir {curves}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
