"""What both ends of a connection set on their sockets, so that no client can fill memory or hold up another."""

from __future__ import annotations

import zmq

from sglang_hcache.prefetch import messages as m

# A client on this host has at most a few messages a request under way.
HIGH_WATER = 1000  # messages queued by ZeroMQ for each connection; beyond, they wait with who sends them
REMOTE_HIGH_WATER = 8  # from a client on another host: each may carry records
MAX_PAYLOAD_BYTES = 128 << 20  # of a page; one of 64 tokens of a 70B model, as hidden states, has 80 MiB
MAX_FRAME_BYTES = MAX_PAYLOAD_BYTES + (17 << 20)  # with its header, and each of 4096 layers aligned to 4 KiB
HEARTBEAT_MS = (2000, 6000)  # ping another host so often; drop the connection after this silence


def set_limits(socket: zmq.Socket[bytes], *, remote: bool, from_client: int, largest_frame: int) -> None:
    """Before it is bound or connected. `from_client`: the high-water mark, SNDHWM or RCVHWM, of what clients send."""
    socket.set(zmq.SNDHWM, HIGH_WATER)
    socket.set(zmq.RCVHWM, HIGH_WATER)
    socket.set(zmq.MAXMSGSIZE, max(4 * m.MAX_MESSAGE_BYTES, largest_frame))  # beyond, ZeroMQ drops the connection
    if remote:
        socket.set(from_client, REMOTE_HIGH_WATER)
        socket.set(zmq.IPV6, 1)
        socket.set(zmq.HEARTBEAT_IVL, HEARTBEAT_MS[0])
        socket.set(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_MS[1])
