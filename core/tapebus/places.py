"""Where events can be lost and why they can be refused: the closed list that every count is made under.

An event that was given a number is on the tape, or it is counted under exactly one of these names. A name that
is not here is a mistake of the program: `known` is what tests ask.
"""

from __future__ import annotations

from typing import NamedTuple


class Place(NamedTuple):
    """One name of the list; ``code`` is its number on the wire, 0 where it never travels."""

    name: str
    code: int
    meaning: str


#: What a client loses before the bus has it; told to the bus with GAP.
CLIENT = (
    Place("client.encode", 1, "the payload cannot be encoded, or is too large for a frame"),
    Place("client.ring_full", 2, "the publisher's memory is full: the bus has been away or slow for too long"),
    Place("client.spool_full", 3, "the publisher's spool file is full"),
    Place("client.exit_abandoned", 4, "the process ended before the event was acknowledged"),
)
#: Why the bus refuses an event for good; told to an acknowledged producer with ACK.
INGEST = (
    Place("ingest.malformed", 1, "the frame is not a well-formed event or batch"),
    Place("ingest.oversize", 2, "the frame is larger than the limit"),
    Place("ingest.schema", 3, "the event does not fit its type"),
    Place("ingest.topic_denied", 4, "the sender may not publish this event type"),
    Place("ingest.rate", 5, "the sender is over its rate"),
)
#: What happens to events of senders that do not number them.
LEGACY = (
    Place("legacy.shed", 0, "read from a fire-and-forget socket while the store stood still"),
    Place("legacy.unsequenced", 0, "the account of such senders; what never arrived cannot be known"),
)
#: Events that are on the tape but were not handled; kept as dead letters. ``*`` is the plugin.
PLUGIN = (
    Place("plugin.*.queue_full", 0, "the consumer could not take it"),
    Place("plugin.*.error", 0, "the handler raised"),
    Place("plugin.*.timeout", 0, "the handler did not return in time"),
    Place("plugin.*.crashed", 0, "the plugin's process died with it in its hands"),
    Place("plugin.*.quarantined", 0, "the consumer is set aside after too many errors"),
)
#: Messages to the outside that were given up. ``*`` is the relay.
RELAY = (
    Place("relay.*.rate_limited", 0, "the other side allows no more"),
    Place("relay.*.failed", 0, "the other side refused it, or never answered"),
)
EVERY = (*CLIENT, *INGEST, *LEGACY, *PLUGIN, *RELAY)

_PLAIN = {each.name for each in EVERY if "*" not in each.name}
_OF_SOMEBODY = {tuple(each.name.split(".*.")) for each in EVERY if "*" in each.name}


def known(name: str) -> bool:
    """Whether `name` is on the list; any plugin or relay may stand for the ``*``."""
    family, _, rest = name.partition(".")
    somebody, _, what = rest.rpartition(".")
    return name in _PLAIN or (bool(somebody) and (family, what) in _OF_SOMEBODY)
