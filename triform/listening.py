"""What listens on this machine beyond loopback, and whose it is: from Linux's /proc, without any privilege.

/proc/net/tcp, tcp6 -> addresses and inodes -> /proc/<pid>/fd -> the process, where it is ours to see
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

_LISTEN: Final = "0A"  # include/net/tcp_states.h: TCP_LISTEN


class Process(NamedTuple):
    """`command`: its arguments, joined; "" where another user's process may not be looked at."""

    pid: int = 0
    command: str = ""
    environ: frozenset[str] = frozenset()  # NAME=value, as it was started


class Listener(NamedTuple):
    address: str
    port: int
    process: Process

    @property
    def loopback(self) -> bool:
        return self.address.startswith("127.") or self.address in ("::1", "::ffff:127.0.0.1")

    @property
    def where(self) -> str:
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"


def listeners(proc: Path = Path("/proc")) -> list[Listener]:
    """Every listening TCP socket of this network namespace, by port. Raises `OSError` where there is no such /proc."""
    sockets = [*_sockets((proc / "net/tcp").read_text()), *_sockets(_or_empty(proc / "net/tcp6"))]
    owners = _owners(proc, {inode for _, _, inode in sockets})
    return sorted(
        (Listener(address, port, owners.get(inode, Process())) for address, port, inode in sockets), key=lambda s: s.port
    )


def _or_empty(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # a kernel without IPv6
        return ""


def _sockets(table: str) -> Iterator[tuple[str, int, str]]:
    """Address, port and inode of each; Documentation/networking/proc_net_tcp.rst."""
    for line in table.splitlines()[1:]:
        fields = line.split()
        if len(fields) > 9 and fields[3] == _LISTEN:
            address, _, port = fields[1].partition(":")
            yield _address(address), int(port, 16), fields[9]


def _address(text: str) -> str:
    """Four bytes at a time, each in the machine's order."""
    words = [bytes.fromhex(text[start : start + 8])[::-1] for start in range(0, len(text), 8)]
    return socket.inet_ntop(socket.AF_INET if len(words) == 1 else socket.AF_INET6, b"".join(words))


def _owners(proc: Path, inodes: set[str]) -> dict[str, Process]:
    wanted, found = {f"socket:[{inode}]": inode for inode in inodes}, dict[str, Process]()
    for folder in proc.glob("[0-9]*"):
        try:
            if held := wanted.keys() & set(_links(folder / "fd")):
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                environ = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
                found |= {wanted[name]: Process(int(folder.name), command, frozenset(environ)) for name in held}
        except OSError:  # another user's, or gone meanwhile
            continue
    return found


def _links(folder: Path) -> Iterator[str]:
    for link in folder.iterdir():
        with suppress(OSError):  # closed meanwhile
            yield str(link.readlink())
