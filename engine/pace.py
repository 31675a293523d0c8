"""How long what is left of a step takes."""

from __future__ import annotations

from dataclasses import dataclass, field

from utils.progress import duration


@dataclass
class Pace:
    """Seconds per iteration and per evaluated image, as this process measured them."""

    laps: list[tuple[int, float]] = field(default_factory=list)  # iterations, seconds
    images: int = 0
    evaluating: float = 0.0  # seconds for those images

    def lap(self, iterations: int, seconds: float) -> None:
        """So many iterations were done in so many seconds."""
        self.laps.append((iterations, seconds))

    def evaluated(self, images: int, seconds: float) -> None:
        """So many images were evaluated in so many seconds."""
        self.images, self.evaluating = self.images + images, self.evaluating + seconds

    def left(self, iterations: int, images: int) -> str:
        """The time for so many more of both, for people.

        The first lap warms up and counts only while there is no other. "at least" stands before
        what leaves the images out, because none was evaluated yet.
        """
        laps = self.laps[1:] or self.laps
        seconds = iterations * sum(time for _, time in laps) / sum(done for done, _ in laps)
        if self.images:
            return f"{duration(seconds + images * self.evaluating / self.images)} left"
        return f"{'at least ' if images else ''}{duration(seconds)} left"
