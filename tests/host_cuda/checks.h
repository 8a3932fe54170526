#pragma once
int check_all();  // how many kernels failed
int clock_all();
int check_registry();
int check_table(const int* y);  // of instructions(y), which began as all -1
