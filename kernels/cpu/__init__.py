"""The kernels for CPUs: C files for x86 with AVX2 and 64-bit Arm, and their Python callers.

`cpu_kernels` loads the extension module and wraps each of its functions. `cpu_attention` and
`cpu_linear` build attention and linear layers on it.
"""
