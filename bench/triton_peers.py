"""CCE, Liger and TRL kernels where no GPU is: what each needs to run in Triton's interpreter.

Nothing of theirs is edited; functions that ask for a driver or a CUDA device are replaced before
the first call. A package that is not installed is left out.
"""

import importlib.util
import inspect

import numpy as np
import torch


def available() -> dict:
    """{name: loss(x_TH, w_VH, y_T) -> mean cross entropy} of the installed packages."""
    found = {}
    if importlib.util.find_spec("cut_cross_entropy"):
        found["CCE"] = cce()
        found["CCE, no filter"] = cce(filter_eps=None)
    if importlib.util.find_spec("liger_kernel"):
        found["Liger"] = liger()
    if importlib.util.find_spec("trl"):
        found["TRL chunked"] = trl()
    return found


def interpret() -> None:
    """Repairs that only other people's kernels need."""
    import triton.language as tl
    from triton.language.extra import libdevice
    from triton.runtime import interpreter

    def elementwise(function):
        def apply(x, *_, **__):
            data = function(x.handle.data).astype(x.handle.data.dtype)
            return tl.tensor(interpreter.TensorHandle(data, x.handle.dtype), x.type)

        return apply

    functions = {"tanh": np.tanh, "log1p": np.log1p, "exp": np.exp, "expm1": np.expm1}
    for name, function in functions.items():
        setattr(libdevice, name, elementwise(function))

    convert = interpreter._implicit_cvt

    def fp32_scalars(value):
        """A Python float argument is an fp32 scalar on a GPU; here it would stay a float."""
        if type(value) is not float:
            return convert(value)
        handle = interpreter.TensorHandle(np.array([value], np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    interpreter._implicit_cvt = fp32_scalars
    _fast_all(interpreter)


def _fast_all(interpreter) -> None:
    """CCE's reduction of booleans, in one numpy call instead of one per element."""
    import triton.language as tl

    apply_impl = interpreter.ReduceOps.apply_impl

    def apply(self, value):
        combine = getattr(self.combine_fn, "fn", self.combine_fn)
        if getattr(combine, "__name__", "") != "tl_and_reduce_fn":
            return apply_impl(self, value)
        result = np.all(value[0].handle.data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(result, tl.int1)

    interpreter.ReduceOps.apply_impl = apply


def cce(**options):
    import cut_cross_entropy as package
    from cut_cross_entropy import cce as module

    module.sort_logit_avg = lambda average: torch.argsort(average).to(torch.int32)
    return lambda x, w, y: package.linear_cross_entropy(x, w, y, impl="cce", **options)


def liger():
    """Liger asks whether tensors are on "cuda" and else takes a slow path for dW: ask for "cpu"."""
    from liger_kernel.ops import fused_linear_cross_entropy as module

    source = inspect.getsource(module)
    for old, new in {
        'device.type == "cuda"': 'device.type == "cpu"',
        'device.type != "cuda"': 'device.type != "cpu"',
        "torch.cuda.get_device_capability(grad_weight.device)[0]": "9",
        'torch.get_autocast_dtype("cuda")': 'torch.get_autocast_dtype("cpu")',
    }.items():
        source = source.replace(old, new)
    exec(compile(source, module.__file__, "exec"), module.__dict__)
    function = module.LigerFusedLinearCrossEntropyFunction

    def loss(x, w, y):
        out = function.apply(x, w, y)
        return out[0] if isinstance(out, tuple) else out

    return loss


def trl():
    from trl.kernels import chunked_logprob as module

    module._use_triton = lambda device: True
    size = 32768  # columns of the vocabulary, as its trainers pass

    def loss(x, w, y):
        out = module.ChunkedLogProbFunction.apply(x, w, None, y, 1.0, size, None, 1.0, ())
        return -out[0].mean()

    return loss
