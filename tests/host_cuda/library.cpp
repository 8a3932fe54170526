#include <cstdio>
#include <stdexcept>
#include <vector>

#include "checks.h"
#include "proof.h"
#include "proof_api.h"

int proof_check() { return check_all(); }
int proof_clock() { return clock_all(); }

int proof_traffic() {
  alignas(128) static float x[1024], y[1024];
  const host::Buffer rx(x, sizeof x, "x"), ry(y, sizeof y, "y");
  traffic(y, x);
  return 0;
}

int proof_bug(const char* name, char* report, int bytes) {
  std::vector<float> x(192, 1.0f), y(192, 0.0f);
  const host::Buffer rx(x.data(), x.size() * 4, "x"), ry(y.data(), y.size() * 4, "y");
  try {
    bugs().at(name)(y.data(), x.data());
  } catch (const std::runtime_error& e) {
    std::snprintf(report, bytes, "%s", e.what());
    return 1;
  }
  return 0;
}
