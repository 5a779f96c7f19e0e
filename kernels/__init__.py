"""The fast halves: quantization, the 4-bit product, and what stands between products, in Triton; one file a task.

No imports here: Triton is loaded where a kernel is launched, and a machine without it never notices.

**Triton in one example.** y = 2 x for n values:

    @triton.jit                                                       # compiled for the GPU at the first launch
    def double(x, y, n, BLOCK: tl.constexpr):                         # constexpr: known when compiling, one compilation a value
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)            # (BLOCK,) which values are mine
        values = tl.load(x + i, mask=i < n, other=0)                  # (BLOCK,)
        tl.store(y + i, 2 * values, mask=i < n)

    double[triton.cdiv(n, 1024),](x, y, n, BLOCK=1024)                # ceil(n / 1024) programs

A kernel is written for one *program*; a launch starts a grid of them, in no order, and `tl.program_id` tells each which part of the
work is its own. A tensor argument arrives as a *pointer*, the address of its first value: shape and strides are lost, and x + i
is the addresses of the values i. Value (r, c) of a matrix with contiguous rows lies at x + r * row_length + c, so a tile of a matrix is
`x + rows[:, None] * row_length + columns[None, :]`, broadcast as in PyTorch. What is loaded is a small tensor, a *tile*, whose sides
are powers of two. It rarely fits the work exactly; the *mask* says which positions exist, `other` what stands in for the rest.

A tile is spread over the registers of the program's threads. 32 threads make a *warp*, the *lanes* of which act in lockstep; `num_warps`
says how many a program has. Lanes of a warp hand values to each other (a shuffle); warps of a program meet in *shared memory*, some 200 KB
on each of the GPU's *multiprocessors*, at a barrier. How many programs a multiprocessor runs at a time depends on the registers and the
shared memory that one takes; while one waits for memory, another computes.

Words that come back: indices are 32-bit integers, so a row's number is made int64 before it meets a stride. `p.dtype.element_ty` is the
type that p points to. `tl.dot` multiplies tiles on the matrix unit. `tl.range(..., num_stages=3)` starts the loads of later rounds early.
Triton compiles anew for an integer that is 1 or a multiple of 16; `do_not_specialize` forbids it for those that change with every batch.
An argument that is None is known when compiling. *Over rotating weights*, in a table of times: each call reads another copy, so that
none is in the cache already.

**In which order to read.** In each file the kernels come first, and then what launches them.

    dequantize_4bit.py      first: codes to values. Bytes in, look-up, one product, values out
    quantize_4bit.py        values to codes, with a search that costs one comparison
    double_quant.py         the same for absmax, in 8 bits
    matmul_4bit.py          which of the following multiplies, and the gradient; PyTorch alone
    few_rows.py             a product that decodes its weight on the way
    pair_table.py           a byte to two weights by one read
    few_rows_mma.py         the product for 1 to 8 rows, lane by lane, in Gluon: Triton where one says which lane holds what
    few_rows_wgmma.py       for 9 to 128 rows
    layer_norm.py, gelu.py, rotary.py, dropout.py, copy_columns.py      between the products of a training step, the shortest last
    cross_entropy.py        the loss after them
    decode.py, decode_attention.py      between the products of a decode step
"""
