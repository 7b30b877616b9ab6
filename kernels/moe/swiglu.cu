// swiglu, moe_combine: the shared expert's activation, and the sum over a token's experts.
//
// Source   `Expert.forward`, `MoE.forward` of the official release.
// Inputs   swiglu: gate, up [n] bf16
//          moe_combine: parts [n_tokens, top_k, width] bf16, order [n_tokens, top_k] u32,
//          shared_part [n_tokens, width] bf16
// Outputs  swiglu: out [n] bf16 = silu(min(gate, limit)) * clamp(up, -limit, limit)
//          moe_combine: out [n_tokens, width] bf16, parts added in f32 in ascending expert id, then
//          the shared expert, one rounding
// Launch   swiglu: one thread per 8 values. moe_combine: grid (ceil(width / 1024), n_tokens), 128
//          threads of 8 channels; width a multiple of 8.
// Limit    memory.
// Arch     sm_80 and later.
// CPU twin `MoeOps::moe`; moe_combine equal bits, swiglu 1 bf16 ulp.

#include "../include/rows.cuh"

extern "C" __global__ void __launch_bounds__(128) swiglu(
    const bf16* __restrict__ gate, const bf16* __restrict__ up, bf16* __restrict__ out, u32 n, float limit) {
    dependency_begin(gate, up);
    const u32 i = (blockIdx.x * blockDim.x + threadIdx.x) * PER_THREAD;
    if (i >= n) return;
    float g[8], u[8];
    load8(gate + i, g);
    load8(up + i, u);
    UNROLL
    for (u32 k = 0; k < 8; ++k) {
        g[k] = min_f32(g[k], limit);
        const float silu = mul_rn(g[k], div_rn(1.0f, 1.0f + exp_f32(-g[k])));
        g[k] = mul_rn(silu, max_f32(min_f32(u[k], limit), -limit));
    }
    store8(out + i, g);
}
EMU_KERNEL(swiglu)

extern "C" __global__ void __launch_bounds__(128) moe_combine(
    const bf16* __restrict__ parts, const u32* __restrict__ order, const bf16* __restrict__ shared_part,
    bf16* __restrict__ out, u32 top_k, u32 width) {
    dependency_begin(parts, order, shared_part);
    const u32 i = (blockIdx.x * blockDim.x + threadIdx.x) * PER_THREAD;
    if (i >= width) return;
    float sum[8];
    load_combined8(shared_part, parts, order, top_k, blockIdx.y, width, i, sum);
    store8(out + static_cast<u64>(blockIdx.y) * width + i, sum);
}
EMU_KERNEL(moe_combine)
