// One line per comparison, and whether all agreed.
#pragma once

#include <cstdio>

inline int n_wrong = 0;

inline void report(const char* what, int differences, int compared) {
    std::printf("%-58s %d of %d differ\n", what, differences, compared);
    n_wrong += differences != 0 || compared == 0;
}

// The exit status of the program `of`.
inline int verdict(const char* of) {
    if (n_wrong) std::printf("%s: %d comparisons differ\n", of, n_wrong);
    else std::printf("%s: everything agrees\n", of);
    return n_wrong != 0;
}
