"""Record every frame that enters the switch, and search the recorded streams for a secret.

    python sniffer.py FILE      (in the switch's namespace; as root; until SIGTERM)

A frame is a length of four bytes and what came over the wire. Streams of TCP are put together
before they are searched, as a secret may lie across two segments.
"""

from __future__ import annotations

import base64
import signal
import socket
import struct
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

__all__ = ["needles", "said_aloud", "streams"]

_ALL_PROTOCOLS = 0x0003
_BUFFER_FORCE = 33  # SO_RCVBUFFORCE
_STATISTICS = (263, 6)  # SOL_PACKET, PACKET_STATISTICS
_PIECE = 8  # bytes of a key; so many equal ones in a row are no accident


def needles(key: bytes) -> set[bytes]:
    """Return the pieces of ``key`` to search for: raw, in hexadecimal, in base64."""
    found = set()
    for start in range(len(key) - _PIECE + 1):
        piece = key[start : start + _PIECE]
        found |= {piece, piece.hex().encode(), piece.hex().upper().encode()}
    for shift in range(3):  # where in a group of three bytes the key begins
        text = base64.b64encode(bytes(shift) + key)[4:-4]
        found |= {text, text.replace(b"+", b"-").replace(b"/", b"_")}
    return found


def said_aloud(capture: Path, key: bytes) -> list[tuple[str, str]]:
    """Return sender and receiver of every stream that contains a piece of ``key``."""
    pieces = needles(key)
    return [who for who, what in streams(capture) if any(piece in what for piece in pieces)]


def streams(capture: Path) -> Iterator[tuple[tuple[str, str], bytes]]:
    """Yield sender, receiver and bytes of every direction of every TCP connection (IPv4)."""
    segments: dict[tuple[str, str], dict[int, bytes]] = defaultdict(dict)
    for frame in _frames(capture):
        if frame[12:14] != b"\x08\x00" or frame[23] != socket.IPPROTO_TCP:
            continue
        tcp = 14 + 4 * (frame[14] & 15)
        end = 14 + struct.unpack_from("!H", frame, 16)[0]
        ports = struct.unpack_from("!HH", frame, tcp)
        names = [socket.inet_ntoa(frame[at : at + 4]) for at in (26, 30)]
        who = (f"{names[0]}:{ports[0]}", f"{names[1]}:{ports[1]}")
        (sequence,) = struct.unpack_from("!I", frame, tcp + 4)
        payload = frame[tcp + 4 * (frame[tcp + 12] >> 4) : end]
        if len(payload) > len(segments[who].get(sequence, b"")):
            segments[who][sequence] = payload
    for who, parts in segments.items():
        yield who, _joined(parts)


def _joined(parts: dict[int, bytes]) -> bytes:
    """Return the bytes of the segments in order; sequence numbers wrap (RFC 9293, 3.4)."""
    if not parts:
        return b""
    first = next(iter(parts))
    said, until = bytearray(), None
    for at, payload in sorted(((n - first + 2**31) % 2**32, p) for n, p in parts.items()):
        fresh = payload if until is None else payload[max(0, until - at) :]
        said += fresh
        until = max(until or 0, at + len(payload))
    return bytes(said)


def _frames(capture: Path) -> Iterator[bytes]:
    content = capture.read_bytes()
    at = 0
    while at + 4 <= len(content):
        (length,) = struct.unpack_from("!I", content, at)
        if at + 4 + length > len(content):
            return
        yield content[at + 4 : at + 4 + length]
        at += 4 + length


def _capture(path: Path) -> None:
    line = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL_PROTOCOLS))
    line.setsockopt(socket.SOL_SOCKET, _BUFFER_FORCE, 256 << 20)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_lost(line)))
    print("listening", flush=True)
    with path.open("wb", buffering=0) as file:
        while True:
            frame, (_, _, kind, *_) = line.recvfrom(1 << 18)
            if kind != socket.PACKET_OUTGOING:  # a frame that is passed on was seen coming in
                file.write(struct.pack("!I", len(frame)) + frame)


def _lost(line: socket.socket) -> str | None:
    """Return an error message if the kernel dropped frames before they were read."""
    _, dropped = struct.unpack("II", line.getsockopt(*_STATISTICS, 8))
    return f"{dropped} frames were lost" if dropped else None


if __name__ == "__main__":
    _capture(Path(sys.argv[1]))
