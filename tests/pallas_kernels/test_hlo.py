"""Instructions of optimized programs are counted as often as they run."""

from __future__ import annotations

import pytest

from pallas_kernels.hlo import collectives, executed

PROGRAM = """
HloModule jit_step

%add (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %s = bf16[] add(%a, %b)
}

%fused_psum.clone (p: bf16[16,8]) -> bf16[16,8] {
  %p = bf16[16,8]{1,0} parameter(0)
  ROOT %r = bf16[16,8]{1,0} all-reduce(%p), channel_id=1, to_apply=%add
}

%sliced (w: u8[80,64]) -> bf16[16,8] {
  %w = u8[80,64]{1,0} parameter(0)
  ROOT %k = bf16[16,8]{1,0} custom-call(%w), custom_call_target="mosaic_gpu_v2"
}

%layer (c: (s32[], bf16[16,8])) -> (s32[], bf16[16,8]) {
  %c = (s32[], bf16[16,8]{1,0}) parameter(0)
  %x = bf16[16,8]{1,0} get-tuple-element(%c), index=1
  %f = bf16[16,8]{1,0} fusion(%x), kind=kCustom, calls=%sliced
  %fs = ((bf16[16,8]{1,0}), bf16[16,8]{1,0}) fusion-start(%f), kind=kCustom, calls=%fused_psum.clone
  %fd = bf16[16,8]{1,0} fusion-done(%fs)
  %as = (bf16[16,8], bf16[16,8]) all-reduce-start(%fd), to_apply=%add
  %ad = bf16[16,8]{1,0} all-reduce-done(%as)
  ROOT %t = (s32[], bf16[16,8]{1,0}) tuple(%c, %ad)
}

%more (c: (s32[], bf16[16,8])) -> pred[] {
  %c = (s32[], bf16[16,8]{1,0}) parameter(0)
  ROOT %b = pred[] constant(true)
}

ENTRY %main (x: bf16[16,8]) -> bf16[16,8] {
  %x = bf16[16,8]{1,0} parameter(0)
  %t = (s32[], bf16[16,8]{1,0}) tuple(%x)
  %w = (s32[], bf16[16,8]{1,0}) while(%t), condition=%more, body=%layer, TRIPS
  %g = bf16[16,8]{1,0} get-tuple-element(%w), index=1
  %h = bf16[16,8]{1,0} fusion(%g), kind=kCustom, backend_config={"kind":"__triton_gemm"}
  ROOT %o = bf16[16,16]{1,0} all-gather(%h), dimensions={1}
}
"""
TRIPS = 'backend_config={"known_trip_count":{"n":"80"}}'


def test_loops_fusions_and_halves_of_asynchronous_operations():
    text = PROGRAM.replace("TRIPS", TRIPS)
    assert collectives(text) == {"all-reduce": 160, "all-gather": 1}
    assert executed(text)["mosaic_gpu_v2"] == 80
    assert executed(text)["triton gemm"] == 1


def test_a_loop_of_unknown_length_is_an_error():
    with pytest.raises(ValueError, match="unknown number"):
        executed(PROGRAM.replace("TRIPS", "metadata={}"))
