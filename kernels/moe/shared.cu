// moe_shared_gate_up: the shared expert's gate and up of few tokens with its activation, in one launch.
//
// Source   `Expert.forward` of the official release.
// Inputs   w1, w3 [channels, width] E4M3, with f32 scales per 128 x 128    x [n_tokens, width] bf16, on the FP8
//          grid or not
// Outputs  h [n_tokens, channels] bf16 = silu(min(gate, limit)) * clamp(up, -limit, limit). Equal bits to
//          two of `linear_fp8_8` and `swiglu`.
// Launch   grid ceil(channels / 16), 256 threads: 16 channels of both. Width is a multiple of 16; up to 8 tokens.
//          May start before the launch before it has ended: weights come first.
// Limit    memory: every weight byte is read once.
// Arch     sm_80 and later.
// CPU twin `MoeOps::moe`.

#include "../include/experts80.cuh"

extern "C" __global__ void __launch_bounds__(GEMM_THREADS, 2) moe_shared_gate_up(
    const u8* __restrict__ w1, const float* __restrict__ s1, const u8* __restrict__ w3, const float* __restrict__ s3,
    const bf16* __restrict__ x, bf16* __restrict__ h, u32 channels, u32 width, u32 n_tokens, float limit) {
    auto& s = shared<GemmShared<TOKENS, STAGES>>();
    const u32 first_row = blockIdx.x * TILE_ROWS;
    const bool is_up = warp_id() % ROW_TILES;
    const Weights w = {is_up ? w3 : w1, is_up ? s3 : s1, nullptr, channels, width};
    dependency_trigger();
    prefetch_rows<Format::Fp8>(w, first_row);
    dependency_wait();
    gemm<Format::Fp8, TOKENS, STAGES>(s, w, first_row, after_wait(x), width, n_tokens, [](u32 token) { return token; });
    for (u32 i = threadIdx.x; i < n_tokens * TILE_ROWS; i += GEMM_THREADS) {
        const u32 row = i % TILE_ROWS, token = i / TILE_ROWS;
        if (first_row + row >= channels) continue;
        const float value = gated(gemm_sum(s, 0, row, token), gemm_sum(s, 1, row, token), limit);
        h[static_cast<u64>(token) * channels + first_row + row] = bf16_from_f32(value);
    }
}
EMU_KERNEL(moe_shared_gate_up)
