"""The fast halves: the functions of nf4.py, double_quant.py and the 4-bit product in Triton, one file a kernel.

No imports here: Triton is loaded where a kernel is launched, and a machine without it never notices.
"""
