"""Ops: what the messages between the processes of one host and an owner are; see frames.py for how they are packed."""

from __future__ import annotations

from enum import IntEnum


class Op(IntEnum):
    """What a message is. Questions are answered by ANSWER or FAULT with the same number; those marked one-way are not.

    The first message on every connection is HELLO.
    """

    HELLO = 1
    """JSON: see the door. The answer is JSON too."""
    ANSWER = 2
    """Owner: the body depends on the question."""
    FAULT = 3
    """Owner: JSON [class, message]."""
    SEGMENTS = 4
    """u32 first ordinal wanted. Answer: u32 ordinals, with one descriptor each beside the bytes (see local.py)."""
    LEASE = 5
    """u64 lease, u8 patience (see Patience), names. Answer: grants."""
    LEASE_PAGES = 6
    """u64 lease, u8 patience, pages. Answer: grants. With LOCAL patience a batch that is not wholly local is all MISS
    and nothing is held; so it is for LEASE."""
    MATCH = 7
    """u64 lease, u8 patience, names. Answer: grants for the longest prefix; may be shorter than the question."""
    READ = 8
    """u64 lease, JSON-free run (see pack_read). May be answered by FILL first. Answer: grants."""
    RELEASE = 9
    """One-way: u64 leases."""
    TOUCH = 10
    """One-way: i64 locations that were read without asking, in order: hits for the books and for the policy."""
    FILL = 11
    """Owner, with the number of a READ: gaps the asker is to load itself."""
    FILLED = 12
    """One-way, number of the READ: u64 fill, then u32 items with the digests of what landed (see pack_filled)."""
    UNFILLED = 13
    """One-way, number of the READ: u64 fill: that load has ended, writes nothing more, and left the rest unfilled."""
    RESERVE = 14
    """Ticket (a number chosen by the asker, not 0), terms and shapes of entries to be put (see pack_reserve). Answer:
    u64 ticket and grants: HIT with a location: fill it; HIT with location -1: is there already; else why not. What is
    over the asker's share is BUSY; ticket 0: all of it is, and nothing was reserved."""
    COMMIT = 15
    """u64 ticket, u8 flags (1: last, 2: durable), then items with digests as FILLED. Answer: outcomes, one an item
    of the ticket, but for those at its end that were over the share: MISS while it lacks parts, CORRUPT where bytes and
    digests differed."""
    ABANDON = 16
    """One-way: u64 tickets: nothing more will be written or committed under them, also where they are yet to be had."""
    DELETE = 17
    """Names. Answer: outcomes."""
    QUARANTINE = 18
    """Names whose copies in memory did not match their digests. Answer: empty."""
    FLUSH = 19
    """Empty. Answer, when everything visible before is on the disk: u8 1, or at once 0 where there is no SSD."""
    STATS = 20
    """Empty. Answer: JSON."""
    CLAIM = 21
    """A note's name: facts found out once. Answer: u8 0 and the value, or 1: find out and SETTLE. Waits for others."""
    SETTLE = 22
    """One-way: f64 seconds to believe it (0: not at all, let the next one try), u32 length of name, name, value."""
    FORGET = 23
    """Prefixes of names of notes to forget (JSON list of hex), from a client with a number: answered (empty) when every
    other client has forgotten; from the owner: forget your own copies, and then say TOLD."""
    CALL = 24
    """JSON [method, {arguments}] for rare things (contents, evict, ...). Answer: JSON."""
    REDECLARE = 25
    """To a new owner: u64 lease and i64 locations, again and again; see pack_holds. Answer: u8 for each lease: held."""
    TOLD = 26
    """One-way, number of the owner's FORGET: done."""
    KNOWN = 27
    """A note's name. Answer: as to CLAIM, but nothing is claimed or waited for: 1 where nothing is believed."""
    JOIN = 28
    """Ticket, terms, shape, claims and digests of blocks that several writers fill (see joint.pack_join). Answer: u64
    ticket, and what of each block is the asker's to write. What is over its share is BUSY; ticket 0: all of it is."""
    LAND = 29
    """u64 ticket of a JOIN, u8 flags (2: nothing lands, wait for the disk), pieces, then items with digests as FILLED.
    Answer: outcomes, one a row of the latter and then one a piece; for the disk: one an item of the ticket."""
    COMPARE = 30
    """u64 ticket of a JOIN, items with digests as FILLED. Answer: u64 a row: parts that memory has with others."""
    PROBE = 31
    """u64 parts, digests of a chain. Answer: one byte a block of its longest prefix that is there; nothing is held."""
    LEASE_BLOCKS = 32
    """u64 lease, u8 patience, u64 parts, digests. Answer: grants. With MEMORY patience a batch that is not wholly there
    with these parts is all MISS."""
    TOUCH_CHAIN = 33
    """One-way: u64 parts (0), digests: this chain was used."""


class Patience(IntEnum):
    """How far the owner goes before it answers a lease."""

    MEMORY = 0
    """What is in memory now; answered at once."""
    LOCAL = 1
    """All of it must be in memory or on the SSD; waits for the SSD."""
    BEST = 2
    """What can be had from memory and SSD; the rest is MISS."""
