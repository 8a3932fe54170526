// Working memory of a kernel: 64-byte aligned, not zeroed, returned at the end of the scope.
// Small pieces come from a per-thread store that stays warm between calls; scopes nest like a stack.
#pragma once
#include <cstddef>
#include <cstdint>

namespace llamakern {

void* scratch_take(size_t bytes);
void scratch_give(void* piece, size_t bytes);

template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t n) : bytes_(size_t(n) * sizeof(T)), data_(static_cast<T*>(scratch_take(bytes_))) {}
  ~Scratch() { scratch_give(data_, bytes_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  operator T*() { return data_; }
  T* get() { return data_; }

 private:
  size_t bytes_;
  T* data_;
};

}  // namespace llamakern
