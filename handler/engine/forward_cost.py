"""What a forward costs: a pass over the weights, and computing for each position."""

_WEIGHT = 0.3  # of what is new
_NARROW = 64  # positions: with more of them, a forward may tell what each of many takes
_FEW = 4  # positions from which on they, and not the pass, are to blame for most of what was not foreseen
_FORGOTTEN = 0.01  # of what they cost, in a forward without: those that took long by chance must not be the last


class ForwardCost:
    """Learned from the forwards of a model whose weights are brought to the device for each of them.

    reading: seconds that a forward takes however few positions it has.
    per_position: seconds of computing for each position of many, padding included; at most, as only forwards of many
        positions tell it apart from what each forward takes.
    per_extra_position: seconds for each position beyond the first where there are few: less where they are computed
        while weights are read, more where kernels for few rows are not those for many. 0 until one is seen: who does
        not try never knows.
    """

    def __init__(self) -> None:
        self.reading = self.per_position = self.per_extra_position = 0.0
        self._is_known = False

    def record(self, positions: int, seconds: float, waited: float = 0.0) -> None:
        """Learn from one forward. It took no less than either, and tells most about whichever of them was longer.

        waited: seconds of it in which nothing was computed, as the weights were not there yet.
        """
        computing = (seconds - waited) / positions
        if not self._is_known:
            self._is_known, self.reading, self.per_position = True, seconds, computing
        elif positions > _NARROW and self.outweighs_reading(positions):
            self.per_position += _WEIGHT * (computing - self.per_position)
        else:
            self.reading = min(self.reading, seconds)  # so where it took less than foreseen, positions did
            # Another process may have had the disk for a while: no forward counts for more than twice a pass.
            extra, unforeseen = positions - 1, _WEIGHT * min(seconds - self.seconds(positions), self.reading)
            self.reading += max(0.0, unforeseen) * _FEW / (extra + _FEW)
            of_each = unforeseen / (extra + _FEW) if extra else -_FORGOTTEN * self.per_extra_position
            self.per_extra_position = max(0.0, self.per_extra_position + of_each)
        self.reading = min(self.reading, seconds)
        self.per_position = min(self.per_position, computing)

    def outweighs_reading(self, positions: int) -> bool:
        """Whether computing so many positions takes longer than one more pass over the weights."""
        return self.per_position * positions > self.reading

    def seconds(self, positions: int) -> float:
        """Of a forward of few positions."""
        return self.reading + self.per_extra_position * max(0, positions - 1)
