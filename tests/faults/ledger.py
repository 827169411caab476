"""A producer process that writes down, outside the bus, what the bus has acknowledged.

``ledger.py ENDPOINT SOURCE FILE``. Publishes quotes whose volume counts from 1
until standard input ends, then waits for the rest.
A line of the ledger is ``acked N``: the first N events were confirmed; the last one is ``end PUBLISHED ACKED``.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from tapebus import Publisher

#: What may be in flight, in events; less than the publisher holds, so that nothing is dropped.
WINDOW = 5000


def main(endpoint: str, source: str, file: str) -> None:
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    pause = threading.Event()
    with Publisher(source, endpoint=endpoint) as publisher, Path(file).open("a", buffering=1) as ledger:
        published = noted = 0
        while not ended.is_set():
            for _ in range(100):
                published += 1
                quote = {"symbol": "EURUSD", "bid": 1.1, "ask": 1.2, "volume": float(published)}
                assert publisher.publish("market_data", quote, timestamp=1_700_000_000.0 + published)
            while True:
                stats = publisher.stats()
                if stats["acked"] > noted:
                    noted = stats["acked"]
                    ledger.write(f"acked {noted}\n")
                if stats["in_flight"] < WINDOW or ended.is_set():
                    break
                pause.wait(0.002)
        publisher.flush(60.0)
        stats = publisher.stats()
        ledger.write(f"end {published} {stats['acked']}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
