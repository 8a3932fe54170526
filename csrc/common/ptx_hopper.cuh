// Instructions of sm_90: mbarriers, and bulk copies that complete on them. Two bodies each, as in ptx.cuh.
#pragma once

#include "ptx.cuh"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

namespace llamakern::cuda {

LK_DEVICE void mbarrier_init(uint64_t* barrier, int count) {
#ifdef __CUDACC__
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
  host::mbarrier_init(barrier, count);
#endif
}

// Arrives, and makes the phase wait for so many bytes of bulk copies as well.
LK_DEVICE void mbarrier_arrive(uint64_t* barrier, unsigned expected_bytes = 0) {
#ifdef __CUDACC__
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(expected_bytes)
               : "memory");
#else
  host::mbarrier_arrive(barrier, expected_bytes);
#endif
}

// Until the phase of this parity is over. A fresh mbarrier is in phase 0: the wait for parity 1 is free.
LK_DEVICE void mbarrier_wait(uint64_t* barrier, int parity) {
#ifdef __CUDACC__
  asm volatile(
      "{\n.reg .pred done;\n"
      "again_%=: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again_%=;\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#else
  host::mbarrier_wait(barrier, parity);
#endif
}

// Global to shared by the copy engine: addresses and size multiples of 16; completes on the mbarrier.
LK_DEVICE void bulk_copy(void* to, const void* from, unsigned bytes, uint64_t* barrier) {
#ifdef __CUDACC__
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
#else
  host::bulk_copy(to, from, bytes, barrier);
#endif
}

}  // namespace llamakern::cuda

#endif
