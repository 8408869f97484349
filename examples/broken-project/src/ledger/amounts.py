"""Text to cents and back."""


def parse_cents(text: str) -> int:
    """``"12.34"`` → 1234. Raises ValueError for anything that is no amount with at most two decimals."""
    whole, _, decimals = text.strip().partition(".")
    if len(decimals) > 2:
        raise ValueError(f"{text!r} has more than two decimals")
    sign = -1 if whole.startswith("-") else 1
    return sign * (abs(int(whole)) * 100 + int(decimals.ljust(2, "0")))


def format_cents(cents: int) -> str:
    """1234 → ``"12.34"``."""
    sign = "-" if cents < 0 else ""
    return f"{sign}{abs(cents) // 100}.{abs(cents) % 100:02d}"
