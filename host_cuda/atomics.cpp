// Atomics. Several OS threads may run blocks, so these are real ones.
#include "machine.h"

namespace host {
namespace {

template <typename T, typename F>
T change(T* p, uintptr_t site, F&& f) {
  Machine& m = *running();
  T old, next;
  {
    const AtomicOrder order(reinterpret_cast<uintptr_t>(p));
    check_access(Kind::kAtomicUpdate, reinterpret_cast<uintptr_t>(p), sizeof(T), sizeof(T), site);
    const std::atomic_ref<T> atomic(*p);
    old = atomic.load();
    next = f(old);
    while (!atomic.compare_exchange_weak(old, next)) next = f(old);
  }
  m.give_way(std::memcmp(&old, &next, sizeof(T)) != 0);
  return old;
}

}  // namespace

uint32_t atomic_load(const uint32_t* p) {
  Machine& m = *running();
  m.give_way(false);
  const AtomicOrder order(reinterpret_cast<uintptr_t>(p));
  check_access(Kind::kAtomicRead, reinterpret_cast<uintptr_t>(p), 4, 4, HOST_SITE);
  return std::atomic_ref(*const_cast<uint32_t*>(p)).load();
}

void atomic_store(uint32_t* p, uint32_t value) {
  Machine& m = *running();
  {
    const AtomicOrder order(reinterpret_cast<uintptr_t>(p));
    check_access(Kind::kAtomicWrite, reinterpret_cast<uintptr_t>(p), 4, 4, HOST_SITE);
    std::atomic_ref(*p).store(value);
  }
  m.give_way(true);
}

}  // namespace host

#define HOST_ATOMIC(T, name, formula)                                                         \
  T name(T* to, T value) {                                                                    \
    return host::change(to, HOST_SITE, [&]([[maybe_unused]] T old) -> T { return formula; }); \
  }
#define HOST_ATOMIC_INTEGER(T)                    \
  HOST_ATOMIC(T, atomicMin, std::min(old, value)) \
  HOST_ATOMIC(T, atomicMax, std::max(old, value)) \
  HOST_ATOMIC(T, atomicAnd, old& value)           \
  HOST_ATOMIC(T, atomicOr, old | value)           \
  HOST_ATOMIC(T, atomicXor, old ^ value)
#define HOST_ATOMIC_WORD(T)                                                                        \
  HOST_ATOMIC(T, atomicExch, value)                                                                \
  T atomicCAS(T* to, T expected, T value) {                                                        \
    return host::change(to, HOST_SITE, [&](T old) -> T { return old == expected ? value : old; }); \
  }

HOST_ATOMIC_INTEGER(int)
HOST_ATOMIC_INTEGER(unsigned)
HOST_ATOMIC_INTEGER(long long)
HOST_ATOMIC_INTEGER(unsigned long long)
HOST_ATOMIC_WORD(int)
HOST_ATOMIC_WORD(unsigned)
HOST_ATOMIC_WORD(unsigned long long)
HOST_ATOMIC(float, atomicExch, value)
HOST_ATOMIC(int, atomicAdd, int(unsigned(old) + unsigned(value)))
HOST_ATOMIC(unsigned, atomicAdd, old + value)
HOST_ATOMIC(unsigned long long, atomicAdd, old + value)
HOST_ATOMIC(float, atomicAdd, old + value)
HOST_ATOMIC(double, atomicAdd, old + value)
HOST_ATOMIC(int, atomicSub, int(unsigned(old) - unsigned(value)))
HOST_ATOMIC(unsigned, atomicSub, old - value)
HOST_ATOMIC(unsigned, atomicInc, old >= value ? 0 : old + 1)
HOST_ATOMIC(unsigned, atomicDec, old == 0 || old > value ? value : old - 1)

unsigned short atomicCAS(unsigned short* to, unsigned short expected, unsigned short value) {
  return host::change(to, HOST_SITE, [&](unsigned short old) { return old == expected ? value : old; });
}
