"""The settings that a plan weighs, and how near the counts are to what was measured of each."""

from dataclasses import dataclass
from functools import cached_property

from hyclora.models.config import BITS, KEPT, HycloraConfig

# lines written before settings were recorded whole hold what was given alone; these defaults have changed since
DEFAULTS_THEN = {"layer_type": "intra_inter", "cuda_graphs": False}
# what else tells two settings apart does not change the memory of full rows
TOLD_BY = ("layer_type", "layers", "q_bit", "attention", "scale_rule", "offload", "slot_savers", "offload_embeddings")
BITS_SAID = {"exact": "exact", **{f"quant{bits}": f"{bits} bit" for bits in BITS}}
WHOLE = 16
EMBEDDINGS = ", embeddings in host memory"
NEAR = 10.0  # percent: a mode that is further off says so


@dataclass(frozen=True)
class Mode:
    """A setting by what a person calls it; checkpointing: with gradient checkpointing around each layer.

    lines, off: how many measured lines there are, and by how many percent of the measured dyn they are off at most;
    earlier: all of them are of builds before live memory was as it is, most of which took more.
    """

    name: str
    settings: tuple[tuple[str, object], ...]
    checkpointing: bool = False
    lines: int = 0
    off: float = 0.0
    earlier: bool = False

    @property
    def config_arguments(self) -> dict:
        return {name: dict(v) if isinstance(v, tuple) else v for name, v in self.settings}

    @cached_property
    def config(self) -> HycloraConfig:
        return HycloraConfig(**self.config_arguments)

    @cached_property
    def with_embeddings_on_host(self) -> "Mode":
        """The same with embeddings in host memory."""
        return _mode((*self.settings, ("offload_embeddings", True)), self.checkpointing)

    @property
    def needs_gpu(self) -> bool:
        return bool(self.config.offload or self.config.cuda_graphs)

    @property
    def bits(self) -> float:
        """Of an element that is kept, WHOLE for exact ones."""
        saver = _inputs(self.config, self.checkpointing)
        if saver is None:
            return self.config.q_bit if self.config.policy.compress else WHOLE
        return WHOLE if saver == "exact" else int(saver.removeprefix("quant"))

    @property
    def slowed_by(self) -> tuple[bool, ...]:
        """What makes a step slower on any GPU: layers that run again, the host, and launches one by one."""
        again, config = _inputs(self.config, self.checkpointing) is not None, self.config
        return again, bool(config.offload), bool(config.offload_embeddings), not config.cuda_graphs

    @property
    def accuracy(self) -> str:
        """How near the count of dyn is, in words."""
        return how_near(self.lines, self.off, self.earlier)


def how_near(lines: int, off: float, earlier: bool = False) -> str:
    """How near counts are that are off by so many percent of so many measured lines at most, in words."""
    if not lines:
        return "no measured line"
    of = f"{lines} measured line{'s' * (lines > 1)}{' of earlier builds' if earlier else ''}"
    return f"{of} differ by up to {off:.1f} %" if off > NEAR else f"within {off:.1f} % of {of}"


# of each mode with measured lines: how many, off at most by so many percent, of earlier builds alone; an installed
# package has no result files. `python -m benchmarks.report_plan` prints them, and a test holds them to the files
MEASURED = {
    "checkpointing, offloaded layer inputs, exact": (1, 0.0, False),
    "checkpointing, resident layer inputs, exact": (1, 0.0, False),
    "exact, resident, layer by layer": (1, 3.7, True),
    "offloaded layer inputs, CUDA graphs, 4 bit": (2, 0.0, False),
    "offloaded layer inputs, CUDA graphs, 8 bit": (1, 0.0, False),
    "offloaded layer inputs, CUDA graphs, exact": (1, 0.0, False),
    "offloaded layer inputs, layer by layer, 4 bit": (1, 0.0, False),
    "offloaded, CUDA graphs, 2 bit": (2, 0.2, False),
    "offloaded, CUDA graphs, 4 bit": (23, 1.4, False),
    "offloaded, CUDA graphs, 8 bit": (1, 0.1, False),
    "offloaded, layer by layer, 2 bit": (1, 1.0, False),
    "offloaded, layer by layer, 4 bit": (27, 3.8, False),
    "resident layer inputs, layer by layer, 4 bit": (1, 0.0, False),
    "resident layer inputs, layer by layer, 8 bit": (1, 0.0, False),
    "resident layer inputs, layer by layer, exact": (1, 0.0, False),
    "resident, CUDA graphs, 2 bit": (2, 0.1, False),
    "resident, CUDA graphs, 4 bit": (17, 0.2, False),
    "resident, CUDA graphs, 8 bit": (1, 0.0, False),
    "resident, layer by layer, 2 bit": (5, 8.0, True),
    "resident, layer by layer, 4 bit": (1, 4.5, True),
}


def describe(config: HycloraConfig, checkpointing: bool = False) -> str:
    """What a person calls a setting: where slots or layer inputs wait, how layers are launched, in how many bits."""
    return _describe(config, checkpointing) + (EMBEDDINGS if config.offload_embeddings else "")


def _inputs(config: HycloraConfig, checkpointing: bool) -> str | None:
    """The saver of layer inputs where these are what is kept, None where slots are."""
    inputs = KEPT.get(config.layers)
    return inputs or config.slot_savers.get("layer_in", "exact") if checkpointing else inputs


def _describe(config: HycloraConfig, checkpointing: bool) -> str:
    where = "offloaded" if config.offload else "resident"
    launched = "CUDA graphs" if config.cuda_graphs else "layer by layer"
    inputs = _inputs(config, checkpointing)
    mixed = "" if config.layers in KEPT else f", layers={config.layers}"
    if checkpointing:
        launched = f"{launched}, " if config.cuda_graphs else ""
        return f"checkpointing, {where} layer inputs, {launched}{BITS_SAID[inputs]}{mixed}"
    if inputs:
        return f"{where} layer inputs, {launched}, {BITS_SAID[inputs]}"
    if not config.policy.compress:
        return f"exact, {where}, {launched}{mixed}"
    kept_map = ", with a map of attention" if config.attention == "eager" else ""
    bits = f"{config.average_bits:g} bit on average" if config.q_bit == "auto" else f"{config.q_bit} bit"
    return f"{where}, {launched}, {bits}{mixed}{kept_map}"


def _modes() -> list[Mode]:
    found = []
    for offload in (False, True):
        for graphs in (True, False):
            for bits in (8, 4, 2):
                found.append(((("q_bit", bits), ("offload", offload), ("cuda_graphs", graphs)), False))
    for offload in (False, True):
        for saver in ("exact", "quant8"):
            settings = (("offload", offload), ("cuda_graphs", False), ("slot_savers", (("layer_in", saver),)))
            found.append((settings, True))
    for offload in (False, True):
        for graphs in (True, False):
            for kept in ("input", "input8", "input4"):
                found.append(((("layers", kept), ("offload", offload), ("cuda_graphs", graphs)), False))
    found.append(((("layer_type", "baseline"), ("cuda_graphs", False)), False))
    return [_mode(settings, checkpointing) for settings, checkpointing in found]


def _mode(settings: tuple[tuple[str, object], ...], checkpointing: bool) -> Mode:
    name = describe(Mode("", settings).config, checkpointing)
    return Mode(name, settings, checkpointing, *MEASURED.get(name, ()))


MODES = _modes()


def mode_of(setting) -> Mode | None:
    """The mode that a result line's setting is, None if none: a peer, or a setting that no plan weighs."""
    if not isinstance(setting, dict):
        return None
    wanted = _key(HycloraConfig(**DEFAULTS_THEN | setting))
    return next((mode for mode in MODES if not mode.checkpointing and _key(mode.config) == wanted), None)


def _key(config: HycloraConfig) -> tuple:
    values = {name: getattr(config, name) for name in TOLD_BY}
    bits = values.pop("q_bit") if config.policy.compress else None
    return bool(config.cuda_graphs), bits, *values.items()
