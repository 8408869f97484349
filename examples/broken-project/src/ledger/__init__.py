"""Money in whole cents."""

from ledger.amounts import format_cents, parse_cents
from ledger.shares import split

__all__ = ["format_cents", "parse_cents", "split"]
