"""What a forward costs: a pass over the weights, and computing for each position."""

_WEIGHT = 0.3  # of what is new


class ForwardCost:
    """Learned from the forwards of a model whose weights are brought to the device for each of them.

    reading: seconds that a forward takes however few positions it has.
    per_position: seconds of computing for each position, padding included; at most, as only forwards of many positions
        tell it apart from what each forward takes.
    """

    def __init__(self) -> None:
        self.reading = self.per_position = 0.0
        self._is_known = False

    def record(self, positions: int, seconds: float, waited: float = 0.0) -> None:
        """Learn from one forward. It took no less than either, and tells most about whichever of them was longer.

        waited: seconds of it in which nothing was computed, as the weights were not there yet.
        """
        computing = (seconds - waited) / positions
        if not self._is_known:
            self._is_known, self.reading, self.per_position = True, seconds, computing
        elif self.outweighs_reading(positions):
            self.per_position += _WEIGHT * (computing - self.per_position)
        else:
            self.reading += _WEIGHT * (seconds - self.reading)
        self.reading = min(self.reading, seconds)
        self.per_position = min(self.per_position, computing)

    def outweighs_reading(self, positions: int) -> bool:
        """Whether computing so many positions takes longer than one more pass over the weights."""
        return self.per_position * positions > self.reading

    def seconds(self, positions: int) -> float:
        """Of a forward, if nothing is computed while weights are read."""
        return self.reading + self.per_position * positions
