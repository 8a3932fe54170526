// What libproof.so offers to main.cpp and to ctypes.
#pragma once
#define PROOF_API extern "C" __attribute__((visibility("default")))

PROOF_API int proof_check();  // how many kernels failed
PROOF_API int proof_clock();
PROOF_API int proof_traffic();
PROOF_API int proof_bug(const char* name, char* report, int bytes);  // 1 if there was a report
