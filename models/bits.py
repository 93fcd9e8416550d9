"""How many bits each slot of each layer gets: q_bit, more where groups pay for it, or q_bit=auto within an average.

q_bit=auto: quantization noise of b bits is about NOISE[b] of a slot's variance, and it costs gradient accuracy in
proportion to the slot's SENSITIVITY: 1 - mean cosine of the LoRA gradients with that slot alone at 2 bit, averaged over
the three models of `python -m benchmarks.fidelity --slots 2` (benchmarks/results/fidelity.jsonl); k stands out in the
only one that was pretrained at length. norm_in is half of both norms and of the linear inputs derived from them;
attn_in and mlp_in are half of their sum; act, hidden and attn_out were not measured and count as linear inputs.
Starting from 2 bit, the upgrade that saves most error per added bit is taken until the budget is used.

WIDER: where heads share a k, it decides (benchmarks/NOTES.md, Quantizers), and has few channels. Its bits are taken
from the scales of slots that notice it least, by larger groups: in layers where these free as many bits as it takes, so
that no layer keeps more for it. They do not where each head has its own k, nor where a last group would be half empty.
"""

import heapq
from collections.abc import Callable

from hyclora.operators.packing.codebook import GROUP

NOISE = {2: 0.123, 3: 0.0315, 4: 0.0078, 8: 3e-5}
SENSITIVITY = {
    "norm_in": 0.0071, "attn_in": 0.0058, "mlp_in": 0.0058, "q": 0.031, "k": 0.077, "v": 0.014, "attn_out": 0.0058,
    "gate": 0.029, "up": 0.017, "act": 0.0058, "hidden": 0.0058,
}  # fmt: skip

WIDER = {2: {"k": 4}}  # by q_bit: the slots that are wider, their bits
PAYING = {"gate": 128, "up": 128}  # channels of a group, in a layer with wider slots
PackedBits = Callable[[int, int, int], float]


def widened(widths: dict[str, int], wider: dict[str, int], q_bit: int, packed_bits: PackedBits) -> tuple[dict, dict]:
    """Bits of the slots of a layer that are wider than q_bit, and the groups that pay for them: both by slot, or empty.

    widths: elements a token of the layer's slots; wider: what WIDER says of those that are quantized;
    packed_bits(width, bits, group): what a token of a slot costs, scales included.
    """
    wider = {slot: bits for slot, bits in wider.items() if slot in widths}
    if not wider:
        return {}, {}
    groups = {slot: group for slot, group in PAYING.items() if slot in widths}

    def more(slot: str, bits: int = q_bit, group: int = GROUP) -> float:
        """What a slot costs, less what it does at q_bit in groups of the usual size."""
        return packed_bits(widths[slot], bits, group) - packed_bits(widths[slot], q_bit, GROUP)

    saved = -sum(more(slot, group=group) for slot, group in groups.items())
    is_paid = sum(more(slot, bits=bits) for slot, bits in wider.items()) <= saved
    return (wider, groups) if is_paid else ({}, {})


def allocate_bits(
    sizes: dict[tuple, int], average_bits: float, packed_bits: Callable[[tuple, int], float]
) -> dict[tuple, int]:
    """Bits of each slot, keyed like sizes: (..., slot name) -> elements a token.

    packed_bits(key, width) is what a token of that slot costs, scales and exact channels included; the sum over slots
    is at most average_bits an element. ValueError if that is below the smallest possible. Host work, no tensors.
    """
    widths = sorted(NOISE)
    elements = sum(sizes.values())
    lowest = sum(packed_bits(key, widths[0]) for key in sizes)
    if average_bits * elements < lowest:
        raise ValueError(
            f"average_bits={average_bits} is below {lowest / elements:.3f}, what 2-bit codes, scales and exact "
            "channels of this model need"
        )
    bits = dict.fromkeys(sizes, widths[0])
    budget = average_bits * elements - lowest
    keys = list(sizes)

    def upgrade(index):
        key = keys[index]
        wider = widths[widths.index(bits[key]) + 1 :]
        if not wider:
            return None
        gain = SENSITIVITY[key[-1]] * (NOISE[bits[key]] - NOISE[wider[0]])
        cost = packed_bits(key, wider[0]) - packed_bits(key, bits[key])
        return -gain / cost, index, wider[0], cost

    heap = [upgrade(index) for index in range(len(keys))]
    heapq.heapify(heap)
    while heap:
        _, index, width, cost = heapq.heappop(heap)
        if cost > budget:
            continue
        budget -= cost
        bits[keys[index]] = width
        if (following := upgrade(index)) is not None:
            heapq.heappush(heap, following)
    return bits
