"""Two repairs to Triton's interpreter; import before the first interpreted launch (seen with triton 3.6).

It turns run-time scalars (arrays of one element) into loop bounds with int(), which numpy 2.4 allows for arrays of no
dimensions only. And its `tl.fma` rounds the product.

One difference from a GPU stays: float32 to bfloat16 truncates, an error of up to 2^-8 instead of 2^-9.
"""

import numpy as np
from triton.runtime import interpreter

_patch_lang_tensor = interpreter._patch_lang_tensor


def _patch_with_index(tensor, scope):
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def _fma(self, x, y, z):
    product = x.data.astype(np.float64) * y.data  # exact
    total = product + z.data
    z_part = total - product
    lost = (product - (total - z_part)) + (z.data - z_part)
    # An inexact sum is rounded to its odd neighbour, so that the second rounding, to float32, sees no false tie.
    even = total.view(np.int64) % 2 == 0
    total = np.where(even & (lost != 0), np.nextafter(total, np.copysign(np.inf, lost)), total)
    return interpreter.TensorHandle(total.astype(np.float32), z.dtype.scalar)


interpreter._patch_lang_tensor = _patch_with_index
interpreter.InterpreterBuilder.create_fma = _fma
