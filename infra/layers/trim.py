"""What of the wheels no request ever reads: left out of the layers, because Lambda counts and fetches every byte.

What stays: licences and notices, and each package's name and version for `importlib.metadata`.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Final

EVERYWHERE: Final = (
    "bin/*", ".lock", "*.pyi", "*.pyx", "*.pxd", "*.pyc", "*.a", "*.h", "*/tests/*", "*/conftest.py",
    "*.dist-info/RECORD", "*.dist-info/INSTALLER", "*.dist-info/REQUESTED", "*.dist-info/entry_points.txt",
)  # fmt: skip
ONNXRUNTIME: Final = (
    "onnxruntime/capi/libonnxruntime.so.*",  # for C programs: the Python binding holds a copy of its own and links none
    "onnxruntime/transformers/*", "onnxruntime/tools/*", "onnxruntime/quantization/*", "onnxruntime/datasets/*",
    "onnxruntime/backend/*",
)  # fmt: skip
NUMPY: Final = (
    "numpy/f2py/*", "numpy/testing/*", "numpy/_pyinstaller/*", "numpy/_core/include/*", "numpy/_core/lib/*",
    "numpy/_core/_simd.*", "numpy/_core/_*_tests.*", "numpy/random/lib/*",  # extensions that only numpy's tests import
)  # fmt: skip
POWERTOOLS: Final = ("aws_lambda_powertools/*/swagger_ui/*.min.*",)  # the page of an API's documentation


def kept(name: str) -> bool:
    """Whether a file stays; `name` is relative to site-packages, with "/" between its parts."""
    path = PurePosixPath(name).as_posix()
    return not any(fnmatchcase(path, pattern) for pattern in (*EVERYWHERE, *ONNXRUNTIME, *NUMPY, *POWERTOOLS))
