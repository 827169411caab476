"""A plain subscriber process that writes down what it gets: ``subscriber.py ENDPOINT FILE``, one ``bus_seq`` a line.

Says ``ready`` once the bus has repeated something to it, and ends at the event type ``last``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import zmq


def main(endpoint: str, file: str) -> None:
    with zmq.Context() as context, context.socket(zmq.SUB) as socket, Path(file).open("w", buffering=1) as seen:
        socket.linger = 0
        socket.subscribe(b"")
        socket.connect(endpoint)
        greeted = False
        while True:
            _, body = socket.recv_multipart()
            event = json.loads(body)
            seen.write(f"{event['bus_seq']}\n")
            if not greeted:
                greeted = True
                print("ready", flush=True)
            if event["event_type"] == "last":
                return


if __name__ == "__main__":
    main(*sys.argv[1:])
