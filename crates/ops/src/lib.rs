//! Every operator DeepSeek-V4 needs: CPU reference with SIMD kernels, and the traits a CUDA backend implements.
