// Compiles the kernels in the file KERNELS once for each kind of processor that has some, in a namespace of its own.
// In there WIDE marks the functions, and `Lanes` are sixteen f32, `Part` what one register holds of them.
// ON_PROCESSOR then calls one of the processor at hand. No guard: one inclusion for each file of kernels.

#ifdef RLHF_KERNELS
#define WIDE RLHF_AVX512
namespace rlhf::avx512 {
#include KERNELS
}
#undef WIDE
#define WIDE RLHF_AVX2
namespace rlhf::avx2 {
#include KERNELS
}
#undef WIDE
#endif
#undef KERNELS
