// The table of tests/host_cuda/table.cpp on a real GPU: whether instructions do what the harness takes them to do.
// Compiled apart from nvcc, with table.cpp, where `instructions` is named instructions_on_gpu: see gpu_check.sh.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "../host_cuda/checks.h"
#include "../host_cuda/proof.h"

extern "C" {
int cudaMalloc(void** memory, size_t bytes);
int cudaMemcpy(void* to, const void* from, size_t bytes, int kind);  // 1 to the GPU, 2 from it
int cudaFree(void* memory);
}

// Nothing is registered where a GPU checks nothing.
namespace host {
Buffer::Buffer(const void* data, size_t, const char*) : data(data) {}
Buffer::~Buffer() {}
}  // namespace host

#undef instructions
void instructions(int* y);  // of instructions.cu, on the GPU's memory

static void check(const char* what, int status) {
  if (status == 0) return;
  std::printf("FAIL  %s: CUDA error %d\n", what, status);
  std::exit(1);
}

void instructions_on_gpu(int* y) {
  constexpr size_t bytes = 32 * kInstructions * sizeof(int);
  void* memory = nullptr;
  check("cudaMalloc", cudaMalloc(&memory, bytes));
  check("cudaMemcpy", cudaMemcpy(memory, y, bytes, 1));
  instructions(static_cast<int*>(memory));
  check("instructions", cudaMemcpy(y, memory, bytes, 2));
  cudaFree(memory);
}

int main() { return check_instructions() ? 1 : 0; }
