"""Station 3: moments of most batches, and of those that are kept from a fit, to choose its settings by."""

from dataclasses import dataclass

from makd.calibration.moments import CrossMoments


@dataclass
class SplitMoments:
    """Of inputs and targets. Of wide layers they are the largest thing there is: they are handed on whole, and let go.

    Args:
        to_fit: of most batches.
        held_out: of the others; None where there are none any more.
    """

    to_fit: CrossMoments
    held_out: CrossMoments | None = None

    def together(self) -> CrossMoments:
        """All of them, as one; `held_out` is gone then."""
        if self.held_out is not None:
            self.to_fit.merge(self.held_out)
            self.held_out = None
        return self.to_fit
