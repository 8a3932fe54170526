// Are all barriers, waits and fences needed, and would the checks notice if one were missing? mutate.py asks.
//
// HOST_CUDA_SYNC_LIST=file   every place that synchronises is written there, one "address what line" a row
// HOST_CUDA_LEAVE_OUT=0x...  the synchronisations at these addresses (of our file) do nothing
#include <cstdio>
#include <cstdlib>
#include <set>

#include "machine.h"

namespace host {
namespace {

std::map<uintptr_t, const char*> places;
std::set<uintptr_t> without;
std::mutex places_mutex;
bool listing = false;

void write_list() {
  FILE* file = std::fopen(std::getenv("HOST_CUDA_SYNC_LIST"), "a");
  if (!file) return;
  std::vector<uintptr_t> pcs;
  for (const auto& [pc, what] : places) pcs.push_back(pc);
  const std::vector<std::string> lines = where(pcs);
  for (size_t i = 0; i < pcs.size(); ++i) {
    std::fprintf(file, "0x%zx\t%s\t%s\n", size_t(pcs[i] - image_base), places[pcs[i]], lines[i].c_str());
  }
  std::fclose(file);
}

}  // namespace

bool mutating = [] {
  if (std::getenv("HOST_CUDA_SYNC_LIST")) listing = std::atexit(write_list) == 0;
  const char* list = std::getenv("HOST_CUDA_LEAVE_OUT");
  while (list && *list) {
    char* end = nullptr;
    without.insert(std::strtoull(list, &end, 16));
    list = *end == ',' ? end + 1 : "";
  }
  return listing || !without.empty();
}();

bool left_out(const char* what, uintptr_t site) {
  if (listing) {
    const std::lock_guard lock(places_mutex);
    places.emplace(site, what);
  }
  return without.contains(site - image_base);
}

}  // namespace host
