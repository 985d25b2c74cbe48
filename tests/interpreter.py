"""Two repairs to Triton's interpreter; import before the first interpreted launch (seen with triton 3.6).

It turns run-time scalars (arrays of one element) into loop bounds with int(), which numpy 2.4 allows for arrays of no
dimensions only. And it holds bfloat16 as 16-bit integers, which `tl.dot` then multiplies as such.

One difference from a GPU stays: float32 to bfloat16 truncates, an error of up to 2^-8 instead of 2^-9.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_patch_lang_tensor = interpreter._patch_lang_tensor
_create_dot = interpreter.InterpreterBuilder.create_dot


def _patch_with_index(tensor, scope):
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def _as_float32(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _dot_of_floats(self, a, b, d, *precision):
    return _create_dot(self, _as_float32(a), _as_float32(b), d, *precision)


interpreter._patch_lang_tensor = _patch_with_index
interpreter.InterpreterBuilder.create_dot = _dot_of_floats
