// proof check | clock | traffic | bug NAME
#include <cstdio>
#include <stdexcept>
#include <vector>

#include "checks.h"
#include "proof.h"

namespace {

int run_bug(const std::string& name) {
  std::vector<float> x(192, 1.0f), y(192, 0.0f);
  const host::Buffer rx(x.data(), x.size() * 4, "x"), ry(y.data(), y.size() * 4, "y");
  try {
    bugs().at(name)(y.data(), x.data());
  } catch (const std::runtime_error& e) {
    std::printf("%s\n", e.what());
    return 1;
  }
  return 0;
}

int run_traffic() {
  alignas(128) static float x[1024], y[1024];
  const host::Buffer rx(x, sizeof x, "x"), ry(y, sizeof y, "y");
  traffic(y, x);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string verb = argc > 1 ? argv[1] : "check";
  if (verb == "bug" && argc > 2) return run_bug(argv[2]);
  if (verb == "traffic") return run_traffic();
  return verb == "clock" ? clock_all() : check_all();
}
