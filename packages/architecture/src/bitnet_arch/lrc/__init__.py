"""LRC: a low-rank correction of ternary layers that reads the unquantised input (Scetbon & Hensman, arXiv 2412.07902).

`lrc.adapters` is the arithmetic of the adapters, `lrc.covariance` what calibration measures, `lrc.solve` the solvers as pure
functions, `lrc.model` what runs them over a model, `lrc.files` the adapters' own file. The layers are
`bitnet_arch.bitlinear.BitLinearLRC` and `bitnet_arch.packed.PackedBitLinearLRC`.
"""
