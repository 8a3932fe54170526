// A kernel of every room, called as bindings/ calls it, against plain loops in double: for instruction sets that this
// machine can only emulate. Exits with 1 if a check fails.
#include "smoke.h"

int main() {
  std::printf("instruction set: %s\n", llamakern::isa_name(llamakern::chosen_isa()));
  smoke::check_rows();
  smoke::check_attention();
  smoke::check_linears();
  smoke::check_heads();
  smoke::check_excitor();
  if (smoke::failures) std::printf("smoke: %d checks FAILED\n", smoke::failures);
  return smoke::failures ? 1 : 0;
}
