"""Calibration on tokens that are packed in tiles: all of them are measured before the first tile is packed."""

from torch import Tensor

from hyclora.operators.savers.base import Keeper
from hyclora.operators.savers.measure import measure, merge


class Observer(Keeper):
    """Stands in for the keeper of a calibration forward: measures its slots tile by tile and keeps none of them.

    rows: where the tile is. So what is packed depends on all n_rows tokens, however they are cut, and the ranks of a
    distributed run exchange their statistics once, whatever the tiles of each. Keeps 0 bytes a token, 16 a channel.
    """

    def __init__(self, keeper: Keeper, n_rows: int):
        super().__init__(keeper.savers, keeper.step)
        self.rows = slice(n_rows)
        self._mask = keeper.step.mask(n_rows)
        self._measured: dict[str, dict[str, Tensor]] = {}

    @property
    def due(self) -> bool:
        """Whether there is anything to calibrate in this forward."""
        return any(saver.due(self.step) for saver in self.savers.values())

    def keep(self, name: str, x: Tensor) -> None:
        if self.savers[name].due(self.step):
            found = measure(x, None if self._mask is None else self._mask[self.rows])
            before = self._measured.get(name)
            self._measured[name] = found if before is None else merge(before, found)

    def calibrate(self) -> None:
        """Add what was measured to the savers' statistics."""
        for name, found in self._measured.items():
            self.savers[name].calibrate(found, self.step)
