"""Other ways to move the same events, run by the same harness: `PEERS`, in the order of the table.

``python -m bench.peers`` says which are here and why others are not; with names it runs them.
"""

from bench.peers import in_process, jetstream, redis_streams, sqlite, zeromq
from bench.peers.peer import Peer, Skipped, Wrong

__all__ = ["PEERS", "Peer", "Skipped", "Wrong"]

PEERS: list[Peer] = [
    *redis_streams.PEERS,
    *jetstream.PEERS,
    *sqlite.PEERS,
    *zeromq.PEERS,
    *in_process.PEERS,
]
