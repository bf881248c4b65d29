"""The published SAM checkpoints by name: where they lie, whether they are whole, how to get one.

"vit_b", "vit_l" and "vit_h" stand for the three files of the original Segment Anything release.
They are looked for in one folder, $XMASK_SAM_FOLDER or else ~/.cache/xmask/sam, and never used
with another checksum than the published file's. Nothing is downloaded unless asked for.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from xmask import files

VARIABLE = "XMASK_SAM_FOLDER"
RELEASE = "https://dl.fbaipublicfiles.com/segment_anything/"


@dataclass(frozen=True)
class Published:
    """One file of the release: its name, SHA-256 and size in bytes."""

    file: str
    sha256: str
    size: int

    @property
    def url(self) -> str:
        return RELEASE + self.file


# The makers publish no SHA-256: the six digits in a file's name begin its MD5. These are the
# values that others who pin the release's files record (micro-sam's model registry, for one).
PUBLISHED = {
    "vit_b": Published("sam_vit_b_01ec64.pth", "ec2df62732614e57411cdcf32a23ffdf"
                       "28910380d03139ee0f4fcbe91eb8c912", 375_042_383),
    "vit_l": Published("sam_vit_l_0b3195.pth", "3adcc4315b642a4d2101128f611684e8"
                       "734c41232a17c648ed1693702a49a622", 1_249_524_607),
    "vit_h": Published("sam_vit_h_4b8939.pth", "a7bf3b02f3ebf1267aba913ff637d9a2"
                       "d5c33d3173bb679e46d9f338c26f262e", 2_564_550_879),
}


def folder() -> Path:
    """Where checkpoints are looked for and downloaded to."""
    return Path(os.environ.get(VARIABLE) or Path.home() / ".cache" / "xmask" / "sam")


def locate(spec: str | Path) -> tuple[Path, str]:
    """The file that a name or a path means, and its SHA-256.

    spec: "vit_b", "vit_l" or "vit_h", or the path of any checkpoint. A file that carries the name
    of a published one has to be that one.
    Raises FileNotFoundError, or ValueError for a file with another checksum.
    """
    published = PUBLISHED.get(str(spec))
    path = folder() / published.file if published else Path(spec)
    if not path.is_file():
        if published is None:
            raise FileNotFoundError(
                f"{path}: no such SAM checkpoint; give the path of one, a published name "
                f"({', '.join(PUBLISHED)}), or use the segmenter 'bundled' or 'classical'")
        raise FileNotFoundError(
            f"{spec}: {published.file} ({published.size / 1e6:.0f} MB) is not in {path.parent}; "
            f"`xmask sam-weights {spec}` downloads it from {published.url}. Without internet, copy "
            f"it there, or set {VARIABLE} to the folder that holds it")
    found = files.sha256(path)
    for name, one in PUBLISHED.items():
        if path.name == one.file and found != one.sha256:
            raise ValueError(
                f"{path}: {path.stat().st_size} bytes with sha256 {found[:12]}..., but the "
                f"published {one.file} has {one.size} bytes and sha256 {one.sha256[:12]}...: it is "
                f"truncated or another file. Delete it and run `xmask sam-weights {name}`, or "
                "rename it if it is meant to be another one")
    return path, found


def download(name: str, *, progress: bool = True) -> Path:
    """The published checkpoint `name` in `folder()`, downloaded unless it is there and whole.

    A download comes under its name only once its checksum is right; a stopped one leaves nothing.
    Raises ValueError for a name that is not published or a download with another checksum, OSError
    naming file, folder and remedy where there is no way to the release.
    """
    import torch

    if name not in PUBLISHED:
        raise ValueError(f"{name}: no published SAM; known: {', '.join(PUBLISHED)}")
    published = PUBLISHED[name]
    path = folder() / published.file
    if path.is_file():
        return locate(name)[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(
            published.url, str(path), hash_prefix=published.sha256, progress=progress)
    except RuntimeError as error:  # torch's word for a wrong checksum
        raise ValueError(f"{published.url}: {error}. The transfer was cut or changed on its way: "
                         "try again, or get the file another way and copy it into "
                         f"{path.parent}") from None
    except (OSError, HTTPException) as error:
        raise OSError(
            f"{published.url}: cannot be downloaded ({getattr(error, 'reason', error)}). Copy "
            f"{published.file} ({published.size / 1e6:.0f} MB) from a machine with internet into "
            f"{path.parent}, or set {VARIABLE} to the folder that holds it") from None
    return path
