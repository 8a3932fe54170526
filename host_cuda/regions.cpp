// The memory that kernels may touch: registered buffers, shared arrays (found by name in the symbol table), constants.
#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>

#include "machine.h"

namespace host {

namespace {

struct Image {
  uintptr_t inside;              // an address
  uintptr_t bias = 0;            // of its addresses to those in the file
  uintptr_t locals = 0;          // the calling thread's thread_locals
  uintptr_t begin = 0, end = 0;  // the loaded piece around the address
};

// The program or library around p.
Image image_of(uintptr_t p) {
  Image image{p};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* result) {
        auto& image = *static_cast<Image*>(result);
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const ElfW(Phdr)& piece = info->dlpi_phdr[i];
          const uintptr_t begin = info->dlpi_addr + piece.p_vaddr;
          if (piece.p_type != PT_LOAD || image.inside < begin || image.inside >= begin + piece.p_memsz) continue;
          image.bias = info->dlpi_addr;
          image.locals = reinterpret_cast<uintptr_t>(info->dlpi_tls_data);
          image.begin = begin;
          image.end = begin + piece.p_memsz;
          return 1;
        }
        return 0;
      },
      &image);
  return image;
}

const auto kHere = reinterpret_cast<uintptr_t>(&take_machine);

}  // namespace

const uintptr_t image_base = image_of(kHere).bias;
uintptr_t bias_of(uintptr_t pc) { return image_of(pc).bias; }

namespace {

std::map<size_t, std::vector<Cell*>> spare;  // shadows, by bytes: all that they tell is older than launches to come
std::mutex spare_mutex;
constexpr size_t kGiant = 4 << 20;  // bytes of memory whose shadow no launch leaves to the next

struct Entry {
  Region region;  // without a shadow where it is a giant
  bool kept;      // by remember
  int users;      // Buffers
};
std::vector<Entry> entries;  // in the order in which they came
std::mutex entries_mutex;

// A new entry, or the known one for the same memory. What remember entered for a part of it was freed since.
Entry& enter(const void* pointer, size_t bytes, const char* name) {
  const auto data = reinterpret_cast<uintptr_t>(pointer);
  for (Entry& e : entries) {
    if (e.region.data != data || e.region.bytes != bytes) continue;
    e.region.name = name;
    return e;
  }
  std::erase_if(entries,
                [&](const Entry& e) { return e.users == 0 && e.region.begin < data + bytes && data < e.region.end; });
  const Shadow shadow = bytes < kGiant ? new_shadow(data, bytes) : Shadow{};
  const Region region{data, data + bytes, name, Region::kGlobal, shadow, data, bytes};
  return entries.emplace_back(Entry{region, false, 0});
}

template <typename Goes>
void remove(const void* pointer, Goes goes) {
  const auto data = reinterpret_cast<uintptr_t>(pointer);
  for (auto i = entries.begin(); i != entries.end();) {
    i = i->region.data == data && goes(*i) ? entries.erase(i) : i + 1;
  }
}

using Pieces = std::map<uintptr_t, Region>;  // by begin; they do not overlap

void cut(Pieces& pieces, uintptr_t begin, uintptr_t end) {
  auto i = pieces.upper_bound(begin);
  if (i != pieces.begin()) --i;
  while (i != pieces.end() && i->first < end) {
    const Region old = i->second;
    i = old.end <= begin ? std::next(i) : pieces.erase(i);
    if (old.end <= begin) continue;
    Region left = old, right = old;
    left.end = begin, right.begin = end;
    if (left.begin < begin) pieces.emplace(left.begin, left);
    if (end < right.end) pieces.emplace(end, right);
  }
}

// Pages that are never touched take no memory, so that a shadow may be larger than the machine's.
Shadow giant_shadow(uintptr_t data, size_t bytes) {
  const size_t words = (data % 4 + bytes + 3) / 4, size = 5 * words * sizeof(Cell);
  constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* const pages = mmap(nullptr, size, PROT_READ | PROT_WRITE, kFlags, -1, 0);
  if (pages == MAP_FAILED) fail_launch("no address space for the shadow of " + std::to_string(bytes) + " bytes");
  Cell* const cells = static_cast<Cell*>(pages);
  return {cells, cells + words, std::shared_ptr<void>(pages, [size](void* p) { munmap(p, size); })};
}

}  // namespace

Shadow new_shadow(uintptr_t data, size_t bytes) {
  size_t size = 256;
  while (size < data % 4 + bytes + 3) size *= 2;
  Cell* cells = nullptr;
  {
    const std::lock_guard lock(spare_mutex);
    if (std::vector<Cell*>& fit = spare[size]; !fit.empty()) {
      cells = fit.back();
      fit.pop_back();
    }
  }
  if (!cells) cells = static_cast<Cell*>(std::calloc(size + size / 4, sizeof(Cell)));
  if (!cells) fail_launch("no memory for the shadow of " + std::to_string(bytes) + " bytes");
  const std::shared_ptr<void> owner(cells, [size](void* p) {
    const std::lock_guard lock(spare_mutex);
    spare[size].push_back(static_cast<Cell*>(p));
  });
  return {cells, cells + size / 4, owner};
}

void remember(const void* data, size_t bytes, const char* name) {
  if (!bytes) return;
  const std::lock_guard lock(entries_mutex);
  enter(data, bytes, name).kept = true;
}

void forget(const void* data) {
  const std::lock_guard lock(entries_mutex);
  remove(data, [](Entry&) { return true; });
}

Buffer::Buffer(const void* p, size_t bytes, const char* name) : data(bytes ? p : nullptr) {
  if (!bytes) return;
  const std::lock_guard lock(entries_mutex);
  ++enter(p, bytes, name).users;
}

Buffer::~Buffer() {
  const std::lock_guard lock(entries_mutex);
  remove(data, [](Entry& e) { return e.users > 0 && --e.users == 0 && !e.kept; });
}

// Where entries overlap, as views of a buffer do, the later one counts. Giants get a shadow that goes with its regions.
std::vector<Region> registered() {
  const std::lock_guard lock(entries_mutex);
  Pieces pieces;
  for (const Entry& e : entries) {
    cut(pieces, e.region.begin, e.region.end);
    Region region = e.region;
    if (!region.shadow.words) region.shadow = giant_shadow(region.data, region.bytes);
    pieces.emplace(region.begin, std::move(region));
  }
  std::vector<Region> all;
  for (const auto& [begin, region] : pieces) all.push_back(region);
  return all;
}

// ---- shared arrays --------------------------------------------------------------------------------------------------

namespace {

struct SharedArray {
  std::string name;
  size_t offset, bytes;
};

// The function-local thread_locals (_ZZ...) in the symbol table of this very image.
std::vector<SharedArray> read_symbols() {
  Dl_info info;
  dladdr(reinterpret_cast<void*>(&take_machine), &info);
  std::vector<SharedArray> found;
  FILE* file = std::fopen(info.dli_fname, "rb");
  if (!file) fail_launch(std::string("cannot read the symbols of ") + info.dli_fname);
  std::vector<char> image;
  char chunk[1 << 16];
  while (const size_t n = std::fread(chunk, 1, sizeof chunk, file)) image.insert(image.end(), chunk, chunk + n);
  std::fclose(file);
  const auto* header = reinterpret_cast<const ElfW(Ehdr)*>(image.data());
  const auto* section = reinterpret_cast<const ElfW(Shdr)*>(image.data() + header->e_shoff);
  bool any = false;
  for (int s = 0; s < header->e_shnum; ++s) {
    if (section[s].sh_type != SHT_SYMTAB) continue;
    any = true;
    const auto* symbol = reinterpret_cast<const ElfW(Sym)*>(image.data() + section[s].sh_offset);
    const char* names = image.data() + section[section[s].sh_link].sh_offset;
    for (size_t i = 0; i < section[s].sh_size / sizeof *symbol; ++i) {
      const char* name = names + symbol[i].st_name;
      if ((symbol[i].st_info & 15) != STT_TLS || std::strncmp(name, "_ZZ", 3) != 0) continue;
      int status = 0;
      const std::unique_ptr<char, void (*)(void*)> plain(abi::__cxa_demangle(name, nullptr, nullptr, &status),
                                                         std::free);
      const std::string text = status == 0 ? plain.get() : name;
      found.push_back({text.substr(text.rfind(':') + 1), symbol[i].st_value, symbol[i].st_size});
    }
  }
  if (!any) fail_launch(std::string(info.dli_fname) + " is stripped: its shared arrays cannot be found");
  return found;
}

thread_local std::vector<Region> shared_arrays;  // not inside a function: there it would be taken for one of them

}  // namespace

std::vector<Region> static_shared() {
  static const std::vector<SharedArray> arrays = read_symbols();
  std::vector<Region>& all = shared_arrays;  // this first use makes the block of all thread_locals
  if (!all.empty() || arrays.empty()) return all;
  const uintptr_t begin = image_of(kHere).locals;
  for (const SharedArray& a : arrays) {
    const uintptr_t data = begin + a.offset;
    all.push_back({data, data + a.bytes, a.name, Region::kShared, new_shadow(data, a.bytes), data, a.bytes});
  }
  return all;
}

// ---- constants ------------------------------------------------------------------------------------------------------

// Is p in a program or library? Then the loaded piece around it may be read; it is not watched.
bool constant_region(uintptr_t p, Region& found) {
  const Image image = image_of(p);
  found = {image.begin, image.end, "constants", Region::kConstant, {}, image.begin, 0};
  return image.end != 0;
}

}  // namespace host
