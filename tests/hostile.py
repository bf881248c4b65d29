"""Files as careless, unlucky or hostile hands make them, built here and stored nowhere."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from xmask.synthetic import draw_scene


def picture(kind: str = "PNG", size: tuple[int, int] = (64, 48), **options) -> bytes:
    """A whole image file of a format."""
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, format=kind, **options)
    return stream.getvalue()


def mutations(whole: bytes, number: int, seed: int = 0) -> list[bytes]:
    """Copies of a file with bytes changed, cut, doubled or inserted."""
    rng = random.Random(seed)
    found = []
    for _ in range(number):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 4, 40))):
            at = rng.randrange(len(data))
            kind = rng.randrange(4)
            if kind == 0:
                data[at] = rng.randrange(256)
            elif kind == 1:
                del data[at:at + rng.randrange(1, 30)]
            elif kind == 2:
                data[at:at] = rng.randbytes(rng.randrange(1, 30))
            else:
                data[at:at + 4] = struct.pack(">I", rng.choice((0, 0xffffffff, 0x7fffffff)))
            if not data:
                data = bytearray(b"\0")
        found.append(bytes(data))
    return found


def _png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG that says it is so large, whatever it holds."""
    def chunk(name: bytes, content: bytes) -> bytes:
        return (struct.pack(">I", len(content)) + name + content
                + struct.pack(">I", zlib.crc32(name + content)))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data))
            + chunk(b"IEND", b""))


def images(many: int = 60) -> dict[str, bytes]:
    """Name -> content of files that look like images; none is a sound one of a format we open."""
    jpeg, png = picture("JPEG", quality=90), picture("PNG")
    found = {
        "empty.jpg": b"", "zero.png": b"\0" * 500, "text.jpg": b"not an image",
        "page.png": b"<html><body>404</body></html>", "drawing.jpg": b"<svg xmlns=''></svg>",
        "script.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\nshowpage\n",
        "moving.jpg": picture("GIF"), "plain.jpg": picture("PPM"), "icon.png": picture("ICO"),
        "modern.jpg": picture("JPEG2000"),
        "cut.jpg": jpeg[:len(jpeg) // 2], "cut.png": png[:len(png) // 2], "head.png": png[:40],
        "cut.webp": picture("WEBP")[:200], "cut.tif": picture("TIFF")[:200],
        "cut.bmp": picture("BMP")[:200],
        "wide.png": _png(13000, 13000), "wider.png": _png(2**31 - 1, 2**31 - 1),
        "nothing.png": _png(0, 0), "hollow.png": _png(100, 100), "dot.png": _png(1, 1, b"\0\0"),
        "archive.jpg": gzip.compress(png, mtime=0), "sparse.tif": b"II*\0" + b"\xff" * 200,
    }
    for kind in ("JPEG", "PNG", "TIFF", "WEBP", "BMP"):
        suffix = {"JPEG": "jpg", "TIFF": "tif"}.get(kind, kind.lower())
        found |= {f"{kind.lower()}{k}.{suffix}": data
                  for k, data in enumerate(mutations(picture(kind), many))}
    return found


#: content -> part of the message; each is handed in as a table of dots.
TABLES: dict[bytes, str] = {
    b"": "the file is empty", b"\n\n": "the file is empty", b"a,b\n1,2\n": "the first line is",
    b"x|y\n1|2\n": "the first line is", b"1,2\n3,4\n": "the first line is",
    b"x,y\n1,2\n3,\n": "line 3 lacks x or y", b"x,y\n1\n": "line 2 lacks x or y",
    b"x,y\n1,two\n": "line 2 is", b"x,y\nnan,1\n": "line 2 is", b"x,y\n1,inf\n": "line 2 is",
    b"x,y\n1,1e999\n": "line 2 is", b"x,x,y\n1,2,3\n": "the first line is",
    b"x,y\n10,20,5\n": "more fields than the header", b"x,y\n1,2\n3,4,5\n": "more fields",
    "x,y,wer\n1,2,Jörg\n".encode("latin-1"): "no text in UTF-8",
    "x,y\n1,2\n".encode("utf-16"): "no text in UTF-8",
    gzip.compress(b"x,y\n1,2\n", mtime=0): "no text in UTF-8", b"PK\3\4\0\0": "no text in UTF-8",
    b"\xfd7zXZ\0\0\4": "no text in UTF-8", b"x,y\n1,\0\n": "no text in UTF-8",
    b"x,y\n" + b"1,2\n" * 100_000: "100000 heads",
    b'x,y\n"' + b"1" * 200_000 + b'",2\n': "field larger than field limit",
}


def mat(**fields) -> bytes:
    """A MATLAB file with these fields."""
    stream = io.BytesIO()
    savemat(stream, fields, do_compression=True)
    return stream.getvalue()


def annotations() -> dict[str, list[bytes]]:
    """Format -> contents that are none of its annotations."""
    good = mat(annPoints=np.ones((5, 2)))
    mats = [b"", b"MATLAB 5.0 MAT-file", b"\0" * 300, good[:150], mat(other=np.ones((3, 2))),
            mat(annPoints=np.ones((3, 3))), mat(annPoints=np.full((2, 2), np.nan)),
            mat(annPoints="text"), mat(annPoints=np.ones((70000, 2))),
            mat(annPoints=np.zeros((1500, 1500))), mat(annPoints={"a": 1}),
            mat(image_info=np.ones(3)), mat(image_info={"number": 1}),
            b"MATLAB 7.3 MAT-file" + b" " * 105 + b"\0\2IM" + b"\x89HDF\r\n", *mutations(good, 60)]
    texts = [b"1 2 3", b"a b c d e f", b"\xff\xfe", "1 2 3 4 5 ½".encode("latin-1"),
             b"nan 1 1 1 1 1", b"1 inf 1 1 1 1", b"1 2 3 4 5 6\n" * 70000,
             *mutations(b"1 2 3 4 0 0\n5 6 7 8 1 0\n", 40)]
    return {"mat": mats, "txt": texts}


#: JSON files that are none, or not of the form that anybody expects.
JSONS = [b"", b"[]", b"null", b"3", b'"text"', b"{", b"[" * 100_000, b"\xff\xfe{\0}\0",
         b'{"images": []}', b'{"images": {"train": "many"}}', b'{"images": null, "failed": 3}',
         json.dumps({"images": {"../../x": {}}, "failed": {}}).encode()]


def users_folder(root: Path) -> dict[Path, str]:
    """A folder as a person has it: photos, dots, and files with the names that our results have.
    Returns the checksum of each."""
    scene = draw_scene(seed=4, shape=(64, 80), people=6)
    dots = "x,y\n" + "".join(f"{x:.2f},{y:.2f}\n" for x, y in scene.points)
    (root / "masks").mkdir(parents=True)
    (root / "other").mkdir()
    (root / "empty").mkdir()
    for name in ("a.jpg", "b.png", "other/a.jpg", "a.row.jpg", "._a.jpg", "c.png"):
        Image.fromarray(scene.image).save(root / name)
    for name in ("a.csv", "V.CSV", "other/a.csv"):
        (root / name).write_text(dots)
    (root / "V.jpg").write_bytes((root / "a.jpg").read_bytes())
    (root / "d.jpg").mkdir()
    for name in ("coco.json", "counts.csv", "model.json", "a.points.csv", "a.masks.png",
                 "config.json", "history.csv", "model.safetensors", "checkpoint.pt", "notes.txt",
                 "manifest.json", "times.csv", "worst.png", "masks/a.png", "masks/a.csv",
                 "f.txt", "x.safetensors", "d.jpg/inside.txt", "other/coco.json"):
        (root / name).write_text(f"the user's {name}")
    (root / "other" / "coco.json").write_text('{"images": [], "annotations": []}')
    return checksums(root)


def checksums(root: Path) -> dict[Path, str]:
    """Checksum of every file in a folder and below, hidden ones too."""
    return {path.relative_to(root): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(root.rglob("*")) if path.is_file()}
