"""ALiBi: a bias that falls with the distance between two tokens, by a slope of each head's own."""


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """BLOOM's slopes: a geometric series of the largest power of two, then every other one of the next.

    Source: Press et al. 2022, and its published code for numbers of heads that are no power of two.
    """
    power = 1 << (num_heads.bit_length() - 1)
    first = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    between = [2.0 ** (-4.0 * (2 * i + 1) / power) for i in range(num_heads - power)]
    return (*first, *between)
