"""A layer's folder as a zip that is the same twice, and what it weighs."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import Final

import msgspec

_WHEN: Final = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip can say
_UNIX: Final = 3


class Weight(msgspec.Struct, frozen=True):
    """Sizes in bytes; `heaviest`: the largest files by name; `sha256`: of the zip."""

    files: int
    unzipped: int
    zipped: int
    sha256: str
    heaviest: dict[str, int]


def archive(folder: Path, target: Path) -> Weight:
    """Writes the zip; the same files give the same bytes, whoever owns them and whenever they were written."""
    sizes: dict[str, int] = {}
    temporary = target.with_suffix(".tmp")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as zipped:
        for name in sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()):
            content = (folder / name).read_bytes()
            entry = zipfile.ZipInfo(name, _WHEN)
            entry.create_system = _UNIX
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (0o100755 if content[:4] == b"\x7fELF" else 0o100644) << 16
            zipped.writestr(entry, content)
            sizes[name] = len(content)
    temporary.replace(target)
    with target.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    heaviest = dict(sorted(sizes.items(), key=lambda item: (-item[1], item[0]))[:5])
    return Weight(len(sizes), sum(sizes.values()), target.stat().st_size, digest, heaviest)
