"""A whole installation for one program: Redis, a worker, beat and (if asked) Flower, all ending with the program.

:class:`~cifixer_exec.stack.embedded.EmbeddedStack` is what is used; the parts are started and stopped by a small process of
their own (:mod:`cifixer_exec.stack.keeper`), so that nothing stays behind however its user ends.
"""

from cifixer_exec.stack.embedded import EmbeddedStack
from cifixer_exec.stack.leftovers import Leftovers

__all__ = ["EmbeddedStack", "Leftovers"]
