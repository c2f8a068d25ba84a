"""A TCP port that two processes listen on, and which of them gets the connections.

In:  an address.  Out: a listening socket in the group of those that share it.
Knows nothing of HTTP. The kernel spreads new connections over all sockets of such a group (SO_REUSEPORT) unless a
program chooses; the one used here names a socket by its place in the group, which is the order of listening.

Linux only (socket(7), SO_ATTACH_REUSEPORT_CBPF). A place that nobody has means: as if there were no program.
"""

import ctypes
import socket

BACKLOG = 2048
SO_ATTACH_REUSEPORT_CBPF = 51
"""Missing from Python's socket module."""
BPF_RETURN = 0x06
"""Of classic BPF: end, with the constant as the result."""


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte), ("k", ctypes.c_uint))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.POINTER(_Instruction)))


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that shares the port and gets all its connections if it is the first. Raises `OSError`."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
        choose(listener, 0)
    except OSError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener


def choose(listener: socket.socket, place: int) -> None:
    """Have the socket at this place of the listener's group, from 0, get every new connection."""
    instructions = (_Instruction * 1)(_Instruction(BPF_RETURN, 0, 0, place))
    program = _Program(1, ctypes.cast(instructions, ctypes.POINTER(_Instruction)))
    listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF, bytes(program))
