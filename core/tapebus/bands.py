"""For handlers of very many events of which nearly none changes anything: pass over the others at compiled speed.

`Bands` belongs to one handler and its thread. It looks at events of one type whose payload has a key and two numbers,
the first not above the second. `Band`, usually as the base of what the plugin keeps for a key, says between which
bounds the two may lie without anybody having to look; -inf to inf at first. ::

    quiet = Bands(books, "symbol", "bid", "ask")
    events = iter(batch)
    while (event := quiet.skip(events)) is not None:
        if quiet.event is None and event.event_type == "market_data":
            quiet.learn(event)
        ...  # this one has to be looked at

``skip(iterator)`` takes events and returns the first that has to be looked at, None at the end: one of another type,
out of its band, with its first number above the second, or not before ``until`` (event time, inf at first). Of each
one passed over its band keeps ``time`` and payload (``last``), and counts it in ``seen``; keys nobody has a band for
are passed over without a trace. ``Band.take(first, second, time, last)`` keeps one that was looked at likewise, and
widens the bounds as far as it takes to hold it. ``learn(event)`` says by an example which class of events is meant;
False, and nothing is passed over, where that one has no typed payload with these fields.
"""

from __future__ import annotations

from tapebus._bands import Band, Bands

__all__ = ["Band", "Bands"]
