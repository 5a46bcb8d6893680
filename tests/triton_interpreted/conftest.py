"""These tests run the kernels in Triton's interpreter, which cannot share a process with the
compiler: `tests/redi_kernels/test_triton.py` runs them in one of their own.

    TRITON_INTERPRET=1 python -m pytest tests/triton_interpreted
"""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter

    interpreter.install()
else:
    collect_ignore_glob = ["*"]
