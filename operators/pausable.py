"""Something that can be switched off for a while."""

from contextlib import contextmanager


class Pausable:
    """active says whether it is on."""

    active = True

    @contextmanager
    def paused(self):
        """Off inside; afterwards as it was."""
        active, self.active = self.active, False
        try:
            yield
        finally:
            self.active = active
