"""Compile every kernel for a GPU, without one: the interpreter accepts Python that the compiler does not.

python -m tests.helpers.compile_kernels    # prints the names of the kernels

Host functions run on CPU tensors; each launch is compiled for sm_90 with the types it was given, and not run.
"""

from dataclasses import replace
from functools import partial

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from hyclora.operators import cross_entropy, layer_norm, norm
from hyclora.operators.attention import attention, fused_qkv, rope, softmax
from hyclora.operators.linear import dropout, low_rank, low_rank_grad, nf4, residual
from hyclora.operators.mlp import activation, fused_gelu, fused_mlp
from hyclora.operators.packing import quantize
from hyclora.operators.packing.codebook import CODEBOOKS, GROUP
from hyclora.operators.savers import ChannelQuant, Step, measure
from tests.operators.attention.test_fused_qkv import BATCH
from tests.operators.attention.test_fused_qkv import prepare as prepare_qkv
from tests.operators.mlp.test_fused_gelu import prepare as prepare_gelu
from tests.operators.mlp.test_fused_mlp import prepare as prepare_mlp

MODULES = (
    activation, attention, cross_entropy, dropout, fused_gelu, fused_mlp, fused_qkv, layer_norm, low_rank,
    low_rank_grad, measure, nf4, norm, quantize, residual, rope, softmax,
)  # fmt: skip
TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.uint8: "*u8", torch.int16: "*i16",
    torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
BF16 = torch.bfloat16


def compile_launch(kernel, args, kwargs) -> None:
    """What a launch on a GPU would compile: integers that are 1 or divisible by 16 are specialised, as Triton does."""
    names = [p.name for p in kernel.params]
    values = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value, fixed = values[parameter.name], parameter.do_not_specialize
        aligned = False
        if parameter.is_constexpr or (isinstance(value, int) and value == 1 and not fixed):
            signature[parameter.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], aligned = TYPES[value.dtype], value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name], aligned = "i32", value % 16 == 0 and not fixed
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {k: v for k, v in kwargs.items() if k in ("num_warps", "num_stages")}
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def rand(*shape, dtype=BF16):
    return torch.randn(*shape).to(dtype)


def saver(bits, x, outliers=0.0):
    """A calibrated quantizer."""
    saver = ChannelQuant(bits, "channel_group", outliers)
    saver.prepare(x, Step(1, 1))
    return saver, Step(threshold=0, index=1)


def elementwise():
    x = rand(32, 256)
    activation.silu_mul_bwd(x, activation.silu_mul_fwd(x, x), x)
    activation.gelu_bwd(x, activation.gelu_fwd(x))
    activation.silu_mul_bwd_(x.clone(), *rand(32, 512).chunk(2, dim=1))
    activation.gelu_bwd_(x.clone(), rand(32, 256))
    softmax.softmax_bwd(rand(2, 2, 16, 16), rand(2, 2, 16, 16))
    q, k, cos = rand(2, 16, 4, 64), rand(2, 16, 2, 64), rand(1, 16, 64)
    rope.rope(q, cos, cos)
    rope.rope_bwd(q, k, k, cos, cos)
    norms = [rope.HeadNorm(rand(64), 1e-6, x.flatten(2).flatten(0, 1)) for x in (q, k)]
    rope.rope(q, cos, cos, norm=norms[0])
    rope.rope_bwd(q, k, k, cos, cos, norms=norms)
    cross_entropy.cross_entropy_(rand(4, 1000), torch.zeros(4, dtype=torch.int64))
    for xa, B in ((rand(16, 16), rand(256, 16)), (None, None)):
        residual.add_residual(rand(16, 256), xa, B, rand(16, 256), overwrite=True)
    for dtype in (BF16, torch.float32):
        dy, xa, B = (rand(*shape, dtype=dtype) for shape in ((32, 304), (32, 48), (304, 48)))
        low_rank_grad.low_rank_grads(dy, xa, B, [256, 32, 16], [16, 16, 16], xa)
    for dtype, width in ((BF16, 256), (torch.float32, 300)):
        x, seed = rand(32, width, dtype=dtype), torch.zeros(1, dtype=torch.int64)
        dropout.add_dropped(dropout.dropped(x, seed, 0, 0.1), x, seed, 1, 0.1)
    for dtype in (BF16, torch.float32):
        measure.measure(rand(32, 96, dtype=dtype), None)
    adapters = [(rand(8, 64, dtype=torch.float32), rand(96, 8, dtype=torch.float32)), None]
    low_rank.stack_adapters(adapters, [1.0, 2.0], [96, 32], BF16)
    weight = nf4.bnb.nn.Params4bit(rand(64, 64), requires_grad=False, quant_type="nf4").to("cpu")
    nf4.dequantize_4bit(weight, torch.empty(64, 64, dtype=BF16))


def quantizers(rule, bits, group=GROUP):
    x, book = rand(32, 300), replace(CODEBOOKS[rule][bits], group=group)
    mean, std = torch.zeros(300), torch.ones(300)
    quantize.dequantize(*quantize.quantize(x, mean, std, book), mean, std, book, BF16)


def layer_norms(p):
    weight, seed = rand(768), torch.zeros(1, dtype=torch.int64)
    for dtype in (BF16, torch.float32):
        x, residual = rand(16, 768), rand(16, 768, dtype=dtype)
        y, x_hat, rstd = layer_norm.layer_norm_fwd(x, residual, weight, weight, 1e-5, seed, p)
        layer_norm.layer_norm_bwd(y, x_hat, rstd, weight, seed, p, BF16)
        for bits in (3, 4):
            quantizer, step = saver(bits, x_hat, 0.01)
            packed = layer_norm.layer_norm_pack(x, residual, weight, weight, 1e-5, quantizer, seed, p, dtype)[-1]
            layer_norm.layer_norm_unpack_bwd(y, rstd, weight, packed, quantizer.book, seed, p, BF16)


def norms(bits):
    x, weight = rand(16, 512), rand(512)
    _, x_hat, rstd = norm.rms_norm_fwd(x, weight, 1e-5)
    norm.rms_norm_bwd(x, x_hat, rstd, weight)
    norm.rms_norm_bwd(x, x_hat, rstd, weight, x)
    quantizer, step = saver(bits, x, 0.01)
    packed = norm.rms_norm_pack(x, weight, 1e-5, quantizer, step)[-1]
    norm.rms_norm_unpack_bwd(x, rstd, weight, packed, quantizer.book)
    for dtype in (BF16, torch.float32):
        norm.rms_norm_unpack_bwd(x, rstd, weight, packed, quantizer.book, x.to(dtype))
    quantizer.unpack(quantizer.pack(x, step), x.shape, BF16, weight)


def gelu(bits, group=GROUP):
    spec, frozen, adapters, keeper = prepare_gelu(32, 256, bits, 8, BF16, group=group)
    kept = keeper()
    fused_gelu.fused_gelu_fwd(spec, frozen, adapters, kept)
    fused_gelu.fused_gelu_bwd(spec, rand(32, 256), (rand(32, 16), rand(16, 256)), adapters, kept)


def mlp(bits, group=GROUP):
    spec, frozen, adapters, keeper = prepare_mlp(32, 256, bits, 8, BF16, group=group)
    kept = keeper()
    fused_mlp.fused_mlp_fwd(spec, frozen, adapters, kept)
    fused_mlp.fused_mlp_bwd(spec, rand(32, 256), (rand(32, 16), rand(16, 256)), adapters, kept)


def qkv(bits, norms=False):
    spec, y, adapters, cos, sin, keeper = prepare_qkv(bits, BF16, norms=norms)
    kept = keeper()
    fused_qkv.fused_qkv_fwd(spec, y, cos, sin, BATCH, adapters, kept)
    slots = fused_qkv.packed_qkv(kept)
    if not norms:
        unrotated = keeper()
        fused_qkv.fused_qkv_fwd(spec, y, None, None, BATCH, adapters, unrotated)
        again = fused_qkv.packed_qkv(unrotated)
        fused_qkv.fused_qkv_restore(spec, again, None, None, BATCH, BF16, adapters, unrotated)
    for rotate in (True, False):
        fused_qkv.fused_qkv_restore(spec, slots, cos, sin, BATCH, BF16, adapters, kept, rotate)


def main():
    names = set()

    def run(kernel, *args, grid, warmup, **kwargs):
        compile_launch(kernel, args, kwargs)
        names.add(kernel.fn.__name__)

    JITFunction.run = run
    for module in MODULES:
        if hasattr(module, "use_triton"):
            module.use_triton = lambda x: True
    elementwise()
    for bits in (2, 3, 4, 8):
        quantizers("channel_group", bits)
        mlp(bits)
        gelu(bits)
    for kernels in (partial(quantizers, "channel_group"), mlp, gelu):
        kernels(2, group=2 * GROUP)
    quantizers("paper", 4)
    layer_norms(0.0)
    layer_norms(0.1)
    norms(3)
    norms(4)
    qkv((4, 4, 4))
    qkv((3, 8, 2))
    qkv((4, 4, 4), norms=True)
    print(*sorted(names))


if __name__ == "__main__":
    main()
