"""Tell whether a file of ImageNet weights is the one that the paper's results start from.

    python pretrained/check_md5.py [FILE]

FILE is resnet101_iabn_sync.pth.tar beside this script by default. The verdict is one line and the
exit status: 0 the right file, 1 another file, 2 no such file.
"""

import hashlib
import sys
from pathlib import Path

EXPECTED_MD5 = "1552ae0f3d610108df702135f56bd27b"  # "ResNet101v1, InPlace-ABN sync"
DEFAULT_FILE = Path(__file__).resolve().parent / "resnet101_iabn_sync.pth.tar"


def md5_of(path: Path) -> str:
    """The MD5 sum of a file, in hexadecimal. Raises OSError."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def main(arguments: list[str]) -> int:
    """Print the verdict on the named or the default file, and return the exit status."""
    path = Path(arguments[0]) if arguments else DEFAULT_FILE
    try:
        found = md5_of(path)
    except OSError as error:
        print(f"missing: {path} cannot be read ({error.strerror}); see pretrained/README.md")
        return 2
    if found != EXPECTED_MD5:
        print(
            f"wrong file: {path} has md5 {found}, but {EXPECTED_MD5} is the ResNet-101 with "
            "In-Place ABN sync; see pretrained/README.md"
        )
        return 1
    print(f"matches: {path} is the ResNet-101 with In-Place ABN sync (md5 {found})")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
