// Reports: who did what, at which line. addr2line (binutils) turns addresses into lines.
#include <dlfcn.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>

#include "machine.h"

namespace host {

[[noreturn]] void leave(Machine& m);

std::string format(const uint3& v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

std::string describe(uint64_t access) {
  Machine& m = *running();
  const std::string thread = "thread " + format(m.fibers[thread_of(access)].index);
  if (serial_of(access) == m.serial) return thread;
  const uint64_t b = serial_of(access) - m.first_serial;
  const dim3 g = m.grid->blocks;
  return "block " + format({unsigned(b % g.x), unsigned(b / g.x % g.y), unsigned(b / g.x / g.y)}) + " " + thread;
}

// ---- addresses to lines ---------------------------------------------------------------------------------------------

namespace {

// "void (anonymous namespace)::f<(Mode)1>(float*)" -> "f<(Mode)1>"
std::string plain_name(std::string f) {
  for (const std::string hidden : {"(anonymous namespace)::", "<unnamed>::"}) {
    for (size_t at; (at = f.find(hidden)) != f.npos;) f.erase(at, hidden.size());
  }
  size_t begin = 0, end = 0;
  for (int depth = 0; end < f.size() && f[end] != '\n' && (depth > 0 || f[end] != '('); ++end) {
    depth += (f[end] == '<') - (f[end] == '>');
    if (f[end] == ' ' && depth == 0) begin = end + 1;
  }
  return f.substr(begin, end - begin);
}

std::string without_namespaces(std::string f) {
  for (size_t at; (at = f.find("::")) != f.npos;) {
    size_t begin = at;
    while (begin > 0 && (std::isalnum(static_cast<unsigned char>(f[begin - 1])) || f[begin - 1] == '_')) --begin;
    f.erase(begin, at + 2 - begin);
  }
  return f;
}

bool ours(const std::string& function, const std::string& line) {
  for (const char* file : {"host_cuda.h:", "cuda_names.h:", "atomics.cpp:", "copies.cpp:", "fibers.cpp:", "launch.cpp:",
                           "meetings.cpp:", "order.cpp:", "report.cpp:", "shadow.cpp:"}) {
    if (line.rfind(file, 0) == 0) return true;
  }
  for (const char* prefix : {"host::", "std::", "__tsan_", "__ubsan_"}) {
    if (function.rfind(prefix, 0) == 0) return true;
  }
  return line[0] == '?' || function == "decltype";
}

// Asks addr2line about addresses in one file: the address, then pairs of function and line, inlined ones first.
void read_lines(const char* file, uintptr_t bias, const std::vector<uintptr_t>& pcs,
                std::map<uintptr_t, std::string>& known) {
  std::string command = std::string("addr2line -aCfie '") + file + "'";
  char number[32];
  for (const uintptr_t pc : pcs) {
    std::snprintf(number, sizeof number, " 0x%zx", size_t(pc - 1 - bias));
    command += number;
  }
  FILE* const pipe = popen((command + " 2>/dev/null").c_str(), "r");
  if (!pipe) return;
  std::string* text = nullptr;
  std::string last;
  auto* const buffer = static_cast<char*>(std::malloc(1 << 16));  // not on the small stack of a fiber
  const auto next = [&] { return std::fgets(buffer, 1 << 16, pipe) != nullptr; };
  for (size_t i = 0; next();) {
    if (std::strncmp(buffer, "0x", 2) == 0) {
      if (i == pcs.size()) break;
      text = &known[pcs[i++]];
      last.clear();
      continue;
    }
    const std::string function = plain_name(buffer);
    if (!text || !next()) break;
    std::string line = buffer;
    line = line.substr(line.rfind('/') + 1);
    line = line.substr(0, line.find_first_of(" \n"));
    if (!ours(function, line) && function != last)
      *text += (text->empty() ? "" : " < ") + without_namespaces(function) + " " + line;
    last = function;  // the parts of a split function stand inside one another
  }
  std::free(buffer);
  pclose(pipe);
}

auto& known_lines = *new std::map<uintptr_t, std::string>;  // for reports at the end of the process too
std::mutex known_lines_mutex;

}  // namespace

// Of each address "inner file:line < outer file:line", the harness itself left out.
std::vector<std::string> where(const std::vector<uintptr_t>& pcs) {
  const std::lock_guard lock(known_lines_mutex);
  std::map<std::string, std::vector<uintptr_t>> unknown;  // by file
  for (const uintptr_t pc : pcs) {
    Dl_info info;
    if (known_lines.contains(pc) || !dladdr(reinterpret_cast<void*>(pc), &info)) continue;
    std::vector<uintptr_t>& of_file = unknown[info.dli_fname];
    of_file.push_back(pc);
    known_lines[pc];
  }
  for (const auto& [file, of_file] : unknown) {
    for (size_t i = 0; i < of_file.size(); i += 1000) {
      const auto begin = of_file.begin() + i;
      read_lines(file.c_str(), bias_of(*begin), {begin, begin + std::min<size_t>(1000, of_file.size() - i)},
                 known_lines);
    }
  }
  std::vector<std::string> texts;
  for (const uintptr_t pc : pcs) texts.push_back(known_lines[pc]);
  return texts;
}

std::string where(uintptr_t pc) { return where(std::vector{pc})[0]; }

std::string stack_text(void* frame) {
  std::vector<uintptr_t> pcs;
  for (auto** f = static_cast<void**>(frame); f && f[0] && f[1]; f = static_cast<void**>(f[0])) {
    pcs.push_back(reinterpret_cast<uintptr_t>(f[1]));
  }
  std::string text, last;
  for (const std::string& step : where(pcs)) {
    const std::string function = step.substr(0, step.rfind(' '));  // of a split function both parts are on the stack
    if (!step.empty() && function != last) text += (text.empty() ? "" : " < ") + step;
    last = function;
  }
  return text;
}

// ---- faults ---------------------------------------------------------------------------------------------------------

namespace {

// Who waits where: threads in the same state at the same place share a line.
std::string standstill(const Machine& m, void* frame) {
  std::map<std::string, std::vector<int>> groups;
  for (int i = 0; i < m.threads; ++i) {
    const Fiber& f = m.fibers[i];
    const bool returned = f.waits && std::strcmp(f.waits, "returned") == 0;
    const std::string at = returned ? "" : &f == m.now ? stack_text(frame) : stack_text(f);
    groups[returned  ? "returned"
           : f.waits ? std::string("wait at ") + f.waits + ", " + at
                     : "in a loop of atomic or volatile accesses, " + at]
        .push_back(i);
  }
  std::string text;
  for (const auto& [state, who] : groups) {
    text += "\n  " + std::to_string(who.size()) + (who.size() == 1 ? " thread, " : " threads from ") +
            format(m.fibers[who[0]].index);
    if (who.size() > 1) text += " to " + format(m.fibers[who.back()].index);
    text += " " + state;
  }
  return text;
}

}  // namespace

// "kind: what" ends the launch.
void Machine::stop(std::string what) {
  void* const frame = __builtin_frame_address(0);  // never one passed in: a tail call would have popped it
  const size_t colon = what.find(':');
  const std::string kind = what.substr(0, colon), detail = what.substr(colon + 2);
  fault = kind + " in " + grid->kernel + "\n  block   " + format(block);
  if (kind == "deadlock") {
    fault += "\n  what    " + detail + standstill(*this, frame);
  } else {
    fault += "  thread " + format(now->index) + "\n  what    " + detail + "\n  at      " + stack_text(frame);
  }
  ordering = {};
  leave(*this);
}

#define HOST_FORMAT(text)                               \
  char text[512];                                       \
  va_list arguments;                                    \
  va_start(arguments, format);                          \
  std::vsnprintf(text, sizeof text, format, arguments); \
  va_end(arguments)

void fail(const char* format, ...) {
  HOST_FORMAT(text);
  running()->stop(std::string("misuse: ") + text);
}
void fault(const char* format, ...) {
  HOST_FORMAT(text);
  running()->stop(text);
}
void fail_launch(const std::string& what) { throw std::runtime_error("launch: " + what); }

}  // namespace host

// ---- what -fsanitize=alignment,bounds,signed-integer-overflow calls where the language forbids what follows
// ------------

namespace {
struct Place {
  const char* file;
  uint32_t line, column;
};
struct Type {
  uint16_t kind, info;
  char name[1];
};
struct Mismatch {
  Place place;
  const Type* type;
  uint8_t log_alignment, kind;
};
struct Index {
  Place place;
  const Type *array, *index;
};
struct Overflow {
  Place place;
  const Type* type;
};
bool off() { return !host::running() || !host::checks; }
}  // namespace

extern "C" {
HOST_HIDDEN void __ubsan_handle_type_mismatch_v1(Mismatch* m, uintptr_t p) {
  if (off()) return;
  host::fault("misaligned: %s at address %#zx, which is no multiple of %d", m->type->name, p, 1 << m->log_alignment);
}
HOST_HIDDEN void __ubsan_handle_out_of_bounds(Index* i, intptr_t index) {
  if (!off()) host::fault("out of bounds: index %zd of an array %s", index, i->array->name);
}
#define HOST_OVERFLOW(op, sign)                                                                 \
  HOST_HIDDEN void __ubsan_handle_##op##_overflow(Overflow* o, intptr_t a, intptr_t b) {        \
    if (!off()) host::fault("overflow: %zd " sign " %zd does not fit %s", a, b, o->type->name); \
  }
HOST_OVERFLOW(add, "+")
HOST_OVERFLOW(sub, "-")
HOST_OVERFLOW(mul, "*")
HOST_OVERFLOW(divrem, "/")
HOST_HIDDEN void __ubsan_handle_negate_overflow(Overflow* o, intptr_t a) {
  if (!off()) host::fault("overflow: -(%zd) does not fit %s", a, o->type->name);
}
}
