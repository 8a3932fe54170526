// proof check | clock | traffic | bug NAME
#include <cstdio>
#include <string>

#include "proof_api.h"

int main(int argc, char** argv) {
  const std::string verb = argc > 1 ? argv[1] : "check";
  if (verb == "bug" && argc > 2) {
    static char report[4096];
    const int reported = proof_bug(argv[2], report, sizeof report);
    if (reported) std::printf("%s\n", report);
    return reported;
  }
  if (verb == "traffic") return proof_traffic();
  return verb == "clock" ? proof_clock() : proof_check();
}
