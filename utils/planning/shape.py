"""A model as far as its memory goes: linear layers, slots, weights and what is trained, read off meta tensors."""

import json
from collections.abc import Iterable
from functools import cached_property
from operator import attrgetter
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from hyclora.models.building import slot_widths
from hyclora.models.families import FAMILIES
from hyclora.operators.dispatch import cdiv, rank_block
from hyclora.operators.linear import low_rank_grad, nf4
from hyclora.operators.linear.weight_pieces import MANY_TOKENS, weight_pieces
from hyclora.operators.reference import padded_rank
from hyclora.utils import folder
from hyclora.utils.args import ALL_LINEAR, ROOT
from hyclora.utils.errors import UserError
from hyclora.utils.planning.units import BASES

SHAPES = ROOT / "benchmarks" / "shapes"
HALF = torch.bfloat16  # what is computed in, and what weights are in that are not NF4
# bitsandbytes: weights that share an absmax of 8 bits, absmax that share one in fp32, tables of 16 and 256 values
BLOCK, BLOCKS, TABLES = 64, 256, 4 * (16 + 256 + 1)
ALIGNED = 512  # the allocator's step
# a trained number in fp32: itself, its gradient, and Adam's two
TRAINED = 4


def aligned(nbytes: int) -> int:
    """Bytes that the allocator takes for a tensor."""
    return -(-nbytes // ALIGNED) * ALIGNED


def nf4_bytes(numel: int) -> int:
    """Bytes of a weight in NF4 with double quantization (utils/loading.py)."""
    absmax = -(-numel // BLOCK)
    return aligned(-(-numel // 2)) + aligned(absmax) + aligned(4 * -(-absmax // BLOCKS)) + TABLES


class Group:
    """Linear layers that share their input, with an adapter of `ranks` each, 0 for none: a ProjectionGroup's bytes.

    n_in, width: elements a token. R: columns of x A^T; beside: those of them that stand beside the outputs
    (ProjectionGroup.buffer). piece: the most of W that is there at a time, by rows in forward, else in backward.
    stack: A and B of stack_adapters. grads: those of A and B, in fp32; early_grads: of B where they come in_one_pass
    with dy B, before dx (low_rank_grad.py). dropped: elements a token of an input that dropout makes for a projection,
    for a time.
    """

    def __init__(self, linears: list[nn.Linear], ranks: list[int], dropout: bool = False):
        self.linears, self.rank = linears, max(ranks)
        self.n_in, self.width = linears[0].in_features, sum(linear.out_features for linear in linears)
        self.R = padded_rank(sum(ranks))
        self.stack = HALF.itemsize * self.R * (self.n_in + self.width)
        self.in_4bit = nf4.is_4bit(linears[-1])
        self.dropped = self.n_in if dropout and self.rank else 0
        # dA of all is one product, filled rows included, unless dropout gives each an input of its own
        rows = sum(ranks) if self.dropped else self.R
        widths = sum(rank * linear.out_features for rank, linear in zip(ranks, linears, strict=True))
        self.grads = 4 * (rows * self.n_in + widths)
        self.in_one_pass = 0 < self.rank <= low_rank_grad.LARGEST_RANK
        self.early_grads = 4 * widths if self.in_one_pass else 0
        self.beside = self.R if self.in_4bit and not self.dropped else 0

    def low_rank_parts(self, n_rows: int) -> int:
        """Bytes that low_rank_grads has for a time (linear/low_rank_grad.py): parts of g and of dB, in fp32."""
        if not self.in_one_pass:
            return 0
        block_rank, block_rows = rank_block(self.rank), low_rank_grad.BLOCK_ROWS
        block_cols = min(512 * 16 // block_rank, low_rank_grad.TILE_BYTES // block_rows // HALF.itemsize)
        stripes = sum(cdiv(linear.out_features, block_cols) for linear in self.linears)
        rows_a_range = cdiv(cdiv(n_rows, max(1, low_rank_grad.PROGRAMS // stripes)), block_rows) * block_rows
        return 4 * block_rank * (stripes * n_rows + cdiv(n_rows, rows_a_range) * self.width)

    def piece(self, n_tokens: int, by_rows: bool, below: bool) -> int:
        """Bytes of the largest piece of a W that is NF4 (linear/weight_pieces.py); below: with A under it."""
        starts = [0]
        for linear in self.linears:
            starts.append(starts[-1] + linear.out_features)
        own = [slice(*pair) for pair in zip(starts, starts[1:], strict=False)]
        pieces = weight_pieces(list(zip(self.linears, own, strict=True)), HALF, by_rows, n_tokens >= MANY_TOKENS)
        shapes = [piece.shape for piece in pieces if piece.in_4bit]
        extra = self.R if below else 0
        return HALF.itemsize * max(((rows + extra) * columns for rows, columns in shapes), default=0)


class Shape:
    """What the plan has to know of a model with adapters of `rank` on linear layers of its decoder.

    source: a folder with a config.json, the file itself, a name in benchmarks/shapes, or a Transformers configuration;
    base: nf4 or bf16; targets: the last names of those that have an adapter, all for None or all-linear; dropout:
    whether adapters have one. tied: whether head and embeddings are one weight, so that these, of so many bytes, cannot
    wait in host memory. Built on the meta device: no memory, some seconds for the largest. Raises UserError for a
    source without a configuration, for one that cannot work, for a model that is no decoder of a known family, and for
    a target that it has not.
    """

    def __init__(
        self, source, base: str = "nf4", rank: int = 16, targets: Iterable[str] | None = None, dropout: bool = False
    ):
        if base not in BASES:
            raise UserError(f"base {base!r} is not one of {', '.join(BASES)}")
        if base == "nf4" and nf4.bnb is None:
            raise UserError("weights in NF4 need bitsandbytes: pip install bitsandbytes, or plan with --base bf16")
        if rank < 1:
            raise UserError(f"lora_rank {rank} is not positive")
        self.config, self.base, self.rank = read_config(source), base, rank
        self.family = FAMILIES[self.config.model_type]
        named = "the model" if isinstance(source, PretrainedConfig) else str(source)
        self.model = folder.bare_model(named, self.config, AutoModelForCausalLM, dtype=HALF)
        decoder = self.model.base_model
        self.layers = list(attrgetter(self.family.layers)(decoder))
        named = [(name, module) for name, module in decoder.named_modules() if isinstance(module, nn.Linear)]
        self.linears = [module for _, module in named]
        targets = None if targets is None or [*targets] == [ALL_LINEAR] else set(targets)
        if missing := sorted((targets or set()) - {name.rpartition(".")[2] for name, _ in named}):
            raise UserError(f"target_modules: the model's layers have no linear layer named {missing[0]}")
        ranks = {id(m): rank if targets is None or name.rpartition(".")[2] in targets else 0 for name, m in named}
        self.adapted = [module for module in self.linears if ranks[id(module)]]
        if base == "nf4":
            for linear in self.linears:
                linear.weight.quant_state = base  # what tells is_4bit, and so weight_pieces
        layer = self.layers[0]
        attention, mlp = layer.get_submodule(self.family.attention), layer.get_submodule(self.family.mlp)
        self.groups = {
            name: Group(linears, [ranks[id(linear)] for linear in linears], dropout)
            for name, linears in (
                ("qkv", [attention.get_submodule(path) for path in self.family.qkv]),
                ("out", [attention.get_submodule(self.family.out)]),
                ("gate_up", [mlp.get_submodule(path) for path in self.family.gate_up]),
                ("down", [mlp.get_submodule(self.family.down)]),
            )
        }
        core = attention.get_submodule(self.family.core)
        self.head_dim = getattr(core, self.family.head_dim)
        self.q, self.k, _ = (linear.out_features for linear in self.groups["qkv"].linears)
        self.hidden, self.ffn = self.groups["qkv"].n_in, self.groups["down"].n_in
        head, embeddings = (getattr(self.model, f"get_{end}put_embeddings")().weight for end in ("out", "in"))
        self.vocab, self.tied = head.shape[0], head is embeddings
        self.embeddings = aligned(embeddings.numel() * embeddings.element_size())
        self.windows = [self._window(one) for one in self.layers]

    @classmethod
    def of(cls, model) -> "Shape":
        """The Shape of a PEFT model that is there, of its largest rank; UserError if it is none that can be counted."""
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
        ranks = {name: max(module.r.values(), default=0) for name, module in layers.items()}
        others = [name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name]
        if others or not any(ranks.values()):
            trained = f"{others[0]} is trained too" if others else "the model has none"
            raise UserError(f"a plan counts LoRA adapters alone, and {trained}: drop memory_budget")
        inside = {id(module) for module in base.base_model.modules()}
        bases = {name: module.get_base_layer() for name, module in layers.items()}
        strange = [
            name for name, linear in bases.items() if id(linear) not in inside or not isinstance(linear, nn.Linear)
        ]
        if strange:
            raise UserError(
                f"a plan counts adapters on linear layers of the decoder, and {strange[0]} is none: drop memory_budget"
            )
        in_4bit = any(map(nf4.is_4bit, bases.values()))
        dtype = base.get_input_embeddings().weight.dtype
        if dtype.itemsize != HALF.itemsize:
            raise UserError(f"a plan counts weights of 16 bit or NF4, and these are {dtype}: load them in bfloat16")
        drops = any(isinstance(drop, nn.Dropout) for module in layers.values() for drop in module.lora_dropout.values())
        targets = {name.rpartition(".")[2] for name in layers}
        return cls(base.config, BASES[0] if in_4bit else BASES[1], max(ranks.values()), targets, drops)

    def _window(self, layer: nn.Module) -> int | None:
        path = self.family.sliding_window
        core = layer.get_submodule(self.family.attention).get_submodule(self.family.core)
        return attrgetter(path)(core) if path else None

    def widths(self, index: int) -> dict[str, int]:
        """Elements a token of each slot of a layer."""
        halves = (slot_widths(self.family, self.layers[index], half) for half in ("attention", "mlp"))
        return {slot: n for half in halves for slot, n in half.items()} | {"layer_in": self.hidden}

    @cached_property
    def weights(self) -> int:
        """Bytes of the frozen weights: NF4 in the decoder's linear layers if base says so, else 2 an element."""
        packed = {id(linear.weight) for linear in self.linears} if self.base == "nf4" else set()
        sizes = (
            nf4_bytes(p.numel()) if id(p) in packed else aligned(p.numel() * p.element_size())
            for p in self.model.parameters()
        )
        return sum(sizes)

    @cached_property
    def trained(self) -> int:
        """Bytes of adapters in fp32, their gradients and Adam's two numbers."""
        return TRAINED * sum(
            aligned(4 * self.rank * n) for linear in self.adapted for n in (linear.in_features, linear.out_features)
        )


def read_config(source):
    """The Transformers configuration of a folder, a file, a name in benchmarks/shapes, or itself."""
    if not isinstance(source, str | Path):
        return _known(source, getattr(source, "name_or_path", "") or "the configuration")
    file = next(_candidates(str(source)), None)
    if file is None:
        shapes = ", ".join(sorted(path.name for path in SHAPES.glob("*"))) or "none here"
        raise UserError(
            f"{Path(source)} has no config.json: name a folder of a model, its config.json or a shape ({shapes})"
        )
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
        if given["model_type"] not in FAMILIES:
            raise UserError(f"{file} is of a {given['model_type']} model: supported are {', '.join(sorted(FAMILIES))}")
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, RecursionError):
        raise UserError(f"{file} is not the configuration of a model: copy the file again") from None
    return _known(folder.read_config(str(file)), file)


def _candidates(source: str) -> Iterable[Path]:
    for path in (Path(source), Path(source) / "config.json", SHAPES / source / "config.json"):
        if path.is_file():
            yield path


def _known(config, where):
    family = FAMILIES.get(getattr(config, "model_type", None))
    if family is None or not family.causal:
        known = ", ".join(name for name, one in sorted(FAMILIES.items()) if one.causal)
        raise UserError(f"{where} is of no model that a plan can be made for: {known}")
    folder.check_sizes(config, where)
    return config
