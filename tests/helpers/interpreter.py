"""Triton's interpreter without what it does for nothing, which took two thirds of its time."""

import gc
from dataclasses import replace
from functools import cache

import triton
import triton.language as tl
from triton.runtime import interpreter


def hasten() -> None:
    """For this process, and to the same results: the language is patched once a launch and not at every call of a
    kernel's function, integers are not added a second time for an assertion that is switched off, and what a type says
    (its name in numpy, a block's size, the shape of its tensors) is found once. Other versions than 3.7, whose inner
    functions these are, stay as they are.
    """
    if not triton.__version__.startswith("3.7."):
        return
    builder, patch, np_dtype = interpreter.interpreter_builder, interpreter._patch_lang, interpreter._get_np_dtype
    make_block, make_tensor, launch = tl.block_type.__init__, tl.tensor.__init__, interpreter.GridExecutor.__call__
    np_dtypes, blocks, tensors = {}, {}, {}

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

    def known_block(self, element_ty, shape):
        key = (element_ty.name, *map(tl.core._unwrap_if_constexpr, shape))
        if key not in blocks:
            make_block(self, element_ty, shape)
            blocks[key] = vars(self).copy()
        vars(self).update(blocks[key])

    def known_tensor(self, handle, type):
        if type.name not in tensors:
            make_tensor(self, handle, type)
            tensors[type.name] = vars(self) | {"handle": None}
        vars(self).update(tensors[type.name], handle=handle)

    def launch_and_forget(self, *args, **kwargs):
        launch(self, *args, **kwargs)
        gc.collect(0)  # its functions that call themselves hold the tensors, and nothing else is now collected so soon

    interpreter.GridExecutor.__call__ = launch_and_forget
    interpreter._patch_lang, interpreter._get_np_dtype = patch_once, known_np_dtype
    tl.block_type.__init__, tl.tensor.__init__ = known_block, known_tensor
    if not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)
