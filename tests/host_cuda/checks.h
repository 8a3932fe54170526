#pragma once
int check_all();  // how many kernels failed
int clock_all();
int check_instructions();
