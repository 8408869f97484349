"""The Redis side: the journal of ops, the registry of sandboxes, leases and output streams.

Redis holds the truth; a Celery message is only a doorbell. Every transition is one call of ``journal.lua``,
which lists the keys and the states on top. :class:`~cifixer_exec.store.journal.Journal` is the one entrance.
"""
