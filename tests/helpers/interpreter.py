"""Triton's interpreter without what it does for nothing, which took two thirds of its time."""

import gc
from dataclasses import replace
from functools import cache

import triton
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

PLAIN = {tl.tensor, int, float, bool}


def hasten() -> None:
    """For this process, and to the same results: the language is patched once a launch and not at every call of a
    kernel's function, integers are not added a second time for an assertion that is switched off, and what a type says
    (its name in numpy, a block's size, the shape of its tensors, which others an operation takes beside it as they are)
    is found once. Other versions than 3.7, whose inner functions these are, stay as they are.
    """
    if not triton.__version__.startswith("3.7."):
        return
    builder, patch, np_dtype = interpreter.interpreter_builder, interpreter._patch_lang, interpreter._get_np_dtype
    make_block, make_tensor, launch = tl.block_type.__init__, tl.tensor.__init__, interpreter.GridExecutor.__call__
    alike, broadcast = TritonSemantic.binary_op_type_checking_impl, TritonSemantic.broadcast_impl_value
    np_dtypes, blocks, tensors, taken, shared = {}, {}, {}, set(), set()
    unwrap = tl.core._unwrap_if_constexpr

    @cache
    def languages(fn) -> list:
        return [value for value in fn.__globals__.values() if value is tl or value is tl.core]

    def patch_once(fn):
        done = not any(tl.core.is_builtin(language.load) for language in languages(fn))
        return interpreter._LangPatchScope() if done else patch(fn)

    def known_np_dtype(dtype):
        name = dtype.scalar.name
        if name not in np_dtypes:
            np_dtypes[name] = np_dtype(dtype)
        return np_dtypes[name]

    def unwrap_at_once(o):
        return o.value if o.__class__ is tl.constexpr else o if o.__class__ in PLAIN else unwrap(o)

    def known_block(self, element_ty, shape):
        sizes = shape.values if shape.__class__ is tl.tuple else shape
        key = (element_ty.name, *[size.value if size.__class__ is tl.constexpr else size for size in sizes])
        if key not in blocks:
            make_block(self, element_ty, shape)
            blocks[key] = vars(self).copy()
        vars(self).update(blocks[key])

    def known_tensor(self, handle, type):
        if type.name not in tensors:
            make_tensor(self, handle, type)
            tensors[type.name] = vars(self) | {"handle": None}
        vars(self).update(tensors[type.name], handle=handle)

    def known_alike(self, lhs, rhs, *args, **kwargs):
        if lhs.__class__ is not tl.tensor or rhs.__class__ is not tl.tensor:
            return alike(self, lhs, rhs, *args, **kwargs)
        key = (lhs.type.name, rhs.type.name, args, *kwargs.items())
        if key in taken:
            return lhs, rhs
        made = alike(self, lhs, rhs, *args, **kwargs)
        if made[0] is lhs and made[1] is rhs:
            taken.add(key)
        return made

    def known_broadcast(self, lhs, rhs):
        key = lhs.type.name, rhs.type.name
        if key in shared:
            return lhs, rhs
        made = broadcast(self, lhs, rhs)
        if made[0] is lhs and made[1] is rhs:
            shared.add(key)
        return made

    def launch_and_forget(self, *args, **kwargs):
        launch(self, *args, **kwargs)
        gc.collect(0)  # its functions that call themselves hold the tensors, and nothing else is now collected so soon

    interpreter.GridExecutor.__call__ = launch_and_forget
    tl.core._unwrap_if_constexpr = unwrap_at_once
    interpreter._patch_lang, interpreter._get_np_dtype = patch_once, known_np_dtype
    TritonSemantic.binary_op_type_checking_impl, TritonSemantic.broadcast_impl_value = known_alike, known_broadcast
    tl.block_type.__init__, tl.tensor.__init__ = known_block, known_tensor
    if not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)
