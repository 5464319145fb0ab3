"""The machine for Ascend: what a small program does wrong is a Fault, and what it does right has a known result."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from machines.ascend import operations
from machines.ascend.machine import Machine
from machines.ascend.program import parse
from machines.memory import Fault
from machines.numbers import Unknown

KERNEL = """
module {{
  func.func @kernel(%arg0: memref<?xi8>, %arg1: memref<?xi8>, %arg2: memref<?xi32> {{tt.divisibility = 16 : i32}}, \
%arg3: memref<?xi32>, %arg4: i32, %arg5: i32, %arg6: i32, %arg7: i32, %arg8: i32, %arg9: i32, %arg10: i32) \
attributes {{global_kernel = "local"}} {{
    %c0 = arith.constant 0 : index
    %c4 = arith.constant 4 : index
    %c4_i32 = arith.constant 4 : i32
    %zero = arith.constant 0 : i32
    %at = arith.muli %arg8, %c4_i32 : i32
    %place = arith.index_cast %at : i32 to index
    %in = memref.reinterpret_cast %arg2 to offset: [%place], sizes: [4], strides: [1] \
: memref<?xi32> to memref<4xi32, strided<[1], offset: ?>>
    %out = memref.reinterpret_cast %arg3 to offset: [%place], sizes: [4], strides: [1] \
: memref<?xi32> to memref<4xi32, strided<[1], offset: ?>>
    %alloc = memref.alloc() : memref<4xi32>
    {body}
    return
  }}
}}
"""
WHOLE = """
    memref.copy %in, %alloc : memref<4xi32, strided<[1], offset: ?>> to memref<4xi32>
    %x = bufferization.to_tensor %alloc restrict writable : memref<4xi32>
    bufferization.materialize_in_destination %x in writable %out : (tensor<4xi32>, memref<4xi32>) -> ()
"""
# As a mask of the first %arg4 elements should be.
WINDOW = """
    %n = arith.index_cast %arg4 : i32 to index
    %part = arith.minsi %n, %c4 : index
    %short = arith.cmpi slt, %part, %c4 : index
    scf.if %short {
      linalg.fill ins(%zero : i32) outs(%alloc : memref<4xi32>)
    } {hivm.unlikely_condition}
    %from = memref.subview %in[0] [%part] [1] : memref<4xi32> to memref<?xi32>
    %into = memref.subview %alloc[0] [%part] [1] : memref<4xi32> to memref<?xi32>
    memref.copy %from, %into : memref<?xi32> to memref<?xi32>
    %x = bufferization.to_tensor %alloc restrict writable : memref<4xi32>
    %y = arith.addi %x, %x : tensor<4xi32>
    %slice = tensor.extract_slice %y[0] [%part] [1] : tensor<4xi32> to tensor<?xi32>
    %to = memref.subview %out[0] [%part] [1] : memref<4xi32> to memref<?xi32>
    bufferization.materialize_in_destination %slice in writable %to : (tensor<?xi32>, memref<?xi32>) -> ()
"""


def run(body: str, programs: int = 2, size: int = 8, count: int = 4) -> torch.Tensor:
    """Of programs that each have four int32 to read, 1, 2, …, and four to write, of `size` in all."""
    x, out = torch.arange(1, 1 + size, dtype=torch.int32), torch.zeros(size, dtype=torch.int32)
    Machine(parse(KERNEL.format(body=body)), [x, out, count]).launch((programs,))
    return out


def test_a_copy():
    assert run(WHOLE).tolist() == [1, 2, 3, 4, 5, 6, 7, 8]


def test_windows_leave_the_rest():
    assert run(WINDOW, count=3).tolist() == [2, 4, 6, 0, 10, 12, 14, 0]
    assert run(WINDOW, size=7, count=3).tolist() == [2, 4, 6, 0, 10, 12, 14]


def test_what_lies_outside_of_every_tensor_is_a_fault():
    with pytest.raises(Fault, match=r"outside of every tensor, in memref\.copy"):
        run(WHOLE, size=7)
    with pytest.raises(Fault, match="outside of every tensor"):
        run(WHOLE, programs=3)
    with pytest.raises(Fault, match="a window of 5 elements from 0 on, in one of 4"):
        run("%w = memref.subview %in[0] [5] [1] : memref<4xi32> to memref<5xi32>")


def test_what_two_programs_touch_is_a_fault():
    at_zero = WHOLE.replace("%out :", "%same :")
    window = "%same = memref.reinterpret_cast %arg3 to offset: [%c0], sizes: [4], strides: [1] : memref<?xi32> to x"
    with pytest.raises(Fault, match="writes what another program wrote"):
        run(window + at_zero)
    # A masked store that reads and writes back what the mask leaves: another program's, two elements further on.
    back = """
    %two = arith.constant 2 : i32
    %near = arith.muli %arg8, %two : i32
    %there = arith.index_cast %near : i32 to index
    %block = memref.reinterpret_cast %arg3 to offset: [%there], sizes: [4], strides: [1] : memref<?xi32> to x
    memref.copy %block, %alloc : memref<4xi32> to memref<4xi32>
    %x = bufferization.to_tensor %alloc restrict writable : memref<4xi32>
    bufferization.materialize_in_destination %x in writable %block : (tensor<4xi32>, memref<4xi32>) -> ()
    """
    with pytest.raises(Fault, match="reads what another program wrote"):
        run(back)
    read_only = WHOLE.replace("copy %in", "copy %all")
    shared = (
        "%all = memref.reinterpret_cast %arg2 to offset: [%c0], sizes: [4], strides: [1] : memref<?xi32> to x"
    )
    assert run(shared + read_only).tolist() == [1, 2, 3, 4] * 2


def test_buffers_hold_no_zeros_before_they_are_written():
    body = """
    %x = bufferization.to_tensor %alloc restrict writable : memref<4xi32>
    bufferization.materialize_in_destination %x in writable %out : (tensor<4xi32>, memref<4xi32>) -> ()
    """
    assert run(body).tolist() == [int.from_bytes(b"\xa5" * 4, "little", signed=True)] * 8


def test_loops_and_conditions():
    body = """
    %start = linalg.fill ins(%zero : i32) outs(%e : tensor<4xi32>) -> tensor<4xi32>
    %sums:2 = scf.for %i = %zero to %arg4 step %one iter_args(%a = %start, %b = %zero) -> (tensor<4xi32>, i32)  : i32 {
      %odd = arith.remsi %i, %two : i32
      %is = arith.cmpi eq, %odd, %one : i32
      %add = scf.if %is -> (i32) {
        scf.yield %i : i32
      } else {
        scf.yield %zero : i32
      }
      %more = arith.addi %b, %add : i32
      %filled = linalg.fill ins(%more : i32) outs(%e : tensor<4xi32>) -> tensor<4xi32>
      %next = arith.addi %a, %filled : tensor<4xi32>
      scf.yield %next, %more : tensor<4xi32>, i32
    }
    %places = linalg.generic {indexing_maps = [#map], iterator_types = ["parallel"]} outs(%e : tensor<4xi32>) {
    ^bb0(%o: i32):
      %place0 = linalg.index 0 : index
      %as = arith.index_cast %place0 : index to i32
      linalg.yield %as : i32
    } -> tensor<4xi32>
    %x = arith.addi %sums#0, %places : tensor<4xi32>
    %least = arith.constant -2147483648 : i32
    %none = bufferization.alloc_tensor() : tensor<i32>
    %low = linalg.fill ins(%least : i32) outs(%none : tensor<i32>) -> tensor<i32>
    %top = linalg.reduce ins(%x : tensor<4xi32>) outs(%low : tensor<i32>) dimensions = [0]
      (%in0: i32, %init: i32) {
        %m = arith.maxsi %in0, %init : i32
        linalg.yield %m : i32
      }
    %value = tensor.extract %top[] : tensor<i32>
    %last = tensor.insert %value into %x[%c0] : tensor<4xi32>
    bufferization.materialize_in_destination %last in writable %out : (tensor<4xi32>, memref<4xi32>) -> ()
    """
    constants = (
        "%one = arith.constant 1 : i32\n%two = arith.constant 2 : i32\n%e = tensor.empty() : tensor<4xi32>\n"
    )
    # 0 + 1 + 1 + 4 + 4, and its place; the first is the largest.
    assert run(constants + body, count=5).tolist() == [13, 11, 12, 13] * 2


def test_products_reductions_and_turned_tensors():
    a, b = np.arange(6, dtype=np.int8).reshape(2, 3), np.arange(12, dtype=np.int8).reshape(3, 4)
    whole = operations.product(a, b, np.ones((2, 4), np.int32))
    assert whole.dtype == np.int32 and (whole == a.astype(int) @ b.astype(int) + 1).all()
    assert operations.reduced("arith.addi", a.astype(np.int32), np.zeros(2, np.int32), (1,)).tolist() == [
        3,
        12,
    ]


def test_numbers():
    assert operations.BINARY["arith.divsi"](np.array(-7), np.array(2)) == -3
    assert operations.BINARY["arith.remsi"](np.array(-7), np.array(2)) == -1
    assert operations.cast("arith.extui", np.array([-1], np.int8), np.int32).tolist() == [255]
    # 1 + 2⁻²³ squared, less 1: the product has 48 bits, of which a float32 would keep 24.
    x = np.array([1 + 2**-23], np.float32)
    assert operations.TERNARY["math.fma"](x, x, -np.ones(1, np.float32))[0] == 2**-22 + 2**-46
    # 2⁻⁷⁰ below the tie between 1 + 2⁻²³ and the next: a float64 would be the tie, and go up.
    small, large, odd = (np.array([y], np.float32) for y in (2**-12 - 2**-35, 2**-12 + 2**-35, 1 + 2**-23))
    assert operations.TERNARY["math.fma"](small, large, odd) == odd
    with pytest.raises(Fault, match="a float that no int8 is"):
        operations.cast("arith.fptosi", np.array([128.0]), np.int8)
    with pytest.raises(Fault, match="a division by zero"):
        operations.BINARY["arith.divsi"](np.array(1), np.array(0))


def test_what_it_does_not_know_is_an_error():
    with pytest.raises(Unknown, match=r"linalg\.conv"):
        run("%x = linalg.conv_2d ins(%in, %in : x, x) outs(%in : x) -> x")
    with pytest.raises(Fault, match="takes 3 arguments, found 1"):
        Machine(parse(KERNEL.format(body="")), [1]).launch((1,))
