"""Downloads CIFAR-10 (official python batches) and the trained CIFAR ResNets into the data folder; needs internet.

    python scripts/download_cifar10.py [DEST]      DEST: $RANKSEARCH_DATA, or ~/.cache/ranksearch

Files that are there and right are kept. Weights: akamaster/pytorch_resnet_cifar10 (BSD 2-clause, Yerlan Idelbayev).
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import tarfile
import tempfile
import urllib.request
from pathlib import Path

from ranksearch.data.folder import data_folder
from ranksearch.tasks.cifar10 import FOLDER, TEST_FILES, TRAIN_FILES
from ranksearch.training.dense import PUBLIC_CHECKPOINTS

ARCHIVE = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"
WEIGHTS = "https://raw.githubusercontent.com/akamaster/pytorch_resnet_cifar10/d5489e8/pretrained_models"


def fetch(url: str, target: Path) -> None:
    """Writes the content of `url` to `target`, whole or not at all."""
    print(f"fetching {url}", file=sys.stderr)
    partial = target.with_name(target.name + ".partial")
    with urllib.request.urlopen(url, timeout=60) as source, partial.open("wb") as sink:
        shutil.copyfileobj(source, sink)
    partial.replace(target)


def fetch_batches(dest: Path) -> None:
    if all((dest / FOLDER / name).is_file() for name in TRAIN_FILES + TEST_FILES):
        return
    with tempfile.TemporaryDirectory() as temporary:
        archive = Path(temporary) / "cifar-10-python.tar.gz"
        fetch(ARCHIVE, archive)
        if hashlib.md5(archive.read_bytes()).hexdigest() != ARCHIVE_MD5:
            raise SystemExit(f"{ARCHIVE} has another md5 than the published one: nothing was unpacked")
        with tarfile.open(archive) as tar:
            tar.extractall(dest, filter="data")


def fetch_weights(dest: Path) -> None:
    """The file names end in the first eight digits of their SHA-256."""
    folder = dest / "weights"
    folder.mkdir(parents=True, exist_ok=True)
    for name in PUBLIC_CHECKPOINTS.values():
        if not (folder / name).is_file():
            fetch(f"{WEIGHTS}/{name}", folder / name)
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        if not digest.startswith(name.split("-")[1].removesuffix(".th")):
            (folder / name).unlink()
            raise SystemExit(f"{name} has another SHA-256 than its name says: removed, try again")


def main() -> None:
    dest = data_folder(sys.argv[1] if len(sys.argv) > 1 else None)
    dest.mkdir(parents=True, exist_ok=True)
    fetch_batches(dest)
    fetch_weights(dest)
    print(f"CIFAR-10 and the trained nets are in {dest}", file=sys.stderr)


if __name__ == "__main__":
    main()
