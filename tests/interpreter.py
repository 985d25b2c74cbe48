"""Let Triton's interpreter run under numpy 2.4 and later; import before the first interpreted launch.

The interpreter turns run-time scalars (arrays of one element) into loop bounds with int(), which numpy 2.4 allows for
arrays of no dimensions only (seen with triton 3.6; TRITON_INTERPRET must be set before triton is imported).
"""

from triton.runtime import interpreter

_patch_lang_tensor = interpreter._patch_lang_tensor


def _patch_with_index(tensor, scope):
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._patch_lang_tensor = _patch_with_index
