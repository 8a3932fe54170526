// Launching a grid: OS threads take blocks in turn and run each to its end.
#include <cstdlib>
#include <numeric>
#include <stdexcept>
#include <thread>

#include "machine.h"
#include "traffic.h"

namespace host {
namespace {

std::atomic<uint64_t> next_serial{1};

long setting(const char* name, long otherwise) {
  const char* text = std::getenv(name);
  return text && *text ? std::atol(text) : otherwise;
}

void check_launch(const Grid& g) {
  const dim3 b = g.blocks, t = g.threads;
  const uint64_t threads = uint64_t(t.x) * t.y * t.z;
  const std::string name = std::string(" (") + g.kernel + ")";
  if (threads < 1 || threads > kMaxThreads || t.x > 1024 || t.y > 1024 || t.z > 64) {
    fail_launch("a block has 1 to 1024 threads, got " + format(t) + name);
  }
  if (!b.x || !b.y || !b.z || b.x > 0x7fffffff || b.y > 65535 || b.z > 65535) {
    fail_launch("a grid has 1 to 2147483647 x 65535 x 65535 blocks, got " + format(b) + name);
  }
  if (g.shared_bytes > kMaxShared) {
    fail_launch("a block has at most 232448 bytes of shared memory, got " + std::to_string(g.shared_bytes) + name);
  }
  if (g.parameter_bytes > 4096) {
    fail_launch("parameters have at most 4096 bytes, got " + std::to_string(g.parameter_bytes) + name);
  }
}

// Makes the machine ready to run blocks of the grid on this OS thread.
void prepare(Machine& m, LaunchState& launch, const std::vector<Region>& buffers) {
  m.launch = &launch;
  m.grid = launch.grid;
  m.first_serial = launch.first_serial;
  m.threads = launch.grid->threads.x * launch.grid->threads.y * launch.grid->threads.z;
  m.warps = (m.threads + 31) / 32;
  m.fault.clear();
  m.regions = static_shared();
  const auto dynamic = reinterpret_cast<uintptr_t>(m.dynamic);
  const size_t bytes = launch.grid->shared_bytes;
  m.regions.push_back(
      {dynamic, dynamic + bytes, "dynamic shared memory", Region::kShared, m.dynamic_shadow, dynamic, bytes});
  m.regions.insert(m.regions.end(), buffers.begin(), buffers.end());
  m.sort_regions();
  if (traffic_wanted() && !m.traffic) m.traffic = new Traffic;
}

// Where block number i of a shuffled grid is in the true order: i times a number without common factors, plus another.
uint64_t shuffled(uint64_t i, uint64_t blocks, uint64_t seed) {
  uint64_t factor = (seed * 2654435761u) % blocks | 1;
  while (std::gcd(factor, blocks) != 1) factor += 2;
  return uint64_t((static_cast<unsigned __int128>(i) * factor + seed) % blocks);
}

}  // namespace

void run(const Grid& grid) {
  check_launch(grid);
  checks = setting("HOST_CUDA_CHECKS", 1) != 0;
  const uint64_t seed = setting("HOST_CUDA_SEED", 0);
  const uint64_t blocks = uint64_t(grid.blocks.x) * grid.blocks.y * grid.blocks.z;
  LaunchState launch;
  launch.grid = &grid;
  launch.first_serial = next_serial.fetch_add(blocks);
  launch.os_threads = int(std::min<uint64_t>(blocks, std::clamp(setting("HOST_CUDA_THREADS", 1), 1l, 32l)));
  const std::vector<Region> buffers = registered();
  std::atomic<uint64_t> next{0};
  std::string fault;
  const auto work = [&] {
    Machine& m = take_machine();
    prepare(m, launch, buffers);
    for (uint64_t i; (i = next++) < blocks && m.fault.empty();) {
      const uint64_t b = seed ? shuffled(i, blocks, seed) : i;
      m.block = dim3(b % grid.blocks.x, b / grid.blocks.x % grid.blocks.y, b / grid.blocks.x / grid.blocks.y);
      m.serial = launch.first_serial + b;
      m.random = seed ? (seed + b) * 0x9e3779b97f4a7c15 | 1 : 0;
      m.run_block();
    }
    if (m.traffic) m.traffic->flush_all();
    m.regions.clear();
    if (!m.fault.empty()) next = blocks;
    const std::lock_guard lock(launch.mutex);
    if (fault.empty()) fault = m.fault;
    give_back(m);
  };
  const auto work_or_report = [&] {
    try {
      work();
    } catch (const std::exception& e) {
      const std::lock_guard lock(launch.mutex);
      fault = e.what();
    }
  };
  std::vector<std::thread> helpers;
  for (int i = 1; i < launch.os_threads; ++i) helpers.emplace_back(work_or_report);
  work_or_report();
  for (std::thread& t : helpers) t.join();
  if (!fault.empty()) throw std::runtime_error(fault);
}

}  // namespace host
